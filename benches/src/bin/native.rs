//! Measures the engine alone, on this machine, without a kernel block device: ingest, recovery, time to first read.
//! Prints one JSON object a line: name, unit, median, lowest, highest, runs.
//!
//! Usage: native DIR      DIR: where stage and backing files go (a disk, or a tmpfs to leave the disk out of it)

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tidegate_driver::base::checksum::crc64;
use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::file::FileDisk;
use tidegate_driver::volume::admin::{self, NewVolume, StageOptions};
use tidegate_driver::volume::{Engine, EngineConfig, LocalClient, Request, RequestKind};

const RUNS: usize = 5;
const VOLUME_BYTES: u64 = 8 << 30;
const VOLUME: VolumeId = VolumeId(1);

fn main() {
    let Some(dir) = std::env::args().nth(1) else {
        eprintln!("usage: native DIR");
        std::process::exit(2);
    };
    if let Err(error) = measure(Path::new(&dir)) {
        eprintln!("native: {}", error.report());
        std::process::exit(1);
    }
}

fn measure(dir: &Path) -> Result<()> {
    report("memcpy+crc64 bound, 4 KiB records", "records/s", (0..RUNS).map(|_| bound(4096)).collect());
    for (bytes, count) in [(4096usize, 100_000u64), (64, 400_000)] {
        let place = Place::new(dir, 1 << 30, AckLevel::Memory)?;
        let rates = (0..RUNS).map(|_| place.ingest(bytes, count)).collect::<Result<Vec<_>>>()?;
        report(&format!("ingest, ack memory, {bytes} B records, one door"), "records/s", rates);
    }
    recovery(dir)
}

fn report(name: &str, unit: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let line = serde_json::json!({
        "name": name, "unit": unit, "median": values[values.len() / 2], "lowest": values[0],
        "highest": values[values.len() - 1], "runs": values.len(),
    });
    println!("{line}");
}

/// Records per second that copying and checksumming alone would allow, on memory as cold as the arena's.
fn bound(bytes: usize) -> f64 {
    let count = (256 << 20) / bytes;
    let source = vec![7u8; bytes];
    let mut target = vec![1u8; count * bytes];
    let started = Instant::now();
    let mut sum = 0u64;
    for chunk in target.chunks_exact_mut(bytes) {
        chunk.copy_from_slice(&source);
        sum ^= crc64(chunk);
    }
    std::hint::black_box(sum);
    count as f64 / started.elapsed().as_secs_f64()
}

struct Place {
    dir: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Place {
    fn new(dir: &Path, stage_bytes: u64, ack: AckLevel) -> Result<Place> {
        let place = Place { dir: dir.join(format!("native-{}", std::process::id())) };
        let io = |e| Error::io("cannot prepare the files", e);
        std::fs::create_dir_all(&place.dir).map_err(io)?;
        std::fs::File::create(place.dir.join("stage")).and_then(|f| f.set_len(stage_bytes)).map_err(io)?;
        std::fs::File::create(place.dir.join("backing"))
            .and_then(|f| f.set_len(VOLUME_BYTES + (64 << 10)))
            .map_err(io)?;
        let stage = FileDisk::open_exclusive(&place.dir.join("stage"))?;
        let backing = FileDisk::open_exclusive(&place.dir.join("backing"))?;
        admin::create_stage(&stage, StageOptions::for_disk(&stage))?;
        let new = NewVolume {
            name: "bench".into(),
            size_bytes: VOLUME_BYTES,
            block_bytes: 512,
            ack,
            on_log_error: OnLogError::Stall,
            backing: String::new(),
        };
        admin::add_volume(&stage, &backing, new)?;
        Ok(place)
    }

    fn open(&self) -> Result<Arc<Engine>> {
        Engine::open(EngineConfig {
            stage: Arc::new(FileDisk::open_exclusive(&self.dir.join("stage"))?),
            backings: vec![(VOLUME, Arc::new(FileDisk::open_exclusive(&self.dir.join("backing"))?))],
            arena_dir: self.dir.join("arena"),
            accept_loss: true,
            forget: None,
        })
    }

    /// Records per second of one door that has 32 requests in flight, random offsets.
    fn ingest(&self, bytes: usize, count: u64) -> Result<f64> {
        let engine = self.open()?;
        let mut client = LocalClient::new(&engine, VOLUME, 32)?;
        let mut free: Vec<(u32, Vec<u8>)> = (0..32).map(|tag| (tag, vec![tag as u8; bytes])).collect();
        let mut offset = 1u64;
        let slots = VOLUME_BYTES / bytes as u64;
        let (mut sent, mut done) = (0, 0);
        let started = Instant::now();
        while done < count {
            while sent < count
                && let Some((tag, data)) = free.pop()
            {
                offset =
                    offset.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
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
        let rate = count as f64 / started.elapsed().as_secs_f64();
        drop(client);
        engine.close(true)?;
        Ok(rate)
    }

    /// Copies the files as a server that died would leave them, without its arena.
    fn crashed_copy(&self) -> Result<Place> {
        let mut name = self.dir.file_name().unwrap_or_default().to_owned();
        name.push("-copy");
        let place = Place { dir: self.dir.with_file_name(name) };
        let io = |e| Error::io("cannot copy the files", e);
        std::fs::create_dir_all(&place.dir).map_err(io)?;
        let files = [self.dir.join("stage"), self.dir.join("backing")];
        // The backing is nearly all hole.
        let status =
            std::process::Command::new("cp").arg("--sparse=always").args(files).arg(&place.dir).status();
        match status.map_err(io)?.success() {
            true => Ok(place),
            false => Err(Error::new(ErrorKind::Io, "cannot copy the files")),
        }
    }
}

/// Fills half of a stage of 1 GiB (the flusher starts above that) twice over, leaves it as a crash would, and opens it.
fn recovery(dir: &Path) -> Result<()> {
    let place = Place::new(dir, 2 << 30, AckLevel::Log)?;
    let engine = place.open()?;
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
    let (mut first_read, mut rate) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let copy = crashed.crashed_copy()?;
        let started = Instant::now();
        let engine = copy.open()?;
        let mut client = LocalClient::new(&engine, VOLUME, 32)?;
        client.read(0, 4096)?;
        first_read.push(started.elapsed().as_secs_f64() * 1000.0);
        while engine.status().cold_regions > 0 {
            std::thread::yield_now();
        }
        rate.push(staged as f64 / started.elapsed().as_secs_f64() / 1e9);
        drop(client);
        drop(engine);
    }
    report("recovery, about 1 GiB staged: time to first read", "ms", first_read);
    report("recovery, about 1 GiB staged: whole log read and verified", "GB/s", rate);
    Ok(())
}
