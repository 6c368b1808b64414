//! Drives the engine without a ring, a thread or a device: operations are completed in memory, uncopied, so that what is
//! counted is the engine's own work. For callgrind (see `benches/counts`), which cannot run io_uring.
//!
//! Usage: `counts OPERATION N [VARIANT]`  carries it out N times and prints how many operations of devices and wake-ups
//! that took
//!
//! VARIANT: what the stage is like, to see whether that costs anything: base (a volume of 1 GiB, alone on an empty stage);
//! large (64 TiB, sparse); few (100 blocks are staged); many (63 more volumes, of which as much is staged); turns (the
//! same, and all of them are used, in turn); full (nine tenths of the stage are in use, and nothing is flushed).

use std::collections::{BTreeMap, VecDeque};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::{Disk, Done, Errno, Op, OpKind, Target};
use tidegate_driver::recovery::{Environment, OwnArenas, open};
use tidegate_driver::stage::core::DoorId;
use tidegate_driver::volume::admin::{self, NewVolume, StageOptions};
use tidegate_driver::volume::background::Background;
use tidegate_driver::volume::door::VolumeShared;
use tidegate_driver::volume::shared::{Clock, Shared};
use tidegate_driver::volume::{Door, DoorIo, Request, RequestKind, VolumeDoor, Wake};

const STAGE_BYTES: u64 = 512 << 20;
const VOLUME_BYTES: u64 = 256 << 20;
const BLOCK: u64 = 4096;

/// A disk in memory, of which there is what was written. Whole blocks are read and written.
struct Ram {
    bytes: u64,
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl Ram {
    fn new(bytes: u64) -> Ram {
        Ram { bytes, blocks: Mutex::default() }
    }

    /// The number of the first block.
    fn block_of(&self, offset: u64, len: usize) -> Result<u64> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.bytes);
        let whole = offset.is_multiple_of(BLOCK) && (len as u64).is_multiple_of(BLOCK);
        end.filter(|_| whole)
            .map(|_| offset / BLOCK)
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "no blocks of the disk"))
    }
}

impl Disk for Ram {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let first = self.block_of(offset, buf.len())?;
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, part) in (first..).zip(buf.chunks_mut(BLOCK as usize)) {
            match blocks.get(&at) {
                Some(block) => part.copy_from_slice(block),
                None => part.fill(0),
            }
        }
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let first = self.block_of(offset, data.len())?;
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.extend((first..).zip(data.chunks(BLOCK as usize).map(<[u8]>::to_vec)));
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn len_bytes(&self) -> u64 {
        self.bytes
    }
    fn block_bytes(&self) -> u32 {
        BLOCK as u32
    }
    fn preferred_block_bytes(&self) -> u32 {
        BLOCK as u32
    }
    fn name(&self) -> String {
        "memory".to_owned()
    }
}

/// Time that passes by a microsecond with each look, and wake-ups that are counted.
#[derive(Default)]
struct Still(AtomicU64);

impl Clock for Still {
    fn unix_ns(&self) -> u64 {
        1
    }
    fn monotonic_ns(&self) -> u64 {
        self.0.fetch_add(1000, Ordering::Relaxed)
    }
}

