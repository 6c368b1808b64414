//! A sorted map with wide nodes, for the index.
//!
//! What an insert costs is the cache lines that it has to wait for, one behind the other, while the core is locked. A tree
//! of narrow nodes has six or seven levels for as many extents as a stage can have, and most of its nodes are not in the
//! cache. This one has three levels, of which the upper two are small enough to stay there:
//!
//! ```text
//!  branches   first keys      [ 0 | 4096 | 98304 … ]              one list, in order
//!                                 │
//!  branch     first keys          [ 4096 | 8192 | 40960 … ]       1 to BRANCH leaves, in order
//!                                            │
//!  leaf       keys                           [ 8192 | 8256 … ]    1 to LEAF entries, in order
//!             values                         [ …    | …      ]
//! ```
//!
//! Keys lie apart from the values, so that a search reads keys only.
//!
//! # Invariants
//!
//! * T1 Keys ascend within a leaf, from leaf to leaf and from branch to branch.
//! * T2 No leaf and no branch is empty.
//! * T3 A first key is exactly the first key of the leaf or branch that it stands for, so the entry before a key is found
//!   in the leaf where a search ends, never in the one before.
//! * T4 Where a removal has been, two neighbouring leaves of a branch have more entries than three quarters of a leaf, and two
//!   neighbouring branches more leaves than three quarters of a branch. So what is left of a large tree is not a large one.
//!
//! A leaf that overflows gives away its upper half. Only where the new entry would be the last does it go to the next leaf, or,
//! if that is full, to a leaf of its own: entries that come in order leave full leaves behind.

use std::iter::FusedIterator;

use crate::base::prefetch::prefetch;

/// Where an entry is. Any change of the tree ends what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    branch: usize,
    leaf: usize,
    slot: usize,
}

#[derive(Clone, Debug)]
#[repr(C)]
struct Leaf<V, const LEAF: usize> {
    len: usize,
    keys: [u64; LEAF],
    /// Those from `len` on are copies of some value that was there, as are the keys.
    values: [V; LEAF],
}

impl<V: Copy, const LEAF: usize> Leaf<V, LEAF> {
    fn of(key: u64, value: V) -> Box<Leaf<V, LEAF>> {
        Box::new(Leaf { len: 1, keys: [key; LEAF], values: [value; LEAF] })
    }

    fn keys(&self) -> &[u64] {
        &self.keys[..self.len]
    }

    fn is_full(&self) -> bool {
        self.len == LEAF
    }

    fn insert(&mut self, slot: usize, key: u64, value: V) {
        self.keys.copy_within(slot..self.len, slot + 1);
        self.values.copy_within(slot..self.len, slot + 1);
        (self.keys[slot], self.values[slot]) = (key, value);
        self.len += 1;
    }

    /// The entries from `slot` on.
    fn split_off(&mut self, slot: usize) -> Box<Leaf<V, LEAF>> {
        let mut upper = Leaf::of(self.keys[slot], self.values[slot]);
        upper.len = 0;
        upper.append(self, slot);
        self.len = slot;
        upper
    }

    /// Copies the entries of `other` from `slot` on behind its own.
    fn append(&mut self, other: &Leaf<V, LEAF>, slot: usize) {
        let len = self.len + other.len - slot;
        self.keys[self.len..len].copy_from_slice(&other.keys[slot..other.len]);
        self.values[self.len..len].copy_from_slice(&other.values[slot..other.len]);
        self.len = len;
    }

    /// Takes out the entries from `slot` on whose key is below `end`, where `is_to_go` says so. Whether there may be more
    /// of them in the next leaf.
    fn extract(&mut self, slot: usize, end: u64, mut is_to_go: impl FnMut(u64, &V) -> bool) -> bool {
        let past = slot + self.keys[slot..self.len].partition_point(|key| *key < end);
        let goes_on = past == self.len;
        let mut kept = slot;
        for at in slot..past {
            if !is_to_go(self.keys[at], &self.values[at]) {
                if kept < at {
                    (self.keys[kept], self.values[kept]) = (self.keys[at], self.values[at]);
                }
                kept += 1;
            }
        }
        if kept < past {
            self.keys.copy_within(past..self.len, kept);
            self.values.copy_within(past..self.len, kept);
            self.len -= past - kept;
        }
        goes_on
    }
}

/// Things in order, by their first key.
#[derive(Clone, Debug)]
struct Row<T> {
    firsts: Vec<u64>,
    items: Vec<T>,
}

impl<T> Default for Row<T> {
    fn default() -> Row<T> {
        Row { firsts: Vec::new(), items: Vec::new() }
    }
}

impl<T> Row<T> {
    fn len(&self) -> usize {
        self.items.len()
    }

    /// The last one that begins before `end`.
    fn before(&self, end: u64) -> Option<usize> {
        self.firsts.partition_point(|first| *first < end).checked_sub(1)
    }

    fn insert(&mut self, at: usize, first: u64, item: T) {
        self.firsts.insert(at, first);
        self.items.insert(at, item);
    }

    fn remove(&mut self, at: usize) -> T {
        self.firsts.remove(at);
        self.items.remove(at)
    }

