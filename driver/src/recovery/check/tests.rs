use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::base::RegionSeq;
use crate::format::group::Group;
use crate::format::record::RecordKind;
use crate::io::memory_disk::MemDisk;
use crate::recovery::sample_stage::{PutGroup, SampleStage, VOLUME_BYTES};
use crate::recovery::scan::scan;

fn check_alone(stage: &SampleStage) -> CheckReport {
    let report = check(&stage.disk, &BTreeMap::new()).unwrap();
    assert_eq!(stage.disk.writes(), 0, "a check writes nothing");
    report
}

fn check_with(stage: &SampleStage, one: &MemDisk) -> CheckReport {
    let backings: BTreeMap<VolumeId, &dyn Disk> = [(VolumeId(1), one as &dyn Disk)].into();
    let report = check(&stage.disk, &backings).unwrap();
    assert_eq!(one.writes() + stage.disk.writes(), 0, "a check writes nothing");
    report
}

/// The only problem, which must speak of `what`.
fn only_problem(report: &CheckReport, what: &str) -> Problem {
    assert_eq!(report.problems.len(), 1, "{:#?}", report.problems);
    assert!(report.problems[0].what.contains(what), "{:#?}", report.problems);
    report.problems[0].clone()
}

fn assert_note(report: &CheckReport, what: &str) {
    assert!(report.notes.iter().any(|note| note.contains(what)), "{:#?}", report.notes);
}

fn damaged_scan(stage: &SampleStage) -> bool {
    scan(&stage.disk, &stage.superblock, &mut |_| {}).is_err()
}

#[test]
fn a_sound_stage_has_no_problems() {
    let stage = SampleStage::filled();
    let one = stage.backing(1, Lsn(20));
    let report = check_with(&stage, &one);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_eq!((report.regions, report.tables, report.groups, report.records), (3, 2, 9, 36));
    assert_eq!(report.payload_bytes, 9 * 4000);
    assert_eq!((report.checkpoint_lsn, report.log_end_lsn), (Lsn(4), Lsn(36)));
    assert_eq!((report.superblock_copies, report.checkpoints, report.pending_patches), (4, 2, 2));
    assert_eq!(report.volumes[0].flushed_lsn, Some(Lsn(20)));
    assert_eq!((report.volumes[0].staged_records, report.volumes[0].staged_bytes), (16, 8000));
    assert_eq!(report.torn_bytes, 0);
    assert_note(&report, "backing of volume 'two' was not given");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["log_end_lsn"], 36);
}

#[test]
fn an_empty_stage_is_sound() {
    let report = check_alone(&SampleStage::new());
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_eq!((report.regions, report.records, report.log_end_lsn), (1, 0, Lsn(0)));
}

#[test]
fn a_damaged_payload_is_found_behind_a_valid_table_and_hides_nothing() {
    let stage = SampleStage::filled();
    let record = stage.regions[1].groups[1].records[2];
    stage.disk.flip(record + 64 + 1500, 0x10);
    assert!(!damaged_scan(&stage), "opening trusts the table");
    let report = check_alone(&stage);
    let problem = only_problem(&report, "payload of record 19 ");
    assert_eq!(problem.offset, Some(record));
    assert_eq!(problem.device, "stage");
    assert_eq!((report.records, report.groups, report.log_end_lsn), (35, 8, Lsn(36)));
}

#[test]
fn two_damaged_places_are_both_found() {
    let stage = SampleStage::filled();
    for group in [0, 2] {
        stage.disk.flip(stage.regions[0].groups[group].records[0] + 64, 1);
    }
    let report = check_alone(&stage);
    let found: Vec<_> = report.problems.iter().map(|p| p.offset.unwrap()).collect();
    let expected: Vec<_> = [0, 2].map(|group| stage.regions[0].groups[group].records[0]).into();
    assert_eq!(found, expected);
}

#[test]
fn a_damaged_record_header_costs_one_record() {
    let stage = SampleStage::filled();
    stage.disk.flip(stage.regions[2].groups[0].records[1] + 20, 1);
    let report = check_alone(&stage);
    only_problem(&report, "header of record 26 ");
    assert_eq!(report.records, 35);
    assert!(damaged_scan(&stage));
}

