//! What a `tg_log` stands for: an append log, and the session that it keeps open.

use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_driver::base::ByteRange;
use tidegate_driver::bytes::log::{AppendLog, OpenMode, Position};
use tidegate_driver::bytes::{ByteStore, Failure, Result, Ticket};

use crate::abi::{tg_device, tg_log, tg_log_flag};
use crate::handle::Table;
use crate::session::{self, Session};

static JOURNALS: Table<Journal> = Table::new(0x7e, "tg_log");

const CREATE: c_int = tg_log_flag::TG_LOG_CREATE as c_int;
const FORMAT: c_int = tg_log_flag::TG_LOG_FORMAT as c_int;

/// An open log.
pub struct Journal {
    log: AppendLog<Kept>,
}

/// A session that stays open although its handle may be closed.
struct Kept(Arc<Session>);

impl ByteStore for Kept {
    fn volume_bytes(&self) -> u64 {
        ByteStore::volume_bytes(&self.0.device())
    }

    fn write_bytes_max(&self) -> u32 {
        ByteStore::write_bytes_max(&self.0.device())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        ByteStore::read(&self.0.device(), offset, into)
    }

    fn write(&self, offset: u64, parts: &[&[u8]]) -> Result<Ticket> {
        ByteStore::write(&self.0.device(), offset, parts)
    }

    fn durable(&self) -> Ticket {
        // Not the session's own: this one stays before a change that failed.
        ByteStore::durable(&self.0.device())
    }

    fn persist(&self, ticket: Ticket, timeout: Option<Duration>) -> Result<()> {
        ByteStore::persist(&self.0.device(), ticket, timeout)
    }
}

/// Opens the log in a range of a session's volume and gives it a handle.
pub fn open(device: *mut tg_device, base: u64, length: u64, flags: c_int) -> Result<*mut tg_log> {
    let session = session::find(device)?;
    let invalid = |what: String| Failure::new(libc::EINVAL, what);
    if flags & !(CREATE | FORMAT) != 0 {
        return Err(invalid(format!("flags {flags:#x}: 0, TG_LOG_CREATE or TG_LOG_FORMAT")));
    }
    let mode = match (flags & CREATE != 0, flags & FORMAT != 0) {
        (_, true) => OpenMode::Format,
        (true, false) => OpenMode::CreateIfMissing,
        (false, false) => OpenMode::MustExist,
    };
    let end = base.checked_add(length);
    let end =
        end.ok_or_else(|| invalid(format!("{length} bytes from byte {base} on: no volume is so large")))?;
    let log = AppendLog::open(Kept(session), ByteRange { start: base, end }, mode)?;
    JOURNALS.insert(Arc::new(Journal { log })).map(ptr::without_provenance_mut)
}

/// What the handle stands for.
pub fn find(log: *mut tg_log) -> Result<Arc<Journal>> {
    JOURNALS.find(log.addr())
}

/// Makes the handle invalid.
pub fn close(log: *mut tg_log) -> Result<()> {
    // While another thread is in a call the hint is not written: the next opening looks a little longer.
    Arc::into_inner(JOURNALS.remove(log.addr())?).map_or(Ok(()), |journal| journal.log.close())
}

impl Journal {
    /// Appends an entry of these parts: its position and ticket.
    pub fn append(&self, parts: &[&[u8]]) -> Result<(u64, u64)> {
        self.log.append(parts).map(|(position, ticket)| (position.0, ticket.0))
    }

    /// Waits until the entry at a position is durable.
    pub fn persist(&self, position: u64, timeout_ns: i64) -> Result<()> {
        self.log.persist(Position(position), u64::try_from(timeout_ns).ok().map(Duration::from_nanos))
    }

    /// Reads the entry at a position: its length, and the position of the next.
    pub fn read(&self, position: u64, into: &mut [u8]) -> Result<(i64, u64)> {
        let mut payload = Vec::new();
        let Some(next) = self.log.read(Position(position), &mut payload)? else { return Ok((0, position)) };
        let Some(into) = into.get_mut(..payload.len()) else {
            let what = format!(
                "the entry at {position} has {} bytes, there is room for {}",
                payload.len(),
                into.len()
            );
            return Err(Failure::new(libc::EMSGSIZE, what));
        };
        into.copy_from_slice(&payload);
        Ok((payload.len() as i64, next.0))
    }

    /// Length of the entry at a position; 0 at the tail.
    pub fn entry_bytes(&self, position: u64) -> Result<i64> {
        Ok(self.log.payload_bytes(Position(position))?.unwrap_or(0) as i64)
    }

    /// Longest entry.
    pub fn entry_bytes_max(&self) -> i64 {
        self.log.payload_bytes_max() as i64
    }

    /// Drops the entries before a position.
    pub fn truncate(&self, position: u64) -> Result<()> {
        self.log.truncate(Position(position)).map(|_| ())
    }

    /// Position of the first entry, and of the next append.
    pub fn bounds(&self) -> (u64, u64) {
        let (head, tail) = self.log.bounds();
        (head.0, tail.0)
    }
}
