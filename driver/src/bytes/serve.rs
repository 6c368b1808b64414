//! The thread of a session: greets the client, then serves its rings until the client is gone or the session is ended.
//!
//! It feeds every event at hand to the door and then goes one round (`round`), which says whether to sleep. The thread never
//! waits for the client: it sends without blocking, and only polls what it can write to.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno as OsErrno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, send, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::gate::Seldom;
use super::round::{End, Rounds, SessionIo, Then, progress};
use super::session::Session;
use super::ties::Ties;
use crate::base::abort::AbortOnPanic;
use crate::base::{Error, ErrorKind, Lsn, Result};
use crate::format::byte_ring::{
    HELLO_MAGIC, HelloImage, RingLayout, SOLE_WRITER, WIRE_VERSION, WelcomeImage, put_text,
};
use crate::format::volume_entry::VolumeInfo;
use crate::io::uring::{Event, Reactor};
use crate::io::{Errno, Op, SharedMap};
use crate::volume::{Door, DoorIo, Engine, VolumeDoor, Wake};

/// How long a client may take to greet.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
const GREETING_LOOK: Duration = Duration::from_millis(5);
/// What a client gets that leaves the sizes to the server.
const DEPTH: u32 = 128;
const ARENA_BYTES: u32 = 8 << 20;

/// What a session is made of.
pub(super) struct Setup {
    pub engine: Arc<Engine>,
    pub ties: Arc<Ties>,
    pub volume: VolumeInfo,
    pub turned_away: Arc<Seldom>,
    /// Largest arena that a client gets.
    pub arena_bytes_max: u32,
}

struct Io<'a> {
    session: Session,
    reactor: Reactor,
    stream: &'a UnixStream,
}

impl SessionIo for Io<'_> {
    fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    fn ops_in_flight(&self) -> usize {
        self.reactor.ops_in_flight()
    }

    fn ring(&mut self) {
        ring(self.stream);
    }
}

impl DoorIo for Io<'_> {
    fn submit(&mut self, op: Op) {
        self.reactor.push(op);
    }

    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> std::result::Result<(), Errno> {
        self.session.fetch(tag, offset, into);
        Ok(())
    }

    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> std::result::Result<(), Errno> {
        self.session.deliver(tag, offset, from);
        Ok(())
    }

    fn placed(&mut self, tag: u32, lsn: Lsn) {
        self.session.placed(tag, lsn);
    }

    fn complete(&mut self, tag: u32, result: std::result::Result<(), Errno>) {
        self.session.complete(tag, result);
    }
}

/// A refusal is an errno and words.
pub(super) type Refusable<T> = std::result::Result<T, (i32, String)>;

/// The greeting of a client, or why there is none, as an errno and words.
fn greeting(stream: &UnixStream) -> Refusable<HelloImage> {
    let mut bytes = [0; size_of::<HelloImage>()];
    peek_within(stream, &mut bytes).map_err(|e| (libc::EPROTO, format!("no greeting came: {e}")))?;
    let hello = HelloImage::read_from_bytes(&bytes).expect("of its size");
    if hello.magic != HELLO_MAGIC {
        return Err((
            libc::EPROTO,
            "this is the byte door of Tidegate: use libtidegate to talk to it".to_owned(),
        ));
    }
    if hello.version.get() != WIRE_VERSION {
        let theirs = hello.version.get();
        let what = format!(
            "the client speaks version {theirs} of the byte door, this server {WIRE_VERSION}: use the library of the \
             server's release"
        );
        return Err((libc::EPROTONOSUPPORT, what));
    }
    if hello.flags.get() & !SOLE_WRITER != 0 {
        return Err((libc::EOPNOTSUPP, format!("unknown flags {:#x} in the greeting", hello.flags.get())));
    }
    Ok(hello)
}

