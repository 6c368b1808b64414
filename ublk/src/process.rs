//! What a process does before it may serve a block device.
//!
//! A server is part of the machine's storage: memory that the kernel wants back may have to be written through it, so it
//! must not wait for memory that is freed by writing. Call [`harden`] first thing, before any thread is started: most
//! of it is inherited by threads and does not reach those that exist.

#![expect(unsafe_code, reason = "prctl and mlockall")]

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// `PR_SET_IO_FLUSHER` of linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// What to do in [`harden`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardening {
    /// Keep what is mapped now in memory (`mlockall(MCL_CURRENT)`).
    pub lock_memory: bool,
    /// Own mount namespace: a process that shares one with a mount of its own device cannot end while the mount waits
    /// for it. Paths opened later do not see mounts made after this.
    pub own_mounts: bool,
    /// `oom_score_adj`: -1000 (never killed for memory) to 1000; `None` leaves it.
    pub oom_score_adj: Option<i16>,
}

impl Default for Hardening {
    fn default() -> Hardening {
        Hardening { lock_memory: false, own_mounts: true, oom_score_adj: Some(-1000) }
    }
}

/// Prepares the process. Returns what could not be done, in words: a server works without, but not safely under memory
/// pressure.
#[must_use = "the warnings are for the log"]
pub fn harden(hardening: Hardening) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Err(e) = set_io_flusher() {
        warnings.push(format!(
            "cannot become an I/O flusher (needs CAP_SYS_RESOURCE): {e}; the machine may deadlock when memory is short"
        ));
    }
    if hardening.own_mounts
        && let Err(e) = own_mounts()
    {
        warnings.push(format!(
            "cannot get an own mount namespace (needs CAP_SYS_ADMIN): {e}; the process may hang at its end while the \
             device is mounted"
        ));
    }
    if let Some(adj) = hardening.oom_score_adj
        && let Err(e) = fs::write("/proc/self/oom_score_adj", adj.to_string())
    {
        warnings.push(format!(
            "cannot set oom_score_adj to {adj}: {e}; the kernel may kill the server for its memory"
        ));
    }
    if hardening.lock_memory {
        // SAFETY: no pointers.
        if unsafe { libc::mlockall(libc::MCL_CURRENT) } != 0 {
            let e = io::Error::last_os_error();
            warnings.push(format!("cannot lock memory: {e}; set LimitMEMLOCK=infinity"));
        }
    }
    warnings
}

/// Marks the calling thread, and threads it starts, as part of the storage: its allocations never wait for I/O.
pub fn set_io_flusher() -> io::Result<()> {
    // SAFETY: no pointers.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn own_mounts() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Private, not slave: a mount of the device must not arrive here from outside either.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
}
