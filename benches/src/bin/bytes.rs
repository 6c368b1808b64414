//! Measures the byte door on this machine: submissions a second, latency, and durable appends against what programs do
//! without it. Prints notes, one JSON object a line; `ROUNDS` and `SECONDS_EACH` say how much.
//!
//! Usage: bytes DIR      DIR: a folder on a real disk

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tidegate_benches::effort::{Effort, percentile};
use tidegate_benches::note::Note;
use tidegate_benches::place::filled_file;
use tidegate_benches::{Place, Served, VOLUME};
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::bytes::client::{Device, Options};
use tidegate_driver::bytes::local::LocalDevice;
use tidegate_driver::bytes::{ByteStore as _, Completion, Failure, Operation, SILENT, Submission, Ticket};
use tidegate_driver::format::volume_entry::AckLevel;
use tidegate_driver::io::AlignedBuf;
use tidegate_driver::volume::{LocalClient, Request, RequestKind};

const VOLUME_BYTES: u64 = 2 << 30;
const SIZES: [usize; 3] = [64, 512, 4096];
const DEPTHS: [u32; 3] = [1, 8, 64];
const STAND: &str = "durable appends";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir] = &args[..] else {
        eprintln!("usage: bytes DIR");
        std::process::exit(2);
    };
    if let Err(error) = measure(Path::new(dir), Effort::from_environment()) {
        eprintln!("bytes: {}", error.report());
        std::process::exit(1);
    }
}

fn failed(e: &Failure) -> Error {
    Error::new(ErrorKind::Io, e.what.clone())
}

fn client(served: &Served) -> Result<Device> {
    let options = Options { depth: 1024, arena_bytes: 16 << 20, ..Options::default() };
    Device::open(&served.socket.to_string_lossy(), &options).map_err(|e| failed(&e))
}

fn note(scenario: &str, measure: &str, unit: &str, values: Vec<f64>) {
    Note::alone("engine", scenario, measure, unit, values).print();
}

fn measure(dir: &Path, effort: Effort) -> Result<()> {
    submissions(effort)?;
    let ram = Place::new(Path::new("/dev/shm"), "local", 256 << 20, VOLUME_BYTES, AckLevel::Memory, true)?;
    in_process(&ram, effort)?;
    drop(ram);
    for size in SIZES {
        for depth in DEPTHS {
            durable(dir, size, depth, effort)?;
        }
    }
    Ok(())
}

/// Memory level through the shared rings: one client thread, one session.
fn submissions(effort: Effort) -> Result<()> {
    let place = Place::new(Path::new("/dev/shm"), "rings", 1 << 30, VOLUME_BYTES, AckLevel::Memory, true)?;
    let served = place.serve()?;
    let device = client(&served)?;
    let count = 1_000_000u64;
    let mut plain = Vec::new();
    let mut copied = Vec::new();
    let mut medians = Vec::new();
    for _ in 0..effort.runs {
        plain.push(raw_submissions(&device, count).map_err(|e| failed(&e))?);
        let started = Instant::now();
        let mut last = Ticket::NONE;
        for i in 0..count {
            last = device.write_async(i % 10_000 * 64, &[&[7; 64]], 0).map_err(|e| failed(&e))?;
        }
        while device.accepted() < last {
            std::thread::yield_now();
        }
        copied.push(count as f64 / started.elapsed().as_secs_f64());
        medians.push(one_at_a_time(&device)?);
    }
    note("64 B submissions through the shared rings, accepted", "rate", "records/s", plain);
    note("64 B copying writes through the shared rings, accepted", "rate", "records/s", copied);
    note(
        "64 B write through the shared rings, one at a time, to memory completion",
        "median time",
        "us",
        medians,
    );
    Ok(())
}

/// Median of the microseconds that a write takes to its completion.
fn one_at_a_time(device: &Device) -> Result<f64> {
    let mut samples: Vec<f64> = Vec::new();
    for i in 0..20_000u64 {
        let started = Instant::now();
        device.write(i % 1000 * 64, &[&[7; 64]], 0).map_err(|e| failed(&e))?;
        samples.push(started.elapsed().as_secs_f64() * 1e6);
    }
    samples.sort_by(f64::total_cmp);
    Ok(percentile(&samples, 0.5))
}

