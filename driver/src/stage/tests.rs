//! The stage's pure parts against their invariants: ring arithmetic, publish window, commit order under concurrency.

mod readers;

use std::collections::BTreeMap;

use proptest::prelude::*;
use shuttle::rand::Rng;

use super::commit::Committer;
use super::core::{Ack, Claim, Core, CoreStart, DoorId, Outcome};
use super::ring::{ClosedGroup, Ring, Slot};
use super::volume_index::VolumeIndex;
use super::window::Window;
use crate::base::limits::GROUPS_IN_FLIGHT_MAX;
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};
use crate::format::geometry::Geometry;
use crate::format::record::{Record, RecordKind, record_bytes};
use crate::format::region::{RegionStart, table_bytes};
use crate::format::volume_entry::OnLogError;

const REGION_BYTES: u32 = 32 << 10;

fn geometry(block_bytes: u32) -> Geometry {
    let patch_bytes = 8192;
    let device_bytes = Geometry::device_bytes_min(REGION_BYTES, patch_bytes) + 2 * u64::from(REGION_BYTES);
    Geometry::for_device(device_bytes, block_bytes, REGION_BYTES, patch_bytes).unwrap()
}

fn start() -> RegionStart {
    RegionStart { seq: RegionSeq(1), first_lsn: Lsn(1), first_group_seq: 1 }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Claim(u32),
    Close,
    Reclaim,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0u32..=8192).prop_map(Step::Claim),
        2 => Just(Step::Close),
        1 => Just(Step::Reclaim),
    ];
    proptest::collection::vec(step, 1..400)
}

/// Checks R1–R5 of the ring against everything it has handed out so far.
struct RingModel {
    slots: Vec<(RegionSeq, u32, u32)>,
    groups: Vec<ClosedGroup>,
}

impl RingModel {
    fn slot(&mut self, slot: &Slot, ring: &Ring) {
        let end = slot.offset() + record_bytes(slot.payload_bytes());
        assert_eq!(slot.lsn().0, self.slots.len() as u64 + 1, "R2");
        if let Some(&(region, _, last_end)) = self.slots.last() {
            assert!(
                region < slot.region() || (region == slot.region() && last_end <= slot.offset()),
                "R1, R2"
            );
        }
        let region = ring.region(slot.region()).expect("live");
        let room = REGION_BYTES - table_bytes(region.record_count, ring.geometry().block_bytes);
        assert!(slot.offset() >= ring.geometry().block_bytes && end <= room, "R1");
        self.slots.push((slot.region(), slot.offset(), end));
    }

    fn group(&mut self, group: ClosedGroup, block_bytes: u32) {
        assert!(
            group.end.is_multiple_of(block_bytes) && group.header_offset.is_multiple_of(block_bytes),
            "R3"
        );
        if let Some(last) = self.groups.last() {
            assert_eq!(
                (group.group_seq, group.first_lsn),
                (last.group_seq + 1, last.last_lsn().next()),
                "R3"
            );
            assert!(
                last.region < group.region || last.end <= group.write_from,
                "durable blocks are not rewritten"
            );
        }
        for lsn in group.first_lsn.0..=group.last_lsn().0 {
            let (region, offset, end) = self.slots[lsn as usize - 1];
            assert!(region == group.region && group.header_offset < offset && end <= group.records_end);
        }
        self.groups.push(group);
    }
}

