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
//! Of the sessions of a volume that ask to be the sole writer one is let in at a time, and the next when that one is over: not
//! when its client has closed it, but when all that it had submitted is carried out. So writers that ask never meet.
//!
//! Ownership: one thread accepts; sessions are entered and removed under `sessions`. [`Gate::close`] ends them all and
//! waits until none is left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen};
use nix::sys::stat::{Mode, fchmod};
use parking_lot::{Condvar, Mutex};

use super::serve::{self, Refusable, Setup};
use super::ties::Ties;
use crate::base::{Error, ErrorKind, Result, VolumeId};
use crate::format::byte_ring::ARENA_BYTES_MAX;
use crate::io::peer::{Peer, peer_of};
use crate::volume::{Engine, Wake};

/// Most sessions of a volume.
const SESSIONS_MAX: usize = 64;
/// How often it is looked whether there is room again.
const FULL_LOOK_MS: u16 = 100;
/// Clients that wait to be told that they may not come in.
const REFUSALS_MAX: usize = 256;
/// After an error for want of memory or descriptors.
const PAUSE: Duration = Duration::from_millis(10);

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

/// Says something at most every so often: clients must not fill the log.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<Option<(Instant, u64)>>);

const SELDOM: Duration = Duration::from_secs(10);

impl Seldom {
    /// A client of volume `name` was turned away, because of `why`.
    pub fn say(&self, name: &str, why: &str) {
        let mut last = self.0.lock();
        match &mut *last {
            Some((when, kept_back)) if when.elapsed() < SELDOM => *kept_back += 1,
            other => {
                let before = other.map_or(0, |(_, kept_back)| kept_back);
                tracing::warn!("volume '{name}': a byte client was turned away ({before} before it): {why}");
                *other = Some((Instant::now(), 0));
            }
        }
    }
}

struct Entry {
    info: SessionInfo,
    wake: Option<Arc<dyn Wake>>,
    stream: UnixStream,
    is_sole_writer: bool,
}

struct Inside {
    engine: Arc<Engine>,
    ties: Arc<Ties>,
    volume: VolumeId,
    access: Mutex<Access>,
    turned_away: Arc<Seldom>,
    stop: AtomicBool,
    sessions: Mutex<BTreeMap<u64, Entry>>,
    /// A session was removed.
    ended: Condvar,
}

/// An open gate.
pub struct Gate {
    inside: Arc<Inside>,
    path: PathBuf,
    /// Device and inode of the socket, so that nothing else is removed in its place.
    identity: Option<(u64, u64)>,
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
        set_mode(path, &access)?;
        let (bell, ended) = UnixStream::pair().map_err(|e| Error::io(context("set up"), e))?;
        let inside = Arc::new(Inside {
            engine,
            ties,
            volume,
            access: Mutex::new(access),
            turned_away: Arc::default(),
            stop: AtomicBool::new(false),
            sessions: Mutex::default(),
            ended: Condvar::new(),
        });
        let failed = |e| Error::io(context("start a thread for"), e);
        let (refused, to_refuse) = sync_channel(REFUSALS_MAX);
        // Not waited for: whoever may not come in decides how long closing its socket takes.
        std::thread::Builder::new()
            .name("byte-refusal".into())
            .spawn(move || refuse_all(&to_refuse))
            .map_err(failed)?;
        let thread = {
            let inside = inside.clone();
            std::thread::Builder::new()
                .name("byte-gate".into())
                .spawn(move || inside.accept(&listener, &ended, &refused))
                .map_err(failed)?
        };
        let identity = identity_of(path);
        Ok(Gate { inside, path: path.to_owned(), identity, bell, thread: Mutex::new(Some(thread)) })
    }

    /// Path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who may come in.
    #[must_use]
    pub fn access(&self) -> Access {
        self.inside.access.lock().clone()
    }

    /// Changes who may come in from now on.
    pub fn set_access(&self, access: Access) -> Result<()> {
        set_mode(&self.path, &access)?;
        *self.inside.access.lock() = access;
        Ok(())
    }

    /// Who is in: not those who have yet to greet, or are gone.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let sessions = self.inside.sessions.lock();
        let is_in = |entry: &&Entry| entry.wake.is_some() && !is_gone(&entry.stream);
        sessions.values().filter(is_in).map(|entry| entry.info.clone()).collect()
    }

    /// Has the sessions look again at what they tell their clients: the size of the volume has changed.
    pub fn nudge(&self) {
        self.inside
            .sessions
            .lock()
            .values()
            .filter_map(|entry| entry.wake.as_ref())
            .for_each(|wake| wake.wake());
    }

    /// Lets nobody in any more and ends all sessions: what they have begun is carried out first. Blocks until the last is
    /// over, whoever else has called it before.
    pub fn close(&self) {
        self.inside.stop.store(true, Ordering::Release);
        let _ = (&self.bell).write_all(&[1]);
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
            if self.identity.is_some() && identity_of(&self.path) == self.identity {
                let _ = fs::remove_file(&self.path);
            }
        }
        let mut sessions = self.inside.sessions.lock();
        while !sessions.is_empty() {
            for entry in sessions.values() {
                match &entry.wake {
                    Some(wake) => wake.wake(),
                    // It waits for the greeting.
                    None => drop(entry.stream.shutdown(std::net::Shutdown::Both)),
                }
            }
            self.inside.ended.wait(&mut sessions);
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.close();
    }
}

