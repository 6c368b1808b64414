//! Region header, table of contents and footer.
//!
//! ```text
//! offset in region        what
//! 0                       region header, then zeroes to the end of the first block
//! block_bytes             groups, each at a block boundary
//! …                       unused
//! table_offset            table of contents: one 32-byte entry per record, in LSN order (block-aligned start)
//! …                       zeroes
//! region_bytes - 64       footer
//! ```
//!
//! Region header (written with the region's first group, in the same device write):
//! ```text
//!  0  u64  checksum of bytes 8..64, salted
//!  8  u32  magic "TGRG"
//! 12  u32  version
//! 16  u64  region sequence number
//! 24  u64  LSN of the first record
//! 32  u64  sequence number of the first group
//! 40  u32  slot
//! 44  u32  reserved
//! 48  u64  reserved
//! 56  u64  reserved
//! ```
//!
//! Table entry:
//! ```text
//!  0  u64  first byte of the volume
//!  8  u64  length of the range
//! 16  u32  offset of the record header within the region
//! 20  u32  payload length
//! 24  u16  volume id
//! 26  u8   kind
//! 27  u8   reserved
//! 28  u32  low half of the payload checksum
//! ```
//!
//! Footer:
//! ```text
//!  0  u64  checksum of bytes 8..64, salted
//!  8  u64  checksum of the table's entries
//! 16  u32  magic "TGFT"
//! 20  u32  number of entries
//! 24  u64  region sequence number
//! 32  u64  LSN of the first record
//! 40  u64  sequence number of the first group
//! 48  u32  end of the last group, bytes from the start of the region
//! 52  u32  number of groups
//! 56  u64  reserved
//! ```
//!
//! The table and footer are written when the region is full and all its groups are durable. They repeat what the
//! groups say so that the index can be rebuilt without reading payloads; a region without a valid footer is scanned. A
//! table is valid if and only if the footer's checksum and magic match, its region, first LSN and first group are those
//! of the region header, the entries lie within the region, and the entries' checksum matches.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::record::{Record, RecordKind};
use super::{Sealed, VERSION, may_grow};
use crate::base::limits::VOLUME_BYTES_MAX;
use crate::base::units::align_up;
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};

/// Size of the region header.
pub const REGION_HEADER_BYTES: u32 = 64;
/// Size of the footer.
pub const FOOTER_BYTES: u32 = 64;
/// Size of a table entry.
pub const TABLE_ENTRY_BYTES: u32 = 32;
/// "TGRG".
pub const REGION_MAGIC: u32 = u32::from_le_bytes(*b"TGRG");
/// "TGFT".
pub const FOOTER_MAGIC: u32 = u32::from_le_bytes(*b"TGFT");

/// The region header on disk.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionHeader {
    /// Checksum of the rest.
    pub checksum: U64,
    /// [`REGION_MAGIC`].
    pub magic: U32,
    /// Format version.
    pub version: U32,
    /// Sequence number.
    pub region_seq: U64,
    /// LSN of the first record.
    pub first_lsn: U64,
    /// Sequence number of the first group.
    pub first_group_seq: U64,
    /// Slot of the stage.
    pub slot: U32,
    /// Zero.
    pub reserved: [u8; 20],
}

const _: () = assert!(size_of::<RegionHeader>() == REGION_HEADER_BYTES as usize);

impl Sealed for RegionHeader {}

/// Where a region starts in the three orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionStart {
    /// The region.
    pub seq: RegionSeq,
    /// LSN of its first record.
    pub first_lsn: Lsn,
    /// Sequence number of its first group.
    pub first_group_seq: u64,
}

impl RegionStart {
    /// Encodes the region header for slot `slot`.
    #[must_use]
    pub fn encode(&self, salt: u64, slot: u32) -> RegionHeader {
        let mut header = RegionHeader {
            checksum: U64::ZERO,
            magic: REGION_MAGIC.into(),
            version: VERSION.into(),
            region_seq: self.seq.0.into(),
            first_lsn: self.first_lsn.0.into(),
            first_group_seq: self.first_group_seq.into(),
            slot: slot.into(),
            reserved: [0; 20],
        };
        header.seal(salt);
        header
    }

    /// Decodes the region header at the start of `bytes`, read from slot `slot` of `region_count`.
    #[must_use]
    pub fn decode(bytes: &[u8], salt: u64, slot: u32, region_count: u32) -> Option<RegionStart> {
        let header = RegionHeader::open(bytes, salt)?;
        let seq = RegionSeq(header.region_seq.get());
        let start = RegionStart {
            seq,
            first_lsn: Lsn(header.first_lsn.get()),
            first_group_seq: header.first_group_seq.get(),
        };
        let valid = header.magic.get() == REGION_MAGIC
            && header.slot.get() == slot
            && seq.0 > 0
            && start.first_lsn.0 > 0
            && start.may_grow()
            && seq.slot(region_count) == slot;
        valid.then_some(start)
    }

    /// Whether there can be a region behind it.
    pub(super) fn may_grow(&self) -> bool {
        may_grow(&[self.seq.0, self.first_lsn.0, self.first_group_seq])
    }
}

