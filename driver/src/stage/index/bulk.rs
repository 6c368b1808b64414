//! Many extents at once: a sweep over the volume by offset, instead of a search in the tree for each.
//!
//! The sweep keeps the extents that reach over where it is in a heap, the newest on top: that one is visible. It ends or gives
//! way to a newer one that begins. Every extent goes into the heap and out of it once, so `n` of them take `n log n` steps
//! however they overlap.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::{Entry, Extent, Index, assert_valid};
use crate::base::ByteRange;
use crate::base::mutation::{Mutation, is};

/// In the order of age: a greater one hides a smaller one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open(Extent);

impl Ord for Open {
    fn cmp(&self, other: &Open) -> Ordering {
        let order = self.0.lsn.cmp(&other.0.lsn);
        if is(Mutation::OlderRecordWins) { order.reverse() } else { order }
    }
}

impl PartialOrd for Open {
    fn partial_cmp(&self, other: &Open) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// An index in the making. It takes extents bit by bit, in whatever order they are.
#[derive(Clone, Debug, Default)]
pub struct Bulk {
    /// One sorted run behind the other. The first `visible` are what was visible of all those before.
    extents: Vec<Extent>,
    visible: usize,
    runs: usize,
}

impl Bulk {
    /// Takes `extents`.
    pub fn add(&mut self, mut extents: Vec<Extent>) {
        extents.retain(|extent| {
            assert_valid(extent);
            !extent.range.is_empty()
        });
        extents.sort_unstable_by_key(|extent| extent.range.start);
        self.runs += 1;
        if self.extents.is_empty() {
            self.extents = extents;
        } else {
            self.extents.extend(extents);
        }
    }

    /// Forgets what newer extents cover.
    pub fn compact(&mut self) {
        self.merge();
        let visible = sweep(&self.extents);
        self.extents.clear();
        self.extents.extend(visible.into_iter().map(|(start, entry)| Extent {
            range: ByteRange { start, end: entry.end },
            lsn: entry.lsn,
            source: entry.source,
        }));
        self.visible = self.extents.len();
        self.runs = 1;
    }

    /// Finds out what is visible of everything that was taken.
    #[must_use]
    pub fn sort(mut self) -> Sorted {
        self.merge();
        if self.extents.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start) {
            // All of everything. An entry with its key is as large as an extent, so it takes the extent's place.
            let entry = |e: Extent| (e.range.start, Entry { end: e.range.end, lsn: e.lsn, source: e.source });
            return Sorted(self.extents.into_iter().map(entry).collect());
        }
        Sorted(sweep(&self.extents))
    }

    /// The index after [`Index::insert`] of everything that was taken.
    #[must_use]
    pub fn finish(self) -> Index {
        Index { extents: self.sort().0.into_iter().collect() }
    }

    fn merge(&mut self) {
        if self.runs > 1 {
            // A stable sort, as it finds the runs and merges them.
            self.extents.sort_by_key(|extent| extent.range.start);
            self.runs = 1;
        }
    }
}

/// What becomes an index. The last step is one of its own as it is mostly allocation, which is slow in any thread but a
/// program's first: the C library makes room there page by page, with a system call each.
#[derive(Debug, Default)]
pub struct Sorted(Vec<(u64, Entry)>);

impl Sorted {
    /// To be taken in parts.
    #[must_use]
    pub fn cut(self) -> Cut {
        Cut { rest: self.0.into_iter(), over: None }
    }
}

/// What is sorted, as it is taken, part by part of the volume.
#[derive(Debug)]
pub struct Cut {
    rest: std::vec::IntoIter<(u64, Entry)>,
    /// What reached over the end of the part before.
    over: Option<(u64, Entry)>,
}

impl Cut {
    /// The index of the next part, which ends before byte `end`.
    #[must_use]
    pub fn up_to(&mut self, end: u64) -> Index {
        let extents = std::iter::from_fn(|| {
            let (start, entry) = self.over.take().or_else(|| self.rest.next())?;
            if start >= end {
                self.over = Some((start, entry));
                return None;
            }
            if entry.end > end {
                self.over = Some((end, entry.tail(start, end)));
            }
            Some((start, Entry { end: entry.end.min(end), ..entry }))
        });
        Index { extents: extents.collect() }
    }
}

impl Index {
    /// The index after [`Index::insert`] of all `extents`, in whatever order they are.
    #[must_use]
    pub fn of(extents: Vec<Extent>) -> Index {
        let mut bulk = Bulk::default();
        bulk.add(extents);
        bulk.finish()
    }
}

/// What is visible of `extents`, which are sorted by offset and not empty.
fn sweep(extents: &[Extent]) -> Vec<(u64, Entry)> {
    let mut visible = Vec::with_capacity(extents.len());
    let mut see = |extent: &Extent, from: u64, to: u64| {
        if from < to {
            let source = extent.source.advanced(from - extent.range.start);
            visible.push((from, Entry { end: to, lsn: extent.lsn, source }));
        }
    };
    let mut coming = extents.iter().peekable();
    let mut open: BinaryHeap<Open> = BinaryHeap::new();
    let mut at = 0;
    loop {
        while open.peek().is_some_and(|top| top.0.range.end <= at) {
            open.pop();
        }
        let Some(&Open(top)) = open.peek() else {
            let Some(&next) = coming.next() else { return visible };
            at = next.range.start;
            open.push(Open(next));
            continue;
        };
        let Some(&&next) = coming.peek().filter(|next| next.range.start < top.range.end) else {
            see(&top, at, top.range.end);
            at = top.range.end;
            continue;
        };
        assert!(next.lsn != top.lsn, "LSN {} covers a byte of {} twice", top.lsn, next.range);
        coming.next();
        open.push(Open(next));
        if Open(next) > Open(top) {
            see(&top, at, next.range.start);
            at = next.range.start;
        }
    }
}
