//! A fork in the middle of the first call that a process makes: alone here, since a process has one.

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tidegate_driver::bytes::client::{Device, Options};

const NOBODY: &str = "/nowhere/at/all.sock";
const TRIES: u32 = 500;

fn open() -> i32 {
    Device::open(NOBODY, &Options::default()).unwrap_err().errno.0 - libc::ENOENT
}

/// How a child ended that did this; what it gives is the exit status.
#[expect(unsafe_code, reason = "forks")]
fn status_of(child: impl FnOnce() -> i32) -> i32 {
    let mut status = 0;
    // SAFETY: the child uses what goes through a fork, and ends without the exit handlers of this process.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            libc::alarm(5);
            libc::_exit(child());
        }
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
    }
    status
}

/// A thread opens; the process forks so many turns of a loop later; the child opens.
fn fork_while_opening(turns: u32) -> i32 {
    let go = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            go.store(true, Ordering::SeqCst);
            open()
        });
        while !go.load(Ordering::SeqCst) {
            hint::spin_loop();
        }
        (0..turns).for_each(|_| hint::spin_loop());
        i32::from(status_of(open) != 0)
    })
}

#[test]
fn a_child_opens_whatever_its_parent_was_at() {
    let hung = (0..TRIES).find(|turn| status_of(|| fork_while_opening(turn % 50 * 20)) != 0);
    assert_eq!(hung, None, "a child did not end well");
}
