//! Every bound in one place, asserted against the others at compile time.

/// Smallest unit of a write to the stage's log device; also the size of superblock headers, labels and checkpoints.
pub const BLOCK_BYTES_MAX: u32 = 4096;
/// Smallest logical block of a volume.
pub const BLOCK_BYTES_MIN: u32 = 512;
/// Largest number of volumes on one stage.
pub const VOLUMES_MAX: usize = 128;
/// Largest volume: the highest byte offset must stay below 2^63 (`off_t`) whatever the format's 64 bits allow.
pub const VOLUME_BYTES_MAX: u64 = 1 << 62;
/// Region size of a stage unless asked otherwise.
pub const REGION_BYTES_DEFAULT: u32 = 4 << 20;
/// Smallest region (simulated stages use it).
pub const REGION_BYTES_MIN: u32 = 32 << 10;
/// Largest region.
pub const REGION_BYTES_MAX: u32 = 256 << 20;
/// Fewest regions a stage works with: one open, one sealed being flushed, one free, one spare.
pub const REGIONS_MIN: u32 = 4;
/// Largest payload of a record at the default region size; a record never takes more than a quarter of a region.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// A group is closed once it holds this much, so that one device write stays bounded.
pub const GROUP_BYTES_MAX: u32 = 1 << 20;
/// Most groups that have begun to be written and are not durable.
pub const GROUPS_IN_FLIGHT_MAX: usize = 2;
/// What numbers that only grow (LSNs, sequence numbers, incarnations) stay below: a billion a second take 146 years to it.
pub const NUMBER_MAX: u64 = 1 << 62;
/// Most extents all indexes of a stage may hold (bounds the memory beside the arena, see P6).
pub const INDEX_EXTENTS_MAX: usize = 768 << 10;

const _: () = assert!(PAYLOAD_BYTES_MAX <= REGION_BYTES_DEFAULT / 4);
const _: () = assert!(BLOCK_BYTES_MIN <= BLOCK_BYTES_MAX);