#[test]
fn records_of_a_damaged_group_header_are_still_read() {
    let stage = SampleStage::filled();
    let group = &stage.regions[2].groups[1];
    stage.disk.flip(group.offset + 30, 1);
    stage.disk.flip(group.records[3] + 10, 1);
    let report = check_alone(&stage);
    assert_eq!(report.problems.len(), 2, "{:#?}", report.problems);
    assert!(report.problems[0].what.contains("group 8 is invalid"), "{:#?}", report.problems);
    assert_eq!((report.groups, report.records), (8, 35));
}

#[test]
fn a_zeroed_region_header_is_found_and_its_records_are_read() {
    for region in 0..3 {
        let stage = SampleStage::filled();
        let at = stage.place(stage.regions[region].start.seq, 0);
        stage.disk.zero(at..at + 64);
        let report = check_alone(&stage);
        let problem =
            only_problem(&report, if region == 0 { "first region" } else { "header of the region" });
        assert_eq!(problem.offset, Some(at));
        assert_eq!((report.records, report.log_end_lsn), (36, Lsn(36)), "region {region}");
    }
}

#[test]
fn a_first_group_without_its_region_header_is_torn() {
    let mut stage = SampleStage::filled();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    let at = stage.place(stage.regions[3].start.seq, 0);
    stage.disk.zero(at..at + 512);
    let report = check_alone(&stage);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_eq!((report.torn_bytes, report.log_end_lsn), (1024, Lsn(36)));
}

#[test]
fn a_head_region_without_its_header_is_torn_unless_it_goes_on() {
    let mut stage = SampleStage::filled();
    stage.begin_region();
    let head = stage.regions[3].start;
    stage.put_checkpoint(3, Lsn(36), head);
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    let at = stage.place(head.seq, 0);
    stage.disk.zero(at..at + 512);
    let report = check_alone(&stage);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_eq!((report.torn_bytes, report.log_end_lsn, report.records), (1024, Lsn(36), 0));
    assert!(!damaged_scan(&stage));
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    only_problem(&check_alone(&stage), "header of the region is damaged");
    assert!(damaged_scan(&stage));
}

#[test]
fn a_torn_tail_is_a_note() {
    for cut in ["payload", "record header", "group header"] {
        let stage = SampleStage::filled();
        let group = &stage.regions[2].groups[2];
        match cut {
            "payload" => stage.disk.zero(group.records[2] + 512..group.records[2] + 1024),
            "record header" => stage.disk.zero(group.records[1]..group.records[1] + 64),
            _ => stage.disk.zero(group.offset..group.offset + 512),
        }
        let report = check_alone(&stage);
        assert!(report.is_sound(), "{cut}: {:#?}", report.problems);
        assert_eq!((report.records, report.log_end_lsn), (32, Lsn(32)), "{cut}");
        assert_eq!(report.torn_bytes, u64::from(group.bytes), "{cut}");
        assert_note(&report, "was cut short");
        assert!(!damaged_scan(&stage));
    }
}

/// A region's first group that an earlier recovery gave up is still there when two of the next incarnation are in flight behind
/// a region that took a group more: the second one proves nothing of the first, and the old one is nothing of this log.
#[test]
fn a_given_up_first_group_is_no_beginning() {
    let mut stage = SampleStage::filled();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    let given_up = stage.regions.pop().unwrap();
    let at = stage.place(given_up.start.seq, 0);
    let bytes = stage.disk.bytes()[at as usize..][..1536].to_vec();
    (stage.next_group, stage.next_lsn) = (given_up.start.first_group_seq, given_up.start.first_lsn);
    stage.superblock.incarnation += 1;
    stage.superblock.incarnation_group_seq = stage.next_group;
    stage.superblock.incarnation_lsn = stage.next_lsn;
    stage.superblock.sequence += 1;
    stage.put_superblock();
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    stage.undurable_before = 1;
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    stage.disk.zero(at..at + 512);
    stage.disk.put(at + 512, &bytes[512..]);
    let report = check_alone(&stage);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_eq!(report.log_end_lsn, Lsn(37));
    assert!(!damaged_scan(&stage));
}

