//! The engine on real files: io_uring, threads and all, without a kernel block device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use tidegate_driver::base::{ErrorKind, Result, VolumeId};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::Disk;
use tidegate_driver::io::file::FileDisk;
use tidegate_driver::volume::admin::{self, NewVolume, StageOptions};
use tidegate_driver::volume::{Engine, EngineConfig, LocalClient, RequestKind};

const VOLUME_BYTES: u64 = 64 << 20;
const V1: VolumeId = VolumeId(1);
const V2: VolumeId = VolumeId(2);

struct Place {
    dir: TempDir,
}

fn new_volume(name: &str, ack: AckLevel, path: &Path) -> NewVolume {
    NewVolume {
        name: name.into(),
        size_bytes: VOLUME_BYTES,
        block_bytes: 512,
        ack,
        on_log_error: OnLogError::Stall,
        backing: path.to_str().unwrap().into(),
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (seed.wrapping_mul(31).wrapping_add(i as u64 * 7) >> 1) as u8).collect()
}

impl Place {
    fn new(stage_bytes: u64, acks: &[AckLevel]) -> Place {
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

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self) -> Result<Arc<Engine>> {
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

    fn backing_bytes(&self, index: usize, offset: u64, len: usize) -> Vec<u8> {
        let disk = FileDisk::open_to_look(&self.path(&format!("backing{index}"))).unwrap();
        let mut bytes = vec![0; len];
        disk.read(offset, &mut bytes).unwrap();
        bytes
    }

    /// Copies of all files as they are this moment, with the superblock naming the copies.
    fn copy(&self, with_arena: bool) -> Place {
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

#[test]
fn what_is_written_is_read_before_and_after_the_flush() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    client.write(4096, &pattern(1, 10_000)).unwrap();
    client.write(5000, &pattern(2, 77)).unwrap();
    let mut expected = pattern(1, 10_000);
    expected[904..981].copy_from_slice(&pattern(2, 77));
    assert_eq!(client.read(4096, 10_000).unwrap(), expected);
    assert_eq!(client.read(0, 4096).unwrap(), vec![0; 4096]);
    engine.drain().unwrap();
    assert_eq!(client.read(4096, 10_000).unwrap(), expected);
    drop(client);
    engine.close(true).unwrap();
    assert_eq!(place.backing_bytes(0, 4096, 10_000), expected);
    assert_eq!(
        std::fs::read_dir(place.path("arena")).unwrap().count(),
        0,
        "an orderly close leaves no arena"
    );
}

#[test]
fn a_stage_smaller_than_the_data_slows_writers_and_loses_nothing() {
    let place = Place::new(24 << 20, &[AckLevel::Memory]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    for round in 0..2u64 {
        for i in 0..60u64 {
            client.write(i << 20, &pattern(round * 100 + i, 1 << 20)).unwrap();
        }
    }
    for i in 0..60u64 {
        assert!(client.read(i << 20, 1 << 20).unwrap() == pattern(100 + i, 1 << 20), "MiB {i}");
    }
    drop(client);
    assert!(engine.status().epochs > 1);
    engine.close(true).unwrap();
}

#[test]
fn zeroes_and_discards_hide_older_data() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    client.write(0, &pattern(3, 64 << 10)).unwrap();
    engine.drain().unwrap();
    client.call(RequestKind::WriteZeroes, 1000, 30_000, Vec::new()).unwrap();
    client.call(RequestKind::Discard, 40_960, 8192, Vec::new()).unwrap();
    let mut expected = pattern(3, 64 << 10);
    expected[1000..31_000].fill(0);
    expected[40_960..49_152].fill(0);
    assert!(client.read(0, 64 << 10).unwrap() == expected, "staged");
    engine.drain().unwrap();
    assert!(client.read(0, 64 << 10).unwrap() == expected, "flushed");
    drop(client);
    engine.close(true).unwrap();
}

/// Copies of the files taken while the engine runs: with the arena they are what a killed server leaves.
#[test]
fn a_killed_server_loses_nothing_and_a_lost_arena_is_an_alarm() {
    let place = Place::new(64 << 20, &[AckLevel::Log, AckLevel::Memory]);
    let engine = place.open().unwrap();
    let mut durable = LocalClient::new(&engine, V1, 8).unwrap();
    let mut quick = LocalClient::new(&engine, V2, 8).unwrap();
    quick.write(0, &pattern(9, 5000)).unwrap();
    durable.write(123, &pattern(10, 5000)).unwrap();
    quick.write(8192, &pattern(11, 5000)).unwrap();

    // A copy takes its time, in which the flusher may begin: then it is of no one instant, and made again.
    let copy = |with_arena| loop {
        let now = || (engine.status().epochs, engine.status().durable_lsn);
        let before = now();
        let copy = place.copy(with_arena);
        if now() == before {
            break copy;
        }
    };
    let killed = copy(true);
    let cut = copy(false);
    drop((durable, quick));
    engine.close(true).unwrap();

    let engine = killed.open().unwrap();
    assert!(engine.recovery().arena_used);
    let mut client = LocalClient::new(&engine, V2, 8).unwrap();
    assert!(client.read(8192, 5000).unwrap() == pattern(11, 5000), "acknowledged in memory, arena kept");
    drop(client);
    engine.close(true).unwrap();

    let error = cut.open().err().expect("an arena that is gone in the same boot is an alarm");
    assert_eq!(error.kind(), ErrorKind::Lost, "{}", error.report());
}

#[test]
fn volumes_come_grow_and_go_while_the_stage_is_in_use() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let path = place.path("extra");
    std::fs::File::create(&path).unwrap().set_len(VOLUME_BYTES + (64 << 10)).unwrap();
    let backing = Arc::new(FileDisk::open_exclusive(&path).unwrap());
    let info = engine.add_volume(backing, new_volume("extra", AckLevel::Log, &path)).unwrap();
    let mut client = LocalClient::new(&engine, info.id, 8).unwrap();
    client.write(VOLUME_BYTES - 100, &pattern(5, 100)).unwrap();
    assert!(client.write(VOLUME_BYTES - 50, &pattern(5, 100)).is_err(), "past the end");
    engine.resize_volume(info.id, VOLUME_BYTES * 2).unwrap();
    client.write(VOLUME_BYTES - 50, &pattern(6, 100)).unwrap();
    engine.drain().unwrap();
    let mut expected = pattern(5, 50);
    expected.extend(pattern(6, 100));
    expected.extend([0; 70_000]);
    assert_eq!(client.read(VOLUME_BYTES - 100, 70_150).unwrap(), expected, "old labels do not show");
    assert_eq!(engine.remove_volume(info.id).unwrap_err().kind(), ErrorKind::Busy);
    drop(client);
    engine.remove_volume(info.id).unwrap();
    engine.close(true).unwrap();
    drop(engine);
    let engine = place.open().unwrap();
    assert_eq!(engine.volumes().len(), 1);
    engine.close(true).unwrap();
}

/// The change waits for the epoch's end; nothing else happens that could wake the thread that carries it out.
#[test]
fn a_volume_grows_in_the_middle_of_a_flush() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    for round in 1..=20 {
        for block in 0..64 {
            client.write((block * 128) << 10, &pattern(round, 4096)).unwrap();
        }
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| engine.drain());
            let status = scope.spawn(|| engine.status().volumes.len());
            engine.resize_volume(V1, VOLUME_BYTES + (round << 20)).unwrap();
            flush.join().unwrap().unwrap();
            assert_eq!(status.join().unwrap(), 1);
        });
    }
    drop(client);
    engine.close(true).unwrap();
}
