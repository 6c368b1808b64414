//! Carries out a number of operations of one kind, so that instructions and system calls can be counted by running it with
//! two numbers and dividing the difference. Everything is in memory, in one thread where that is possible.
//!
//! Usage: count KIND NUMBER     KIND: write-4k, write-64, read-4k, sync-4k, session-64

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::bytes::client::{Device, Options};
use tidegate_driver::bytes::gate::{Access, Gate};
use tidegate_driver::bytes::{Failure, Operation, SILENT, Submission, Ticket};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::file::FileDisk;
use tidegate_driver::volume::admin::{self, NewVolume, StageOptions};
use tidegate_driver::volume::{Engine, EngineConfig, LocalClient, Request, RequestKind};

const VOLUME_BYTES: u64 = 1 << 30;
const VOLUME: VolumeId = VolumeId(1);
/// Requests in flight.
const DEPTH: u32 = 32;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = args.get(1).and_then(|n| n.parse().ok());
    let (Some(kind), Some(number)) = (args.first(), number) else {
        eprintln!("usage: count write-4k|write-64|read-4k|sync-4k|session-64 NUMBER");
        std::process::exit(2);
    };
    if let Err(error) = count(kind, number) {
        eprintln!("count: {}", error.report());
        std::process::exit(1);
    }
}

struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open(place: &Path, ack: AckLevel) -> Result<Arc<Engine>> {
    let io = |e| Error::io("cannot prepare the files", e);
    let (stage_path, backing_path) = (place.join("stage"), place.join("backing"));
    std::fs::create_dir_all(place).map_err(io)?;
    std::fs::File::create(&stage_path).and_then(|f| f.set_len(1 << 30)).map_err(io)?;
    std::fs::File::create(&backing_path).and_then(|f| f.set_len(VOLUME_BYTES + (64 << 10))).map_err(io)?;
    let stage = Arc::new(FileDisk::open_exclusive(&stage_path)?);
    let backing = Arc::new(FileDisk::open_exclusive(&backing_path)?);
    admin::create_stage(&*stage, StageOptions::for_disk(&*stage))?;
    let new = NewVolume {
        name: "count".into(),
        size_bytes: VOLUME_BYTES,
        block_bytes: 512,
        ack,
        on_log_error: OnLogError::Stall,
        backing: String::new(),
    };
    admin::add_volume(&*stage, &*backing, new)?;
    Engine::open(EngineConfig {
        stage,
        backings: vec![(VOLUME, backing)],
        arena_dir: place.join("arena"),
        accept_loss: false,
        forget: None,
    })
}

fn count(kind: &str, number: u64) -> Result<()> {
    let place = Place(PathBuf::from(format!("/dev/shm/tidegate-count-{}", std::process::id())));
    let ack = if kind == "sync-4k" { AckLevel::Log } else { AckLevel::Memory };
    let engine = open(&place.0, ack)?;
    match kind {
        "write-4k" => local(&engine, RequestKind::Write, 4096, number, DEPTH),
        "write-64" => local(&engine, RequestKind::Write, 64, number, DEPTH),
        "sync-4k" => local(&engine, RequestKind::Write, 4096, number, 1),
        "read-4k" => {
            local(&engine, RequestKind::Write, 4096, 4096, DEPTH)?;
            local(&engine, RequestKind::Read, 4096, number, DEPTH)
        }
        "session-64" => session(&engine, &place.0.join("socket"), number),
        _ => Err(Error::new(ErrorKind::Invalid, format!("unknown kind '{kind}'"))),
    }
}

/// Requests over 16 MiB at a stride that is not the order of the bytes.
fn local(engine: &Engine, kind: RequestKind, bytes: usize, number: u64, depth: u32) -> Result<()> {
    let mut client = LocalClient::new(engine, VOLUME, depth)?;
    let mut free: Vec<(u32, Vec<u8>)> = (0..depth).map(|tag| (tag, vec![tag as u8; bytes])).collect();
    let slots = (16 << 20) / bytes as u64;
    let (mut sent, mut done) = (0, 0);
    while done < number {
        while sent < number
            && let Some((tag, data)) = free.pop()
        {
            let offset = sent * 97 % slots * bytes as u64;
            client.submit(Request { tag, kind, offset, len: bytes as u64, fua: false }, data);
            sent += 1;
        }
        client.wait(None)?;
        while let Some(completed) = client.completed() {
            completed.result.map_err(|e| Error::new(ErrorKind::Io, format!("a request failed: {e}")))?;
            free.push((completed.tag, completed.data));
            done += 1;
        }
    }
    Ok(())
}

fn session(engine: &Arc<Engine>, socket: &Path, number: u64) -> Result<()> {
    let failed = |e: Failure| Error::new(ErrorKind::Io, e.what);
    let _gate = Gate::open(engine.clone(), Arc::default(), VOLUME, socket, Access::default())?;
    let device =
        Device::open(&socket.to_string_lossy(), &Options { depth: 256, arena_bytes: 0 }).map_err(failed)?;
    let slot = device.alloc(64).map_err(failed)?;
    let mut last = Ticket::NONE;
    for round in 0..number / 128 {
        let write = |i: u64| Submission {
            operation: Operation::Write as u8,
            flags: SILENT,
            arena_offset: slot,
            offset: (round * 128 + i) * 97 % (1 << 18) * 64,
            len: 64,
            ..Submission::default()
        };
        let batch: Vec<Submission> = (0..128).map(write).collect();
        while let Err(e) = device.submit(&batch).map(|first| last = Ticket(first.0 + 127)) {
            match e.errno.into() {
                e if std::io::Error::kind(&e) == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
                _ => return Err(failed(e)),
            }
        }
    }
    device.persist(last, None).map_err(failed)
}
