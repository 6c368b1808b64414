//! Buffers of the flusher.

use super::epoch::DEPTH;
use crate::io::AlignedBuf;

/// Size of a flush buffer: the longest run of data.
pub const FLUSH_BUFFER_BYTES: usize = 256 << 10;

/// A buffer from the pool. The pool is filled at the start with as many as can be in flight, so a full stage can always
/// be flushed; only the patch log and labels, which are small, are allocated.
pub(super) fn take_buffer(pool: &mut Vec<AlignedBuf>) -> AlignedBuf {
    pool.pop().unwrap_or_else(|| AlignedBuf::zeroed(FLUSH_BUFFER_BYTES))
}

/// The pool that [`super::epoch::EpochIo`] starts with.
#[must_use]
pub fn flush_pool() -> Vec<AlignedBuf> {
    (0..DEPTH).map(|_| AlignedBuf::zeroed(FLUSH_BUFFER_BYTES)).collect()
}
