//! What opening has to notice.
use std::collections::BTreeMap;

use parking_lot::Mutex;
use zerocopy::IntoBytes;

use super::open::read_label;
use super::sample_stage::{REGION_COUNT, SampleStage, VOLUME_BYTES};
use super::scan::scan;
use super::superblocks;
use super::{ArenaSource, Environment, OwnArenas, Problem, check, open};
use crate::base::checksum::crc64;
use crate::base::{ByteRange, ErrorKind, Lsn, RegionSeq, Result, VolumeId};
use crate::format::arena::ArenaIdentity;
use crate::format::label::{Label, label_offset};
use crate::format::record::{Record, RecordKind};
use crate::format::superblock::Superblock;
use crate::format::volume_entry::AckLevel;
use crate::io::Disk;
use crate::io::memory_disk::MemDisk;
use crate::stage::arena::Arena;

fn end(stage: &SampleStage) -> std::result::Result<u64, String> {
    scan(&stage.disk, &stage.superblock, &mut |_| {}).map(|l| l.next_lsn.0 - 1).map_err(|e| e.report())
}

#[test]
fn a_damaged_header_of_the_last_region_is_damage() {
    let stage = SampleStage::filled();
    stage.disk.flip(stage.place(RegionSeq(3), 20), 1);
    assert!(end(&stage).is_err(), "36 durable records, the log is said to end at {:?}", end(&stage));
}

#[test]
fn a_hole_behind_an_old_checkpoint_is_damage() {
    let mut stage = SampleStage::filled();
    for _ in 0..4 {
        stage.begin_region();
        stage.spoken = Lsn(12);
        stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    }
    // The newest checkpoint (at LSN 12) is damaged, and so is the header of region 3, which was not flushed.
    stage.disk.flip(stage.place(RegionSeq(3), 20), 1);
    assert!(end(&stage).is_err(), "records 13..=36 are given up without a word");
}

/// A write by the stage's present incarnation.
fn write_of(stage: &SampleStage, lsn: Lsn, volume: VolumeId, at: u64, payload: &[u8]) -> Record {
    Record {
        lsn,
        volume,
        kind: RecordKind::Write,
        range: ByteRange::at(at, payload.len() as u64),
        payload_bytes: payload.len() as u32,
        payload_checksum: crc64(payload),
        timestamp_ns: 1,
        incarnation: stage.superblock.incarnation as u16,
    }
}

struct Given(Option<Arena>);

impl ArenaSource for Given {
    fn find(&mut self, _: &ArenaIdentity, _: u64) -> Result<Option<Arena>> {
        Ok(self.0.take())
    }
    fn make(&mut self, identity: &ArenaIdentity, _: u64) -> Result<Arena> {
        Arena::anonymous(identity)
    }
}

#[test]
fn records_that_only_the_arena_holds_need_their_backing_too() {
    let mut stage = SampleStage::new();
    for volume in &mut stage.superblock.volumes {
        volume.ack = AckLevel::Memory;
    }
    stage.put_superblock();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    let s = &stage.superblock;
    let identity = ArenaIdentity::new(s.stage_uuid, s.arena_id, &s.geometry);
    let arena = Arena::anonymous(&identity).unwrap();
    // Record 2, for volume 2, was acknowledged in memory only.
    let payload = vec![7u8; 64];
    let record = write_of(&stage, Lsn(2), VolumeId(2), 0, &payload);
    let at = 512 + stage.regions[0].groups[0].bytes + 64;
    arena.put(RegionSeq(1), at, record.encode(s.salt, RegionSeq(1)).as_bytes());
    arena.put(RegionSeq(1), at + 64, &payload);
    let one = stage.backing(1, Lsn(0));
    let backings: BTreeMap<VolumeId, &dyn Disk> = [(VolumeId(1), &one as &dyn Disk)].into();
    let environment = Environment { boot_id: s.boot_id, arena_id: 99, accept_loss: false, forget: None };
    let before = stage.disk.bytes();
    let mut arenas = Given(Some(arena));
    match open(&stage.disk, &backings, &mut arenas, environment) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound),
        Ok(opened) => panic!(
            "opened; volume 2 has something staged: {}, has a flush target: {}",
            opened.core.is_staged(VolumeId(2)),
            opened.targets.contains_key(&VolumeId(2))
        ),
    }
    assert!(stage.disk.bytes() == before, "a refusal changed the stage");
}

