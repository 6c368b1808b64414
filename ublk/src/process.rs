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
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// `PR_SET_IO_FLUSHER` of linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// What [`harden`] has done.
#[derive(Debug, Default)]
pub struct Hardened {
    /// What could not be done, in words: a server works without, but not safely under memory pressure.
    pub warnings: Vec<String>,
    /// The process has mounts of its own, and what happens to them happens nowhere else.
    pub own_mounts: bool,
}

/// Prepares the process.
///
/// - I/O flusher: allocations never wait for write-out.
/// - An own mount namespace: a process that shares one with a mount of its own device cannot end while the mount waits for
///   it. Paths opened later do not see mounts made after this.
/// - Never killed for its memory.
/// - What it has touched stays in memory; what it maps and never touches costs nothing.
/// - As many open files as the machine allows: a volume takes several, and the default is 1024.
#[must_use = "the warnings are for the log"]
pub fn harden() -> Hardened {
    let mut done = Hardened::default();
    let warnings = &mut done.warnings;
    if let Err(e) = set_io_flusher() {
        warnings.push(format!(
            "cannot become an I/O flusher (needs CAP_SYS_RESOURCE): {e}; the machine may deadlock when memory is short"
        ));
    }
    match own_mounts() {
        Ok(()) => done.own_mounts = true,
        Err(what) => {
            warnings.push(format!("{what}; the process may hang at its end while the device is mounted"));
        }
    }
    if let Err(e) = fs::write("/proc/self/oom_score_adj", "-1000") {
        warnings
            .push(format!("cannot set oom_score_adj: {e}; the kernel may kill the server for its memory"));
    }
    if let Err(e) = lock_memory() {
        warnings.push(format!("cannot lock memory: {e}; set LimitMEMLOCK=infinity"));
    }
    if let Err(e) = raise_open_files() {
        warnings.push(format!("cannot raise the limit of open files: {e}; many volumes may not fit"));
    }
    done
}

fn lock_memory() -> io::Result<()> {
    // SAFETY: no pointers.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn raise_open_files() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

/// Marks the calling thread, and threads it starts, as part of the storage: its allocations never wait for I/O.
pub fn set_io_flusher() -> io::Result<()> {
    // SAFETY: no pointers.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn own_mounts() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(|e| format!("cannot get an own mount namespace (needs CAP_SYS_ADMIN): {e}"))?;
    // Private, not slave: a mount of the device must not arrive here from outside either.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).map_err(|e| {
        format!("cannot make the own mounts private: {e} (the root directory must be a mount point, is this a chroot?)")
    })
}
