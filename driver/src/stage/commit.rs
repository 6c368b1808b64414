//! The committer: which group is written next, and how far the log is durable. Pure.
//!
//! Of one group:
//! ```text
//!            next()                  written(Ok)               take_durable()
//!   closed ─────────▶ Writing ───────────────────▶ Written ───────────────────▶ durable
//!                      │   ▲                        (waits for those before it)
//!        written(Err)  │   │ retry()
//!                      ▼   │
//!                      Failed                       nothing from here on is durable until a retry succeeds (P2)
//! ```
//!
//! Invariants (asserted):
//! - G1 groups begin to be written in the order of their sequence numbers, and become durable in that order whatever the order
//!   of their completions;
//! - G2 at most [`GROUPS_IN_FLIGHT_MAX`] groups have begun and are not durable;
//! - G3 the first group of a region begins when everything before it is durable. So a region's header on the device proves the
//!   regions before it, and recovery looks for the log's end in one region only;
//! - G4 nothing begins while a group has failed.
//!
//! When the open group is closed and begun: with nothing in flight, at once. With a group in flight, while that has less
//! than half of the time behind it that writes take: a record that comes just after a write has begun would wait for two.
//! Later it is better off with those that come when the write is over. So group commit clocks itself; time only decides how
//! large groups are. Groups that are full begin as soon as they may.
//!
//! A group that failed is written again as a whole, to the same place, from the arena: its blocks were never reported
//! durable, so nothing that was promised is touched.

use std::collections::VecDeque;

use super::ring::{ClosedGroup, Ring};
use crate::base::Lsn;
use crate::base::limits::GROUPS_IN_FLIGHT_MAX;
use crate::base::mutation::{Mutation, is};

/// Where a group stands that has begun and is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Writing,
    Written,
    Failed,
    /// Being written once more.
    Retried,
}

/// The committer.
#[derive(Debug)]
pub struct Committer {
    /// Groups that have begun and are not durable, in order.
    begun: VecDeque<(ClosedGroup, State)>,
    durable: Lsn,
    /// When the last group began.
    last_began_ns: u64,
    /// How long the writes of groups take, about.
    write_ns: u64,
}

impl Committer {
    /// Committer of a log that is durable up to `durable`.
    #[must_use]
    pub fn new(durable: Lsn) -> Committer {
        Committer {
            begun: VecDeque::with_capacity(GROUPS_IN_FLIGHT_MAX),
            durable,
            last_began_ns: 0,
            write_ns: 0,
        }
    }

    /// Everything up to here is durable on the log device.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// Everything up to here is durable or in a group that has begun.
    #[must_use]
    pub fn begun(&self) -> Lsn {
        self.begun.back().map_or(self.durable, |(group, _)| group.last_lsn())
    }

    /// Whether a group in flight has failed and was not begun again yet.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.first_failed().is_some()
    }

    /// Whether a group has failed and was not written since: between [`Committer::retry`] and its end, too.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.begun.iter().any(|(_, state)| matches!(state, State::Failed | State::Retried))
    }

    /// LSN of the first record that such a group holds.
    #[must_use]
    pub fn first_failed(&self) -> Option<Lsn> {
        self.begun.iter().find(|(_, state)| *state == State::Failed).map(|(group, _)| group.first_lsn)
    }

    /// How many groups before the group `group_seq`, which has begun, are not known to be durable.
    #[must_use]
    pub fn undurable_before(&self, group_seq: u64) -> u32 {
        if is(Mutation::GroupsClaimTooMuchProof) {
            return 0;
        }
        self.begun.iter().filter(|(group, _)| group.group_seq < group_seq).count() as u32
    }

    /// How long the write of a group takes, about; 0 as long as nothing is known.
    #[must_use]
    pub fn write_ns(&self) -> u64 {
        self.write_ns
    }

    /// Whether a group may begin at `now_ns` (monotonic) for which the open group would have to be closed.
    #[must_use]
    pub fn may_close(&self, now_ns: u64) -> bool {
        let has_room = self.begun.len() < GROUPS_IN_FLIGHT_MAX && !self.has_failed();
        let just_began = now_ns.saturating_sub(self.last_began_ns) < self.write_ns / 2;
        has_room && (self.begun.is_empty() || just_began)
    }

    /// The group to write now, at `now_ns`, if any: the oldest closed one, once every record of it is published. If none is
    /// closed and `close_open` says so, the open group is closed for it, when the time is right.
    pub fn next(
        &mut self,
        ring: &mut Ring,
        published: Lsn,
        close_open: bool,
        now_ns: u64,
    ) -> Option<ClosedGroup> {
        if self.begun.len() >= GROUPS_IN_FLIGHT_MAX || self.has_failed() {
            return None;
        }
        if ring.first_closed().is_none() && close_open && self.may_close(now_ns) {
            ring.close_group();
        }
        let group = ring.first_closed()?;
        let ready = group.last_lsn() <= published || is(Mutation::CommitBeforePublish);
        let may_begin = !group.begins_region() || self.begun.is_empty() || is(Mutation::RegionBeginsTooEarly);
        if !(ready && may_begin) {
            return None;
        }
        let group = ring.take_closed()?;
        assert_eq!(group.first_lsn, self.begun().next(), "G1");
        self.begun.push_back((group, State::Writing));
        self.last_began_ns = now_ns;
        Some(group)
    }

    /// Takes the result of the write of the group `group_seq`, at `now_ns`. What is durable then is told by
    /// [`Committer::take_durable`].
    pub fn written(&mut self, group_seq: u64, ok: bool, now_ns: u64) {
        let ok = ok || is(Mutation::FailedGroupCountsAsWritten);
        if ok && self.begun.back().is_some_and(|(last, _)| last.group_seq == group_seq) {
            let took_ns = now_ns.saturating_sub(self.last_began_ns);
            self.write_ns = if self.write_ns == 0 { took_ns } else { (self.write_ns * 7 + took_ns) / 8 };
        }
        let found = self.begun.iter_mut().find(|(group, _)| group.group_seq == group_seq);
        let Some((_, state)) = found else {
            assert!(
                is(Mutation::GroupsBecomeDurableInAnyOrder),
                "G1: a group is durable when its write is over"
            );
            return;
        };
        assert!(matches!(state, State::Writing | State::Retried), "one write of a group at a time");
        *state = if ok { State::Written } else { State::Failed };
    }

    /// Takes the next group in order that is durable now.
    pub fn take_durable(&mut self) -> Option<ClosedGroup> {
        let is_written = |(_, state): &&(ClosedGroup, State)| *state == State::Written;
        let out_of_order =
            is(Mutation::GroupsBecomeDurableInAnyOrder) && self.begun.iter().any(|g| is_written(&g));
        let &(group, _) = self.begun.front().filter(|g| is_written(g) || out_of_order)?;
        self.begun.pop_front();
        self.durable = group.last_lsn();
        Some(group)
    }

    /// The groups that failed, to be written again.
    pub fn retry(&mut self) -> impl Iterator<Item = ClosedGroup> {
        self.begun.iter_mut().filter(|(_, state)| *state == State::Failed).map(|(group, state)| {
            *state = State::Retried;
            *group
        })
    }
}
