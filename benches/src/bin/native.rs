//! Measures the engine alone, on this machine, without a kernel block device: ingest, recovery, time to first read.
//! Prints notes, one JSON object a line; `ROUNDS` says how many runs.
//!
//! Usage: native DIR [recovery] | native DIR calls OPERATION N | native costs
//!
//! DIR: where stage and backing files go (a disk, or a tmpfs to leave the disk out of it)

use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use tidegate_benches::note::Note;
use tidegate_benches::{Effort, Place, VOLUME};
use tidegate_driver::base::checksum::crc64;
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::volume_entry::AckLevel;
use tidegate_driver::io::file::FileDisk;
use tidegate_driver::io::{AlignedBuf, Disk as _};
use tidegate_driver::volume::{LocalClient, Request, RequestKind};

const VOLUME_BYTES: u64 = 8 << 30;
const STAGE_BYTES: u64 = 1 << 30;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match &args[..] {
        [costs] if costs == "costs" => {
            costs_of_a_block(1);
            Ok(())
        }
        [dir] => measure(Path::new(dir)),
        [dir, part] if part == "recovery" => recovery(Path::new(dir), Effort::from_environment(false).runs),
        [dir, calls, operation, count] if calls == "calls" => {
            one_at_a_time(Path::new(dir), operation, count.parse().unwrap_or(0))
        }
        _ => {
            eprintln!("usage: native DIR [recovery] | native DIR calls OPERATION N | native costs");
            std::process::exit(2);
        }
    };
    if let Err(error) = done {
        eprintln!("native: {}", error.report());
        std::process::exit(1);
    }
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
            _ => client.write(i * 4096, &[7; 4096])?,
        }
    }
    drop(client);
    engine.close(true)
}

fn measure(dir: &Path) -> Result<()> {
    let runs = Effort::from_environment(false).runs;
    costs_of_a_block(runs);
    for (bytes, count, doors) in
        [(4096usize, 100_000u64, 1), (4096, 100_000, 2), (64, 400_000, 1), (64, 400_000, 2)]
    {
        let place = Place::new(dir, "native", STAGE_BYTES, VOLUME_BYTES, AckLevel::Memory, false)?;
        let (rates, bounds) = ingest(&place, bytes, count, runs, doors)?;
        let doors = if doors == 1 { "one door" } else { "two doors, a thread each" };
        let scenario = format!("ingest, ack memory, {bytes} B records, {doors}");
        Note::of("engine", &scenario, "memcpy + crc64 of one core", "rate", "records/s", bounds).print();
        note(&scenario, "rate", "records/s", rates);
    }
    recovery(dir, runs)
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

/// Records per second of `doors` doors, a thread each with 32 requests in flight, random offsets, in `runs` runs of `count`
/// records each. The stage has been written to all over before, so that its memory exists, and is empty when a run begins.
/// And the bound of one core, in turn with it.
fn ingest(place: &Place, bytes: usize, count: u64, runs: usize, doors: u64) -> Result<(Vec<f64>, Vec<f64>)> {
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

/// Stages about 1 GiB of a stage of 2 GiB (the flusher starts above half), leaves it as a crash would, and opens it. In turn
/// with it, as much is read of the same file. The arena is in memory, wherever the files are.
fn recovery(dir: &Path, runs: usize) -> Result<()> {
    let arena_dir = PathBuf::from(format!("/dev/shm/tidegate-bench-{}", std::process::id()));
    let place = Place::new(dir, "native", 2 << 30, VOLUME_BYTES, AckLevel::Log, false)?;
    let engine = place.open(Some(&arena_dir))?;
    let mut client = LocalClient::new(&engine, VOLUME, 32)?;
    let data = vec![5u8; 4096];
    let mut staged = 0u64;
    while staged < 1000 << 20 {
        for tag in 0..32 {
            let request = Request { tag, kind: RequestKind::Write, offset: staged, len: 4096, fua: false };
            client.submit(request, data.clone());
            staged += 4096;
        }
        let mut open = 32;
        while open > 0 {
            client.wait(None)?;
            while client.completed().is_some() {
                open -= 1;
            }
        }
    }
    let crashed = place.crashed_copy()?;
    drop(client);
    engine.close(true)?;
    drop(engine);
    drop(place);
    let (mut first_read, mut rate, mut bounds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let copy = crashed.crashed_copy()?;
        // As after a power cut: everything is on the disk, nothing is in memory.
        let stage = FileDisk::open_to_look(&copy.dir().join("stage"))?;
        stage.sync()?;
        FileDisk::open_to_look(&copy.dir().join("backing"))?.sync()?;
        let _ = std::fs::remove_dir_all(&arena_dir);
        bounds.push(read_rate(&stage, staged)?);
        drop(stage);
        let started = Instant::now();
        let engine = copy.open(Some(&arena_dir))?;
        let mut client = LocalClient::new(&engine, VOLUME, 32)?;
        client.read(0, 4096)?;
        first_read.push(started.elapsed().as_secs_f64() * 1000.0);
        while engine.status().cold_regions > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        rate.push(staged as f64 / started.elapsed().as_secs_f64() / 1e9);
        drop(client);
        drop(engine);
    }
    let _ = std::fs::remove_dir_all(&arena_dir);
    note("recovery, about 1 GiB staged", "time to first read", "ms", first_read);
    let scenario = "recovery, about 1 GiB staged, whole log read and verified";
    Note::of("engine", scenario, "the file read from front to back", "rate", "GB/s", bounds).print();
    note(scenario, "rate", "GB/s", rate);
    Ok(())
}

/// GB/s at which the first `bytes` of a disk are read, a region's worth at a time.
fn read_rate(disk: &FileDisk, bytes: u64) -> Result<f64> {
    let mut buffer = AlignedBuf::zeroed(4 << 20);
    let started = Instant::now();
    for offset in (0..bytes).step_by(buffer.len()) {
        disk.read(offset, &mut buffer)?;
    }
    Ok(bytes as f64 / started.elapsed().as_secs_f64() / 1e9)
}
