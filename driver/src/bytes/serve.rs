//! The thread of a session: greets the client, then serves its rings until the client is gone or the session is ended.
//!
//! One round: feed every event at hand to the door; take submissions; end the batch; tell the client; sleep if there is
//! nothing to take. The thread never waits for the client: it sends without blocking, and its ring reads the socket.

use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, send, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::session::{Next, Progress, Session};
use super::ties::Ties;
use crate::base::{Lsn, Result};
use crate::format::byte_ring::{
    HELLO_MAGIC, HelloImage, RingLayout, WELCOME_MAGIC, WIRE_VERSION, WelcomeImage, put_text,
};
use crate::format::volume_entry::VolumeInfo;
use crate::io::uring::{Event, Reactor};
use crate::io::{Errno, Op, SharedMap};
use crate::volume::{Door, DoorIo, Engine, VolumeDoor, Wake};

/// How long a client may take to greet.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// What a client gets that leaves the sizes to the server.
const DEPTH: u32 = 128;
const ARENA_BYTES: u32 = 8 << 20;
/// Submissions fed between two looks at everything else.
const FEED_MAX: u32 = 64;

/// What a session is made of.
pub(super) struct Setup {
    pub engine: Arc<Engine>,
    pub ties: Arc<Ties>,
    pub volume: VolumeInfo,
    pub stage_uuid: uuid::Uuid,
    /// Largest arena that a client gets.
    pub arena_bytes_max: u32,
}

struct Io {
    session: Session,
    reactor: Reactor,
}

