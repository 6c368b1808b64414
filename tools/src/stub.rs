//! Stands in for the engine's facade until it is merged: same names and shapes, no data path. `engine.rs` is the only user;
//! the day it imports from `tidegate_driver` this file goes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;
use tidegate_driver::base::limits::REGION_BYTES_DEFAULT;
use tidegate_driver::base::{Error, ErrorKind, Lsn, Result, VolumeId};
use tidegate_driver::format::geometry::{Geometry, PATCH_BYTES_DEFAULT};
use tidegate_driver::format::label::Label;
use tidegate_driver::format::superblock::{StageState, Superblock};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError, VolumeInfo};
use tidegate_driver::io::{Disk, FileDisk};
use tidegate_driver::recovery::superblocks;
use tidegate_driver::volume::Wake;
use tidegate_driver::volume::door::VolumeDoor;
use tidegate_driver::volume::status::{Health, RecoveryReport, StageStatus, VolumeStatus};
use uuid::Uuid;
use zerocopy::IntoBytes;

pub use superblocks::SuperblockRead;

pub struct StageOptions {
    pub region_bytes: u32,
    pub patch_bytes: u32,
    pub block_bytes: u32,
}

impl Default for StageOptions {
    fn default() -> StageOptions {
        StageOptions {
            region_bytes: REGION_BYTES_DEFAULT,
            patch_bytes: PATCH_BYTES_DEFAULT,
            block_bytes: 4096,
        }
    }
}

impl StageOptions {
    pub fn for_disk(disk: &dyn Disk) -> StageOptions {
        StageOptions {
            region_bytes: REGION_BYTES_DEFAULT,
            patch_bytes: PATCH_BYTES_DEFAULT,
            block_bytes: disk.preferred_block_bytes(),
        }
    }
}

pub struct NewVolume {
    pub name: String,
    pub size_bytes: u64,
    pub block_bytes: u32,
    pub ack: AckLevel,
    pub on_log_error: OnLogError,
    pub backing: String,
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

pub fn create_stage(disk: &dyn Disk, options: StageOptions) -> Result<Superblock> {
    let geometry = Geometry::for_device(
        disk.len_bytes(),
        options.block_bytes,
        options.region_bytes,
        options.patch_bytes,
    )?;
    let superblock = Superblock {
        sequence: 1,
        stage_uuid: Uuid::new_v4(),
        salt: Uuid::new_v4().as_u64_pair().0,
        geometry,
        incarnation: 0,
        incarnation_group_seq: 1,
        incarnation_lsn: Lsn(1),
        closed_lsn: Lsn::ZERO,
        arena_id: 0,
        boot_id: Uuid::nil(),
        state: StageState::Clean,
        next_volume_id: 1,
        created_ns: now_ns(),
        volumes: Vec::new(),
    };
    superblocks::write(disk, &superblock)?;
    Ok(superblock)
}

pub fn read_superblock(disk: &dyn Disk) -> Result<SuperblockRead> {
    superblocks::read(disk)
}

pub fn add_volume(stage: &dyn Disk, backing: &dyn Disk, new: NewVolume) -> Result<VolumeInfo> {
    let mut superblock = superblocks::read(stage)?.superblock;
    let info = VolumeInfo {
        uuid: Uuid::new_v4(),
        name: new.name,
        id: VolumeId(superblock.next_volume_id),
        size_bytes: new.size_bytes,
        block_bytes: new.block_bytes,
        ack: new.ack,
        on_log_error: new.on_log_error,
        created_ns: now_ns(),
        backing: new.backing,
    };
    info.validate()?;
    let label = Label {
        sequence: 1,
        stage_uuid: superblock.stage_uuid,
        volume_uuid: info.uuid,
        volume_bytes: info.size_bytes,
        flushed_lsn: Lsn::ZERO,
        name: info.name.clone(),
    };
    let at = tidegate_driver::format::label::label_offset(info.size_bytes, label.slot());
    backing.write(at, label.encode().as_bytes())?;
    backing.sync()?;
    superblock.next_volume_id += 1;
    superblock.sequence += 1;
    superblock.volumes.push(info.clone());
    superblocks::write(stage, &superblock)?;
    Ok(info)
}

pub fn remove_volume(stage: &dyn Disk, name: &str) -> Result<()> {
    let mut superblock = superblocks::read(stage)?.superblock;
    superblock.volumes.retain(|v| v.name != name);
    superblock.sequence += 1;
    superblocks::write(stage, &superblock)
}

pub fn read_label(backing: &dyn Disk, volume_bytes: u64) -> Result<Option<Label>> {
    tidegate_driver::recovery::open::read_label(backing, volume_bytes)
}

#[derive(Debug, Serialize)]
pub struct Problem {
    pub severity: String,
    pub position: u64,
    pub message: String,
}

#[derive(Debug, Serialize)]
pub struct CheckReport {
    pub problems: Vec<Problem>,
    pub notes: Vec<String>,
}

pub fn check(stage: &dyn Disk, _backings: &[(VolumeId, &dyn Disk)]) -> Result<CheckReport> {
    let read = superblocks::read(stage)?;
    let problems = read
        .bad_copies
        .iter()
        .map(|copy| Problem {
            severity: "error".into(),
            position: read.superblock.geometry.superblock_offset(*copy),
            message: format!("superblock copy {copy} is damaged"),
        })
        .collect();
    Ok(CheckReport { problems, notes: Vec::new() })
}

#[derive(Debug, Serialize)]
pub struct Structure {
    pub offset: u64,
    pub name: String,
    pub valid: bool,
    pub fields: Vec<(String, String)>,
}

pub fn inspect(disk: &dyn Disk, _limit: usize) -> Result<Vec<Structure>> {
    let read = superblocks::read(disk)?;
    Ok((0..4)
        .map(|copy| Structure {
            offset: read.superblock.geometry.superblock_offset(copy),
            name: format!("superblock copy {copy}"),
            valid: !read.bad_copies.contains(&copy),
            fields: vec![("stage_uuid".into(), read.superblock.stage_uuid.to_string())],
        })
        .collect())
}

pub struct EngineConfig {
    pub stage: Arc<FileDisk>,
    pub backings: Vec<(VolumeId, Arc<FileDisk>)>,
    pub arena_dir: PathBuf,
    pub accept_loss: bool,
}

pub struct Engine {
    config: EngineConfig,
    superblock: parking_lot::Mutex<Superblock>,
}

impl Engine {
    pub fn open(config: EngineConfig) -> Result<Arc<Engine>> {
        let _ = (&config.arena_dir, config.accept_loss, &config.backings);
        let superblock = superblocks::read(&*config.stage)?.superblock;
        Ok(Arc::new(Engine { superblock: superblock.into(), config }))
    }

