//! How much an epoch takes when somebody waits for room. Pure.
//!
//! A region is given back when the epoch that flushed it is over, so writers that wait for room wait for a whole epoch. A large
//! one writes less (of bytes that were changed several times only the newest, neighbours in one write), but on a slow backing
//! it lasts for seconds. So while somebody waits, an epoch takes what is flushed in about [`EPOCH_NS`], by the experience
//! with the ones before; at least one region.

use crate::stage::serve::EPOCH_RECORDS_MAX;

/// How long an epoch should last while somebody waits.
const EPOCH_NS: u64 = 250_000_000;

/// What is known of the pace of flushing.
#[derive(Debug, Default)]
pub(super) struct Pace {
    began_ns: u64,
    /// Nanoseconds a record; 0 as long as nothing is known.
    record_ns: u64,
}

impl Pace {
    /// An epoch begins.
    pub fn begins(&mut self, now_ns: u64) {
        self.began_ns = now_ns;
    }

    /// The epoch, which had so many records, is over.
    pub fn ended(&mut self, now_ns: u64, records: u64) {
        let took_ns = now_ns.saturating_sub(self.began_ns) / records.max(1);
        self.record_ns = if self.record_ns == 0 { took_ns } else { (self.record_ns + took_ns) / 2 };
    }

    /// Most records of the next epoch.
    pub fn records_max(&self, somebody_waits: bool) -> u32 {
        match EPOCH_NS.checked_div(self.record_ns) {
            Some(records) if somebody_waits => records.min(u64::from(EPOCH_RECORDS_MAX)) as u32,
            _ => EPOCH_RECORDS_MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_are_as_long_as_writers_can_wait() {
        let mut pace = Pace::default();
        assert_eq!(pace.records_max(true), EPOCH_RECORDS_MAX, "nothing is known");
        for _ in 0..20 {
            pace.begins(1000);
            pace.ended(1000 + 4_000_000_000, 4000);
        }
        assert_eq!(pace.records_max(true), 250, "a millisecond a record");
        assert_eq!(pace.records_max(false), EPOCH_RECORDS_MAX);
        pace.begins(5);
        pace.ended(5, 0);
        assert!(pace.records_max(true) >= 250, "no time and no record break nothing");
    }
}
