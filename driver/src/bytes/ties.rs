//! What sessions of a stage know of each other: how far each is, so that requests of one can wait for those of another.
//!
//! Ownership: one [`Ties`] per stage, shared by the threads of all sessions behind a lock that is held for moments. A
//! session that has to wait leaves its waker; whoever makes progress triggers it. Waiting and progress happen under the
//! same lock, so no wake-up is lost.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Ticket;
use crate::base::mutation::{Mutation, is};
use crate::volume::Wake;
use crate::volume::admin::random_u64;

/// Ended sessions that are remembered.
const ENDED_MAX: usize = 4096;
/// Shared memory of all sessions of a stage together.
const MEMORY_BYTES_MAX: u64 = 1 << 30;

/// How a request stands that another one waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tie {
    /// As far as it has to be.
    Ready,
    /// The session that asked is woken when this changes.
    NotYet,
    /// Its session ended before it was taken.
    Never,
    /// There is no such session.
    Unknown,
}

struct Live {
    taken: u64,
    accepted: u64,
    wake: Arc<dyn Wake>,
    /// Who waits for this one, and for what.
    waiting: Vec<Waiter>,
}

#[derive(Clone, Copy)]
struct Waiter {
    session: u16,
    sequence: u64,
    needs_accepted: bool,
}

struct Known {
    next: u16,
    live: BTreeMap<u16, Live>,
    /// Requests that ended sessions had taken, and these sessions in the order of their end.
    ended: BTreeMap<u16, u64>,
    order: VecDeque<u16>,
    /// Shared memory of all sessions.
    memory_bytes: u64,
}

/// The sessions of a stage.
pub struct Ties(Mutex<Known>);

impl Default for Ties {
    fn default() -> Ties {
        // Anywhere, so that tickets of an earlier server are not taken for those of this one.
        Ties::numbered_after((random_u64() >> 32) as u16)
    }
}

impl fmt::Debug for Ties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ties({} sessions)", self.0.lock().live.len())
    }
}

impl Ties {
    /// No sessions yet; the first gets the number after `number`.
    #[must_use]
    pub fn numbered_after(number: u16) -> Ties {
        Ties(Mutex::new(Known {
            next: number,
            live: BTreeMap::new(),
            ended: BTreeMap::new(),
            order: VecDeque::new(),
            memory_bytes: 0,
        }))
    }

    /// Enters a session, whose thread is woken by `wake`. Its number; `None` if all are taken.
    pub fn begin(&self, wake: Arc<dyn Wake>) -> Option<u16> {
        let mut known = self.0.lock();
        let known = &mut *known;
        for _ in 0..u16::MAX {
            known.next = known.next.wrapping_add(1);
            let number = known.next;
            if number != 0 && !known.live.contains_key(&number) {
                if known.ended.remove(&number).is_some() {
                    known.order.retain(|ended| *ended != number);
                }
                known.live.insert(number, Live { taken: 0, accepted: 0, wake, waiting: Vec::new() });
                return Some(number);
            }
        }
        None
    }

    /// Sets shared memory aside for a session, if there is as much left of what all may have together.
    pub(super) fn reserve(&self, bytes: u64) -> bool {
        let mut known = self.0.lock();
        let fits = known.memory_bytes + bytes <= MEMORY_BYTES_MAX;
        known.memory_bytes += if fits { bytes } else { 0 };
        fits
    }

    /// Gives back what was set aside.
    pub(super) fn release(&self, bytes: u64) {
        self.0.lock().memory_bytes -= bytes;
    }

    /// How `ticket` stands for `asker`, which needs it to be accepted or only to be taken.
    pub(super) fn state(&self, ticket: Ticket, needs_accepted: bool, asker: u16) -> Tie {
        let mut known = self.0.lock();
        if let Some(live) = known.live.get_mut(&ticket.session()) {
            let reached = if needs_accepted { live.accepted } else { live.taken };
            if (1..=reached).contains(&ticket.sequence()) {
                return Tie::Ready;
            }
            if ticket.sequence() == 0 {
                return Tie::Unknown;
            }
            let waiter = Waiter { session: asker, sequence: ticket.sequence(), needs_accepted };
            match live.waiting.iter_mut().find(|w| w.session == asker) {
                Some(there) => *there = waiter,
                None => live.waiting.push(waiter),
            }
            return Tie::NotYet;
        }
        match known.ended.get(&ticket.session()) {
            Some(taken) if (1..=*taken).contains(&ticket.sequence()) => Tie::Ready,
            Some(_) if is(Mutation::EndedSessionsTicketsAreReady) => Tie::Ready,
            Some(_) => Tie::Never,
            None => Tie::Unknown,
        }
    }

    /// A session has come this far.
    pub(super) fn progress(&self, session: u16, taken: u64, accepted: u64) {
        let mut known = self.0.lock();
        let Some(live) = known.live.get_mut(&session) else { return };
        (live.taken, live.accepted) = (taken, accepted);
        if live.waiting.is_empty() || is(Mutation::WaitingSessionsAreNotWoken) {
            return;
        }
        let reached = |w: &mut Waiter| w.sequence <= if w.needs_accepted { accepted } else { taken };
        let waiting: Vec<Waiter> = live.waiting.extract_if(.., reached).collect();
        wake_all(&known, &waiting);
    }

    /// A session has ended, having taken `taken` requests.
    pub(super) fn end(&self, session: u16, taken: u64) {
        let mut known = self.0.lock();
        let Some(live) = known.live.remove(&session) else { return };
        while known.order.len() >= ENDED_MAX
            && let Some(oldest) = known.order.pop_front()
        {
            known.ended.remove(&oldest);
        }
        known.ended.insert(session, taken);
        known.order.push_back(session);
        wake_all(&known, &live.waiting);
    }
}

/// Those who still wait after looking again ask again, and so are entered again.
fn wake_all(known: &Known, waiting: &[Waiter]) {
    for waiter in waiting {
        if let Some(live) = known.live.get(&waiter.session) {
            live.wake.wake();
        }
    }
}
