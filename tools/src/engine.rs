//! The one place where the command and the server meet the engine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tidegate_driver::base::limits::REGION_BYTES_DEFAULT;
use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::format::geometry::PATCH_BYTES_DEFAULT;
use tidegate_driver::format::volume_entry::{AckLevel, VolumeInfo};
use tidegate_driver::io::uring::Reactor;
use tidegate_driver::io::{Disk, FileDisk};
use tidegate_driver::volume::{VolumeDoor, Wake};
use tidegate_ublk::{DeviceConfig, DoorFactory, Status};
use uuid::Uuid;

use crate::registry::{Entry, Registry};

pub use tidegate_driver::recovery::{Problem, check, inspect};
pub use tidegate_driver::volume::admin::{
    NewVolume, StageOptions, add_volume, create_stage, read_label, read_superblock, remove_volume,
};
pub use tidegate_driver::volume::{Engine, EngineConfig};

/// Sizes of a stage in a file that is still to be made.
pub const STAGE_OPTIONS: StageOptions =
    StageOptions { region_bytes: REGION_BYTES_DEFAULT, patch_bytes: PATCH_BYTES_DEFAULT, block_bytes: 4096 };

/// Where new arenas live: memory with a name, which outlives the process.
pub fn arena_dir() -> PathBuf {
    std::env::var_os("TIDEGATE_ARENA_DIR").map_or_else(|| PathBuf::from("/dev/shm/tidegate"), PathBuf::from)
}

/// Where the arena of a stage is: where the last server had it (`noted`), which may have been told another place than this
/// process, as long as it is there; else where new ones live.
pub fn arena_dir_of(stage: Uuid, noted: Option<PathBuf>) -> PathBuf {
    let holds_one = |dir: &PathBuf| {
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
        let prefix = stage.to_string();
        names.into_iter().any(|name| name.to_string_lossy().starts_with(&prefix))
    };
    noted.filter(holds_one).unwrap_or_else(arena_dir)
}

/// What a loss is reported with: where the arena was looked for.
pub fn explain_loss(e: Error, noted: Option<&Path>) -> Error {
    if e.kind() != ErrorKind::Lost {
        return e;
    }
    let usual = arena_dir();
    let places = match noted {
        Some(noted) if noted != usual => format!("{} and {}", noted.display(), usual.display()),
        _ => usual.display().to_string(),
    };
    Error::new(ErrorKind::Lost, format!("{}. The arena was looked for in {places}", e.report()))
}

/// What a user has asked for of a volume's device; `None`: what is usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Microseconds that its queues look for requests before they sleep.
    pub poll_us: Option<u32>,
    /// Its queues, when it is made.
    pub queues: Option<u16>,
}

/// How clients see the device of a volume.
pub fn device_config(
    engine: &Engine,
    volume: &VolumeInfo,
    backing: &FileDisk,
    wishes: Wishes,
) -> DeviceConfig {
    let Wishes { poll_us, queues } = wishes;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    // With one processor, whoever is looked for needs it.
    let poll_us = if cpus > 1 { poll_us.map_or(POLL_US, |us| us.min(POLL_US_MAX)) } else { 0 };
    DeviceConfig {
        size_bytes: volume.size_bytes,
        logical_block_bytes: volume.block_bytes,
        physical_block_bytes: backing.preferred_block_bytes().max(volume.block_bytes),
        queues: queues.map_or_else(
            || (cpus / QUEUE_CPUS).clamp(1, QUEUES_MAX.into()) as u16,
            |queues| queues.clamp(1, QUEUES_MAX.min(cpus.try_into().unwrap_or(u16::MAX))),
        ),
        // One record holds a request; the kernel wants whole 64 KiB.
        max_io_bytes: (engine.request_bytes_max() & !0xffff).max(0x1_0000),
        volatile_cache: volume.ack != AckLevel::Log,
        poll: Duration::from_micros(poll_us.into()),
        identity: identity_of(volume.uuid),
        ..DeviceConfig::default()
    }
}

/// How long a queue looks for requests before it sleeps, in microseconds, unless the user says something else: what KVM takes
/// for the same thing.
pub const POLL_US: u32 = 200;
/// Most of it.
pub const POLL_US_MAX: u32 = 10_000;

/// More queues than this do not help one log.
pub const QUEUES_MAX: u16 = 4;
/// Processors that share a queue. Its thread runs on one of them, so that a client and the thread that serves it do not
/// take turns on one processor: with a queue for each of two, 4 KiB writes went from 57,000 to 17,000 a second.
const QUEUE_CPUS: usize = 4;

/// What marks a ublk device as that of a volume. Never zero.
pub fn identity_of(volume: Uuid) -> u64 {
    let (high, low) = volume.as_u64_pair();
    (high ^ low).max(1)
}

/// The ublk device of a volume that is there already.
pub fn device_of(volume: Uuid) -> Result<Option<(u32, Status)>> {
    let identity = identity_of(volume);
    let mut found = Vec::new();
    for id in tidegate_ublk::list()? {
        match tidegate_ublk::state(id) {
            Ok(device) if device.identity == identity => found.push((id, device.status)),
            Ok(_) => {}
            // Gone meanwhile; or in a state that ours are never in.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => {}
            Err(e) => return Err(e),
        }
    }
    // One that was ended while somebody had it open keeps its number for a while: it is not the one that counts.
    found.sort_by_key(|(_, status)| *status == Status::Dead);
    Ok(found.first().copied())
}

/// Names and UUIDs of the volumes on the stage of `entry` that are known here.
pub fn volumes_on(registry: &Registry, entry: &Entry) -> Vec<(String, Uuid)> {
    let entries = registry.entries().unwrap_or_default().into_iter();
    entries.filter(|e| e.stage_uuid == entry.stage_uuid).map(|e| (e.name, e.volume_uuid)).collect()
}

/// Makes the doors of a volume, one on each queue thread of its device.
pub struct Doors {
    /// The engine.
    pub engine: Arc<Engine>,
    /// The volume.
    pub volume: VolumeId,
}

impl DoorFactory for Doors {
    type Door = VolumeDoor;

    fn open(&self, _queue: u16, waker: Arc<dyn Wake>, reactor: &mut Reactor) -> Result<VolumeDoor> {
        self.engine.door(self.volume, waker, reactor)
    }
}

/// A problem that `check` found, on one line.
pub fn describe(problem: &Problem) -> String {
    let at = problem.offset.map(|o| format!(" at byte {o}")).unwrap_or_default();
    format!("{}{at}: {}; {}", problem.device, problem.what, problem.advice)
}