proptest! {
    #[test]
    fn ring_keeps_its_invariants(steps in steps(), block_shift in 9u32..=12) {
        let geometry = geometry(1 << block_shift);
        let mut ring = Ring::empty(geometry, start());
        let mut model = RingModel { slots: Vec::new(), groups: Vec::new() };
        for step in steps {
            match step {
                Step::Claim(payload) => {
                    let regions = ring.regions().len();
                    match ring.claim(payload) {
                        Some(slot) => model.slot(&slot, &ring),
                        None => {
                            prop_assert_eq!(regions, geometry.region_count as usize, "full only when full");
                            prop_assert_eq!(ring.regions().len(), regions);
                        }
                    }
                }
                Step::Close => ring.close_group(),
                Step::Reclaim => {
                    while let Some(group) = ring.take_closed() {
                        model.group(group, geometry.block_bytes);
                    }
                    let committed = model.groups.last().map_or(Lsn::ZERO, ClosedGroup::last_lsn);
                    let head = ring.head_after(committed);
                    ring.reclaim(committed, |_| true);
                    prop_assert_eq!(ring.regions().next().unwrap().start, head);
                }
            }
            prop_assert!(ring.regions().len() <= geometry.region_count as usize, "R4");
        }
    }

    #[test]
    fn window_gives_the_gap_free_prefix(order in proptest::collection::vec(any::<prop::sample::Index>(), 1..60)) {
        let mut window = Window::new(Lsn(5));
        let mut open: Vec<u64> = (5..5 + order.len() as u64).collect();
        open.iter().for_each(|&lsn| window.claimed(Lsn(lsn)));
        let mut next = 5;
        for pick in order {
            let lsn = open.swap_remove(pick.index(open.len()));
            window.published(Lsn(lsn), lsn);
            while let Some(taken) = window.advance() {
                prop_assert_eq!(taken, next);
                next += 1;
            }
            prop_assert_eq!(next, open.iter().copied().min().unwrap_or(window.prefix().0 + 1));
            prop_assert_eq!(window.prefix(), Lsn(next - 1));
        }
        prop_assert!(window.is_empty());
    }
}

fn core() -> Core {
    Core::new(CoreStart {
        ring: Ring::empty(geometry(512), start()),
        durable: Lsn::ZERO,
        checkpoint: Lsn::ZERO,
        indexes: BTreeMap::from([(VolumeId(1), VolumeIndex::new(VolumeId(1), 1 << 20))]),
        allocated: true,
    })
}

fn record(slot: &Slot) -> Record {
    Record {
        lsn: slot.lsn(),
        volume: VolumeId(1),
        kind: RecordKind::Write,
        range: ByteRange::at(0, u64::from(slot.payload_bytes())),
        payload_bytes: slot.payload_bytes(),
        payload_checksum: 0,
        timestamp_ns: 0,
        incarnation: 0,
    }
}

/// Indexes what `slot` holds, and publishes it.
fn publish(core: &mut Core, slot: Slot, ack: Option<Ack>) {
    let record = record(&slot);
    let indexed = core.index(VolumeId(1)).unwrap().index(slot, &record);
    core.publish(indexed, ack);
}

const DOORS: u32 = 3;
const WRITES: u32 = 4;

