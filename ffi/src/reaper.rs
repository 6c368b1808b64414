//! Sessions with a callback: a thread takes the completions and calls.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::thread::{self, JoinHandle, ThreadId};

use nix::sys::signal::{SigSet, SigmaskHow};
use parking_lot::Mutex;
use tidegate_driver::bytes::{Completion, Failure, Result};

use crate::abi::{tg_callback, tg_completion};
use crate::handle;
use crate::session::{LOOK_EVERY, Session, image};

/// Completions taken in one go.
const BATCH: usize = 32;

/// The thread of a session with a callback.
pub struct Reaper {
    id: ThreadId,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The program's function and what it gets.
struct Callback {
    call: tg_callback,
    context: *mut c_void,
}

// SAFETY: the context is only handed back to the program, which has asked for calls from another thread.
unsafe impl Send for Callback {}

impl Reaper {
    /// Starts the thread of `session`.
    pub fn start(session: &Arc<Session>, call: tg_callback, context: *mut c_void) -> Result<Reaper> {
        let (callback, session) = (Callback { call, context }, Arc::clone(session));
        // Signals are for the threads of the program: this one is started with all of them blocked.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).ok();
        let thread =
            thread::Builder::new().name("tidegate-reap".to_owned()).spawn(move || run(&session, callback));
        if let Some(mask) = mask {
            let _ = mask.thread_set_mask();
        }
        let thread = thread.map_err(|error| {
            let why = format!("cannot start a thread for the callback: {error}");
            Failure::new(error.raw_os_error().unwrap_or(libc::EAGAIN), why)
        })?;
        Ok(Reaper { id: thread.thread().id(), thread: Mutex::new(Some(thread)) })
    }

    /// Waits until the thread has seen that its session is closed, and has ended; unless it is this one.
    pub fn join(&self) {
        let thread = self.thread.lock().take();
        if let Some(thread) = thread.filter(|_| thread::current().id() != self.id) {
            let _ = thread.join();
        }
    }
}

fn run(session: &Session, callback: Callback) {
    let mut some = [Completion::default(); BATCH];
    while !session.is_closed() {
        match session.device().reap(&mut some, Some(LOOK_EVERY)) {
            Ok(count) => {
                for completion in &some[..count] {
                    if session.is_closed() {
                        return;
                    }
                    callback.hand(&image(completion));
                }
            }
            // Meant for calls of the program's.
            Err(failure) if failure.errno.0 == libc::EINTR => {}
            Err(failure) => {
                if !session.is_closed() {
                    let result = -failure.errno.0.max(1);
                    callback.hand(&tg_completion { result, ..tg_completion::default() });
                }
                return;
            }
        }
    }
}

impl Callback {
    fn hand(&self, completion: &tg_completion) {
        if let Some(call) = self.call {
            call(self.context, completion);
        }
    }
}

thread_local! {
    /// While this thread forks.
    static FORKING: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) };
}

extern "C" fn before_fork() {
    let _ = FORKING.try_with(|forking| {
        forking.borrow_mut().get_or_insert_with(handle::changes);
    });
}

extern "C" fn after_fork() {
    let _ = FORKING.try_with(RefCell::take);
}

extern "C" fn in_child() {
    handle::forked();
    after_fork();
}

/// From now on handles are invalid in children that this process forks.
pub fn watch_forks() {
    static IS_WATCHED: AtomicBool = AtomicBool::new(false);
    if IS_WATCHED.load(Ordering::Acquire) {
        return;
    }
    // Threads that come at the same time all register, rather than wait for one that a child would not have: what is done
    // twice for a fork changes nothing the second time.
    // SAFETY: the functions live as long as the program: the library is not unloaded. If they cannot be registered, forks are
    // not noticed.
    if unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(in_child)) } == 0 {
        IS_WATCHED.store(true, Ordering::Release);
    }
}
