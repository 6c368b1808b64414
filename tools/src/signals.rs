//! Signals as values: blocked for the whole process, taken when it suits.
//!
//! A command that changes something must either finish or undo; a server must end in order. Both block the signals before
//! they start a thread and look for them at points of their choice. `SIGKILL` is what the formats are made for.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tidegate_driver::base::{Error, ErrorKind, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The signals that ask a process to end, while it does something that must not be cut short.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
    set: SigSet,
}

impl Signals {
    /// Takes over SIGINT, SIGTERM and SIGHUP for this thread and those it starts later.
    pub fn block() -> Result<Signals> {
        Signals::block_also(&[])
    }

    /// The same with further signals.
    pub fn block_also(more: &[Signal]) -> Result<Signals> {
        let usual = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
        let set = SigSet::from_iter(usual.into_iter().chain(more.iter().copied()));
        let fail = |e: Errno| Error::io("cannot take over signals", e.into());
        set.thread_block().map_err(fail)?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(fail)?;
        Ok(Signals { fd, set })
    }

    /// The next signal that has come, if any.
    pub fn next(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok().flatten()?;
        Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()
    }

    /// Waits until a signal has come, or for `patience`.
    pub fn wait(&self, patience: Duration) {
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        // An error ends the wait early: whoever waits looks for what it waits for all the same.
        if poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], patience).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Error if a signal has come since; for commands, between steps that can be undone.
    pub fn check(&self) -> Result<()> {
        match self.next() {
            None => Ok(()),
            Some(signal) => {
                INTERRUPTED.store(true, Ordering::Relaxed);
                Err(Error::new(ErrorKind::Io, format!("stopped by {signal}; nothing was changed")))
            }
        }
    }

    /// Gives the signals back: they act as usual again, those that came meanwhile at once.
    pub fn release(self) {
        // An error would mean that the set is not valid, which it was when it was blocked.
        let _ = self.set.thread_unblock();
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether a command ended because of a signal.
pub fn was_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