/// Without a list the socket is closed to others; with one the list decides.
fn set_mode(path: &Path, access: &Access) -> Result<()> {
    let mode = if access.is_private() { 0o600 } else { 0o666 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|e| Error::io(format!("cannot set the mode of the socket {}", path.display()), e))
}

fn identity_of(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// A socket at `path`. One that is there and answers belongs to somebody, and so does what is no socket.
fn listen_at(path: &Path) -> Result<UnixListener> {
    let context = |what: &str| format!("cannot {what} the socket {}", path.display());
    if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
        // For others to come in, whatever this process's umask is.
        let made = fs::create_dir_all(dir)
            .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o755)));
        made.map_err(|e| Error::io(context("make the folder of"), e))?;
    }
    let is_socket = fs::symlink_metadata(path).map(|m| m.file_type().is_socket());
    match is_socket {
        Ok(false) => {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("{} is no socket: move it away", path.display()),
            ));
        }
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(context("look at"), e)),
        Err(_) => {}
        Ok(true) => match UnixStream::connect(path) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(|e| Error::io(context("remove what is left of"), e))?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(context("look at"), e)),
            Ok(_) => {
                let what = format!(
                    "{} is in use by another server: a volume of the same name may be attached from another state directory",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Busy, what));
            }
        },
    }
    bind_closed(path).map_err(|e| Error::io(context("listen at"), e.into()))
}

/// A socket that only its owner can use from the first moment on: Linux takes its mode from that of the descriptor.
fn bind_closed(path: &Path) -> nix::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

