//! Publish window: which of the claimed records are filled, and how far without a gap.
//!
//! Records are claimed in LSN order and published in any order. Only the gap-free prefix of published records exists
//! for readers, the committer and acknowledgements: a record behind a gap would be lost if the process died now (P1).

use std::collections::VecDeque;

use crate::base::Lsn;

/// The window, over whatever is remembered of a published record.
#[derive(Debug)]
pub struct Window<T> {
    /// LSN of `entries[0]`.
    first: Lsn,
    entries: VecDeque<Option<T>>,
}

impl<T> Window<T> {
    /// Window in which everything below `next` is published.
    #[must_use]
    pub fn new(next: Lsn) -> Window<T> {
        Window { first: next, entries: VecDeque::new() }
    }

    /// Notes the claim of `lsn`, which must be the one after the last claim.
    pub fn claimed(&mut self, lsn: Lsn) {
        assert_eq!(lsn.0, self.first.0 + self.entries.len() as u64, "R2: claims are dense");
        self.entries.push_back(None);
    }

    /// Notes that `lsn` is filled.
    pub fn published(&mut self, lsn: Lsn, value: T) {
        let index = lsn.0.checked_sub(self.first.0).expect("published once") as usize;
        let entry = self.entries.get_mut(index).expect("claimed before published");
        assert!(entry.is_none(), "published once");
        *entry = Some(value);
    }

    /// Takes the next record of the gap-free prefix.
    pub fn advance(&mut self) -> Option<T> {
        let value = self.entries.front_mut()?.take()?;
        self.entries.pop_front();
        self.first = self.first.next();
        Some(value)
    }

    /// Everything up to here was taken by [`Window::advance`].
    #[must_use]
    pub fn prefix(&self) -> Lsn {
        Lsn(self.first.0 - 1)
    }

    /// Claims that are not part of the prefix yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether every claim is part of the prefix.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
