//! Pacing of writers by the flusher. Pure.
//!
//! Room comes back a whole epoch at a time. Writers that take it as fast as they can fill it in a moment and then stand still
//! until the next epoch is over. So while an epoch is being flushed and the stage is about three quarters full, claims spend
//! credit, and credit comes with the epoch's progress: of an epoch that gives back `n` bytes of the log, about `n/2` have been
//! granted when half of its work is done. A small part is granted when it begins, for the time of making plans.
//! ```text
//!                       begin(bytes)                       end()
//!   claims are free ───────────────▶ claims spend credit ────────▶ claims are free
//!                                      ▲     │ advance(done, total)
//!                                      └─────┘
//! ```
//!
//! Invariants:
//! - T1 credit delays a claim and never makes room: the ring has the last word;
//! - T2 nobody waits for credit but while an epoch is in flight, so whatever ends it, writers go on;
//! - T3 a claim is served as soon as there is any credit, and may leave a debt: a large one does not wait for more than small
//!   ones do, and pays afterwards. What it pays is what the log went on by, so that small groups, which are mostly padding, do
//!   not fill the stage.
//!
//! What this cannot do: a sync of a backing shows no progress. On a backing that takes writes into a volatile cache and spends
//! its time in the sync, writers go on in a burst and wait for the sync's end.
//!
//! Above seven eighths of the stage only three quarters of what comes back are granted, so that it does not fill up.

/// Part of what an epoch gives back that is granted when it begins.
const FIRST_PART: u64 = 16;

/// How full the stage is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fill {
    /// Live regions.
    pub used: u32,
    /// Of so many.
    pub count: u32,
}

impl Fill {
    /// Whether claims are paced. What an epoch gives back, an eighth of the stage, is granted before it is there, so that much
    /// is left, and as much again.
    pub fn is_paced(self) -> bool {
        self.used > (self.count * 3 / 4).min(self.count.saturating_sub(3)).max(1)
    }

    fn is_too_much(self) -> bool {
        u64::from(self.used) * 8 > u64::from(self.count) * 7
    }
}

/// Who may claim how much.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pacing {
    /// Bytes of the log that the epoch in flight gives back; 0 without one.
    epoch_bytes: u64,
    granted_bytes: u64,
    /// What may be claimed; below zero: what was claimed too much.
    credit_bytes: i64,
    /// How far the log was at the last claim.
    log_bytes: u64,
}

impl Pacing {
    /// Pacing of a log that has come to `log_bytes`.
    pub fn new(log_bytes: u64) -> Pacing {
        Pacing { log_bytes, ..Pacing::default() }
    }

    /// An epoch begins that gives back `bytes`.
    pub fn begin(&mut self, bytes: u64) {
        assert_eq!(self.epoch_bytes, 0, "T2: the epoch before is over");
        *self =
            Pacing { epoch_bytes: bytes, granted_bytes: 0, credit_bytes: self.credit_bytes.min(0), ..*self };
    }

    /// The epoch in flight has done `done` of `total` parts of its work.
    pub fn advance(&mut self, (done, total): (u64, u64), fill: Fill) {
        let first = self.epoch_bytes / FIRST_PART;
        let rest =
            u128::from(self.epoch_bytes - first) * u128::from(done.min(total)) / u128::from(total.max(1));
        let more = (first + rest as u64).saturating_sub(self.granted_bytes);
        self.granted_bytes += more;
        self.credit_bytes += if fill.is_too_much() { more / 4 * 3 } else { more } as i64;
    }

    /// The epoch in flight is over.
    pub fn end(&mut self) {
        *self = Pacing { epoch_bytes: 0, granted_bytes: 0, ..*self };
    }

    /// Whether a claim has to wait for credit.
    pub fn holds_back(&self, fill: Fill) -> bool {
        self.epoch_bytes > 0 && self.credit_bytes <= 0 && fill.is_paced()
    }

