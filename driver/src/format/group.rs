//! Group header: what one write to the log device carries.
//!
//! ```text
//!  0  u64  checksum of bytes 8..64, salted
//!  8  u32  magic "TGGR"
//! 12  u32  number of records
//! 16  u64  group sequence number
//! 24  u64  region sequence number
//! 32  u64  LSN of the first record
//! 40  u32  length of the group in bytes, header and padding included: a multiple of the stage's block
//! 44  u32  digest of the records' header checksums, in order ([`RecordsDigest`])
//! 48  u32  low 32 bits of the incarnation of the stage that wrote the group
//! 52  u32  number of groups before this one that were not known to be durable when it was written
//! 56  u64  checkpoint LSN that was durable when the group was written
//! ```
//!
//! A group starts at a block boundary; its header is followed by its records, then zeroes to the next block boundary. A few
//! groups are in flight at a time, and each says how many before it were. Two consequences carry recovery:
//! - the log ends before the first invalid group, as long as no valid group of a higher sequence number proves that it was
//!   durable: then it is damage;
//! - valid groups behind the log's end that prove nothing of it were in flight with the torn one when power failed. None of
//!   their records was acknowledged as durable; they are given up.
//!
//! The first group of a region, whose header is written with it, begins when everything before it is durable.
//!
//! A group is valid if and only if its header's checksum and magic match, region, group sequence and first LSN are the
//! expected ones, its length is a multiple of the block and stays in the region, its incarnation is current for its
//! place (see `recovery`), and all its records are valid, end within the last block of the group, and are the ones of the
//! digest: a record at its place may be a valid one that an earlier recovery gave up, where the sectors of the newer one
//! were lost.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Sealed, may_grow};
use crate::base::{Lsn, RegionSeq};

/// Size of a group header.
pub const GROUP_HEADER_BYTES: u32 = 64;
/// "TGGR".
pub const GROUP_MAGIC: u32 = u32::from_le_bytes(*b"TGGR");

/// The header on disk.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GroupHeader {
    /// Checksum of the rest.
    pub checksum: U64,
    /// [`GROUP_MAGIC`].
    pub magic: U32,
    /// Number of records.
    pub record_count: U32,
    /// Sequence number of the group.
    pub group_seq: U64,
    /// Sequence number of the region.
    pub region_seq: U64,
    /// LSN of the first record.
    pub first_lsn: U64,
    /// Length of the group in bytes.
    pub group_bytes: U32,
    /// Digest of the records' header checksums.
    pub records_digest: U32,
    /// Low half of the incarnation that wrote it.
    pub incarnation: U32,
    /// Groups before it that were in flight.
    pub undurable_before: U32,
    /// Durable checkpoint at that time.
    pub checkpoint_lsn: U64,
}

const _: () = assert!(size_of::<GroupHeader>() == GROUP_HEADER_BYTES as usize);

impl Sealed for GroupHeader {}

/// Names the records of a group: each header checksum, folded to 32 bits, goes in after a rotation by 5, so that order counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordsDigest(u32);

impl RecordsDigest {
    /// With one more record, whose header (64 bytes) starts with its checksum.
    #[must_use]
    pub fn with(self, record_header: &[u8]) -> RecordsDigest {
        let (checksum, _) = U64::read_from_prefix(record_header).expect("a record header");
        let checksum = checksum.get();
        RecordsDigest(self.0.rotate_left(5) ^ (checksum ^ (checksum >> 32)) as u32)
    }

    /// As it is stored.
    #[must_use]
    pub fn value(self) -> u32 {
        self.0
    }
}

/// A group header once its own checksum and magic matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Number of records.
    pub record_count: u32,
    /// Sequence number of the group; dense.
    pub group_seq: u64,
    /// Region that holds it.
    pub region: RegionSeq,
    /// LSN of the first record.
    pub first_lsn: Lsn,
    /// Length in bytes.
    pub group_bytes: u32,
    /// Which records it holds.
    pub records_digest: RecordsDigest,
    /// Low 32 bits of the incarnation of the stage that wrote it.
    pub incarnation: u32,
    /// Number of groups before it that were not known to be durable when it was written.
    pub undurable_before: u32,
    /// Checkpoint that was durable when it was written.
    pub checkpoint_lsn: Lsn,
}

impl Group {
    /// Whether the existence of this group proves that the group `group_seq` of the same log was durable.
    #[must_use]
    pub fn proves(&self, group_seq: u64) -> bool {
        group_seq.saturating_add(u64::from(self.undurable_before)) < self.group_seq
    }

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self, salt: u64) -> GroupHeader {
        let mut header = GroupHeader {
            checksum: U64::ZERO,
            magic: GROUP_MAGIC.into(),
            record_count: self.record_count.into(),
            group_seq: self.group_seq.into(),
            region_seq: self.region.0.into(),
            first_lsn: self.first_lsn.0.into(),
            group_bytes: self.group_bytes.into(),
            records_digest: self.records_digest.value().into(),
            incarnation: self.incarnation.into(),
            undurable_before: self.undurable_before.into(),
            checkpoint_lsn: self.checkpoint_lsn.0.into(),
        };
        header.seal(salt);
        header
    }

    /// Decodes the header at the start of `bytes`; expectations are the caller's.
    #[must_use]
    pub fn decode(bytes: &[u8], salt: u64) -> Option<Group> {
        // Looked at first, as it is what most bytes that are no header lack, and costs a fraction of the checksum.
        if bytes.get(8..12)? != GROUP_MAGIC.to_le_bytes() {
            return None;
        }
        let header = GroupHeader::open(bytes, salt)?;
        let numbers = [header.group_seq, header.region_seq, header.first_lsn, header.checkpoint_lsn];
        (header.magic.get() == GROUP_MAGIC && may_grow(&numbers.map(U64::get))).then(|| Group {
            record_count: header.record_count.get(),
            group_seq: header.group_seq.get(),
            region: RegionSeq(header.region_seq.get()),
            first_lsn: Lsn(header.first_lsn.get()),
            group_bytes: header.group_bytes.get(),
            records_digest: RecordsDigest(header.records_digest.get()),
            incarnation: header.incarnation.get(),
            undurable_before: header.undurable_before.get(),
            checkpoint_lsn: Lsn(header.checkpoint_lsn.get()),
        })
    }
}
