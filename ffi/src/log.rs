//! Calls for the append log.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::ptr;

use libc::{iovec, ssize_t};

use crate::abi::{tg_device, tg_log, tg_ticket};
use crate::error;
use crate::journal;
use crate::memory;

/// Opens the append log in the `length` bytes of the volume from `base` on. `flags`: 0, or of enum tg_log_flag. Only one
/// handle, of all programs, may append to a log at a time. To have the server see to that, all of them open the session with
/// TG_SOLE_WRITER; that one such session has one handle of the log is for its program to see to.
///
/// An append is one atomic write of header and payload at the tail, so what a crash leaves is a prefix of the entries. A
/// position is a number of bytes since the log was made; it grows for ever, and the log reuses the room of what was truncated.
///
/// -ENOENT: there is no log, but zeroes (see TG_LOG_CREATE); -EEXIST: there is something else (see TG_LOG_FORMAT); -EINVAL: a
/// log of another length, or the range is wrong; -EPROTONOSUPPORT: a newer version made it; -EIO: it is damaged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_log_open(
    device: *mut tg_device,
    base: u64,
    length: u64,
    flags: c_int,
    log: *mut *mut tg_log,
) -> c_int {
    error::status(|| {
        // SAFETY: by this function's contract `log` is NULL or valid.
        let out = unsafe { memory::Out::required(log, "log")? };
        out.set(ptr::null_mut());
        out.set(journal::open(device, base, length, flags)?);
        Ok(())
    })
}

/// Appends an entry of `length` bytes, at least 1. Its position goes to `position`, the ticket of its write to `ticket`; either
/// may be NULL. Returns when the payload was taken over; tg_log_persist() waits until it is durable.
///
/// -ENOSPC: the log is full: truncate. -EMSGSIZE: an entry cannot be that long, see tg_log_entry_bytes_max(). After any other
/// failure the log takes no more changes until it is opened anew: it never has a hole.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_log_append(
    log: *mut tg_log,
    data: *const c_void,
    length: usize,
    position: *mut u64,
    ticket: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let log = journal::find(log)?;
        // SAFETY: by this function's contract `data` has `length` bytes; the others are NULL or valid.
        unsafe {
            let made = log.append(&[memory::bytes(data, length, "data")?])?;
            memory::Out::optional(position).set(made.0);
            memory::Out::optional(ticket).set(made.1);
        }
        Ok(())
    })
}

/// As tg_log_append(), of `count` parts, 1 to 1024, one after the other.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_log_appendv(
    log: *mut tg_log,
    parts: *const iovec,
    count: c_int,
    position: *mut u64,
    ticket: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let log = journal::find(log)?;
        // SAFETY: by this function's contract there are `count` parts, each has its bytes; the others are NULL or valid.
        unsafe {
            let made = log.append(&memory::parts(parts, count)?)?;
            memory::Out::optional(position).set(made.0);
            memory::Out::optional(ticket).set(made.1);
        }
        Ok(())
    })
}

/// Waits until the entry at `position`, and all before it, are durable (at the tail: everything in the log), but not longer
/// than `timeout_ns` nanoseconds; for ever if that is negative. -ETIMEDOUT: they are not yet.
#[unsafe(no_mangle)]
pub extern "C" fn tg_log_persist(log: *mut tg_log, position: u64, timeout_ns: i64) -> c_int {
    error::status(|| journal::find(log)?.persist(position, timeout_ns))
}

/// Reads the entry at `*position`, returns its length, and sets `*position` to that of the next. 0: `*position` is the tail;
/// it is left as it is. -EMSGSIZE: the entry is longer than `size`; see tg_log_entry_bytes(). -EINVAL: no entry begins there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_log_read(
    log: *mut tg_log,
    position: *mut u64,
    data: *mut c_void,
    size: usize,
) -> ssize_t {
    error::count(|| {
        let log = journal::find(log)?;
        // SAFETY: by this function's contract `position` is NULL or valid, and `data` has room for `size` bytes.
        let (place, data) = unsafe {
            let place = memory::Out::required(position, "position")?;
            (place, memory::bytes_mut(data, size, "data")?)
        };
        let (length, next) = log.read(place.get(), data)?;
        place.set(next);
        Ok(length)
    }) as ssize_t
}

/// Length of the entry at `position`; 0 if that is the tail. -EINVAL: no entry begins there.
#[unsafe(no_mangle)]
pub extern "C" fn tg_log_entry_bytes(log: *mut tg_log, position: u64) -> ssize_t {
    error::count(|| journal::find(log)?.entry_bytes(position)) as ssize_t
}

/// Longest entry that the log takes.
#[unsafe(no_mangle)]
pub extern "C" fn tg_log_entry_bytes_max(log: *mut tg_log) -> ssize_t {
    error::count(|| Ok(journal::find(log)?.entry_bytes_max())) as ssize_t
}

/// Drops all entries before `position`, which is that of an entry, or the tail. It has its place in the order like any change:
/// once a later change is durable, it is as well.
#[unsafe(no_mangle)]
pub extern "C" fn tg_log_truncate(log: *mut tg_log, position: u64) -> c_int {
    error::status(|| journal::find(log)?.truncate(position))
}

/// The position of the first entry goes to `head`, that of the next append to `tail`; either may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_log_bounds(log: *mut tg_log, head: *mut u64, tail: *mut u64) -> c_int {
    error::status(|| {
        let bounds = journal::find(log)?.bounds();
        // SAFETY: by this function's contract the pointers are NULL or valid.
        unsafe {
            memory::Out::optional(head).set(bounds.0);
            memory::Out::optional(tail).set(bounds.1);
        }
        Ok(())
    })
}

/// Closes a log. The handle is invalid from now on, whatever this returns. Does not wait for what was appended; see
/// tg_log_persist(). A log that is not closed loses nothing.
#[unsafe(no_mangle)]
pub extern "C" fn tg_log_close(log: *mut tg_log) -> c_int {
    error::status(|| journal::close(log))
}
