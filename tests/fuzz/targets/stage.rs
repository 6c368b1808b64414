//! A whole stage with edits under valid checksums: `check`, `inspect` and opening never panic; what `check` calls sound can
//! be opened; a refusal changes nothing.
#![no_main]

use std::collections::BTreeMap;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tidegate_driver::base::{Lsn, VolumeId};
use tidegate_driver::io::Disk;
use tidegate_driver::io::memory_disk::MemDisk;
use tidegate_driver::recovery::sample_stage::SampleStage;
use tidegate_driver::recovery::{Environment, OwnArenas, check, inspect, open};
use tidegate_fuzz::{Structure, edit, salt_of};

struct Sample {
    bytes: Vec<u8>,
    structures: Vec<Structure>,
    backings: [Vec<u8>; 2],
    environment: Environment,
}

static SAMPLE: LazyLock<Sample> = LazyLock::new(|| {
    let stage = SampleStage::filled();
    let bytes = stage.disk.bytes();
    let salt = stage.superblock.salt;
    let live = stage.live.iter().map(|r| r.start as usize..r.end as usize);
    let structures = live.map(|r| (r.clone(), salt_of(&bytes[r], salt))).collect();
    let backings = [1, 2].map(|id| stage.backing(id, Lsn(4)).bytes());
    let environment =
        Environment { boot_id: uuid::Uuid::from_u128(1), arena_id: 99, accept_loss: false, forget: None };
    Sample { bytes, structures, backings, environment }
});

fuzz_target!(|data: &[u8]| {
    let sample = &*SAMPLE;
    let mut bytes = sample.bytes.clone();
    edit(&mut bytes, &sample.structures, data);
    let stage = MemDisk::from_bytes("stage", bytes);
    let disks = [0, 1].map(|i| MemDisk::from_bytes(["one", "two"][i], sample.backings[i].clone()));
    let backings: BTreeMap<VolumeId, &dyn Disk> =
        [(VolumeId(1), &disks[0] as &dyn Disk), (VolumeId(2), &disks[1] as &dyn Disk)].into();
    let report = check(&stage, &backings);
    let _ = inspect(&stage, 200);
    assert_eq!(stage.writes(), 0, "looking changes nothing");
    match open(&stage, &backings, &mut OwnArenas, sample.environment) {
        Ok(_) => {}
        Err(error) => {
            assert_eq!(stage.writes(), 0, "a refusal changes nothing: {}", error.report());
            if let Ok(report) = report {
                assert!(!report.is_sound(), "check says it is sound, opening says {}", error.report());
            }
        }
    }
});
