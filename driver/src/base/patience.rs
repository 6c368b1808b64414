//! Whether it pays to look again for a short while instead of going on (or to sleep), learned from how it went before.
//!
//! After an attempt that was in vain the next 1, 2, 4 … 64 opportunities are passed over, so that what is lost is bounded; one
//! that paid makes every opportunity count again. What a short while is, and what paying means, the user knows.

/// Most opportunities passed over.
const PASSED_OVER_MAX: u32 = 64;

/// What was learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Patience {
    /// Opportunities to pass over before the next attempt.
    left: u32,
    /// As many as there were after the last attempt.
    passed_over: u32,
}

impl Patience {
    /// Here is an opportunity: whether to attempt it. Tell what came of it with [`Patience::paid`] or [`Patience::in_vain`].
    pub fn attempts(&mut self) -> bool {
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                false
            }
            None => true,
        }
    }

    /// The attempt paid.
    pub fn paid(&mut self) {
        *self = Patience::default();
    }

    /// The attempt was in vain.
    pub fn in_vain(&mut self) {
        self.passed_over = (self.passed_over * 2).clamp(1, PASSED_OVER_MAX);
        self.left = self.passed_over;
    }
}

/// A look that goes on over several questions, with the time told by whoever asks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    since_ns: Option<u64>,
    patience: Patience,
}

impl Look {
    /// Whether one is going on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.since_ns.is_some()
    }

    /// Whether to look (on) at `now_ns`: for `span_ns` from when it began. Where none is going on, one begins if it may pay.
    pub fn goes_on(&mut self, now_ns: u64, span_ns: u64) -> bool {
        match self.since_ns {
            Some(since_ns) => now_ns.saturating_sub(since_ns) < span_ns,
            None => {
                self.since_ns = self.patience.attempts().then_some(now_ns);
                self.is_on()
            }
        }
    }

    /// It is over, if one was going on: whether one was.
    pub fn ends(&mut self, paid: bool) -> bool {
        let was_on = self.since_ns.take().is_some();
        match (was_on, paid) {
            (true, true) => self.patience.paid(),
            (true, false) => self.patience.in_vain(),
            (false, _) => {}
        }
        was_on
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_bounded() {
        let mut patience = Patience::default();
        let attempts = (0..10_000).filter(|_| {
            let attempts = patience.attempts();
            if attempts {
                patience.in_vain();
            }
            attempts
        });
        let attempts = attempts.count();
        assert!(attempts <= 7 + 10_000 / 65, "{attempts} attempts in vain");
    }

    #[test]
    fn what_pays_is_attempted_every_time() {
        let mut patience = Patience::default();
        for _ in 0..10 {
            if patience.attempts() {
                patience.in_vain();
            }
        }
        let later = (0..200).position(|_| patience.attempts());
        assert!(later.is_some_and(|later| later <= 64), "it is attempted again: {later:?}");
        patience.paid();
        assert!((0..100).all(|_| patience.attempts()));
    }
}
