//! What a forked child gets of its parent's sessions: nothing. The server learns of a client's death by the end of its socket,
//! so a child must not keep that open; nor may it write to the memory that its parent shares with the server.
//!
//! In the child, before `fork` returns there, every socket is replaced by one whose other end is closed, and every mapping by
//! private memory in its place. So whatever the child does with its copy of a device, descriptors and addresses stay its own.
//! A child that is made without fork handlers (`_Fork`, a raw `clone`) keeps both until it executes a program or ends.
//!
//! Ownership: sockets and mappings are made and entered under one lock, which is held across every fork; they are taken off
//! the list before they are closed.

#![expect(unsafe_code, reason = "registers handlers of forks, and replaces what the child has")]

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::super::{Failure, Result};
use crate::io::SharedMap;

struct Held {
    number: u64,
    socket: RawFd,
    /// Address and size.
    memory: Option<(usize, usize)>,
}

struct List {
    made: u64,
    held: Vec<Held>,
}

static LIST: Mutex<List> = Mutex::new(List { made: 0, held: Vec::new() });
/// A socket whose other end is closed; `None` if forks are not watched.
static CLOSED: OnceLock<Option<OwnedFd>> = OnceLock::new();

thread_local! {
    /// The list, while this thread forks.
    static FORKING: RefCell<Option<MutexGuard<'static, List>>> = const { RefCell::new(None) };
}

fn list() -> MutexGuard<'static, List> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn before() {
    // Not in a thread that has ended but for its exit handlers: its children keep what they have.
    let _ = FORKING.try_with(|forking| forking.replace(Some(list())));
}

extern "C" fn after() {
    let _ = FORKING.try_with(RefCell::take);
}

extern "C" fn in_child() {
    let Ok(Some(mut list)) = FORKING.try_with(RefCell::take) else { return };
    let Some(Some(closed)) = CLOSED.get() else { return };
    for Held { socket, memory, .. } in list.held.drain(..) {
        // SAFETY: the socket's number is the library's own until it is taken off the list.
        unsafe { libc::dup3(closed.as_raw_fd(), socket, libc::O_CLOEXEC) };
        if let Some((base, len)) = memory {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let at = std::ptr::without_provenance_mut(base);
            // SAFETY: the range is a mapping of the library's own until it is taken off the list, accessed through raw
            // pointers only.
            unsafe { libc::mmap(at, len, protection, flags, -1, 0) };
        }
    }
}

/// Watches forks from the first time on.
fn watch() -> bool {
    let closed = CLOSED.get_or_init(|| {
        let (closed, _) = UnixStream::pair().ok()?;
        // SAFETY: the functions live as long as the program: the library is not unloaded.
        let result = unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
        (result == 0).then(|| closed.into())
    });
    closed.is_some()
}

/// A session's place on the list.
#[derive(Debug)]
pub(super) struct Entered(u64);

impl Entered {
    /// A socket that no child will have.
    pub fn socket() -> Result<(OwnedFd, Entered)> {
        if !watch() {
            return Err(Failure::new(libc::ENOMEM, "cannot open a session: forks cannot be watched"));
        }
        let mut list = list();
        let made = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        let fd = made.map_err(|e| Failure::new(e as i32, format!("cannot make a socket: {e}")))?;
        list.made += 1;
        let number = list.made;
        list.held.push(Held { number, socket: fd.as_raw_fd(), memory: None });
        Ok((fd, Entered(number)))
    }

    /// The session's memory, which no child will have either.
    pub fn map<E>(
        &self,
        map: impl FnOnce() -> std::result::Result<SharedMap, E>,
    ) -> std::result::Result<SharedMap, E> {
        let mut list = list();
        let memory = map()?;
        let place = Some((memory.base().addr(), memory.len_bytes()));
        list.held.iter_mut().filter(|held| held.number == self.0).for_each(|held| held.memory = place);
        Ok(memory)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        list().held.retain(|held| held.number != self.0);
    }
}
