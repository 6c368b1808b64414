//! The index of a volume in shards, each behind a lock of its own, so that doors index what they have filled without holding
//! the core.
//!
//! A shard has the sixteenth part of the volume or, rounded up to a power of two, more, so that there may be fewer. An extent
//! that reaches over a border is cut there. What a volume grows by later belongs to the last shard.
//!
//! Invariants:
//! - X1 a record that is published is indexed. [`Core::publish`] takes nothing but an [`Indexed`] place, and only
//!   [`VolumeIndex::index`] makes those;
//! - X2 so whatever is flushed was indexed before, and nothing comes behind a [`VolumeIndex::remove_flushed`] that it should
//!   have removed. This is the order that [`Index`] wants;
//! - X3 whoever holds a shard locks nothing else. A shard may be locked with the core held;
//! - X4 what a shard grew by is told to the core exactly once, with the publishing or at the checkpoint. Doors and flusher tell
//!   it at different times, so the sum of what was told may be off by what is under way, and below zero.
//!
//! What is indexed and not published is nobody's business yet: a read that meets it waits ([`Core`]'s C6). That also makes one
//! state of what a read finds in several shards, which it looks at one after the other.
//!
//! [`Core`]: super::core::Core
//! [`Core::publish`]: super::core::Core::publish

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::core::source_of;
use super::index::{Extent, Index, Piece, Sorted, Source};
use super::ring::Slot;
use crate::base::mutation::{Mutation, is};
use crate::base::schedule;
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};
use crate::format::record::Record;

/// Shards of a volume.
const SHARDS: usize = 16;
/// A shard is not smaller than this.
const SHARD_BYTES_MIN: u64 = 4096;
/// Extents that are removed or overwritten before others get the shard: about 0.1 ms.
const AT_ONCE: usize = if cfg!(test) { 3 } else { 1024 };
/// Ranges up to this are changed without counting what is there: records have 16 bytes or more, but for few.
const SHORT_BYTES: u64 = if cfg!(test) { 1 << 10 } else { 16 << 10 };

/// Most extents that one record can add to the indexes, taken over all records: one that begins with it, one that begins where
/// it ends, and one that begins at each border. One that is cut because it overwrites very many begins where one of those did.
pub const EXTENTS_A_RECORD_MAX: usize = SHARDS + 1;

/// On cache lines of its own: neighbours belong to other processors.
#[derive(Debug)]
#[repr(align(128))]
struct Shard(Mutex<Index>);

/// The newest staged bytes of one volume.
#[derive(Debug)]
pub struct VolumeIndex {
    volume: VolumeId,
    /// A shard has two to the power of so many bytes.
    shift: u32,
    shards: [Shard; SHARDS],
}

/// A filled place whose record is in the index of its volume.
#[derive(Debug)]
#[must_use = "a place that is not published holds up all behind it"]
pub struct Indexed {
    pub(super) slot: Slot,
    /// Extents that the index has more, or less.
    pub(super) grown: isize,
}

/// Says that the indexes have forgotten what the backings hold up to an LSN: only then regions may be given up.
#[derive(Debug)]
pub struct Forgotten {
    pub(super) up_to: Lsn,
    /// Extents that the indexes have more, or less.
    pub(super) grown: isize,
}

impl Forgotten {
    /// Lets `indexes` forget what was written to `ranges` of records up to `up_to`. It must be on the backings for good, and a
    /// checkpoint that says so as well. Not to be called with the core held: it takes a while.
    #[must_use]
    pub fn of(
        ranges: impl Iterator<Item = (VolumeId, ByteRange)>,
        up_to: Lsn,
        indexes: &BTreeMap<VolumeId, Arc<VolumeIndex>>,
    ) -> Forgotten {
        let forget =
            |(volume, range)| indexes.get(&volume).map_or(0, |index| index.remove_flushed(range, up_to));
        Forgotten { up_to, grown: ranges.map(forget).sum() }
    }
}

impl VolumeIndex {
    /// Index of a volume of `volume_bytes` that has nothing staged.
    #[must_use]
    pub fn new(volume: VolumeId, volume_bytes: u64) -> VolumeIndex {
        VolumeIndex::of(volume, volume_bytes, Sorted::default())
    }

    /// Index of a volume of `volume_bytes` that has `staged`.
    #[must_use]
    pub fn of(volume: VolumeId, volume_bytes: u64, staged: Sorted) -> VolumeIndex {
        let shard_bytes = volume_bytes.div_ceil(SHARDS as u64).next_power_of_two().max(SHARD_BYTES_MIN);
        let shift = shard_bytes.trailing_zeros();
        let mut staged = staged.cut();
        let shards = std::array::from_fn(|shard| Shard(Mutex::new(staged.up_to(end_of(shard, shift)))));
        VolumeIndex { volume, shift, shards }
    }