/// Fills `bytes` from a client that may take [`GREETING_PATIENCE`] for all of it together. They stay in the socket: what
/// came with them goes when the socket does.
fn peek_within(stream: &UnixStream, bytes: &mut [u8]) -> std::io::Result<()> {
    let deadline = Instant::now() + GREETING_PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left.as_millis() as i32).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout).and_then(|_| recv(stream.as_raw_fd(), bytes, peek_flags())) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(count) if count == bytes.len() => return Ok(()),
            // Part of it is there, and would be at once again.
            Ok(_) => std::thread::sleep(GREETING_LOOK),
            Err(OsErrno::EINTR | OsErrno::EAGAIN) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn peek_flags() -> MsgFlags {
    MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT
}

/// The sizes that a client gets.
fn layout_for(hello: &HelloImage, arena_bytes_max: u32) -> Refusable<RingLayout> {
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    let depth = or(hello.depth.get(), DEPTH);
    let arena_bytes = or(hello.arena_bytes.get(), ARENA_BYTES.min(arena_bytes_max));
    RingLayout::new(depth, arena_bytes).filter(|l| l.arena_bytes <= arena_bytes_max).ok_or_else(|| {
        let what = format!(
            "a session cannot have {depth} requests and an arena of {arena_bytes} bytes: use a power of two from 8 to 4096, \
             and a multiple of 4096 up to {arena_bytes_max}"
        );
        (libc::EINVAL, what)
    })
}

/// Tells the client why there is no session, or no longer. Best effort.
pub(super) fn refuse(stream: &UnixStream, errno: i32, why: &str) {
    let image = WelcomeImage::refusal(errno, why);
    let _ = send(stream.as_raw_fd(), image.as_bytes(), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

fn welcome(stream: &UnixStream, setup: &Setup, opened: &Opened<'_>, layout: RingLayout) -> bool {
    let mut image = WelcomeImage::refusal(0, "");
    image.session = u32::from(opened.io.session.number()).into();
    image.depth = layout.depth.into();
    image.arena_bytes = layout.arena_bytes.into();
    image.write_bytes_max = setup.engine.request_bytes_max().into();
    image.memory_bytes = (layout.memory_bytes() as u64).into();
    image.volume_bytes = opened.door.volume_bytes().into();
    image.ack = setup.volume.ack.code();
    image.stage_uuid = *setup.engine.stage_uuid().as_bytes();
    image.volume_uuid = *setup.volume.uuid.as_bytes();
    put_text(&mut image.name, &setup.volume.name);
    let fds = [opened.memory.fd().as_raw_fd(), opened.bell.as_raw_fd()];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(image.as_bytes())],
        &[ControlMessage::ScmRights(&fds)],
        flags,
        None,
    );
    sent == Ok(size_of::<WelcomeImage>())
}

