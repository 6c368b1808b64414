//! Making a ring, and saying why there is none.

use io_uring::IoUring;

use crate::base::{Error, ErrorKind, Result};

/// The ring with the cheapest way of completion that the kernel has: 6.6 and newer need no array of indices.
pub(super) fn ring(sq_entries: u32) -> Result<IoUring> {
    let mut last = None;
    for no_sqarray in [true, false] {
        let mut builder = IoUring::builder();
        builder
            .dontfork()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(sq_entries * 4);
        if no_sqarray {
            builder.setup_no_sqarray();
        }
        match builder.build(sq_entries) {
            Ok(ring) => return Ok(ring),
            Err(e) => last = Some(e),
        }
    }
    let e = last.expect("two attempts were made");
    let hint = match e.raw_os_error() {
        Some(libc::EPERM) => {
            "io_uring is disabled here: set the sysctl kernel.io_uring_disabled to 0, or lift the seccomp filter"
        }
        Some(libc::ENOSYS) => {
            "this kernel has no io_uring: use one built with CONFIG_IO_URING (6.1 or newer)"
        }
        Some(libc::EINVAL) => "this kernel's io_uring is too old: use 6.1 or newer",
        Some(libc::ENOMEM) => "not enough memory, or RLIMIT_MEMLOCK is too low",
        Some(libc::EMFILE | libc::ENFILE) => "too many open files: raise LimitNOFILE",
        _ => "see dmesg",
    };
    let kind = match e.raw_os_error() {
        Some(libc::EPERM) => return Err(Error::io(format!("cannot set up an io_uring; {hint}"), e)),
        Some(libc::ENOSYS | libc::EINVAL) => ErrorKind::Unsupported,
        _ => return Err(Error::io(format!("cannot set up an io_uring; {hint}"), e)),
    };
    Err(Error::new(kind, format!("cannot set up an io_uring ({e}); {hint}")))
}
