//! Superblock: identity, geometry and volumes of a stage. Four copies, two at either end of the device.
//!
//! ```text
//!     0  u64   checksum of bytes 8..69632, not salted (the salt is in here)
//!     8  [8]   magic "TIDEGATE"
//!    16  u32   version
//!    20  u32   incompatible features (0): a reader that does not know a bit refuses
//!    24  u32   compatible features (0)
//!    28  u32   copy number
//!    32  u64   sequence number of this update
//!    40  [16]  stage UUID
//!    56  u64   salt of all log checksums
//!    64  u64   device size in bytes at creation
//!    72  u32   block size of the log in bytes
//!    76  u32   region size in bytes
//!    80  u32   number of regions
//!    84  u32   size of the patch zone in bytes
//!    88  u64   incarnation: number of times the stage was opened for writing
//!    96  u64   first group sequence number of this incarnation
//!   104  u64   id of the arena in use
//!   112  [16]  boot id of the machine that last opened the stage
//!   128  u32   state: 0 closed in order (the log holds everything, no arena is needed), 1 in use
//!   132  u16   next volume id
//!   134  u16   reserved
//!   136  u64   creation time, ns since the Unix epoch
//!   144  u64   newest LSN when the stage was closed in order: the log must reach it
//!   152  u64   first LSN of this incarnation
//!   160  [3936] reserved
//!  4096  128 × 512  volume entries
//! ```
//!
//! A copy is valid if and only if its checksum, magic and copy number match. A valid copy with a newer version or an
//! unknown incompatible feature refuses the stage. Among the valid copies the highest sequence number wins; the others
//! are rewritten before the stage is used. Copies are updated one after the other with a sync after each, so that at
//! every instant all but one are whole.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::{Geometry, SUPERBLOCK_COPIES, SUPERBLOCK_SLOT_BYTES};
use super::volume_entry::{VolumeEntry, VolumeInfo};
use super::{Sealed, VERSION, may_grow};
use crate::base::limits::VOLUMES_MAX;
use crate::base::{Error, ErrorKind, Lsn, Result};

/// "TIDEGATE".
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"TIDEGATE";
/// Size of a superblock copy.
pub const SUPERBLOCK_BYTES: usize = 4096 + VOLUMES_MAX * 512;

/// The superblock on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperblockImage {
    checksum: U64,
    magic: [u8; 8],
    version: U32,
    incompatible: U32,
    compatible: U32,
    copy: U32,
    sequence: U64,
    stage_uuid: [u8; 16],
    salt: U64,
    device_bytes: U64,
    block_bytes: U32,
    region_bytes: U32,
    region_count: U32,
    patch_bytes: U32,
    incarnation: U64,
    incarnation_group_seq: U64,
    arena_id: U64,
    boot_id: [u8; 16],
    state: U32,
    next_volume_id: U16,
    reserved0: U16,
    created_ns: U64,
    closed_lsn: U64,
    incarnation_lsn: U64,
    reserved1: [u8; 3936],
    volumes: [VolumeEntry; VOLUMES_MAX],
}

const _: () = assert!(size_of::<SuperblockImage>() == SUPERBLOCK_BYTES);
const _: () = assert!(SUPERBLOCK_BYTES as u64 <= SUPERBLOCK_SLOT_BYTES);

impl Sealed for SuperblockImage {}

/// Whether a stage was closed in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageState {
    /// Closed in order: the log holds everything that was accepted, no arena is needed.
    Clean,
    /// Opened for writing and not closed since.
    InUse,
}

/// A superblock's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Number of this update.
    pub sequence: u64,
    /// Identity of the stage.
    pub stage_uuid: Uuid,
    /// Seed of all log checksums.
    pub salt: u64,
    /// Map of the device.
    pub geometry: Geometry,
    /// Number of times the stage was opened for writing.
    pub incarnation: u64,
    /// First group sequence number of this incarnation.
    pub incarnation_group_seq: u64,
    /// First LSN of this incarnation.
    pub incarnation_lsn: Lsn,
    /// Id of the arena in use.
    pub arena_id: u64,
    /// Boot id of the machine that last opened it.
    pub boot_id: Uuid,
    /// Clean or in use.
    pub state: StageState,
    /// Next volume id to give out.
    pub next_volume_id: u16,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// Newest LSN when the stage was last closed in order.
    pub closed_lsn: Lsn,
    /// The volumes.
    pub volumes: Vec<VolumeInfo>,
}

