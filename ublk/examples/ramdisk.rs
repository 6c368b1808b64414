//! A ublk device without an engine behind it, for tests and measurements of the front end alone.
//!
//! | `--door` | writes go to | survives the server's death |
//! |---|---|---|
//! | `null` | nowhere; reads leave the memory of the client as it is (never use it for data) | – |
//! | `ram` | a mapped file (on tmpfs: memory) | if `--file` does |
//! | `file` | a file or block device, through the reactor | yes |
//!
//! Prints `ready ID PATH` when the device is live, then obeys lines on its input: `stop`, `force`, `resize BYTES`, `use`,
//! `quiesce`, `exit` (leaves the device to be recovered). Answers `ok …` or `error KIND …`. The end of the input is ignored.

#![expect(unsafe_code, reason = "maps the file that holds the data")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::io::uring::{Reactor, TargetOptions};
use tidegate_driver::io::{AlignedBuf, Done, Errno, Memory, Op, OpKind, Target, Token};
use tidegate_driver::volume::{Door, DoorIo, Request, RequestKind, Wake};
use tidegate_ublk::process::harden;
use tidegate_ublk::{Device, DeviceConfig, DoorFactory, QueueIo, Start, StopMode};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DoorKind {
    Null,
    Ram,
    File,
}

#[derive(Parser)]
struct Args {
    #[arg(long, value_enum, default_value = "ram")]
    door: DoorKind,
    /// Holds the data; made if missing.
    #[arg(long)]
    file: Option<PathBuf>,
    /// Size in MiB.
    #[arg(long, default_value_t = 256)]
    size_mib: u64,
    /// MiB to leave room for (resize).
    #[arg(long, default_value_t = 0)]
    spare_mib: u64,
    #[arg(long, default_value_t = 1)]
    queues: u16,
    #[arg(long, default_value_t = 128)]
    depth: u16,
    #[arg(long, default_value_t = 512)]
    block: u32,
    #[arg(long, default_value_t = 1 << 20)]
    max_io: u32,
    /// Plain copy even where there is user copy.
    #[arg(long)]
    copy: bool,
    #[arg(long)]
    volatile_cache: bool,
    /// Open `--file` with O_DIRECT (door `file`).
    #[arg(long)]
    direct: bool,
    /// Recover this device.
    #[arg(long)]
    recover: Option<u32>,
    #[arg(long, default_value_t = 0x7469_6465)]
    identity: u64,
    /// Hold every request back this long, in milliseconds, so that some are in flight at a kill (doors `null`, `ram`).
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// The door of this queue cannot be opened.
    #[arg(long)]
    fail_queue: Option<u16>,
}

/// The data, mapped.
struct Map {
    base: *mut u8,
    len: usize,
}

// SAFETY: plain memory; requests of different queues that overlap race as on any disk.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(file: &File, len: usize) -> Result<Map> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(Error::io("cannot map the file", std::io::Error::last_os_error()));
        }
        Ok(Map { base: base.cast(), len })
    }

    #[expect(clippy::mut_from_ref, reason = "a disk: whoever overlaps races")]
    fn bytes(&self, offset: u64, len: u64) -> Option<&mut [u8]> {
        let end = offset.checked_add(len)?;
        if end > self.len as u64 {
            return None;
        }
        // SAFETY: within the mapping, which is never unmapped.
        Some(unsafe { std::slice::from_raw_parts_mut(self.base.add(offset as usize), len as usize) })
    }
}

struct Factory {
    kind: DoorKind,
    map: Option<Map>,
    file: Option<Arc<File>>,
    options: TargetOptions,
    delay: Duration,
    fail_queue: Option<u16>,
}

struct TestDoor {
    factory: &'static Factory,
    in_flight: Vec<Option<Request>>,
}

const TARGET: Target = Target::Backing(VolumeId(0));

impl DoorFactory for &'static Factory {
    type Door = TestDoor;

    fn open(&self, queue: u16, _waker: Arc<dyn Wake>, reactor: &mut Reactor) -> Result<TestDoor> {
        if self.fail_queue == Some(queue) {
            return Err(Error::new(ErrorKind::Io, "told to fail"));
        }
        if let (DoorKind::File, Some(file)) = (self.kind, &self.file) {
            reactor.register(TARGET, Arc::clone(file), self.options)?;
        }
        Ok(TestDoor { factory: self, in_flight: vec![None; 4096] })
    }
}

impl TestDoor {
    fn ram(&self, map: &Map, request: Request, io: &mut QueueIo) -> std::result::Result<(), Errno> {
        let bytes = map.bytes(request.offset, request.len).ok_or(Errno::EIO)?;
        match request.kind {
            RequestKind::Read => io.deliver(request.tag, 0, bytes),
            RequestKind::Write => {
                // In two parts, so that offsets within a request are tested.
                let (first, rest) = bytes.split_at_mut(bytes.len() / 1024 * 512);
                io.fetch(request.tag, first.len() as u32, rest)?;
                io.fetch(request.tag, 0, first)
            }
            RequestKind::WriteZeroes | RequestKind::Discard => {
                bytes.fill(0);
                Ok(())
            }
            RequestKind::Flush => Ok(()),
        }
    }

