//! Arena header: the first block of the shared-memory file that holds the regions in memory.
//!
//! ```text
//!   0  u64   checksum of bytes 8..4096, salted
//!   8  [8]   magic "TGARENA\0"
//!  16  u32   version
//!  20  u32   reserved
//!  24  [16]  stage UUID
//!  40  u64   arena id, also in the superblock
//!  48  u32   region size in bytes
//!  52  u32   number of regions
//!  56  [4040] reserved
//! 4096 ×     the region slots, each the same bytes as on the log device
//! ```
//!
//! Valid if and only if checksum and magic match, and stage UUID, arena id and sizes are the superblock's. The header is
//! written once, before the superblock names the arena; nothing in it changes afterwards, so no crash can tear it.

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::Geometry;
use super::{Sealed, VERSION};

/// "TGARENA\0".
pub const ARENA_MAGIC: [u8; 8] = *b"TGARENA\0";
/// Size of the header; the first region follows.
pub const ARENA_HEADER_BYTES: usize = 4096;

/// The header in the file.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ArenaImage {
    checksum: U64,
    magic: [u8; 8],
    version: U32,
    reserved0: U32,
    stage_uuid: [u8; 16],
    arena_id: U64,
    region_bytes: U32,
    region_count: U32,
    reserved1: [u8; 4040],
}

const _: () = assert!(size_of::<ArenaImage>() == ARENA_HEADER_BYTES);

impl Sealed for ArenaImage {}

/// Which arena it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaIdentity {
    /// The stage.
    pub stage_uuid: Uuid,
    /// The arena.
    pub arena_id: u64,
    /// Region size.
    pub region_bytes: u32,
    /// Number of regions.
    pub region_count: u32,
}

impl ArenaIdentity {
    /// Identity of the arena `arena_id` of a stage.
    #[must_use]
    pub fn new(stage_uuid: Uuid, arena_id: u64, geometry: &Geometry) -> ArenaIdentity {
        ArenaIdentity {
            stage_uuid,
            arena_id,
            region_bytes: geometry.region_bytes,
            region_count: geometry.region_count,
        }
    }

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self, salt: u64) -> ArenaImage {
        let mut image = ArenaImage {
            checksum: U64::ZERO,
            magic: ARENA_MAGIC,
            version: VERSION.into(),
            reserved0: U32::ZERO,
            stage_uuid: *self.stage_uuid.as_bytes(),
            arena_id: self.arena_id.into(),
            region_bytes: self.region_bytes.into(),
            region_count: self.region_count.into(),
            reserved1: [0; 4040],
        };
        image.seal(salt);
        image
    }

    /// Decodes a header if it is valid and of a version this build knows.
    #[must_use]
    pub fn decode(bytes: &[u8], salt: u64) -> Option<ArenaIdentity> {
        let image = ArenaImage::open(bytes, salt)?;
        let valid = image.magic == ARENA_MAGIC && image.version.get() <= VERSION;
        valid.then(|| ArenaIdentity {
            stage_uuid: Uuid::from_bytes(image.stage_uuid),
            arena_id: image.arena_id.get(),
            region_bytes: image.region_bytes.get(),
            region_count: image.region_count.get(),
        })
    }
}