    pub fn recovery(&self) -> RecoveryReport {
        RecoveryReport { clean: true, ..RecoveryReport::default() }
    }

    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.superblock.lock().volumes.clone()
    }

    pub fn door(self: &Arc<Self>, _volume: VolumeId, _wake: Arc<dyn Wake>) -> Result<VolumeDoor> {
        Err(Error::new(ErrorKind::Unsupported, "the engine is a stand-in"))
    }

    pub fn add_volume(&self, backing: Arc<FileDisk>, new: NewVolume) -> Result<VolumeInfo> {
        let info = add_volume(&*self.config.stage, &*backing, new)?;
        self.superblock.lock().volumes.push(info.clone());
        Ok(info)
    }

    pub fn remove_volume(&self, id: VolumeId) -> Result<()> {
        let mut superblock = self.superblock.lock();
        superblock.volumes.retain(|v| v.id != id);
        superblock.sequence += 1;
        superblocks::write(&*self.config.stage, &superblock)
    }

    pub fn resize_volume(&self, id: VolumeId, new_bytes: u64) -> Result<()> {
        let mut superblock = self.superblock.lock();
        if let Some(volume) = superblock.volumes.iter_mut().find(|v| v.id == id) {
            volume.size_bytes = new_bytes;
        }
        superblock.sequence += 1;
        superblocks::write(&*self.config.stage, &superblock)
    }

    pub fn drain(&self) -> Result<()> {
        Ok(())
    }

    pub fn close(&self, _flush: bool) -> Result<()> {
        Ok(())
    }

    pub fn status(&self) -> StageStatus {
        let superblock = self.superblock.lock();
        let volumes = superblock.volumes.iter().map(volume_status).collect();
        StageStatus {
            health: Health::Ok,
            problem: None,
            stage_uuid: superblock.stage_uuid.to_string(),
            incarnation: superblock.incarnation,
            stage_bytes: superblock.geometry.regions_bytes(),
            used_bytes: 0,
            claimed_lsn: 0,
            published_lsn: 0,
            durable_lsn: 0,
            checkpoint_lsn: 0,
            records: 0,
            record_bytes: 0,
            groups: 0,
            log_bytes: 0,
            epochs: 0,
            flushed_bytes: 0,
            stage_full_waits: 0,
            waiting: 0,
            log_errors: 0,
            backing_errors: 0,
            index_extents: 0,
            cold_regions: 0,
            volumes,
        }
    }
}

fn volume_status(v: &VolumeInfo) -> VolumeStatus {
    VolumeStatus {
        name: v.name.clone(),
        uuid: v.uuid.to_string(),
        id: v.id.0,
        size_bytes: v.size_bytes,
        block_bytes: v.block_bytes,
        ack: v.ack,
        on_log_error: v.on_log_error,
        backing: v.backing.clone(),
        problem: None,
        doors: 0,
        reads: 0,
        writes: 0,
        discards: 0,
        flushes: 0,
        read_bytes: 0,
        write_bytes: 0,
    }
}
