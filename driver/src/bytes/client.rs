//! The client's side of a session, for programs in other processes than the server's.
//!
//! Locks, none of which is held while waiting: `submitter` (order of submission), `reaper` (completions), `heap`; a thread
//! that needs two takes them in this order.

#[cfg(test)]
mod checks;
mod connect;
mod fork;
mod ground;
mod reads;
mod rings;
mod space;
mod store;
mod wait;
mod watch;

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use self::connect::Connected;
pub use self::connect::{RUN_DIR, socket_path};
use self::fork::{Private, Process};
use self::ground::Kernel;
use self::rings::{OWN_COOKIE, Own, Reaper, Submitter};
use self::space::{Heap, Parts};
use self::store::{check, failure_of};
use self::wait::{Limit, Waiting};
use self::watch::Watch;
use super::{Completion, Failure, Info, Operation, Result, SILENT, Submission, Ticket};
use crate::format::byte_ring::{ACCEPTED, DURABLE_UP_TO, RingLayout, VOLUME_BYTES};
use crate::io::SharedMap;

/// What a client asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Requests that may be submitted and not taken yet: a power of two from 8 to 4096; 0: the server's default.
    pub depth: u32,
    /// Size of the arena: a multiple of 4096; 0: the server's default.
    pub arena_bytes: u32,
    /// To be the only session of the volume that asks for this: `EBUSY` while there is one. Two that may change the same
    /// [append log](super::log) have to ask.
    pub sole_writer: bool,
}

/// A session with a volume. May be used by many threads, of the process that has opened it: in a child that this forks, calls
/// fail with `ENOTCONN`, and the arena is private memory, of zeroes.
#[derive(Debug)]
pub struct Device {
    owner: Process,
    memory: Private<SharedMap>,
    layout: RingLayout,
    session: u16,
    info: Info,
    parts: Parts,
    submitter: Mutex<Submitter>,
    reaper: Mutex<Reaper>,
    heap: Mutex<Heap>,
    /// A slot for reads came back.
    slot_back: Condvar,
    waiting: Waiting,
    watch: Watch,
}

/// When a call began.
#[derive(Clone, Copy, Debug)]
pub struct Begun(Limit);