    fn split_off(&mut self, at: usize) -> Row<T> {
        Row { firsts: self.firsts.split_off(at), items: self.items.split_off(at) }
    }

    fn append(&mut self, mut other: Row<T>) {
        self.firsts.append(&mut other.firsts);
        self.items.append(&mut other.items);
    }
}

type Branch<V, const LEAF: usize> = Row<Box<Leaf<V, LEAF>>>;

/// The map. `LEAF` entries a leaf and `BRANCH` leaves a branch at most.
#[derive(Clone, Debug)]
pub struct Tree<V, const LEAF: usize, const BRANCH: usize> {
    branches: Row<Branch<V, LEAF>>,
    len: usize,
}

impl<V, const LEAF: usize, const BRANCH: usize> Default for Tree<V, LEAF, BRANCH> {
    fn default() -> Tree<V, LEAF, BRANCH> {
        const { assert!(LEAF >= 4 && BRANCH >= 4, "a quarter of a node is something") };
        Tree { branches: Row::default(), len: 0 }
    }
}

impl<V: Copy, const LEAF: usize, const BRANCH: usize> Tree<V, LEAF, BRANCH> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The entry at `at`.
    pub fn get(&self, at: At) -> (u64, &V) {
        let leaf = &self.branches.items[at.branch].items[at.leaf];
        (leaf.keys()[at.slot], &leaf.values[at.slot])
    }

    /// The value at `at`.
    pub fn get_mut(&mut self, at: At) -> &mut V {
        let leaf = &mut self.branches.items[at.branch].items[at.leaf];
        &mut leaf.values[..leaf.len][at.slot]
    }

    /// The last entry whose key is below `end`.
    #[inline]
    pub fn before(&self, end: u64) -> Option<At> {
        let branch = self.branches.before(end)?;
        let row = &self.branches.items[branch];
        let leaf = row.before(end).expect("T3: a branch's first leaf begins where the branch does");
        let slot = row.items[leaf].keys().partition_point(|key| *key < end);
        assert!(slot > 0, "T3: a leaf's first key is its row's");
        Some(At { branch, leaf, slot: slot - 1 })
    }

    /// Begins to bring near what [`Tree::before`] will look at for `end`.
    #[inline]
    pub fn prefetch(&self, end: u64) {
        let row = self.branches.before(end).map(|branch| &self.branches.items[branch]);
        if let Some(leaf) = row.and_then(|row| Some(&row.items[row.before(end)?])) {
            prefetch(&leaf.keys);
        }
    }

    /// The entry behind `at`, or the first one of all.
    pub fn after(&self, at: Option<At>) -> Option<At> {
        let Some(at) = at else {
            return (self.len > 0).then_some(At { branch: 0, leaf: 0, slot: 0 });
        };
        let row = &self.branches.items[at.branch];
        if at.slot + 1 < row.items[at.leaf].len {
            Some(At { slot: at.slot + 1, ..at })
        } else if at.leaf + 1 < row.len() {
            Some(At { leaf: at.leaf + 1, slot: 0, ..at })
        } else if at.branch + 1 < self.branches.len() {
            Some(At { branch: at.branch + 1, leaf: 0, slot: 0 })
        } else {
            None
        }
    }

    /// The entries behind `at`, or all, whose key is below `end`, in order.
    pub fn entries(&self, at: Option<At>, end: u64) -> Entries<'_, V, LEAF, BRANCH> {
        Entries { tree: self, next: self.after(at), end }
    }

    /// Puts an entry right behind the one at `before`, or in front of all. `before` must be what [`Tree::before`] says for
    /// `key`, which must not be there yet.
    pub fn insert_after(&mut self, before: Option<At>, key: u64, value: V) {
        self.len += 1;
        let Some(before) = before else { return self.insert_first(key, value) };
        let At { branch, leaf, slot } = before;
        let row = &mut self.branches.items[branch];
        let slot = slot + 1;
        let here = &mut row.items[leaf];
        assert!(here.keys[slot - 1] < key, "T1");
        if !here.is_full() {
            assert!(slot == here.len || key < here.keys[slot], "T1");
            return here.insert(slot, key, value);
        }
        if slot < LEAF {
            assert!(key < here.keys[slot], "T1");
            let mut upper = here.split_off(LEAF / 2);
            if slot <= LEAF / 2 {
                here.insert(slot, key, value);
            } else {
                upper.insert(slot - LEAF / 2, key, value);
            }
            return self.add_leaf(branch, leaf + 1, upper);
        }
        match row.items.get_mut(leaf + 1) {
            Some(next) if !next.is_full() => {
                assert!(key < next.keys[0], "T1");
                next.insert(0, key, value);
                row.firsts[leaf + 1] = key;
            }
            _ => self.add_leaf(branch, leaf + 1, Leaf::of(key, value)),
        }
    }

    fn insert_first(&mut self, key: u64, value: V) {
        let Some(row) = self.branches.items.first_mut() else {
            let row = Row { firsts: vec![key], items: vec![Leaf::of(key, value)] };
            return self.branches.insert(0, key, row);
        };
        let leaf = &mut row.items[0];
        assert!(key < leaf.keys[0], "T1");
        if leaf.is_full() {
            return self.add_leaf(0, 0, Leaf::of(key, value));
        }
        leaf.insert(0, key, value);
        (row.firsts[0], self.branches.firsts[0]) = (key, key);
    }

    fn add_leaf(&mut self, branch: usize, at: usize, leaf: Box<Leaf<V, LEAF>>) {
        let first = leaf.keys[0];
        let row = &mut self.branches.items[branch];
        if row.len() < BRANCH {
            row.insert(at, first, leaf);
            self.branches.firsts[branch] = row.firsts[0];
            return;
        }
        // As with leaves: what comes in order leaves full branches behind.
        let split = if at == BRANCH { BRANCH } else { BRANCH / 2 };
        let mut upper = row.split_off(split);
        if at <= split && split < BRANCH {
            row.insert(at, first, leaf);
        } else {
            upper.insert(at - split, first, leaf);
        }
        self.branches.firsts[branch] = row.firsts[0];
        self.branches.insert(branch + 1, upper.firsts[0], upper);
    }

    /// Takes out, in order, the entries behind `at`, or all, whose key is below `end`, where `is_to_go` says so.
    pub fn extract(&mut self, at: Option<At>, end: u64, mut is_to_go: impl FnMut(u64, &V) -> bool) {
        let Some(At { mut branch, mut leaf, mut slot }) = self.after(at) else { return };
        let (mut goes_on, mut shrunk_before) = (true, false);
        while goes_on && branch < self.branches.len() {
            let row = &mut self.branches.items[branch];
            let mut has_shrunk = false;
            while goes_on && leaf < row.len() {
                let here = &mut row.items[leaf];
                let before = here.len;
                goes_on = here.extract(slot, end, &mut is_to_go);
                slot = 0;
                self.len -= before - here.len;
                has_shrunk |= here.len < before;
                leaf = if has_shrunk { settle_leaf(row, leaf) } else { leaf + 1 };
            }
            if has_shrunk && leaf < row.len() {
                settle_leaf(row, leaf);
            }
            leaf = 0;
            branch = if has_shrunk || shrunk_before { self.settle_branch(branch) } else { branch + 1 };
            shrunk_before = has_shrunk;
        }
        if shrunk_before && branch < self.branches.len() {
            self.settle_branch(branch);
        }
    }

    /// Restores T2 to T4 for a branch whose leaves are settled. Where the branch behind it is now.
    fn settle_branch(&mut self, branch: usize) -> usize {
        let row = &self.branches.items[branch];
        let len = row.len();
        if len == 0 {
            self.branches.remove(branch);
            return branch;
        }
        self.branches.firsts[branch] = row.firsts[0];
        if branch > 0 && self.branches.items[branch - 1].len() + len <= BRANCH * 3 / 4 {
            let row = self.branches.remove(branch);
            let before = &mut self.branches.items[branch - 1];
            let joint = before.len();
            before.append(row);
            settle_leaf(before, joint);
            return branch;
        }
        branch + 1
    }
}

