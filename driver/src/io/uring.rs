//! The reactor: one io_uring per thread that carries out [`Op`]s and hands back [`Done`]s.
//!
//! # Life of an operation
//!
//! ```text
//! push(op) ─> slab slot + SQE ─> kernel ─> CQE ─┬─ all transferred, or a real error ─> Event::Op(Done)
//!                 ^                             │
//!                 └──── rest of it, once more <─┘  short transfer, EINTR, EAGAIN, discard by another way
//! ```
//!
//! The slot owns the operation, and with it the memory, from `push` until the `Done` is handed out, so no buffer can
//! be freed or reused while the kernel may still touch it. If the ring cannot be drained when the reactor is dropped,
//! the slots (and so the memory) are leaked on purpose.
//!
//! # Threads
//!
//! A reactor belongs to the thread that made it (`!Send`): the kernel enforces that for a single-issuer ring. The only
//! way in from other threads is its [`Waker`].
//!
//! # Keyspace of `user_data`
//!
//! | bits | meaning |
//! |---|---|
//! | 63 set | raw command of the caller; the other bits are the caller's ([`RAW`]) |
//! | 62 set | the reactor's own: wake-up, bell, cancellation |
//! | else | operation: slot in bits 0..32, low bits of the slot's generation in 32..62 |
//!
//! # Allocation
//!
//! Slots and queues are allocated up front for the depth given to [`Reactor::new`]; more operations than that in flight
//! at once are accepted and make the slab grow (it never shrinks).

#![expect(
    unsafe_code,
    reason = "submission of memory to the kernel; the one place where operations become SQEs"
)]

mod bell;
mod entry;
mod linger;
mod setup;
mod slab;
#[cfg(test)]
mod tests;
mod waker;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};

use self::bell::Bell;
use self::entry::Way;
pub use self::linger::Linger;
use self::slab::{InFlight, Slab};
use self::waker::WakeReader;
pub use self::waker::Waker;
use super::op::{Done, Errno, Op, OpKind, Target};
use crate::base::{Error, ErrorKind, Result};

/// Bit that marks the `user_data` of raw commands: callers of [`Reactor::push_raw`] set it and choose the other bits.
pub const RAW: u64 = 1 << 63;
/// Bit that marks the reactor's own entries.
const OWN: u64 = 1 << 62;
const WAKE: u64 = OWN | 1;
const CANCEL: u64 = OWN | 2;
const BELL: u64 = OWN | 3;
const LINE: u64 = OWN | 4;

/// Slots of the ring's file table: every target and every file of [`Reactor::register_file`] takes one. Small enough
/// for any `RLIMIT_NOFILE`, large enough for a stage with all its volumes.
const FILES_MAX: usize = 256;
/// How long dropping a reactor waits for operations to finish by themselves, and then for cancelled ones.
const DRAIN: Duration = Duration::from_secs(10);
const DRAIN_CANCELLED: Duration = Duration::from_secs(2);
/// EINTR and EAGAIN are retried this often before the operation fails with them.
const RETRIES_MAX: u32 = 64;

/// What the reactor must know about a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetOptions {
    /// Opened with `O_DIRECT`: memory, offsets and lengths are block aligned, and so must a continued transfer be.
    pub direct: bool,
    /// A block device rather than a regular file.
    pub is_block_device: bool,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// An operation is finished.
    Op(Done),
    /// A raw command has a completion.
    Raw {
        /// As given in the entry, [`RAW`] included.
        user_data: u64,
        /// The CQE's result.
        result: i32,
        /// The CQE's flags.
        flags: u32,
    },
    /// The [`Waker`] was triggered, once or more often, since the last `Wake`.
    Wake,
    /// The client given to [`Reactor::listen_to`] has rung, or is gone.
    Bell {
        /// Nothing more will come.
        closed: bool,
    },
}

/// A file in the ring's own table, for entries of [`Reactor::push_raw`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(u32);

impl FileSlot {
    /// The form that opcodes take.
    #[must_use]
    pub fn fixed(self) -> types::Fixed {
        types::Fixed(self.0)
    }
}

