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
