//! What a forked child gets of its parent's sessions: nothing that it can use. The server learns of a client's death by the end
//! of its socket, so a child must not keep that open; nor may it write to the memory that its parent shares with the server, or
//! wake its parent's threads. And what these were doing at the fork, with whatever locks, nobody in the child will end.
//!
//! In the child, before `fork` returns there, sockets and the descriptors that programs poll are replaced by a socket whose
//! other end is closed, and mappings by private memory in their place; and every call for a session that was opened before is
//! refused. So whatever the child does with its copy of a device, descriptors and addresses stay its own. Other descriptors of
//! a session are open in the child as well, and not used there. A child that is made without fork handlers (`_Fork`, a raw
//! `clone`) keeps everything until it executes a program or ends.
//!
//! Ownership: what is replaced is made and entered, and taken off the list and closed, under one lock, which is held across
//! every fork. So no child has any of it that is not on the list, and nothing on the list is another's.

#![expect(unsafe_code, reason = "registers handlers of forks, and replaces what the child has")]

use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::epoll::Epoll;

use super::super::{Failure, Result};
use crate::io::SharedMap;

/// What is replaced in a child.
pub(super) enum Held {
    Descriptor(RawFd),
    /// Address and size.
    Memory(usize, usize),
}

/// See [`Held`].
pub(super) trait Replaceable {
    /// What a child has to have replaced. It stays the same.
    fn held(&self) -> Held;
}

impl Replaceable for UnixStream {
    fn held(&self) -> Held {
        Held::Descriptor(self.as_raw_fd())
    }
}

impl Replaceable for Epoll {
    fn held(&self) -> Held {
        Held::Descriptor(self.0.as_raw_fd())
    }
}

impl Replaceable for SharedMap {
    fn held(&self) -> Held {
        Held::Memory(self.base().addr(), self.len_bytes())
    }
}

struct List {
    made: u64,
    held: Vec<(u64, Held)>,
    /// A socket whose other end is closed.
    closed: Option<OwnedFd>,
}

static LIST: Mutex<List> = Mutex::new(List { made: 0, held: Vec::new(), closed: None });
static IS_WATCHED: AtomicBool = AtomicBool::new(false);
/// Forks between the first process and this one, or more.
static FORKS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The list, while this thread forks.
    static FORKING: RefCell<Option<MutexGuard<'static, List>>> = const { RefCell::new(None) };
}

fn list() -> MutexGuard<'static, List> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

// The handlers may be registered more than once: see `watch`.

extern "C" fn before() {
    // Not in a thread that has ended but for its exit handlers: its children keep what they have.
    let _ = FORKING.try_with(|forking| {
        forking.borrow_mut().get_or_insert_with(list);
    });
}

extern "C" fn after() {
    let _ = FORKING.try_with(RefCell::take);
}

extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    let Ok(Some(mut list)) = FORKING.try_with(RefCell::take) else { return };
    let List { held, closed: Some(closed), .. } = &mut *list else { return };
    for (_, held) in held.drain(..) {
        match held {
            Held::Descriptor(fd) => {
                // SAFETY: the number is the library's own as long as it is on the list.
                unsafe { libc::dup3(closed.as_raw_fd(), fd, libc::O_CLOEXEC) };
            }
            Held::Memory(base, len) => {
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
                let at = std::ptr::without_provenance_mut(base);
                // SAFETY: the range is a mapping of the library's own as long as it is on the list, accessed through raw
                // pointers only.
                unsafe { libc::mmap(at, len, protection, flags, -1, 0) };
            }
        }
    }
}

/// Watches forks from the first time on.
fn watch() -> Result<()> {
    if IS_WATCHED.load(Ordering::Acquire) {
        return Ok(());
    }
    // Threads that come at the same time all register, rather than wait for one that a child would not have.
    // SAFETY: the functions live as long as the program: the library is not unloaded.
    let errno = unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
    if errno != 0 {
        return Err(Failure::new(errno, "cannot open a session: forks cannot be watched"));
    }
    IS_WATCHED.store(true, Ordering::Release);
    Ok(())
}

/// The process that this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process(u64);

impl Process {
    pub fn this() -> Process {
        Process(FORKS.load(Ordering::Relaxed))
    }

    /// Refuses what belongs to this process and is asked of a child.
    pub fn check(self) -> Result<()> {
        if self == Process::this() { Ok(()) } else { Err(self.foreign()) }
    }

    #[cold]
    fn foreign(self) -> Failure {
        Failure::new(libc::ENOTCONN, "the session belongs to the parent process: a child opens its own")
    }
}

/// Something that no child has. From before it is made until after it is closed there is no fork that misses it.
#[derive(Debug)]
pub(super) struct Private<T> {
    number: u64,
    it: ManuallyDrop<T>,
}

impl<T: Replaceable> Private<T> {
    pub fn new(make: impl FnOnce() -> Result<T>) -> Result<Private<T>> {
        watch()?;
        let mut list = list();
        if list.closed.is_none() {
            let failed = |e: std::io::Error| {
                Failure::new(e.raw_os_error().unwrap_or(libc::EIO), format!("cannot make sockets: {e}"))
            };
            let (closed, _) = UnixStream::pair().map_err(failed)?;
            list.closed = Some(closed.into());
        }
        let it = make()?;
        list.made += 1;
        let number = list.made;
        list.held.push((number, it.held()));
        Ok(Private { number, it: ManuallyDrop::new(it) })
    }
}

impl<T> Deref for Private<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.it
    }
}

impl<T> Drop for Private<T> {
    fn drop(&mut self) {
        let mut list = list();
        list.held.retain(|(number, _)| *number != self.number);
        // SAFETY: nobody uses it after this.
        unsafe { ManuallyDrop::drop(&mut self.it) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_wait_while_something_is_made_or_closed() {
        #[derive(Debug)]
        struct Thing;

        fn forks_wait() -> bool {
            LIST.try_lock().is_err()
        }

        impl Replaceable for Thing {
            fn held(&self) -> Held {
                assert!(forks_wait());
                Held::Descriptor(-1)
            }
        }

        impl Drop for Thing {
            fn drop(&mut self) {
                assert!(forks_wait());
            }
        }

        let make = || {
            assert!(forks_wait());
            Ok(Thing)
        };
        drop(Private::new(make).unwrap());
        let failed = Private::<Thing>::new(|| Err(Failure::new(libc::EMFILE, "for example")));
        assert_eq!(failed.unwrap_err().errno.0, libc::EMFILE);
    }
}
