//! Drives the engine without a ring, a thread or a device: operations are completed in memory, uncopied, so that what is
//! counted is the engine's own work. For callgrind (see `benches/counts`), which cannot run io_uring.
//!
//! Usage: counts OPERATION N      carries it out N times and prints how many operations of devices and wake-ups that took

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

/// A disk in memory.
struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn new(bytes: u64) -> Ram {
        Ram(Mutex::new(vec![0; bytes as usize]))
    }

    fn range<T>(&self, offset: u64, len: usize, with: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let part = bytes.get_mut(offset as usize..offset as usize + len);
        part.map(with).ok_or_else(|| Error::new(ErrorKind::Invalid, "outside the disk"))
    }
}

impl Disk for Ram {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.range(offset, buf.len(), |part| buf.copy_from_slice(part))
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.range(offset, data.len(), |part| part.copy_from_slice(data))
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn len_bytes(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
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

struct Bench {
    shared: Arc<Shared>,
    background: Background,
    kicked: Arc<Still>,
    kicks_seen: u64,
    door: VolumeDoor,
    io: Io,
    /// Operations of the log, of the backing, and syncs.
    ops: [u64; 3],
}

impl Bench {
    fn new(ack: AckLevel) -> Result<Bench> {
        let stage = Ram::new(STAGE_BYTES);
        let backing = Ram::new(VOLUME_BYTES + (64 << 10));
        let fixed = uuid::Uuid::from_u128(7);
        admin::create_stage_as(&stage, StageOptions::for_disk(&stage), fixed, 7)?;
        let new = NewVolume {
            name: "counts".into(),
            size_bytes: VOLUME_BYTES,
            block_bytes: 512,
            ack,
            on_log_error: OnLogError::Stall,
            backing: String::new(),
        };
        let info = admin::add_volume(&stage, &backing, new)?;
        let disks: BTreeMap<VolumeId, &dyn Disk> = BTreeMap::from([(info.id, &backing as &dyn Disk)]);
        let environment = Environment { boot_id: fixed, arena_id: 9, accept_loss: false, forget: None };
        let opened = open(&stage, &disks, &mut OwnArenas, environment)?;
        let kicked = Arc::new(Still::default());
        let clock = Arc::new(Still::default());
        let shared =
            Arc::new(Shared::new(opened.core, Arc::new(opened.arena), opened.rules, clock, kicked.clone()));
        let background = Background::new(shared.clone(), opened.targets, opened.checkpoint, false);
        let volume = Arc::new(VolumeShared {
            id: info.id,
            size_bytes: AtomicU64::new(VOLUME_BYTES),
            ack,
            on_log_error: OnLogError::Stall,
            backing_block_bytes: BLOCK as u32,
            doors: Default::default(),
            counters: Default::default(),
        });
        let mailbox = shared.add_door(DoorId(1), Arc::new(Still::default()));
        let door = VolumeDoor::new(shared.clone(), volume, DoorId(1), mailbox);
        let io = Io { payload: vec![7; BLOCK as usize], submitted: VecDeque::new(), completed: 0 };
        let mut bench = Bench { shared, background, kicked, kicks_seen: 0, door, io, ops: [0; 3] };
        bench.run_background();
        Ok(bench)
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
    fn call(&mut self, kind: RequestKind, offset: u64, len: u64) {
        let before = self.io.completed;
        self.door.request(Request { tag: 0, kind, offset, len, fua: false }, &mut self.io);
        self.door.batch_end(&mut self.io);
        while let Some(op) = self.io.submitted.pop_front() {
            self.count(&op);
            self.door.op_done(Done { token: op.token, result: Ok(()), memory: op.memory }, &mut self.io);
            self.door.batch_end(&mut self.io);
        }
        let kicks = self.kicked.0.load(Ordering::Relaxed);
        if kicks != self.kicks_seen || self.io.completed == before {
            self.kicks_seen = kicks;
            self.run_background();
            self.door.woken(&mut self.io);
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

/// Offsets all over the volume, the same each time.
fn place(i: u64) -> u64 {
    i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (VOLUME_BYTES / BLOCK) * BLOCK
}

fn carry_out(operation: &str, count: u64) -> Result<Bench> {
    let ack = if operation == "write-log" { AckLevel::Log } else { AckLevel::Memory };
    let mut bench = Bench::new(ack)?;
    match operation {
        "write-log" | "write-memory" => {
            (0..count).for_each(|i| bench.call(RequestKind::Write, place(i), BLOCK))
        }
        "write-fsync" => (0..count).for_each(|i| {
            bench.call(RequestKind::Write, place(i), BLOCK);
            bench.call(RequestKind::Flush, 0, 0);
        }),
        "read-staged" => {
            (0..1000).for_each(|i| bench.call(RequestKind::Write, i * BLOCK, BLOCK));
            (0..count).for_each(|i| bench.call(RequestKind::Read, i * 7 % 1000 * BLOCK, BLOCK));
        }
        "read-backing" => (0..count).for_each(|i| bench.call(RequestKind::Read, place(i), BLOCK)),
        "write-flushed" => {
            (0..count).for_each(|i| bench.call(RequestKind::Write, place(i), BLOCK));
            bench.background.drain();
            bench.run_background();
        }
        other => return Err(Error::new(ErrorKind::Invalid, format!("no operation '{other}'"))),
    }
    Ok(bench)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [operation, count] = &args[..] else {
        eprintln!(
            "usage: counts write-memory|write-log|write-fsync|write-flushed|read-staged|read-backing N"
        );
        return ExitCode::from(2);
    };
    let done = count
        .parse()
        .map_err(|_| Error::new(ErrorKind::Invalid, format!("'{count}' is no number")))
        .and_then(|count| carry_out(operation, count));
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