fn raw_submissions(device: &Device, count: u64) -> std::result::Result<f64, Failure> {
    let slot = device.alloc(64)?;
    device.put(slot, &[5; 64])?;
    let batch: Vec<Submission> = (0..32)
        .map(|i| Submission {
            operation: Operation::Write as u8,
            flags: SILENT,
            arena_offset: slot,
            offset: i * 64,
            len: 64,
            ..Submission::default()
        })
        .collect();
    let started = Instant::now();
    let mut sent = 0;
    let mut last = Ticket::NONE;
    while sent < count {
        match device.submit(&batch) {
            Ok(first) => {
                sent += batch.len() as u64;
                last = Ticket(first.0 + batch.len() as u64 - 1);
            }
            Err(e) if e.errno.0 == libc_eagain() => std::thread::yield_now(),
            Err(e) => return Err(e),
        }
    }
    while device.accepted() < last {
        std::thread::yield_now();
    }
    let rate = sent as f64 / started.elapsed().as_secs_f64();
    device.free(slot)?;
    Ok(rate)
}

fn libc_eagain() -> i32 {
    std::io::Error::from(std::io::ErrorKind::WouldBlock).raw_os_error().unwrap_or(11)
}

/// From submitting to the memory completion, with the engine in this process.
fn in_process(place: &Place, effort: Effort) -> Result<()> {
    let served = place.serve()?;
    let mut client = LocalClient::new(&served.engine, VOLUME, 1)?;
    let mut medians = Vec::new();
    for _ in 0..effort.runs {
        let mut samples = Vec::new();
        let mut data = vec![3u8; 64];
        for i in 0..100_000u64 {
            let request =
                Request { tag: 0, kind: RequestKind::Write, offset: i % 1000 * 64, len: 64, fua: false };
            let started = Instant::now();
            client.submit(request, data);
            client.batch_end();
            loop {
                if let Some(done) = client.completed() {
                    data = done.data;
                    break;
                }
                client.wait(None)?;
            }
            samples.push(started.elapsed().as_secs_f64() * 1e6);
        }
        samples.sort_by(f64::total_cmp);
        medians.push(samples[samples.len() / 2]);
    }
    note("64 B write in process, to memory completion", "median time", "us", medians);
    Ok(())
}

/// Latencies of one way to append durably, in seconds, and how long they took together.
struct Sample {
    latencies: Vec<f64>,
    span: f64,
}

const IN_PROCESS: &str = "tidegate in process";

fn durable(dir: &Path, size: usize, depth: u32, effort: Effort) -> Result<()> {
    let place = Place::new(dir, "durable", 512 << 20, VOLUME_BYTES, AckLevel::Log, true)?;
    let served = place.serve()?;
    let device = client(&served)?;
    let local = LocalDevice::open(&served.engine, VOLUME).map_err(|e| failed(&e))?;
    let file = dir.join(format!("bytes-plain-{}", std::process::id()));
    filled_file(&file, 64 << 20).map_err(|e| Error::io("cannot prepare a file", e))?;
    let mut ways: [(&str, Vec<Sample>); 4] = [
        ("tidegate", Vec::new()),
        (IN_PROCESS, Vec::new()),
        ("pwrite + fdatasync", Vec::new()),
        ("O_DIRECT RWF_DSYNC", Vec::new()),
    ];
    for _ in 0..effort.runs {
        ways[0].1.push(by_tidegate(&device, size, depth, effort.span).map_err(|e| failed(&e))?);
        if depth == 1 {
            ways[1].1.push(in_process_appends(&local, size, effort.span).map_err(|e| failed(&e))?);
        }
        ways[2].1.push(by_threads(&file, size, depth, effort.span, false));
        ways[3].1.push(by_threads(&file, size, depth, effort.span, true));
    }
    let _ = std::fs::remove_file(&file);
    for (way, samples) in ways.iter().filter(|(_, samples)| !samples.is_empty()) {
        let scenario = format!("{size} B appends, {depth} in flight");
        let rates = samples.iter().map(|s| s.latencies.len() as f64 / s.span).collect();
        Note::of(STAND, &scenario, way, "rate", "records/s", rates).print();
        for (name, part) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
            let values = samples.iter().map(|s| percentile(&s.latencies, part) * 1e6).collect();
            Note::of(STAND, &scenario, way, name, "us", values).print();
        }
    }
    Ok(())
}

