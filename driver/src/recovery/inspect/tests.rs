use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::base::{Lsn, VolumeId};
use crate::io::memory_disk::MemDisk;
use crate::recovery::sample_stage::SampleStage;

fn count(found: &[Structure], kind: &str, valid: bool) -> usize {
    found.iter().filter(|s| s.kind == kind && s.valid == valid).count()
}

fn first<'a>(found: &'a [Structure], kind: &str) -> &'a Structure {
    found.iter().find(|s| s.kind == kind).unwrap_or_else(|| panic!("no {kind}"))
}

#[test]
fn every_structure_of_a_stage_is_shown() {
    let stage = SampleStage::filled();
    let found = inspect(&stage.disk, 1000).unwrap();
    let kinds = [
        ("superblock", 4),
        ("volume entry", 2),
        ("checkpoint", 2),
        ("patch header", 1),
        ("patch entry", 2),
        ("region header", 3),
        ("group", 9),
        ("record", 36),
        ("region footer", 2),
        ("table", 2),
    ];
    for (kind, expected) in kinds {
        assert_eq!((count(&found, kind, true), count(&found, kind, false)), (expected, 0), "{kind}");
    }
    assert_eq!(found.len(), kinds.iter().map(|k| k.1).sum::<usize>());
    assert!(found.is_sorted_by_key(|s| s.offset));
    assert_eq!(stage.disk.writes(), 0);
    let superblock = first(&found, "superblock");
    assert_eq!(superblock.field("stage_uuid"), Some("00000000-0000-0000-0000-000000005746"));
    assert_eq!(superblock.field("salt"), Some("(secret)"));
    assert_eq!(first(&found, "volume entry").field("name"), Some("one"));
    assert_eq!(found.iter().filter(|s| s.kind == "checkpoint").nth(1).unwrap().field("lsn"), Some("4"));
    let record = first(&found, "record");
    assert_eq!((record.field("payload_bytes"), record.field("payload")), (Some("1000"), Some("whole")));
    assert_eq!(record.offset, stage.regions[0].groups[0].records[0]);
    assert!(found.iter().all(|s| s.field("reserved").is_none()), "reserved bytes are zero");
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json[0]["kind"], "superblock");
}

#[test]
fn groups_and_records_are_limited() {
    let found = inspect(&SampleStage::filled().disk, 5).unwrap();
    assert_eq!((count(&found, "group", true), count(&found, "record", true)), (5, 5));
    assert_eq!(count(&found, "region header", true), 3);
}

#[test]
fn damage_is_shown_as_invalid() {
    let stage = SampleStage::filled();
    stage.disk.flip(600, 1);
    stage.disk.flip(checkpoint_offset(1) + 200, 1);
    stage.disk.flip(PATCH_OFFSET + 8192, 1);
    stage.disk.flip(stage.place(RegionSeq(2), 60), 1);
    stage.disk.flip(stage.regions[0].groups[1].records[0] + 64, 1);
    stage.disk.flip(stage.regions[2].groups[0].records[1] + 40, 1);
    stage.disk.flip(stage.regions[2].groups[1].offset + 56, 1);
    let found = inspect(&stage.disk, 1000).unwrap();
    assert_eq!((count(&found, "superblock", true), count(&found, "superblock", false)), (3, 1));
    assert_eq!(first(&found, "superblock").field("reserved"), Some("not zero"));
    assert_eq!(count(&found, "checkpoint", false), 1);
    assert_eq!(count(&found, "patch header", false), 1);
    assert_eq!((count(&found, "patch entry", true), count(&found, "patch entry", false)), (1, 1));
    assert_eq!(count(&found, "region header", false), 1);
    assert_eq!(count(&found, "group", false), 1);
    assert!(found.iter().any(|s| s.kind == "record" && s.field("payload") == Some("damaged")));
    // Three are hidden behind the damaged payload, two behind the damaged header.
    assert_eq!((count(&found, "record", true), count(&found, "record", false)), (29, 2));
}

#[test]
fn a_stage_without_a_valid_superblock_is_still_read() {
    let stage = SampleStage::filled();
    for copy in 0..SUPERBLOCK_COPIES {
        stage.disk.flip(stage.superblock.geometry.superblock_offset(copy) + 5000, 1);
    }
    let found = inspect(&stage.disk, 1000).unwrap();
    assert_eq!((count(&found, "superblock", false), count(&found, "record", true)), (4, 36));
}

