//! Reads beside doors that write and a flusher, under schedules that shuttle picks: it may let another thread go on before
//! each lock of the core and of a shard.
//!
//! A backing and the stage hold for each cell the LSN of what was written there, so what a read finds tells how old it is. The
//! cells lie on both sides of a border of shards. Core, indexes and the way to forget are those that run; the doors and the
//! flusher around them are models: what they do in which order is `volume/door/changes.rs` and `volume/background.rs`.

use std::sync::atomic::AtomicUsize;

use shuttle::sync::atomic::{AtomicU32, Ordering};
use shuttle::sync::{Arc, Mutex};

use super::*;
use crate::base::schedule;
use crate::format::arena::ArenaIdentity;
use crate::stage::arena::Arena;
use crate::stage::serve::{Found, ReadPiece, ReadSource};
use crate::stage::volume_index::Forgotten;

const CELLS: u64 = 2;
const CELL_BYTES: u64 = 3 << 10;
/// A shard of the core's volume ends in the middle of the cells.
const FIRST_BYTE: u64 = (64 << 10) - CELL_BYTES;
const WRITERS: u32 = 2;
/// Several times as many as the stage has room for.
const WRITES: u32 = 40;
const READS: u32 = 12;
const VOLUME: VolumeId = VolumeId(1);
const READER: DoorId = DoorId(9);

/// What has to come about under some schedule, or the test shows less than it says.
#[derive(Default)]
struct Seen {
    early: AtomicUsize,
    held_back: AtomicUsize,
    staged: AtomicUsize,
    on_backing: AtomicUsize,
    waited: AtomicUsize,
    put_off: AtomicUsize,
}

impl Seen {
    fn note(what: &AtomicUsize, is_so: bool) {
        what.fetch_add(usize::from(is_so), Ordering::Relaxed);
    }
}

/// A record and where its payload is.
#[derive(Clone, Copy)]
struct Place {
    lsn: u64,
    cells: (u64, u64),
    region: RegionSeq,
    offset: u32,
}

struct World {
    seen: std::sync::Arc<Seen>,
    core: Mutex<Core>,
    index: std::sync::Arc<VolumeIndex>,
    arena: Arena,
    backing: Mutex<[u64; CELLS as usize]>,
    places: Mutex<Vec<Place>>,
    /// Outcomes that doors have not taken yet.
    mail: Mutex<Vec<Outcome>>,
    writing: AtomicU32,
}

impl World {
    fn new(seen: std::sync::Arc<Seen>) -> World {
        let core = core();
        let index = core.index(VOLUME).unwrap();
        assert_ne!(index.shard_of(FIRST_BYTE), index.shard_of(FIRST_BYTE + CELL_BYTES));
        World {
            seen,
            core: Mutex::new(core),
            index,
            arena: Arena::anonymous(&ArenaIdentity::new(uuid::Uuid::from_u128(1), 1, &geometry(512)))
                .unwrap(),
            backing: Mutex::new([0; CELLS as usize]),
            places: Mutex::new(Vec::new()),
            mail: Mutex::new(Vec::new()),
            writing: AtomicU32::new(WRITERS),
        }
    }

    /// Carries out what the core has decided. The log's writes take no time, but others may come in between.
    fn carry_out(&self) {
        let mut outcomes = Vec::new();
        loop {
            self.core.lock().unwrap().take_outcomes(&mut outcomes);
            if outcomes.is_empty() {
                return;
            }
            for outcome in outcomes.drain(..) {
                match outcome {
                    Outcome::WriteLog(group) => {
                        self.core.lock().unwrap().log_written(group.group_seq, Ok(()), 0);
                    }
                    Outcome::KickBackground => self.core.lock().unwrap().background_came(),
                    for_a_door => self.mail.lock().unwrap().push(for_a_door),
                }
            }
        }
    }

    /// Waits for what `of` takes out of an outcome, and lets others go on meanwhile.
    fn wait<T>(&self, of: impl Fn(Outcome) -> Result<T, Outcome>) -> T {
        loop {
            let mail = std::mem::take(&mut *self.mail.lock().unwrap());
            let mut found = None;
            for outcome in mail {
                match of(outcome) {
                    Ok(it) => assert!(found.replace(it).is_none(), "E1: told twice"),
                    Err(another) => self.mail.lock().unwrap().push(another),
                }
            }
            if let Some(found) = found {
                return found;
            }
            self.carry_out();
            shuttle::thread::yield_now();
        }
    }

