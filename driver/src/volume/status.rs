//! What a running stage tells about itself.

use serde::{Deserialize, Serialize};

use crate::format::volume_entry::{AckLevel, OnLogError};

/// Health of a stage, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Damage was found in the log: nothing more is accepted.
    Damaged,
    /// The log device fails: nothing is acknowledged as durable.
    LogError,
    /// A backing fails: data stay in the stage, flushing is retried.
    Degraded,
    /// All is well.
    Ok,
}

/// State of a stage. Sizes are bytes, counters start at 0 when the server starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageStatus {
    /// Health.
    pub health: Health,
    /// Why the health is not `ok`.
    pub problem: Option<String>,
    /// UUID of the stage.
    pub stage_uuid: String,
    /// Incarnation.
    pub incarnation: u64,
    /// Space for records.
    pub stage_bytes: u64,
    /// Space taken by regions that are not reclaimed yet.
    pub used_bytes: u64,
    /// Newest LSN given out.
    pub claimed_lsn: u64,
    /// Everything up to here is in the arena.
    pub published_lsn: u64,
    /// Everything up to here is durable on the log device.
    pub durable_lsn: u64,
    /// Everything up to here is on the backings.
    pub checkpoint_lsn: u64,
    /// Records accepted.
    pub records: u64,
    /// Payload bytes accepted.
    pub record_bytes: u64,
    /// Groups written to the log device.
    pub groups: u64,
    /// Bytes written to the log device.
    pub log_bytes: u64,
    /// Flush epochs completed.
    pub epochs: u64,
    /// Bytes written to backings.
    pub flushed_bytes: u64,
    /// Requests that had to wait for space.
    pub stage_full_waits: u64,
    /// Requests that had to wait for the flusher's progress although there was space.
    #[serde(default)]
    pub paced_waits: u64,
    /// Requests waiting for space now.
    pub waiting: u64,
    /// Errors of the log device.
    pub log_errors: u64,
    /// Errors of backings.
    pub backing_errors: u64,
    /// Extents in the index.
    pub index_extents: u64,
    /// Regions that are not in memory yet.
    pub cold_regions: u64,
    /// The volumes.
    pub volumes: Vec<VolumeStatus>,
}

/// State of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: String,
    /// Id within the stage.
    pub id: u16,
    /// Size.
    pub size_bytes: u64,
    /// Logical block size.
    pub block_bytes: u32,
    /// Ack level.
    pub ack: AckLevel,
    /// Policy on log errors.
    pub on_log_error: OnLogError,
    /// Path of the backing.
    pub backing: String,
    /// Problem of the backing, if any.
    pub problem: Option<String>,
    /// Doors open.
    pub doors: u32,
    /// Requests completed, by kind.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Flushes and FUA writes completed.
    pub flushes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
}

/// What opening a stage found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryReport {
    /// The stage had been closed in order.
    pub clean: bool,
    /// The arena of the previous server was found and used.
    pub arena_used: bool,
    /// Records after the checkpoint found on the log.
    pub records_from_log: u64,
    /// Records found only in the arena.
    pub records_from_arena: u64,
    /// Bytes of groups that were in flight and were ignored (normal after a power cut).
    pub torn_bytes: u64,
    /// Regions whose table was read.
    pub regions_by_table: u64,
    /// Regions that had to be scanned.
    pub regions_by_scan: u64,
    /// Block images restored to backings.
    pub patches_restored: u64,
    /// Superblock copies repaired.
    pub superblocks_repaired: u32,
    /// Microseconds until reads could be served.
    pub open_micros: u64,
    /// Remarks for people.
    pub notes: Vec<String>,
}
