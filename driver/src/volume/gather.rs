//! Gathering: how long a door looks for more requests before it has the log written. Pure.
//!
//! Clients that had n requests answered by one write of the log tend to ask n again at once, one after the other. Were the
//! log written with the first of them alone, the others would wait for two writes. So as long as some of those answered have
//! not come back, the door's thread looks for them a little longer: for a quarter of the time that a write takes, and not if
//! that was in vain before (see [`Look`]). A client with one request in flight never waits for this.

use crate::base::patience::Look;

/// Longest look in nanoseconds, however slow the log is.
const LOOK_NS_MAX: u64 = 50_000;

/// What a door knows of its clients' habits.
#[derive(Debug, Default)]
pub(super) struct Gather {
    /// Requests that the log answered and whose successors have not come.
    owed: u32,
    look: Look,
}

impl Gather {
    /// A request was answered that waited for the log.
    pub fn answered(&mut self) {
        self.owed = self.owed.saturating_add(1);
    }

    /// A request came that waits for the log.
    pub fn arrived(&mut self) {
        self.owed = self.owed.saturating_sub(1);
    }

    /// Whether any request is about to come.
    pub fn is_possible(&self) -> bool {
        self.owed > 0
    }

    /// Whether to look for more at `now_ns`, where a group that somebody waits for would begin now, whose write takes about
    /// `write_ns`.
    pub fn waits(&mut self, now_ns: u64, write_ns: u64) -> bool {
        self.is_possible() && self.look.goes_on(now_ns, (write_ns / 4).min(LOOK_NS_MAX))
    }

    /// The batch has ended, and with it a look for more.
    pub fn batch_ended(&mut self) {
        if self.look.ends(self.owed == 0) {
            // Those who did not come at once are not waited for.
            self.owed = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE_NS: u64 = 100_000;

    #[test]
    fn one_request_at_a_time_never_waits() {
        let mut gather = Gather::default();
        for round in 0..100 {
            gather.arrived();
            assert!(!gather.waits(round, WRITE_NS));
            gather.batch_ended();
            gather.answered();
        }
    }

    #[test]
    fn those_who_were_answered_together_are_waited_for() {
        let mut gather = Gather::default();
        (0..8).for_each(|_| gather.answered());
        for _ in 0..7 {
            gather.arrived();
            assert!(gather.waits(1000, WRITE_NS));
        }
        gather.arrived();
        assert!(!gather.waits(1000, WRITE_NS), "all are there");
    }

    #[test]
    fn a_look_ends_and_is_rare_when_nobody_comes() {
        let mut gather = Gather::default();
        let mut looked_ns = 0;
        let mut now_ns = 0;
        for _ in 0..1000 {
            (0..8).for_each(|_| gather.answered());
            gather.arrived();
            while gather.waits(now_ns, WRITE_NS) {
                now_ns += 1000;
                looked_ns += 1000;
            }
            gather.batch_ended();
            now_ns += WRITE_NS;
        }
        assert!(looked_ns <= 25 * WRITE_NS / 4, "{looked_ns} ns were spent looking");
    }
}
