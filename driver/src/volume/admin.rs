//! Making stages and volumes, with nothing running on them.
//!
//! Order of a creation, so that a crash leaves either nothing or something whole: the label on the backing first (a label
//! without a volume is ignored and overwritten), the superblock last.

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::base::limits::{BLOCK_BYTES_MAX, REGION_BYTES_DEFAULT, VOLUMES_MAX};
use crate::base::{Error, ErrorKind, Lsn, RegionSeq, Result, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::{Geometry, PATCH_BYTES_DEFAULT, checkpoint_offset};
use crate::format::label::{LABEL_BYTES, LABEL_SLOTS, Label, backing_bytes_for, label_offset};
use crate::format::region::RegionStart;
use crate::format::superblock::{StageState, Superblock};
use crate::format::volume_entry::{AckLevel, OnLogError, VolumeInfo};
use crate::io::Disk;
pub use crate::recovery::open::read_label;
use crate::recovery::superblocks;
pub use crate::recovery::superblocks::SuperblockRead;

/// Sizes of a new stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageOptions {
    /// Region size in bytes.
    pub region_bytes: u32,
    /// Patch zone in bytes.
    pub patch_bytes: u32,
    /// Block of the log in bytes.
    pub block_bytes: u32,
}

impl StageOptions {
    /// What suits a device.
    #[must_use]
    pub fn for_disk(disk: &dyn Disk) -> StageOptions {
        StageOptions {
            region_bytes: REGION_BYTES_DEFAULT,
            patch_bytes: PATCH_BYTES_DEFAULT,
            block_bytes: disk.preferred_block_bytes().clamp(disk.block_bytes(), BLOCK_BYTES_MAX),
        }
    }
}

/// What a new volume is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes.
    pub block_bytes: u32,
    /// Ack level.
    pub ack: AckLevel,
    /// Policy on log errors.
    pub on_log_error: OnLogError,
    /// Path of the backing.
    pub backing: String,
}

/// Nanoseconds since the Unix epoch.
#[must_use]
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// Random 64 bits.
#[must_use]
pub fn random_u64() -> u64 {
    Uuid::new_v4().as_u64_pair().0 ^ Uuid::new_v4().as_u64_pair().1
}

/// Makes `disk` a stage without volumes. What was on it is lost: the caller has asked. Durable when it returns.
pub fn create_stage(disk: &dyn Disk, options: StageOptions) -> Result<Superblock> {
    create_stage_as(disk, options, Uuid::new_v4(), random_u64())
}

/// [`create_stage`] with a given identity, for repeatable simulations.
pub fn create_stage_as(disk: &dyn Disk, options: StageOptions, uuid: Uuid, salt: u64) -> Result<Superblock> {
    let geometry = Geometry::for_device(
        disk.len_bytes(),
        options.block_bytes,
        options.region_bytes,
        options.patch_bytes,
    )
    .map_err(|e| e.within(disk.name()))?;
    let head = RegionStart { seq: RegionSeq(1), first_lsn: Lsn(1), first_group_seq: 1 };
    let checkpoint =
        Checkpoint { sequence: 1, lsn: Lsn::ZERO, head, time_ns: unix_ns(), flushed: Default::default() };
    let superblock = Superblock {
        sequence: 1,
        stage_uuid: uuid,
        salt,
        geometry,
        incarnation: 0,
        incarnation_group_seq: 1,
        incarnation_lsn: Lsn(1),
        arena_id: 0,
        boot_id: Uuid::nil(),
        state: StageState::Clean,
        next_volume_id: 1,
        created_ns: unix_ns(),
        closed_lsn: Lsn::ZERO,
        volumes: Vec::new(),
    };
    disk.write(checkpoint_offset(checkpoint.slot()), checkpoint.encode(salt).as_bytes())?;
    disk.sync()?;
    superblocks::write(disk, &superblock)?;
    Ok(superblock)
}

/// The superblock of a stage, read only.
pub fn read_superblock(disk: &dyn Disk) -> Result<SuperblockRead> {
    superblocks::read(disk)
}

