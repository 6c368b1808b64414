//! Children of a test.

#![expect(unsafe_code, reason = "forks")]

use std::time::Duration;

/// How a child ended that did this; what it gives is the exit status. One that hangs is killed after `patience`.
pub fn status_of(patience: Duration, child: impl FnOnce() -> i32) -> i32 {
    let mut status = 0;
    // SAFETY: the child uses what goes through a fork, and ends without the exit handlers of this process.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            libc::alarm(patience.as_secs() as libc::c_uint);
            libc::_exit(child());
        }
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
    }
    status
}
