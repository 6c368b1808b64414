//! The gate of a volume: a unix socket at which clients of the byte door arrive. Each that may come in gets a session with
//! a thread of its own.
//!
//! Who may come in: root, the user that the server runs as, and whoever is on the volume's list. The kernel says who a
//! client is. Without a list the socket itself is closed to others.
//!
//! A session begins when the sessions of clients that were gone by then are over. What such a client had submitted is still
//! carried out; whoever comes after it (the same program, started again) looks at the volume and must not find it changed
//! behind its back.
//!
//! Ownership: one thread accepts; sessions are entered and removed under `sessions`. [`Gate::close`] ends them all and
//! waits for their threads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::{Condvar, Mutex};

use super::serve::{self, Setup};
use super::ties::Ties;
use crate::base::{Error, ErrorKind, Result, VolumeId};
use crate::format::byte_ring::ARENA_BYTES_MAX;
use crate::io::peer::{Peer, peer_of};
use crate::volume::{Engine, Wake};

/// Most sessions of a volume.
const SESSIONS_MAX: usize = 64;

/// Who may come in besides root and the server's own user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// User ids.
    pub users: Vec<u32>,
    /// Group ids.
    pub groups: Vec<u32>,
}

impl Access {
    /// Whether the list is empty.
    #[must_use]
    pub fn is_private(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }

    /// Whether `peer` may come in at a server of user `own`.
    #[must_use]
    pub fn admits(&self, peer: &Peer, own: u32) -> bool {
        peer.uid == 0
            || peer.uid == own
            || self.users.contains(&peer.uid)
            || peer.gids.iter().any(|gid| self.groups.contains(gid))
    }
}

/// Who is in a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    /// Process.
    pub pid: u32,
    /// User.
    pub uid: u32,
}

struct Entry {
    info: SessionInfo,
    wake: Option<Arc<dyn Wake>>,
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

struct Inside {
    engine: Arc<Engine>,
    ties: Arc<Ties>,
    volume: VolumeId,
    access: Access,
    stop: AtomicBool,
    sessions: Mutex<BTreeMap<u64, Entry>>,
    /// A session was removed.
    ended: Condvar,
}

/// An open gate.
pub struct Gate {
    inside: Arc<Inside>,
    path: PathBuf,
    bell: UnixStream,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Gate {
    /// Opens a gate to `volume` at `path`, in place of a socket that nobody listens at any more.
    pub fn open(
        engine: Arc<Engine>,
        ties: Arc<Ties>,
        volume: VolumeId,
        path: &Path,
        access: Access,
    ) -> Result<Gate> {
        let context = |what: &str| format!("cannot {what} the socket {}", path.display());
        let listener = listen_at(path)?;
        let mode = if access.is_private() { 0o600 } else { 0o666 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(|e| Error::io(context("set the mode of"), e))?;
        let (bell, ended) = UnixStream::pair().map_err(|e| Error::io(context("set up"), e))?;
        let inside = Arc::new(Inside {
            engine,
            ties,
            volume,
            access,
            stop: AtomicBool::new(false),
            sessions: Mutex::default(),
            ended: Condvar::new(),
        });
        let thread = {
            let inside = inside.clone();
            std::thread::Builder::new()
                .name("byte-gate".into())
                .spawn(move || inside.accept(&listener, &ended))
                .map_err(|e| Error::io(context("start a thread for"), e))?
        };
        Ok(Gate { inside, path: path.to_owned(), bell, thread: Mutex::new(Some(thread)) })
    }

    /// Path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who is in.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionInfo> {
        self.inside.sessions.lock().values().map(|entry| entry.info.clone()).collect()
    }

    /// Lets nobody in any more and ends all sessions: what they have begun is carried out first. Blocks.
    pub fn close(&self) {
        self.inside.stop.store(true, Ordering::Release);
        let _ = (&self.bell).write_all(&[1]);
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
            let _ = fs::remove_file(&self.path);
        }
        let mut threads = Vec::new();
        for entry in self.inside.sessions.lock().values_mut() {
            match &entry.wake {
                Some(wake) => wake.wake(),
                // It waits for the greeting.
                None => drop(entry.stream.shutdown(std::net::Shutdown::Both)),
            }
            threads.extend(entry.thread.take());
        }
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.close();
    }
}

/// A socket at `path`. One that is there and answers belongs to somebody.
fn listen_at(path: &Path) -> Result<UnixListener> {
    let context = |what: &str| format!("cannot {what} the socket {}", path.display());
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(|e| Error::io(context("make the folder of"), e))?;
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            let what = format!(
                "{} is in use by another server: a volume of the same name may be attached from another state directory",
                path.display()
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|e| Error::io(context("remove what is left of"), e))?;
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(context("look at"), e)),
    }
    // Closed to others until its mode is set.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    listener.map_err(|e| Error::io(context("listen at"), e))
}