#[test]
fn places_that_cannot_be_read_are_shown() {
    let stage = SampleStage::filled();
    let at = stage.place(RegionSeq(2), 0);
    stage.disk.fail_reads(at..at + 1);
    let found = inspect(&stage.disk, 1000).unwrap();
    assert_eq!((first(&found, "unreadable").offset, count(&found, "record", true)), (at, 24));
    stage.disk.fail_reads(0..1);
    assert!(inspect(&stage.disk, 1000).is_err());
}

#[test]
fn labels_of_a_backing_are_found() {
    let stage = SampleStage::filled();
    let backing = stage.backing(2, Lsn(20));
    let found = inspect(&backing, 10).unwrap();
    assert_eq!((found.len(), count(&found, "label", true)), (1, 1));
    assert_eq!((found[0].field("name"), found[0].field("flushed_lsn")), (Some("two"), Some("20")));
    backing.flip(found[0].offset + 75, 1);
    assert_eq!(count(&inspect(&backing, 10).unwrap(), "label", false), 1);
}

/// The arena of the filled sample.
fn arena(stage: &SampleStage) -> MemDisk {
    let geometry = &stage.superblock.geometry;
    let identity = ArenaIdentity::new(stage.superblock.stage_uuid, stage.superblock.arena_id, geometry);
    let mut bytes = identity.encode(stage.superblock.salt).as_bytes().to_vec();
    let from = geometry.regions_offset() as usize;
    bytes.extend_from_slice(&stage.disk.bytes()[from..from + geometry.regions_bytes() as usize]);
    MemDisk::from_bytes("arena", bytes)
}

#[test]
fn an_arena_is_verified_with_its_superblock_only() {
    let stage = SampleStage::filled();
    let disk = arena(&stage);
    let found = inspect_with(&disk, Some(&stage.superblock), 1000).unwrap();
    assert_eq!(count(&found, "arena header", true), 1);
    assert_eq!((count(&found, "region header", true), count(&found, "record", true)), (3, 36));
    assert_eq!(found[0].field("in_use"), Some("yes"));
    let found = inspect(&disk, 1000).unwrap();
    assert_eq!((count(&found, "arena header", false), count(&found, "record", false)), (1, 36));
    assert!(found.iter().all(|s| !s.valid && s.field("verified").is_some()));
    assert_eq!(first(&found, "record").field("payload"), Some("whole"));
    let other = Superblock { arena_id: 8, ..stage.superblock.clone() };
    assert!(found_in_use(&disk, &other).starts_with("no"));
}

fn found_in_use(disk: &MemDisk, superblock: &Superblock) -> String {
    inspect_with(disk, Some(superblock), 0).unwrap()[0].field("in_use").unwrap().to_owned()
}

#[test]
fn foreign_devices_hold_nothing() {
    for len in [0, 1, 511, 4096, 5000, 1 << 21] {
        assert_eq!(inspect(&MemDisk::from_bytes("foreign", vec![0x5a; len]), 10).unwrap(), []);
    }
}

#[test]
fn the_sample_has_its_volumes() {
    let ids: Vec<_> = SampleStage::new().superblock.volumes.iter().map(|v| v.id).collect();
    assert_eq!(ids, [VolumeId(1), VolumeId(2)]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_it_panic(
        kind in 0u8..3,
        places in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 1..40),
        cut in 0usize..9000,
        near_start: bool,
    ) {
        let stage = SampleStage::filled();
        let mut bytes = match kind {
            0 => stage.disk.bytes(),
            1 => arena(&stage).bytes(),
            _ => stage.backing(1, Lsn(9)).bytes(),
        };
        bytes.truncate(bytes.len() - cut);
        for (place, value) in &places {
            let range = if near_start { 256 } else { bytes.len() - 8 };
            let at = place.index(range);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let disk = MemDisk::from_bytes("damaged", bytes);
        let _ = inspect(&disk, 1000).unwrap();
        let _ = inspect_with(&disk, Some(&stage.superblock), 3).unwrap();
    }
}
