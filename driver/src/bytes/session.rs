//! The server's side of a session, without I/O: what a client's rings hold becomes requests to a door, what the door says
//! becomes completions and progress.
//!
//! Life of a submission:
//! ```text
//!  in the ring ──▶ taken (descriptor copied) ──▶ checked ──▶ its turn ──▶ fed to the door ──▶ completed ──▶ in the
//!                                                  │ bad        │ no                                         completion ring
//!                                                  ▼            ▼
//!                                             completed     held, and everything behind it
//! ```
//! Its turn has come when
//! - every ticket it names has its place (of a read or flush: is accepted);
//! - it is a read or a flush and every change of the session so far is accepted, so that it sees them (B2);
//! - it is a barrier and nothing is in flight (B4).
//!
//! Ownership: a session belongs to one thread. What the client can write to is read through [`SharedMap`], each word once,
//! and compared with counters that only this side has.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::shared::{Shared, Word};
use super::ties::{Tie, Ties};
use super::{DURABLE, Operation, SILENT, Ticket};
use crate::base::Lsn;
use crate::base::mutation::{Mutation, is};
use crate::format::byte_ring::{
    ACCEPTED, CLIENT_WAITS, COMPLETION_HEAD, COMPLETION_TAIL, CompletionImage, DURABLE_UP_TO, RingLayout,
    SERVER_SLEEPS, SUBMISSION_HEAD, SUBMISSION_TAIL, SubmissionImage, VOLUME_BYTES,
};
use crate::io::{Errno, SharedMap};
use crate::volume::{Request, RequestKind};

/// Runs of changes of which it is remembered when they become durable.
const UNDURABLE_MAX: usize = 8192;

/// How far the stage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Everything up to here is accepted.
    pub published: Lsn,
    /// Everything up to here is durable.
    pub durable: Lsn,
    /// Size of the volume.
    pub volume_bytes: u64,
}

/// A request that the door has.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    flags: u8,
    sequence: u64,
    cookie: u64,
    arena_offset: u32,
    lsn: u64,
}