/// A table entry on disk.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TableEntry {
    /// First byte of the volume.
    pub volume_offset: U64,
    /// Length of the range.
    pub length: U64,
    /// Offset of the record header in the region.
    pub record_offset: U32,
    /// Payload length.
    pub payload_bytes: U32,
    /// Volume id.
    pub volume: U16,
    /// [`RecordKind`] code.
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
    /// Low half of the payload checksum.
    pub payload_checksum_low: U32,
}

const _: () = assert!(size_of::<TableEntry>() == TABLE_ENTRY_BYTES as usize);

impl TableEntry {
    /// Entry for `record` whose header is at `record_offset`.
    #[must_use]
    pub fn new(record: &Record, record_offset: u32) -> TableEntry {
        TableEntry {
            volume_offset: record.range.start.into(),
            length: record.range.len().into(),
            record_offset: record_offset.into(),
            payload_bytes: record.payload_bytes.into(),
            volume: record.volume.0.into(),
            kind: record.kind.code(),
            reserved: 0,
            payload_checksum_low: (record.payload_checksum as u32).into(),
        }
    }

    /// Volume id.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        VolumeId(self.volume.get())
    }

    /// Kind and range; `None` if they make no sense.
    #[must_use]
    pub fn parts(&self) -> Option<(RecordKind, ByteRange)> {
        let start = self.volume_offset.get();
        let end = start.checked_add(self.length.get())?;
        let kind = RecordKind::from_code(self.kind)?;
        let fits = kind.lengths_fit(end - start, self.payload_bytes.get()) && end <= VOLUME_BYTES_MAX;
        fits.then_some((kind, ByteRange { start, end }))
    }
}

/// The footer on disk.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Footer {
    /// Checksum of the rest.
    pub checksum: U64,
    /// Checksum of the entries.
    pub table_checksum: U64,
    /// [`FOOTER_MAGIC`].
    pub magic: U32,
    /// Number of entries.
    pub entry_count: U32,
    /// Region sequence number.
    pub region_seq: U64,
    /// LSN of the first record.
    pub first_lsn: U64,
    /// Sequence number of the first group.
    pub first_group_seq: U64,
    /// End of the last group.
    pub data_end: U32,
    /// Number of groups.
    pub group_count: U32,
    /// Zero.
    pub reserved: U64,
}

const _: () = assert!(size_of::<Footer>() == FOOTER_BYTES as usize);

impl Sealed for Footer {}

/// Space of table and footer for `entry_count` records, a multiple of the block.
#[must_use]
pub fn table_bytes(entry_count: u32, block_bytes: u32) -> u32 {
    let bytes = u64::from(FOOTER_BYTES) + u64::from(entry_count) * u64::from(TABLE_ENTRY_BYTES);
    u32::try_from(align_up(bytes, u64::from(block_bytes))).unwrap_or(u32::MAX)
}

/// What a footer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableInfo {
    /// Where the region starts.
    pub start: RegionStart,
    /// Number of entries.
    pub entry_count: u32,
    /// Number of groups.
    pub group_count: u32,
    /// End of the last group within the region.
    pub data_end: u32,
    /// Checksum of the entries.
    pub table_checksum: u64,
}

impl TableInfo {
    /// Encodes the footer.
    #[must_use]
    pub fn encode(&self, salt: u64) -> Footer {
        let mut footer = Footer {
            checksum: U64::ZERO,
            table_checksum: self.table_checksum.into(),
            magic: FOOTER_MAGIC.into(),
            entry_count: self.entry_count.into(),
            region_seq: self.start.seq.0.into(),
            first_lsn: self.start.first_lsn.0.into(),
            first_group_seq: self.start.first_group_seq.into(),
            data_end: self.data_end.into(),
            group_count: self.group_count.into(),
            reserved: U64::ZERO,
        };
        footer.seal(salt);
        footer
    }

    /// Decodes the footer of the region that starts at `start`, whose last 64 bytes are `bytes`.
    #[must_use]
    pub fn decode(
        bytes: &[u8],
        salt: u64,
        start: RegionStart,
        region_bytes: u32,
        block_bytes: u32,
    ) -> Option<TableInfo> {
        let footer = Footer::open(bytes, salt)?;
        let info = TableInfo {
            start: RegionStart {
                seq: RegionSeq(footer.region_seq.get()),
                first_lsn: Lsn(footer.first_lsn.get()),
                first_group_seq: footer.first_group_seq.get(),
            },
            entry_count: footer.entry_count.get(),
            group_count: footer.group_count.get(),
            data_end: footer.data_end.get(),
            table_checksum: footer.table_checksum.get(),
        };
        let room = region_bytes.checked_sub(table_bytes(info.entry_count, block_bytes))?;
        let valid = footer.magic.get() == FOOTER_MAGIC && info.start == start && info.data_end <= room;
        valid.then_some(info)
    }

    /// Offset of the first entry within the region.
    #[must_use]
    pub fn table_offset(&self, region_bytes: u32, block_bytes: u32) -> u32 {
        region_bytes - table_bytes(self.entry_count, block_bytes)
    }
}
