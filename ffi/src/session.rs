//! What a `tg_device` stands for: a session, checked against what C can get wrong.

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tidegate_driver::bytes::client::{Begun, Device, Options};
use tidegate_driver::bytes::{
    Completion, DURABLE, Failure, Info, Operation, Result, SILENT, Submission, Ticket,
};
use tidegate_driver::format::volume_entry::AckLevel;

use crate::abi::{
    TG_AFTER_MAX, tg_ack, tg_completion, tg_device, tg_info, tg_open_flag, tg_options, tg_submission,
};
use crate::handle::Table;
use crate::memory::{Array, Room};
use crate::reaper::{self, Reaper};

/// Longest time in which a call that waits does not look whether its session was closed.
pub const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Batches up to this length, and completions in one go, need no allocation.
const BATCH: usize = 32;

static SESSIONS: Table<Session> = Table::new(0x7d, "tg_device");

/// An open session.
pub struct Session {
    device: Device,
    /// Where the arena begins, and its size.
    arena: (usize, usize),
    depth: usize,
    write_bytes_max: u64,
    is_closed: AtomicBool,
    /// Hands completions to the program's callback.
    reaper: OnceLock<Reaper>,
}

fn invalid(what: impl Into<String>) -> Failure {
    Failure::new(libc::EINVAL, what)
}

/// Opens a session and gives it a handle.
pub fn open(target: &str, options: &tg_options) -> Result<*mut tg_device> {
    reaper::watch_forks();
    const SOLE_WRITER: u32 = tg_open_flag::TG_SOLE_WRITER as u32;
    let tg_options { depth, arena_bytes, flags, .. } = *options;
    if flags & !SOLE_WRITER != 0 {
        return Err(invalid(format!("flags {flags:#x}: 0 or TG_SOLE_WRITER")));
    }
    let sole_writer = flags & SOLE_WRITER != 0;
    let device = Device::open(target, &Options { depth, arena_bytes, sole_writer })?;
    let info = device.info();
    let (start, bytes) = device.arena();
    let session = Arc::new(Session {
        device,
        arena: (start.addr(), bytes),
        depth: info.depth as usize,
        write_bytes_max: u64::from(info.write_bytes_max),
        is_closed: AtomicBool::new(false),
        reaper: OnceLock::new(),
    });
    if options.callback.is_some() {
        let reaper = Reaper::start(&session, options.callback, options.context)?;
        session.reaper.get_or_init(|| reaper);
    }
    SESSIONS.insert(Arc::clone(&session)).map(ptr::without_provenance_mut).inspect_err(|_| session.end())
}

/// What the handle stands for.
pub fn find(device: *mut tg_device) -> Result<Arc<Session>> {
    SESSIONS.find(device.addr())
}

/// One of the session's words: a ticket, 0 if it has none yet.
pub fn ticket(device: *mut tg_device, word: impl FnOnce(&Device) -> Ticket) -> Result<u64> {
    let ticket = SESSIONS.look(device.addr(), |session| word(&session.device))?;
    Ok(if ticket.sequence() == 0 { 0 } else { ticket.0 })
}

/// Makes the handle invalid and ends the session as soon as no call uses it any more.
pub fn close(device: *mut tg_device) -> Result<()> {
    SESSIONS.remove(device.addr())?.end();
    Ok(())
}

impl Session {
    fn end(&self) {
        self.is_closed.store(true, Ordering::Release);
        if let Some(reaper) = self.reaper.get() {
            reaper.join();
        }
    }