    /// The newest change of a cell that is not newer than `lsn`.
    fn newest(&self, cell: u64, lsn: Lsn) -> u64 {
        let places = self.places.lock().unwrap();
        let of_it = places.iter().filter(|p| (p.cells.0..p.cells.1).contains(&cell) && p.lsn <= lsn.0);
        of_it.map(|p| p.lsn).max().unwrap_or(0)
    }

    fn write(&self, door: DoorId, tag: u32) {
        let cells = [(0, 1), (1, 2), (0, 2), (0, 2)][shuttle::rand::thread_rng().gen_range(0..4)];
        let range = ByteRange::at(FIRST_BYTE + cells.0 * CELL_BYTES, (cells.1 - cells.0) * CELL_BYTES);
        let claim = self.core.lock().unwrap().claim(door, tag, range.len() as u32, OnLogError::Stall);
        Seen::note(&self.seen.waited, matches!(claim, Claim::Wait));
        let slot = match claim {
            Claim::Slot(slot) => slot,
            Claim::Wait => self.wait(|outcome| match outcome {
                Outcome::Claimed { door: to, slot, .. } if to == door => Ok(slot),
                other => Err(other),
            }),
            Claim::Refused(errno) => panic!("refused: {errno}"),
        };
        let (lsn, region, offset) = (slot.lsn(), slot.region(), slot.payload_offset());
        self.places.lock().unwrap().push(Place { lsn: lsn.0, cells, region, offset });
        let record = Record { range, ..record(&slot) };
        let indexed = self.index.index(slot, &record);
        let mut core = self.core.lock().unwrap();
        core.publish(indexed, None);
        core.pump_commit(0);
        drop(core);
        self.carry_out();
    }

    /// Flushes what is durable; `false` if there was nothing.
    fn flush(&self) -> bool {
        let (epoch, head, up_to) = {
            let mut core = self.core.lock().unwrap();
            core.reclaim(&self.arena);
            Seen::note(&self.seen.put_off, core.reclaim_is_pending());
            core.request_commit();
            core.pump_commit(0);
            let Some(epoch) = core.next_epoch(true) else { return false };
            (epoch, core.head_after(epoch.to), epoch.to)
        };
        let places: Vec<Place> = self.places.lock().unwrap().clone();
        let flushed: Vec<Place> =
            places.into_iter().filter(|p| p.lsn > epoch.from.0 && p.lsn <= up_to.0).collect();
        let mut ranges = Vec::new();
        for cell in 0..CELLS {
            let newest = self.newest(cell, up_to);
            if flushed.iter().any(|p| p.lsn == newest) {
                self.backing.lock().unwrap()[cell as usize] = newest;
                ranges.push((VOLUME, ByteRange::at(FIRST_BYTE + cell * CELL_BYTES, CELL_BYTES)));
            }
        }
        let indexes = self.core.lock().unwrap().indexes();
        let forgotten = Forgotten::of(ranges.into_iter(), up_to, &indexes);
        self.core.lock().unwrap().checkpointed(&self.arena, head.seq, forgotten);
        true
    }