/// What a new volume will be on this stage, checked against the stage and the backing. Writes nothing.
pub fn plan_volume(superblock: &Superblock, backing: &dyn Disk, new: &NewVolume) -> Result<VolumeInfo> {
    let info = VolumeInfo {
        uuid: Uuid::new_v4(),
        name: new.name.clone(),
        id: VolumeId(superblock.next_volume_id),
        size_bytes: new.size_bytes,
        block_bytes: new.block_bytes,
        ack: new.ack,
        on_log_error: new.on_log_error,
        created_ns: unix_ns(),
        backing: new.backing.clone(),
    };
    info.validate()?;
    if superblock.volumes.iter().any(|v| v.name == new.name) {
        return Err(Error::new(
            ErrorKind::Exists,
            format!("the stage already has a volume '{}': choose another name or delete it first", new.name),
        ));
    }
    if superblock.volumes.len() >= VOLUMES_MAX || superblock.next_volume_id == u16::MAX {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!("the stage has no room for another volume ({VOLUMES_MAX} at most): create another stage"),
        ));
    }
    let needed = backing_bytes_for(new.size_bytes);
    if backing.len_bytes() < needed {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{} has {} bytes; a volume of {} needs {needed} (its size and a tail for the label): use a larger backing or \
                 a smaller --size",
                backing.name(),
                backing.len_bytes(),
                new.size_bytes
            ),
        ));
    }
    Ok(info)
}

/// The first label of a volume.
#[must_use]
pub fn first_label(superblock: &Superblock, info: &VolumeInfo) -> Label {
    Label {
        sequence: 1,
        stage_uuid: superblock.stage_uuid,
        volume_uuid: info.uuid,
        volume_bytes: info.size_bytes,
        flushed_lsn: Lsn::ZERO,
        name: info.name.clone(),
    }
}

/// Writes `label` to its slot and clears the others. Durable when it returns.
pub fn write_only_label(backing: &dyn Disk, label: &Label) -> Result<()> {
    wipe_labels(backing, label.volume_bytes)?;
    backing.write(label_offset(label.volume_bytes, label.slot()), label.encode().as_bytes())?;
    backing.sync()
}

/// Clears all label slots of a volume of `volume_bytes`. Durable when it returns.
pub fn wipe_labels(backing: &dyn Disk, volume_bytes: u64) -> Result<()> {
    let zeroes = vec![0; (LABEL_BYTES * u64::from(LABEL_SLOTS)) as usize];
    backing.write(label_offset(volume_bytes, 0), &zeroes)?;
    backing.sync()
}

/// Adds a volume to a stage that no server has open. Durable when it returns.
pub fn add_volume(stage: &dyn Disk, backing: &dyn Disk, new: NewVolume) -> Result<VolumeInfo> {
    let mut superblock = superblocks::read(stage)?.superblock;
    let info = plan_volume(&superblock, backing, &new)?;
    write_only_label(backing, &first_label(&superblock, &info))?;
    superblock.volumes.push(info.clone());
    superblock.next_volume_id += 1;
    superblock.sequence += 1;
    superblocks::write(stage, &superblock)?;
    Ok(info)
}

/// Removes a volume from a stage that no server has open and that was closed in order. Records of it that are still
/// staged are dropped with it. Durable when it returns.
pub fn remove_volume(stage: &dyn Disk, name: &str) -> Result<()> {
    let mut superblock = superblocks::read(stage)?.superblock;
    if superblock.state == StageState::InUse {
        return Err(Error::new(
            ErrorKind::Busy,
            format!(
                "{} was not closed in order: attach and detach one of its volumes first, then delete '{name}'",
                stage.name()
            ),
        ));
    }
    let before = superblock.volumes.len();
    superblock.volumes.retain(|v| v.name != name);
    if superblock.volumes.len() == before {
        return Err(Error::new(ErrorKind::NotFound, format!("{} has no volume '{name}'", stage.name())));
    }
    superblock.sequence += 1;
    superblocks::write(stage, &superblock)
}
