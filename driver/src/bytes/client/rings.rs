//! The client's ends of the rings. What the server writes is believed, as it is believed with the data.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;

use super::super::shared::{Shared, Word};
use super::super::{Completion, Submission, Ticket};
use super::space::{Copies, Parts};
use crate::format::byte_ring::{
    COMPLETION_HEAD, COMPLETION_TAIL, CompletionImage, FAILED_SILENTLY, RingLayout, SERVER_SLEEPS,
    SUBMISSION_HEAD, SUBMISSION_TAIL, SubmissionImage,
};

/// The submitting end.
#[derive(Debug)]
pub(super) struct Submitter {
    /// Submissions made.
    pub tail: u64,
    /// As seen last: slots up to here can be used again.
    taken: u64,
    pub copies: Copies,
}

impl Submitter {
    pub fn new(parts: &Parts) -> Submitter {
        Submitter { tail: 0, taken: 0, copies: Copies::new(parts) }
    }

    /// Whether `count` submissions have room.
    pub fn has_room<M: Shared>(&mut self, memory: &M, layout: &RingLayout, count: usize) -> bool {
        let fits = |taken: u64| self.tail + count as u64 - taken <= u64::from(layout.depth);
        if fits(self.taken) {
            return true;
        }
        let taken = memory.word(SUBMISSION_HEAD).load(Ordering::Acquire);
        let has_room = fits(taken);
        self.taken = taken;
        has_room
    }

    /// Room for a copy that belongs to the next submission.
    pub fn room_for_copy<M: Shared>(&mut self, memory: &M, len: usize) -> Option<u32> {
        let sequence = self.tail + 1;
        if let Some(at) = self.copies.take(len, sequence) {
            return Some(at);
        }
        self.copies.give_back(memory.word(SUBMISSION_HEAD).load(Ordering::Acquire));
        self.copies.take(len, sequence)
    }

    /// Puts a submission behind the last; the server sees it after [`Submitter::publish`].
    pub fn put<M: Shared>(&mut self, memory: &M, layout: &RingLayout, submission: &Submission) {
        let image = SubmissionImage {
            operation: submission.operation,
            flags: submission.flags,
            reserved: 0.into(),
            arena_offset: submission.arena_offset.into(),
            offset: submission.offset.into(),
            len: submission.len.into(),
            cookie: submission.cookie.into(),
            after: submission.after.map(|ticket| ticket.0.into()),
        };
        memory.put_image(layout.submission(self.tail), &image);
        self.tail += 1;
    }

    /// Shows the server what was put. Whether it has to be woken.
    pub fn publish<M: Shared>(&self, memory: &M) -> bool {
        memory.word(SUBMISSION_TAIL).store(self.tail, Ordering::Release);
        server_sleeps(memory)
    }
}

/// Whether the server has to be woken. Pairs with its fence between saying that it sleeps and looking once more.
fn server_sleeps<M: Shared>(memory: &M) -> bool {
    M::fence();
    let sleeps = memory.flag(SERVER_SLEEPS);
    sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0
}

/// The cookie of the library's own requests.
pub(super) const OWN_COOKIE: u64 = u64::MAX;

/// What becomes of the completion of a request that this library made for a call of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Own {
    /// A call waits for it.
    Awaited,
    /// It is there.
    Done(Completion),
    /// Nobody is interested any more.
    Abandoned,
    /// The same, and it had this slot for reads.
    AbandonedRead(u32),
}

/// The completing end.
#[derive(Debug, Default)]
pub(super) struct Reaper {
    head: u64,
    /// Requests of the library.
    pub own: HashMap<u64, Own>,
    /// Completions for the program.
    pub ready: VecDeque<Completion>,
    /// Of the changes that nobody waited for and that failed: the first in the order of submission.
    pub failed: Option<Completion>,
    /// Slots for reads that came back.
    pub slots: Vec<u32>,
}

impl Reaper {
    /// Takes what is in the ring. Whether the server has to be woken because of that.
    pub fn collect<M: Shared>(&mut self, memory: &M, layout: &RingLayout) -> bool {
        let tail = memory.word(COMPLETION_TAIL).load(Ordering::Acquire);
        // More than the ring holds: not the server's word any more.
        if tail == self.head || tail.wrapping_sub(self.head) > u64::from(layout.completion_depth()) {
            return false;
        }
        while self.head != tail {
            let image: CompletionImage = memory.image(layout.completion(self.head));
            self.head += 1;
            self.sort(
                Completion {
                    cookie: image.cookie.get(),
                    ticket: Ticket(image.ticket.get()),
                    lsn: image.lsn.get(),
                    result: image.result.get(),
                },
                image.flags.get() & FAILED_SILENTLY != 0,
            );
        }
        memory.word(COMPLETION_HEAD).store(self.head, Ordering::Release);
        // One that had no room for completions waits for this. Looked at behind the fence that pairs with its own.
        M::fence();
        let tail = memory.word(SUBMISSION_TAIL).load(Ordering::Relaxed);
        memory.word(SUBMISSION_HEAD).load(Ordering::Relaxed) != tail && server_sleeps(memory)
    }

    /// Nobody waits for this request any more.
    pub fn give_up(&mut self, sequence: u64, otherwise: Own) {
        match (self.own.remove(&sequence), otherwise) {
            (Some(Own::Done(_)), Own::AbandonedRead(slot)) => self.slots.push(slot),
            (Some(Own::Done(_)), _) => {}
            _ => drop(self.own.insert(sequence, otherwise)),
        }
    }

    fn sort(&mut self, completion: Completion, silent: bool) {
        if silent {
            let is_first = self.failed.is_none_or(|failed| completion.ticket < failed.ticket);
            self.failed = self.failed.filter(|_| !is_first).or(Some(completion));
        }
        if completion.cookie != OWN_COOKIE {
            self.ready.push_back(completion);
            return;
        }
        let sequence = completion.ticket.sequence();
        match self.own.get_mut(&sequence) {
            Some(state @ Own::Awaited) => *state = Own::Done(completion),
            Some(Own::AbandonedRead(slot)) => {
                self.slots.push(*slot);
                self.own.remove(&sequence);
            }
            Some(Own::Abandoned | Own::Done(_)) => {
                self.own.remove(&sequence);
            }
            // A write that nobody waits for has a completion only if it failed.
            None => {}
        }
    }
}
