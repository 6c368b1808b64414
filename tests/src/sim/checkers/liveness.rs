//! Liveness: while a request waits something can happen, and the background does not ask to be called again and again
//! without anything to do.

use tidegate_driver::stage::core::Core;

/// Calls within a microsecond of each other after which the background is said to spin.
const SPINS_MAX: u32 = 5000;

/// Watches one server.
#[derive(Debug, Default)]
pub struct Liveness {
    spins: u32,
}

impl Liveness {
    /// Nothing could happen at `now`; the next event is due at `next`.
    pub fn waits(&mut self, now: u64, next: u64) -> Result<(), String> {
        self.spins = if next <= now + 1000 { self.spins + 1 } else { 0 };
        if self.spins > SPINS_MAX {
            return Err("the background spins: it asks to be called at once, again and again".into());
        }
        Ok(())
    }

    /// Nothing can happen any more although requests wait.
    #[must_use]
    pub fn stalled(waiting: &[String], core: &Core) -> String {
        format!(
            "nothing can happen any more, but requests wait: {waiting:?}; claimed {} published {} durable {} checkpoint {} \
             waiting {} regions {}",
            core.claimed(),
            core.published(),
            core.durable(),
            core.checkpoint(),
            core.waiting(),
            core.ring().regions().len()
        )
    }
}
