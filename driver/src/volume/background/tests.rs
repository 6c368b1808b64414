//! How the background goes on after a failure, operation by operation.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::{Background, LOAD_TOKENS, Shared};
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};
use crate::format::geometry::{CHECKPOINTS_OFFSET, PATCH_OFFSET};
use crate::format::record::RecordKind;
use crate::io::memory_disk::MemDisk;
use crate::io::{Disk, Done, Errno, Memory, Op, OpKind, Target};
use crate::recovery::sample_stage::SampleStage;
use crate::recovery::{Environment, OwnArenas, open};
use crate::stage::core::{Core, DoorId};
use crate::stage::serve::Found;
use crate::volume::still::Still;

/// What was asked of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sent {
    target: Target,
    kind: OpKind,
    offset: u64,
    data: Vec<u8>,
}

impl Sent {
    fn is_checkpoint(&self) -> bool {
        self.target == Target::Stage && (CHECKPOINTS_OFFSET..PATCH_OFFSET).contains(&self.offset)
    }
}

/// A background with something to flush, and its devices.
struct Bench {
    background: Background,
    stage: MemDisk,
    backings: [MemDisk; 2],
}

impl Bench {
    /// Each of `regions` regions holds a record for each of two volumes, all at the same place.
    fn new(regions: u64) -> Bench {
        Bench::with_stride(regions, 0)
    }

    /// The records of each region lie `stride` bytes behind those of the one before.
    fn with_stride(regions: u64, stride: u64) -> Bench {
        let mut stage = SampleStage::new();
        for at in (0..regions).map(|n| n * stride) {
            stage.begin_region();
            stage.put_group(&[(RecordKind::Write, 1, at, 700), (RecordKind::Write, 2, at + 512, 1024)]);
        }
        let backings = [stage.backing(1, Lsn(0)), stage.backing(2, Lsn(0))];
        let by_volume: BTreeMap<VolumeId, &dyn Disk> =
            (1..).map(VolumeId).zip(backings.iter().map(|backing| backing as &dyn Disk)).collect();
        let boot_id = stage.superblock.boot_id;
        let environment = Environment { boot_id, arena_id: 99, accept_loss: false, forget: None };
        let opened = open(&stage.disk, &by_volume, &mut OwnArenas, environment).unwrap();
        let clock = Arc::new(Still);
        let shared = Shared::new(opened.core, Arc::new(opened.arena), opened.rules, clock, Arc::new(Still));
        let background =
            Background::with_pool(Arc::new(shared), opened.targets, opened.checkpoint, false, Vec::new());
        Bench { background, stage: stage.disk, backings }
    }

    /// Where region `seq` is on the stage.
    fn place(&self, seq: RegionSeq) -> u64 {
        self.background.shared.geometry.region_offset(seq)
    }

    /// Carries out what the background wants until it wants nothing more at `now_ns`. Everything reaches its device; what
    /// `fails` says ends with an error all the same.
    fn run(&mut self, now_ns: u64, fails: impl Fn(&Sent) -> bool) -> Vec<Sent> {
        let mut all = Vec::new();
        loop {
            let mut ops = Vec::new();
            self.background.step(now_ns, &mut |op| ops.push(op));
            if ops.is_empty() {
                return all;
            }
            for op in ops {
                let (sent, done) = self.carry_out(op);
                let result = if fails(&sent) { Err(Errno::EIO) } else { Ok(()) };
                all.push(sent);
                self.background.op_done(Done { result, ..done });
            }
        }
    }

    fn carry_out(&self, mut op: Op) -> (Sent, Done) {
        let disk = match op.target {
            Target::Stage => &self.stage,
            Target::Backing(volume) => &self.backings[usize::from(volume.0) - 1],
        };
        let mut data = Vec::new();
        if let Memory::Owned(buf) = &mut op.memory {
            match op.kind {
                OpKind::Read => disk.read(op.offset, buf).unwrap(),
                _ => disk.write(op.offset, buf).unwrap(),
            }
            data = buf.to_vec();
        }
        if op.token.0 & LOAD_TOKENS == LOAD_TOKENS {
            data = vec![0; op.len as usize];
            disk.read(op.offset, &mut data).unwrap();
            let of_op = |seq: &RegionSeq| self.place(*seq) == op.offset;
            let seq = (1..).map(RegionSeq).find(of_op).unwrap();
            self.background.shared.arena.put(seq, 0, &data);
        }
        let sent = Sent { target: op.target, kind: op.kind, offset: op.offset, data };
        (sent, Done { token: op.token, result: Ok(()), memory: op.memory })
    }
}

