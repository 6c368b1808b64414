//! Append log: a circular log in a byte range of a volume, kept by a client of the byte door.
//!
//! The range starts with a header of 64 bytes; the rest, cut to a multiple of 8, is the capacity. A position is a logical
//! byte offset that grows for ever; it is stored at `header + position % capacity`.
//!
//! Header, 64 bytes, always written as a whole:
//! ```text
//!  0  u64  checksum of bytes 8..64, not salted
//!  8  [8]  magic "TGAPLOG\0"
//! 16  u32  version
//! 20  u32  reserved
//! 24  u64  capacity in bytes
//! 32  u64  generation: random at each format, never 0; salt of the entries' checksums
//! 40  u64  opening: random for each handle that changes the log
//! 48  u64  head: position of the first entry that is kept
//! 56  u64  hint: everything before this position was written before this header
//! ```
//!
//! Valid if and only if checksum and magic match, capacity and generation are in bounds, and
//! `head <= hint <= head + capacity`, both multiples of 8 with room for an entry's header before the end of the lap.
//!
//! Entry, 32 bytes and the payload, at a multiple of 8:
//! ```text
//!  0  u64  checksum of bytes 8..32 and the payload, salted with the generation
//!  8  u64  position of this entry
//! 16  u64  opening of the handle that wrote it
//! 24  u32  data: length of the payload; pad: bytes from the end of this header to the end of the lap
//! 28  u8   kind: 1 data, 2 pad
//! 29  [3]  reserved
//! ```
//!
//! The next entry starts at the next multiple of 8. No entry crosses the end of the capacity: what would is preceded by a
//! pad up to there; where less than a header is left, nothing is written and the log goes on at the start. A pad's bytes
//! are not written and not in its checksum. A data entry takes at most half the capacity, so that an empty log has room
//! for it wherever it stands.
//!
//! An entry at a position is valid if and only if its checksum and position match, its kind is known, its length is in
//! bounds and ends before the end of the lap (a pad: there), and, from the hint on, its opening is the header's.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Sealed, VERSION};
use crate::base::checksum::crc64_salted_parts;
use crate::base::units::{align_down, align_up};
use crate::base::{Error, ErrorKind, Result};

/// "TGAPLOG\0".
pub const LOG_MAGIC: [u8; 8] = *b"TGAPLOG\0";
/// Size of the log's header.
pub const LOG_HEADER_BYTES: u64 = 64;
/// Size of an entry's header.
pub const ENTRY_HEADER_BYTES: u64 = 32;
/// Alignment of entries.
pub const ENTRY_ALIGN: u64 = 8;
/// Smallest capacity: room for two entries of 32 bytes.
pub const CAPACITY_BYTES_MIN: u64 = 128;
/// Positions end here. No device is fast enough to get there.
pub const POSITION_MAX: u64 = 1 << 62;

const KIND_DATA: u8 = 1;
const KIND_PAD: u8 = 2;

/// The log's header on disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LogHeaderImage {
    checksum: U64,
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    capacity: U64,
    generation: U64,
    opening: U64,
    head: U64,
    hint: U64,
}

const _: () = assert!(size_of::<LogHeaderImage>() == LOG_HEADER_BYTES as usize);

impl Sealed for LogHeaderImage {}

/// The log's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHeader {
    /// Bytes for entries.
    pub capacity: u64,
    /// Which format of the range this is.
    pub generation: u64,
    /// Which handle wrote it.
    pub opening: u64,
    /// First entry that is kept.
    pub head: u64,
    /// Everything before was written before.
    pub hint: u64,
}

impl LogHeader {
    /// Encodes it.
    #[must_use]
    pub fn encode(&self) -> LogHeaderImage {
        let mut image = LogHeaderImage {
            checksum: U64::ZERO,
            magic: LOG_MAGIC,
            version: VERSION.into(),
            reserved: U32::ZERO,
            capacity: self.capacity.into(),
            generation: self.generation.into(),
            opening: self.opening.into(),
            head: self.head.into(),
            hint: self.hint.into(),
        };
        image.seal(0);
        image
    }

    /// Decodes the header at the start of `bytes`; `Ok(None)` if there is none. Something that has the magic and is not
    /// valid is an error: it was a log once.
    pub fn decode(bytes: &[u8]) -> Result<Option<LogHeader>> {
        let Ok((image, _)) = LogHeaderImage::read_from_prefix(bytes) else { return Ok(None) };
        if image.magic != LOG_MAGIC {
            return Ok(None);
        }
        if !image.is_sealed(0) {
            return Err(Error::new(ErrorKind::Damaged, "the header of the log fails its checksum"));
        }
        if image.version.get() > VERSION {
            return Err(Error::new(
                ErrorKind::NewerFormat,
                format!(
                    "the log has format version {}; this build knows {VERSION}: use a newer tidegate",
                    image.version.get()
                ),
            ));
        }
        let header = LogHeader {
            capacity: image.capacity.get(),
            generation: image.generation.get(),
            opening: image.opening.get(),
            head: image.head.get(),
            hint: image.hint.get(),
        };
        if !header.is_possible() {
            return Err(Error::new(
                ErrorKind::Damaged,
                format!("the header of the log is impossible: {header:?}"),
            ));
        }
        Ok(Some(header))
    }