/// The group right behind the damaged one was in flight with it, so that only the one after that proves anything.
#[test]
fn behind_damage_every_group_counts() {
    let mut stage = SampleStage::filled();
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    stage.undurable_before = 1;
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    stage.put_group(&[(RecordKind::Write, 1, 0, 700)]);
    let groups = stage.regions[2].groups.len();
    stage.disk.flip(stage.regions[2].groups[groups - 3].offset + 20, 1);
    let report = check_alone(&stage);
    only_problem(&report, "group 10 is invalid, but group 11");
    assert_eq!((report.records, report.log_end_lsn), (39, Lsn(39)));
}

#[test]
fn a_table_proves_that_the_last_group_was_whole() {
    let mut stage = SampleStage::filled();
    stage.seal();
    stage.disk.flip(stage.regions[2].groups[2].records[0] + 64, 1);
    only_problem(&check_alone(&stage), "payload of record 33 ");
}

#[test]
fn a_group_that_an_earlier_recovery_gave_up_is_not_torn() {
    let mut stage = SampleStage::filled();
    stage.superblock.incarnation += 1;
    stage.superblock.incarnation_group_seq = 9;
    stage.superblock.incarnation_lsn = Lsn(33);
    stage.superblock.sequence += 1;
    stage.put_superblock();
    let report = check_alone(&stage);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_eq!((report.log_end_lsn, report.torn_bytes), (Lsn(32), 0));
}

#[test]
fn a_damaged_table_is_noted_and_the_region_scanned() {
    for back in [40, 64 + 12 * 32 - 3] {
        let stage = SampleStage::filled();
        stage.disk.flip(stage.place(RegionSeq(2), (32 << 10) - back), 1);
        let report = check_alone(&stage);
        assert!(report.is_sound(), "{:#?}", report.problems);
        assert_eq!((report.tables, report.records), (1, 36));
        assert!(
            report.notes.iter().any(|n| n.contains("table") && n.contains("region 2")),
            "{:#?}",
            report.notes
        );
    }
}

#[test]
fn a_table_that_lies_is_a_problem() {
    let mut stage = SampleStage::filled();
    let region = stage.regions[1].clone();
    let mut table = SampleStage::table_of(&region);
    table[3 * 32] ^= 1;
    stage.put_table(&region, &table);
    only_problem(&check_alone(&stage), "something else of record 16 ");
}

#[test]
fn a_table_of_fewer_records_is_noted() {
    let mut stage = SampleStage::filled();
    stage.seal();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    let report = check_alone(&stage);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_note(&report, "table of region 3 is of 12 records");
}

#[test]
fn damaged_superblock_copies_are_found() {
    let stage = SampleStage::filled();
    for copy in [0, 3] {
        stage.disk.flip(stage.superblock.geometry.superblock_offset(copy) + 5000, 1);
    }
    let report = check_alone(&stage);
    assert_eq!((report.problems.len(), report.superblock_copies), (2, 2));
    for copy in [1, 2] {
        stage.disk.flip(stage.superblock.geometry.superblock_offset(copy) + 5000, 1);
    }
    only_problem(&check_alone(&stage), "all superblock copies");
}

#[test]
fn the_first_or_last_copy_alone_may_be_torn_by_an_update() {
    for copy in 0..SUPERBLOCK_COPIES {
        let stage = SampleStage::filled();
        stage.disk.flip(stage.superblock.geometry.superblock_offset(copy) + 5000, 1);
        let report = check_alone(&stage);
        assert_eq!((report.is_sound(), report.superblock_copies), (copy == 0 || copy == 3, 3), "copy {copy}");
        assert!(report.is_sound() || report.problems[0].what.contains("is damaged"));
        if report.is_sound() {
            assert_note(&report, &format!("superblock copy {copy} is damaged, as an update"));
        }
    }
}

#[test]
fn an_update_of_the_superblock_that_was_cut_short_is_a_note() {
    let stage = SampleStage::filled();
    let newer = Superblock { sequence: 10, ..stage.superblock.clone() };
    stage.disk.put(0, newer.encode(0).as_bytes());
    stage.disk.flip(newer.geometry.superblock_offset(1) + 300, 1);
    let report = check_alone(&stage);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_eq!(report.superblock_copies, 1);
    assert_note(&report, "superblock copy 1 is damaged, as an update that is cut short leaves it");
    assert_note(&report, "superblock copy 3 is of an earlier update");
}

