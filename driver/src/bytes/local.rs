//! The byte door for a program that has the engine in its own process: no rings, no other thread between a write and its
//! place in the log.
//!
//! Tickets are LSNs of the stage. A write is in the arena when the call returns. Where there is no place for it yet (a full
//! stage, pacing, a log that fails, a read that must not be overtaken) the call waits. The program's calls also drive what
//! the device does for it and for others, so a program that has nothing to write for a while calls
//! [`LocalDevice::persist`] first.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use super::{ByteStore, Failure, Result, Ticket};
use crate::base::{Error, Lsn, VolumeId};
use crate::io::Errno;
use crate::volume::{Engine, LocalClient, Request, RequestKind};

/// Requests in flight.
const DEPTH: u32 = 256;
/// After so many writes the log and what else is due get their turn.
const TURN_EVERY: u32 = 64;
/// How often a wait with a deadline looks at the clock.
const LOOK: Duration = Duration::from_millis(10);

/// A volume, in process. Stays on the thread that made it.
pub struct LocalDevice {
    inner: RefCell<Inner>,
}

struct Inner {
    client: LocalClient,
    free: Vec<u32>,
    /// Memory to copy into when a write has to wait for its place.
    spare: Vec<Vec<u8>>,
    since_turn: u32,
    last: Ticket,
    /// The change that waits for its place, and the place if it has completed meanwhile.
    awaited: Option<(u32, Option<Lsn>)>,
    /// The first change that failed: from then on nothing is promised any more.
    failed: Option<Errno>,
}

fn failure(e: &Error) -> Failure {
    Failure::new(libc::EIO, e.report())
}

impl LocalDevice {
    /// Opens `volume` of an engine of this process.
    pub fn open(engine: &Engine, volume: VolumeId) -> Result<LocalDevice> {
        let client = LocalClient::new(engine, volume, DEPTH).map_err(|e| failure(&e))?;
        let free = (0..DEPTH).rev().collect();
        let inner = Inner {
            client,
            free,
            spare: Vec::new(),
            since_turn: 0,
            last: Ticket::NONE,
            awaited: None,
            failed: None,
        };
        Ok(LocalDevice { inner: RefCell::new(inner) })
    }

    /// Makes a range zero, as one record.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<Ticket> {
        self.inner.borrow_mut().change(RequestKind::WriteZeroes, offset, len, &[])
    }

    /// Says that a range is no longer needed.
    pub fn discard(&self, offset: u64, len: u64) -> Result<Ticket> {
        self.inner.borrow_mut().change(RequestKind::Discard, offset, len, &[])
    }

    /// Every change up to this ticket is accepted.
    #[must_use]
    pub fn accepted(&self) -> Ticket {
        Ticket(self.inner.borrow().client.progress().0.0)
    }

    /// The log and what else is due get their turn; completions are taken. Does not wait.
    pub fn turn(&self) -> Result<()> {
        self.inner.borrow_mut().turn(Some(Duration::ZERO))
    }
}

impl Inner {
    fn turn(&mut self, timeout: Option<Duration>) -> Result<()> {
        self.since_turn = 0;
        self.client.wait(timeout).map_err(|e| failure(&e))?;
        self.take();
        Ok(())
    }

    fn take(&mut self) {
        while let Some(done) = self.client.completed() {
            self.free.push(done.tag);
            if let Some((_, place)) = self.awaited.as_mut().filter(|(tag, _)| *tag == done.tag) {
                *place = done.place;
            }
            if let Err(errno) = done.result {
                self.failed.get_or_insert(errno);
            }
            if done.data.capacity() > 0 && self.spare.len() < DEPTH as usize {
                self.spare.push(done.data);
            }
        }
    }

    fn tag(&mut self) -> Result<u32> {
        loop {
            if let Some(tag) = self.free.pop() {
                return Ok(tag);
            }
            self.turn(None)?;
        }
    }

    fn told(&self) -> Result<()> {
        match self.failed {
            None => Ok(()),
            Some(errno) => Err(Failure::new(errno.0, format!("an earlier change failed: {errno}"))),
        }
    }

