//! The checker. It knows every accepted change in the order of the log, because doors tell the place of each, and what was
//! acknowledged with which promise. All demands follow from that list:
//!
//! - after a crash the content of all volumes is the effect of one prefix of it, no shorter than what was promised (P1);
//! - a read gives, byte by byte, what the list holds at some place between the newest change that was acknowledged before
//!   the read began and the newest that had a place when it ended;
//! - a change whose place was never told cannot come back.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What a change does to its range.
#[derive(Clone, Debug)]
pub enum Effect {
    /// These bytes.
    Bytes(Arc<[u8]>),
    /// Zeroes.
    Zero,
    /// Zeroes if the backing can discard, else anything.
    Discard,
    /// Nothing: its content could not be fetched.
    Nothing,
}

/// A change.
#[derive(Clone, Debug)]
pub struct Change {
    /// Volume, by position.
    pub volume: usize,
    /// Bytes of the volume.
    pub range: Range<u64>,
    /// What it does.
    pub effect: Effect,
}

#[derive(Debug)]
struct Volume {
    /// Content at `base`; `None`: anything.
    content: Vec<Option<u8>>,
    discards: bool,
}

/// The checker.
#[derive(Debug)]
pub struct Model {
    volumes: Vec<Volume>,
    /// Position in the order that `content` has reached.
    base: u64,
    /// Changes after it. A place can be missing: claimed, and its holder has not been told yet.
    changes: BTreeMap<u64, Change>,
    /// Newest acknowledged change; all before it are as good as acknowledged.
    acknowledged: u64,
    /// Newest change promised to survive a power cut.
    durable: u64,
}

impl Model {
    /// Checker of volumes with this content.
    #[must_use]
    pub fn new(volumes: Vec<(Vec<u8>, bool)>) -> Model {
        let volumes = volumes
            .into_iter()
            .map(|(bytes, discards)| Volume { content: bytes.into_iter().map(Some).collect(), discards })
            .collect();
        Model { volumes, base: 0, changes: BTreeMap::new(), acknowledged: 0, durable: 0 }
    }

    /// A change has its place.
    pub fn placed(&mut self, lsn: u64, change: Change) {
        assert!(lsn > self.base, "change {lsn} takes a place at or below {}", self.base);
        let before = self.changes.insert(lsn, change);
        assert!(before.is_none(), "place {lsn} is given out twice");
    }

    /// The content of the change at `lsn` could not be fetched.
    pub fn voided(&mut self, lsn: u64) {
        self.changes.get_mut(&lsn).expect("it was placed").effect = Effect::Nothing;
    }

    /// A change is acknowledged.
    pub fn acknowledge(&mut self, lsn: u64, durable: bool) {
        self.acknowledged = self.acknowledged.max(lsn);
        if durable {
            self.durable = self.durable.max(lsn);
        }
    }

    /// A flush is acknowledged that began when `lsn` was the newest acknowledged change.
    pub fn flushed(&mut self, lsn: u64) {
        self.durable = self.durable.max(lsn);
    }

    /// Newest acknowledged change.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Newest change promised to survive a power cut.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// Newest place told.
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.changes.keys().next_back().copied().unwrap_or(self.base)
    }

    /// A server came back with the prefix up to `end`, where at least `required` was promised. From now on that is what
    /// clients see.
    pub fn recovered(&mut self, end: u64, required: u64) -> Result<(), String> {
        if end < required {
            return Err(format!("P1: the prefix ends at LSN {end}, but LSN {required} was promised"));
        }
        assert!(self.base <= required, "only what was promised for ever is folded in");
        self.changes.split_off(&(end + 1));
        let known = self.base + self.changes.len() as u64;
        if known != end {
            return Err(format!("P1: the prefix ends at LSN {end}, but LSN {} was never filled", known + 1));
        }
        // What the next power cut may take back stays a list.
        let rest = self.changes.split_off(&(self.durable + 1));
        for change in std::mem::replace(&mut self.changes, rest).into_values() {
            let volume = &mut self.volumes[change.volume];
            for at in change.range.clone() {
                let before = volume.content[at as usize];
                volume.content[at as usize] = after(&change, volume.discards, at, before);
            }
        }
        self.base = self.base.max(self.durable);
        self.acknowledged = end;
        Ok(())
    }

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

    /// Size of `volume`.
    #[must_use]
    pub fn size(&self, volume: usize) -> u64 {
        self.volumes[volume].content.len() as u64
    }
}

fn after(change: &Change, discards: bool, at: u64, before: Option<u8>) -> Option<u8> {
    match &change.effect {
        Effect::Bytes(bytes) => Some(bytes[(at - change.range.start) as usize]),
        Effect::Zero => Some(0),
        Effect::Discard if discards => Some(0),
        Effect::Discard => None,
        Effect::Nothing => before,
    }
}
