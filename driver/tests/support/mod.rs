//! A stage and its backings as files in a temporary folder.

#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

pub mod child;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use tidegate_driver::base::{Result, VolumeId};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::Disk;
use tidegate_driver::io::file::FileDisk;
use tidegate_driver::volume::admin::{self, NewVolume, StageOptions};
use tidegate_driver::volume::{Engine, EngineConfig};

pub const VOLUME_BYTES: u64 = 64 << 20;
pub const V1: VolumeId = VolumeId(1);
pub const V2: VolumeId = VolumeId(2);

pub struct Place {
    dir: TempDir,
}

pub fn new_volume(name: &str, ack: AckLevel, path: &Path) -> NewVolume {
    NewVolume {
        name: name.into(),
        size_bytes: VOLUME_BYTES,
        block_bytes: 512,
        ack,
        on_log_error: OnLogError::Stall,
        backing: path.to_str().unwrap().into(),
    }
}

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (seed.wrapping_mul(31).wrapping_add(i as u64 * 7) >> 1) as u8).collect()
}

impl Place {
    pub fn new(stage_bytes: u64, acks: &[AckLevel]) -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        std::fs::File::create(place.path("stage")).unwrap().set_len(stage_bytes).unwrap();
        let stage = FileDisk::open_exclusive(&place.path("stage")).unwrap();
        admin::create_stage(&stage, StageOptions::for_disk(&stage)).unwrap();
        for (i, &ack) in acks.iter().enumerate() {
            let path = place.path(&format!("backing{i}"));
            std::fs::File::create(&path).unwrap().set_len(VOLUME_BYTES + (64 << 10)).unwrap();
            let backing = FileDisk::open_exclusive(&path).unwrap();
            admin::add_volume(&stage, &backing, new_volume(&format!("v{i}"), ack, &path)).unwrap();
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn open(&self) -> Result<Arc<Engine>> {
        let stage = FileDisk::open_exclusive(&self.path("stage"))?;
        let superblock = admin::read_superblock(&stage)?.superblock;
        let backings = superblock
            .volumes
            .iter()
            .map(|v| Ok((v.id, Arc::new(FileDisk::open_exclusive(Path::new(&v.backing))?))))
            .collect::<Result<Vec<_>>>()?;
        Engine::open(EngineConfig {
            stage: Arc::new(stage),
            backings,
            arena_dir: self.path("arena"),
            accept_loss: false,
            forget: None,
        })
    }

    pub fn backing_bytes(&self, index: usize, offset: u64, len: usize) -> Vec<u8> {
        let disk = FileDisk::open_to_look(&self.path(&format!("backing{index}"))).unwrap();
        let mut bytes = vec![0; len];
        disk.read(offset, &mut bytes).unwrap();
        bytes
    }

    /// Copies of all files as they are this moment, with the superblock naming the copies.
    pub fn copy(&self, with_arena: bool) -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        for entry in std::fs::read_dir(self.dir.path()).unwrap().flatten().filter(|e| e.path().is_file()) {
            std::fs::copy(entry.path(), place.dir.path().join(entry.file_name())).unwrap();
        }
        if with_arena {
            std::fs::create_dir(place.path("arena")).unwrap();
            for entry in std::fs::read_dir(self.path("arena")).unwrap().flatten() {
                std::fs::copy(entry.path(), place.path("arena").join(entry.file_name())).unwrap();
            }
        }
        let stage = FileDisk::open_exclusive(&place.path("stage")).unwrap();
        let mut superblock = admin::read_superblock(&stage).unwrap().superblock;
        for (i, volume) in superblock.volumes.iter_mut().enumerate() {
            volume.backing = place.path(&format!("backing{i}")).to_str().unwrap().into();
        }
        superblock.sequence += 1;
        tidegate_driver::recovery::superblocks::write(&stage, &superblock).unwrap();
        place
    }
}
