//! What sessions of a stage know of each other: how far each is, so that requests of one can wait for those of another.
//!
//! Ownership: one [`Ties`] per stage, shared by the threads of all sessions behind a lock that is held for moments. A
//! session that has to wait leaves its waker; whoever makes progress triggers it. Waiting and progress happen under the
//! same lock, so no wake-up is lost.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Ticket;
use crate::volume::Wake;

/// Ended sessions that are remembered.
const ENDED_MAX: usize = 4096;

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
    /// Sessions that wait for this one, and for which of its requests.
    waiting: Vec<(u16, u64)>,
}

#[derive(Default)]
struct Known {
    next: u16,
    live: BTreeMap<u16, Live>,
    /// Requests that ended sessions had taken.
    ended: BTreeMap<u16, u64>,
}

/// The sessions of a stage.
#[derive(Default)]
pub struct Ties(Mutex<Known>);

impl fmt::Debug for Ties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ties({} sessions)", self.0.lock().live.len())
    }
}

impl Ties {
    /// Enters a session, whose thread is woken by `wake`. Its number; `None` if all are taken.
    pub fn begin(&self, wake: Arc<dyn Wake>) -> Option<u16> {
        let mut known = self.0.lock();
        let known = &mut *known;
        for _ in 0..u16::MAX {
            known.next = known.next.wrapping_add(1);
            let number = known.next;
            if number != 0 && !known.live.contains_key(&number) {
                known.ended.remove(&number);
                known.live.insert(number, Live { taken: 0, accepted: 0, wake, waiting: Vec::new() });
                return Some(number);
            }
        }
        None
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
            if !live.waiting.iter().any(|(session, _)| *session == asker) {
                live.waiting.push((asker, ticket.sequence()));
            }
            return Tie::NotYet;
        }
        match known.ended.get(&ticket.session()) {
            Some(taken) if (1..=*taken).contains(&ticket.sequence()) => Tie::Ready,
            Some(_) => Tie::Never,
            None => Tie::Unknown,
        }
    }

    /// A session has come this far.
    pub(super) fn progress(&self, session: u16, taken: u64, accepted: u64) {
        let mut known = self.0.lock();
        let Some(live) = known.live.get_mut(&session) else { return };
        (live.taken, live.accepted) = (taken, accepted);
        if live.waiting.is_empty() {
            return;
        }
        let waiting = std::mem::take(&mut live.waiting);
        wake_all(&known, &waiting);
    }

    /// A session has ended, having taken `taken` requests.
    pub(super) fn end(&self, session: u16, taken: u64) {
        let mut known = self.0.lock();
        let Some(live) = known.live.remove(&session) else { return };
        while known.ended.len() >= ENDED_MAX {
            known.ended.pop_first();
        }
        known.ended.insert(session, taken);
        wake_all(&known, &live.waiting);
    }
}

/// Those who still wait after looking again ask again, and so are entered again.
fn wake_all(known: &Known, waiting: &[(u16, u64)]) {
    for (session, _) in waiting {
        if let Some(live) = known.live.get(session) {
            live.wake.wake();
        }
    }
}
