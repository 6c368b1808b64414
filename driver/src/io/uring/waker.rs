//! Wake-ups from other threads: an eventfd that the ring reads.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::{Error, Result};
use crate::volume::Wake;

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    /// A wake-up was triggered that the reactor has not taken yet: further ones merge into it without a system call.
    pending: AtomicBool,
}

/// Wakes the thread of a reactor. Cheap to clone; usable from any thread; harmless after the reactor is gone.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

impl Wake for Waker {
    fn wake(&self) {
        // The swap (not a load) also orders what the caller wrote before against the reactor's `taken`.
        if self.0.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let one = 1u64.to_ne_bytes();
        loop {
            // SAFETY: eight readable bytes, and an eventfd that `self` keeps open.
            let written = unsafe { libc::write(self.0.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
            if written == 8 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                // An eventfd whose counter is below its limit takes the write; `pending` keeps it at 1.
                debug_assert_eq!(written, 8);
                return;
            }
        }
    }
}

/// The reactor's end.
#[derive(Debug)]
pub(super) struct WakeReader {
    shared: Arc<Shared>,
    /// Where the kernel puts the counter; on the heap so that the reactor may move. Raw, because the kernel writes
    /// to it behind the compiler's back.
    counter: *mut u64,
    armed: bool,
}

impl WakeReader {
    pub fn new() -> Result<WakeReader> {
        // Blocking on purpose: on a non-blocking file io_uring would fail the read instead of waiting.
        // SAFETY: no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::io("cannot create an eventfd", io::Error::last_os_error()));
        }
        // SAFETY: just created, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let shared = Arc::new(Shared { fd, pending: AtomicBool::new(false) });
        Ok(WakeReader { shared, counter: Box::into_raw(Box::new(0)), armed: false })
    }

    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.shared))
    }

    /// Descriptor and destination of the read; counts as armed from here on.
    pub fn read_into(&mut self) -> (RawFd, *mut u8) {
        self.armed = true;
        (self.shared.fd.as_raw_fd(), self.counter.cast())
    }

    /// The read completed: wake-ups from now on trigger another one. Everything written before the wake-ups taken
    /// here is visible after this.
    pub fn taken(&mut self) {
        self.armed = false;
        self.shared.pending.swap(false, Ordering::AcqRel);
    }

    pub fn is_armed(&self) -> bool {
        self.armed
    }

    /// Gives the memory up for good: the kernel may still write to it.
    pub fn leak(&mut self) {
        self.counter = std::ptr::null_mut();
    }
}

impl Drop for WakeReader {
    fn drop(&mut self) {
        if !self.counter.is_null() {
            // SAFETY: from `Box::into_raw` in `new`, and no read is armed (the reactor calls `leak` otherwise).
            drop(unsafe { Box::from_raw(self.counter) });
        }
    }
}