fn deadline_of(timeout: Option<Duration>) -> Option<Instant> {
    // One too far to be told is none.
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

impl Device {
    /// Opens a session with the volume `target`, which is a name or the path of a socket (with a `/`).
    pub fn open(target: &str, options: &Options) -> Result<Device> {
        let Connected { socket, bell, memory, layout, session, mut info } =
            connect::connect(target, options)?;
        let parts = Parts::of(layout.arena_bytes);
        let watch = Watch::new(&socket)?;
        let ground = Kernel::new(socket, bell).map_err(|e| {
            Failure::new(
                e as i32,
                format!("cannot make the descriptor that wakes a call for '{target}': {e}"),
            )
        })?;
        info.write_bytes_max = info.write_bytes_max.min(parts.copies);
        Ok(Device {
            owner: Process::this(),
            submitter: Mutex::new(Submitter::new(&parts)),
            reaper: Mutex::default(),
            heap: Mutex::new(Heap::new(&parts)),
            slot_back: Condvar::new(),
            waiting: Waiting::new(ground),
            watch,
            memory,
            layout,
            session,
            info,
            parts,
        })
    }

    /// What the session is to.
    #[must_use]
    pub fn info(&self) -> Info {
        Info { volume_bytes: self.memory.word(VOLUME_BYTES).load(Ordering::Acquire), ..self.info.clone() }
    }

    /// Address and size of the arena. It stays in place as long as the device lives.
    #[must_use]
    pub fn arena(&self) -> (*mut u8, usize) {
        (self.memory.base().wrapping_add(self.layout.arena()), self.layout.arena_bytes as usize)
    }

    /// A part of the arena of `len` bytes for the program: where it begins. `ENOMEM` if there is none.
    pub fn alloc(&self, len: usize) -> Result<u32> {
        self.owner.check()?;
        let heap_bytes = self.parts.end - self.parts.heap;
        if len == 0 || len > heap_bytes as usize {
            let what = format!(
                "cannot allocate {len} bytes: a session's arena has 1 to {heap_bytes} for its program"
            );
            return Err(Failure::new(libc::EINVAL, what));
        }
        self.heap.lock().alloc(len).ok_or_else(|| {
            Failure::new(libc::ENOMEM, format!("the arena has no {len} bytes in one piece: free some first"))
        })
    }

    /// Gives back what `alloc` gave. No request that names it may be in flight.
    pub fn free(&self, arena_offset: u32) -> Result<()> {
        self.owner.check()?;
        if self.heap.lock().free(arena_offset) {
            Ok(())
        } else {
            Err(Failure::new(libc::EINVAL, format!("byte {arena_offset} of the arena begins no allocation")))
        }
    }

    /// Puts bytes into the arena.
    pub fn put(&self, arena_offset: u32, bytes: &[u8]) -> Result<()> {
        self.memory.copy_in(self.position(arena_offset, bytes.len())?, bytes);
        Ok(())
    }

    /// Gets bytes from the arena.
    pub fn get(&self, arena_offset: u32, into: &mut [u8]) -> Result<()> {
        self.memory.copy_out(self.position(arena_offset, into.len())?, into);
        Ok(())
    }

    fn position(&self, arena_offset: u32, len: usize) -> Result<usize> {
        let fits = (arena_offset as usize)
            .checked_add(len)
            .is_some_and(|end| end <= self.layout.arena_bytes as usize);
        if fits {
            Ok(self.layout.arena() + arena_offset as usize)
        } else {
            Err(Failure::new(libc::EFAULT, format!("{len} bytes at {arena_offset} are not in the arena")))
        }
    }

    /// Submits requests, all or none, in this order; the ticket of the first, the others follow by one each. `EAGAIN`: no
    /// room, take completions first. What is wrong with a request its completion says.
    pub fn submit(&self, batch: &[Submission]) -> Result<Ticket> {
        self.owner.check()?;
        if let Some(gone) = self.waiting.gone() {
            return Err(gone.clone());
        }
        if batch.is_empty() || batch.len() > self.layout.depth as usize {
            let what = format!("{} requests at once: 1 to {} are possible", batch.len(), self.layout.depth);
            return Err(Failure::new(libc::EINVAL, what));
        }
        if batch.iter().any(|submission| submission.cookie == OWN_COOKIE) {
            return Err(Failure::new(libc::EINVAL, "the cookie with all bits set is the library's own"));
        }
        let mut submitter = self.submitter.lock();
        if !submitter.has_room(&*self.memory, &self.layout, batch.len()) {
            drop(submitter);
            self.waiting.look();
            self.attend();
            return Err(self.waiting.gone().cloned().unwrap_or_else(|| {
                Failure::new(libc::EAGAIN, "the submission ring is full: take completions, then try again")
            }));
        }
        let first = Ticket::new(self.session, submitter.tail + 1);
        for submission in batch {
            submitter.put(&*self.memory, &self.layout, submission);
        }
        self.publish(&submitter);
        Ok(first)
    }

    fn publish(&self, submitter: &Submitter) {
        if submitter.publish(&*self.memory) {
            self.waiting.ring();
        }
    }

    fn collect(&self) {
        self.collect_and(|_| ());
    }

    /// Takes what is in the completion ring, then does this with it.
    fn collect_and<T>(&self, then: impl FnOnce(&mut Reaper) -> T) -> T {
        let mut reaper = self.reaper.lock();
        let wake = reaper.collect(&*self.memory, &self.layout);
        let slots = std::mem::take(&mut reaper.slots);
        let outcome = then(&mut reaper);
        self.watch.tell(!reaper.ready.is_empty());
        drop(reaper);
        if !slots.is_empty() {
            let mut heap = self.heap.lock();
            slots.into_iter().for_each(|slot| heap.give_slot(slot));
            self.slot_back.notify_all();
        }
        if wake {
            self.waiting.ring();
        }
        outcome
    }

    /// For a call that begins now. Refused in a child, where locks may be held by threads that only the parent has.
    fn limit(&self, timeout: Option<Duration>) -> Result<Limit> {
        self.owner.check()?;
        Ok(self.waiting.limit(deadline_of(timeout)))
    }

    /// Waits; see [`Waiting::until`].
    fn until<T>(&self, limit: Limit, done: impl FnMut() -> Option<T>) -> Result<Option<T>> {
        let outcome = self.waiting.until(&*self.memory, limit, done);
        self.attend();
        outcome
    }

    /// After bytes of the server's were taken: the program that polls must not miss what comes next.
    fn attend(&self) {
        if self.watch.is_on() {
            self.waiting.announce(&*self.memory);
            self.collect();
        }
    }

    /// Takes completions of [`Device::submit`]; how many. Waits for the first of them; 0 after the timeout.
    pub fn reap(&self, into: &mut [Completion], timeout: Option<Duration>) -> Result<usize> {
        self.reap_within(into, timeout, self.begin())
    }

    /// What a call consists of that waits in parts begins here; see [`Device::reap_within`].
    #[must_use]
    pub fn begin(&self) -> Begun {
        Begun(self.waiting.limit(None))
    }

    /// As [`Device::reap`], for a part of a call that has begun before: what has interrupted that since interrupts this.
    pub fn reap_within(
        &self,
        into: &mut [Completion],
        timeout: Option<Duration>,
        begun: Begun,
    ) -> Result<usize> {
        self.owner.check()?;
        if into.is_empty() {
            return Ok(0);
        }
        let take = |into: &mut [Completion]| {
            let count = self.collect_and(|reaper| {
                let count = reaper.ready.len().min(into.len());
                for (place, completion) in into.iter_mut().zip(reaper.ready.drain(..count)) {
                    *place = completion;
                }
                count
            });
            (count > 0).then_some(count)
        };
        if let Some(count) = take(into) {
            return Ok(count);
        }
        if timeout == Some(Duration::ZERO) {
            // For those who wait at the descriptor: from now on it tells.
            self.waiting.look();
            self.waiting.announce(&*self.memory);
            return match (take(into), self.waiting.gone()) {
                (Some(count), _) => Ok(count),
                (None, None) => Ok(0),
                (None, Some(gone)) => Err(gone.clone()),
            };
        }
        let taken = self.until(begun.0.with_deadline(deadline_of(timeout)), || take(into))?;
        Ok(taken.unwrap_or(0))
    }

    /// Readable when there may be completions or the server is gone, from a `reap` that gave nothing on.
    #[must_use]
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        if self.owner.check().is_ok() {
            self.watch.start();
            self.attend();
        }
        self.watch.fd()
    }

    /// Every change up to this ticket is accepted, except those that were refused, whose completions say so.
    #[must_use]
    pub fn accepted(&self) -> Ticket {
        Ticket::new(self.session, self.memory.word(ACCEPTED).load(Ordering::Acquire))
    }

    /// Every change up to this ticket is durable, except those that were refused, whose completions say so.
    #[must_use]
    pub fn durable(&self) -> Ticket {
        Ticket::new(self.session, self.memory.word(DURABLE_UP_TO).load(Ordering::Acquire))
    }

    /// Waits until every change up to `ticket` is durable. Fails from then on if a change up to `ticket` that asked for no
    /// completion (as those of [`Device::write_async`] do) has failed: no more of that kind are taken, a new session begins
    /// without a hole.
    pub fn persist(&self, ticket: Ticket, timeout: Option<Duration>) -> Result<()> {
        let limit = self.limit(timeout)?;
        let submitted = self.submitter.lock().tail;
        if ticket.session() != self.session || !(1..=submitted).contains(&ticket.sequence()) {
            let what = format!("ticket {:#x} is none of this session's", ticket.0);
            return Err(Failure::new(libc::EINVAL, what));
        }
        let flushed = if self.durable() >= ticket {
            Some(0)
        } else {
            self.request(Operation::Flush, 0, (0, 0), limit)?.map(|completion| completion.result)
        };
        // A refusal is there before the words pass it.
        if let Some(failed) =
            self.collect_and(|reaper| reaper.failed).filter(|failed| failed.ticket <= ticket)
        {
            let what = format!("the write with ticket {:#x} failed", failed.ticket.0);
            return Err(failure_of(failed.result, &what));
        }
        match flushed {
            None => Err(Failure::new(libc::ETIMEDOUT, "not durable within the time given")),
            Some(0) => Ok(()),
            Some(result) => Err(failure_of(result, "the flush failed")),
        }
    }

    /// Waits until `count` requests can be submitted; `false` after the timeout. What has completed is there for
    /// [`Device::reap`], and has to be taken: the server stops at as many as the completion ring holds.
    pub fn wait_for_room(&self, count: usize, timeout: Option<Duration>) -> Result<bool> {
        let limit = self.limit(timeout)?;
        if count > self.layout.depth as usize {
            return Err(Failure::new(libc::EINVAL, format!("the ring has room for {}", self.layout.depth)));
        }
        let has_room = || {
            self.collect();
            self.submitter.lock().has_room(&*self.memory, &self.layout, count).then_some(())
        };
        Ok(self.until(limit, has_room)?.is_some())
    }

    /// Writes `parts`, one after the other, as one record; returns when the volume's ack level is reached (or it is
    /// durable, with [`super::DURABLE`]).
    pub fn write(&self, offset: u64, parts: &[&[u8]], flags: u8) -> Result<Ticket> {
        let limit = self.limit(None)?;
        let sequence = self.submit_copy(offset, parts, flags & !SILENT, Some(Own::Awaited), limit)?;
        let what = || format!("cannot write at byte {offset} of volume '{}'", self.info.name);
        let completion = self.finished(sequence, Own::Abandoned, limit)?.expect("without a deadline");
        check(&completion, what)?;
        Ok(Ticket::new(self.session, sequence))
    }

    /// The same, but returns when the payload was taken over. [`Device::persist`] waits for it, and says if it failed.
    pub fn write_async(&self, offset: u64, parts: &[&[u8]], flags: u8) -> Result<Ticket> {
        let limit = self.limit(None)?;
        if let Some(failed) = self.reaper.lock().failed {
            let what =
                format!("the write with ticket {:#x} failed, and so do those after it", failed.ticket.0);
            return Err(failure_of(failed.result, &what));
        }
        let sequence = self.submit_copy(offset, parts, flags | SILENT, None, limit)?;
        Ok(Ticket::new(self.session, sequence))
    }

    fn submit_copy(
        &self,
        offset: u64,
        parts: &[&[u8]],
        flags: u8,
        own: Option<Own>,
        limit: Limit,
    ) -> Result<u64> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if len == 0 || len > self.info.write_bytes_max as usize {
            let errno = if len == 0 { libc::EINVAL } else { libc::EMSGSIZE };
            let what = format!(
                "a write of {len} bytes: volume '{}' takes 1 to {} at once",
                self.info.name, self.info.write_bytes_max
            );
            return Err(Failure::new(errno, what));
        }
        let submission = Submission {
            operation: Operation::Write as u8,
            flags,
            offset,
            len: len as u64,
            cookie: OWN_COOKIE,
            ..Submission::default()
        };
        self.submit_own(submission, own, limit, |submitter| {
            let at = submitter.room_for_copy(&*self.memory, len)?;
            let mut to = self.layout.arena() + at as usize;
            for part in parts {
                self.memory.copy_in(to, part);
                to += part.len();
            }
            Some(at)
        })?
        .ok_or_else(|| Failure::new(libc::ETIMEDOUT, "no room in the session"))
    }

    /// Submits a request of the library's own when there is room; `place` says where its payload is, if there is room for
    /// that too. `None` after the deadline.
    fn submit_own(
        &self,
        submission: Submission,
        own: Option<Own>,
        limit: Limit,
        mut place: impl FnMut(&mut Submitter) -> Option<u32>,
    ) -> Result<Option<u64>> {
        if let Some(gone) = self.waiting.gone() {
            return Err(gone.clone());
        }
        self.until(limit, || {
            let mut submitter = self.submitter.lock();
            if !submitter.has_room(&*self.memory, &self.layout, 1) {
                drop(submitter);
                self.collect();
                return None;
            }
            let Some(arena_offset) = place(&mut submitter) else {
                // The server may be waiting for room for completions.
                drop(submitter);
                self.collect();
                return None;
            };
            let sequence = submitter.tail + 1;
            if let Some(own) = own {
                self.reaper.lock().own.insert(sequence, own);
            }
            let mut placed = submission;
            placed.arena_offset = arena_offset;
            submitter.put(&*self.memory, &self.layout, &placed);
            self.publish(&submitter);
            Some(sequence)
        })
    }

    /// Waits for a request of the library's own; `None` after the deadline. What becomes of it if this gives up: `otherwise`.
    fn finished(&self, sequence: u64, otherwise: Own, limit: Limit) -> Result<Option<Completion>> {
        let done = || {
            self.collect();
            let mut reaper = self.reaper.lock();
            match reaper.own.get(&sequence) {
                Some(Own::Done(completion)) => {
                    let completion = *completion;
                    reaper.own.remove(&sequence);
                    Some(completion)
                }
                _ => None,
            }
        };
        let outcome = self.until(limit, done);
        if !matches!(outcome, Ok(Some(_))) {
            self.reaper.lock().give_up(sequence, otherwise);
        }
        outcome
    }

    fn request(
        &self,
        operation: Operation,
        flags: u8,
        (offset, len): (u64, u64),
        limit: Limit,
    ) -> Result<Option<Completion>> {
        let submission = Submission {
            operation: operation as u8,
            flags,
            offset,
            len,
            cookie: OWN_COOKIE,
            ..Submission::default()
        };
        match self.submit_own(submission, Some(Own::Awaited), limit, |_| Some(0))? {
            Some(sequence) => self.finished(sequence, Own::Abandoned, limit),
            None => Ok(None),
        }
    }

    fn change(&self, operation: Operation, flags: u8, range: (u64, u64)) -> Result<Ticket> {
        let completion =
            self.request(operation, flags & !SILENT, range, self.limit(None)?)?.expect("without a deadline");
        let (offset, len) = range;
        check(&completion, || {
            format!("cannot {operation:?} {len} bytes at byte {offset} of volume '{}'", self.info.name)
        })?;
        Ok(completion.ticket)
    }

    /// Makes a range zero, as one record of any length.
    pub fn write_zeroes(&self, offset: u64, len: u64, flags: u8) -> Result<Ticket> {
        self.change(Operation::WriteZeroes, flags, (offset, len))
    }

    /// Says that a range is no longer needed.
    pub fn discard(&self, offset: u64, len: u64) -> Result<Ticket> {
        self.change(Operation::Discard, 0, (offset, len))
    }

    /// Makes everything submitted before durable.
    pub fn flush(&self) -> Result<()> {
        let completion =
            self.request(Operation::Flush, 0, (0, 0), self.limit(None)?)?.expect("without a deadline");
        check(&completion, || format!("cannot flush volume '{}'", self.info.name))
    }

    /// Has every call that waits now, in whatever thread, fail with `EINTR`. What such a call had submitted is carried out all
    /// the same. Calls that begin later are not concerned: whoever wants a thread to stop tells it so first, and interrupts
    /// again until it has, since the thread may have been just about to call. Takes locks: not for signal handlers.
    pub fn interrupt(&self) {
        if self.owner.check().is_ok() {
            self.waiting.interrupt();
            self.slot_back.notify_all();
        }
    }
}