/// A registered target. Keeps the file open.
#[derive(Debug)]
struct TargetEntry {
    target: Target,
    slot: FileSlot,
    options: TargetOptions,
    /// The device refused to punch holes once: discards go the other way at once.
    punch_refused: bool,
    _file: Arc<File>,
}

/// One io_uring and everything in flight on it.
pub struct Reactor {
    ring: IoUring,
    slab: Slab,
    /// Operations that ended without the kernel (unknown target, submission impossible).
    ended: VecDeque<Done>,
    targets: Vec<TargetEntry>,
    files_free: Vec<u32>,
    wake: WakeReader,
    bell: Option<Bell>,
    /// Kernel knows how to wait without counting the wait as I/O wait (6.15).
    no_iowait: bool,
    _not_send: PhantomData<*const ()>,
}

impl Reactor {
    /// Makes the ring of the calling thread, for `depth` operations and raw commands in flight (more are accepted,
    /// see the module's notes).
    pub fn new(depth: u32) -> Result<Reactor> {
        let sq_entries = depth.clamp(64, 4096).next_power_of_two();
        let ring = setup::ring(sq_entries)?;
        ring.submitter()
            .register_files_sparse(FILES_MAX as u32)
            .map_err(|e| Error::io("cannot register the file table of an io_uring", e))?;
        let wake = WakeReader::new()?;
        // SAFETY: submits nothing and passes no pointer.
        let no_iowait = unsafe {
            ring.submitter().enter::<libc::sigset_t>(0, 0, EnterFlags::NO_IOWAIT.bits(), None).is_ok()
        };
        let mut reactor = Reactor {
            ring,
            slab: Slab::with_capacity(sq_entries as usize),
            ended: VecDeque::with_capacity(64),
            targets: Vec::new(),
            files_free: (0..FILES_MAX as u32).rev().collect(),
            wake,
            bell: None,
            no_iowait,
            _not_send: PhantomData,
        };
        reactor.arm_wake();
        Ok(reactor)
    }

