//! What the core decides, and for whom.

use super::ring::{ClosedGroup, Slot};
use crate::format::volume_entry::OnLogError;
use crate::io::Errno;

/// A door of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DoorId(pub u32);

/// Who waits for a record, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The door.
    pub door: DoorId,
    /// Its request.
    pub tag: u32,
    /// Whether it waits for durability or only for the published prefix.
    pub durable: bool,
    /// What to do when the log device fails.
    pub on_log_error: OnLogError,
}

/// What is to be done now that a decision was taken.
#[derive(Debug)]
pub enum Outcome {
    /// Complete a request.
    Complete {
        /// Its door.
        door: DoorId,
        /// The request.
        tag: u32,
        /// Its result.
        result: Result<(), Errno>,
    },
    /// A request that waited for space has its place.
    Claimed {
        /// Its door.
        door: DoorId,
        /// The request.
        tag: u32,
        /// The place.
        slot: Slot,
    },
    /// A request that was refused while waiting for space.
    Refused {
        /// Its door.
        door: DoorId,
        /// The request.
        tag: u32,
        /// Why.
        errno: Errno,
    },
    /// A read that waited for a region, or for a record to be published, is to be tried again.
    RetryRead {
        /// Its door.
        door: DoorId,
        /// The request.
        tag: u32,
    },
    /// What a door asked to be told of with [`super::core::Core::tell_when_published`] has come about.
    Published {
        /// The door.
        door: DoorId,
    },
    /// Write a group to the log device, durably, and report with [`super::core::Core::log_written`].
    WriteLog(ClosedGroup),
    /// The background has something to do.
    KickBackground,
}

impl Outcome {
    /// The door that it concerns, if it is one's.
    #[must_use]
    pub fn door(&self) -> Option<DoorId> {
        match self {
            Outcome::Complete { door, .. }
            | Outcome::Claimed { door, .. }
            | Outcome::Refused { door, .. }
            | Outcome::RetryRead { door, .. }
            | Outcome::Published { door } => Some(*door),
            Outcome::WriteLog(_) | Outcome::KickBackground => None,
        }
    }
}

/// Answer to a claim.
#[derive(Debug)]
pub enum Claim {
    /// The place.
    Slot(Slot),
    /// It waits; [`Outcome::Claimed`] or [`Outcome::Refused`] follows.
    Wait,
    /// Not now.
    Refused(Errno),
}