    fn is_possible(&self) -> bool {
        let aligned = [self.capacity, self.head, self.hint].iter().all(|n| n.is_multiple_of(ENTRY_ALIGN));
        let starts_entry = |position: u64| self.capacity - position % self.capacity >= ENTRY_HEADER_BYTES;
        aligned
            && (CAPACITY_BYTES_MIN..=POSITION_MAX).contains(&self.capacity)
            && self.generation != 0
            && self.hint <= POSITION_MAX
            && self.head <= self.hint
            && self.hint - self.head <= self.capacity
            && starts_entry(self.head)
            && starts_entry(self.hint)
    }
}

/// An entry's header on disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EntryImage {
    checksum: U64,
    position: U64,
    opening: U64,
    len: U32,
    kind: u8,
    reserved: [u8; 3],
}

const _: () = assert!(size_of::<EntryImage>() == ENTRY_HEADER_BYTES as usize);

/// What an entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A payload of this many bytes.
    Data(u32),
    /// Nothing, for this many bytes up to the end of the lap.
    Pad(u32),
}

/// An entry's header, found at its position; its checksum is still to be checked with the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub position: u64,
    /// Who wrote it.
    pub opening: u64,
    /// What it holds.
    pub kind: EntryKind,
}

/// Space that an entry with a payload of `payload` bytes takes.
#[must_use]
pub fn entry_bytes(payload: u64) -> u64 {
    align_up(ENTRY_HEADER_BYTES + payload, ENTRY_ALIGN)
}

/// Longest data entry of a log with this capacity.
#[must_use]
pub fn entry_bytes_max(capacity: u64) -> u64 {
    align_down(capacity / 2, ENTRY_ALIGN)
}

impl Entry {
    /// Bytes of payload.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        match self.kind {
            EntryKind::Data(len) => len,
            EntryKind::Pad(_) => 0,
        }
    }

    /// Space it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self.kind {
            EntryKind::Data(len) => entry_bytes(u64::from(len)),
            EntryKind::Pad(rest) => ENTRY_HEADER_BYTES + u64::from(rest),
        }
    }

    /// Encodes the header of an entry with this payload, which comes in parts.
    #[must_use]
    pub fn encode(&self, generation: u64, payload: &[&[u8]]) -> EntryImage {
        debug_assert_eq!(payload.iter().map(|p| p.len()).sum::<usize>(), self.payload_bytes() as usize);
        let (kind, len) = match self.kind {
            EntryKind::Data(len) => (KIND_DATA, len),
            EntryKind::Pad(rest) => (KIND_PAD, rest),
        };
        let mut image = EntryImage {
            checksum: U64::ZERO,
            position: self.position.into(),
            opening: self.opening.into(),
            len: len.into(),
            kind,
            reserved: [0; 3],
        };
        image.checksum = image.checksum_with(generation, payload).into();
        image
    }

    /// The header at the start of `bytes` if it may be that of an entry at `position` of a log with this capacity, with the
    /// number of payload bytes bounded. Nothing else of it may be believed before [`EntryImage::matches`].
    #[must_use]
    pub fn decode(bytes: &[u8], capacity: u64, position: u64) -> Option<(Entry, EntryImage)> {
        let (image, _) = EntryImage::read_from_prefix(bytes).ok()?;
        let left = capacity - position % capacity;
        let len = image.len.get();
        let (kind, fits) = match image.kind {
            KIND_DATA => {
                let most = left.min(entry_bytes_max(capacity));
                (EntryKind::Data(len), len > 0 && entry_bytes(u64::from(len)) <= most)
            }
            KIND_PAD => (EntryKind::Pad(len), ENTRY_HEADER_BYTES + u64::from(len) == left),
            _ => return None,
        };
        let entry = Entry { position, opening: image.opening.get(), kind };
        (fits && image.position.get() == position).then_some((entry, image))
    }
}

impl EntryImage {
    fn checksum_with(&self, generation: u64, payload: &[&[u8]]) -> u64 {
        let header = &self.as_bytes()[8..];
        crc64_salted_parts(generation, std::iter::once(header).chain(payload.iter().copied()))
    }

    /// Whether its checksum is that of this header and `payload` in a log of this generation.
    #[must_use]
    pub fn matches(&self, generation: u64, payload: &[u8]) -> bool {
        self.checksum.get() == self.checksum_with(generation, &[payload])
    }
}
