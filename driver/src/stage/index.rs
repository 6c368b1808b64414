//! The index of a volume: which staged record holds the newest bytes of a range.
//!
//! Reads ask it first; what it does not know is on the backing. It is a map of disjoint, non-empty extents by their
//! first byte. Each extent is what is left visible of one record, so a record that was overwritten in its middle
//! shows up as two extents. Neighbours of different records are never merged: each must keep its LSN, by which the
//! flusher forgets it.
//!
//! Records may arrive in any order of LSN, because doors claim LSNs first and fill records in parallel. The newest
//! LSN wins byte by byte. One order is up to the caller, as the index cannot see it: a record is inserted before the
//! flusher may call [`Index::remove_flushed`] up to its LSN. An older record that came after the newer one it lost
//! to was already forgotten would be taken for the newest and served to readers.
//!
//! # Size
//!
//! An entry is 40 bytes (8 of key, 32 of value). With the slack of leaves and what is above them, an extent costs about
//! 60 bytes after random inserts, 42 after ascending or descending ones, and 120 in the worst order that is known.
//! What is left after removals has about 105 at most.
//! `n` inserts and removals leave at most `2n - 1` extents, whatever their order, because an extent begins and ends
//! where one of them did. (A volume has several such indexes, and what crosses their borders is cut.) An insert in LSN
//! order adds at most two, a late one at most one more per newer extent that it meets, a removal at most one.

use std::iter::FusedIterator;

use crate::base::mutation::{Mutation, is};
use crate::base::{ByteRange, Lsn, RegionSeq};

mod bulk;
#[cfg(test)]
mod tests;
mod tree;

use tree::{Entries, Tree};

pub use bulk::{Bulk, Sorted};

/// Where the bytes of an extent come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The payload byte for the extent's first byte is at `offset` within region `region`.
    Data {
        /// The region that holds the payload.
        region: RegionSeq,
        /// Byte offset within the region.
        offset: u32,
    },
    /// Zeroes (write-zeroes).
    Zero,
    /// Discarded; reads as zeroes while staged.
    Discard,
}

impl Source {
    /// The source of the part that begins `by` bytes later. Panics if that leaves the region.
    #[must_use]
    pub fn advanced(self, by: u64) -> Source {
        match self {
            Source::Data { region, offset } => {
                let by = u32::try_from(by).expect("a payload lies within one region");
                let offset = offset.checked_add(by).expect("a payload lies within one region");
                Source::Data { region, offset }
            }
            Source::Zero | Source::Discard => self,
        }
    }

    /// Whether `len` bytes from here are addressable.
    fn reaches(self, len: u64) -> bool {
        match self {
            Source::Data { offset, .. } => len <= (1 << 32) - u64::from(offset),
            Source::Zero | Source::Discard => true,
        }
    }
}

/// A range of a volume, the record that holds its newest bytes, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of the volume.
    pub range: ByteRange,
    /// LSN of the record.
    pub lsn: Lsn,
    /// Source of the range's first byte.
    pub source: Source,
}

/// A part of the answer to a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes of the volume.
    pub range: ByteRange,
    /// The newest record here and the source of the range's first byte; `None` where nothing is staged.
    pub hit: Option<(Lsn, Source)>,
}

/// Value of the map; the key is the extent's first byte.
#[derive(Clone, Copy, Debug)]
struct Entry {
    end: u64,
    lsn: Lsn,
    source: Source,
}

// There may be INDEX_EXTENTS_MAX of them. The enum's tag hides in the padding beside `offset`, so packing would only
// pay off by taking bits away from the LSN or the region number.
const _: () = assert!(size_of::<u64>() + size_of::<Entry>() == 40);

impl Entry {
    /// The part of this entry, which begins at `start`, that begins at `from`.
    fn tail(&self, start: u64, from: u64) -> Entry {
        assert!(start <= from && from < self.end, "a tail is a non-empty part of its extent");
        Entry { source: self.source.advanced(from - start), ..*self }
    }
}

