//! The byte door: a volume as byte-addressable persistent memory, for programs that want more than blocks.
//!
//! A *session* is one client's connection to one volume: a submission ring, a completion ring and an arena for payloads
//! in shared memory, and a socket for wake-ups. The client submits descriptors, the server's session thread feeds them to
//! a [`crate::volume::VolumeDoor`], completions come back.
//!
//! ```text
//!  client                 shared memory (format/byte_ring.rs)              server
//!  Device ── descriptor ─▶ submission ring ─────────────────▶ Session ─▶ VolumeDoor ─▶ stage
//!    ▲   ── payload ─────▶ arena ── copied once, into the record's place ────────────────▲
//!    └──── completion ◀─── completion ring ◀──────────────────┘
//!                         accepted, durable: one word each
//! ```
//!
//! | what | after `accepted` | after `durable` |
//! |---|---|---|
//! | the client dies | kept | kept |
//! | the server dies, or is killed | kept: the next server finds the arena | kept |
//! | the machine loses power | a prefix may be lost | kept |
//!
//! Whatever is lost, what stays is a prefix of the order of LSNs, over all volumes and sessions of the stage.
//!
//! Rules of a session:
//! - B1 changes get their LSN in the order of submission;
//! - B2 a read sees every change submitted before it on its session;
//! - B3 a request that names tickets gets its place after theirs; a ticket whose session ended before it was taken fails
//!   it with `ECANCELED`;
//! - B4 a barrier completes when everything before it has, and nothing after it begins before that;
//! - B5 `accepted` and `durable` never go back and never claim a change that is not;
//! - B6 the client is not trusted: the server copies a descriptor before it looks at it, keeps its own counters, bounds
//!   every offset and length, computes checksums over its own copy, and waits for nothing that only the client can do;
//! - B7 a session begins when the sessions of the volume whose clients were gone before are over: what they had submitted is
//!   carried out or dropped by then, and nothing of it comes later;
//! - B8 after a change that asked for no completion has failed, later ones of the session that ask for none fail too, so what
//!   stays of them has no hole;
//! - B9 of the sessions that ask to be the volume's sole writer there is one at a time; it is over before the next begins.
//!   Sessions that do not ask are not kept from writing.

pub mod client;
pub mod gate;
pub mod local;
pub mod log;
#[cfg(any(test, feature = "samples"))]
pub mod memory_store;
pub mod round;
mod serve;
pub mod session;
pub mod shared;
pub mod ties;

use std::fmt;
use std::time::Duration;

use uuid::Uuid;

use crate::format::volume_entry::AckLevel;
use crate::io::Errno;

/// Name of a request among all sessions of a stage: its session in the upper 16 bits, its number in the session below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

const SEQUENCE_BITS: u32 = 48;

impl Ticket {
    /// No request.
    pub const NONE: Ticket = Ticket(0);

    /// The request `sequence` (from 1) of `session`.
    #[must_use]
    pub fn new(session: u16, sequence: u64) -> Ticket {
        debug_assert!(sequence < 1 << SEQUENCE_BITS);
        Ticket(u64::from(session) << SEQUENCE_BITS | sequence)
    }

    /// Its session.
    #[must_use]
    pub fn session(self) -> u16 {
        (self.0 >> SEQUENCE_BITS) as u16
    }

    /// Its number in the session.
    #[must_use]
    pub fn sequence(self) -> u64 {
        self.0 & ((1 << SEQUENCE_BITS) - 1)
    }
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub errno: Errno,
    /// For people: what, where, what to do.
    pub what: String,
}

impl Failure {
    /// A failure with the errno value `errno`.
    pub fn new(errno: i32, what: impl Into<String>) -> Failure {
        Failure { errno: Errno(errno), what: what.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// Result of the calls of this module.
pub type Result<T> = std::result::Result<T, Failure>;

/// Durable before it completes, whatever the ack level.
pub const DURABLE: u8 = 1;
/// No completion if it succeeds.
pub const SILENT: u8 = 2;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// Fill the arena range from the volume.
    Read = 1,
    /// Write the arena range to the volume, as one record.
    Write = 2,
    /// Make a range zero.
    WriteZeroes = 3,
    /// A range is no longer needed.
    Discard = 4,
    /// Completes when everything submitted before it is durable.
    Flush = 5,
    /// Completes when everything submitted before it has completed; what comes after begins then.
    Barrier = 6,
}

impl Operation {
    /// The operation with this code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Operation> {
        use Operation::{Barrier, Discard, Flush, Read, Write, WriteZeroes};
        [Read, Write, WriteZeroes, Discard, Flush, Barrier].into_iter().find(|op| *op as u8 == code)
    }
}

/// Most tickets that a submission can name.
pub const DEPENDENCIES_MAX: usize = 4;

/// One request, as a client makes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Submission {
    /// Code of an [`Operation`].
    pub operation: u8,
    /// [`DURABLE`], [`SILENT`].
    pub flags: u8,
    /// Where the payload is in the arena, or goes to.
    pub arena_offset: u32,
    /// First byte of the volume.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The client's name for it, handed back with the completion.
    pub cookie: u64,
    /// Requests that must have their place in the order before this one gets its own; [`Ticket::NONE`] is ignored.
    pub after: [Ticket; DEPENDENCIES_MAX],
}

/// A finished request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// As submitted.
    pub cookie: u64,
    /// The request.
    pub ticket: Ticket,
    /// Its place in the order of the stage; 0 for requests that change nothing.
    pub lsn: u64,
    /// 0, or a negative errno value.
    pub result: i32,
}

/// What a session is to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Name of the volume.
    pub name: String,
    /// Its size now.
    pub volume_bytes: u64,
    /// Longest write.
    pub write_bytes_max: u32,
    /// Requests that may be submitted and not taken.
    pub depth: u32,
    /// Size of the arena.
    pub arena_bytes: u32,
    /// Ack level of the volume.
    pub ack: AckLevel,
    /// The stage.
    pub stage_uuid: Uuid,
    /// The volume.
    pub volume_uuid: Uuid,
}

/// Byte-addressable persistent storage, as much of it as a log needs.
pub trait ByteStore {
    /// Size of the volume in bytes.
    fn volume_bytes(&self) -> u64;
    /// Longest write in bytes.
    fn write_bytes_max(&self) -> u32;
    /// Reads; sees every write that was begun before.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()>;
    /// Writes `parts`, one after the other, as one atomic change, which comes after all changes that were begun before. The
    /// payload was taken over when this returns; it need not be accepted or durable.
    fn write(&self, offset: u64, parts: &[&[u8]]) -> Result<Ticket>;
    /// Every change up to this ticket is durable. Stays before a change that failed.
    fn durable(&self) -> Ticket;
    /// Waits until every change up to `ticket` is durable; `ETIMEDOUT`. Fails, every time, if one of them failed.
    fn persist(&self, ticket: Ticket, timeout: Option<Duration>) -> Result<()>;
}
