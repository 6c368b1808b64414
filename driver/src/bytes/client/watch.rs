//! The descriptor that a program polls. The socket alone does not do: a call that waits takes the bytes that the server sent,
//! and with them completions that are the program's. So there are two, and one that is readable when either is.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::super::{Failure, Result};
use super::fork::Private;

/// See the module.
#[derive(Debug)]
pub(super) struct Watch {
    either: Private<Epoll>,
    /// Readable while completions were taken from the ring and not by the program.
    ready: EventFd,
    /// Nobody has to be told unless the program has asked for the descriptor.
    is_on: AtomicBool,
    /// `ready` is readable. Changed with the lock of the completions held only.
    is_told: AtomicBool,
}

impl Watch {
    pub fn new(socket: &UnixStream) -> Result<Watch> {
        let failed =
            |e: Errno| Failure::new(e as i32, format!("cannot make the descriptor that programs poll: {e}"));
        let either = Private::new(|| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed))?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let ready = EventFd::from_flags(flags).map_err(failed)?;
        either.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(failed)?;
        either.add(&ready, EpollEvent::new(EpollFlags::EPOLLIN, 1)).map_err(failed)?;
        Ok(Watch { either, ready, is_on: AtomicBool::new(false), is_told: AtomicBool::new(false) })
    }

    /// The program polls from now on.
    pub fn start(&self) {
        self.is_on.store(true, Ordering::SeqCst);
    }

    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::SeqCst)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.either.0.as_fd()
    }

    /// Whether there are completions for the program. The lock of the completions is held.
    pub fn tell(&self, are_there: bool) {
        if !self.is_on() || self.is_told.swap(are_there, Ordering::Relaxed) == are_there {
            return;
        }
        // Neither fails: the counter is 0 or 1.
        let _ = if are_there { self.ready.write(1).map(drop) } else { self.ready.read().map(drop) };
    }
}