/// The failed write may be on the device, and then the log no longer covers the blocks that the epoch would write again.
#[test]
fn after_a_failed_checkpoint_only_the_checkpoint_is_written_again() {
    let mut bench = Bench::new(1);
    bench.background.drain();
    let first = bench.run(0, Sent::is_checkpoint);
    let to_backings = first.iter().filter(|sent| sent.target != Target::Stage && !sent.data.is_empty());
    assert!(to_backings.count() >= 4, "blocks and labels of two volumes: {first:?}");
    let checkpoint = first.last().unwrap();
    assert!(checkpoint.is_checkpoint());
    let status = &bench.background.status;
    assert!(status.stage_problem().is_some() && status.checkpoint_lsn == Lsn(0), "{status:?}");
    assert_eq!(bench.run(1_000_000, |_| false), [], "it pauses");

    let again = bench.run(1_000_000_000, Sent::is_checkpoint);
    assert_eq!(again, std::slice::from_ref(checkpoint), "and once more");
    let at_last = bench.run(10_000_000_000, |_| false);
    assert_eq!(at_last, std::slice::from_ref(checkpoint));
    let status = &bench.background.status;
    assert!(status.stage_problem().is_none() && status.checkpoint_lsn == Lsn(2), "{status:?}");
}

/// A sync that has failed may have dropped what it was for.
#[test]
fn after_a_failed_sync_everything_is_written_again() {
    let mut bench = Bench::new(1);
    bench.background.drain();
    let fails = |sent: &Sent| sent.kind == OpKind::Sync && sent.target == Target::Backing(VolumeId(2));
    let first = bench.run(0, fails);
    assert!(!first.iter().any(Sent::is_checkpoint), "nothing is durable: {first:?}");
    assert_eq!(bench.background.status.backing_problem.as_ref().unwrap().0, VolumeId(2));
    let written = |all: &[Sent]| -> Vec<Sent> {
        let of_backings =
            all.iter().filter(|sent| sent.target != Target::Stage && sent.kind == OpKind::Write);
        of_backings.cloned().collect()
    };
    let again = bench.run(1_000_000_000, |_| false);
    for sent in written(&first) {
        assert!(again.contains(&sent), "{sent:?} is not written again");
    }
    assert!(again.last().unwrap().is_checkpoint());
    assert_eq!(bench.background.status.checkpoint_lsn, Lsn(2));
    assert_eq!(bench.background.status.backing_problem, None);
}

#[test]
fn a_flush_does_not_hide_that_a_region_cannot_be_read() {
    let mut bench = Bench::new(3);
    let second = bench.place(RegionSeq(2));
    bench.background.drain();
    bench.run(0, |sent| sent.kind == OpKind::Read && sent.offset == second);
    let status = &bench.background.status;
    assert_eq!((status.epochs, status.checkpoint_lsn), (1, Lsn(2)), "the first region is flushed");
    assert!(status.stage_problem().is_some_and(|problem| problem.contains("region 2")), "{status:?}");

    bench.run(1_000_000_000, |_| false);
    let status = &bench.background.status;
    assert_eq!((status.stage_problem(), status.checkpoint_lsn), (None, Lsn(6)));
}

/// What is there is flushed although a region cannot be read: nobody waits for that one, as for those that are on their way.
#[test]
fn a_region_that_cannot_be_read_does_not_keep_others_from_being_flushed() {
    let mut bench = Bench::new(3);
    let second = bench.place(RegionSeq(2));
    for at_ns in [0, 1_000_000_000] {
        bench.run(at_ns, |sent| sent.kind == OpKind::Read && sent.offset == second);
    }
    assert_eq!(bench.background.shared.core.lock().cold_regions(), 1);
    assert_eq!(bench.background.status.checkpoint_lsn, Lsn(2));
}