/// Several doors claim, fill outside the lock and publish, while whoever gets a write carries it out: whatever the
/// schedule, a group is written only when all its records are filled, and acknowledgements come once, and of durable
/// requests only when everything up to them is written.
#[test]
fn claim_fill_publish_commit_under_every_schedule() {
    use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use shuttle::sync::{Arc, Mutex};
    shuttle::check_random(
        || {
            let core = core();
            let index = core.index(VolumeId(1)).unwrap();
            let core = Arc::new(Mutex::new(core));
            let filled: Arc<Vec<AtomicBool>> =
                Arc::new((0..=DOORS * WRITES).map(|_| AtomicBool::new(false)).collect());
            let written: Arc<Vec<AtomicBool>> =
                Arc::new((0..=DOORS * WRITES).map(|_| AtomicBool::new(false)).collect());
            let lsns: Arc<Vec<AtomicU64>> =
                Arc::new((0..DOORS * WRITES).map(|_| AtomicU64::new(0)).collect());
            let acks = Arc::new(Mutex::new(Vec::new()));
            let threads: Vec<_> = (0..DOORS)
                .map(|door| {
                    let (core, filled) = (core.clone(), filled.clone());
                    let (written, lsns, acks) = (written.clone(), lsns.clone(), acks.clone());
                    let index = index.clone();
                    shuttle::thread::spawn(move || {
                        for tag in 0..WRITES {
                            let payload = shuttle::rand::thread_rng().gen_range(0..3000);
                            let claim =
                                core.lock().unwrap().claim(DoorId(door), tag, payload, OnLogError::Stall);
                            let Claim::Slot(slot) = claim else { panic!("there is room") };
                            filled[slot.lsn().0 as usize].store(true, Ordering::SeqCst);
                            lsns[(door * WRITES + tag) as usize].store(slot.lsn().0, Ordering::SeqCst);
                            let ack = Ack {
                                door: DoorId(door),
                                tag,
                                durable: tag % 2 == 0,
                                on_log_error: OnLogError::Stall,
                            };
                            let record = record(&slot);
                            let indexed = index.index(slot, &record);
                            core.lock().unwrap().publish(indexed, Some(ack));
                            core.lock().unwrap().pump_commit(0);
                            carry_out(&core, (&filled, &written, &lsns), &acks);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
            core.lock().unwrap().request_commit();
            core.lock().unwrap().pump_commit(0);
            carry_out(&core, (&filled, &written, &lsns), &acks);
            let mut acks = acks.lock().unwrap().clone();
            acks.sort_unstable();
            let expected: Vec<(u32, u32)> =
                (0..DOORS).flat_map(|d| (0..WRITES).map(move |t| (d, t))).collect();
            assert_eq!(acks, expected, "every request is acknowledged once");
            assert_eq!(core.lock().unwrap().durable(), Lsn(u64::from(DOORS * WRITES)));
        },
        300,
    );

    fn carry_out(
        core: &Mutex<Core>,
        (filled, written, lsns): (&[AtomicBool], &[AtomicBool], &[AtomicU64]),
        acks: &Mutex<Vec<(u32, u32)>>,
    ) {
        loop {
            let mut outcomes = Vec::new();
            core.lock().unwrap().take_outcomes(&mut outcomes);
            if outcomes.is_empty() {
                return;
            }
            for outcome in outcomes {
                match outcome {
                    Outcome::WriteLog(group) => {
                        for lsn in group.first_lsn.0..=group.last_lsn().0 {
                            let is_filled = filled[lsn as usize].load(Ordering::SeqCst);
                            assert!(is_filled, "group {} has an unfilled record", group.group_seq);
                            let again = written[lsn as usize].swap(true, Ordering::SeqCst);
                            assert!(!again, "group {} is written twice", group.group_seq);
                        }
                        core.lock().unwrap().log_written(group.group_seq, Ok(()), 0);
                    }
                    Outcome::Complete { door, tag, result } => {
                        result.unwrap();
                        let lsn = lsns[(door.0 * WRITES + tag) as usize].load(Ordering::SeqCst) as usize;
                        let durable = written[1..=lsn].iter().all(|w| w.load(Ordering::SeqCst));
                        assert!(durable || tag % 2 != 0, "{lsn} is acknowledged before it is durable");
                        acks.lock().unwrap().push((door.0, tag));
                    }
                    Outcome::KickBackground => {}
                    other => panic!("unexpected {other:?}"),
                }
            }
        }
    }
}

#[test]
fn a_failed_log_write_acknowledges_nothing_until_its_retry_succeeds() {
    use crate::io::Errno;
    let mut core = core();
    let ack = |tag, on_log_error| Ack { door: DoorId(1), tag, durable: true, on_log_error };
    for (tag, policy) in [(0, OnLogError::Stall), (1, OnLogError::Fail)] {
        let Claim::Slot(slot) = core.claim(DoorId(1), tag, 100, policy) else { panic!("there is room") };
        publish(&mut core, slot, Some(ack(tag, policy)));
    }
    core.pump_commit(0);
    let mut outcomes = Vec::new();
    core.take_outcomes(&mut outcomes);
    let group =
        outcomes.iter().find_map(|o| if let Outcome::WriteLog(g) = o { Some(*g) } else { None }).unwrap();
    outcomes.clear();
    core.log_written(group.group_seq, Err(Errno::EIO), 0);
    core.pump_commit(0);
    core.take_outcomes(&mut outcomes);
    let completions: Vec<(u32, bool)> = outcomes
        .iter()
        .filter_map(|o| {
            if let Outcome::Complete { tag, result, .. } = o { Some((*tag, result.is_ok())) } else { None }
        })
        .collect();
    assert_eq!(completions, [(1, false)], "the volume that prefers errors is told, the other waits");
    assert_eq!(core.durable(), Lsn::ZERO);
    assert!(matches!(core.claim(DoorId(1), 2, 100, OnLogError::Fail), Claim::Refused(_)));
    assert!(matches!(core.claim(DoorId(1), 3, 100, OnLogError::Stall), Claim::Wait));

    outcomes.clear();
    core.retry_log();
    core.take_outcomes(&mut outcomes);
    assert!(
        outcomes.iter().any(|o| matches!(o, Outcome::WriteLog(g) if *g == group)),
        "the same group again"
    );
    assert!(!core.log_has_failed() && core.log_is_failing(), "it fails until this write has ended well");
    outcomes.clear();
    core.log_written(group.group_seq, Ok(()), 0);
    assert!(!core.log_is_failing());
    core.take_outcomes(&mut outcomes);
    assert!(matches!(outcomes[0], Outcome::Complete { tag: 0, result: Ok(()), .. }));
    assert!(outcomes.iter().any(|o| matches!(o, Outcome::Claimed { tag: 3, .. })), "writers go on");
}

/// The tags of requests that have got a place since it was asked last.
fn served(core: &mut Core) -> Vec<u32> {
    let mut outcomes = Vec::new();
    core.take_outcomes(&mut outcomes);
    let tag = |o: &Outcome| if let Outcome::Claimed { tag, .. } = o { Some(*tag) } else { None };
    outcomes.iter().filter_map(tag).collect()
}

/// From the fifth of seven regions on, writers get room as the epoch comes along, in order, and all of it when it is over,
/// however it ended.
#[test]
fn writers_are_paced_by_the_epoch_and_not_beyond_it() {
    let mut core = core();
    let mut outcomes = Vec::new();
    let mut tag = 0;
    let claim = |core: &mut Core, tag: u32| core.claim(DoorId(1), tag, 4000, OnLogError::Stall);
    while core.ring().regions().len() < 5 {
        let Claim::Slot(slot) = claim(&mut core, tag) else { panic!("there is room") };
        publish(&mut core, slot, None);
        core.request_commit();
        core.pump_commit(0);
        core.take_outcomes(&mut outcomes);
        for outcome in outcomes.drain(..) {
            if let Outcome::WriteLog(group) = outcome {
                core.log_written(group.group_seq, Ok(()), 0);
            }
        }
        tag += 1;
    }
    let epoch = core.next_epoch(false).unwrap();
    let regions = core.epoch_regions(&epoch);
    core.pace_by(&regions, epoch.to);
    let slots: Vec<bool> = (100..106).map(|tag| matches!(claim(&mut core, tag), Claim::Slot(_))).collect();
    assert_eq!(slots, [true, false, false, false, false, false], "a bit is granted at the beginning");
    assert_eq!((core.counters.paced_waits, core.counters.space_waits), (5, 0));
    assert!(served(&mut core).is_empty());
    core.pace((1, 4));
    assert_eq!(served(&mut core), [101, 102], "C4");
    core.pace((1, 4));
    assert!(served(&mut core).is_empty());
    core.end_pacing();
    assert_eq!(served(&mut core), [103, 104, 105], "T2");
}

/// A read that holds claims back is no want of room: nothing is flushed for it. Where there was no room either, the
/// background is told once the read has ended.
#[test]
fn claims_that_wait_for_a_read_do_not_ask_for_room() {
    let is_kicked = |core: &mut Core| {
        let mut outcomes = Vec::new();
        core.take_outcomes(&mut outcomes);
        core.background_came();
        outcomes.iter().any(|o| matches!(o, Outcome::KickBackground))
    };
    for ends in
        [|core: &mut Core| core.read_ended(DoorId(2), 7), |core: &mut Core| core.forget_door(DoorId(2))]
    {
        for is_full in [false, true] {
            let mut core = core();
            let claim = |core: &mut Core| core.claim(DoorId(1), 1, 4000, OnLogError::Stall);
            while matches!(claim(&mut core), Claim::Slot(_)) && is_full {}
            let first = core.published().next();
            while !core.early.hold_claims_back() {
                core.early.met(DoorId(2), 7, first);
                core.early.reached(first, |_, _| {});
            }
            assert!(matches!(claim(&mut core), Claim::Wait));
            assert!(!core.waits_for_room());
            assert_eq!(core.counters.space_waits, u64::from(is_full));
            is_kicked(&mut core);
            ends(&mut core);
            assert_eq!(core.waits_for_room(), is_full);
            assert_eq!(is_kicked(&mut core), is_full, "nobody else says so");
        }
    }
}

/// Two groups are in flight, the second fails: who waits for the first is told nothing, for its write is under way.
#[test]
fn a_failed_group_does_not_fail_the_one_before_it() {
    use crate::io::Errno;
    let mut core = core();
    let mut outcomes = Vec::new();
    let mut groups = Vec::new();
    // What a write takes is learned from one; the two after it begin one right after the other, the time standing still.
    for (tag, now_ns) in [(0, 0), (1, 5000), (2, 5000)] {
        let Claim::Slot(slot) = core.claim(DoorId(1), tag, 100, OnLogError::Fail) else {
            panic!("there is room")
        };
        let ack = Ack { door: DoorId(1), tag, durable: true, on_log_error: OnLogError::Fail };
        publish(&mut core, slot, Some(ack));
        core.pump_commit(now_ns);
        core.take_outcomes(&mut outcomes);
        groups.extend(
            outcomes.drain(..).filter_map(|o| if let Outcome::WriteLog(g) = o { Some(g) } else { None }),
        );
        if tag == 0 {
            core.log_written(groups[0].group_seq, Ok(()), 1000);
        }
    }
    assert_eq!(groups.len(), 3, "the last two are in flight together");
    outcomes.clear();
    core.log_written(groups[2].group_seq, Err(Errno::EIO), 6000);
    core.log_written(groups[1].group_seq, Ok(()), 6000);
    core.take_outcomes(&mut outcomes);
    let told: Vec<(u32, bool)> = outcomes
        .iter()
        .filter_map(|o| {
            if let Outcome::Complete { tag, result, .. } = o { Some((*tag, result.is_ok())) } else { None }
        })
        .collect();
    assert_eq!(told, [(2, false), (1, true)]);
}

/// The state of a group in the model of [`groups_become_durable_in_order`].
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Flying,
    Written,
    Failed,
}

proptest! {
    /// G1 to G4, with writes that end in any order, with failures and retries, over several regions.
    #[test]
    fn groups_become_durable_in_order(steps in proptest::collection::vec((0u8..8, any::<u16>()), 1..300)) {
        let geometry = geometry(512);
        let mut ring = Ring::empty(geometry, start());
        let mut committer = Committer::new(Lsn::ZERO);
        let mut flying: Vec<(ClosedGroup, Fate)> = Vec::new();
        let mut durable = Lsn::ZERO;
        let mut now_ns = 0;
        for (step, choice) in steps {
            let published = Lsn(ring.next_lsn().0 - 1);
            now_ns += u64::from(choice) % 100;
            match step {
                0..=2 => {
                    if ring.claim(u32::from(choice) % 6000).is_none() {
                        ring.reclaim(durable, |_| true);
                    }
                }
                3 | 4 => {
                    let failed = flying.iter().any(|(_, fate)| *fate == Fate::Failed);
                    let close = choice % 2 == 0;
                    while let Some(group) = committer.next(&mut ring, published, close, now_ns) {
                        prop_assert!(!failed, "G4");
                        prop_assert!(group.last_lsn() <= published);
                        prop_assert!(!group.begins_region() || flying.is_empty(), "G3");
                        let before = flying.last().map_or(durable, |(group, _)| group.last_lsn());
                        prop_assert_eq!(group.first_lsn, before.next(), "G1");
                        prop_assert_eq!(committer.undurable_before(group.group_seq), flying.len() as u32);
                        flying.push((group, Fate::Flying));
                        prop_assert!(flying.len() <= GROUPS_IN_FLIGHT_MAX, "G2");
                    }
                }
                5 | 6 => {
                    let in_flight: Vec<usize> =
                        (0..flying.len()).filter(|i| flying[*i].1 == Fate::Flying).collect();
                    if in_flight.is_empty() {
                        continue;
                    }
                    let at = in_flight[usize::from(choice) % in_flight.len()];
                    let ok = choice < 50_000;
                    committer.written(flying[at].0.group_seq, ok, now_ns);
                    flying[at].1 = if ok { Fate::Written } else { Fate::Failed };
                    while let Some(group) = committer.take_durable() {
                        prop_assert_eq!(flying.remove(0), (group, Fate::Written), "G1");
                        durable = group.last_lsn();
                    }
                    prop_assert!(flying.first().is_none_or(|(_, fate)| *fate != Fate::Written));
                }
                _ => {
                    let failed: Vec<u64> = flying
                        .iter_mut()
                        .filter(|(_, fate)| *fate == Fate::Failed)
                        .map(|(group, fate)| {
                            *fate = Fate::Flying;
                            group.group_seq
                        })
                        .collect();
                    prop_assert_eq!(committer.retry().map(|g| g.group_seq).collect::<Vec<_>>(), failed);
                }
            }
            prop_assert_eq!(committer.durable(), durable);
        }
    }
}