    fn change(&mut self, kind: RequestKind, offset: u64, len: u64, parts: &[&[u8]]) -> Result<Ticket> {
        if len == 0 {
            return Err(Failure::new(libc::EINVAL, "a change of 0 bytes"));
        }
        if kind == RequestKind::Write && len > u64::from(self.client.write_bytes_max()) {
            let most = self.client.write_bytes_max();
            return Err(Failure::new(
                libc::EMSGSIZE,
                format!("a write of {len} bytes: at most {most} at once"),
            ));
        }
        if offset.checked_add(len).is_none_or(|end| end > self.client.volume_bytes()) {
            return Err(Failure::new(libc::ERANGE, "the range is not within the volume"));
        }
        self.told()?;
        let tag = self.tag()?;
        let spare = self.spare.pop().unwrap_or_default();
        let request = Request { tag, kind, offset, len, fua: false };
        let lsn = match self.client.submit_parts(request, parts, spare) {
            Some(lsn) => lsn,
            None => self.await_place(tag)?,
        };
        self.last = Ticket(lsn.0);
        self.take();
        self.since_turn += 1;
        if self.since_turn >= TURN_EVERY {
            self.turn(Some(Duration::ZERO))?;
        }
        Ok(self.last)
    }

    /// There is no place for a change yet, or it is refused.
    fn await_place(&mut self, tag: u32) -> Result<Lsn> {
        self.awaited = Some((tag, None));
        loop {
            self.turn(None)?;
            let completed = self.awaited.and_then(|(_, place)| place);
            if let Some(lsn) = completed.or_else(|| self.client.place_of(tag)) {
                self.awaited = None;
                return Ok(lsn);
            }
            self.told()?;
        }
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<()> {
        // What was written is in the prefix once no other thread is in the middle of an earlier record.
        while Ticket(self.client.progress().0.0) < self.last {
            self.turn(Some(LOOK))?;
        }
        let most = self.client.write_bytes_max() as usize;
        let mut at = offset;
        for part in into.chunks_mut(most) {
            let tag = self.tag()?;
            let request =
                Request { tag, kind: RequestKind::Read, offset: at, len: part.len() as u64, fua: false };
            let mut data = self.spare.pop().unwrap_or_default();
            data.clear();
            data.resize(part.len(), 0);
            self.client.submit(request, data);
            let done = loop {
                match self.client.completed() {
                    Some(done) if done.tag == tag => break done,
                    Some(done) => {
                        self.free.push(done.tag);
                        self.failed = self.failed.or(done.result.err());
                    }
                    None => self.client.wait(None).map_err(|e| failure(&e))?,
                }
            };
            self.free.push(tag);
            done.result.map_err(|errno| {
                let what = if errno == Errno::EINVAL { "the range is not within the volume" } else { "" };
                Failure::new(
                    errno.0,
                    format!("cannot read {} bytes at byte {at}: {errno} {what}", part.len()),
                )
            })?;
            part.copy_from_slice(&done.data);
            self.spare.push(done.data);
            at += part.len() as u64;
        }
        Ok(())
    }

    fn persist(&mut self, ticket: Ticket, timeout: Option<Duration>) -> Result<()> {
        if ticket > self.last || ticket == Ticket::NONE {
            return Err(Failure::new(libc::EINVAL, format!("ticket {:#x} was not given out here", ticket.0)));
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        if Ticket(self.client.progress().1.0) < ticket {
            let tag = self.tag()?;
            self.client
                .submit(Request { tag, kind: RequestKind::Flush, offset: 0, len: 0, fua: false }, Vec::new());
        }
        while Ticket(self.client.progress().1.0) < ticket {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(Failure::new(libc::ETIMEDOUT, "not durable within the time given"));
            }
            // Another thread may make it durable without a word to this one.
            self.turn(Some(left.map_or(LOOK, |left| left.min(LOOK))))?;
            self.told()?;
        }
        self.told()
    }
}

impl ByteStore for LocalDevice {
    fn volume_bytes(&self) -> u64 {
        self.inner.borrow().client.volume_bytes()
    }

    fn write_bytes_max(&self) -> u32 {
        self.inner.borrow().client.write_bytes_max()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.inner.borrow_mut().read(offset, into)
    }

    fn write(&self, offset: u64, parts: &[&[u8]]) -> Result<Ticket> {
        let len = parts.iter().map(|part| part.len() as u64).sum();
        self.inner.borrow_mut().change(RequestKind::Write, offset, len, parts)
    }

    fn durable(&self) -> Ticket {
        Ticket(self.inner.borrow().client.progress().1.0)
    }

    fn persist(&self, ticket: Ticket, timeout: Option<Duration>) -> Result<()> {
        self.inner.borrow_mut().persist(ticket, timeout)
    }
}
