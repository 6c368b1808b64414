//! How threads of a client wait for the server: one of them, the leader, waits at the socket; the others wait for it.
//!
//! Why no wake-up is lost: the server sends a byte if the client had said that it waits when progress was made. A thread
//! reads the epoch, then looks for what it wants, then waits for another epoch. The leader says that it waits, starts a new
//! epoch, looks for what it wants, and waits at the socket. So whoever looked before the leader said that it waits looks
//! again, and for whoever looked later the server sends a byte, after which there is a new epoch as well.
//!
//! An interruption is counted, then starts a new epoch and makes the leader leave the socket. So every call that has begun by
//! then looks at the count again.
//!
//! `checks.rs` has this code tried under schedules and orders of memory.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::Mutex;
use zerocopy::FromBytes;

use super::super::Failure;
use super::super::shared::{Shared, Word};
use super::ground::{Ground, Kernel};
use crate::format::byte_ring::{CLIENT_WAITS, WELCOME_MAGIC, WelcomeImage, text_of};

/// How long a call waits.
#[derive(Clone, Copy, Debug)]
pub(in crate::bytes) struct Limit {
    deadline: Option<Instant>,
    /// Interruptions before it began: they do not concern it.
    interruptions: u64,
}

impl Limit {
    /// The same for a call that waits until `deadline`.
    pub fn with_deadline(self, deadline: Option<Instant>) -> Limit {
        Limit { deadline, ..self }
    }
}

/// The socket, and those who wait at it.
#[derive(Debug)]
pub(in crate::bytes) struct Waiting<G = Kernel> {
    ground: G,
    gone: OnceLock<Failure>,
    /// What came of a last word of the server's.
    last_word: Mutex<Vec<u8>>,
    /// Changed with the turn held only.
    interruptions: AtomicU64,
}

impl<G: Ground> Waiting<G> {
    pub fn new(ground: G) -> Waiting<G> {
        Waiting {
            ground,
            gone: OnceLock::new(),
            last_word: Mutex::default(),
            interruptions: AtomicU64::new(0),
        }
    }

    #[cfg(test)]
    pub fn ground(&self) -> &G {
        &self.ground
    }

    /// Why the server is gone, if it is known to be.
    pub fn gone(&self) -> Option<&Failure> {
        self.gone.get()
    }

    /// Wakes the server.
    pub fn ring(&self) {
        self.ground.ring();
    }

    /// For a call that begins now.
    pub fn limit(&self, deadline: Option<Instant>) -> Limit {
        Limit { deadline, interruptions: self.interruptions.load(Ordering::Acquire) }
    }

    /// Whether a call has to return because it is interrupted.
    pub fn is_interrupted(&self, limit: Limit) -> bool {
        self.interruptions.load(Ordering::Acquire) != limit.interruptions
    }

    /// Interrupts every call that has begun.
    pub fn interrupt(&self) {
        let mut turn = self.ground.turn();
        self.interruptions.fetch_add(1, Ordering::Release);
        if turn.has_leader && !turn.is_nudged {
            turn.is_nudged = true;
            self.ground.nudge();
        }
        self.begin_epoch(&mut turn);
    }

    /// Takes what the server sent, without waiting; unless another thread waits at the socket, for which it is meant then.
    pub fn look(&self) {
        let mut turn = self.ground.turn();
        if turn.has_leader {
            return;
        }
        self.take();
        // Nobody waits at the socket, and nobody can begin to before this is over.
        self.begin_epoch(&mut turn);
    }

    /// Takes what the server sent, without waiting. Only for the leader, or where there is none: a byte taken by anybody
    /// else is one that the leader waits for.
    fn take(&self) {
        let mut bytes = [0; 1024];
        loop {
            match self.ground.take(&mut bytes) {
                Ok(0) => return self.lost(),
                Ok(len) => self.heard(&bytes[..len]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => return self.lost(),
            }
        }
    }

    /// A byte 1 says "look"; anything else is the server's last word.
    fn heard(&self, bytes: &[u8]) {
        let mut last = self.last_word.lock();
        let from = if last.is_empty() { bytes.iter().position(|b| *b != 1) } else { Some(0) };
        if let Some(from) = from
            && last.len() < size_of::<WelcomeImage>()
        {
            last.extend_from_slice(&bytes[from..]);
        }
    }

    fn lost(&self) {
        let last = self.last_word.lock();
        let why = match WelcomeImage::read_from_prefix(&last) {
            Ok((image, _)) if image.magic == WELCOME_MAGIC && image.errno.get() != 0 => {
                text_of(&image.message)
            }
            _ => "the server has died".to_owned(),
        };
        let what = format!("the session is over: {why}; open the volume again and look at what it holds");
        let _ = self.gone.set(Failure::new(libc::ENOTCONN, what));
    }

    /// Has those who wait look again.
    fn begin_epoch(&self, turn: &mut G::Held<'_>) {
        turn.epoch += 1;
        if turn.followers > 0 {
            self.ground.tell();
        }
    }

    /// Waits until `done` gives something, `None` after the deadline, an error once the server is gone or the call is
    /// interrupted.
    pub fn until<M: Shared, T>(
        &self,
        memory: &M,
        limit: Limit,
        mut done: impl FnMut() -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        loop {
            let epoch = self.ground.turn().epoch;
            if let Some(value) = done() {
                return Ok(Some(value));
            }
            if let Some(gone) = self.gone() {
                // What it did last may have come in between.
                return done().map(Some).ok_or_else(|| gone.clone());
            }
            if self.is_interrupted(limit) {
                return Err(interrupted());
            }
            let left = limit.deadline.map(|at| at.saturating_duration_since(self.ground.now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let mut turn = self.ground.turn();
            if turn.epoch != epoch {
                continue;
            }
            if turn.has_leader {
                turn.followers += 1;
                turn = self.ground.sit(turn, limit.deadline);
                turn.followers -= 1;
                continue;
            }
            turn.has_leader = true;
            drop(turn);
            let found = self.lead(memory, left, &mut done);
            self.hand_over();
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    fn lead<M: Shared, T>(
        &self,
        memory: &M,
        left: Option<Duration>,
        done: &mut impl FnMut() -> Option<T>,
    ) -> Option<T> {
        self.announce(memory);
        self.begin_epoch(&mut self.ground.turn());
        if let Some(value) = done() {
            return Some(value);
        }
        self.ground.listen(left);
        self.take();
        None
    }

    /// The leader leaves the socket to another.
    fn hand_over(&self) {
        let mut turn = self.ground.turn();
        turn.has_leader = false;
        if std::mem::take(&mut turn.is_nudged) {
            self.ground.calm();
        }
        self.begin_epoch(&mut turn);
    }

    /// Says that this side waits for a byte.
    pub fn announce<M: Shared>(&self, memory: &M) {
        memory.flag(CLIENT_WAITS).store(1, Ordering::Relaxed);
        // Pairs with the server's fence between telling how far it is and looking at this flag.
        M::fence();
    }
}

/// A call was interrupted.
pub(super) fn interrupted() -> Failure {
    let what =
        "interrupted by another thread; what the call had submitted by then is carried out all the same";
    Failure::new(libc::EINTR, what)
}
