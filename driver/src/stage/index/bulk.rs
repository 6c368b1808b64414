//! Many extents at once: sorted first, most of them go into the tree without a search.

use super::{Entry, Extent, Index, assert_valid};
use crate::base::mutation::{Mutation, is};

impl Index {
    /// The index after [`Index::insert`] of all `extents`, in whatever order they are.
    #[must_use]
    pub fn of(mut extents: Vec<Extent>) -> Index {
        let mut index = Index::new();
        index.insert_all(&mut extents);
        index
    }

    /// Inserts all `extents` and leaves none. Cheapest into an empty index.
    pub fn insert_all(&mut self, extents: &mut Vec<Extent>) {
        extents.sort_unstable_by_key(|extent| (extent.range.start, extent.range.end, extent.lsn));
        if self.extents.is_empty() {
            *self = Index::apart(extents);
        }
        // Insertion does not mind the order, and offsets in order find their place in the tree's cache.
        extents.drain(..).for_each(|extent| self.insert(extent));
    }

    /// Takes those of the sorted `extents` that lie apart, of several for the same range the newest, and leaves the others.
    fn apart(extents: &mut Vec<Extent>) -> Index {
        let mut kept: Vec<(u64, Entry)> = Vec::with_capacity(extents.len());
        extents.retain(|extent| {
            assert_valid(extent);
            let Extent { range, lsn, source } = *extent;
            let entry = Entry { end: range.end, lsn, source };
            match kept.last_mut() {
                _ if range.is_empty() => {}
                Some((start, last)) if *start == range.start && last.end == range.end => {
                    assert!(last.lsn != lsn, "LSN {lsn} covers {range} twice");
                    if !is(Mutation::OlderRecordWins) {
                        *last = entry;
                    }
                }
                Some((_, last)) if last.end > range.start => return true,
                _ => kept.push((range.start, entry)),
            }
            false
        });
        Index { extents: kept.into_iter().collect() }
    }
}