impl Wake for Still {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A client that writes one block of sevens, and its operations in flight.
struct Io {
    payload: Vec<u8>,
    submitted: VecDeque<Op>,
    completed: u64,
}

impl DoorIo for Io {
    fn submit(&mut self, op: Op) {
        self.submitted.push_back(op);
    }
    fn fetch(&mut self, _: u32, offset: u32, into: &mut [u8]) -> std::result::Result<(), Errno> {
        into.copy_from_slice(&self.payload[offset as usize..][..into.len()]);
        Ok(())
    }
    fn deliver(&mut self, _: u32, offset: u32, from: &[u8]) -> std::result::Result<(), Errno> {
        self.payload[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn complete(&mut self, _: u32, result: std::result::Result<(), Errno>) {
        assert!(result.is_ok(), "a request failed: {result:?}");
        self.completed += 1;
    }
}

/// What the stage is like.
#[derive(Clone, Copy)]
struct Variant {
    stage_bytes: u64,
    volume_bytes: u64,
    volumes: u64,
    /// All of the volumes are used, not only the first.
    in_turn: bool,
    /// Blocks of each volume that are staged before: every other from the first on.
    staged: u64,
    /// Those between them are used; else all of them.
    spread: bool,
}

impl Variant {
    /// `None`: there is none of that name.
    fn named(name: &str) -> Option<Variant> {
        let guarded = Variant {
            stage_bytes: STAGE_BYTES,
            volume_bytes: VOLUME_BYTES,
            volumes: 1,
            in_turn: false,
            staged: 0,
            spread: false,
        };
        let base = Variant { volume_bytes: 1 << 30, spread: true, ..guarded };
        let few = Variant { staged: 100, ..base };
        Some(match name {
            "" => guarded,
            "base" => base,
            "large" => Variant { volume_bytes: 64 << 40, ..base },
            "few" => few,
            "many" => Variant { volumes: 64, ..few },
            "turns" => Variant { volumes: 64, in_turn: true, ..few },
            "full" => Variant { staged: FULL_BLOCKS, ..base },
            _ => return None,
        })
    }

    /// Blocks all over the volume, the same each time; none of those that are staged before.
    fn place(&self, i: u64) -> u64 {
        let random = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let blocks = self.volume_bytes / BLOCK;
        if self.spread { (random % (blocks / 2) * 2 + 1) * BLOCK } else { random % blocks * BLOCK }
    }
}

/// So many make nine tenths of the stage.
const FULL_BLOCKS: u64 = 110_000;

struct Bench {
    variant: Variant,
    shared: Arc<Shared>,
    background: Background,
    kicked: Arc<Still>,
    kicks_seen: u64,
    doors: Vec<VolumeDoor>,
    io: Io,
    /// Operations of the log, of the backing, and syncs.
    ops: [u64; 3],
}

impl Bench {
    fn new(ack: AckLevel, variant: Variant) -> Result<Bench> {
        let stage = Ram::new(variant.stage_bytes);
        let fixed = uuid::Uuid::from_u128(7);
        admin::create_stage_as(&stage, StageOptions::for_disk(&stage), fixed, 7)?;
        let mut backings = BTreeMap::new();
        for number in 0..variant.volumes {
            let backing = Ram::new(variant.volume_bytes + (64 << 10));
            let new = NewVolume {
                name: format!("counts{number}"),
                size_bytes: variant.volume_bytes,
                block_bytes: 512,
                ack,
                on_log_error: OnLogError::Stall,
                backing: String::new(),
            };
            let info = admin::add_volume(&stage, &backing, new)?;
            backings.insert(info.id, backing);
        }
        let disks: BTreeMap<VolumeId, &dyn Disk> =
            backings.iter().map(|(id, disk)| (*id, disk as &dyn Disk)).collect();
        let environment = Environment { boot_id: fixed, arena_id: 9, accept_loss: false, forget: None };
        let opened = open(&stage, &disks, &mut OwnArenas, environment)?;
        let kicked = Arc::new(Still::default());
        let clock = Arc::new(Still::default());
        let shared =
            Arc::new(Shared::new(opened.core, Arc::new(opened.arena), opened.rules, clock, kicked.clone()));
        let background = Background::new(shared.clone(), opened.targets, opened.checkpoint, false);
        let doors = (1..).zip(backings.keys()).map(|(door, id)| {
            let volume = Arc::new(VolumeShared {
                id: *id,
                size_bytes: AtomicU64::new(variant.volume_bytes),
                ack,
                on_log_error: OnLogError::Stall,
                backing_block_bytes: BLOCK as u32,
                doors: Default::default(),
                counters: Default::default(),
            });
            let mailbox = shared.add_door(DoorId(door), Arc::new(Still::default()));
            VolumeDoor::new(shared.clone(), volume, DoorId(door), mailbox)
        });
        let doors = doors.collect();
        let io = Io { payload: vec![7; BLOCK as usize], submitted: VecDeque::new(), completed: 0 };
        let mut bench = Bench { variant, shared, background, kicked, kicks_seen: 0, doors, io, ops: [0; 3] };
        bench.run_background();
        if variant.spread {
            bench.prepare();
        }
        Ok(bench)
    }

    /// Brings all memory into being, keeps the flusher still, and stages what the variant wants.
    fn prepare(&mut self) {
        while self.shared.core.lock().next_unallocated().is_some() {
            self.run_background();
        }
        self.background.hold(true);
        for door in 0..self.doors.len() {
            for i in 0..self.variant.staged {
                self.call(door, RequestKind::Write, i * 2 * BLOCK, BLOCK);
            }
        }
    }

    /// The door of the `i`th request.
    fn door_of(&self, i: u64) -> usize {
        if self.variant.in_turn { (i % self.variant.volumes) as usize } else { 0 }
    }

    fn count(&mut self, op: &Op) {
        let kind = match (op.kind, op.target) {
            (OpKind::Sync, _) => 2,
            (_, Target::Stage) => 0,
            _ => 1,
        };
        self.ops[kind] += 1;
    }

    /// One request, to its end.
    fn call(&mut self, door: usize, kind: RequestKind, offset: u64, len: u64) {
        let before = self.io.completed;
        self.doors[door].request(Request { tag: 0, kind, offset, len, fua: false }, &mut self.io);
        self.doors[door].batch_end(&mut self.io);
        while let Some(op) = self.io.submitted.pop_front() {
            self.count(&op);
            self.doors[door]
                .op_done(Done { token: op.token, result: Ok(()), memory: op.memory }, &mut self.io);
            self.doors[door].batch_end(&mut self.io);
        }
        let kicks = self.kicked.0.load(Ordering::Relaxed);
        if kicks != self.kicks_seen || self.io.completed == before {
            self.kicks_seen = kicks;
            self.run_background();
            self.doors[door].woken(&mut self.io);
        }
        assert_eq!(self.io.completed, before + 1, "one request is carried out at a time");
    }

    fn run_background(&mut self) {
        loop {
            let now = self.shared.clock.monotonic_ns();
            let mut ops = Vec::new();
            self.background.step(now, &mut |op| ops.push(op));
            if ops.is_empty() {
                return;
            }
            for op in ops {
                self.count(&op);
                self.background.op_done(Done { token: op.token, result: Ok(()), memory: op.memory });
            }
        }
    }
}

fn carry_out(operation: &str, count: u64, variant: Variant) -> Result<Bench> {
    let ack = if operation == "write-log" { AckLevel::Log } else { AckLevel::Memory };
    let mut bench = Bench::new(ack, variant)?;
    let mut each = |count: u64, kind: RequestKind, place: &dyn Fn(u64) -> u64| {
        (0..count).for_each(|i| bench.call(bench.door_of(i), kind, place(i), BLOCK));
    };
    let all_over = |i: u64| variant.place(i);
    match operation {
        "write-log" | "write-memory" => each(count, RequestKind::Write, &all_over),
        "write-fsync" => (0..count).for_each(|i| {
            let door = bench.door_of(i);
            bench.call(door, RequestKind::Write, variant.place(i), BLOCK);
            bench.call(door, RequestKind::Flush, 0, 0);
        }),
        "read-staged" if variant.spread => {
            // All over what is staged.
            let per_door = if variant.in_turn { variant.volumes } else { 1 };
            each(READ_BLOCKS * per_door, RequestKind::Write, &|i| variant.place(i / per_door));
            each(count, RequestKind::Read, &|i| {
                let i = i / per_door;
                if variant.staged == FULL_BLOCKS {
                    i * 7919 % FULL_BLOCKS * 2 * BLOCK
                } else {
                    variant.place(i * 7 % READ_BLOCKS)
                }
            });
        }
        "read-staged" => {
            each(READ_BLOCKS, RequestKind::Write, &|i| i * BLOCK);
            each(count, RequestKind::Read, &|i| i * 7 % READ_BLOCKS * BLOCK);
        }
        "read-backing" => each(count, RequestKind::Read, &all_over),
        "write-flushed" => {
            each(count, RequestKind::Write, &all_over);
            bench.background.drain();
            bench.run_background();
        }
        other => return Err(Error::new(ErrorKind::Invalid, format!("no operation '{other}'"))),
    }
    Ok(bench)
}

/// Blocks that are staged to be read.
const READ_BLOCKS: u64 = 1000;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (operation, count, variant) = match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [operation, count] => (*operation, *count, Variant::named("")),
        [operation, count, variant] => (*operation, *count, Variant::named(variant)),
        _ => ("", "", None),
    };
    let Some(variant) = variant else {
        eprintln!(
            "usage: counts write-memory|write-log|write-fsync|write-flushed|read-staged|read-backing N \
             [base|large|few|many|turns|full]"
        );
        return ExitCode::from(2);
    };
    let done = count
        .parse()
        .map_err(|_| Error::new(ErrorKind::Invalid, format!("'{count}' is no number")))
        .and_then(|count| carry_out(operation, count, variant));
    match done {
        Ok(bench) => {
            let [log, backing, syncs] = bench.ops;
            println!("{log} {backing} {syncs} {}", bench.kicked.0.load(Ordering::Relaxed));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("counts: {}", error.report());
            ExitCode::FAILURE
        }
    }
}
