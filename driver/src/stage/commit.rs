//! The committer: which group is written next. Pure.
//!
//! ```text
//!            next()                    written(Ok)
//!   Idle ───────────────▶ InFlight ───────────────▶ Idle        durable := last LSN of the group
//!                            │ ▲
//!             written(Err)   │ │ retry()
//!                            ▼ │
//!                          Failed                               nothing is durable until a retry succeeds (P2)
//! ```
//!
//! One group is in flight at a time, so arrivals gather for the next: group commit clocks itself. A group that failed is
//! written again as a whole, to the same place, from the arena: its blocks were never reported durable, so nothing
//! that was promised is touched.

use super::ring::{ClosedGroup, Ring};
use crate::base::Lsn;
use crate::base::mutation::{Mutation, is};

/// Where the committer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    InFlight(ClosedGroup),
    Failed(ClosedGroup),
}

/// The committer.
#[derive(Debug)]
pub struct Committer {
    state: State,
    durable: Lsn,
}

impl Committer {
    /// Committer of a log that is durable up to `durable`.
    #[must_use]
    pub fn new(durable: Lsn) -> Committer {
        Committer { state: State::Idle, durable }
    }

    /// Everything up to here is durable on the log device.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// Whether the last write failed and was not repeated with success yet.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        matches!(self.state, State::Failed(_))
    }

    /// The group to write now, if any: the oldest closed one, once every record of it is published. If none is closed and
    /// `close_open` says so, the open group is closed for it.
    pub fn next(&mut self, ring: &mut Ring, published: Lsn, close_open: bool) -> Option<ClosedGroup> {
        if self.state != State::Idle {
            return None;
        }
        if ring.first_closed().is_none() && close_open {
            ring.close_group();
        }
        let ready = ring
            .first_closed()
            .is_some_and(|group| group.last_lsn() <= published || is(Mutation::CommitBeforePublish));
        let group = if ready { ring.take_closed() } else { None }?;
        assert_eq!(group.first_lsn, self.durable.next(), "groups are written in order");
        self.state = State::InFlight(group);
        Some(group)
    }

    /// Takes the result of the write in flight; returns whether more is durable now.
    pub fn written(&mut self, ok: bool) -> bool {
        let State::InFlight(group) = self.state else { panic!("no group is in flight") };
        if ok || is(Mutation::FailedGroupCountsAsWritten) {
            self.durable = group.last_lsn();
            self.state = State::Idle;
        } else {
            self.state = State::Failed(group);
        }
        ok || is(Mutation::FailedGroupCountsAsWritten)
    }

    /// The failed group, to be written again.
    pub fn retry(&mut self) -> Option<ClosedGroup> {
        let State::Failed(group) = self.state else { return None };
        self.state = State::InFlight(group);
        Some(group)
    }
}
