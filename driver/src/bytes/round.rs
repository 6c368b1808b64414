//! What the thread of a session decides, without I/O: one round over the rings, the door and the ends that a session can
//! come to. The thread (`serve`) and the simulator drive it.
//!
//! One round: take submissions; end the batch, unless the door waits for more; tell the client; then go round again, look for
//! more, or sleep until an operation of the door ends, the door is woken or the client rings.
//!
//! A client that was told of completions often submits again at once. To be woken takes longer than that, so the thread looks
//! at the ring for a short while before it sleeps, unless that was in vain before.

use super::session::{Next, Progress, Session};
use crate::base::mutation::{Mutation, is};
use crate::base::patience::Look;
use crate::volume::{Door, DoorIo, RequestKind, VolumeDoor};

/// Submissions fed between two looks at everything else.
const FEED_MAX: u32 = 64;
/// Bytes of payload among them.
const FEED_BYTES_MAX: u64 = 1 << 20;

/// How long the thread looks for a client's answer before it sleeps: about what it costs both sides if it is woken.
const LINGER_NS: u64 = 20_000;

/// What a round works with.
pub trait SessionIo: DoorIo {
    /// The session.
    fn session(&mut self) -> &mut Session;
    /// Operations that the door has begun and that have not ended.
    fn ops_in_flight(&self) -> usize;
    /// Wakes the client.
    fn ring(&mut self);
    /// Request `tag` goes to the door now. For checkers.
    fn begins(&mut self, _tag: u32) {}
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client closed its socket, or died.
    ClientGone,
    /// The gate is closed.
    Told,
    /// The client broke the rules.
    Broken(&'static str),
}

/// What the thread does after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Another round, with the events that are at hand by then.
    Again,
    /// The same, where time has to pass for it to make sense.
    Look,
    /// Wait for an event; [`Session::awake`] before the next round.
    Sleep,
    /// The session is over and has nothing in flight.
    Over(End),
}

/// How far a door's stage is.
#[must_use]
pub fn progress(door: &VolumeDoor) -> Progress {
    let (published, durable) = door.progress();
    Progress { published, durable, volume_bytes: door.volume_bytes() }
}

/// The rounds of a session.
#[derive(Debug, Default)]
pub struct Rounds {
    client_gone: bool,
    end: Option<End>,
    /// The thread's look for the client's answer.
    look: Look,
}

impl Rounds {
    /// The client is gone.
    pub fn client_is_gone(&mut self, session: &mut Session) {
        self.client_gone = true;
        session.client_is_gone();
    }

    /// The gate is closed: what the door has is carried out, and no more is taken.
    pub fn told_to_end(&mut self) {
        self.end.get_or_insert(End::Told);
    }

    /// One round, after the events at hand have gone to the door.
    pub fn round<IO: SessionIo>(&mut self, door: &mut VolumeDoor, io: &mut IO) -> Then {
        let before = Activity::of(io.session());
        let next = if self.end.is_none() { feed(door, io) } else { Next::Nothing };
        let gathers = self.end.is_none() && next == Next::Nothing && door.waits_for_more(io);
        if !gathers {
            door.batch_end(io);
        }
        if io.session().tell(progress(door)) {
            io.ring();
        }
        if gathers {
            return Then::Look;
        }
        let session = io.session();
        // What a held submission waits for may have come about since it was looked at; if not, somebody has to say so.
        let held = next == Next::Held && session.next_is_held();
        // The client and other sessions wait for the word of what is accepted, too.
        let behind = !is(Mutation::AcceptedIsNotTold)
            && session.waits_for().is_some_and(|lsn| !door.tell_when_accepted(lsn));
        let settled = !behind
            && match next {
                Next::Broken(what) => {
                    self.end = Some(End::Broken(what));
                    true
                }
                Next::Again | Next::Request(_) => false,
                Next::Held => held,
                Next::Nothing | Next::Full => true,
            };
        let in_flight = session.in_flight();
        // What it had submitted is carried out, up to what would wait for another session.
        if self.client_gone && self.end.is_none() && settled && in_flight == 0 && next != Next::Full {
            self.end = Some(End::ClientGone);
        }
        let Some(end) = self.end else {
            if !settled {
                return Then::Again;
            }
            let activity = Activity::of(session);
            if self.lingers(before, activity, door.now_ns()) {
                return Then::Look;
            }
            return if session.may_sleep(held) { Then::Sleep } else { Then::Again };
        };
        if in_flight == 0 {
            // A door works for others too: it may have begun to write the log for all of them.
            if io.ops_in_flight() == 0 || is(Mutation::SessionEndsDuringALogWrite) {
                return Then::Over(end);
            }
            Door::<IO>::retire(door);
        }
        Then::Sleep
    }

    /// Whether to look at the ring for a while longer, after a round that led from `before` to `after`.
    fn lingers(&mut self, before: Activity, after: Activity, now_ns: u64) -> bool {
        let came = after.taken != before.taken;
        if self.look.is_on() {
            if !came && self.look.goes_on(now_ns, LINGER_NS) {
                return true;
            }
            self.look.ends(came);
        }
        let told = after.completed != before.completed;
        told && self.look.goes_on(now_ns, LINGER_NS)
    }
}

/// What a session has done so far.
#[derive(Clone, Copy, Debug)]
struct Activity {
    /// Submissions taken.
    taken: u64,
    /// Completions told.
    completed: u64,
}

impl Activity {
    fn of(session: &Session) -> Activity {
        let (taken, completed) = session.counts();
        Activity { taken, completed }
    }
}

/// Takes what is in the ring, a bounded part of it. What stopped it.
fn feed<IO: SessionIo>(door: &mut VolumeDoor, io: &mut IO) -> Next {
    io.session().refresh(progress(door));
    let mut bytes = 0;
    for _ in 0..FEED_MAX {
        match io.session().take() {
            Next::Request(request) => {
                if matches!(request.kind, RequestKind::Read | RequestKind::Write) {
                    bytes += request.len;
                }
                io.begins(request.tag);
                door.request(request, io);
                // The log write that this thread may have in flight is everybody's: its end is not to wait for long.
                if bytes >= FEED_BYTES_MAX {
                    return Next::Again;
                }
            }
            Next::Again => {}
            // It may wait for the places of changes before it, which the door has gathered.
            Next::Held if door.has_gathered() => door.settle(io),
            stopped => return stopped,
        }
    }
    Next::Again
}
