//! Measures the engine alone, on this machine, without a kernel block device: ingest, recovery, time to first read.
//! Prints notes, one JSON object a line; `ROUNDS` says how many runs.
//!
//! Usage: `native DIR [DISK] | native DIR calls OPERATION N | native DIR ingest BYTES DOORS | native recovery DISK |
//! native costs`
//!
//! DIR: where stage and backing files go (a disk, or a tmpfs to leave the disk out of it)
//! DISK: where they go to measure recovery from a disk

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use rustix::fs::{Advice, OFlags, fadvise};
use tidegate_benches::note::Note;
use tidegate_benches::place::engine_on;
use tidegate_benches::{Effort, Place, VOLUME};
use tidegate_driver::base::checksum::crc64;
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::volume_entry::AckLevel;
use tidegate_driver::io::AlignedBuf;
use tidegate_driver::volume::{LocalClient, Request, RequestKind};

const VOLUME_BYTES: u64 = 8 << 30;
const STAGE_BYTES: u64 = 1 << 30;
/// What is staged before a crash, in blocks of 4 KiB.
const FILLED_BLOCKS: u64 = (940 << 20) / 4096 / 32 * 32;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match &args[..] {
        [costs] if costs == "costs" => {
            costs_of_a_block(1);
            Ok(())
        }
        [recovery, disk] if recovery == "recovery" => recovery_from(Path::new(disk)),
        [with, dir, arena, order] if with == "fill" => {
            let order = Order::ALL.into_iter().find(|known| known.name() == order).unwrap_or_else(|| usage());
            fill(Path::new(dir), Path::new(arena), order)
        }
        [dir] => measure(Path::new(dir)),
        [dir, disk] => measure(Path::new(dir)).and_then(|()| recovery_from(Path::new(disk))),
        [dir, calls, operation, count] if calls == "calls" => {
            one_at_a_time(Path::new(dir), operation, number(count))
        }
        [dir, ingest, bytes, doors] if ingest == "ingest" => {
            ingest_alone(Path::new(dir), number(bytes) as usize, number(doors))
        }
        _ => usage(),
    };
    if let Err(error) = done {
        eprintln!("native: {}", error.report());
        std::process::exit(1);
    }
}

fn usage() -> ! {
    eprintln!(
        "usage: native DIR [DISK] | native DIR calls OPERATION N | native DIR ingest BYTES DOORS | \
         native recovery DISK | native costs"
    );
    std::process::exit(2);
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| usage())
}

/// One kind of operation, for a tracer to count what it asks of the kernel.
fn one_at_a_time(dir: &Path, operation: &str, count: u64) -> Result<()> {
    let ack = if operation == "write-log" { AckLevel::Log } else { AckLevel::Memory };
    let place = Place::new(dir, "calls", 1 << 30, VOLUME_BYTES, ack, false)?;
    let engine = place.open(None)?;
    let mut client = LocalClient::new(&engine, VOLUME, 1)?;
    client.write(0, &[7; 4096])?;
    for i in 0..count {
        match operation {
            "read-staged" => drop(client.read(0, 4096)?),
            "write-fsync" => {
                client.write(i * 4096, &[7; 4096])?;
                client.flush()?;
            }
            "read-backing" => drop(client.read(4096 + i * 4096, 4096)?),
            "write-memory" | "write-log" => client.write(i * 4096, &[7; 4096])?,
            _ => usage(),
        }
    }
    drop(client);
    engine.close(true)
}

fn measure(dir: &Path) -> Result<()> {
    let runs = Effort::from_environment().runs;
    costs_of_a_block(runs);
    for (bytes, doors) in [(4096, 1), (4096, 2), (64, 1), (64, 2)] {
        let place = Place::new(dir, "native", STAGE_BYTES, VOLUME_BYTES, AckLevel::Memory, false)?;
        let (rates, bounds) = ingest(&place, bytes, runs, doors)?;
        let doors = if doors == 1 { "one door" } else { "two doors, a thread each" };
        let scenario = format!("ingest, ack memory, {bytes} B records, {doors}");
        Note::of("engine", &scenario, "memcpy + crc64 of one core", "rate", "records/s", bounds).print();
        note(&scenario, "rate", "records/s", rates);
    }
    for bytes in [4096, 64] {
        processors(dir, bytes, runs)?;
    }
    Order::ALL.into_iter().try_for_each(|order| recovery(dir, order, runs))
}

