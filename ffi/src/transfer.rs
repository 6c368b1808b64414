//! Calls that move data: the rings, the plain calls, and the words for what is accepted and durable.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

use libc::{iovec, ssize_t};
use tidegate_driver::bytes::client::Device;

use crate::abi::{tg_completion, tg_device, tg_submission, tg_ticket};
use crate::error;
use crate::memory;
use crate::session;

/// Submits `count` requests, all or none, and does not wait. The ticket of the first goes to `first`, which may be NULL; the
/// others follow by one each. Changes of a session get their place in the order of submission, without any TG_BARRIER.
///
/// -EAGAIN: the rings have no room: reap, and try again. Another negative value: nothing was submitted; tg_error() says which
/// of the requests is wrong, and why. What only the server can tell is in the completion: -ERANGE, -ECANCELED, ...
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_submit(
    device: *mut tg_device,
    submissions: *const tg_submission,
    count: usize,
    first: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        // SAFETY: by this function's contract there are `count` submissions, and `first` is NULL or valid.
        unsafe {
            let batch = memory::Array::new(submissions, count, "submissions")?;
            memory::Out::optional(first).set(session.submit(batch)?);
        }
        Ok(())
    })
}

/// Takes up to `max` completions, waiting until there is one, but not longer than `timeout_ns` nanoseconds; for ever if that
/// is negative. Returns how many; 0 after the time. -EINVAL with a callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_reap(
    device: *mut tg_device,
    completions: *mut tg_completion,
    max: usize,
    timeout_ns: i64,
) -> ssize_t {
    error::count(|| {
        let session = session::find(device)?;
        // SAFETY: by this function's contract there is room for `max` completions.
        let mut room = unsafe { memory::Room::new(completions, max, "completions")? };
        session.reap(&mut room, timeout_ns)
    }) as ssize_t
}

/// Every change of the session up to this ticket is accepted: it survives the end of this program and of the server. Except
/// those that were refused: their completions, or tg_persist(), say so. 0: none is, or the handle is wrong (errno is set
/// then). Reads shared memory only, so it is cheap; never goes back.
#[unsafe(no_mangle)]
pub extern "C" fn tg_accepted(device: *mut tg_device) -> tg_ticket {
    error::value(0, || session::ticket(device, Device::accepted))
}

/// Every change of the session up to this ticket is durable: it survives the loss of power as well. Otherwise as tg_accepted().
#[unsafe(no_mangle)]
pub extern "C" fn tg_durable(device: *mut tg_device) -> tg_ticket {
    error::value(0, || session::ticket(device, Device::durable))
}

/// Waits until every change of the session up to `ticket` is durable, but not longer than `timeout_ns` nanoseconds; for ever if
/// that is negative. -ETIMEDOUT: it is not yet. -EINVAL: the ticket is not one that this session gave out. Another negative
/// value: a change up to `ticket` that asked for no completion failed (TG_SILENT, tg_pwrite_async()), or the server is gone.
/// After such a failure no more changes of that kind are taken: what stays has no hole. A new session begins without.
#[unsafe(no_mangle)]
pub extern "C" fn tg_persist(device: *mut tg_device, ticket: tg_ticket, timeout_ns: i64) -> c_int {
    error::status(|| session::find(device)?.persist(ticket, timeout_ns))
}

/// Writes `length` bytes, 1 to write_bytes_max, as one atomic change, and waits until it has completed. `flags`: 0 or
/// TG_DURABLE. Its ticket goes to `ticket`, which may be NULL. `data` may be anywhere.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_pwrite(
    device: *mut tg_device,
    data: *const c_void,
    length: usize,
    offset: u64,
    flags: c_int,
    ticket: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        // SAFETY: by this function's contract `data` has `length` bytes, and `ticket` is NULL or valid.
        unsafe {
            let data = memory::bytes(data, length, "data")?;
            memory::Out::optional(ticket).set(session.write(offset, &[data], flags)?);
        }
        Ok(())
    })
}

/// As tg_pwrite(), of `count` parts, 1 to 1024, one after the other: together they are one atomic change.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_pwritev(
    device: *mut tg_device,
    parts: *const iovec,
    count: c_int,
    offset: u64,
    flags: c_int,
    ticket: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        // SAFETY: by this function's contract there are `count` parts, each has its bytes, and `ticket` is NULL or valid.
        unsafe {
            let parts = memory::parts(parts, count)?;
            memory::Out::optional(ticket).set(session.write(offset, &parts, flags)?);
        }
        Ok(())
    })
}

/// As tg_pwrite(), but returns as soon as `data` was taken over. Whether it succeeded shows in tg_persist(). Writes of one
/// session stay in order, whether they are made with this or other calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_pwrite_async(
    device: *mut tg_device,
    data: *const c_void,
    length: usize,
    offset: u64,
    flags: c_int,
    ticket: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        // SAFETY: by this function's contract `data` has `length` bytes, and `ticket` is NULL or valid.
        unsafe {
            let data = memory::bytes(data, length, "data")?;
            memory::Out::optional(ticket).set(session.write_async(offset, &[data], flags)?);
        }
        Ok(())
    })
}

/// Reads `length` bytes into `data`, which may be anywhere, and sees every change of the session that was submitted before.
/// Reads longer than write_bytes_max are made in parts, between which other sessions may write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_pread(
    device: *mut tg_device,
    data: *mut c_void,
    length: usize,
    offset: u64,
) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        // SAFETY: by this function's contract `data` has room for `length` bytes.
        let data = unsafe { memory::bytes_mut(data, length, "data")? };
        session.read(offset, data)
    })
}

/// Makes a range zero, as one atomic change, and waits until that has completed. `flags` and `ticket` as for tg_pwrite().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_write_zeroes(
    device: *mut tg_device,
    offset: u64,
    length: u64,
    flags: c_int,
    ticket: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        let made = session.write_zeroes(offset, length, flags)?;
        // SAFETY: by this function's contract `ticket` is NULL or valid.
        unsafe { memory::Out::optional(ticket) }.set(made);
        Ok(())
    })
}

/// Says that a range is no longer needed, and waits until that has completed. What it reads as is undefined until it is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tg_discard(
    device: *mut tg_device,
    offset: u64,
    length: u64,
    ticket: *mut tg_ticket,
) -> c_int {
    error::status(|| {
        let session = session::find(device)?;
        let made = session.discard(offset, length)?;
        // SAFETY: by this function's contract `ticket` is NULL or valid.
        unsafe { memory::Out::optional(ticket) }.set(made);
        Ok(())
    })
}

/// Waits until everything that the session submitted before, and everything accepted on the stage, is durable.
#[unsafe(no_mangle)]
pub extern "C" fn tg_flush(device: *mut tg_device) -> c_int {
    error::status(|| session::find(device)?.flush())
}