impl DoorIo for Io {
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

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client closed its socket, or died.
    ClientGone,
    /// The gate is closed.
    Told,
    /// The client broke the rules.
    Broken(&'static str),
}

/// The greeting of a client, or why there is none, as an errno and words.
fn greeting(stream: &UnixStream) -> std::result::Result<HelloImage, (i32, String)> {
    let mut bytes = [0; size_of::<HelloImage>()];
    let received = stream
        .set_read_timeout(Some(GREETING_PATIENCE))
        .and_then(|()| (&mut &*stream).read_exact(&mut bytes))
        .and_then(|()| stream.set_read_timeout(None));
    received.map_err(|e| (libc::EPROTO, format!("no greeting came: {e}")))?;
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
    if hello.flags.get() != 0 {
        return Err((libc::EOPNOTSUPP, format!("unknown flags {:#x} in the greeting", hello.flags.get())));
    }
    Ok(hello)
}

/// The sizes that a client gets.
fn layout_for(hello: &HelloImage, arena_bytes_max: u32) -> std::result::Result<RingLayout, (i32, String)> {
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

fn welcome(stream: &UnixStream, setup: &Setup, io: &Io, layout: RingLayout, memory: &SharedMap) -> bool {
    let mut image = WelcomeImage::refusal(0, "");
    image.magic = WELCOME_MAGIC;
    image.session = u32::from(io.session.number()).into();
    image.depth = layout.depth.into();
    image.arena_bytes = layout.arena_bytes.into();
    image.write_bytes_max = setup.engine.request_bytes_max().into();
    image.memory_bytes = (layout.memory_bytes() as u64).into();
    image.volume_bytes = setup.volume.size_bytes.into();
    image.ack = setup.volume.ack.code();
    image.stage_uuid = *setup.stage_uuid.as_bytes();
    image.volume_uuid = *setup.volume.uuid.as_bytes();
    put_text(&mut image.name, &setup.volume.name);
    let fds = [memory.fd().as_raw_fd()];
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

/// The thread's body. `started` is told how to wake it.
pub(super) fn run(
    setup: &Setup,
    stream: &UnixStream,
    stop: &AtomicBool,
    started: impl FnOnce(Arc<dyn Wake>),
) {
    let layout = match greeting(stream).and_then(|hello| layout_for(&hello, setup.arena_bytes_max)) {
        Ok(layout) => layout,
        Err((errno, why)) => {
            tracing::info!("volume '{}': a byte client was turned away: {why}", setup.volume.name);
            return refuse(stream, errno, &why);
        }
    };
    let (mut io, mut door, memory) = match open(setup, stream, layout) {
        Ok(opened) => opened,
        Err(e) => {
            tracing::warn!("volume '{}': no session for a byte client: {}", setup.volume.name, e.report());
            return refuse(stream, libc::ENOMEM, &e.report());
        }
    };
    started(Arc::new(io.reactor.waker()));
    if !welcome(stream, setup, &io, layout, &memory) {
        io.session.client_is_gone();
    }
    let end = serve(&mut io, &mut door, stream, stop);
    match end {
        Err(e) => {
            // The door may hold a log write of everybody: as a queue of a block device, it takes the process with it.
            tracing::error!("a byte session cannot go on: {}; aborting, to be recovered", e.report());
            std::process::abort();
        }
        Ok(End::ClientGone) => {}
        Ok(End::Told) => refuse(stream, libc::ESHUTDOWN, "the volume was detached, or its server is ending"),
        Ok(End::Broken(what)) => {
            tracing::warn!("volume '{}': a byte session was ended: {what}", setup.volume.name);
            refuse(stream, libc::EPROTO, &format!("the session was ended: {what}"));
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    // Its operations are over (see `serve`); the ring goes last.
    drop(door);
}

fn open(setup: &Setup, stream: &UnixStream, layout: RingLayout) -> Result<(Io, VolumeDoor, Arc<SharedMap>)> {
    let memory = Arc::new(SharedMap::create(layout.memory_bytes())?);
    let mut reactor = Reactor::new(layout.depth * 2)?;
    let wake: Arc<dyn Wake> = Arc::new(reactor.waker());
    let door = setup.engine.door(setup.volume.id, wake.clone(), &mut reactor)?;
    let socket: OwnedFd =
        stream.try_clone().map_err(|e| crate::base::Error::io("cannot share a socket", e))?.into();
    let number = setup.ties.begin(wake).ok_or_else(|| {
        crate::base::Error::new(crate::base::ErrorKind::NoSpace, "all session numbers are used")
    })?;
    let session = Session::new(
        number,
        memory.clone(),
        layout,
        setup.engine.request_bytes_max(),
        setup.ties.clone(),
        progress(&door),
    );
    reactor.listen_to(socket);
    Ok((Io { session, reactor }, door, memory))
}

fn progress(door: &VolumeDoor) -> Progress {
    let (published, durable) = door.progress();
    Progress { published, durable, volume_bytes: door.volume_bytes() }
}

/// Takes what is in the ring, a bounded number of submissions. What stopped it.
fn feed(io: &mut Io, door: &mut VolumeDoor) -> Next {
    for _ in 0..FEED_MAX {
        match io.session.next() {
            Next::Request(request) => door.request(request, io),
            Next::Again => {}
            stopped => return stopped,
        }
    }
    Next::Again
}

fn serve(io: &mut Io, door: &mut VolumeDoor, stream: &UnixStream, stop: &AtomicBool) -> Result<End> {
    let mut end = None;
    let mut client_gone = false;
    loop {
        let mut woken = false;
        while let Some(event) = io.reactor.next_event() {
            match event {
                Event::Op(done) => door.op_done(done, io),
                Event::Wake => woken = true,
                Event::Bell { closed } => client_gone |= closed,
                Event::Raw { .. } => {}
            }
        }
        if woken {
            door.woken(io);
        }
        if client_gone {
            io.session.client_is_gone();
        }
        if end.is_none() && stop.load(Ordering::Acquire) {
            end = Some(End::Told);
        }
        let next = if end.is_none() { feed(io, door) } else { Next::Nothing };
        door.batch_end(io);
        if io.session.tell(progress(door)) {
            ring(stream);
        }
        let settled = match next {
            Next::Broken(what) => {
                end = Some(End::Broken(what));
                true
            }
            Next::Again | Next::Request(_) => false,
            // What it waited for may have come about since it was looked at.
            Next::Held => io.session.next_is_held(),
            Next::Nothing => true,
        };
        if client_gone && end.is_none() && settled && (next == Next::Nothing || io.session.in_flight() == 0) {
            end = Some(End::ClientGone);
        }
        if let Some(end) = end {
            if io.session.in_flight() == 0 {
                // A door works for others too: it may have begun to write the log for all of them.
                if io.reactor.ops_in_flight() == 0 {
                    return Ok(end);
                }
                Door::<Io>::retire(door);
            }
        } else if !settled || !io.session.may_sleep(next == Next::Held) {
            io.reactor.submit_and_wait(Some(Duration::ZERO))?;
            continue;
        }
        io.reactor.submit_and_wait(None)?;
        io.session.awake();
    }
}
