//! Looking for news for a while before a thread sleeps.
//!
//! To be woken takes long: some microseconds on a machine of one's own, tens in a virtual one. Who is told of a completion
//! often answers sooner than that, and a device too. So a thread looks for news for a while, and pays with a processor's
//! time, but not for long in vain:
//! - where looking was in vain it is done less and less often ([`Patience`]), and then the thread sleeps until there are
//!   news: a device that nobody uses costs nothing;
//! - where others want the processor they get it, and that counts as in vain: before it looks the thread yields, and switches
//!   that it did not ask for tell that somebody was there. Time spent looking would be taken from the thread's share, and it
//!   would be late when there is work.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use super::Reactor;
use crate::base::Result;
use crate::base::patience::Patience;

/// What a thread with a ring has learned. Devices and clients are looked for with different success.
#[derive(Debug)]
pub struct Linger {
    span: Duration,
    clients: Patience,
    devices: Patience,
}

impl Linger {
    /// Looks for `span` at most; never if that is zero.
    #[must_use]
    pub fn new(span: Duration) -> Linger {
        Linger { span, clients: Patience::default(), devices: Patience::default() }
    }

    /// Submits what is queued and looks for news, if that may pay. `true`: there are events at hand. `false`: it is time for
    /// [`Reactor::submit_and_wait`], which may have some at once. Call on the reactor's thread only.
    pub fn look(&mut self, reactor: &mut Reactor) -> Result<bool> {
        let patience = if reactor.ops_in_flight() > 0 { &mut self.devices } else { &mut self.clients };
        if self.span.is_zero() || !patience.attempts() {
            return Ok(false);
        }
        reactor.submit_and_wait(Some(Duration::ZERO))?;
        if reactor.has_events() {
            return Ok(true);
        }
        let before = preempted();
        std::thread::yield_now();
        if preempted() != before {
            patience.in_vain();
            return Ok(false);
        }
        let began = Instant::now();
        while began.elapsed() < self.span {
            if reactor.has_news() {
                // Work of the kernel that waits to be done need not bring an event.
                reactor.submit_and_wait(Some(Duration::ZERO))?;
                if reactor.has_events() {
                    // Whoever was preempted while it looked has used up its share.
                    if preempted() == before {
                        patience.paid()
                    } else {
                        patience.in_vain()
                    }
                    return Ok(true);
                }
            }
            spin_loop();
        }
        patience.in_vain();
        Ok(false)
    }
}

/// How often the processor was taken away from this thread. 0 if that cannot be told.
fn preempted() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.involuntary_context_switches())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::io::uring::Event;
    use crate::volume::Wake;

    #[test]
    fn news_that_come_are_waited_for() {
        let mut reactor = Reactor::new(8).unwrap();
        let waker = reactor.waker();
        let other = thread::spawn(move || {
            // Until the other one looks, most likely; if it does not yet, it finds the news at once.
            thread::sleep(Duration::from_millis(200));
            waker.wake();
        });
        // Another test may want the processor, which ends a look at once. Looks that never wait are seen by their number.
        let mut looks = 0;
        let mut last = Duration::ZERO;
        while !reactor.has_events() {
            let began = Instant::now();
            Linger::new(Duration::from_secs(60)).look(&mut reactor).unwrap();
            (looks, last) = (looks + 1, began.elapsed());
        }
        assert!(
            looks < 10_000 || last > Duration::from_millis(1),
            "{looks} looks of a minute each, {last:?}"
        );
        other.join().unwrap();
        assert!(matches!(reactor.next_event(), Some(Event::Wake)));
    }

    #[test]
    fn looks_in_vain_become_rare() {
        let mut reactor = Reactor::new(8).unwrap();
        let mut linger = Linger::new(Duration::from_micros(1));
        let looked = (0..1000).filter(|_| {
            let before = linger.clients;
            assert!(!linger.look(&mut reactor).unwrap());
            // One that is passed over only counts down.
            let mut passed_over = before;
            passed_over.attempts() || linger.clients != passed_over
        });
        let looked = looked.count();
        assert!((7..=7 + 1000 / 65).contains(&looked), "{looked} of 1000");
    }

    #[test]
    fn without_a_span_nothing_is_learned() {
        let mut reactor = Reactor::new(8).unwrap();
        let mut linger = Linger::new(Duration::ZERO);
        assert!(!linger.look(&mut reactor).unwrap());
        assert_eq!(linger.clients, Patience::default());
    }
}
