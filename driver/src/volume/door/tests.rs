//! What a door asks of its devices, and when.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::*;
use crate::base::Lsn;
use crate::io::{Disk, Op};
use crate::recovery::sample_stage::SampleStage;
use crate::recovery::{Environment, OwnArenas, open};
use crate::stage::core::Claim;
use crate::volume::request::Wake;
use crate::volume::still::Still;

#[derive(Default)]
struct Io {
    submitted: VecDeque<Op>,
    placed: Vec<(u32, Lsn)>,
    read: Vec<u8>,
    completed: Vec<u32>,
}

impl DoorIo for Io {
    fn submit(&mut self, op: Op) {
        self.submitted.push_back(op);
    }
    fn fetch(&mut self, tag: u32, _: u32, into: &mut [u8]) -> Result<(), Errno> {
        into.fill(tag as u8 + 1);
        Ok(())
    }
    fn deliver(&mut self, _: u32, _: u32, from: &[u8]) -> Result<(), Errno> {
        self.read = from.to_vec();
        Ok(())
    }
    fn placed(&mut self, tag: u32, lsn: Lsn) {
        self.placed.push((tag, lsn));
    }
    fn complete(&mut self, tag: u32, result: Result<(), Errno>) {
        assert_eq!(result, Ok(()));
        self.completed.push(tag);
    }
}

/// Counts how often a door's thread was woken.
#[derive(Default)]
struct Woken(AtomicU32);