/// One after the other, by the program that has the engine.
fn in_process_appends(
    device: &LocalDevice,
    size: usize,
    span: Duration,
) -> std::result::Result<Sample, Failure> {
    let data = vec![6; size];
    let mut latencies = Vec::new();
    let started = Instant::now();
    while started.elapsed() < span {
        let begun = Instant::now();
        let at = latencies.len() as u64 * size as u64 % (1 << 30);
        let ticket = device.write(at, &[&data])?;
        device.persist(ticket, None)?;
        latencies.push(begun.elapsed().as_secs_f64());
    }
    let span = started.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    Ok(Sample { latencies, span })
}

fn by_tidegate(
    device: &Device,
    size: usize,
    depth: u32,
    span: Duration,
) -> std::result::Result<Sample, Failure> {
    let slots: Vec<u32> = (0..depth).map(|_| device.alloc(size)).collect::<std::result::Result<_, _>>()?;
    let mut begun = vec![Instant::now(); depth as usize];
    let mut latencies = Vec::new();
    let mut at = 0u64;
    let started = Instant::now();
    let mut send = |cookie: usize, begun: &mut Vec<Instant>| {
        let write = Submission {
            operation: Operation::Write as u8,
            arena_offset: slots[cookie],
            offset: at,
            len: size as u64,
            cookie: cookie as u64,
            ..Submission::default()
        };
        at = (at + size as u64) % (1 << 30);
        begun[cookie] = Instant::now();
        device.submit(&[write])
    };
    for cookie in 0..depth as usize {
        send(cookie, &mut begun)?;
    }
    let mut open = depth as usize;
    let mut done = [Completion::default(); 64];
    while open > 0 {
        let count = device.reap(&mut done, None)?;
        for completion in &done[..count] {
            let cookie = completion.cookie as usize;
            latencies.push(begun[cookie].elapsed().as_secs_f64());
            if started.elapsed() < span {
                send(cookie, &mut begun)?;
            } else {
                open -= 1;
            }
        }
    }
    let span = started.elapsed().as_secs_f64();
    for slot in slots {
        device.free(slot)?;
    }
    latencies.sort_by(f64::total_cmp);
    Ok(Sample { latencies, span })
}

/// What programs do: each thread appends to its own part of a file and makes it durable.
fn by_threads(path: &Path, size: usize, threads: u32, span: Duration, direct: bool) -> Sample {
    let flags = if direct { 0o40000 } else { 0 };
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).expect("made just now");
    let count = AtomicU64::new(0);
    let started = Instant::now();
    let work = |thread: u32| {
        let mut latencies = Vec::new();
        // Direct I/O knows blocks only.
        let len = if direct { size.max(4096) } else { size };
        let mut buffer = AlignedBuf::zeroed(len);
        buffer.fill(thread as u8);
        let part = (64 << 20) / u64::from(threads);
        let mut at = 0;
        while started.elapsed() < span {
            let begun = Instant::now();
            let offset = u64::from(thread) * part + at % (part - part % len as u64);
            if direct {
                let parts = [IoSlice::new(&buffer)];
                dsync(&file, &parts, offset);
            } else {
                file.write_all_at(&buffer, offset).expect("a write");
                file.sync_data().expect("a sync");
            }
            at += len as u64;
            latencies.push(begun.elapsed().as_secs_f64());
            count.fetch_add(1, Ordering::Relaxed);
        }
        latencies
    };
    let mut latencies: Vec<f64> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        all.into_iter().flat_map(|thread| thread.join().expect("a thread")).collect()
    });
    let span = started.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    Sample { latencies, span }
}

fn dsync(file: &File, parts: &[IoSlice<'_>], offset: u64) {
    use std::os::fd::AsFd;
    let written = rustix::io::pwritev2(file.as_fd(), parts, offset, rustix::io::ReadWriteFlags::DSYNC);
    assert_eq!(written.ok(), parts.first().map(|part| part.len()), "a durable write");
}
