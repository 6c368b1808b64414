//! Calls for a session as a whole: open, close, what it is to, its arena.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use crate::abi::{tg_device, tg_info, tg_options};
use crate::error;
use crate::memory;
use crate::session;

/// Version of the library in use, "MAJOR.MINOR.PATCH".
#[unsafe(no_mangle)]
pub extern "C" fn tg_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// What went wrong in the last call of this thread that failed: what, where, what to do. "" if none has. It is valid until the
/// next call of this thread that fails, and is never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn tg_error() -> *const c_char {
    error::message()
}

/// Opens a session to a volume that `tidegate attach NAME --bytes` attached. `target` is the name of the volume, or the path
/// of its socket if it has a '/'. `options` may be NULL. A process may have many sessions, also to one volume.
///
/// -ENOENT: there is no such socket; -ECONNREFUSED: nobody serves it; -EACCES: you are not allowed; -EPROTO: what answers
/// does not speak this version; -EINVAL: the options; -EBUSY: there is a sole writer already (see TG_SOLE_WRITER).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_open(
    target: *const c_char,
    options: *const tg_options,
    device: *mut *mut tg_device,
) -> c_int {
    error::status(|| {
        // SAFETY: by this function's contract the pointers are NULL or point to what their types say.
        unsafe {
            let out = memory::Out::required(device, "device")?;
            out.set(ptr::null_mut());
            let target = memory::text(target, "target")?;
            out.set(session::open(&target, &memory::options(options)?)?);
        }
        Ok(())
    })
}

/// Ends a session. The handle is invalid from now on. Calls of other threads that are under way finish; a tg_reap()
/// that waits stops waiting, with -EBADF. Does not wait for what was submitted: that is carried out or not, in order. Pointers
/// into the arena must not be used any more.
///
/// After it, the callback of the session is not called, and does not run. It may be called from within the callback; then
/// that is the last run of it. Logs that were opened on the session go on until tg_log_close().
#[unsafe(no_mangle)]
pub extern "C" fn tg_close(device: *mut tg_device) -> c_int {
    error::status(|| session::close(device))
}

/// Has every call that waits on the session now, in whatever thread, fail with -EINTR: tg_persist(), tg_reap(), tg_flush(),
/// tg_pread(), those that write, those of its logs. What such a call had submitted is carried out all the same, a write
/// too; nothing else changes, and the same call may be made again (a write that is made again is a second change). Calls that
/// begin later are not concerned. So to have a thread stop: tell it so, then call this until it has, since the thread may have
/// been just about to call. The callback of a session goes on. Not for signal handlers: it takes locks.
#[unsafe(no_mangle)]
pub extern "C" fn tg_interrupt(device: *mut tg_device) -> c_int {
    error::status(|| {
        session::find(device)?.device().interrupt();
        Ok(())
    })
}

/// What the session is to. Set `info->size` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_get_info(device: *mut tg_device, info: *mut tg_info) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        // SAFETY: by this function's contract `info` is NULL or points to as many bytes as its first field says.
        unsafe { memory::put_info(info, &session.info_image()) }
    })
}

/// Takes `length` bytes of the session's arena: payload for tg_submit(), aligned to 64 bytes, not cleared. NULL if it fails,
/// and errno is set: ENOMEM: no such room is free; EINVAL: 0, or more than a quarter of the arena, which is what there is for
/// this; the rest serves calls that copy, as tg_pwrite().
#[unsafe(no_mangle)]
pub extern "C" fn tg_alloc(device: *mut tg_device, length: usize) -> *mut c_void {
    error::value(ptr::null_mut(), || session::find(device)?.alloc(length))
}

/// Gives back what tg_alloc() gave, all of it. -EINVAL if `data` is not that, or was given back already. No request that was
/// submitted with it may be unfinished.
#[unsafe(no_mangle)]
pub extern "C" fn tg_free(device: *mut tg_device, data: *mut c_void) -> c_int {
    error::status(|| session::find(device)?.free(data))
}

/// A file descriptor for poll() and the like, readable when there may be completions, or the server is gone; then call
/// tg_reap() until it gives 0. It belongs to the session: do not read from it, do not close it. -EINVAL with a callback.
#[unsafe(no_mangle)]
pub extern "C" fn tg_event_fd(device: *mut tg_device) -> c_int {
    error::count(|| session::find(device)?.event_fd().map(i64::from)) as c_int
}
