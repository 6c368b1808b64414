//! Crashes that are aimed. Some mistakes show only after two or three rare things in a row, which chance alone seldom brings
//! together: a few lives are led up to them.
//!
//! | aim | first server | next server |
//! |---|---|---|
//! | `LandedCheckpoint` | a checkpoint's write fails and is on the device; power is cut in a write to a backing soon after | |
//! | `RegionTwice` | power is cut in the first group of a region | the same in the group that takes its place |
//! | `FullStage` | from a checkpoint on no backing can be written, until the log has gone round; then any crash | |
//! | `LabelTwice` | killed with a label in a cache | power is cut while it writes its first label |
//! | `LabelForgotten` | killed after a sync that failed and left a label for readers alone | likewise |

use std::sync::atomic::Ordering;

use tidegate_driver::base::RegionSeq;
use tidegate_driver::format::geometry::{CHECKPOINTS_OFFSET, PATCH_OFFSET};
use tidegate_driver::format::group::GROUP_HEADER_BYTES;
use tidegate_driver::format::record::RECORD_HEADER_BYTES;
use tidegate_driver::io::{Disk, Errno, OpKind, Target};
use tidegate_driver::volume::shared::log_write_of;

use super::client::Habits;
use super::disk::{Moment, SyncFailure, lock};
use super::flight::Flight;
use super::report::CrashKind;
use super::rng::Rng;
use super::running::Running;
use super::setup::World;
use super::site::{Site, disk_of};

/// Lives that are aimed, in a thousand.
const AIMED: u64 = 60;
/// Steps that an aimed crash waits for its moment.
const PATIENCE: u64 = 4000;
/// Steps that any other crash waits.
pub const PATIENCE_ORDINARY: u64 = 300;

/// What a life is led up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// A checkpoint that fails and is there.
    LandedCheckpoint,
    /// Two torn groups, one in the place of the other.
    RegionTwice,
    /// A log that goes round while its checkpoint stays.
    FullStage,
    /// Two labels, of which neither is durable.
    LabelTwice,
    /// The same by a failed sync.
    LabelForgotten,
}

const AIMS: [Aim; 5] =
    [Aim::LandedCheckpoint, Aim::RegionTwice, Aim::FullStage, Aim::LabelTwice, Aim::LabelForgotten];

/// A fault that waits for its operation, and sets the crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// The write of a checkpoint.
    Checkpoint,
    /// The same, but it succeeds, and from then on backings fail.
    LastCheckpoint,
    /// A sync of a backing.
    Sync,
}

/// How a life is to end.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Steps until the crash, or until the trap is set.
    pub steps: u64,
    /// How.
    pub kind: CrashKind,
    /// What the server should be doing then.
    pub moment: Moment,
    /// Steps to wait for that.
    pub patience: u64,
    /// What has to happen before.
    pub trap: Option<Trap>,
}

impl Plan {
    /// A crash by chance.
    #[must_use]
    pub fn ordinary(steps: u64, kind: CrashKind, moment: Moment) -> Plan {
        Plan { steps, kind, moment, patience: PATIENCE_ORDINARY, trap: None }
    }
}

impl World {
    /// How an aimed life ends; `None`: this one is not aimed. `left` are the lives that follow it.
    pub(super) fn aimed(&mut self, left: u64) -> Option<Plan> {
        let begun = self.aim.take().filter(|_| self.last_crash.is_some() && !self.is_second);
        let is_pair = |aim| !matches!(aim, Aim::LandedCheckpoint | Aim::FullStage);
        self.is_second = begun.is_some_and(is_pair);
        if self.is_second {
            self.aim = begun;
        } else if self.options.short.is_none() && left >= 2 && self.aims.chance(AIMED) {
            self.aim = Some(self.aims.pick(&AIMS));
        }
        let (kind, moment, trap) = match self.aim? {
            Aim::LandedCheckpoint => (CrashKind::Power, Moment::BackingWrite, Some(Trap::Checkpoint)),
            Aim::RegionTwice => (CrashKind::Power, Moment::RegionBegins, None),
            Aim::FullStage => {
                let kind = self.aims.pick(&[CrashKind::Power, CrashKind::Kill]);
                (kind, Moment::LogWrite, Some(Trap::LastCheckpoint))
            }
            Aim::LabelTwice | Aim::LabelForgotten if self.is_second => {
                (CrashKind::Power, Moment::Label, None)
            }
            Aim::LabelTwice => (CrashKind::Kill, self.aims.pick(&[Moment::Label, Moment::Sync]), None),
            Aim::LabelForgotten => (CrashKind::Kill, Moment::Sync, Some(Trap::Sync)),
        };
        let steps = if self.is_second { 1 } else { self.aims.range(20, 1200) };
        Some(Plan { steps, kind, moment, patience: PATIENCE, trap })
    }