#[test]
fn what_is_not_a_stage_cannot_be_checked() {
    let blank = MemDisk::new("blank", 1 << 20);
    assert_eq!(check(&blank, &BTreeMap::new()).unwrap_err().kind(), ErrorKind::NotFound);
    blank.fail_reads(0..1 << 20);
    assert_eq!(check(&blank, &BTreeMap::new()).unwrap_err().kind(), ErrorKind::Io);
    let stage = SampleStage::filled();
    let mut bytes = stage.disk.bytes();
    bytes.truncate(bytes.len() - (512 << 10));
    let shrunk = MemDisk::from_bytes("shrunk", bytes);
    assert_eq!(check(&shrunk, &BTreeMap::new()).unwrap_err().kind(), ErrorKind::WrongDevice);
}

#[test]
fn places_that_cannot_be_read_do_not_stop_the_check() {
    let stage = SampleStage::filled();
    let record = stage.regions[1].groups[1].records[2];
    stage.disk.fail_reads(record..record + 1);
    stage.disk.fail_reads(checkpoint_offset(1)..checkpoint_offset(1) + 1);
    stage.disk.flip(stage.regions[2].groups[1].records[0] + 64, 1);
    let report = check_alone(&stage);
    let whats: Vec<_> = report.problems.iter().map(|p| p.what.clone()).collect();
    assert!(whats.iter().any(|w| w.contains("checkpoint slot 1: stage: cannot read")), "{whats:#?}");
    assert!(whats.iter().any(|w| w.contains("region 2") && w.contains("cannot be read")), "{whats:#?}");
    assert!(whats.iter().any(|w| w.contains("payload of record 29 ")), "{whats:#?}");
    assert_eq!(report.log_end_lsn, Lsn(36));
}

#[test]
fn lost_checkpoints_are_found() {
    let stage = SampleStage::filled();
    stage.disk.flip(checkpoint_offset(2) + 100, 1);
    only_problem(&check_alone(&stage), "newest checkpoint is lost");
    stage.disk.flip(checkpoint_offset(1) + 100, 1);
    let report = check_alone(&stage);
    assert!(report.problems.iter().any(|p| p.what.contains("no checkpoint is valid")));
    assert_eq!(report.records, 36);
}

#[test]
fn a_checkpoint_that_was_cut_short_is_a_note() {
    let mut stage = SampleStage::new();
    stage.begin_region();
    stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    let head = stage.regions[0].start;
    stage.put_checkpoint(2, Lsn(1), head);
    stage.disk.flip(checkpoint_offset(2) + 100, 1);
    let report = check_alone(&stage);
    assert!(report.is_sound(), "{:#?}", report.problems);
    assert_note(&report, "checkpoint slots [2] hold none that is valid");
}

#[test]
fn a_damaged_checkpoint_between_others_is_found() {
    let mut stage = SampleStage::filled();
    let head = stage.regions[0].start;
    for sequence in 3..30 {
        stage.put_checkpoint(sequence, Lsn(4), head);
    }
    assert!(check_alone(&stage).is_sound());
    stage.disk.zero(checkpoint_offset(5)..checkpoint_offset(6));
    only_problem(&check_alone(&stage), "an earlier checkpoint, in slot 5, is damaged");
}

#[test]
fn an_old_checkpoint_leads_to_the_oldest_region() {
    let mut stage = SampleStage::filled();
    for _ in 0..4 {
        stage.begin_region();
        stage.spoken = Lsn(12);
        stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    }
    let report = check_alone(&stage);
    assert!(report.problems.iter().any(|p| p.what.contains("newer checkpoints are damaged")));
    assert!(!report.problems.iter().any(|p| p.what.contains("nothing tells that they were flushed")));
    assert_eq!((report.regions, report.log_end_lsn), (6, Lsn(40)));
    assert!(!damaged_scan(&stage));
}

#[test]
fn a_hole_is_not_taken_for_the_beginning_of_the_log() {
    let mut stage = SampleStage::filled();
    for _ in 0..4 {
        stage.begin_region();
        stage.spoken = Lsn(12);
        stage.put_group(&[(RecordKind::Write, 1, 0, 100)]);
    }
    stage.disk.flip(stage.place(RegionSeq(3), 20), 1);
    let report = check_alone(&stage);
    assert!(report.problems.iter().any(|p| p.what.contains("nothing tells that they were flushed")));
}