impl Inside {
    fn accept(
        self: &Arc<Inside>,
        listener: &UnixListener,
        ended: &UnixStream,
        refused: &SyncSender<Refused>,
    ) {
        let mut next = 0;
        loop {
            // With all sessions taken, further clients wait outside.
            let is_full = self.sessions.lock().len() >= SESSIONS_MAX;
            let mut fds = vec![PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
            if !is_full {
                fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
            }
            let timeout = if is_full { PollTimeout::from(FULL_LOOK_MS) } else { PollTimeout::NONE };
            if poll(&mut fds, timeout).is_err() {
                std::thread::sleep(PAUSE);
            }
            if self.stop.load(Ordering::Acquire) {
                let _ = (&mut &*ended).read(&mut [0]);
                return;
            }
            if is_full {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    next += 1;
                    self.let_in(next, stream, refused);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => {
                    self.turned_away.say(&self.volume.to_string(), &e.to_string());
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Gives a client that may come in a thread, where everything else is done: this one must not wait for any client, nor
    /// for what one leaves behind.
    fn let_in(self: &Arc<Inside>, number: u64, stream: UnixStream, refused: &SyncSender<Refused>) {
        let peer = peer_of(&stream).unwrap_or(Peer { pid: 0, uid: u32::MAX, gids: Vec::new() });
        if !self.access.lock().admits(&peer, nix::unistd::geteuid().as_raw()) {
            let why = format!(
                "user {} may not use this volume: attach it with --allow user:{}",
                peer.uid, peer.uid
            );
            self.turned_away.say(&self.volume.to_string(), &why);
            // With too many of them under way this one hears nothing.
            let _ = refused.try_send((stream, why));
            return;
        }
        let Ok(shared) = stream.try_clone() else {
            self.turned_away.say(&self.volume.to_string(), "no descriptor to spare");
            return;
        };
        let mut sessions = self.sessions.lock();
        let info = SessionInfo { pid: peer.pid, uid: peer.uid };
        let gone: BTreeSet<u64> =
            sessions.iter().filter(|(_, entry)| is_gone(&entry.stream)).map(|(number, _)| *number).collect();
        let inside = self.clone();
        let spawned = std::thread::Builder::new().name("byte-session".into()).spawn(move || {
            inside.wait_for_the_end_of(&gone);
            inside.host(number, &stream);
            let entry = inside.sessions.lock().remove(&number);
            inside.ended.notify_all();
            // Last, and not under the lock: what a client has left in its socket may take long to close.
            drop((entry, stream));
        });
        match spawned {
            Ok(_) => drop(
                sessions.insert(number, Entry { info, wake: None, stream: shared, is_sole_writer: false }),
            ),
            Err(e) => self.turned_away.say(&self.volume.to_string(), &format!("no thread: {e}")),
        }
    }

    fn host(self: &Arc<Inside>, number: u64, stream: &UnixStream) {
        let Some(volume) = self.engine.volumes().into_iter().find(|v| v.id == self.volume) else {
            return serve::refuse(stream, libc::ENOENT, "the volume is gone");
        };
        let setup = Setup {
            engine: self.engine.clone(),
            ties: self.ties.clone(),
            volume,
            turned_away: self.turned_away.clone(),
            arena_bytes_max: ARENA_BYTES_MAX / 8,
        };
        serve::run(&setup, stream, &self.stop, || self.claim(number), |wake| self.enter(number, wake));
    }

    /// Each of them waits only for older ones, so this comes to an end when their requests do.
    fn wait_for_the_end_of(&self, gone: &BTreeSet<u64>) {
        let mut sessions = self.sessions.lock();
        while gone.iter().any(|number| sessions.contains_key(number)) {
            self.ended.wait(&mut sessions);
        }
    }

    /// Makes a session the sole writer until it is over. One whose client is gone is over soon: it waits for no other.
    fn claim(&self, number: u64) -> Refusable<()> {
        let mut sessions = self.sessions.lock();
        while let Some(holder) = sessions.values().find(|entry| entry.is_sole_writer) {
            if !is_gone(&holder.stream) {
                let what = format!(
                    "process {} is the sole writer of this volume: end it, or have it close its session, then try again",
                    holder.info.pid
                );
                return Err((libc::EBUSY, what));
            }
            self.ended.wait(&mut sessions);
        }
        if let Some(entry) = sessions.get_mut(&number) {
            entry.is_sole_writer = true;
        }
        Ok(())
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

/// A client that may not come in, and why.
type Refused = (UnixStream, String);

fn refuse_all(refused: &Receiver<Refused>) {
    for (stream, why) in refused {
        serve::refuse(&stream, libc::EACCES, &why);
    }
}

/// Whether the other end of a socket is closed: by its program, or by the kernel when that died, which is before anybody is
/// told of its death.
fn is_gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