    /// The session of the driver.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether its handle is invalid.
    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// For `tg_get_info`; the size is not set.
    pub fn info_image(&self) -> tg_info {
        let Info { name, volume_bytes, write_bytes_max, depth, arena_bytes, ack, stage_uuid, volume_uuid } =
            self.device.info();
        let mut field: [c_char; 72] = [0; 72];
        let last = field.len() - 1;
        field[..last].iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = byte as c_char);
        let ack = match ack {
            AckLevel::Memory => tg_ack::TG_ACK_MEMORY,
            AckLevel::Log => tg_ack::TG_ACK_LOG,
        };
        tg_info {
            size: 0,
            depth,
            volume_bytes,
            write_bytes_max,
            arena_bytes,
            ack: ack as u32,
            reserved: 0,
            arena: self.device.arena().0.cast(),
            stage_uuid: stage_uuid.into_bytes(),
            volume_uuid: volume_uuid.into_bytes(),
            name: field,
        }
    }

    /// Takes some of the arena.
    pub fn alloc(&self, len: usize) -> Result<*mut c_void> {
        let at = self.device.alloc(len)?;
        Ok(self.device.arena().0.wrapping_add(at as usize).cast())
    }

    /// Gives it back.
    pub fn free(&self, data: *mut c_void) -> Result<()> {
        if data.is_null() {
            return Err(Failure::new(libc::EFAULT, "'data' is NULL"));
        }
        self.device.free(self.arena_offset(data, 1)?)
    }

    /// Where in the arena `len` bytes at `data` are.
    fn arena_offset(&self, data: *const c_void, len: u64) -> Result<u32> {
        let (start, bytes) = self.arena;
        let at = data.addr().wrapping_sub(start);
        if at < bytes && len <= (bytes - at) as u64 {
            return Ok(at as u32);
        }
        Err(invalid(format!("the {len} bytes at {data:p} are not in the arena: {bytes} bytes at {start:#x}")))
    }

    /// For `poll`.
    pub fn event_fd(&self) -> Result<i32> {
        self.without_callback("tg_event_fd")?;
        Ok(self.device.event_fd().as_raw_fd())
    }

    fn without_callback(&self, call: &str) -> Result<()> {
        match self.reaper.get() {
            Some(_) => Err(invalid(format!("{call}: the completions of this session go to its callback"))),
            None => Ok(()),
        }
    }

    /// Submits all of them or none.
    pub fn submit(&self, batch: Array<tg_submission>) -> Result<u64> {
        let count = batch.count();
        if count > self.depth {
            return Err(invalid(format!("{count} submissions are more than the depth, {}", self.depth)));
        }
        let (mut few, mut many) = ([Submission::default(); BATCH], Vec::new());
        let submissions = match few.get_mut(..count) {
            Some(few) => few,
            None => {
                many.resize(count, Submission::default());
                &mut many[..]
            }
        };
        for (at, to) in submissions.iter_mut().enumerate() {
            *to = self.checked(&batch.get(at)).map_err(|Failure { errno, what }| Failure {
                errno,
                what: if count == 1 { what } else { format!("submission {at} of {count}: {what}") },
            })?;
        }
        Ok(self.device.submit(submissions)?.0)
    }

    fn checked(&self, it: &tg_submission) -> Result<Submission> {
        let Some(operation) = Operation::from_code(it.operation) else {
            return Err(invalid(format!("there is no operation {}", it.operation)));
        };
        let is_change = matches!(operation, Operation::Write | Operation::WriteZeroes | Operation::Discard);
        let flags = if is_change { DURABLE | SILENT } else { 0 };
        if it.flags & !flags != 0 {
            return Err(invalid(format!("flags {:#x} for a {operation:?}: it knows {flags:#x}", it.flags)));
        }
        if it.reserved != 0 || it.reserved2 != 0 {
            return Err(invalid("a reserved field is not 0"));
        }
        let arena_offset = match operation {
            Operation::Read | Operation::Write => {
                self.transfer(it.length)?;
                if it.data.is_null() {
                    return Err(Failure::new(libc::EFAULT, "'data' is NULL"));
                }
                self.arena_offset(it.data, it.length)?
            }
            _ if !it.data.is_null() => return Err(invalid(format!("a {operation:?} has no data"))),
            Operation::Flush | Operation::Barrier if (it.offset, it.length) != (0, 0) => {
                return Err(invalid(format!("a {operation:?} has no range")));
            }
            Operation::WriteZeroes | Operation::Discard if it.length == 0 => {
                return Err(invalid("the length is 0"));
            }
            _ => 0,
        };
        let mut after = [Ticket::NONE; TG_AFTER_MAX];
        after.iter_mut().zip(it.after).for_each(|(to, ticket)| *to = Ticket(ticket));
        Ok(Submission {
            operation: it.operation,
            flags: it.flags,
            arena_offset,
            offset: it.offset,
            len: it.length,
            cookie: it.cookie,
            after,
        })
    }

    fn transfer(&self, len: u64) -> Result<()> {
        if (1..=self.write_bytes_max).contains(&len) {
            return Ok(());
        }
        let errno = if len == 0 { libc::EINVAL } else { libc::EMSGSIZE };
        Err(Failure::new(errno, format!("the length is {len}: it may be 1 to {}", self.write_bytes_max)))
    }

    /// Takes completions, waiting for the first.
    pub fn reap(&self, room: &mut Room<tg_completion>, timeout_ns: i64) -> Result<i64> {
        self.without_callback("tg_reap")?;
        let mut some = [Completion::default(); BATCH];
        let begun = self.device.begin();
        let mut more = self.reap_first(&mut some[..room.count().min(BATCH)], timeout_ns, begun)?;
        let mut count = 0;
        loop {
            (0..more).for_each(|at| room.put(count + at, image(&some[at])));
            count += more;
            let next = (room.count() - count).min(BATCH);
            if more < BATCH || next == 0 {
                return Ok(count as i64);
            }
            // What fails now is told by the next call.
            more = self.device.reap(&mut some[..next], Some(Duration::ZERO)).unwrap_or(0);
        }
    }

    /// Waits in short pieces, so that a session that is closed meanwhile is left soon.
    fn reap_first(&self, into: &mut [Completion], timeout_ns: i64, begun: Begun) -> Result<usize> {
        let timeout = u64::try_from(timeout_ns).ok().map(Duration::from_nanos);
        let start = Instant::now();
        loop {
            let left = timeout.map_or(Duration::MAX, |timeout| timeout.saturating_sub(start.elapsed()));
            let count = self.device.reap_within(into, Some(left.min(LOOK_EVERY)), begun)?;
            if count > 0 || left <= LOOK_EVERY {
                return Ok(count);
            }
            if self.is_closed() {
                return Err(Failure::new(libc::EBADF, "the tg_device was closed while this call waited"));
            }
        }
    }

    /// Waits until everything up to a ticket is durable.
    pub fn persist(&self, ticket: u64, timeout_ns: i64) -> Result<()> {
        self.device.persist(Ticket(ticket), u64::try_from(timeout_ns).ok().map(Duration::from_nanos))
    }

    /// One atomic write of `parts`; waits.
    pub fn write(&self, offset: u64, parts: &[&[u8]], flags: c_int) -> Result<u64> {
        self.device.write(offset, self.payload(parts)?, plain(flags)?).map(|ticket| ticket.0)
    }

    /// The same; waits until the payload was taken over only.
    pub fn write_async(&self, offset: u64, parts: &[&[u8]], flags: c_int) -> Result<u64> {
        self.device.write_async(offset, self.payload(parts)?, plain(flags)?).map(|ticket| ticket.0)
    }

    fn payload<'a>(&self, parts: &'a [&'a [u8]]) -> Result<&'a [&'a [u8]]> {
        // A sum cannot be that large, unless parts are the same bytes many times.
        self.transfer(parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.len() as u64)))?;
        Ok(parts)
    }

    /// Reads.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        if offset.checked_add(into.len() as u64).is_none() {
            return Err(Failure::new(libc::ERANGE, "the range is not within any volume"));
        }
        self.device.read(offset, into)
    }

    /// Makes a range zero.
    pub fn write_zeroes(&self, offset: u64, len: u64, flags: c_int) -> Result<u64> {
        some(len)?;
        self.device.write_zeroes(offset, len, plain(flags)?).map(|ticket| ticket.0)
    }

    /// A range is no longer needed.
    pub fn discard(&self, offset: u64, len: u64) -> Result<u64> {
        some(len)?;
        self.device.discard(offset, len).map(|ticket| ticket.0)
    }

    /// Waits until everything is durable.
    pub fn flush(&self) -> Result<()> {
        self.device.flush()
    }
}

fn some(len: u64) -> Result<()> {
    if len == 0 { Err(invalid("the length is 0")) } else { Ok(()) }
}

/// Flags of a call that tells itself how it ended.
fn plain(flags: c_int) -> Result<u8> {
    match u8::try_from(flags) {
        Ok(flags @ (0 | DURABLE)) => Ok(flags),
        _ => Err(invalid(format!("flags {flags:#x}: 0 or TG_DURABLE"))),
    }
}

/// A completion as C sees it.
pub fn image(it: &Completion) -> tg_completion {
    tg_completion { cookie: it.cookie, ticket: it.ticket.0, lsn: it.lsn, result: it.result, reserved: 0 }
}
