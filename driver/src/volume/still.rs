//! For tests: time that stands still, and nobody to be woken.

use super::request::Wake;
use super::shared::Clock;

pub(super) struct Still;

impl Clock for Still {
    fn unix_ns(&self) -> u64 {
        1
    }
    fn monotonic_ns(&self) -> u64 {
        1
    }
}

impl Wake for Still {
    fn wake(&self) {}
}
