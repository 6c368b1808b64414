//! What waiting stands on: the socket, the bell, the time, and a place for threads to wait for each other.

use std::fs::File;
use std::io::Write;
use std::ops::DerefMut;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::fork::Private;
use crate::base::patience::Patience;

/// How long a thread looks for an answer before it sleeps: about what it costs both sides if it has to be woken.
const LOOK: Duration = Duration::from_micros(20);

/// Whose turn it is to wait at the socket.
#[derive(Debug, Default)]
pub(in crate::bytes) struct Turn {
    pub has_leader: bool,
    /// The leader was nudged, and has not taken that back.
    pub is_nudged: bool,
    pub epoch: u64,
    pub followers: u32,
}

/// See the module. Programs have [`Kernel`]; tests have what a checker of schedules gives.
pub(in crate::bytes) trait Ground {
    type Held<'a>: DerefMut<Target = Turn>
    where
        Self: 'a;

    /// The turn, for as long as it is held.
    fn turn(&self) -> Self::Held<'_>;
    /// Lets others have the turn until [`Ground::tell`] or the deadline, or for no reason.
    fn sit<'a>(&'a self, turn: Self::Held<'a>, deadline: Option<Instant>) -> Self::Held<'a>;
    /// Has those who sit get up.
    fn tell(&self);
    /// Looks for a short while whether `done`, if that may pay.
    fn look_for_a_while(&self, done: &mut dyn FnMut() -> bool) -> bool;
    /// Waits until there is something to take, or until [`Ground::nudge`], or for so long, or is woken for no reason.
    fn listen(&self, left: Option<Duration>);
    /// Has whoever listens, or will, not wait, until [`Ground::calm`].
    fn nudge(&self);
    /// Takes a nudge back.
    fn calm(&self);
    /// Takes what the server has sent: 0 bytes if it is gone, `EAGAIN` if there is nothing.
    fn take(&self, into: &mut [u8]) -> Result<usize, Errno>;
    /// Wakes the server.
    fn ring(&self);
    /// The time.
    fn now(&self) -> Instant;
}

/// What the kernel gives.
#[derive(Debug)]
pub(in crate::bytes) struct Kernel {
    socket: Private<UnixStream>,
    bell: File,
    nudge: EventFd,
    turn: Mutex<Turn>,
    changed: Condvar,
    patience: Mutex<Patience>,
}

impl Kernel {
    pub fn new(socket: Private<UnixStream>, bell: File) -> Result<Kernel, Errno> {
        let nudge = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Kernel {
            socket,
            bell,
            nudge,
            turn: Mutex::default(),
            changed: Condvar::new(),
            patience: Mutex::default(),
        })
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // The session is over even if a copy of the socket is left somewhere.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Ground for Kernel {
    type Held<'a> = MutexGuard<'a, Turn>;

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock()
    }

    fn sit<'a>(&'a self, mut turn: MutexGuard<'a, Turn>, deadline: Option<Instant>) -> MutexGuard<'a, Turn> {
        match deadline {
            None => self.changed.wait(&mut turn),
            Some(deadline) => drop(self.changed.wait_until(&mut turn, deadline)),
        }
        turn
    }

    fn tell(&self) {
        self.changed.notify_all();
    }

    fn look_for_a_while(&self, done: &mut dyn FnMut() -> bool) -> bool {
        // Held by the leader only, who is one.
        let mut patience = self.patience.lock();
        if !patience.attempts() {
            return false;
        }
        let until = Instant::now() + LOOK;
        loop {
            if done() {
                patience.paid();
                return true;
            }
            if Instant::now() >= until {
                patience.in_vain();
                return false;
            }
            std::hint::spin_loop();
        }
    }

    fn listen(&self, left: Option<Duration>) {
        let mut fds = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.nudge.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left.as_micros().div_ceil(1000).min(1 << 30) as i32)
                .unwrap_or(PollTimeout::MAX)
        });
        // Whatever comes of it, the caller looks again.
        let _ = poll(&mut fds, timeout);
    }

    fn nudge(&self) {
        // Does not fail: the counter is 0.
        let _ = self.nudge.write(1);
    }

    fn calm(&self) {
        let _ = self.nudge.read();
    }

    fn take(&self, into: &mut [u8]) -> Result<usize, Errno> {
        recv(self.socket.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)
    }

    fn ring(&self) {
        // Fails only when the counter is at its limit, and then it is awake.
        let _ = (&self.bell).write(&1u64.to_ne_bytes());
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}