    pub(crate) fn shard_of(&self, offset: u64) -> usize {
        ((offset >> self.shift) as usize).min(SHARDS - 1)
    }

    /// The parts of `range`, each with the shard that has it, in order.
    fn parts(&self, range: ByteRange) -> impl Iterator<Item = (&Mutex<Index>, ByteRange)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            (start < range.end).then(|| {
                let shard = self.shard_of(start);
                at = range.end.min(end_of(shard, self.shift));
                (&self.shards[shard].0, ByteRange { start, end: at })
            })
        })
    }

    /// Says that changes of `range` will be indexed soon.
    pub fn expect(&self, range: ByteRange) {
        // Where it begins is enough, and only if nobody has it: the caller has places that others wait for.
        if let Some((shard, part)) = self.parts(range).next()
            && let Some(index) = shard.try_lock()
        {
            index.expect(part);
        }
    }

    /// Indexes what the filled place `slot` holds; `record` is what its header says. Reads that meet it wait until it is
    /// published.
    pub fn index(&self, slot: Slot, record: &Record) -> Indexed {
        assert_eq!(record.volume, self.volume, "a record goes into the index of its volume");
        assert!(
            record.lsn == slot.lsn() && record.payload_bytes == slot.payload_bytes(),
            "the slot's record"
        );
        let grown = source_of(record.kind, slot.region(), slot.payload_offset())
            .map_or(0, |source| self.insert(Extent { range: record.range, lsn: record.lsn, source }));
        Indexed { slot, grown }
    }

    fn insert(&self, extent: Extent) -> isize {
        let Extent { range, lsn, source } = extent;
        self.bit_by_bit(range, false, |index, part| {
            let source = source.advanced(part.start - range.start);
            index.insert(Extent { range: part, lsn, source });
        })
    }

    /// Changes the shards that have `range`, without holding one for long, whatever is there. Whoever waits for a shard that
    /// this has not done with is next; `comes_again`: in any case. By how much the number of extents grew.
    fn bit_by_bit(
        &self,
        range: ByteRange,
        comes_again: bool,
        mut change: impl FnMut(&mut Index, ByteRange),
    ) -> isize {
        let mut grown = 0;
        for (shard, mut part) in self.parts(range) {
            while !part.is_empty() {
                let mut index = lock(shard);
                let is_short = part.len() <= SHORT_BYTES;
                let end = if is_short { part.end } else { index.reach(part, AT_ONCE) };
                let before = index.extent_count() as isize;
                change(&mut index, ByteRange { start: part.start, end });
                grown += index.extent_count() as isize - before;
                part.start = end;
                if comes_again || !part.is_empty() {
                    // Somebody may wait with the core held.
                    MutexGuard::unlock_fair(index);
                }
            }
        }
        grown
    }

    /// What is known about `range`: pieces in order that cover it exactly, holes included, until `each` has had enough. What is
    /// visible of a record is one piece, but for borders, and places where it was cut when it was indexed.
    pub fn lookup<B>(
        &self,
        range: ByteRange,
        mut each: impl FnMut(Piece) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        self.parts(range).try_for_each(|(shard, part)| lock(shard).lookup(part).try_for_each(&mut each))
    }

    /// Forgets the parts of extents inside `range` whose LSN is at most `up_to`: the backing holds them now. By how much the
    /// number of extents grew.
    pub fn remove_flushed(&self, range: ByteRange, up_to: Lsn) -> isize {
        let up_to = if is(Mutation::FlushForgetsNewerRecords) { Lsn(u64::MAX) } else { up_to };
        // The flusher comes again at once, for the next range.
        self.bit_by_bit(range, true, |index, part| index.remove_flushed(part, up_to))
    }

    /// Number of extents.
    #[must_use]
    pub fn extent_count(&self) -> usize {
        self.shards.iter().map(|shard| shard.0.lock().extent_count()).sum()
    }

    /// Whether nothing is staged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| shard.0.lock().is_empty())
    }

    /// Whether payload in region `seq` is visible.
    #[must_use]
    pub fn refers_to(&self, seq: RegionSeq) -> bool {
        let refers = |e: Extent| matches!(e.source, Source::Data { region, .. } if region == seq);
        self.shards.iter().any(|shard| shard.0.lock().iter().any(refers))
    }

    /// All extents by offset, as far as they stay the same meanwhile.
    #[cfg(test)]
    pub fn extents(&self) -> Vec<Extent> {
        self.shards.iter().flat_map(|shard| shard.0.lock().iter().collect::<Vec<_>>()).collect()
    }
}

fn lock(shard: &Mutex<Index>) -> MutexGuard<'_, Index> {
    schedule::point();
    shard.lock()
}

/// The byte behind a shard's last one.
fn end_of(shard: usize, shift: u32) -> u64 {
    if shard == SHARDS - 1 { u64::MAX } else { (shard as u64 + 1) << shift }
}