#[test]
fn the_end_of_an_orderly_close_is_compared() {
    let mut stage = SampleStage::filled();
    stage.superblock.state = StageState::Clean;
    stage.superblock.closed_lsn = Lsn(36);
    stage.put_superblock();
    let report = check_alone(&stage);
    assert!(report.is_sound() && report.closed_in_order, "{:#?}", report.problems);
    stage.disk.flip(stage.regions[2].groups[2].records[0] + 64, 1);
    only_problem(&check_alone(&stage), "closed in order");
}

#[test]
fn a_log_that_ends_below_its_checkpoint_is_a_problem() {
    let mut stage = SampleStage::filled();
    let head = stage.regions[0].start;
    stage.put_checkpoint(3, Lsn(50), head);
    only_problem(&check_alone(&stage), "everything up to LSN 50 was flushed");
}

#[test]
fn backings_are_checked_by_their_labels() {
    let stage = SampleStage::filled();
    for (flushed, what) in [(Lsn(3), "old copy of the backing"), (Lsn(37), "the stage is an old copy")] {
        let problem = only_problem(&check_with(&stage, &stage.backing(1, flushed)), what);
        assert_eq!(problem.device, "/backings/one");
    }
    only_problem(&check_with(&stage, &stage.backing(2, Lsn(20))), "is the backing of volume 'two'");
    only_problem(&check_with(&stage, &MemDisk::new("blank", 2 * VOLUME_BYTES)), "carries no label");
    only_problem(&check_with(&stage, &MemDisk::new("small", 4096)), "has 4096 bytes");
    let unreadable = stage.backing(1, Lsn(20));
    unreadable.fail_reads(0..2 * VOLUME_BYTES);
    only_problem(&check_with(&stage, &unreadable), "cannot read");
}

#[test]
fn a_torn_patch_zone_is_a_note() {
    for at in [9, 70, 4096 + 7] {
        let stage = SampleStage::filled();
        stage.disk.flip(PATCH_OFFSET + at, 1);
        let report = check_with(&stage, &stage.backing(1, Lsn(8)));
        assert!(report.is_sound(), "{:#?}", report.problems);
        assert_note(&report, "patch zone is not valid");
    }
}

#[test]
fn patches_must_fit_log_and_volume() {
    let mut stage = SampleStage::filled();
    stage.put_patches(Lsn(40));
    only_problem(&check_alone(&stage), "behind the end of the log");
    let mut stage = SampleStage::filled();
    stage.superblock.volumes[0].size_bytes = 4096;
    stage.put_superblock();
    let report = check_alone(&stage);
    assert!(report.problems.iter().any(|p| p.what.contains("behind the end of volume 1")));
    assert!(report.problems.iter().any(|p| p.what.contains("record 13 changes bytes")));
}

#[derive(Clone, Debug)]
enum Damage {
    Flip(u64, u8),
    Zero(u64, u64),
    Move(u64, u64, u64),
}

fn damage() -> impl Strategy<Value = Damage> {
    let len = SampleStage::new().disk.len_bytes();
    let live = SampleStage::filled().live;
    let near = (0..live.len(), 0u64..70_000)
        .prop_map(move |(i, at)| live[i].start + at % (live[i].end - live[i].start + 64).min(69_632));
    let place = prop_oneof![1 => 0..len - 8192, 4 => near.prop_map(move |at| at.min(len - 8192))];
    prop_oneof![
        (place.clone(), 1u8..).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        (place.clone(), 1u64..4096).prop_map(|(at, len)| Damage::Zero(at, len)),
        (place.clone(), place, 1u64..16).prop_map(|(to, from, sectors)| {
            Damage::Move(to / 512 * 512, from / 512 * 512, sectors * 512)
        }),
    ]
}

fn apply(disk: &MemDisk, damage: &Damage) {
    match *damage {
        Damage::Flip(at, mask) => disk.flip(at, mask),
        Damage::Zero(at, len) => disk.zero(at..at + len),
        Damage::Move(to, from, len) => {
            let part = disk.bytes()[from as usize..(from + len) as usize].to_vec();
            disk.put(to, &part);
        }
    }
}

