//! What a server stands on: disks, time, wake-ups.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tidegate_driver::io::Target;
use tidegate_driver::volume::Wake;
use tidegate_driver::volume::shared::Clock;

use super::disk::{Ctl, SimDisk};

/// Why a life ends early.
#[derive(Debug)]
pub enum Stop {
    /// The step of the crash was reached.
    Crash,
    /// A promise was broken.
    Fail(String),
}

impl From<String> for Stop {
    fn from(what: String) -> Stop {
        Stop::Fail(what)
    }
}

/// Virtual time.
#[derive(Debug, Default)]
pub struct SimClock(pub AtomicU64);

impl Clock for SimClock {
    fn unix_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn monotonic_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A wake-up that the scheduler delivers when it likes.
#[derive(Debug, Default)]
pub struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Flag {
    /// Takes it.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }

    /// Whether it was raised.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
/// What does not change from one server to the next.
pub struct Site<'a> {
    /// Chance, steps, faults.
    pub ctl: &'a Ctl,
    /// The stage's disk.
    pub stage: &'a SimDisk,
    /// The backings, by position of their volume.
    pub backings: &'a [SimDisk],
    /// Time.
    pub clock: &'a Arc<SimClock>,
    /// Longest time an operation takes, in ns.
    pub latency_ns: u64,
}

/// The disk that an operation is for.
#[must_use]
pub fn disk_of<'a>(site: &Site<'a>, target: Target) -> &'a SimDisk {
    match target {
        Target::Stage => site.stage,
        Target::Backing(volume) => &site.backings[usize::from(volume.0) - 1],
    }
}