/// Restores T2 to T4 for a leaf and the one before it. Where the leaf behind it is now.
fn settle_leaf<V: Copy, const LEAF: usize>(row: &mut Branch<V, LEAF>, leaf: usize) -> usize {
    let len = row.items[leaf].len;
    if len == 0 {
        row.remove(leaf);
        return leaf;
    }
    row.firsts[leaf] = row.items[leaf].keys[0];
    if leaf > 0 && row.items[leaf - 1].len + len <= LEAF * 3 / 4 {
        let upper = row.remove(leaf);
        row.items[leaf - 1].append(&upper, 0);
        return leaf;
    }
    leaf + 1
}

/// Of entries in ascending order of their keys, which must all differ.
impl<V: Copy, const LEAF: usize, const BRANCH: usize> FromIterator<(u64, V)> for Tree<V, LEAF, BRANCH> {
    fn from_iter<I: IntoIterator<Item = (u64, V)>>(entries: I) -> Tree<V, LEAF, BRANCH> {
        let mut tree = Tree::default();
        let mut last = None;
        for (key, value) in entries {
            tree.insert_after(last, key, value);
            // A new last entry moves none before it.
            last = tree.after(last);
        }
        tree
    }
}

/// What [`Tree::entries`] gives.
#[derive(Clone, Debug)]
pub struct Entries<'a, V, const LEAF: usize, const BRANCH: usize> {
    tree: &'a Tree<V, LEAF, BRANCH>,
    next: Option<At>,
    end: u64,
}

impl<V: Copy, const LEAF: usize, const BRANCH: usize> Iterator for Entries<'_, V, LEAF, BRANCH> {
    type Item = (u64, V);

    fn next(&mut self) -> Option<(u64, V)> {
        let at = self.next?;
        let (key, value) = self.tree.get(at);
        if key >= self.end {
            self.next = None;
            return None;
        }
        self.next = self.tree.after(Some(at));
        Some((key, *value))
    }
}

impl<V: Copy, const LEAF: usize, const BRANCH: usize> FusedIterator for Entries<'_, V, LEAF, BRANCH> {}

#[cfg(test)]
mod tests;