/// One door on one processor and two doors on two, in turn: everything that the process does, its log writes included, has no
/// more than that. Where there is one processor only, nothing.
fn processors(dir: &Path, bytes: usize, runs: usize) -> Result<()> {
    const TWO: &str = "tidegate, two doors on two processors";
    let all = affinity()?;
    let some: Vec<usize> =
        (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false)).take(2).collect();
    if some.len() < 2 {
        return Ok(());
    }
    let ways = [(2, TWO), (1, "tidegate, one door on one processor")];
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        for ((doors, _), rates) in ways.iter().zip(&mut rates) {
            confine(&some[..*doors as usize])?;
            let place = Place::new(dir, "native", STAGE_BYTES, VOLUME_BYTES, AckLevel::Memory, false)?;
            rates.extend(ingest(&place, bytes, 1, *doors)?.0);
        }
    }
    sched_setaffinity(Pid::from_raw(0), &all).map_err(processor_error)?;
    let scenario = format!("ingest, ack memory, {bytes} B records, processors");
    for ((_, who), rates) in ways.iter().zip(rates) {
        let note = Note::of("engine", &scenario, who, "rate", "records/s", rates);
        Note { ours: TWO.into(), ..note }.print();
    }
    Ok(())
}

/// One ingest, for a profiler to look at.
fn ingest_alone(dir: &Path, bytes: usize, doors: u64) -> Result<()> {
    let runs = Effort::from_environment().runs;
    let place = Place::new(dir, "native", STAGE_BYTES, VOLUME_BYTES, AckLevel::Memory, false)?;
    let rates = ingest(&place, bytes, runs, doors)?.0;
    note(&format!("ingest, {bytes} B records, {doors} doors"), "rate", "records/s", rates);
    Ok(())
}

fn affinity() -> Result<CpuSet> {
    sched_getaffinity(Pid::from_raw(0)).map_err(processor_error)
}

/// This thread, and all that it will start, run on these processors only.
fn confine(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu).map_err(processor_error)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).map_err(processor_error)
}

fn processor_error(e: nix::Error) -> Error {
    Error::io("cannot choose processors", e.into())
}

fn note(scenario: &str, measure: &str, unit: &str, values: Vec<f64>) {
    Note::alone("engine", scenario, measure, unit, values).print();
}

/// What this machine takes for the two things that are done with every byte of a write, on a block that is in its cache. In the
/// test machine they cost many times as much as natively.
fn costs_of_a_block(runs: usize) {
    const REPEATED: u32 = 2000;
    let (from, mut into) = ([7u8; 4096], [1u8; 4096]);
    let mut time = |of: &mut dyn FnMut(&mut [u8])| {
        // The fastest of several: what comes between makes it slower only.
        let tries = (0..20).map(|_| {
            let started = Instant::now();
            (0..REPEATED).for_each(|_| of(std::hint::black_box(&mut into)));
            started.elapsed().as_secs_f64() * 1e9 / f64::from(REPEATED)
        });
        tries.fold(f64::MAX, f64::min)
    };
    for (measure, of) in [
        (
            "checksum",
            &mut (|block: &mut [u8]| {
                std::hint::black_box(crc64(block));
            }) as &mut dyn FnMut(&mut [u8]),
        ),
        ("copy", &mut |block: &mut [u8]| block.copy_from_slice(std::hint::black_box(&from))),
    ] {
        note("checksum and copy of 4 KiB", measure, "ns", (0..runs).map(|_| time(of)).collect());
    }
}

/// Records per second that copying and checksumming alone would allow, on memory as cold as the arena's.
fn bound(bytes: usize, target: &mut [u8]) -> f64 {
    let count = target.len() / bytes;
    let source = vec![7u8; bytes];
    let started = Instant::now();
    let mut sum = 0u64;
    for chunk in target.chunks_exact_mut(bytes) {
        chunk.copy_from_slice(&source);
        sum ^= crc64(chunk);
    }
    std::hint::black_box(sum);
    count as f64 / started.elapsed().as_secs_f64()
}