impl Inside {
    fn accept(self: &Arc<Inside>, listener: &UnixListener, ended: &UnixStream) {
        let mut next = 0;
        loop {
            let mut fds = [
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            ];
            if poll(&mut fds, PollTimeout::NONE).is_err() {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            if self.stop.load(Ordering::Acquire) {
                let _ = (&mut &*ended).read(&mut [0]);
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    next += 1;
                    self.admit(next, stream);
                }
                Err(e) => {
                    tracing::warn!("a byte client cannot be let in: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    }

    /// Lets a client in, or tells it why not.
    fn admit(self: &Arc<Inside>, number: u64, stream: UnixStream) {
        let refuse = |errno: i32, why: &str| serve::refuse(&stream, errno, why);
        let peer = match peer_of(&stream) {
            Ok(peer) => peer,
            Err(e) => return refuse(libc::EACCES, &format!("the kernel does not say who you are: {e}")),
        };
        if !self.access.admits(&peer, nix::unistd::geteuid().as_raw()) {
            tracing::warn!("user {} (process {}) is not on the list of a byte door", peer.uid, peer.pid);
            return refuse(
                libc::EACCES,
                &format!("user {} may not use this volume: attach it with --allow", peer.uid),
            );
        }
        let Some(volume) = self.engine.volumes().into_iter().find(|v| v.id == self.volume) else {
            return refuse(libc::ENOENT, "the volume is gone");
        };
        let setup = Setup {
            engine: self.engine.clone(),
            ties: self.ties.clone(),
            volume,
            stage_uuid: self.engine.stage_uuid(),
            arena_bytes_max: ARENA_BYTES_MAX / SESSIONS_MAX as u32 * 8,
        };
        let shared = match stream.try_clone() {
            Ok(shared) => shared,
            Err(e) => return refuse(libc::EMFILE, &format!("the server has no descriptor to spare: {e}")),
        };
        let mut sessions = self.sessions.lock();
        if sessions.len() >= SESSIONS_MAX {
            return refuse(libc::EAGAIN, &format!("the volume has {SESSIONS_MAX} sessions: close one first"));
        }
        let info = SessionInfo { pid: peer.pid, uid: peer.uid };
        let gone: BTreeSet<u64> =
            sessions.iter().filter(|(_, entry)| is_gone(&entry.stream)).map(|(number, _)| *number).collect();
        let inside = self.clone();
        let spawned = std::thread::Builder::new().name("byte-session".into()).spawn(move || {
            let enter = |wake| inside.enter(number, wake);
            inside.wait_for_the_end_of(&gone);
            serve::run(&setup, &stream, &inside.stop, enter);
            inside.sessions.lock().remove(&number);
            inside.ended.notify_all();
        });
        match spawned {
            Ok(thread) => {
                sessions.insert(number, Entry { info, wake: None, stream: shared, thread: Some(thread) });
            }
            Err(e) => serve::refuse(&shared, libc::EAGAIN, &format!("the server cannot start a thread: {e}")),
        }
    }

    /// Each of them waits only for older ones, so this comes to an end when their requests do.
    fn wait_for_the_end_of(&self, gone: &BTreeSet<u64>) {
        let mut sessions = self.sessions.lock();
        while gone.iter().any(|number| sessions.contains_key(number)) {
            self.ended.wait(&mut sessions);
        }
    }

    fn enter(&self, number: u64, wake: Arc<dyn Wake>) {
        if let Some(entry) = self.sessions.lock().get_mut(&number) {
            entry.wake = Some(wake.clone());
        }
        if self.stop.load(Ordering::Acquire) {
            wake.wake();
        }
    }
}

/// Whether the other end of a socket is closed: by its program, or by the kernel when that died, which is before anybody is
/// told of its death.
fn is_gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