fn assert_valid(extent: &Extent) {
    let Extent { range, lsn, source } = extent;
    assert!(range.start <= range.end, "extent {range} runs backwards");
    assert!(*lsn > Lsn::ZERO, "LSN 0 belongs to no record");
    assert!(source.reaches(range.len()), "the payload of extent {range} leaves its region");
}

/// Leaves are small enough that making room in one is cheap, and large enough that a tree of [`INDEX_EXTENTS_MAX`] extents has
/// a few hundred branches.
///
/// [`INDEX_EXTENTS_MAX`]: crate::base::limits::INDEX_EXTENTS_MAX
const LEAF: usize = 32;
const BRANCH: usize = 128;

type Extents = Tree<Entry, LEAF, BRANCH>;

/// The newest staged bytes of one volume.
#[derive(Clone, Debug, Default)]
pub struct Index {
    extents: Extents,
}

impl Index {
    /// An empty index. Allocates nothing.
    #[must_use]
    pub fn new() -> Index {
        Index::default()
    }

    /// Adds what a record holds. Where records overlap, the one with the higher LSN stays visible, whichever came
    /// first. An empty extent changes nothing.
    ///
    /// Panics if another extent with the same LSN overlaps: an LSN names one record, and a record holds a byte once.
    pub fn insert(&mut self, extent: Extent) {
        assert_valid(&extent);
        let Extent { range, lsn, source } = extent;
        if range.is_empty() {
            return;
        }
        // Extents are disjoint, so of those that begin before our end the last also ends last: looking at this one
        // settles the two common cases, nothing there and exactly the same range, in one search of the tree.
        let last = self.extents.before(range.end);
        match last.map(|at| (at, self.extents.get(at))) {
            Some((at, (start, entry))) if entry.end > range.start => {
                if start == range.start && entry.end == range.end {
                    assert!(entry.lsn != lsn, "LSN {lsn} covers {range} twice");
                    if entry.lsn < lsn && !is(Mutation::OlderRecordWins) {
                        *self.extents.get_mut(at) = Entry { lsn, source, ..*entry };
                    }
                    return;
                }
            }
            _ => {
                self.extents.insert_after(last, range.start, Entry { end: range.end, lsn, source });
                return;
            }
        }
        self.cut(range, Lsn(lsn.0 - 1));
        self.fill_holes(extent);
    }

    /// Says that an extent of `range` will be inserted soon.
    pub fn expect(&self, range: ByteRange) {
        self.extents.prefetch(range.end);
    }