/// Records per second of `doors` doors, a thread each with 32 requests in flight, random offsets, in `runs` runs. The stage has
/// been written to all over before, so that its memory exists, and is empty when a run begins. And the bound of one core, in
/// turn with it.
fn ingest(place: &Place, bytes: usize, runs: usize, doors: u64) -> Result<(Vec<f64>, Vec<f64>)> {
    // Of large records what the stage has room for without being flushed.
    let count: u64 = if bytes < 1024 { 400_000 } else { 400_000_000 / bytes as u64 };
    let engine = place.open(None)?;
    let mut client = LocalClient::new(&engine, VOLUME, 32)?;
    let large = 64 << 10;
    write_records(&mut client, large, STAGE_BYTES / large as u64, 1)?;
    client.flush()?;
    drop(client);
    let (mut rates, mut bounds) = (Vec::new(), Vec::new());
    let mut target = vec![1u8; 256 << 20];
    for run in 0..runs as u64 {
        bounds.push(bound(bytes, &mut target));
        engine.drain()?;
        let begin = Barrier::new(doors as usize);
        let one = |door: u64| -> Result<(Instant, Instant)> {
            let mut client = LocalClient::new(&engine, VOLUME, 32)?;
            begin.wait();
            let began = Instant::now();
            write_records(&mut client, bytes, count / doors, 3 + 2 * (run * doors + door))?;
            let ended = Instant::now();
            // This thread may be the one that writes the log, so nothing may be left to it.
            client.flush()?;
            Ok((began, ended))
        };
        let spans: Vec<(Instant, Instant)> = thread::scope(|scope| {
            let threads: Vec<_> = (0..doors).map(|door| scope.spawn(move || one(door))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a door's thread")).collect::<Result<_>>()
        })?;
        let began = spans.iter().map(|span| span.0).min().expect("a door");
        let ended = spans.iter().map(|span| span.1).max().expect("a door");
        rates.push(count as f64 / (ended - began).as_secs_f64());
    }
    engine.close(true)?;
    Ok((rates, bounds))
}

fn write_records(client: &mut LocalClient, bytes: usize, count: u64, seed: u64) -> Result<()> {
    let mut free: Vec<(u32, Vec<u8>)> = (0..32).map(|tag| (tag, vec![tag as u8; bytes])).collect();
    let mut offset = seed;
    let slots = VOLUME_BYTES / bytes as u64;
    let (mut sent, mut done) = (0, 0);
    while done < count {
        while sent < count
            && let Some((tag, data)) = free.pop()
        {
            offset = offset.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (offset >> 20) % slots * bytes as u64;
            let request =
                Request { tag, kind: RequestKind::Write, offset: at, len: bytes as u64, fua: false };
            client.submit(request, data);
            sent += 1;
        }
        client.wait(None)?;
        while let Some(completed) = client.completed() {
            completed.result.map_err(|e| Error::new(ErrorKind::Io, format!("a write failed: {e}")))?;
            free.push((completed.tag, completed.data));
            done += 1;
        }
    }
    Ok(())
}

/// Where a staged record lies.
#[derive(Clone, Copy)]
enum Order {
    /// Behind the one before it.
    InOrder,
    /// Anywhere, and never where another is.
    AtRandom,
}

impl Order {
    const ALL: [Order; 2] = [Order::InOrder, Order::AtRandom];

    fn offset(self, block: u64) -> u64 {
        let blocks = VOLUME_BYTES / 4096;
        let block = match self {
            Order::InOrder => block,
            // Odd, and their number is a power of two: each comes once.
            Order::AtRandom => block.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks,
        };
        block * 4096
    }

    fn name(self) -> &'static str {
        match self {
            Order::InOrder => "4 KiB records in order",
            Order::AtRandom => "4 KiB records at random",
        }
    }
}

/// A stage of 2 GiB of which a bit less than half is in use (the flusher starts above that), as a process leaves it that is
/// killed, and the bytes of log in it. The arena is gone, too.
fn crashed(dir: &Path, order: Order) -> Result<(Place, u64)> {
    let place = Place::new(dir, "native", 2 << 30, VOLUME_BYTES, AckLevel::Log, false)?;
    let arena = Scratch::new()?;
    let failed = |e| Error::io("cannot have the stage filled", e);
    let program = std::env::current_exe().map_err(failed)?;
    let mut filling = Command::new(program)
        .args([Path::new("fill"), place.dir(), &arena.0, Path::new(order.name())])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut told = String::new();
    let read = BufReader::new(filling.stdout.take().expect("a pipe")).read_line(&mut told);
    // At once, before it takes itself for idle and flushes.
    filling.kill().and_then(|()| filling.wait()).map_err(failed)?;
    read.map_err(failed)?;
    let staged = told.trim().parse();
    Ok((place, staged.map_err(|_| Error::new(ErrorKind::Io, "the stage could not be filled"))?))
}

/// Fills a stage, says how much of it is used, and waits to be killed.
fn fill(dir: &Path, arena: &Path, order: Order) -> Result<()> {
    let engine = engine_on(dir, arena)?;
    let mut client = LocalClient::new(&engine, VOLUME, 32)?;
    let data = vec![5u8; 4096];
    for first in (0..FILLED_BLOCKS).step_by(32) {
        for tag in 0..32 {
            let offset = order.offset(first + u64::from(tag));
            client.submit(
                Request { tag, kind: RequestKind::Write, offset, len: 4096, fua: false },
                data.clone(),
            );
        }
        let mut open = 32;
        while open > 0 {
            client.wait(None)?;
            while client.completed().is_some() {
                open -= 1;
            }
        }
    }
    println!("{}", engine.status().used_bytes);
    loop {
        thread::park();
    }
}