    fn start(&mut self, request: Request, io: &mut QueueIo) -> std::result::Result<(), Errno> {
        let kind = match request.kind {
            RequestKind::Read => OpKind::Read,
            RequestKind::Write if request.fua => OpKind::WriteDurable,
            RequestKind::Write => OpKind::Write,
            RequestKind::WriteZeroes => OpKind::WriteZeroes,
            RequestKind::Discard => OpKind::Discard,
            RequestKind::Flush => OpKind::Sync,
        };
        let memory = match request.kind {
            RequestKind::Read => Memory::Owned(AlignedBuf::zeroed(request.len as usize)),
            RequestKind::Write => {
                let mut buf = AlignedBuf::zeroed(request.len as usize);
                io.fetch(request.tag, 0, &mut buf)?;
                Memory::Owned(buf)
            }
            _ => Memory::None,
        };
        self.in_flight[request.tag as usize] = Some(request);
        let (token, offset, len) = (Token(u64::from(request.tag)), request.offset, request.len);
        io.submit(Op { token, target: TARGET, kind, offset, len, memory });
        Ok(())
    }
}

impl Door<QueueIo> for TestDoor {
    fn request(&mut self, request: Request, io: &mut QueueIo) {
        let factory = self.factory;
        if !factory.delay.is_zero() {
            std::thread::sleep(factory.delay);
        }
        match (factory.kind, &factory.map) {
            (DoorKind::File, _) => {
                if let Err(errno) = self.start(request, io) {
                    io.complete(request.tag, Err(errno));
                }
            }
            (_, Some(map)) => {
                let result = self.ram(map, request, io);
                io.complete(request.tag, result);
            }
            (_, None) => io.complete(request.tag, Ok(())),
        }
    }

    fn op_done(&mut self, done: Done, io: &mut QueueIo) {
        let request = self.in_flight[done.token.0 as usize].take().expect("one completion for each request");
        let mut result = done.result;
        if let (RequestKind::Read, Ok(()), Memory::Owned(buf)) = (request.kind, result, &done.memory) {
            result = io.deliver(request.tag, 0, buf);
        }
        io.complete(request.tag, result);
    }

    fn woken(&mut self, _io: &mut QueueIo) {}

    fn batch_end(&mut self, _io: &mut QueueIo) {}
}

fn open_data(args: &Args) -> Result<(Option<Arc<File>>, TargetOptions)> {
    let mut options = TargetOptions { direct: args.direct, is_block_device: false };
    let Some(path) = &args.file else {
        return Ok((None, options));
    };
    let flags = if args.direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(flags)
        .open(path)
        .map_err(|e| Error::io(format!("cannot open {}", path.display()), e))?;
    let metadata = file.metadata().map_err(|e| Error::io("cannot stat", e))?;
    options.is_block_device = metadata.file_type().is_block_device();
    let len = (args.size_mib + args.spare_mib) << 20;
    if !options.is_block_device && metadata.len() < len {
        file.set_len(len).map_err(|e| Error::io("cannot extend the file", e))?;
    }
    Ok((Some(Arc::new(file)), options))
}

fn run(args: &Args) -> Result<()> {
    let (file, options) = open_data(args)?;
    let map = match (&file, args.door) {
        (Some(file), DoorKind::Ram) => {
            Some(Map::new(file, ((args.size_mib + args.spare_mib) << 20) as usize)?)
        }
        (None, DoorKind::Ram | DoorKind::File) => {
            return Err(Error::new(ErrorKind::Invalid, "this door needs --file"));
        }
        _ => None,
    };
    let delay = Duration::from_millis(args.delay_ms);
    let factory: &'static Factory = Box::leak(Box::new(Factory {
        kind: args.door,
        map,
        file,
        options,
        delay,
        fail_queue: args.fail_queue,
    }));
    let config = DeviceConfig {
        size_bytes: args.size_mib << 20,
        logical_block_bytes: args.block,
        queues: args.queues,
        depth: args.depth,
        max_io_bytes: args.max_io,
        volatile_cache: args.volatile_cache,
        identity: args.identity,
        force_copy: args.copy,
        ..DeviceConfig::default()
    };
    let start = args.recover.map_or(Start::New, |device_id| Start::Recover { device_id });
    let mut device = Device::start(&config, start, Arc::new(factory))?;
    say(&format!("ready {} {} user_copy={}", device.id(), device.path().display(), device.user_copy()));
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("cannot read the input", e))?;
        let mut words = line.split_whitespace();
        let outcome = match words.next() {
            Some("stop") => device.stop(StopMode::RefuseIfOpen).map(|()| "stopped".to_owned()),
            Some("force") => device.stop(StopMode::Force).map(|()| "stopped".to_owned()),
            Some("quiesce") => device.quiesce(Duration::from_secs(10)).map(|()| "quiesced".to_owned()),
            Some("resize") => {
                let bytes = words.next().and_then(|w| w.parse().ok()).unwrap_or(0);
                device.resize(bytes).map(|()| bytes.to_string())
            }
            Some("use") => device.in_use().map(|user| user.unwrap_or_else(|| "nobody".to_owned())),
            Some("exit") => return Ok(()),
            _ => Err(Error::new(ErrorKind::Invalid, "unknown command")),
        };
        let over = device.ended();
        match outcome {
            Ok(answer) => say(&format!("ok {answer}")),
            Err(e) => say(&format!("error {:?} {}", e.kind(), e.report())),
        }
        if over {
            return Ok(());
        }
    }
    loop {
        std::thread::park();
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Whoever listened may be gone; the device is still served.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    for warning in harden().warnings {
        tracing::warn!("{warning}");
    }
    if let Err(e) = run(&Args::parse()) {
        say(&format!("error {:?} {}", e.kind(), e.report()));
        std::process::exit(1);
    }
}