impl Wake for Woken {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A door to a volume with something staged, so that nobody but the door looks after the log.
fn door(ack: AckLevel) -> VolumeDoor {
    let mut stage = SampleStage::new();
    stage.begin_region();
    stage.put_group(&[(crate::format::record::RecordKind::Write, 1, 0, 700)]);
    let backings = [stage.backing(1, Lsn(0)), stage.backing(2, Lsn(0))];
    let by_volume: BTreeMap<VolumeId, &dyn Disk> =
        (1..).map(VolumeId).zip(backings.iter().map(|backing| backing as &dyn Disk)).collect();
    let environment =
        Environment { boot_id: stage.superblock.boot_id, arena_id: 99, accept_loss: false, forget: None };
    let opened = open(&stage.disk, &by_volume, &mut OwnArenas, environment).unwrap();
    let shared = Arc::new(Shared::new(
        opened.core,
        Arc::new(opened.arena),
        opened.rules,
        Arc::new(Still),
        Arc::new(Still),
    ));
    let volume = Arc::new(VolumeShared {
        id: VolumeId(1),
        size_bytes: AtomicU64::new(1 << 20),
        ack,
        on_log_error: OnLogError::Stall,
        backing_block_bytes: 512,
        doors: AtomicU32::new(0),
        counters: Default::default(),
    });
    another_door(&shared, &volume, DoorId(1), Arc::new(Still))
}

fn another_door(
    shared: &Arc<Shared>,
    volume: &Arc<VolumeShared>,
    id: DoorId,
    wake: Arc<dyn Wake>,
) -> VolumeDoor {
    VolumeDoor::new(shared.clone(), volume.clone(), id, shared.add_door(id, wake))
}

/// Another door beside `first`, with what is needed to look at it.
fn beside(first: &VolumeDoor) -> (VolumeDoor, Io, Arc<Woken>) {
    let woken = Arc::new(Woken::default());
    (another_door(&first.shared, &first.volume, DoorId(2), woken.clone()), Io::default(), woken)
}

/// A door that holds a place and has not published it; one behind that, whose change is therefore not answered.
fn behind_a_gap() -> ((VolumeDoor, Io), (VolumeDoor, Io, Arc<Woken>)) {
    let (mut first, mut io_of_first) = (door(AckLevel::Memory), Io::default());
    let (mut second, mut io, woken) = beside(&first);
    first.request(write(1, 0), &mut io_of_first);
    first.take_in(&mut io_of_first);
    second.request(write(2, 4096), &mut io);
    second.batch_end(&mut io);
    ((first, io_of_first), (second, io, woken))
}

fn write(tag: u32, offset: u64) -> Request {
    Request { tag, kind: RequestKind::Write, offset, len: 512, fua: false }
}

fn read(tag: u32, offset: u64) -> Request {
    Request { kind: RequestKind::Read, ..write(tag, offset) }
}

/// Ends what the door has begun, with success.
fn end_operations(door: &mut VolumeDoor, io: &mut Io) {
    while let Some(op) = io.submitted.pop_front() {
        door.op_done(Done { token: op.token, result: Ok(()), memory: op.memory }, io);
    }
}

#[test]
fn changes_are_placed_in_the_order_in_which_they_came_and_written_together() {
    let (mut door, mut io) = (door(AckLevel::Log), Io::default());
    (0..5).for_each(|tag| door.request(write(tag, 4096 * u64::from(tag)), &mut io));
    assert!(io.placed.is_empty() && io.submitted.is_empty());
    door.batch_end(&mut io);
    assert!(io.placed.iter().map(|(tag, _)| *tag).eq(0..5) && io.placed.is_sorted_by_key(|(_, lsn)| *lsn));
    assert_eq!(io.submitted.len(), 1);
    end_operations(&mut door, &mut io);
    assert_eq!(io.completed, [0, 1, 2, 3, 4]);
}

/// A large read for which there are not enough buffers would never get them if small ones went past it.
#[test]
fn a_read_that_waits_for_buffers_is_not_overtaken() {
    let (mut door, mut io) = (door(AckLevel::Memory), Io::default());
    door.request(read(1, 8192), &mut io);
    let others = reads::READ_BYTES_MAX - 1024;
    door.read_bytes += others;
    door.request(Request { len: 4096, ..read(2, 16384) }, &mut io);
    door.request(read(3, 32768), &mut io);
    assert_eq!(io.submitted.len(), 1);
    door.read_bytes -= others;
    end_operations(&mut door, &mut io);
    assert_eq!(io.completed, [1, 2, 3]);
}

#[test]
fn a_read_sees_changes_that_came_before_it() {
    let (mut door, mut io) = (door(AckLevel::Memory), Io::default());
    door.request(write(6, 0), &mut io);
    door.request(write(7, 0), &mut io);
    door.request(read(1, 0), &mut io);
    assert_eq!(io.read, [8; 512]);
    door.batch_end(&mut io);
    assert_eq!(io.completed, [1, 6, 7]);
}

#[test]
fn a_flush_covers_changes_that_came_before_it() {
    let (mut door, mut io) = (door(AckLevel::Memory), Io::default());
    door.request(write(3, 0), &mut io);
    door.request(Request { kind: RequestKind::Flush, len: 0, ..write(4, 0) }, &mut io);
    door.batch_end(&mut io);
    assert_eq!((io.completed.as_slice(), io.submitted.len()), (&[3][..], 1));
    end_operations(&mut door, &mut io);
    assert_eq!(io.completed, [3, 4]);
}

#[test]
fn what_was_settled_before_the_end_of_a_batch_goes_to_the_log_at_its_end() {
    let (mut door, mut io) = (door(AckLevel::Log), Io::default());
    door.request(write(0, 0), &mut io);
    door.settle(&mut io);
    assert!(io.placed.len() == 1 && io.submitted.is_empty());
    door.batch_end(&mut io);
    assert_eq!(io.submitted.len(), 1, "nobody else begins this write");
}

#[test]
fn a_batch_that_is_too_large_is_cut() {
    let (mut door, mut io) = (door(AckLevel::Memory), Io::default());
    (0..20).for_each(|tag| door.request(write(tag, 0), &mut io));
    assert_eq!((io.placed.len(), io.completed.len()), (16, 16));
}

#[test]
fn a_door_behind_anothers_place_is_woken_when_that_is_published() {
    let ((mut first, mut io_of_first), (mut second, mut io, woken)) = behind_a_gap();
    assert_eq!((io.placed.len(), io.completed.len()), (1, 0), "what is behind a gap is not answered");
    assert_eq!(woken.0.load(Ordering::Relaxed), 0);
    first.batch_end(&mut io_of_first);
    assert_eq!((io_of_first.completed.as_slice(), woken.0.load(Ordering::Relaxed)), (&[1][..], 1));
    second.woken(&mut io);
    assert_eq!(io.completed, [2]);
}

/// A change that is indexed and behind a gap is nobody's business yet: a flush would not cover it, and a crash takes it.
#[test]
fn a_read_waits_for_what_is_not_published_and_shows_it_then() {
    let ((mut first, mut io_of_first), (mut second, mut io, woken)) = behind_a_gap();
    // Beside it nothing holds it up.
    second.request(read(3, 8192), &mut io);
    assert_eq!(io.submitted.len(), 1, "a read of the backing");
    for (tag, offset) in [(4, 4096), (5, 0)] {
        second.request(read(tag, offset), &mut io);
        second.batch_end(&mut io);
    }
    assert_eq!((io.completed.as_slice(), io.submitted.len()), (&[][..], 1), "C6");
    first.batch_end(&mut io_of_first);
    assert_eq!(woken.0.load(Ordering::Relaxed), 1);
    second.woken(&mut io);
    io.completed.sort_unstable();
    assert_eq!((io.completed.as_slice(), io.read.as_slice()), (&[2, 4, 5][..], &[2; 512][..]));
}

/// A place and a read that goes on may reach a door together, in this order.
#[test]
fn a_place_that_comes_before_a_read_is_filled_and_published_by_it() {
    let (mut first, mut io_of_first) = (door(AckLevel::Memory), Io::default());
    let (mut second, mut io, _) = beside(&first);
    first.request(write(1, 0), &mut io_of_first);
    first.take_in(&mut io_of_first);
    second.request(read(3, 0), &mut io);
    assert!(io.completed.is_empty(), "C6");
    let slot = {
        let mut core = first.shared.core.lock();
        let Claim::Slot(slot) = core.claim(DoorId(2), 2, 512, OnLogError::Stall) else {
            panic!("there is room")
        };
        slot
    };
    second.jobs[2] = Job::Change(write(2, 4096));
    second.mailbox.put(Outcome::Claimed { door: DoorId(2), tag: 2, slot });
    first.batch_end(&mut io_of_first);
    second.woken(&mut io);
    assert_eq!((io.completed.as_slice(), io.read.as_slice()), (&[3, 2][..], &[2; 512][..]));
}

/// A read that another door overtakes again and again is served all the same: claims wait for it, and go on.
#[test]
fn a_read_of_what_is_written_all_the_time_is_served() {
    let (base, mut io_of_first) = (door(AckLevel::Memory), Io::default());
    let woken = Arc::new(Woken::default());
    let mut first = another_door(&base.shared, &base.volume, DoorId(3), woken.clone());
    let (mut second, mut io, _) = beside(&base);
    first.request(write(100, 0), &mut io_of_first);
    first.take_in(&mut io_of_first);
    second.request(read(1, 0), &mut io);
    for tag in 101..150 {
        // The next one has its place, is indexed and not published when the read is tried again.
        let published = std::mem::take(&mut first.changes.indexed);
        first.request(write(tag, 0), &mut io_of_first);
        first.take_in(&mut io_of_first);
        let next = std::mem::replace(&mut first.changes.indexed, published);
        first.run(&mut io_of_first, Ask::Nothing);
        first.changes.indexed = next;
        second.unheard = true;
        second.batch_end(&mut io);
        if !io.completed.is_empty() {
            assert!((103..120).contains(&tag), "{tag}");
            assert_eq!(io.read, [tag as u8; 512], "what was newest when no more places were given");
            assert!(!io_of_first.completed.contains(&tag));
            assert_eq!(
                woken.0.load(Ordering::Relaxed),
                1,
                "its place comes to it without anybody else's help"
            );
            first.woken(&mut io_of_first);
            assert!(io_of_first.completed.contains(&tag), "claims go on");
            return;
        }
    }
    panic!("the read was never served");
}

/// Which of the shards holds what is not published makes no difference to a read over a border.
#[test]
fn a_read_over_a_border_waits_for_what_is_on_either_side() {
    let find_border = |door: &VolumeDoor| {
        let is_border = |offset: &u64| door.index.shard_of(*offset) != door.index.shard_of(offset - 1);
        (1..1 << 20).find(is_border).expect("more than one shard")
    };
    for side in [0, 1] {
        let (mut first, mut io_of_first) = (door(AckLevel::Memory), Io::default());
        let (mut second, mut io, _) = beside(&first);
        let border = find_border(&first);
        let (both, one) = (border - 512, border - 512 + side * 512);
        first.request(Request { len: 1024, ..write(1, both) }, &mut io_of_first);
        first.batch_end(&mut io_of_first);
        first.request(write(2, one), &mut io_of_first);
        first.take_in(&mut io_of_first);
        second.request(Request { len: 1024, ..read(3, both) }, &mut io);
        assert!(io.completed.is_empty(), "C6");
        first.batch_end(&mut io_of_first);
        second.woken(&mut io);
        assert_eq!((io.completed.as_slice(), io.read.len()), (&[3][..], 1024));
        let newer = side as usize * 512..side as usize * 512 + 512;
        assert!((0..1024).all(|at| io.read[at] == if newer.contains(&at) { 3 } else { 2 }), "{side}");
    }
}
