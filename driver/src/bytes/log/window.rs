//! Reading entries: a stretch of the log in memory, so that many small entries cost one read.

use super::place::Shape;
use crate::bytes::{ByteStore, Result};
use crate::format::append_log::{ENTRY_HEADER_BYTES, Entry};

/// What is at a position.
pub(super) enum Found<'a> {
    /// An entry whose checksum matches, and its payload.
    Whole(Entry, &'a [u8]),
    /// The header of an entry for this position; but its checksum fails.
    Broken(Entry),
    /// No entry.
    Nothing,
}

/// A stretch of the log.
pub(super) struct Window {
    shape: Shape,
    /// First byte of the log's range in the store.
    base: u64,
    generation: u64,
    /// How much to read at once at least.
    ahead: u64,
    /// Position of the first byte.
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    pub(super) fn new(shape: Shape, base: u64, generation: u64, ahead: u64) -> Window {
        Window { shape, base, generation, ahead, start: 0, bytes: Vec::new() }
    }

    /// The bytes `position..position + len`, which end before `end` and do not cross the end of a lap.
    fn get(&mut self, store: &impl ByteStore, position: u64, len: u64, end: u64) -> Result<&[u8]> {
        let inside = position >= self.start && position + len <= self.start + self.bytes.len() as u64;
        if !inside {
            let want = len.max(self.ahead).min(end - position);
            // Nothing is in the window if the read fails.
            self.bytes.clear();
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.resize(want as usize, 0);
            store.read(self.base + self.shape.offset(position), &mut bytes)?;
            (self.start, self.bytes) = (position, bytes);
        }
        let at = (position - self.start) as usize;
        Ok(&self.bytes[at..at + len as usize])
    }

    /// What is at `position`, if it ends at `limit` at the latest.
    pub(super) fn look(&mut self, store: &impl ByteStore, position: u64, limit: u64) -> Result<Found<'_>> {
        let end = self.shape.run_end(position, limit);
        if end.saturating_sub(position) < ENTRY_HEADER_BYTES {
            return Ok(Found::Nothing);
        }
        let (capacity, generation) = (self.shape.capacity, self.generation);
        let header = self.get(store, position, ENTRY_HEADER_BYTES, end)?;
        let Some((entry, image)) = Entry::decode(header, capacity, position) else {
            return Ok(Found::Nothing);
        };
        if entry.bytes() > end - position {
            return Ok(Found::Nothing);
        }
        let len = ENTRY_HEADER_BYTES + u64::from(entry.payload_bytes());
        let payload = &self.get(store, position, len, end)?[ENTRY_HEADER_BYTES as usize..];
        Ok(if image.matches(generation, payload) {
            Found::Whole(entry, payload)
        } else {
            Found::Broken(entry)
        })
    }
}