#[test]
fn a_patch_behind_a_volume_is_refused_before_anything_is_repaired() {
    let mut stage = SampleStage::new();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100), (RecordKind::Write, 1, 4096, 100)]);
    let backings = [1, 2].map(|id| stage.backing(id, Lsn(0)));
    stage.superblock.volumes[0].size_bytes = 8192;
    stage.put_superblock();
    stage.put_patches(Lsn(2));
    stage.disk.flip(stage.superblock.geometry.superblock_offset(1), 1);
    let label = stage.backing(1, Lsn(0)).bytes();
    backings[0].put(8192, &label[8192..]);
    let disks: BTreeMap<VolumeId, &dyn Disk> =
        [(VolumeId(1), &backings[0] as &dyn Disk), (VolumeId(2), &backings[1] as &dyn Disk)].into();
    let s = &stage.superblock;
    let environment = Environment { boot_id: s.boot_id, arena_id: 99, accept_loss: false, forget: None };
    let before = stage.disk.writes();
    let error = open(&stage.disk, &disks, &mut OwnArenas, environment).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.report().contains("behind the end of volume 1"), "{}", error.report());
    assert_eq!(stage.disk.writes(), before, "a refusal changed the stage");
}

/// The log has lost its last group, of which an epoch had already logged patches. Their LSNs would be given out again, and a
/// later recovery would put the patches over what was flushed since.
#[test]
fn patches_of_an_epoch_beyond_the_log_are_refused() {
    let mut stage = SampleStage::filled();
    stage.put_patches(Lsn(36));
    let backings = [1, 2].map(|id| stage.backing(id, Lsn(4)));
    let disks: BTreeMap<VolumeId, &dyn Disk> =
        [(VolumeId(1), &backings[0] as &dyn Disk), (VolumeId(2), &backings[1] as &dyn Disk)].into();
    let s = &stage.superblock;
    let environment = Environment { boot_id: s.boot_id, arena_id: 99, accept_loss: true, forget: None };
    stage.disk.flip(stage.regions[2].groups[2].records[0] + 64, 1);
    let before = stage.disk.bytes();
    let error = open(&stage.disk, &disks, &mut OwnArenas, environment).unwrap_err();
    assert!(error.report().contains("behind the end of the log at LSN 32"), "{}", error.report());
    assert!(stage.disk.bytes() == before, "a refusal changed the stage");
    assert!(!check(&stage.disk, &disks).unwrap().is_sound());
}

/// All newer copies of the superblock are gone, and the one that is left does not know the incarnation of the last groups.
#[test]
fn groups_of_a_later_incarnation_are_not_cut_off() {
    let mut stage = SampleStage::filled();
    let known = stage.superblock.clone();
    stage.superblock.incarnation += 1;
    for _ in 0..3 {
        stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    }
    stage.superblock = Superblock { incarnation_group_seq: 10, incarnation_lsn: Lsn(37), ..known };
    stage.put_superblock();
    assert!(end(&stage).is_err(), "the log is said to end at {:?}", end(&stage));
    assert!(!check(&stage.disk, &BTreeMap::new()).unwrap().is_sound());
}

/// The way out when a backing with staged writes is lost: its volume is deleted, the others keep theirs.
#[test]
fn a_lost_volume_is_forgotten_while_opening() {
    let mut stage = SampleStage::new();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100), (RecordKind::Write, 2, 0, 100)]);
    let one = stage.backing(1, Lsn(0));
    let backings: BTreeMap<VolumeId, &dyn Disk> = [(VolumeId(1), &one as &dyn Disk)].into();
    let s = &stage.superblock;
    let identity = ArenaIdentity::new(s.stage_uuid, s.arena_id, &s.geometry);
    let arena = || Given(Some(Arena::anonymous(&identity).unwrap()));
    let mut environment = Environment { boot_id: s.boot_id, arena_id: 99, accept_loss: false, forget: None };
    let refused = open(&stage.disk, &backings, &mut arena(), environment).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    environment.forget = Some(VolumeId(2));
    let opened = open(&stage.disk, &backings, &mut arena(), environment).unwrap();
    assert!(opened.core.is_staged(VolumeId(1)) && !opened.core.is_staged(VolumeId(2)));
    let left = superblocks::read(&stage.disk).unwrap().superblock.volumes;
    assert_eq!(left.iter().map(|v| v.id).collect::<Vec<_>>(), [VolumeId(1)]);
}

#[test]
fn a_table_proves_that_the_last_groups_were_durable() {
    let mut stage = SampleStage::filled();
    stage.seal();
    assert_eq!(end(&stage), Ok(36));
    let last = stage.regions[2].groups[2].offset;
    stage.disk.flip(last + 100, 1);
    assert!(end(&stage).is_err(), "the last group is damaged, the log is said to end at {:?}", end(&stage));
}

