//! Many extents at once: a sweep over the volume by offset, instead of a search in the tree for each.
//!
//! The sweep keeps the extents that reach over where it is in a heap, the newest on top: that one is visible. It ends or gives
//! way to a newer one that begins. Every extent goes into the heap and out of it once, so `n` of them take `n log n` steps
//! however they overlap.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::{Entry, Extent, Index, assert_valid};
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

impl Index {
    /// The index after [`Index::insert`] of all `extents`, in whatever order they are.
    #[must_use]
    pub fn of(mut extents: Vec<Extent>) -> Index {
        extents.retain(|extent| {
            assert_valid(extent);
            !extent.range.is_empty()
        });
        extents.sort_unstable_by_key(|extent| extent.range.start);
        Index { extents: sweep(&extents).into_iter().collect() }
    }

    /// Inserts all `extents`. Cheapest into an empty index.
    pub fn insert_all(&mut self, mut extents: Vec<Extent>) {
        if self.extents.is_empty() {
            *self = Index::of(extents);
            return;
        }
        // A late one meets everything newer than it (see the module's documentation).
        extents.sort_unstable_by_key(|extent| extent.lsn);
        extents.into_iter().for_each(|extent| self.insert(extent));
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
