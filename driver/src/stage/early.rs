//! Reads that met a record which is in the index and not published. Pure.
//!
//! ```text
//!   met() ──▶ waits ──reached(), its record is published──▶ told ──ended()──▶ gone
//!               ▲                                            ├──parked(): no buffer for it──▶ parked
//!               └───────met(): a newer one is there──────────┴──────────────────────────────────┘
//! ```
//! Where somebody writes the same bytes all the time, a newer one may be there again and again. So once a read was in vain
//! [`PATIENCE`] times nobody gets a place until it has ended: what has one is published, and then nothing is left to be met.
//!
//! Invariants:
//! - E1 a read is told once for each time that it waits;
//! - E2 claims are held back only for reads that wait for a record, or were told and look again at once. One that has to wait
//!   for a buffer first is parked, and keeps its patience. So claims go on, if doors do what they are told.

use super::outcome::DoorId;
use crate::base::Lsn;

/// So often a read may be in vain until claims are held back for it.
const PATIENCE: u32 = 4;

#[derive(Debug)]
struct Early {
    door: DoorId,
    tag: u32,
    /// What it waits for; `None`: it was told.
    waits_for: Option<Lsn>,
    /// How often it waited.
    times: u32,
    /// It waits for something that has nothing to do with claims, and does not hold them back meanwhile.
    is_parked: bool,
}

impl Early {
    fn is(&self, door: DoorId, tag: u32) -> bool {
        (self.door, self.tag) == (door, tag)
    }
}

/// The reads that wait, and those that were told.
#[derive(Debug, Default)]
pub(super) struct EarlyReads {
    reads: Vec<Early>,
}

impl EarlyReads {
    /// A read has met `lsn`, which is not published.
    pub fn met(&mut self, door: DoorId, tag: u32, lsn: Lsn) {
        match self.reads.iter_mut().find(|read| read.is(door, tag)) {
            Some(read) => {
                assert!(read.waits_for.is_none(), "E1");
                read.waits_for = Some(lsn);
                read.times += 1;
                read.is_parked = false;
            }
            None => self.reads.push(Early { door, tag, waits_for: Some(lsn), times: 1, is_parked: false }),
        }
    }

    /// Everything up to `lsn` is published: tells those that wait for no more than that.
    pub fn reached(&mut self, lsn: Lsn, mut tell: impl FnMut(DoorId, u32)) {
        for read in &mut self.reads {
            if read.waits_for.is_some_and(|waits_for| waits_for <= lsn) {
                read.waits_for = None;
                tell(read.door, read.tag);
            }
        }
    }

    /// A read was served, or waits for something else; `true` if claims were held back and are not any more.
    pub fn ended(&mut self, door: DoorId, tag: u32) -> bool {
        self.forget(|read| read.is(door, tag))
    }

    /// A door is gone; `true` as for [`EarlyReads::ended`].
    pub fn forget_door(&mut self, door: DoorId) -> bool {
        self.forget(|read| read.door == door)
    }

    /// A read that was told waits for something else before it looks again; `true` as for [`EarlyReads::ended`].
    pub fn parked(&mut self, door: DoorId, tag: u32) -> bool {
        self.lets_go(|reads| {
            reads.iter_mut().filter(|read| read.is(door, tag)).for_each(|read| read.is_parked = true);
        })
    }

    fn forget(&mut self, which: impl Fn(&Early) -> bool) -> bool {
        self.lets_go(|reads| reads.retain(|read| !which(read)))
    }

    fn lets_go(&mut self, change: impl FnOnce(&mut Vec<Early>)) -> bool {
        if self.reads.is_empty() {
            return false;
        }
        let held = self.hold_claims_back();
        change(&mut self.reads);
        held && !self.hold_claims_back()
    }

    /// Whether claims have to wait.
    pub fn hold_claims_back(&self) -> bool {
        self.reads.iter().any(|read| read.times >= PATIENCE && !read.is_parked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(reads: &mut EarlyReads, lsn: u64) -> Vec<(u32, u32)> {
        let mut told = Vec::new();
        reads.reached(Lsn(lsn), |door, tag| told.push((door.0, tag)));
        told
    }

    #[test]
    fn each_is_told_once_when_what_it_met_is_published() {
        let mut reads = EarlyReads::default();
        for (door, tag, lsn) in [(1, 7, 5), (2, 7, 4), (1, 8, 9)] {
            reads.met(DoorId(door), tag, Lsn(lsn));
        }
        assert_eq!(told(&mut reads, 3), []);
        assert_eq!(told(&mut reads, 5), [(1, 7), (2, 7)]);
        assert_eq!(told(&mut reads, 8), []);
        reads.met(DoorId(2), 7, Lsn(8));
        assert_eq!(told(&mut reads, 9), [(2, 7), (1, 8)], "E1");
    }

    #[test]
    fn claims_are_held_back_for_a_read_that_was_in_vain_again_and_again_and_no_longer() {
        for end in [
            |reads: &mut EarlyReads| reads.ended(DoorId(1), 7),
            |reads: &mut EarlyReads| reads.parked(DoorId(1), 7),
            |reads: &mut EarlyReads| reads.forget_door(DoorId(1)),
        ] {
            let mut reads = EarlyReads::default();
            reads.met(DoorId(2), 1, Lsn(100));
            for lsn in 1..=u64::from(PATIENCE) {
                assert!(!reads.hold_claims_back(), "{lsn}");
                reads.met(DoorId(1), 7, Lsn(lsn));
                assert_eq!(told(&mut reads, lsn), [(1, 7)]);
            }
            assert!(reads.hold_claims_back());
            assert!(!reads.ended(DoorId(2), 1) && reads.hold_claims_back());
            assert!(end(&mut reads), "E2");
            assert!(!reads.hold_claims_back() && !end(&mut reads));
        }
    }

    #[test]
    fn a_read_that_was_parked_keeps_its_patience() {
        let mut reads = EarlyReads::default();
        for lsn in 1..=u64::from(PATIENCE) {
            reads.met(DoorId(1), 7, Lsn(lsn));
            assert_eq!(told(&mut reads, lsn), [(1, 7)]);
            assert_eq!(reads.parked(DoorId(1), 7), lsn == u64::from(PATIENCE));
            assert!(!reads.hold_claims_back());
        }
        reads.met(DoorId(1), 7, Lsn(100));
        assert!(reads.hold_claims_back(), "it looks again");
    }
}
