//! Newtypes for ids and units. Byte offsets and lengths are plain `u64` with `_bytes`/`offset` in their names;
//! everything that counts something else is a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Log sequence number: the position of a record in the order of arrival. Dense (each record has the LSN of
/// its predecessor plus one) and starting at 1, so that a lost record is seen as a gap. 0 means "before the
/// first record".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The position before the first record.
    pub const ZERO: Lsn = Lsn(0);

    /// The LSN that follows this one.
    #[must_use]
    pub fn next(self) -> Lsn {
        Lsn(self.0 + 1)
    }

    /// This LSN advanced by `count` records.
    #[must_use]
    pub fn plus(self, count: u64) -> Lsn {
        Lsn(self.0 + count)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Sequence number of one incarnation of a region slot. Dense and starting at 1; the slot that holds region
/// `s` is `(s - 1) % region_count`, so the log is a ring of slots and a stale slot tells its age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RegionSeq(pub u64);

impl RegionSeq {
    /// The region that follows this one in the log.
    #[must_use]
    pub fn next(self) -> RegionSeq {
        RegionSeq(self.0 + 1)
    }

    /// Slot of the stage that holds this region.
    #[must_use]
    pub fn slot(self, region_count: u32) -> u32 {
        assert!(self.0 > 0, "region sequence numbers start at 1");
        ((self.0 - 1) % u64::from(region_count)) as u32
    }
}

impl fmt::Display for RegionSeq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Identity of a volume within its stage. Never reused: a deleted volume's records stay recognisable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeId(pub u16);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Half-open range of bytes of a volume: `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// Range of `len` bytes at `start`. Panics on overflow: callers bound their input first.
    #[must_use]
    pub fn at(start: u64, len: u64) -> ByteRange {
        ByteRange { start, end: start.checked_add(len).expect("range end fits 64 bits") }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// The part common to both, or `None`.
    #[must_use]
    pub fn intersect(self, other: ByteRange) -> Option<ByteRange> {
        let r = ByteRange { start: self.start.max(other.start), end: self.end.min(other.end) };
        (!r.is_empty()).then_some(r)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// `value` rounded up to a multiple of `align` (a power of two).
#[must_use]
pub fn align_up(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    (value + align - 1) & !(align - 1)
}

/// `value` rounded down to a multiple of `align` (a power of two).
#[must_use]
pub fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}
