//! A fork in the middle of the first call that a process makes: alone here, since a process has one.

mod support;

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use support::child::status_of;
use tidegate_driver::bytes::client::{Device, Options};

const NOBODY: &str = "/nowhere/at/all.sock";
const TRIES: u32 = 500;
const PATIENCE: Duration = Duration::from_secs(5);

fn open() -> i32 {
    Device::open(NOBODY, &Options::default()).unwrap_err().errno.0 - libc::ENOENT
}

/// A thread opens; the process forks so many turns of a loop later; the child opens.
fn fork_while_opening(turns: u32) -> i32 {
    let go = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            go.store(true, Ordering::SeqCst);
            open()
        });
        while !go.load(Ordering::SeqCst) {
            hint::spin_loop();
        }
        (0..turns).for_each(|_| hint::spin_loop());
        i32::from(status_of(PATIENCE, open) != 0)
    })
}

#[test]
fn a_child_opens_whatever_its_parent_was_at() {
    let hung = (0..TRIES).find(|turn| status_of(PATIENCE, || fork_while_opening(turn % 50 * 20)) != 0);
    assert_eq!(hung, None, "a child did not end well");
}
