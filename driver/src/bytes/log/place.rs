//! The log's decisions, without I/O: where an entry goes, whether a pad is needed, whether there is room, what is accepted.

use crate::format::append_log::{
    ENTRY_ALIGN, ENTRY_HEADER_BYTES, Entry, EntryKind, LOG_HEADER_BYTES, POSITION_MAX, entry_bytes,
    entry_bytes_max,
};

/// The fixed sizes of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Bytes for entries.
    pub capacity: u64,
    /// Longest payload of an entry.
    pub payload_max: u64,
}

/// Where the kept entries begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub head: u64,
    pub tail: u64,
}

/// What an append writes, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// A pad at the old tail: bytes after its header.
    pub pad: Option<u32>,
    /// Where the entry goes.
    pub position: u64,
    /// The tail after it.
    pub tail: u64,
}

/// Why an entry has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It has no byte.
    Empty,
    /// It would not fit even if the log were empty.
    TooLong,
    /// There is room for so many bytes, and it needs so many.
    Full { room: u64, need: u64 },
    /// No position is left.
    Worn,
}

impl Shape {
    /// The shape of a log of `capacity` bytes over a store with writes of at most `write_max` bytes.
    pub(super) fn new(capacity: u64, write_max: u32) -> Shape {
        let most = entry_bytes_max(capacity).min(u64::from(write_max)).min(u64::from(u32::MAX));
        Shape { capacity, payload_max: most.saturating_sub(ENTRY_HEADER_BYTES) }
    }

    /// Bytes from `position` to the end of its lap.
    pub(super) fn left(&self, position: u64) -> u64 {
        self.capacity - position % self.capacity
    }

    /// Where `position` is, counted from the start of the log's range.
    pub(super) fn offset(&self, position: u64) -> u64 {
        LOG_HEADER_BYTES + position % self.capacity
    }

    /// Where the log goes on after something that ends at `position`: there, or at the start if no header fits.
    pub(super) fn settle(&self, position: u64) -> u64 {
        let left = self.left(position);
        if left < ENTRY_HEADER_BYTES { position + left } else { position }
    }

    /// The position after `entry`.
    pub(super) fn after(&self, entry: &Entry) -> u64 {
        self.settle(entry.position + entry.bytes())
    }

    /// End of what can be read at once from `position`, if entries before `limit` are of interest.
    pub(super) fn run_end(&self, position: u64, limit: u64) -> u64 {
        (position + self.left(position)).min(limit)
    }

    /// Where an entry with `payload` bytes goes.
    pub(super) fn place(&self, bounds: Bounds, payload: u64) -> Result<Place, Refusal> {
        if payload == 0 {
            return Err(Refusal::Empty);
        }
        if payload > self.payload_max {
            return Err(Refusal::TooLong);
        }
        let bytes = entry_bytes(payload);
        let left = self.left(bounds.tail);
        // The settled tail has room for a header, so a pad always fits.
        let pad = (bytes > left).then(|| left - ENTRY_HEADER_BYTES);
        let position = if pad.is_some() { bounds.tail + left } else { bounds.tail };
        let end = position + bytes;
        if end > POSITION_MAX - self.capacity {
            return Err(Refusal::Worn);
        }
        let limit = bounds.head + self.capacity;
        if end > limit {
            let room = limit - bounds.tail;
            return Err(Refusal::Full { room, need: end - bounds.tail });
        }
        // Less than the entry's length, hence less than 2^32.
        Ok(Place { pad: pad.map(|rest| rest as u32), position, tail: self.settle(end) })
    }

    /// The tail after `entry`, which was found whole at what would be the tail, if it continues the log: it is of the handle
    /// whose header is in force, and what it takes is free.
    pub(super) fn continues(&self, head: u64, opening: u64, entry: &Entry) -> Option<u64> {
        let fits = entry.position + entry.bytes() <= head + self.capacity;
        (entry.opening == opening && fits).then(|| self.after(entry))
    }

    /// The pad that `place` asked for.
    pub(super) fn pad(tail: u64, opening: u64, rest: u32) -> Entry {
        Entry { position: tail, opening, kind: EntryKind::Pad(rest) }
    }
}

/// The capacity of a log in a range of `length` bytes.
pub(super) fn capacity_of(length: u64) -> u64 {
    length.saturating_sub(LOG_HEADER_BYTES) / ENTRY_ALIGN * ENTRY_ALIGN
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: fn() -> Shape = || Shape::new(256, 1 << 20);

    fn at(head: u64, tail: u64) -> Bounds {
        Bounds { head, tail }
    }

    #[test]
    fn an_entry_goes_to_the_tail_or_behind_a_pad() {
        let shape = SHAPE();
        assert_eq!(shape.payload_max, 96);
        assert_eq!(shape.place(at(0, 0), 1), Ok(Place { pad: None, position: 0, tail: 40 }));
        assert_eq!(shape.place(at(128, 160), 64), Ok(Place { pad: None, position: 160, tail: 256 }));
        assert_eq!(shape.place(at(128, 160), 65), Ok(Place { pad: Some(64), position: 256, tail: 360 }));
        assert_eq!(shape.place(at(128, 224), 1), Ok(Place { pad: Some(0), position: 256, tail: 296 }));
        // Where no header fits the log goes on at the start.
        assert_eq!(shape.place(at(128, 160), 40), Ok(Place { pad: None, position: 160, tail: 256 }));
        assert_eq!(shape.place(at(128, 160), 32), Ok(Place { pad: None, position: 160, tail: 224 }));
    }

    #[test]
    fn a_full_log_refuses() {
        let shape = SHAPE();
        assert_eq!(shape.place(at(0, 0), 0), Err(Refusal::Empty));
        assert_eq!(shape.place(at(0, 0), 97), Err(Refusal::TooLong));
        assert_eq!(shape.place(at(0, 160), 96), Err(Refusal::Full { room: 96, need: 224 }));
        assert_eq!(shape.place(at(0, 256), 1), Err(Refusal::Full { room: 0, need: 40 }));
        assert_eq!(shape.place(at(40, 256), 8), Ok(Place { pad: None, position: 256, tail: 296 }));
        let end = POSITION_MAX - 256;
        assert_eq!(shape.place(at(end, end), 1), Err(Refusal::Worn));
    }

    #[test]
    fn an_empty_log_has_room_for_every_entry_that_is_not_too_long() {
        for capacity in (128..600).step_by(8) {
            let shape = Shape::new(capacity, 1 << 20);
            for tail in (0..2 * capacity).step_by(8).map(|tail| shape.settle(tail)) {
                for payload in 1..=shape.payload_max {
                    let place = shape.place(at(tail, tail), payload).unwrap();
                    assert!(place.tail - tail <= capacity && place.tail == shape.settle(place.tail));
                }
            }
        }
    }

    #[test]
    fn only_entries_of_the_handle_in_force_continue_the_log() {
        let shape = SHAPE();
        let entry = |opening, len| Entry { position: 160, opening, kind: EntryKind::Data(len) };
        assert_eq!(shape.continues(128, 7, &entry(7, 40)), Some(256));
        assert_eq!(shape.continues(128, 8, &entry(7, 40)), None);
        assert_eq!(shape.continues(0, 7, &entry(7, 64)), Some(256));
        assert_eq!(Shape::new(512, 99).continues(0, 7, &Entry { position: 480, ..entry(7, 8) }), None);
    }
}
