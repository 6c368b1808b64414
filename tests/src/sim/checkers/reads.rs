//! Reads: byte by byte what the list holds at some place between the newest change that was acknowledged before the read
//! began and the newest that was published when it ended.

use super::super::model::{Change, Effect, Model, after};

impl Model {
    /// Checks bytes of `volume` from `offset` on that were read while the log went from `from` to `to`.
    pub fn check(&self, volume: usize, offset: u64, data: &[u8], from: u64, to: u64) -> Result<(), String> {
        let end = offset + data.len() as u64;
        let known = &self.volumes[volume];
        let mut overlapping: Vec<(u64, &Change)> = self
            .changes
            .range(..=to)
            .filter(|(_, c)| c.volume == volume && c.range.start < end && c.range.end > offset)
            .map(|(&lsn, change)| (lsn, change))
            .collect();
        // What a newer change that counts for sure covers completely needs no look.
        let covers = |c: &Change| {
            c.range.start <= offset && c.range.end >= end && !matches!(c.effect, Effect::Nothing)
        };
        if let Some(first) = overlapping.iter().rposition(|&(lsn, c)| lsn <= from && covers(c)) {
            overlapping.drain(..first);
        }
        // What the bytes were when the read began is legal for each of them, and nearly always what was read.
        let mut settled = known.content[offset as usize..end as usize].to_vec();
        for (_, change) in overlapping.iter().filter(|(lsn, _)| *lsn <= from) {
            for at in change.range.start.max(offset)..change.range.end.min(end) {
                let value = &mut settled[(at - offset) as usize];
                *value = after(change, known.discards, at, *value);
            }
        }
        let other = (offset..end).zip(data.iter().zip(settled));
        for (at, (&got, _)) in other.filter(|(_, (got, was))| was.is_some_and(|was| was != **got)) {
            self.check_byte(volume, at, got, from, &overlapping)
                .map_err(|what| format!("{what}; the read began at LSN {from} and ended at {to}"))?;
        }
        Ok(())
    }

    /// Checks a byte by all values that it had.
    fn check_byte(
        &self,
        volume: usize,
        at: u64,
        got: u8,
        from: u64,
        overlapping: &[(u64, &Change)],
    ) -> Result<(), String> {
        let known = &self.volumes[volume];
        let mut legal = Vec::new();
        let mut value = known.content[at as usize];
        let mut newest = self.base;
        for &(lsn, change) in overlapping.iter().filter(|(_, c)| c.range.contains(&at)) {
            if lsn > from {
                legal.push((newest, value));
            }
            value = after(change, known.discards, at, value);
            newest = lsn;
        }
        legal.push((newest, value));
        if legal.iter().any(|(_, value)| value.is_none_or(|value| value == got)) {
            return Ok(());
        }
        let wanted: Vec<String> = legal
            .iter()
            .map(|(lsn, value)| format!("{:#04x} (LSN {lsn})", value.unwrap_or_default()))
            .collect();
        Err(format!(
            "volume {volume} byte {at} is {got:#04x}, it was {}{}",
            wanted.join(", "),
            self.history(volume, at, got),
        ))
    }

    /// Which changes had that value there: for people.
    fn history(&self, volume: usize, at: u64, got: u8) -> String {
        let holders: Vec<u64> = self
            .changes
            .iter()
            .filter(|(_, c)| c.volume == volume && c.range.contains(&at))
            .filter(|(_, c)| after(c, true, at, None) == Some(got))
            .map(|(&lsn, _)| lsn)
            .collect();
        if holders.is_empty() { String::new() } else { format!("; LSN {holders:?} would give that") }
    }
}