/// Where the end of the log begins of which no header is as it was, if there is such an end.
fn erased_from(stage: &SampleStage, whole: &[u8], now: &[u8]) -> Option<u64> {
    let changed = |at: u64| whole[at as usize..][..64] != now[at as usize..][..64];
    let is_erased = |group: &&PutGroup| changed(group.offset) && group.records.iter().all(|at| changed(*at));
    stage.regions[2].groups.iter().rev().take_while(is_erased).last().map(|group| group.offset)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_found_or_lies_outside_of_live_structures(damages in prop::collection::vec(damage(), 1..4)) {
        let stage = SampleStage::filled();
        let whole = stage.disk.bytes();
        let before = check_alone(&stage);
        damages.iter().for_each(|damage| apply(&stage.disk, damage));
        let now = stage.disk.bytes();
        let changed = |r: &&std::ops::Range<u64>| {
            let r = r.start as usize..r.end as usize;
            whole[r.clone()] != now[r]
        };
        let hits: Vec<_> = stage.live.iter().filter(changed).collect();
        let report = check_alone(&stage);
        if hits.is_empty() {
            prop_assert!(report.is_sound(), "{:#?}", report.problems);
            prop_assert_eq!(report.log_end_lsn, before.log_end_lsn);
        } else if report.is_sound() && report.notes.len() == before.notes.len() {
            // Two things are not missed if nothing is left of them: the end of the log, and the patch zone.
            let zone = PATCH_OFFSET..PATCH_OFFSET + u64::from(stage.superblock.geometry.patch_bytes);
            let zone_is_blank = is_blank(&now[zone.start as usize..zone.end as usize]);
            let erased = erased_from(&stage, &whole, &now);
            let excused = |at: u64| erased.is_some_and(|from| at >= from) || zone.contains(&at) && zone_is_blank;
            prop_assert!(hits.iter().all(|hit| excused(hit.start)), "not found");
        }
        if superblocks::read(&stage.disk).is_ok_and(|read| read.superblock == stage.superblock) {
            match scan(&stage.disk, &stage.superblock, &mut |_| {}) {
                Ok(log) if report.is_sound() => prop_assert_eq!(log.next_lsn, report.log_end_lsn.next()),
                Ok(_) => {}
                Err(error) => prop_assert!(!report.is_sound(), "only opening finds: {}", error.report()),
            }
        }
    }

    /// Numbers that make no sense under valid checksums: nothing that a disk does, but no reason to panic either.
    #[test]
    fn nonsense_under_valid_checksums_never_panics(
        which in 0usize..9,
        field in 1usize..8,
        value in prop_oneof![Just(0), Just(u64::MAX), Just(1 << 31), any::<u64>()],
    ) {
        let stage = SampleStage::filled();
        let region = &stage.regions[1];
        let (at, len) = match which {
            0 => (checkpoint_offset(2), 4096),
            1 => (stage.place(region.start.seq, 0), 64),
            2 => (region.groups[1].offset, 64),
            3 => (region.groups[1].records[1], 64),
            4 => (stage.place(region.start.seq, (32 << 10) - 64), 64),
            5 => (stage.place(stage.regions[2].start.seq, 0), 64),
            6 => (stage.regions[2].groups[2].offset, 64),
            7 => (stage.regions[2].groups[2].records[0], 64),
            _ => (stage.place(stage.regions[0].start.seq, 0), 64),
        };
        let mut bytes = stage.disk.bytes()[at as usize..][..len].to_vec();
        bytes[field * 8..field * 8 + 8].copy_from_slice(&value.to_le_bytes());
        let crc = crate::base::checksum::crc64_salted(stage.superblock.salt, &bytes[8..]);
        bytes[..8].copy_from_slice(&crc.to_le_bytes());
        stage.disk.put(at, &bytes);
        check_alone(&stage);
        crate::recovery::inspect(&stage.disk, 100).unwrap();
    }
}

#[test]
fn groups_of_the_sample_are_where_it_says() {
    let stage = SampleStage::filled();
    let bytes = stage.disk.bytes();
    for group in stage.regions.iter().flat_map(|r| &r.groups) {
        let found = Group::decode(&bytes[group.offset as usize..], stage.superblock.salt).unwrap();
        assert_eq!((found.group_bytes, found.record_count as usize), (group.bytes, group.records.len()));
    }
}