/// Several regions are read at once; the one that fails first is told of until it was read, whatever came of the others.
#[test]
fn what_other_reads_bring_does_not_hide_that_a_region_cannot_be_read() {
    let mut bench = Bench::new(5);
    let first = bench.place(RegionSeq(1));
    let fails = |sent: &Sent| sent.kind == OpKind::Read && sent.offset == first;
    let reads = bench.run(0, fails).into_iter().filter(|sent| sent.kind == OpKind::Read);
    assert_eq!(reads.count(), 2, "two at once, then a pause");
    for later_ns in [1_000_000_000, 10_000_000_000] {
        let status = &bench.background.status;
        assert!(status.stage_problem().is_some_and(|problem| problem.contains("region 1")), "{status:?}");
        bench.run(later_ns, fails);
    }
    assert_eq!(bench.background.shared.core.lock().cold_regions(), 1, "the others are there");
    bench.run(100_000_000_000, |_| false);
    assert_eq!(bench.background.status.stage_problem(), None);
    assert_eq!(bench.background.shared.core.lock().cold_regions(), 0);
}

/// Who reads needs the regions sooner than anybody the room that a flush gives, and both at once take several times as long.
#[test]
fn regions_come_back_before_anything_is_flushed_for_idleness() {
    let mut bench = Bench::new(3);
    let mut ops = VecDeque::new();
    bench.background.step(0, &mut |op| ops.push_back(op));
    while let Some(op) = ops.pop_front() {
        let (_, done) = bench.carry_out(op);
        bench.background.op_done(done);
        // It has been idle for long, and the oldest regions are there.
        bench.background.step(1_000_000_000, &mut |op| ops.push_back(op));
        let cold = bench.background.shared.core.lock().cold_regions();
        assert!(cold == 0 || !bench.background.is_flushing(), "{cold} regions are not there yet");
    }
    assert_eq!(bench.background.status.checkpoint_lsn, Lsn(6));
}

/// What a read waits for is begun at once, beside what is under way.
#[test]
fn a_region_that_a_read_waits_for_comes_first() {
    let mut bench = Bench::with_stride(5, 4096);
    let mut ops = Vec::new();
    bench.background.step(0, &mut |op| ops.push(op));
    assert_eq!(ops.len(), 2);
    let shared = bench.background.shared();
    let in_region_4 = ByteRange::at(3 * 4096, 100);
    let read =
        |core: &mut Core| core.read(&shared.arena, (DoorId(1), 0), VolumeId(1), in_region_4, &mut Vec::new());
    assert_eq!(read(&mut shared.core.lock()), Found::Cold, "it is not in memory");
    bench.background.step(0, &mut |op| ops.push(op));
    let offsets: Vec<u64> = ops.iter().map(|op| op.offset).collect();
    assert_eq!(offsets, [1, 2, 4].map(|seq| bench.place(RegionSeq(seq))));
    bench.background.step(0, &mut |op| ops.push(op));
    assert_eq!(ops.len(), 3, "nothing else is");
}

/// The first damage is told of; reads that are under way end as if there were none.
#[test]
fn damage_is_found_beside_other_reads() {
    let mut bench = Bench::new(4);
    let damaged = [1, 2].map(|seq| bench.place(RegionSeq(seq)) + 512 + 64 + 64 + 1);
    damaged.iter().for_each(|offset| bench.stage.flip(*offset, 1));
    assert_eq!(bench.run(0, |_| false).len(), 2, "no more is begun");
    assert!(!bench.background.is_busy());
    let status = &bench.background.status;
    assert!(status.damage.as_ref().is_some_and(|damage| damage.contains("region 1")), "{status:?}");
    assert!(bench.background.shared.core.lock().is_damaged());
    assert!((1..=4).all(|seq| !bench.background.shared.arena.is_pinned(RegionSeq(seq))));
}
