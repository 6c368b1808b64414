//! Pauses between attempts.

use crate::base::mutation::{Mutation, is};

/// A pause that doubles.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackOff {
    pub(super) until_ns: u64,
    pause_ns: u64,
}

impl BackOff {
    pub(super) fn failed(&mut self, now_ns: u64, (first, longest): (u64, u64)) {
        self.pause_ns = (self.pause_ns * 2).clamp(first, longest);
        self.until_ns = now_ns + if is(Mutation::RetriesDoNotPause) { 0 } else { self.pause_ns };
    }
}
