//! What the checkers know: every accepted change in the order of the log, because doors tell the place of each, and what
//! was acknowledged with which promise. All demands follow from that list:
//!
//! - after a crash the content of all volumes is the effect of one prefix of it, no shorter than what was promised (P1);
//! - a read gives, byte by byte, what the list holds at some place between the newest change that was acknowledged before
//!   the read began and the newest that was published when it ended;
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

/// A volume as it was at the base of the list.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Content at `base`; `None`: anything.
    pub content: Vec<Option<u8>>,
    /// Whether a discard gives zeroes.
    pub discards: bool,
}

/// The checker.
#[derive(Clone, Debug)]
pub struct Model {
    pub(super) volumes: Vec<Volume>,
    /// Position in the order that `content` has reached.
    pub(super) base: u64,
    /// Changes after it. A place can be missing: claimed, and its holder has not been told yet.
    pub(super) changes: BTreeMap<u64, Change>,
    /// Newest acknowledged change; all before it are as good as acknowledged.
    pub(super) acknowledged: u64,
    /// Newest change promised to survive a power cut.
    pub(super) durable: u64,
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

    /// `volume` has grown to `size_bytes`: what is in the added space is not known.
    pub fn grow(&mut self, volume: usize, size_bytes: u64) {
        let content = &mut self.volumes[volume].content;
        assert!(content.len() as u64 <= size_bytes, "volumes do not shrink");
        content.resize(size_bytes as usize, None);
    }

    /// What was promised beyond `lsn` is taken back: for forks in which a fault excuses that.
    pub fn give_up(&mut self, lsn: u64) {
        self.acknowledged = self.acknowledged.min(lsn.max(self.base));
        self.durable = self.durable.min(lsn.max(self.base));
    }

    /// The position in the order that is settled for ever.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Size of `volume`.
    #[must_use]
    pub fn size(&self, volume: usize) -> u64 {
        self.volumes[volume].content.len() as u64
    }
}

/// What a byte is after a change.
#[must_use]
pub fn after(change: &Change, discards: bool, at: u64, before: Option<u8>) -> Option<u8> {
    match &change.effect {
        Effect::Bytes(bytes) => Some(bytes[(at - change.range.start) as usize]),
        Effect::Zero => Some(0),
        Effect::Discard if discards => Some(0),
        Effect::Discard => None,
        Effect::Nothing => before,
    }
}