/// A change of the session whose end is not known yet.
#[derive(Clone, Copy, Debug)]
struct Change {
    sequence: u64,
    state: ChangeState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChangeState {
    /// Waits for its place.
    Unplaced,
    Placed(Lsn),
    /// Refused: there is nothing that could be accepted.
    Refused,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing is in the ring.
    Nothing,
    /// There is no room for the completion, or as much is in flight as may be.
    Full,
    /// Feed this to the door.
    Request(Request),
    /// One submission was dealt with; look again.
    Again,
    /// The next submission has to wait for something that this thread is told of.
    Held,
    /// The client has broken the rules of the rings: the session ends.
    Broken(&'static str),
}

/// A session.
#[derive(Debug)]
pub struct Session<M: Shared = SharedMap> {
    number: u16,
    memory: Arc<M>,
    layout: RingLayout,
    write_bytes_max: u64,
    ties: Arc<Ties>,
    /// Submissions taken.
    taken: u64,
    /// Completions made.
    completed: u64,
    /// What the client knows of: submissions taken and released, completions made, accepted, durable.
    told: [u64; 5],
    /// The client took completions before this.
    reaped: u64,
    /// The next submission, when its turn has not come.
    held: Option<SubmissionImage>,
    requests: Vec<Option<InFlight>>,
    free: Vec<u32>,
    /// Changes that are not known to be accepted, in the order of submission.
    unaccepted: VecDeque<Change>,
    /// Of these: waiting for their place.
    unplaced: usize,
    /// Changes that are accepted and not known to be durable: the first submission of each run, and the last LSN of it.
    undurable: VecDeque<(u64, Lsn)>,
    accepted: u64,
    durable: u64,
    progress: Progress,
    /// Nobody takes completions any more, and submissions up to here were made.
    last: Option<u64>,
    /// A change that asked for no completion has failed (B8).
    has_hole: bool,
}

impl<M: Shared> Session<M> {
    /// Session `number` over `memory`, which is zeroed.
    #[must_use]
    pub fn new(
        number: u16,
        memory: Arc<M>,
        layout: RingLayout,
        write_bytes_max: u32,
        ties: Arc<Ties>,
        progress: Progress,
    ) -> Session<M> {
        assert!(memory.len_bytes() >= layout.memory_bytes());
        memory.word(VOLUME_BYTES).store(progress.volume_bytes, Ordering::Relaxed);
        Session {
            number,
            layout,
            write_bytes_max: u64::from(write_bytes_max),
            ties,
            taken: 0,
            completed: 0,
            told: [0; 5],
            reaped: 0,
            held: None,
            requests: vec![None; layout.depth as usize],
            free: (0..layout.depth).rev().collect(),
            unaccepted: VecDeque::new(),
            unplaced: 0,
            undurable: VecDeque::new(),
            accepted: 0,
            durable: 0,
            progress,
            last: None,
            has_hole: false,
            memory,
        }
    }

    /// The client is gone: what it has submitted by now is carried out, and nobody is told. A request that waits for another
    /// session then waits in vain. Somebody may still have the memory: what is written to it from now on does not count.
    pub fn client_is_gone(&mut self) {
        if self.last.is_none() {
            let tail = self.memory.word(SUBMISSION_TAIL).load(Ordering::Acquire);
            let tail = if is(Mutation::GoneClientsWorkIsDropped) { self.taken } else { tail };
            self.last = Some(tail.clamp(self.taken, self.taken + u64::from(self.layout.depth)));
        }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Name of the request that the door has as `tag`.
    #[must_use]
    pub fn ticket(&self, tag: u32) -> Ticket {
        Ticket::new(self.number, self.request(tag).sequence)
    }

    /// Requests that the door has.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// Takes the next submission, if there is one and its turn has come.
    pub fn take(&mut self) -> Next {
        let image = match self.held {
            Some(image) => image,
            None => match self.fetch_submission() {
                Ok(image) => image,
                Err(stopped) => return stopped,
            },
        };
        let operation = match self.check(&image) {
            Ok(operation) => operation,
            Err(errno) => return self.refuse(&image, errno),
        };
        match self.turn(operation, &image) {
            Ok(true) => {}
            Ok(false) => {
                self.held = Some(image);
                return Next::Held;
            }
            Err(errno) => return self.refuse(&image, errno),
        }
        self.held = None;
        self.taken += 1;
        if operation == Operation::Barrier {
            self.put_completion(image.cookie.get(), self.taken, 0, Ok(()), false);
            return Next::Again;
        }
        Next::Request(self.begin(operation, &image))
    }

    /// How far the stage is now, before submissions are looked at.
    pub fn refresh(&mut self, progress: Progress) {
        self.progress = progress;
        self.advance();
    }

    /// The last change that has its place and is not known to be accepted: other threads have to publish what is before it.
    #[must_use]
    pub fn waits_for(&self) -> Option<Lsn> {
        let placed = |change: &Change| match change.state {
            ChangeState::Placed(lsn) => Some(lsn),
            ChangeState::Unplaced | ChangeState::Refused => None,
        };
        self.unaccepted.iter().rev().find_map(placed)
    }

    /// Whether the submission that was held still is. What it waits for may have come about with what was told since.
    pub fn next_is_held(&mut self) -> bool {
        let Some(image) = self.held else { return false };
        self.check(&image).is_ok_and(|operation| self.turn(operation, &image) == Ok(false))
    }

    /// A submission from the ring. That there is room for its completion is made sure before it is taken.
    fn fetch_submission(&mut self) -> Result<SubmissionImage, Next> {
        let tail = self.client_tail();
        if tail == self.taken {
            return Err(Next::Nothing);
        }
        if tail.wrapping_sub(self.taken) > u64::from(self.layout.depth) {
            return Err(Next::Broken("the submission tail is not within the ring"));
        }
        if self.is_full() {
            let head = self.client_head();
            if head < self.reaped || head > self.told[2] {
                return Err(Next::Broken("the completion head is not within the ring"));
            }
            self.reaped = head;
            if self.is_full() {
                return Err(Next::Full);
            }
        }
        Ok(self.memory.image(self.layout.submission(self.taken)))
    }

    /// Submissions made, as the client says. One that is gone says nothing more.
    fn client_tail(&self) -> u64 {
        let last = self.last.filter(|_| !is(Mutation::GoneClientIsHeard));
        last.unwrap_or_else(|| self.memory.word(SUBMISSION_TAIL).load(Ordering::Acquire))
    }

    /// The same of completions taken.
    fn client_head(&self) -> u64 {
        let is_gone = self.last.is_some();
        if is_gone { self.reaped } else { self.memory.word(COMPLETION_HEAD).load(Ordering::Acquire) }
    }

    fn check(&self, image: &SubmissionImage) -> Result<Operation, Errno> {
        let operation = Operation::from_code(image.operation).ok_or(Errno::EOPNOTSUPP)?;
        let (offset, len) = (image.offset.get(), image.len.get());
        let is_change = is_change(operation);
        let flags = if is_change { DURABLE | SILENT } else { 0 };
        if image.flags & !flags != 0 || image.reserved.get() != 0 {
            return Err(Errno::EINVAL);
        }
        let has_range = is_change || operation == Operation::Read;
        if image.flags & SILENT != 0 && self.has_hole {
            return Err(Errno(libc::ECANCELED));
        }
        if !has_range {
            return if (offset, len) == (0, 0) { Ok(operation) } else { Err(Errno::EINVAL) };
        }
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        if offset.checked_add(len).is_none_or(|end| end > self.progress.volume_bytes) {
            return Err(Errno(libc::ERANGE));
        }
        if matches!(operation, Operation::Write | Operation::Read) {
            let end = u64::from(image.arena_offset.get()).checked_add(len);
            if end.is_none_or(|end| end > u64::from(self.layout.arena_bytes)) {
                return Err(Errno(libc::EFAULT));
            }
            if len > self.write_bytes_max {
                return Err(Errno(libc::EMSGSIZE));
            }
        }
        Ok(operation)
    }

    /// Whether the turn of a valid submission has come.
    fn turn(&mut self, operation: Operation, image: &SubmissionImage) -> Result<bool, Errno> {
        let looks_back =
            matches!(operation, Operation::Read | Operation::Flush) && !is(Mutation::ReadsOvertakeTickets);
        for ticket in image.after.iter().map(|t| Ticket(t.get())).filter(|t| *t != Ticket::NONE) {
            let ready = if ticket.session() == self.number {
                // The order within a session is given.
                let earlier = (1..=self.taken).contains(&ticket.sequence());
                if earlier { Tie::Ready } else { return Err(Errno::EINVAL) }
            } else {
                self.ties.state(ticket, looks_back, self.number)
            };
            match ready {
                Tie::Ready => {}
                Tie::NotYet if is(Mutation::TicketsAreNotWaitedFor) => {}
                Tie::NotYet => return Ok(false),
                Tie::Never => return Err(Errno(libc::ECANCELED)),
                Tie::Unknown => return Err(Errno::EINVAL),
            }
        }
        Ok(match operation {
            Operation::Barrier => self.in_flight() == 0 || is(Mutation::BarrierDoesNotWait),
            Operation::Read | Operation::Flush => {
                self.unaccepted.is_empty() || is(Mutation::ReadsOvertakeChanges)
            }
            // Nobody waits for it, so it waits for the word of the one before: that may be a refusal.
            _ if image.flags & SILENT != 0 => self.unplaced == 0,
            Operation::Write | Operation::WriteZeroes | Operation::Discard => true,
        })
    }

    fn begin(&mut self, operation: Operation, image: &SubmissionImage) -> Request {
        let tag = self.free.pop().expect("looked for before the submission was taken");
        let sequence = self.taken;
        self.requests[tag as usize] = Some(InFlight {
            flags: image.flags,
            sequence,
            cookie: image.cookie.get(),
            arena_offset: image.arena_offset.get(),
            lsn: 0,
        });
        let kind = match operation {
            Operation::Read => RequestKind::Read,
            Operation::Write => RequestKind::Write,
            Operation::WriteZeroes => RequestKind::WriteZeroes,
            Operation::Discard => RequestKind::Discard,
            Operation::Flush => RequestKind::Flush,
            Operation::Barrier => unreachable!("barriers are not for the door"),
        };
        if !matches!(operation, Operation::Read | Operation::Flush) {
            self.unaccepted.push_back(Change { sequence, state: ChangeState::Unplaced });
            self.unplaced += 1;
        }
        Request {
            tag,
            kind,
            offset: image.offset.get(),
            len: image.len.get(),
            fua: image.flags & DURABLE != 0,
        }
    }

    fn refuse(&mut self, image: &SubmissionImage, errno: Errno) -> Next {
        self.held = None;
        self.taken += 1;
        let silent =
            image.flags & SILENT != 0 && Operation::from_code(image.operation).is_some_and(is_change);
        self.has_hole |= silent && !is(Mutation::SilentFailureIsForgotten);
        self.put_completion(image.cookie.get(), self.taken, 0, Err(errno), silent);
        Next::Again
    }

    fn request(&self, tag: u32) -> &InFlight {
        self.requests[tag as usize].as_ref().expect("a request of this session")
    }

    /// As [`crate::volume::DoorIo::fetch`].
    pub fn fetch(&self, tag: u32, offset: u32, into: &mut [u8]) {
        let at = self.layout.arena() + self.request(tag).arena_offset as usize + offset as usize;
        self.memory.copy_out(at, into);
    }

    /// As [`crate::volume::DoorIo::deliver`].
    pub fn deliver(&self, tag: u32, offset: u32, from: &[u8]) {
        let at = self.layout.arena() + self.request(tag).arena_offset as usize + offset as usize;
        self.memory.copy_in(at, from);
    }

    fn settle(&mut self, sequence: u64, state: ChangeState) {
        if let Ok(at) = self.unaccepted.binary_search_by_key(&sequence, |change| change.sequence) {
            self.unplaced -= usize::from(self.unaccepted[at].state == ChangeState::Unplaced);
            self.unaccepted[at].state = state;
        }
    }

    /// As [`crate::volume::DoorIo::placed`].
    pub fn placed(&mut self, tag: u32, lsn: Lsn) {
        let request = self.requests[tag as usize].as_mut().expect("a request of this session");
        request.lsn = lsn.0;
        let sequence = request.sequence;
        self.settle(sequence, ChangeState::Placed(lsn));
    }

    /// As [`crate::volume::DoorIo::complete`].
    pub fn complete(&mut self, tag: u32, result: Result<(), Errno>) {
        let request = self.requests[tag as usize].take().expect("a request of this session");
        self.free.push(tag);
        if request.lsn == 0 {
            self.settle(request.sequence, ChangeState::Refused);
        }
        let silent = request.flags & SILENT != 0;
        if !silent || result.is_err() {
            self.has_hole |= silent && !is(Mutation::SilentFailureIsForgotten);
            self.put_completion(request.cookie, request.sequence, request.lsn, result, silent);
        }
    }

    fn put_completion(
        &mut self,
        cookie: u64,
        sequence: u64,
        lsn: u64,
        result: Result<(), Errno>,
        silent: bool,
    ) {
        if self.last.is_some() {
            return;
        }
        let errno = match result {
            Ok(()) => 0,
            Err(Errno(errno)) if (1..4096).contains(&errno) => -errno,
            Err(_) => -libc::EIO,
        };
        let image = CompletionImage {
            cookie: cookie.into(),
            ticket: Ticket::new(self.number, sequence).0.into(),
            lsn: lsn.into(),
            result: errno.into(),
            flags: u32::from(silent && errno != 0).into(),
        };
        self.memory.put_image(self.layout.completion(self.completed), &image);
        self.completed += 1;
    }

    /// Tells the client how far things are. Whether it wants to be woken because of that.
    pub fn tell(&mut self, progress: Progress) -> bool {
        self.refresh(progress);
        self.memory.word(VOLUME_BYTES).store(progress.volume_bytes, Ordering::Release);
        let now = [self.taken, self.released(), self.completed, self.accepted, self.durable];
        self.memory.word(SUBMISSION_HEAD).store(now[1], Ordering::Release);
        if now == self.told {
            return false;
        }
        self.told = now;
        // Completions first: whoever sees a change accepted also sees that an earlier one was refused.
        self.memory.word(COMPLETION_TAIL).store(self.completed, Ordering::Release);
        self.memory.word(ACCEPTED).store(self.accepted, Ordering::Release);
        self.memory.word(DURABLE_UP_TO).store(self.durable, Ordering::Release);
        self.ties.progress(self.number, self.taken, self.accepted);
        // Pairs with the client's fence between saying that it waits and looking once more.
        M::fence();
        let waits = self.memory.flag(CLIENT_WAITS);
        !is(Mutation::ClientIsNotRung)
            && waits.load(Ordering::Relaxed) != 0
            && waits.swap(0, Ordering::Relaxed) != 0
    }

    fn advance(&mut self) {
        let Progress { published, durable, .. } = self.progress;
        while let Some(change) = self.unaccepted.front() {
            match change.state {
                ChangeState::Placed(lsn) if lsn <= published || is(Mutation::AcceptedBeforePublished) => {
                    self.undurable.push_back((change.sequence, lsn))
                }
                ChangeState::Refused => {}
                ChangeState::Unplaced | ChangeState::Placed(_) => break,
            }
            self.unaccepted.pop_front();
        }
        while self.undurable.front().is_some_and(|(_, lsn)| *lsn <= durable) {
            self.undurable.pop_front();
        }
        if self.undurable.len() > UNDURABLE_MAX {
            self.merge_undurable();
        }
        let accepted = self.unaccepted.front().map_or(self.taken, |change| change.sequence - 1);
        assert!(accepted >= self.accepted, "B5: what was accepted stays accepted");
        self.accepted = accepted;
        // After runs were merged less is known than before: what was told stays true.
        let too_high = u64::from(is(Mutation::DurableWordTooHigh));
        let durable = self.undurable.front().map_or(accepted, |(first, _)| first - 1 + too_high);
        self.durable = durable.max(self.durable);
    }

    /// Halves what is remembered: two runs that become durable one after the other are one that does with the second.
    fn merge_undurable(&mut self) {
        let runs: Vec<(u64, Lsn)> = self.undurable.drain(..).collect();
        self.undurable.extend(runs.chunks(2).map(|pair| (pair[0].0, pair[pair.len() - 1].1)));
    }

    /// Submissions whose slot and payload the client may use again: those before the first that waits for its place. One
    /// behind it may have its place already: word of the first one's may still be under way from another thread.
    fn released(&self) -> u64 {
        if self.unplaced == 0 || is(Mutation::PayloadGivenBackEarly) {
            return self.taken;
        }
        let first = self.unaccepted.iter().find(|change| change.state == ChangeState::Unplaced);
        first.map_or(self.taken, |change| change.sequence - 1)
    }

    /// Submissions taken, and completions told to the client, so far.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let [_, _, completed, ..] = self.told;
        (self.taken, completed)
    }

    /// Says that this side is about to sleep; `false` if there is something to do after all.
    pub fn may_sleep(&self, is_held: bool) -> bool {
        self.memory.flag(SERVER_SLEEPS).store(1, Ordering::Relaxed);
        // Pairs with the client's fence between publishing a submission and looking at this flag.
        M::fence();
        let (tail, head) = (self.client_tail(), self.client_head());
        // Held, or without room for a completion: what changes that wakes this side, or moves the head.
        let idle = is_held || tail == self.taken || (head == self.reaped && self.is_full());
        if !idle {
            self.awake();
        }
        idle
    }

    fn is_full(&self) -> bool {
        let used = self.in_flight() as u64 + self.completed - self.reaped;
        let completions_full = used >= u64::from(self.layout.completion_depth()) && self.last.is_none();
        completions_full || self.free.is_empty()
    }

    /// This side looks at the rings again by itself.
    pub fn awake(&self) {
        self.memory.flag(SERVER_SLEEPS).store(0, Ordering::Relaxed);
    }
}

fn is_change(operation: Operation) -> bool {
    matches!(operation, Operation::Write | Operation::WriteZeroes | Operation::Discard)
}

impl<M: Shared> Drop for Session<M> {
    fn drop(&mut self) {
        self.ties.end(self.number, self.taken);
        if self.last.is_some() {
            // Whoever keeps the mapping of a client that is gone keeps no memory of the server's.
            self.memory.give_back();
        }
    }
}