/// Wakes the client. A socket that is full of wake-ups wakes it as well.
fn ring(stream: &UnixStream) {
    let _ = send(stream.as_raw_fd(), &[1], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

/// The thread's body. `claim` makes it the volume's sole writer; `started` is told how to wake the thread. What the client has
/// sent beside its greeting goes with the socket, after the session.
pub(super) fn run(
    setup: &Setup,
    stream: &UnixStream,
    stop: &AtomicBool,
    claim: impl FnOnce() -> Refusable<()>,
    started: impl FnOnce(Arc<dyn Wake>),
) {
    let _abort = AbortOnPanic;
    let greeted = greeting(stream).and_then(|hello| {
        let layout = layout_for(&hello, setup.arena_bytes_max)?;
        if hello.flags.get() & SOLE_WRITER != 0 { claim().map(|()| layout) } else { Ok(layout) }
    });
    let layout = match greeted {
        Ok(layout) => layout,
        Err((errno, why)) => {
            setup.turned_away.say(&setup.volume.name, &why);
            return refuse(stream, errno, &why);
        }
    };
    let memory_bytes = layout.memory_bytes() as u64;
    if !setup.ties.reserve(memory_bytes) {
        return refuse(
            stream,
            libc::ENOMEM,
            "the sessions of this stage have all the shared memory they may have",
        );
    }
    match open(setup, stream, layout) {
        Ok(opened) => {
            started(Arc::new(opened.io.reactor.waker()));
            live(setup, stream, stop, opened, layout);
        }
        Err(e) => {
            tracing::warn!("volume '{}': no session for a byte client: {}", setup.volume.name, e.report());
            refuse(stream, libc::ENOMEM, &e.report());
        }
    }
    setup.ties.release(memory_bytes);
}

fn live(setup: &Setup, stream: &UnixStream, stop: &AtomicBool, mut opened: Opened<'_>, layout: RingLayout) {
    if !welcome(stream, setup, &opened, layout) {
        opened.io.session.client_is_gone();
    }
    match serve(&mut opened.io, &mut opened.door, stop) {
        Err(e) => {
            // The door may hold a log write of everybody: as a queue of a block device, it takes the process with it.
            tracing::error!("a byte session cannot go on: {}; aborting, to be recovered", e.report());
            std::process::abort();
        }
        Ok(End::ClientGone) => {}
        Ok(End::Told) => refuse(stream, libc::ESHUTDOWN, "the volume was detached, or its server is ending"),
        Ok(End::Broken(what)) => {
            opened.io.session.client_is_gone();
            setup.turned_away.say(&setup.volume.name, what);
            refuse(stream, libc::EPROTO, &format!("the session was ended: {what}"));
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    // Its operations are over (see `serve`); the ring goes last.
    drop(opened.door);
}

/// A session that is set up.
struct Opened<'a> {
    io: Io<'a>,
    door: VolumeDoor,
    memory: Arc<SharedMap>,
    bell: EventFd,
}

fn open<'a>(setup: &Setup, stream: &'a UnixStream, layout: RingLayout) -> Result<Opened<'a>> {
    let io = |e: std::io::Error| Error::io("cannot set up a session", e);
    let memory = Arc::new(SharedMap::create(layout.memory_bytes())?);
    let mut reactor = Reactor::new(layout.depth * 2)?;
    let wake: Arc<dyn Wake> = Arc::new(reactor.waker());
    let door = setup.engine.door(setup.volume.id, wake.clone(), &mut reactor)?;
    let line: OwnedFd = stream.try_clone().map_err(io)?.into();
    let bell =
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(|e| io(e.into()))?;
    reactor.listen_to(bell.as_fd().try_clone_to_owned().map_err(io)?, line);
    let number = setup
        .ties
        .begin(wake)
        .ok_or_else(|| Error::new(ErrorKind::NoSpace, "all session numbers are used"))?;
    let session = Session::new(
        number,
        memory.clone(),
        layout,
        setup.engine.request_bytes_max(),
        setup.ties.clone(),
        progress(&door),
    );
    Ok(Opened { io: Io { session, reactor, stream }, door, memory, bell })
}

/// Takes events; whether the client is known to be gone.
fn take_events(io: &mut Io<'_>, door: &mut VolumeDoor) -> bool {
    let (mut woken, mut gone) = (false, false);
    while let Some(event) = io.reactor.next_event() {
        match event {
            Event::Op(done) => door.op_done(done, io),
            Event::Wake => woken = true,
            Event::Bell { closed } => gone |= closed,
            Event::Raw { .. } => {}
        }
    }
    if woken {
        door.woken(io);
    }
    gone
}

fn serve(io: &mut Io<'_>, door: &mut VolumeDoor, stop: &AtomicBool) -> Result<End> {
    let mut rounds = Rounds::default();
    loop {
        if take_events(io, door) {
            rounds.client_is_gone(&mut io.session);
        }
        if stop.load(Ordering::Acquire) {
            rounds.told_to_end();
        }
        match rounds.round(door, io) {
            Then::Again | Then::Look => io.reactor.submit_and_wait(Some(Duration::ZERO))?,
            Then::Sleep => {
                io.reactor.submit_and_wait(None)?;
                io.session.awake();
            }
            Then::Over(end) => return Ok(end),
        }
    }
}