    /// What is known about `range`: pieces in order that cover it exactly, holes included. Allocates nothing.
    #[must_use]
    pub fn lookup(&self, range: ByteRange) -> Lookup<'_> {
        assert!(range.start <= range.end, "lookup range {range} runs backwards");
        let mut lookup = Lookup { extents: None, ahead: None, at: range.start, end: range.end };
        // As for insert: the last extent that begins before our end usually settles it in one search.
        match self.extents.before(range.end).map(|at| self.extents.get(at)) {
            Some((start, entry)) if start <= range.start && entry.end > range.start => {
                lookup.ahead = Some((start, *entry));
            }
            Some((_, entry)) if entry.end > range.start => {
                let before = self.extents.before(range.start);
                lookup.ahead = before
                    .map(|at| self.extents.get(at))
                    .filter(|(_, entry)| entry.end > range.start)
                    .map(|(start, entry)| (start, *entry));
                lookup.extents = Some(self.extents.entries(before, range.end));
            }
            _ => {}
        }
        lookup
    }

    /// Forgets the parts of extents inside `range` whose LSN is at most `up_to`: the backing holds them now.
    ///
    /// Every record up to `up_to` must have been inserted before (see the module's documentation).
    pub fn remove_flushed(&mut self, range: ByteRange, up_to: Lsn) {
        assert!(range.start <= range.end, "flushed range {range} runs backwards");
        if !range.is_empty() {
            self.cut(range, up_to);
        }
    }

    /// Where the part of `range` ends that has no more than `most` extents behind one that reaches into it.
    #[must_use]
    pub fn reach(&self, range: ByteRange, most: usize) -> u64 {
        let mut ahead = self.extents.entries(self.extents.before(range.start), range.end);
        ahead.nth(most).map_or(range.end, |(start, _)| start)
    }

    /// Number of extents.
    #[must_use]
    pub fn extent_count(&self) -> usize {
        self.extents.len()
    }

    /// Whether nothing is staged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.len() == 0
    }

    /// All extents by offset.
    pub fn iter(&self) -> impl Iterator<Item = Extent> {
        self.extents.entries(None, u64::MAX).map(|(start, entry)| Extent {
            range: ByteRange { start, end: entry.end },
            lsn: entry.lsn,
            source: entry.source,
        })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.extents = Extents::default();
    }

    /// Removes from `range`, which is not empty, whatever has an LSN of at most `up_to`, splitting extents that reach
    /// beyond it.
    fn cut(&mut self, range: ByteRange, up_to: Lsn) {
        let before = self.extents.before(range.start);
        if let Some(at) = before
            && let (start, &whole) = self.extents.get(at)
            && whole.end > range.start
            && whole.lsn <= up_to
        {
            self.extents.get_mut(at).end = range.start;
            if whole.end > range.end && !is(Mutation::CutForgetsTheTail) {
                // It surrounded the range, so there is nothing else inside.
                self.extents.insert_after(before, range.end, whole.tail(start, range.end));
                return;
            }
        }
        // One pass, not a search per extent: a discard of the whole volume meets every extent.
        let mut beyond = None;
        self.extents.extract(before, range.end, |start, entry| {
            let is_to_go = entry.lsn <= up_to;
            if is_to_go && entry.end > range.end {
                assert!(beyond.is_none(), "two extents hold byte {}", range.end);
                beyond = Some(entry.tail(start, range.end));
            }
            is_to_go
        });
        if let Some(entry) = beyond {
            self.insert_where_nothing_is(range.end, entry);
        }
    }

    fn insert_where_nothing_is(&mut self, start: u64, entry: Entry) {
        self.extents.insert_after(self.extents.before(start), start, entry);
    }

    /// Puts `extent` wherever its range holds nothing. What it does hold must be newer.
    fn fill_holes(&mut self, extent: Extent) {
        let Extent { range, lsn, source } = extent;
        let mut at = range.start;
        if let Some((_, before)) = self.extents.before(range.start).map(|at| self.extents.get(at))
            && before.end > range.start
        {
            assert!(before.lsn > lsn, "LSN {lsn} covers a byte of {range} twice");
            at = before.end;
        }
        while at < range.end {
            let newer = self.extents.entries(self.extents.before(at), range.end).next();
            let hole_end = newer.map_or(range.end, |(start, _)| start);
            if at < hole_end {
                let entry = Entry { end: hole_end, lsn, source: source.advanced(at - range.start) };
                self.insert_where_nothing_is(at, entry);
            }
            let Some((_, newer)) = newer else { break };
            assert!(newer.lsn > lsn, "LSN {lsn} covers a byte of {range} twice");
            at = newer.end;
        }
    }
}

/// The pieces of [`Index::lookup`].
#[derive(Clone, Debug)]
pub struct Lookup<'a> {
    /// Extents behind those that are known already.
    extents: Option<Entries<'a, Entry, LEAF, BRANCH>>,
    /// The next extent, where it is already known.
    ahead: Option<(u64, Entry)>,
    at: u64,
    end: u64,
}

impl Iterator for Lookup<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.at >= self.end {
            return None;
        }
        let at = self.at;
        self.ahead = self.ahead.or_else(|| self.extents.as_mut()?.next());
        let (end, hit) = match self.ahead {
            Some((start, entry)) if start <= at => {
                self.ahead = None;
                (entry.end.min(self.end), Some((entry.lsn, entry.source.advanced(at - start))))
            }
            Some((start, _)) => (start, None),
            None => (self.end, None),
        };
        assert!(at < end && end <= self.end, "lookup makes progress and stays in its range");
        self.at = end;
        Some(Piece { range: ByteRange { start: at, end }, hit })
    }
}

impl FusedIterator for Lookup<'_> {}
