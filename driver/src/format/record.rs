//! Record header: one change to one volume.
//!
//! ```text
//!  0  u64  checksum of bytes 8..64, salted
//!  8  u64  checksum of the payload (0 when there is none)
//! 16  u64  LSN
//! 24  u64  first byte of the volume
//! 32  u64  length in bytes of the range of the volume
//! 40  u64  timestamp, ns since the Unix epoch (for later readers; nothing depends on it)
//! 48  u32  payload length in bytes: the range's length for writes, anything for markers, 0 otherwise
//! 52  u16  volume id
//! 54  u16  stream (0: the only one so far)
//! 56  u8   kind: 1 write, 2 write-zeroes, 3 discard, 4 marker, 5 void
//! 57  u8   flags (0)
//! 58  u16  low 16 bits of the incarnation of the stage that claimed the record
//! 60  u32  low half of the sequence number of the region that holds the record
//! ```
//!
//! The payload follows at once; the next record starts at the next multiple of 64. A `void` record takes the place of a
//! write whose payload could not be fetched from the client after its place was claimed: it changes nothing.
//!
//! A record at a position is valid if and only if its header's checksum matches, its region is the one it is read from,
//! its LSN is the expected one, its incarnation is the current one if its LSN belongs to that (a record that an earlier
//! recovery gave up must not come back), its kind is known, its lengths fit kind and region, and the payload's checksum matches.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Sealed, may_grow};
use crate::base::limits::VOLUME_BYTES_MAX;
use crate::base::units::align_up;
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};

/// Alignment of records within a region; also the size of every log header.
pub const RECORD_ALIGN: u32 = 64;
/// Size of a record header.
pub const RECORD_HEADER_BYTES: u32 = 64;

/// What a record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// The payload replaces the range.
    Write,
    /// The range becomes zero.
    WriteZeroes,
    /// The range is no longer needed.
    Discard,
    /// A named point in the order; changes nothing.
    Marker,
    /// Nothing: a place that was claimed and not used.
    Void,
}

impl RecordKind {
    /// The kind with this code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<RecordKind> {
        Some(match code {
            1 => RecordKind::Write,
            2 => RecordKind::WriteZeroes,
            3 => RecordKind::Discard,
            4 => RecordKind::Marker,
            5 => RecordKind::Void,
            _ => return None,
        })
    }

    /// The code on disk.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            RecordKind::Write => 1,
            RecordKind::WriteZeroes => 2,
            RecordKind::Discard => 3,
            RecordKind::Marker => 4,
            RecordKind::Void => 5,
        }
    }

    /// Whether a record of this kind may have a payload of `payload_bytes` for a range of `length`.
    #[must_use]
    pub fn lengths_fit(self, length: u64, payload_bytes: u32) -> bool {
        match self {
            RecordKind::Write => length == u64::from(payload_bytes),
            RecordKind::WriteZeroes | RecordKind::Discard => payload_bytes == 0,
            RecordKind::Marker | RecordKind::Void => true,
        }
    }
}

/// The header on disk.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RecordHeader {
    /// Checksum of the rest of the header.
    pub checksum: U64,
    /// Checksum of the payload.
    pub payload_checksum: U64,
    /// Position in the order.
    pub lsn: U64,
    /// First byte of the volume.
    pub volume_offset: U64,
    /// Length of the range.
    pub length: U64,
    /// Nanoseconds since the Unix epoch.
    pub timestamp_ns: U64,
    /// Payload bytes that follow.
    pub payload_bytes: U32,
    /// Volume id.
    pub volume: U16,
    /// Stream.
    pub stream: U16,
    /// [`RecordKind`] code.
    pub kind: u8,
    /// No flag is defined.
    pub flags: u8,
    /// Low half of the incarnation.
    pub incarnation: U16,
    /// Low half of the region's sequence number.
    pub region_low: U32,
}

const _: () = assert!(size_of::<RecordHeader>() == RECORD_HEADER_BYTES as usize);

impl Sealed for RecordHeader {}

/// A record's header once it was found valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Position in the order.
    pub lsn: Lsn,
    /// The volume changed.
    pub volume: VolumeId,
    /// What it does.
    pub kind: RecordKind,
    /// Bytes of the volume it concerns.
    pub range: ByteRange,
    /// Payload bytes after the header.
    pub payload_bytes: u32,
    /// Checksum of the payload.
    pub payload_checksum: u64,
    /// Nanoseconds since the Unix epoch.
    pub timestamp_ns: u64,
    /// Low 16 bits of the incarnation that claimed it.
    pub incarnation: u16,
}

/// Space that a record with this payload takes in a region.
#[must_use]
pub fn record_bytes(payload_bytes: u32) -> u32 {
    align_up(u64::from(RECORD_HEADER_BYTES) + u64::from(payload_bytes), u64::from(RECORD_ALIGN)) as u32
}

impl Record {
    /// Encodes the header for a record of region `region`.
    #[must_use]
    pub fn encode(&self, salt: u64, region: RegionSeq) -> RecordHeader {
        debug_assert!(self.kind.lengths_fit(self.range.len(), self.payload_bytes));
        let mut header = RecordHeader {
            checksum: U64::ZERO,
            payload_checksum: self.payload_checksum.into(),
            lsn: self.lsn.0.into(),
            volume_offset: self.range.start.into(),
            length: self.range.len().into(),
            timestamp_ns: self.timestamp_ns.into(),
            payload_bytes: self.payload_bytes.into(),
            volume: self.volume.0.into(),
            stream: U16::ZERO,
            kind: self.kind.code(),
            flags: 0,
            incarnation: self.incarnation.into(),
            region_low: (region.0 as u32).into(),
        };
        header.seal(salt);
        header
    }

    /// Decodes the header at the start of `bytes` if it is valid in region `region`. The payload is not looked at.
    #[must_use]
    pub fn decode(bytes: &[u8], salt: u64, region: RegionSeq) -> Option<Record> {
        // Looked at first, as it is what most bytes that are no header lack, and costs a fraction of the checksum.
        if bytes.get(60..64)? != (region.0 as u32).to_le_bytes() {
            return None;
        }
        let header = RecordHeader::open(bytes, salt)?;
        let kind = RecordKind::from_code(header.kind)?;
        let start = header.volume_offset.get();
        let end = start.checked_add(header.length.get())?;
        let fits = kind.lengths_fit(header.length.get(), header.payload_bytes.get())
            && end <= VOLUME_BYTES_MAX
            && header.lsn.get() > 0
            && may_grow(&[header.lsn.get()]);
        fits.then(|| Record {
            lsn: Lsn(header.lsn.get()),
            volume: VolumeId(header.volume.get()),
            kind,
            range: ByteRange { start, end },
            payload_bytes: header.payload_bytes.get(),
            payload_checksum: header.payload_checksum.get(),
            timestamp_ns: header.timestamp_ns.get(),
            incarnation: header.incarnation.get(),
        })
    }
}
