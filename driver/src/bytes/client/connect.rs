//! How a client gets its session.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg, socket,
};
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::super::{Failure, Info, Result};
use super::Options;
use super::fork::Private;
use crate::format::byte_ring::{
    HelloImage, RingLayout, SOLE_WRITER, WELCOME_MAGIC, WIRE_VERSION, WelcomeImage, text_of,
};
use crate::format::volume_entry::AckLevel;
use crate::io::SharedMap;

/// How long the server may take to welcome a client.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the sockets are, unless `TIDEGATE_RUN_DIR` says otherwise.
pub const RUN_DIR: &str = "/run/tidegate";

/// A session, as the server gave it.
pub(super) struct Connected {
    pub socket: Private<UnixStream>,
    pub bell: File,
    pub memory: Private<SharedMap>,
    pub layout: RingLayout,
    pub session: u16,
    pub info: Info,
}

/// The socket of `target`: a path, or the name of a volume.
#[must_use]
pub fn socket_path(target: &str) -> PathBuf {
    if target.contains('/') {
        return target.into();
    }
    let dir = std::env::var_os("TIDEGATE_RUN_DIR").filter(|dir| !dir.is_empty());
    PathBuf::from(dir.unwrap_or(RUN_DIR.into())).join(format!("{target}.sock"))
}

fn failed(what: &str, target: &str, e: &std::io::Error) -> Failure {
    let errno = match e.kind() {
        // It died before it could answer.
        std::io::ErrorKind::UnexpectedEof => libc::ECONNRESET,
        std::io::ErrorKind::WouldBlock => libc::ETIMEDOUT,
        _ => e.raw_os_error().unwrap_or(libc::EPROTO),
    };
    Failure::new(errno, format!("{what} '{target}': {e}"))
}

pub(super) fn connect(target: &str, options: &Options) -> Result<Connected> {
    if target.is_empty() || target.contains('\0') {
        return Err(Failure::new(libc::EINVAL, "name a volume, or the path of its socket"));
    }
    let path = socket_path(target);
    let socket = Private::new(|| {
        let made = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        made.map(UnixStream::from).map_err(|e| Failure::new(e as i32, format!("cannot make a socket: {e}")))
    })?;
    reach(&socket, &path).map_err(|e| match e.raw_os_error() {
        Some(errno @ (libc::ENOENT | libc::ECONNREFUSED)) => {
            let what = format!(
                "nobody serves {}: attach the volume with `tidegate attach NAME --bytes`",
                path.display()
            );
            Failure::new(errno, what)
        }
        _ => failed("cannot reach", &path.to_string_lossy(), &e),
    })?;
    let mut hello = HelloImage::new(options.depth, options.arena_bytes);
    hello.flags = if options.sole_writer { SOLE_WRITER } else { 0 }.into();
    let greet = |mut socket: &UnixStream| {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.write_all(hello.as_bytes())
    };
    match greet(&socket) {
        // It has said why before it was greeted.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
        greeted => greeted.map_err(|e| failed("cannot greet the server of", target, &e))?,
    }
    let (welcome, descriptors) =
        receive(&socket).map_err(|e| failed("no answer from the server of", target, &e))?;
    if welcome.magic != WELCOME_MAGIC {
        return Err(Failure::new(libc::EPROTO, format!("what serves {} is not Tidegate", path.display())));
    }
    if welcome.errno.get() != 0 {
        let errno = welcome.errno.get().clamp(1, 4095);
        return Err(Failure::new(errno, format!("volume '{target}': {}", text_of(&welcome.message))));
    }
    session_of(socket, &welcome, descriptors).ok_or_else(|| {
        Failure::new(libc::EPROTO, format!("the server of '{target}' gave a session that makes no sense"))
    })?
}

/// As `UnixStream::connect`.
fn reach(socket: &UnixStream, path: &Path) -> std::io::Result<()> {
    let address = UnixAddr::new(path)?;
    loop {
        match nix::sys::socket::connect(socket.as_raw_fd(), &address) {
            Ok(()) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn receive(socket: &UnixStream) -> std::io::Result<(WelcomeImage, Vec<OwnedFd>)> {
    let mut bytes = [0; size_of::<WelcomeImage>()];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(nix::errno::Errno::EINTR) => {}
            received => break received?,
        }
    };
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            received.extend(fds.into_iter().map(own));
        }
    }
    let len = message.bytes;
    (&mut &*socket).read_exact(&mut bytes[len..])?;
    Ok((WelcomeImage::read_from_bytes(&bytes).expect("of its size"), received))
}

#[expect(unsafe_code, reason = "descriptors come as numbers")]
fn own(fd: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// `None` if the welcome does not fit together.
fn session_of(
    socket: Private<UnixStream>,
    welcome: &WelcomeImage,
    descriptors: Vec<OwnedFd>,
) -> Option<Result<Connected>> {
    let layout = RingLayout::new(welcome.depth.get(), welcome.arena_bytes.get())?;
    let session = u16::try_from(welcome.session.get()).ok().filter(|session| *session != 0)?;
    let fits =
        welcome.version.get() == WIRE_VERSION && welcome.memory_bytes.get() == layout.memory_bytes() as u64;
    let [memory, bell] = <[OwnedFd; 2]>::try_from(descriptors).ok().filter(|_| fits)?;
    let info = Info {
        name: text_of(&welcome.name),
        volume_bytes: welcome.volume_bytes.get(),
        write_bytes_max: welcome.write_bytes_max.get(),
        depth: layout.depth,
        arena_bytes: layout.arena_bytes,
        ack: AckLevel::from_code(welcome.ack)?,
        stage_uuid: Uuid::from_bytes(welcome.stage_uuid),
        volume_uuid: Uuid::from_bytes(welcome.volume_uuid),
    };
    let open = || {
        let map = || SharedMap::open(memory, layout.memory_bytes());
        let memory = Private::new(|| map().map_err(|e| Failure::new(libc::EPROTO, e.report())))?;
        socket.set_read_timeout(None).map_err(|e| failed("cannot set up the socket of", &info.name, &e))?;
        Ok(Connected { socket, bell: bell.into(), memory, layout, session, info })
    };
    Some(open())
}