    /// A claim was served, and the log has come to `log_bytes` with it: what it cost is all that was used up since the claim
    /// before, the padding of groups and the ends of regions included.
    pub fn claimed(&mut self, log_bytes: u64, fill: Fill) {
        let cost = log_bytes.wrapping_sub(self.log_bytes);
        self.log_bytes = log_bytes;
        if self.epoch_bytes > 0 && fill.is_paced() {
            // A debt is bounded: it must not outlive what made it.
            let owed_max = self.epoch_bytes as i64;
            self.credit_bytes = self.credit_bytes.saturating_sub_unsigned(cost).max(-owed_max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const PACED: Fill = Fill { used: 50, count: 64 };
    const FREE: Fill = Fill { used: 48, count: 64 };

    /// Bytes that can be claimed in records of `each` now.
    fn claimed(pacing: &mut Pacing, fill: Fill, each: u32) -> u64 {
        let mut bytes = 0;
        while !pacing.holds_back(fill) && bytes < 1 << 30 {
            pacing.claimed(pacing.log_bytes.wrapping_add(u64::from(each)), fill);
            bytes += u64::from(each);
        }
        bytes
    }

    #[test]
    fn room_is_granted_as_it_comes_back() {
        let mut pacing = Pacing::default();
        assert!(!pacing.holds_back(Fill { used: 64, count: 64 }), "no epoch is in flight");
        pacing.begin(1024 * KIB);
        assert!(pacing.holds_back(PACED) && !pacing.holds_back(FREE));
        let shares: Vec<u64> = (0..=15)
            .map(|done| {
                pacing.advance((done, 15), PACED);
                claimed(&mut pacing, PACED, 4096)
            })
            .collect();
        assert_eq!(shares.iter().sum::<u64>(), 1024 * KIB);
        assert!(shares.iter().all(|share| *share == 64 * KIB), "{shares:?}");
        pacing.end();
        assert!(!pacing.holds_back(PACED), "T2");
    }

    #[test]
    fn what_was_claimed_while_there_was_room_is_not_owed() {
        let mut pacing = Pacing::default();
        pacing.begin(1024 * KIB);
        pacing.claimed(1 << 20, FREE);
        pacing.advance((1, 4), FREE);
        assert_eq!(claimed(&mut pacing, PACED, 4096), 304 * KIB, "what came back is there all the same");
        pacing.advance((2, 4), PACED);
        assert_eq!(claimed(&mut pacing, PACED, 4096), 240 * KIB);
    }

    #[test]
    fn a_large_claim_pays_afterwards() {
        let mut pacing = Pacing::default();
        pacing.begin(1024 * KIB);
        pacing.advance((0, 1), PACED);
        assert_eq!(claimed(&mut pacing, PACED, 256 << 10), 256 * KIB, "T3");
        pacing.advance((1, 5), PACED);
        assert!(pacing.holds_back(PACED));
        pacing.advance((2, 5), PACED);
        assert!(!pacing.holds_back(PACED));
        // What is owed is owed in the next epoch, too; what is left over is not kept.
        pacing.claimed(pacing.log_bytes + (1 << 20), PACED);
        pacing.end();
        pacing.begin(1024 * KIB);
        pacing.advance((1, 2), PACED);
        assert!(pacing.holds_back(PACED));
        pacing.advance((2, 2), PACED);
        assert!(!pacing.holds_back(PACED));
        pacing.end();
        pacing.begin(1024 * KIB);
        assert!(pacing.holds_back(PACED));
    }

    #[test]
    fn a_stage_that_is_too_full_gets_emptier() {
        let mut pacing = Pacing::default();
        pacing.begin(1024 * KIB);
        let fill = Fill { used: 60, count: 64 };
        pacing.advance((1, 1), fill);
        assert_eq!(claimed(&mut pacing, fill, 4096), 768 * KIB);
    }

    #[test]
    fn small_stages_keep_room_for_an_epoch_and_the_next_region() {
        for (count, most) in [(4, 1), (5, 2), (8, 5), (12, 9), (16, 12), (1000, 750)] {
            assert!(
                !Fill { used: most, count }.is_paced() && Fill { used: most + 1, count }.is_paced(),
                "{count}"
            );
        }
    }
}