#[test]
fn a_torn_group_in_a_new_region_does_not_hide_what_is_known_to_be_flushed() {
    let mut stage = SampleStage::filled();
    stage.seal();
    // Around the ring once, so that region 1 is overwritten; everything up to its end is known to be flushed.
    stage.spoken = Lsn(12);
    for _ in 4..=REGION_COUNT {
        stage.begin_region();
        stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
        stage.seal();
    }
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    let before = end(&stage).unwrap();
    let torn = stage.regions.last().unwrap().groups[0].offset;
    stage.disk.flip(torn + 100, 1);
    assert_eq!(end(&stage), Ok(before - 1));
}

/// Opening syncs the log before the superblock says where the new incarnation begins, so everything before that was durable,
/// whatever groups of the incarnation before lie behind it.
#[test]
fn what_an_opening_found_was_durable() {
    for given_up_behind in [false, true] {
        let mut stage = SampleStage::filled();
        let last = stage.regions[2].groups[2].offset;
        if given_up_behind {
            stage.undurable_before = 1;
            stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
        }
        stage.superblock.incarnation += 1;
        stage.superblock.incarnation_group_seq = 10;
        stage.superblock.incarnation_lsn = Lsn(37);
        stage.put_superblock();
        assert_eq!(end(&stage), Ok(36));
        stage.disk.flip(last + 8, 1);
        assert!(
            end(&stage).is_err(),
            "the last group is damaged, the log is said to end at {:?}",
            end(&stage)
        );
        let report = check(&stage.disk, &BTreeMap::new()).unwrap();
        let told = |p: &Problem| p.what.contains("it was durable when the stage was opened last");
        assert!(report.problems.iter().any(told), "{:#?}", report.problems);
    }
}

/// Two groups were in flight when power failed: the first is torn, the second is whole and proves nothing. A third one, which
/// was written when the first was durable, makes it damage.
#[test]
fn a_whole_group_that_was_in_flight_with_a_torn_one_is_given_up() {
    let mut stage = SampleStage::filled();
    let before = stage.next_lsn.0 - 1;
    stage.undurable_before = 0;
    stage.put_group(&[(RecordKind::Write, 1, 0, 3000)]);
    stage.undurable_before = 1;
    stage.put_group(&[(RecordKind::Write, 1, 8192, 3000)]);
    assert_eq!(end(&stage), Ok(before + 2));
    let groups = &stage.regions[2].groups;
    let torn = groups[groups.len() - 2].offset;
    stage.disk.flip(torn + 200, 1);
    assert_eq!(end(&stage), Ok(before));
    stage.put_group(&[(RecordKind::Write, 1, 16384, 3000)]);
    assert!(end(&stage).is_err(), "the group was durable when a later one was written");
}

/// Of a new region the first two groups were in flight, and the write with the header is lost.
#[test]
fn the_second_group_of_a_region_does_not_prove_its_header() {
    let mut stage = SampleStage::filled();
    let before = stage.next_lsn.0 - 1;
    stage.seal();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    stage.undurable_before = 1;
    stage.put_group(&[(RecordKind::Write, 1, 8192, 100)]);
    assert_eq!(end(&stage), Ok(before + 2));
    let region = stage.superblock.geometry.region_offset(RegionSeq(4));
    stage.disk.put(region, &[0; 1024]);
    assert_eq!(end(&stage), Ok(before));
    stage.put_group(&[(RecordKind::Write, 1, 16384, 100)]);
    assert!(end(&stage).is_err(), "the region's header was durable when its third group was written");
}

/// Power is cut while the group is written: its header and last records are new, the others are those that an earlier
/// recovery had given up, at the same places and with the same LSNs.
#[test]
fn a_group_with_given_up_records_is_torn() {
    let mut stage = SampleStage::filled();
    stage.begin_region();
    let records = [(RecordKind::Write, 1, 0, 3000), (RecordKind::Write, 1, 8192, 3000)];
    stage.put_group(&records);
    assert_eq!(end(&stage), Ok(38));
    let first = stage.regions[3].groups[0].records[0];
    // The incarnation before had written something else there.
    let bytes = vec![9u8; 3000];
    let record = write_of(&stage, Lsn(37), VolumeId(1), 65536, &bytes);
    stage.disk.put(first, record.encode(stage.superblock.salt, RegionSeq(4)).as_bytes());
    stage.disk.put(first + 64, &bytes);
    assert_eq!(end(&stage), Ok(36), "a record that the group was not written with");
}

