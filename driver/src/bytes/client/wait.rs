//! How threads of a client wait for the server: one of them, the leader, waits at the socket; the others wait for it.
//!
//! Why no wake-up is lost: the server sends a byte if the client had said that it waits when progress was made. A thread
//! reads the epoch, then looks for what it wants, then waits for another epoch. The leader says that it waits, starts a new
//! epoch, looks for what it wants, and waits at the socket. So whoever looked before the leader said that it waits looks
//! again, and for whoever looked later the server sends a byte, after which there is a new epoch as well.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use parking_lot::{Condvar, Mutex};
use zerocopy::FromBytes;

use super::super::Failure;
use crate::format::byte_ring::{CLIENT_WAITS, WELCOME_MAGIC, WelcomeImage, text_of};
use crate::io::SharedMap;

#[derive(Debug, Default)]
struct Turn {
    has_leader: bool,
    epoch: u64,
    followers: u32,
}

/// The socket, and those who wait at it.
#[derive(Debug)]
pub(super) struct Waiting {
    socket: UnixStream,
    bell: File,
    turn: Mutex<Turn>,
    changed: Condvar,
    gone: OnceLock<Failure>,
    /// What came of a last word of the server's.
    last_word: Mutex<Vec<u8>>,
}

impl Waiting {
    pub fn new(socket: UnixStream, bell: File) -> Waiting {
        Waiting {
            socket,
            bell,
            turn: Mutex::default(),
            changed: Condvar::new(),
            gone: OnceLock::new(),
            last_word: Mutex::default(),
        }
    }

    /// Why the server is gone, if it is known to be.
    pub fn gone(&self) -> Option<&Failure> {
        self.gone.get()
    }

    /// Wakes the server.
    pub fn ring(&self) {
        // Fails only when the counter is at its limit, and then it is awake.
        let _ = (&self.bell).write(&1u64.to_ne_bytes());
    }

    /// Takes what the server sent, without waiting; unless another thread waits at the socket, for which it is meant then.
    pub fn look(&self) {
        let mut turn = self.turn.lock();
        if turn.has_leader {
            return;
        }
        self.listen();
        // Nobody waits at the socket, and nobody can begin to before this is over.
        turn.epoch += 1;
        if turn.followers > 0 {
            self.changed.notify_all();
        }
    }

    /// Takes what the server sent, without waiting. Only for the leader, or where there is none: a byte taken by anybody
    /// else is one that the leader waits for.
    fn listen(&self) {
        let mut bytes = [0; 1024];
        loop {
            match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
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
    pub fn notify(&self) {
        let mut turn = self.turn.lock();
        turn.epoch += 1;
        if turn.followers > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits until `done` gives something, `None` after the deadline, an error once the server is gone.
    pub fn until<T>(
        &self,
        memory: &SharedMap,
        deadline: Option<Instant>,
        mut done: impl FnMut() -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        loop {
            let epoch = self.turn.lock().epoch;
            if let Some(value) = done() {
                return Ok(Some(value));
            }
            if let Some(gone) = self.gone() {
                // What it did last may have come in between.
                return done().map(Some).ok_or_else(|| gone.clone());
            }
            let left = match deadline {
                None => None,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    Some(left)
                }
            };
            let mut turn = self.turn.lock();
            if turn.epoch != epoch {
                continue;
            }
            if turn.has_leader {
                turn.followers += 1;
                match deadline {
                    None => self.changed.wait(&mut turn),
                    Some(deadline) => drop(self.changed.wait_until(&mut turn, deadline)),
                }
                turn.followers -= 1;
                continue;
            }
            turn.has_leader = true;
            drop(turn);
            let found = self.lead(memory, left, &mut done);
            let mut turn = self.turn.lock();
            turn.has_leader = false;
            turn.epoch += 1;
            if turn.followers > 0 {
                self.changed.notify_all();
            }
            drop(turn);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    fn lead<T>(
        &self,
        memory: &SharedMap,
        left: Option<Duration>,
        done: &mut impl FnMut() -> Option<T>,
    ) -> Option<T> {
        self.announce(memory);
        self.notify();
        if let Some(value) = done() {
            return Some(value);
        }
        self.wait_at_socket(left);
        self.listen();
        None
    }

    /// Says that this side waits for a byte.
    pub fn announce(&self, memory: &SharedMap) {
        memory.flag(CLIENT_WAITS).store(1, Ordering::Relaxed);
        // Pairs with the server's fence between telling how far it is and looking at this flag.
        fence(Ordering::SeqCst);
    }

    fn wait_at_socket(&self, left: Option<Duration>) {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left.as_micros().div_ceil(1000).min(1 << 30) as i32)
                .unwrap_or(PollTimeout::MAX)
        });
        // Whatever comes of it, the caller looks again.
        let _ = poll(&mut fds, timeout);
    }
}
