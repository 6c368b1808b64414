//! Who is at the other end of a unix socket.

#![expect(unsafe_code, reason = "the list of a peer's groups has no safe wrapper among the dependencies")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// Most groups that are looked at.
const GROUPS_MAX: usize = 1024;

/// The process that connected, as it was then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id, as seen from here.
    pub pid: u32,
    /// Effective user.
    pub uid: u32,
    /// Effective group and supplementary groups.
    pub gids: Vec<u32>,
}

/// Who is at the other end of `stream`.
pub fn peer_of(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = getsockopt(stream, PeerCredentials)?;
    let mut gids = vec![0 as libc::gid_t; GROUPS_MAX];
    let mut len = size_of_val(&gids[..]) as libc::socklen_t;
    // SAFETY: the buffer is of the length given, and is only filled up to it.
    let failed = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            gids.as_mut_ptr().cast(),
            &raw mut len,
        ) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    gids.truncate(len as usize / size_of::<libc::gid_t>());
    gids.push(credentials.gid());
    Ok(Peer { pid: credentials.pid() as u32, uid: credentials.uid(), gids })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = peer_of(&ours).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id(), nix::unistd::geteuid().as_raw()));
        assert!(peer.gids.contains(&nix::unistd::getegid().as_raw()));
    }
}
