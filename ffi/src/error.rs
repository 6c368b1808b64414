//! What C gets when a call fails: a negative errno value, errno, and the message of the thread.

use std::cell::Cell;
use std::ffi::{c_char, c_int};

use nix::errno::Errno;
use tidegate_driver::bytes::{Failure, Result};
use tidegate_driver::format::byte_ring::put_text;

const MESSAGE_BYTES: usize = 512;

thread_local! {
    // Without a destructor, so that it also serves calls that a thread makes at its very end.
    static MESSAGE: Cell<[u8; MESSAGE_BYTES]> = const { Cell::new([0; MESSAGE_BYTES]) };
}

/// Message of the last call of this thread that failed.
pub fn message() -> *const c_char {
    MESSAGE.with(|message| message.as_ptr().cast())
}

/// For a call that returns 0 or an errno value.
pub fn status(call: impl FnOnce() -> Result<()>) -> c_int {
    match call() {
        Ok(()) => 0,
        Err(failure) => -note(&failure),
    }
}

/// For a call that returns a count or an errno value.
pub fn count(call: impl FnOnce() -> Result<i64>) -> i64 {
    call().unwrap_or_else(|failure| i64::from(-note(&failure)))
}

/// For a call that has `failed` as the result of failure, and the errno value in errno.
pub fn value<T>(failed: T, call: impl FnOnce() -> Result<T>) -> T {
    call().unwrap_or_else(|failure| {
        Errno::set_raw(note(&failure));
        failed
    })
}

/// Keeps the message, gives the errno value: never 0 or less, whatever the failure holds.
fn note(failure: &Failure) -> c_int {
    let mut text = [0; MESSAGE_BYTES];
    put_text(&mut text[..MESSAGE_BYTES - 1], &failure.what);
    MESSAGE.set(text);
    if failure.errno.0 > 0 { failure.errno.0 } else { libc::EIO }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_negative_and_have_a_message() {
        let text = || MESSAGE.get().iter().take_while(|b| **b != 0).count();
        assert_eq!((status(|| Ok(())), text()), (0, 0));
        assert_eq!(status(|| Err(Failure::new(libc::EBADF, "gone"))), -libc::EBADF);
        assert_eq!(text(), 4);
        assert_eq!(count(|| Err(Failure::new(0, "€".repeat(1000)))), -i64::from(libc::EIO));
        assert_eq!(text(), 510, "cut between characters, and a zero at the end");
        assert_eq!((value(7, || Err(Failure::new(libc::ENOMEM, ""))), Errno::last()), (7, Errno::ENOMEM));
    }
}