/// The checkpoint that freed the slot is damaged, so the ring counts as full, and a region is in the arena alone.
#[test]
fn a_region_that_only_the_arena_holds_is_not_dropped_silently() {
    let mut stage = SampleStage::new();
    for volume in &mut stage.superblock.volumes {
        volume.ack = AckLevel::Memory;
    }
    stage.put_superblock();
    for _ in 0..REGION_COUNT {
        stage.begin_region();
        stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
        stage.seal();
    }
    let (one, two) = (stage.backing(1, Lsn(0)), stage.backing(2, Lsn(0)));
    let backings: BTreeMap<VolumeId, &dyn Disk> =
        [(VolumeId(1), &one as &dyn Disk), (VolumeId(2), &two as &dyn Disk)].into();
    let s = &stage.superblock;
    let next = RegionSeq(u64::from(REGION_COUNT) + 1);
    let arena = |staged: bool| {
        let arena = Arena::anonymous(&ArenaIdentity::new(s.stage_uuid, s.arena_id, &s.geometry)).unwrap();
        if staged {
            let payload = [7u8; 64];
            let record = write_of(&stage, stage.next_lsn, VolumeId(1), 4096, &payload);
            arena.put(next, 512 + 64, record.encode(s.salt, next).as_bytes());
            arena.put(next, 512 + 128, &payload);
        }
        Given(Some(arena))
    };
    let mut environment = Environment { boot_id: s.boot_id, arena_id: 99, accept_loss: false, forget: None };
    let before = stage.disk.bytes();
    let refused = open(&stage.disk, &backings, &mut arena(true), environment).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Lost, "{}", refused.report());
    assert!(stage.disk.bytes() == before, "a refusal changed the stage");
    open(&stage.disk, &backings, &mut arena(false), environment).unwrap();
    stage.disk.put(0, &before);
    environment.accept_loss = true;
    let opened = open(&stage.disk, &backings, &mut arena(true), environment).unwrap();
    assert_eq!(opened.core.claimed().next(), stage.next_lsn);
}

/// A backing whose cache shows a block that a failed sync has not written.
struct Forgetful {
    disk: MemDisk,
    cached: Mutex<Option<(u64, Vec<u8>)>>,
}

impl Disk for Forgetful {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read(offset, buf)?;
        if let Some((_, bytes)) = self.cached.lock().as_ref().filter(|(at, _)| *at == offset) {
            buf.copy_from_slice(bytes);
        }
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.disk.write(offset, data)
    }
    fn sync(&self) -> Result<()> {
        self.disk.sync()
    }
    fn drop_cache(&self) -> Result<()> {
        *self.cached.lock() = None;
        Ok(())
    }
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }
    fn block_bytes(&self) -> u32 {
        self.disk.block_bytes()
    }
    fn preferred_block_bytes(&self) -> u32 {
        self.disk.preferred_block_bytes()
    }
    fn name(&self) -> String {
        self.disk.name()
    }
}

/// Were it taken for durable, the next label would be written over the only one that is.
#[test]
fn a_label_that_is_in_the_cache_alone_does_not_count() {
    let mut stage = SampleStage::new();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100), (RecordKind::Write, 2, 0, 100)]);
    let durable = read_label(&stage.backing(1, Lsn(0)), VOLUME_BYTES).unwrap().unwrap();
    let label = Label { sequence: durable.sequence + 1, flushed_lsn: Lsn(2), ..durable.clone() };
    let cached = (label_offset(VOLUME_BYTES, label.slot()), label.encode().as_bytes().to_vec());
    let one = Forgetful { disk: stage.backing(1, Lsn(0)), cached: Mutex::new(Some(cached)) };
    assert_eq!(read_label(&one, VOLUME_BYTES).unwrap().unwrap(), label);
    let two = stage.backing(2, Lsn(0));
    let backings: BTreeMap<VolumeId, &dyn Disk> =
        [(VolumeId(1), &one as &dyn Disk), (VolumeId(2), &two as &dyn Disk)].into();
    let boot_id = stage.superblock.boot_id;
    let environment = Environment { boot_id, arena_id: 99, accept_loss: false, forget: None };
    let opened = open(&stage.disk, &backings, &mut Given(None), environment).unwrap();
    let target = &opened.targets[&VolumeId(1)];
    assert_eq!((&target.label, target.attempted), (&durable, Lsn(0)));
}
