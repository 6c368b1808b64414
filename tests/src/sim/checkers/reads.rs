//! Reads: byte by byte what the list holds at some place between the newest change that was acknowledged before the read
//! began and the newest that had a place when it ended.

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
        let mut legal = Vec::new();
        for (at, &got) in (offset..end).zip(data) {
            let mut value = known.content[at as usize];
            let mut newest = self.base;
            legal.clear();
            for &(lsn, change) in overlapping.iter().filter(|(_, c)| c.range.contains(&at)) {
                if lsn > from {
                    legal.push((newest, value));
                }
                value = after(change, known.discards, at, value);
                newest = lsn;
            }
            legal.push((newest, value));
            if !legal.iter().any(|(_, value)| value.is_none_or(|value| value == got)) {
                let wanted: Vec<String> = legal
                    .iter()
                    .map(|(lsn, value)| format!("{:#04x} (LSN {lsn})", value.unwrap_or_default()))
                    .collect();
                return Err(format!(
                    "volume {volume} byte {at} is {got:#04x}; between LSN {from} and {to} it was {}{}",
                    wanted.join(", "),
                    self.history(volume, at, got),
                ));
            }
        }
        Ok(())
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
