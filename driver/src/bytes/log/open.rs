//! Opening a log: what is in the range, and where the log ends.

use super::place::{Shape, capacity_of};
use super::window::{Found, Window};
use super::{ByteRange, CAPACITY_BYTES_MIN, LOG_HEADER_BYTES, LogHeader, OpenMode};
use crate::base::{Error, ErrorKind};
use crate::bytes::{ByteStore, Failure, Result};

/// A log is made without being forced to only where this many bytes, or all, are zero: signatures of file systems and
/// partition tables are within them.
const BLANK_BYTES: u64 = 128 << 10;

/// The capacity of a log in `range`.
pub(super) fn check_range(store: &impl ByteStore, range: ByteRange) -> Result<u64> {
    let volume = store.volume_bytes();
    let refuse = |why: String| Err(Failure::new(libc::EINVAL, format!("no log in the bytes {range}: {why}")));
    if range.is_empty() || range.end > volume {
        return refuse(format!("the volume has {volume} bytes"));
    }
    let capacity = capacity_of(range.len());
    if capacity < CAPACITY_BYTES_MIN {
        return refuse(format!("a log needs at least {} bytes", LOG_HEADER_BYTES + CAPACITY_BYTES_MIN));
    }
    if u64::from(store.write_bytes_max()) < LOG_HEADER_BYTES {
        return refuse(format!("the store writes at most {} bytes at once", store.write_bytes_max()));
    }
    Ok(capacity)
}

/// The header of the log in `range`; `None` if one is to be made.
pub(super) fn find(store: &impl ByteStore, range: ByteRange, mode: OpenMode) -> Result<Option<LogHeader>> {
    if mode == OpenMode::Format {
        return Ok(None);
    }
    let mut bytes = [0; LOG_HEADER_BYTES as usize];
    store.read(range.start, &mut bytes)?;
    match LogHeader::decode(&bytes) {
        Ok(Some(header)) if header.capacity == capacity_of(range.len()) => Ok(Some(header)),
        Ok(Some(header)) => Err(Failure::new(
            libc::EINVAL,
            format!(
                "the log at byte {} has a capacity of {} bytes, the range {range} one of {}: give the range it was made with",
                range.start,
                header.capacity,
                capacity_of(range.len())
            ),
        )),
        Ok(None) if is_blank(store, range)? => match mode {
            OpenMode::CreateIfMissing => Ok(None),
            _ => Err(Failure::new(
                libc::ENOENT,
                format!("there is no log in the bytes {range}: they are zero"),
            )),
        },
        Ok(None) => Err(Failure::new(
            libc::EEXIST,
            format!("there is no log in the bytes {range}, but something else; formatting overwrites it"),
        )),
        Err(error) => Err(failure(range.start, &error)),
    }
}

fn is_blank(store: &impl ByteStore, range: ByteRange) -> Result<bool> {
    let mut bytes = vec![0; range.len().min(BLANK_BYTES) as usize];
    store.read(range.start, &mut bytes)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

fn failure(at: u64, error: &Error) -> Failure {
    let errno = match error.kind() {
        ErrorKind::NewerFormat => libc::EPROTONOSUPPORT,
        _ => libc::EIO,
    };
    Failure::new(errno, format!("the log at byte {at}: {error}"))
}

/// The tail: the end of the chain of entries that continues the log from the hint. Ends, as every entry has a length and all
/// of them together are no longer than the capacity.
pub(super) fn find_tail(
    store: &impl ByteStore,
    header: &LogHeader,
    shape: &Shape,
    mut window: Window,
) -> Result<u64> {
    let LogHeader { head, hint, opening, .. } = *header;
    let damaged = |at: u64, why: &str| {
        Err(Failure::new(libc::EIO, format!("the log is damaged: the entry at position {at} {why}")))
    };
    // Everything between head and hint is there, whatever crashed. Looking at the first entry is cheap and finds a range that
    // was overwritten or belongs to another time than its header.
    if head < hint && !matches!(window.look(store, head, hint)?, Found::Whole(..)) {
        return damaged(head, "is missing");
    }
    let mut tail = hint;
    loop {
        match window.look(store, tail, head + shape.capacity)? {
            Found::Whole(entry, _) => match shape.continues(head, opening, &entry) {
                Some(next) => tail = next,
                None => return Ok(tail),
            },
            // Writes are atomic: an entry of this handle at this position was whole once.
            Found::Broken(entry) if entry.opening == opening => return damaged(tail, "fails its checksum"),
            Found::Broken(_) | Found::Nothing => return Ok(tail),
        }
    }
}
