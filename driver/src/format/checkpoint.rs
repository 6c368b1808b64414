//! Checkpoint: the durable statement "the backings hold everything up to this LSN".
//!
//! ```text
//!   0  u64   checksum of bytes 8..4096, salted
//!   8  [8]   magic "TGCHKPT\0"
//!  16  u32   version
//!  20  u32   slot
//!  24  u64   sequence number of the checkpoint; the slot is sequence % 16
//!  32  u64   checkpoint LSN
//!  40  u64   sequence number of the head region: the oldest that is still part of the log
//!  48  u64   LSN of the head region's first record
//!  56  u64   sequence number of the head region's first group
//!  64  u64   time, ns since the Unix epoch
//!  72  [24]  reserved
//!  96  128 × 16  per volume: u16 id, 6 reserved bytes, u64 end of the last epoch that touched it (0: none so far)
//! 2144  [1952] reserved
//! ```
//!
//! Valid if and only if checksum, magic and slot match. The valid slot with the highest sequence number is the
//! checkpoint. It is written after the backings were synced, and it is durable before a region is given up or an index
//! entry forgotten. The table tells how far the label of each backing must be. Slots rotate, so a torn write leaves the previous checkpoint whole. The head's numbers say where an
//! empty log goes on.

use std::collections::BTreeMap;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::CHECKPOINT_SLOTS;
use super::region::RegionStart;
use super::{Sealed, VERSION, may_grow};
use crate::base::limits::VOLUMES_MAX;
use crate::base::{Lsn, RegionSeq, VolumeId};

/// "TGCHKPT\0".
pub const CHECKPOINT_MAGIC: [u8; 8] = *b"TGCHKPT\0";

/// The checkpoint on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CheckpointImage {
    checksum: U64,
    magic: [u8; 8],
    version: U32,
    slot: U32,
    sequence: U64,
    lsn: U64,
    head_region_seq: U64,
    head_first_lsn: U64,
    head_first_group_seq: U64,
    time_ns: U64,
    reserved0: [u8; 24],
    volumes: [VolumeFlushed; VOLUMES_MAX],
    reserved1: [u8; 1952],
}

/// How far a volume was flushed, on disk.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VolumeFlushed {
    volume: U16,
    reserved: [u8; 6],
    lsn: U64,
}

const _: () = assert!(size_of::<CheckpointImage>() == 4096);

impl Sealed for CheckpointImage {}

/// A checkpoint's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Number of the checkpoint.
    pub sequence: u64,
    /// The backings hold everything up to this record.
    pub lsn: Lsn,
    /// Oldest region that is still part of the log.
    pub head: RegionStart,
    /// Nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Per volume the end of the last epoch that touched it; absent: none so far.
    pub flushed: BTreeMap<VolumeId, Lsn>,
}

impl Checkpoint {
    /// The slot it belongs to.
    #[must_use]
    pub fn slot(&self) -> u32 {
        (self.sequence % u64::from(CHECKPOINT_SLOTS)) as u32
    }

    /// Encodes it.
    #[must_use]
    pub fn encode(&self, salt: u64) -> CheckpointImage {
        let mut image = CheckpointImage {
            checksum: U64::ZERO,
            magic: CHECKPOINT_MAGIC,
            version: VERSION.into(),
            slot: self.slot().into(),
            sequence: self.sequence.into(),
            lsn: self.lsn.0.into(),
            head_region_seq: self.head.seq.0.into(),
            head_first_lsn: self.head.first_lsn.0.into(),
            head_first_group_seq: self.head.first_group_seq.into(),
            time_ns: self.time_ns.into(),
            reserved0: [0; 24],
            volumes: [VolumeFlushed::default(); VOLUMES_MAX],
            reserved1: [0; 1952],
        };
        assert!(self.flushed.len() <= VOLUMES_MAX);
        for (entry, (volume, lsn)) in image.volumes.iter_mut().zip(&self.flushed) {
            *entry = VolumeFlushed { volume: volume.0.into(), reserved: [0; 6], lsn: lsn.0.into() };
        }
        image.seal(salt);
        image
    }

    /// The checkpoint that follows this one when an epoch up to `to` has touched `volumes`.
    #[must_use]
    pub fn followed_by(
        &self,
        to: Lsn,
        head: RegionStart,
        time_ns: u64,
        volumes: impl Iterator<Item = VolumeId>,
    ) -> Checkpoint {
        let mut flushed = self.flushed.clone();
        flushed.extend(volumes.map(|volume| (volume, to)));
        Checkpoint { sequence: self.sequence + 1, lsn: to, head, time_ns, flushed }
    }

    /// Decodes the content of slot `slot` if it is valid.
    #[must_use]
    pub fn decode(bytes: &[u8], salt: u64, slot: u32) -> Option<Checkpoint> {
        let image = CheckpointImage::open(bytes, salt)?;
        let checkpoint = Checkpoint {
            sequence: image.sequence.get(),
            lsn: Lsn(image.lsn.get()),
            head: RegionStart {
                seq: RegionSeq(image.head_region_seq.get()),
                first_lsn: Lsn(image.head_first_lsn.get()),
                first_group_seq: image.head_first_group_seq.get(),
            },
            time_ns: image.time_ns.get(),
            flushed: image
                .volumes
                .iter()
                .filter(|entry| entry.lsn.get() > 0)
                .map(|entry| (VolumeId(entry.volume.get()), Lsn(entry.lsn.get())))
                .collect(),
        };
        let valid = image.magic == CHECKPOINT_MAGIC
            && image.slot.get() == slot
            && checkpoint.slot() == slot
            && checkpoint.head.seq.0 > 0
            && checkpoint.head.first_lsn.0 > 0
            && checkpoint.head.may_grow()
            && may_grow(&[checkpoint.sequence, checkpoint.lsn.0]);
        valid.then_some(checkpoint)
    }
}