impl Superblock {
    /// Encodes copy number `copy`.
    #[must_use]
    pub fn encode(&self, copy: u32) -> Box<SuperblockImage> {
        assert!(copy < SUPERBLOCK_COPIES && self.volumes.len() <= VOLUMES_MAX);
        let mut image = SuperblockImage::new_box_zeroed().expect("68 KiB can be allocated");
        image.magic = SUPERBLOCK_MAGIC;
        image.version = VERSION.into();
        image.copy = copy.into();
        image.sequence = self.sequence.into();
        image.stage_uuid = *self.stage_uuid.as_bytes();
        image.salt = self.salt.into();
        image.device_bytes = self.geometry.device_bytes.into();
        image.block_bytes = self.geometry.block_bytes.into();
        image.region_bytes = self.geometry.region_bytes.into();
        image.region_count = self.geometry.region_count.into();
        image.patch_bytes = self.geometry.patch_bytes.into();
        image.incarnation = self.incarnation.into();
        image.incarnation_group_seq = self.incarnation_group_seq.into();
        image.arena_id = self.arena_id.into();
        image.boot_id = *self.boot_id.as_bytes();
        image.state = match self.state {
            StageState::Clean => 0.into(),
            StageState::InUse => 1.into(),
        };
        image.next_volume_id = self.next_volume_id.into();
        image.created_ns = self.created_ns.into();
        image.closed_lsn = self.closed_lsn.0.into();
        image.incarnation_lsn = self.incarnation_lsn.0.into();
        for (entry, volume) in image.volumes.iter_mut().zip(&self.volumes) {
            *entry = volume.encode();
        }
        image.seal(0);
        image
    }

    /// Decodes copy number `copy`. `Ok(None)` if `bytes` holds no valid copy.
    pub fn decode(bytes: &[u8], copy: u32) -> Result<Option<Superblock>> {
        // On the heap: a copy is too large for the stack of a small thread.
        let Ok((image, _)) = SuperblockImage::ref_from_prefix(bytes) else { return Ok(None) };
        let numbers = [
            image.sequence,
            image.incarnation,
            image.incarnation_group_seq,
            image.incarnation_lsn,
            image.closed_lsn,
        ];
        if image.magic != SUPERBLOCK_MAGIC
            || !image.is_sealed(0)
            || image.copy.get() != copy
            || !may_grow(&numbers.map(U64::get))
        {
            return Ok(None);
        }
        if image.version.get() > VERSION || image.incompatible.get() != 0 {
            return Err(Error::new(
                ErrorKind::NewerFormat,
                format!(
                    "the stage has format version {} with feature bits {:#x}; this build knows version {VERSION} and no \
                     feature bits: use a newer tidegate",
                    image.version.get(),
                    image.incompatible.get()
                ),
            ));
        }
        let geometry = Geometry {
            device_bytes: image.device_bytes.get(),
            block_bytes: image.block_bytes.get(),
            region_bytes: image.region_bytes.get(),
            region_count: image.region_count.get(),
            patch_bytes: image.patch_bytes.get(),
        };
        geometry.validate()?;
        let volumes = image
            .volumes
            .iter()
            .filter(|e| !e.is_free())
            .map(VolumeEntry::decode)
            .collect::<Result<Vec<_>>>()?;
        Ok(Some(Superblock {
            sequence: image.sequence.get(),
            stage_uuid: Uuid::from_bytes(image.stage_uuid),
            salt: image.salt.get(),
            geometry,
            incarnation: image.incarnation.get(),
            incarnation_group_seq: image.incarnation_group_seq.get(),
            arena_id: image.arena_id.get(),
            boot_id: Uuid::from_bytes(image.boot_id),
            state: match image.state.get() {
                0 => StageState::Clean,
                1 => StageState::InUse,
                code => return Err(Error::new(ErrorKind::Damaged, format!("unknown stage state {code}"))),
            },
            next_volume_id: image.next_volume_id.get(),
            created_ns: image.created_ns.get(),
            closed_lsn: Lsn(image.closed_lsn.get()),
            incarnation_lsn: Lsn(image.incarnation_lsn.get()),
            volumes,
        }))
    }

    /// Whether `bytes` starts with something that was a superblock: to tell "damaged" from "not a stage".
    #[must_use]
    pub fn resembles(bytes: &[u8]) -> bool {
        bytes.get(8..16) == Some(&SUPERBLOCK_MAGIC[..])
    }
}