    /// How many unflushed sectors the power cut of an aimed life loses, tears and turns to garbage, in a thousand.
    pub(super) fn aimed_cut(&self) -> Option<(u64, u64, u64)> {
        match self.aim? {
            Aim::LandedCheckpoint => Some((0, 0, 300)),
            Aim::RegionTwice => Some((500, 0, 0)),
            Aim::FullStage => None,
            Aim::LabelTwice | Aim::LabelForgotten => Some((500, 0, 500)),
        }
    }

    /// How the clients of this life behave.
    pub(super) fn habits(&mut self) -> Habits {
        let habits = match (self.habits, self.aim) {
            (Some(habits), Some(Aim::RegionTwice)) if self.is_second => habits,
            // One record a group and a sector a group, with pauses in which it is written.
            (_, Some(Aim::RegionTwice)) => {
                let doors: usize = self.doors.iter().sum();
                let bytes =
                    u64::from(self.stage.block_bytes()) - u64::from(GROUP_HEADER_BYTES + RECORD_HEADER_BYTES);
                Habits::steady(&mut self.aims, bytes, (self.latency_ns + 1000) * 4 * doors as u64)
            }
            (_, Some(Aim::FullStage)) => Habits::steady(&mut self.aims, 4096, 0),
            // The same habits again: what one server gave up and what the next one writes there look alike.
            (Some(habits), _) if self.rng.chance(500) => habits,
            _ => Habits::draw(&mut self.rng),
        };
        self.habits = Some(habits);
        habits
    }

    /// Whether everything is to be flushed now, in the `tick`-th step of a life.
    pub(super) fn flushes_now(&mut self, tick: u64) -> bool {
        match self.aim {
            Some(Aim::LabelTwice | Aim::LabelForgotten) => self.is_second && tick == 0,
            Some(Aim::FullStage) => self.aims.chance(50),
            _ => false,
        }
    }
}

/// Springs a trap that waits for this operation. `Some`: it has failed.
pub fn spring(flight: &Flight, site: &Site<'_>) -> Option<Errno> {
    let op = &flight.op;
    let mut ctl = lock(site.ctl);
    if ctl.step < ctl.crash_at {
        return None;
    }
    let checkpoints = CHECKPOINTS_OFFSET..PATCH_OFFSET;
    let is_checkpoint =
        op.target == Target::Stage && !flight.data.is_empty() && checkpoints.contains(&op.offset);
    let disk = disk_of(site, op.target);
    let mut errno = Some(Errno::EIO);
    match ctl.trap? {
        Trap::Checkpoint if is_checkpoint => disk.apply_durable(op.offset, &flight.data),
        Trap::LastCheckpoint if is_checkpoint => {
            errno = None;
            ctl.faults.backing_write = 1000;
        }
        Trap::Sync if op.target != Target::Stage && op.kind == OpKind::Sync => {
            let mut rng = Rng::new(ctl.rng.draw(), 7);
            disk.sync_failed(flight.moment, SyncFailure::Forgotten, &mut rng);
            ctl.crash_while = Moment::Any;
        }
        _ => return None,
    }
    let steps = if ctl.trap == Some(Trap::LastCheckpoint) { 1000 } else { 60 };
    ctl.trap = None;
    ctl.faults_injected += 1;
    ctl.crash_at = ctl.step + ctl.rng.below(steps);
    errno
}

impl Running {
    /// Whether what a crash is to interrupt is going on.
    pub(super) fn is_moment(&self, moment: Moment) -> bool {
        let on_stage = |f: &Flight| f.op.target == Target::Stage;
        self.flights.iter().any(|f| match moment {
            Moment::Any => true,
            Moment::LogWrite => on_stage(f) && log_write_of(f.op.token).is_some(),
            Moment::RegionBegins => {
                let in_regions = f.op.offset.checked_sub(self.shared.geometry.region_offset(RegionSeq(1)));
                let region_bytes = u64::from(self.shared.geometry.region_bytes);
                on_stage(f)
                    && log_write_of(f.op.token).is_some()
                    && in_regions.is_some_and(|at| at.is_multiple_of(region_bytes))
            }
            Moment::StageWrite => on_stage(f) && log_write_of(f.op.token).is_none(),
            Moment::BackingWrite => !on_stage(f) && !f.data.is_empty(),
            Moment::Label => match f.op.target {
                Target::Stage => false,
                Target::Backing(id) => {
                    let size = &self.volumes[usize::from(id.0) - 1].size_bytes;
                    !f.data.is_empty() && f.op.offset >= size.load(Ordering::Acquire)
                }
            },
            Moment::Sync => f.op.kind == OpKind::Sync,
        }) || moment == Moment::Any
    }
}