    /// A handle with which any thread can cause an [`Event::Wake`].
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.wake.waker()
    }

    /// From now on every write to the eventfd `bell` causes an [`Event::Bell`], and so does the end of the socket `line`.
    /// Neither is ever read. Once per reactor.
    ///
    /// # Panics
    ///
    /// If there is a bell already.
    pub fn listen_to(&mut self, bell: OwnedFd, line: OwnedFd) {
        assert!(self.bell.is_none(), "one bell per reactor");
        self.bell = Some(Bell::new(bell, line));
        self.arm(BELL);
        self.arm(LINE);
    }

    /// Makes `target` known. The file is kept open until [`Self::unregister`] or the end of the reactor.
    pub fn register(&mut self, target: Target, file: Arc<File>, options: TargetOptions) -> Result<()> {
        let at = match self.targets.binary_search_by_key(&target, |t| t.target) {
            Ok(_) => return Err(Error::new(ErrorKind::Exists, format!("{target:?} is already registered"))),
            Err(at) => at,
        };
        let slot = self.table_insert(&*file)?;
        self.targets.insert(at, TargetEntry { target, slot, options, punch_refused: false, _file: file });
        Ok(())
    }

    /// Forgets `target`; operations in flight on it finish, later ones end with `EBADF`.
    pub fn unregister(&mut self, target: Target) -> Result<()> {
        let at = self
            .targets
            .binary_search_by_key(&target, |t| t.target)
            .map_err(|_| Error::new(ErrorKind::NotFound, format!("{target:?} is not registered")))?;
        // Entries that are only queued name the table slot, which must not change under them.
        self.submit();
        let entry = self.targets.remove(at);
        self.table_remove(entry.slot)
    }

    /// Puts a file into the ring's table for raw commands. The kernel keeps its own reference until
    /// [`Self::unregister_file`] or the end of the ring.
    pub fn register_file(&mut self, file: BorrowedFd<'_>) -> Result<FileSlot> {
        self.table_insert(&file)
    }

    /// Takes a file out of the ring's table.
    pub fn unregister_file(&mut self, slot: FileSlot) -> Result<()> {
        self.submit();
        self.table_remove(slot)
    }

    /// Operations in flight, wake-ups and raw commands not counted.
    #[must_use]
    pub fn ops_in_flight(&self) -> usize {
        self.slab.len() + self.ended.len()
    }

    /// Makes a table of `count` empty buffers, which the kernel fills with what clients hand in: [`super::Memory::Client`].
    pub fn reserve_buffers(&mut self, count: u32) -> Result<()> {
        self.ring
            .submitter()
            .register_buffers_sparse(count)
            .map_err(|e| Error::io("cannot register the buffer table of an io_uring", e))
    }

    /// Queues an operation. It is submitted by the next [`Self::submit_and_wait`] (or earlier, when the queue is
    /// full) and always comes back as an [`Event::Op`], errors included.
    ///
    /// # Panics
    ///
    /// If the operation's memory does not have the operation's length, or lies outside of its shared region.
    pub fn push(&mut self, op: Op) {
        entry::assert_memory_fits(&op);
        let Some(target) = self.target(op.target) else {
            self.ended.push_back(Done {
                token: op.token,
                result: Err(Errno(libc::EBADF)),
                memory: op.memory,
            });
            return;
        };
        if op.len == 0 && op.kind != OpKind::Sync {
            self.ended.push_back(Done { token: op.token, result: Ok(()), memory: op.memory });
            return;
        }
        let way =
            if op.kind == OpKind::Discard && target.punch_refused { Way::DiscardCommand } else { Way::First };
        let key = self.slab.insert(InFlight { op, transferred: 0, retries: 0, way });
        self.issue(key);
    }

    /// Queues a command of the caller's own.
    ///
    /// # Safety
    ///
    /// Memory that the entry points to must stay valid until the command's final completion, or until the process ends
    /// if it never comes.
    ///
    /// # Panics
    ///
    /// If the entry's `user_data` lacks [`RAW`].
    pub unsafe fn push_raw(&mut self, entry: &squeue::Entry) {
        assert!(entry.get_user_data() & RAW != 0, "raw commands carry the RAW bit in their user_data");
        // SAFETY: promised by the caller.
        unsafe { self.push_entry(entry) };
    }

    /// Submits what is queued and waits until there is at least one event, a signal arrived or `timeout` is over
    /// (`None`: no limit; zero: does not wait). Returns at once when events are at hand. Spurious returns are normal.
    pub fn submit_and_wait(&mut self, timeout: Option<Duration>) -> Result<()> {
        let ready = self.has_events();
        let wait = !ready && timeout != Some(Duration::ZERO);
        match self.enter(wait, timeout.filter(|_| wait)) {
            Ok(()) => Ok(()),
            Err(e) => match e.raw_os_error() {
                // ETIME and EINTR end a wait. EBUSY: the completion queue overflowed, drain it first. EAGAIN: the
                // kernel is short of memory right now; what was not taken stays queued for the next round.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY) => Ok(()),
                Some(libc::EAGAIN) => {
                    if !ready {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Ok(())
                }
                _ => Err(Error::io("io_uring_enter failed", e)),
            },
        }
    }

    fn has_events(&mut self) -> bool {
        !self.ended.is_empty() || !self.ring.completion().is_empty()
    }

    /// Whether events are at hand, or may be after a [`Reactor::submit_and_wait`].
    fn has_news(&mut self) -> bool {
        self.has_events() || self.ring.submission().taskrun()
    }

    /// The next event at hand, without waiting.
    pub fn next_event(&mut self) -> Option<Event> {
        if let Some(done) = self.ended.pop_front() {
            return Some(Event::Op(done));
        }
        loop {
            let cqe = self.ring.completion().next()?;
            if let Some(event) = self.take(&cqe) {
                return Some(event);
            }
        }
    }

    /// What a completion means to the caller, if anything.
    fn take(&mut self, cqe: &cqueue::Entry) -> Option<Event> {
        let (user_data, result) = (cqe.user_data(), cqe.result());
        if user_data & RAW != 0 {
            return Some(Event::Raw { user_data, result, flags: cqe.flags() });
        }
        match user_data {
            WAKE => {
                self.wake.taken();
                // A cancelled read (the reactor is being dropped) is not armed again.
                if result != -libc::ECANCELED {
                    self.arm_wake();
                    return Some(Event::Wake);
                }
                None
            }
            BELL | LINE => self.rung(user_data, result, cqueue::more(cqe.flags())),
            CANCEL => None,
            key => self.finish_or_continue(key, result).map(Event::Op),
        }
    }

    fn rung(&mut self, which: u64, result: i32, more: bool) -> Option<Event> {
        if !more {
            self.bell.as_mut()?.armed -= 1;
        }
        if result == -libc::ECANCELED {
            return None;
        }
        let closed = which == LINE && result > 0;
        if !more && !closed {
            // The kernel gives up polling when completions overflow, or for want of memory.
            self.arm(which);
        }
        Some(Event::Bell { closed })
    }

    /// Judges the completion of one step of an operation: `Some` when that was the last one.
    fn finish_or_continue(&mut self, key: u64, result: i32) -> Option<Done> {
        let InFlight { op, .. } = self.slab.get(key);
        let target = op.target;
        let options = self.target(target).map(|t| t.options);
        let verdict = entry::judge(self.slab.get_mut(key), result, options);
        match verdict {
            entry::Verdict::Done(result) => {
                let InFlight { op, .. } = self.slab.remove(key);
                Some(Done { token: op.token, result, memory: op.memory })
            }
            entry::Verdict::Again => {
                if self.slab.get(key).way == Way::DiscardCommand
                    && let Some(entry) = self.target_mut(target)
                {
                    entry.punch_refused = true;
                }
                if self.target(target).is_none() {
                    let InFlight { op, .. } = self.slab.remove(key);
                    return Some(Done {
                        token: op.token,
                        result: Err(Errno(libc::EBADF)),
                        memory: op.memory,
                    });
                }
                self.issue(key);
                None
            }
        }
    }

    fn target(&self, target: Target) -> Option<&TargetEntry> {
        self.targets.binary_search_by_key(&target, |t| t.target).ok().map(|at| &self.targets[at])
    }

    fn target_mut(&mut self, target: Target) -> Option<&mut TargetEntry> {
        self.targets.binary_search_by_key(&target, |t| t.target).ok().map(|at| &mut self.targets[at])
    }

    /// Queues the entry for the next step of the operation in slot `key`; its target is registered.
    fn issue(&mut self, key: u64) {
        let target = self.target(self.slab.get(key).op.target).expect("checked by the caller");
        let (slot, is_block_device) = (target.slot, target.options.is_block_device);
        let entry = entry::build(self.slab.get_mut(key), slot.fixed(), is_block_device).user_data(key);
        // SAFETY: the entry's pointers lead into the memory of the operation in the slab, which stays there until the
        // completion with this key is taken, and which is leaked if the ring cannot be drained.
        unsafe { self.push_entry(&entry) };
    }

    fn arm_wake(&mut self) {
        let (fd, into) = self.wake.read_into();
        let entry = opcode::Read::new(types::Fd(fd), into, 8).build().user_data(WAKE);
        // SAFETY: the eight bytes are on the heap, used for nothing else, and outlive the read (see `Drop`).
        unsafe { self.push_entry(&entry) };
    }

    fn arm(&mut self, which: u64) {
        let Some(bell) = &mut self.bell else { return };
        let entry = if which == BELL { bell.poll_bell() } else { bell.poll_line() };
        // SAFETY: polling has no memory.
        unsafe { self.push_entry(&entry.user_data(which)) };
    }

    /// # Safety
    ///
    /// As for [`Self::push_raw`].
    unsafe fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: promised by the caller.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // Full. The kernel takes entries off the queue as part of the submission. When it cannot take any now (no
            // memory, completions overflowed) the entry must still not be lost, so this waits for it; the kernel
            // keeps overflowed completions on a list of its own meanwhile.
            if self.submit() == 0 {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    /// Hands the queued entries to the kernel without waiting; how many it took.
    fn submit(&mut self) -> usize {
        let before = self.ring.submission().len();
        // An error leaves the rest queued, and the next `submit_and_wait` reports it if it lasts.
        let _ = self.enter(false, None);
        before - self.ring.submission().len()
    }

    fn enter(&mut self, wait: bool, timeout: Option<Duration>) -> io::Result<()> {
        let queued = self.ring.submission().len() as u32;
        // Deferred task work, and with it every completion, runs only in an enter that asks for events.
        let mut flags = EnterFlags::GETEVENTS;
        if self.no_iowait && self.slab.is_empty() {
            // Waiting for clients is idleness, not I/O wait.
            flags |= EnterFlags::NO_IOWAIT;
        }
        let submitter = self.ring.submitter();
        let min_complete = u32::from(wait);
        match timeout {
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&timespec);
                flags |= EnterFlags::EXT_ARG;
                // SAFETY: the argument is of the type that EXT_ARG announces and outlives the call.
                unsafe { submitter.enter(queued, min_complete, flags.bits(), Some(&args)) }?;
            }
            None => {
                // SAFETY: no argument is passed.
                unsafe { submitter.enter::<libc::sigset_t>(queued, min_complete, flags.bits(), None) }?;
            }
        }
        Ok(())
    }

    fn table_insert(&mut self, file: &impl AsRawFd) -> Result<FileSlot> {
        let Some(index) = self.files_free.pop() else {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("more than {FILES_MAX} files on one io_uring; spread the volumes over more stages"),
            ));
        };
        match self.ring.submitter().register_files_update(index, &[file.as_raw_fd()]) {
            Ok(_) => Ok(FileSlot(index)),
            Err(e) => {
                self.files_free.push(index);
                Err(Error::io("cannot register a file with io_uring", e))
            }
        }
    }

    fn table_remove(&mut self, slot: FileSlot) -> Result<()> {
        self.ring
            .submitter()
            .register_files_update(slot.0, &[-1])
            .map_err(|e| Error::io("cannot unregister a file from io_uring", e))?;
        self.files_free.push(slot.0);
        Ok(())
    }

    /// Takes completions until nothing of the reactor's is in flight or the time is over; whether nothing is.
    fn drain(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            while self.next_event().is_some() {}
            if self.slab.is_empty() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.submit_and_wait(Some(left)).is_err() {
                return false;
            }
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // Operations that were accepted are carried out: a write that a caller no longer waits for is still one.
        let mut drained = self.drain(DRAIN);
        // The wake-up read, and whatever hangs. Raw commands are their owner's: some (those of ublk) cannot be
        // cancelled this way and end with the ring.
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any().all()).build().user_data(CANCEL);
        // SAFETY: a cancellation has no memory.
        unsafe { self.push_entry(&cancel) };
        let mut cancel_again = false;
        let deadline = Instant::now() + DRAIN_CANCELLED;
        let listens = |bell: &Option<Bell>| bell.as_ref().is_some_and(|bell| bell.armed > 0);
        while !self.slab.is_empty() || self.wake.is_armed() || listens(&self.bell) {
            if std::mem::take(&mut cancel_again) {
                // SAFETY: as above.
                unsafe { self.push_entry(&cancel) };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.submit_and_wait(Some(left)).is_err() {
                break;
            }
            while let Some(event) = self.next_event() {
                // A wake-up that came first has armed the read once more, behind the cancellation.
                cancel_again |= matches!(event, Event::Wake | Event::Bell { closed: false });
            }
            drained |= self.slab.is_empty();
        }
        if !drained {
            tracing::error!(
                operations = self.slab.len(),
                "a device does not answer: leaving the memory of its operations behind"
            );
            self.slab.leak();
        }
        if self.wake.is_armed() {
            self.wake.leak();
        }
        // A table entry would otherwise keep its file open until the kernel gets to dismantling the ring. Emptying the
        // table, unlike unregistering it, never waits for commands that still use a file (up to 6.12 that is for ever
        // if one of them is a ublk fetch).
        let _ = self.ring.submitter().register_files_update(0, &[-1; FILES_MAX]);
    }
}