    fn read(&self, tag: u32) {
        let range = ByteRange::at(FIRST_BYTE, CELLS * CELL_BYTES);
        let mut pieces = Vec::new();
        let at = loop {
            let (found, at) = {
                let mut core = self.core.lock().unwrap();
                let found = core.read(&self.arena, (READER, tag), VOLUME, range, &mut pieces);
                Seen::note(&self.seen.held_back, core.early.hold_claims_back());
                (found, core.published())
            };
            self.carry_out();
            Seen::note(&self.seen.early, found == Found::Early);
            match found {
                Found::All => break at,
                Found::Cold => panic!("all regions are in memory"),
                Found::Early => self.wait(|outcome| match outcome {
                    Outcome::RetryRead { door: READER, tag: told } if told == tag => Ok(()),
                    other => Err(other),
                }),
            }
        };
        for cell in 0..CELLS {
            let first = FIRST_BYTE + cell * CELL_BYTES;
            let piece = pieces
                .iter()
                .find(|p| p.range.start <= first && first < p.range.end)
                .expect("holes are pieces");
            match piece.source {
                ReadSource::Stage { region, offset } => {
                    Seen::note(&self.seen.staged, true);
                    let offset = offset + (first - piece.range.start) as u32;
                    let seen = self.staged(cell, region, offset);
                    assert_eq!(
                        seen,
                        self.newest(cell, at),
                        "C6: one state of what is published at {at}, of cell {cell}"
                    );
                    let is_live = self.core.lock().unwrap().ring().region(region).is_some();
                    assert!(is_live, "C3: region {region} is given up while it is read");
                }
                ReadSource::Backing => {
                    Seen::note(&self.seen.on_backing, true);
                    let seen = self.backing.lock().unwrap()[cell as usize];
                    let least = self.newest(cell, at);
                    assert!(
                        seen >= least,
                        "cell {cell} is back at {seen}, {least} was published when it was looked up"
                    );
                    assert!(seen <= self.core.lock().unwrap().durable().0, "flushed before it is durable");
                }
                ReadSource::Zero => panic!("nobody writes zeroes"),
            }
        }
        for ReadPiece { source, .. } in pieces {
            if let ReadSource::Stage { region, .. } = source {
                self.arena.unpin(region);
            }
        }
    }

    /// Whose payload of `cell` lies at `offset` of a region.
    fn staged(&self, cell: u64, region: RegionSeq, offset: u32) -> u64 {
        let places = self.places.lock().unwrap();
        let is_there = |p: &&Place| {
            let first = u64::from(p.offset) + cell.saturating_sub(p.cells.0) * CELL_BYTES;
            p.region == region && (p.cells.0..p.cells.1).contains(&cell) && first == u64::from(offset)
        };
        places.iter().find(is_there).map(|p| p.lsn).expect("the place of a record")
    }
}

/// Whatever the schedule: a read shows one state of what is published, as far as it is staged; nothing that was published
/// when it was looked up is missing, neither in the stage nor where a flush has just moved it; and in the end nothing is left
/// in the index.
#[test]
fn reads_see_the_published_prefix_beside_doors_and_flusher() {
    let seen = std::sync::Arc::new(Seen::default());
    let of_world = seen.clone();
    let world = move || {
        let world = Arc::new(World::new(of_world.clone()));
        let writers = (0..WRITERS).map(|door| {
            let world = world.clone();
            shuttle::thread::spawn(move || {
                (0..WRITES).for_each(|tag| world.write(DoorId(door), tag));
                world.writing.fetch_sub(1, Ordering::SeqCst);
            })
        });
        let writers: Vec<_> = writers.collect();
        let flusher = world.clone();
        let flusher = shuttle::thread::spawn(move || {
            loop {
                let over = flusher.writing.load(Ordering::SeqCst) == 0;
                let flushed = flusher.flush();
                flusher.carry_out();
                if over
                    && !flushed
                    && flusher.core.lock().unwrap().checkpoint() == Lsn(u64::from(WRITERS * WRITES))
                {
                    return;
                }
                shuttle::thread::yield_now();
            }
        });
        (0..READS).for_each(|tag| world.read(tag));
        writers.into_iter().chain([flusher]).for_each(|thread| thread.join().unwrap());
        let mut core = world.core.lock().unwrap();
        assert!(world.index.is_empty());
        assert_eq!(core.extent_sum(), 0, "X4");
        let mut left = world.mail.lock().unwrap();
        core.take_outcomes(&mut left);
        assert!(left.is_empty(), "nobody waits for {left:?}");
    };
    schedule::checked(|| shuttle::check_random(world, 1500));
    let Seen { early, held_back, staged, on_backing, waited, put_off } = &*seen;
    let all =
        [early, held_back, staged, on_backing, waited, put_off].map(|what| what.load(Ordering::Relaxed));
    assert!(!all.contains(&0), "early, held back, staged, on the backing, waited, put off: {all:?}");
}