/// A folder in memory, for arenas.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        let path = PathBuf::from(format!("/dev/shm/tidegate-native-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|e| Error::io("cannot make a folder for the arena", e))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Opens what a crash left: milliseconds to the first read, and seconds until the whole log was read and verified. `before`, a
/// copy of the same, is opened before for the memory that it takes: the host of a virtual machine may not have given it yet, or
/// have taken it back, and one of ours took 2 s a GiB to find it, longer than to read as much from the disk.
fn recover(before: &Place, place: &Place) -> Result<(f64, f64)> {
    recover_once(before)?;
    recover_once(place)
}

fn recover_once(place: &Place) -> Result<(f64, f64)> {
    let arena = Scratch::new()?;
    let started = Instant::now();
    let engine = place.open(Some(&arena.0))?;
    let mut client = LocalClient::new(&engine, VOLUME, 32)?;
    client.read(0, 4096)?;
    let first_read = started.elapsed().as_secs_f64() * 1000.0;
    while engine.status().cold_regions > 0 {
        thread::sleep(Duration::from_micros(200));
    }
    Ok((first_read, started.elapsed().as_secs_f64()))
}

fn recovery(dir: &Path, order: Order, runs: usize) -> Result<()> {
    let (crashed, staged) = crashed(dir, order)?;
    let (mut first_read, mut rate) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let (first, whole) = recover(&crashed.copy("-before")?, &crashed.copy("-copy")?)?;
        first_read.push(first);
        rate.push(staged as f64 / whole / 1e9);
    }
    let scenario = format!("recovery, about 1 GiB staged, {}", order.name());
    note(&scenario, "time to first read", "ms", first_read);
    note(&format!("{scenario}, whole log read and verified"), "rate", "GB/s", rate);
    Ok(())
}

/// The same from a disk, in turn with reading as much of the stage from one end to the other, past the page cache.
fn recovery_from(disk: &Path) -> Result<()> {
    Order::ALL.into_iter().try_for_each(|order| recovery_from_disk(disk, order))
}

fn recovery_from_disk(disk: &Path, order: Order) -> Result<()> {
    let runs = Effort::from_environment().runs;
    let (crashed, staged) = crashed(disk, order)?;
    let (mut first_read, mut rates) = (Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
    for run in 0..runs {
        let (before, copy) = (crashed.copy("-before")?, crashed.copy("-copy")?);
        let stage = copy.dir().join("stage");
        forget_cached(&stage)?;
        // Or opening would wait for what copying has left to be written.
        forget_cached(&copy.dir().join("backing"))?;
        forget_cached(&before.dir().join("stage"))?;
        // Whoever comes later may find more of it in the disk's own cache.
        for turn in 0..3 {
            let way = (run + turn) % 3;
            let seconds = match way {
                0 => {
                    let (first, whole) = recover(&before, &copy)?;
                    first_read.push(first);
                    whole
                }
                1 => read_through(&stage, staged, 1 << 20)?,
                _ => read_through(&stage, staged, 8 << 20)?,
            };
            rates[way].push(staged as f64 / seconds / 1e9);
        }
    }
    let scenario = format!("recovery from a disk, about 1 GiB staged, {}", order.name());
    note(&scenario, "time to first read", "ms", first_read);
    let scenario = format!("{scenario}, whole log read and verified");
    let who = ["tidegate", "the disk itself, reads of 1 MiB", "the disk itself, reads of 8 MiB"];
    for (who, rates) in who.into_iter().zip(rates) {
        Note::of("engine", &scenario, who, "rate", "GB/s", rates).print();
    }
    Ok(())
}

/// What is cached of the file goes to the disk and out of memory.
fn forget_cached(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("cannot open the stage", e))?;
    file.sync_all().map_err(|e| Error::io("cannot sync the stage", e))?;
    fadvise(&file, 0, None, Advice::DontNeed).map_err(|e| Error::io("cannot drop what is cached", e.into()))
}

/// Seconds that it takes to read so much of the file, one read after the other, past the page cache.
fn read_through(path: &Path, bytes: u64, each: usize) -> Result<f64> {
    let file = File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path);
    let file = file.map_err(|e| Error::io("cannot open the stage for direct reads", e))?;
    let mut buffer = AlignedBuf::zeroed(each);
    let started = Instant::now();
    for at in (0..bytes).step_by(each) {
        file.read_exact_at(&mut buffer, at).map_err(|e| Error::io("cannot read the stage", e))?;
    }
    Ok(started.elapsed().as_secs_f64())
}
