//! Clients of the byte door that lie, scribble, stall and die, beside an honest one that must not notice.

mod support;

use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::{Place, V1, pattern};
use tidegate_driver::bytes::client::{Device, Options};
use tidegate_driver::bytes::gate::{Access, Gate};
use tidegate_driver::format::byte_ring::{
    COMPLETION_HEAD, HelloImage, RingLayout, SUBMISSION_TAIL, WelcomeImage, text_of,
};
use tidegate_driver::format::volume_entry::AckLevel;
use tidegate_driver::io::SharedMap;
use zerocopy::{FromBytes, IntoBytes};

/// A client without the library.
struct Raw {
    socket: UnixStream,
    bell: std::fs::File,
    memory: SharedMap,
    layout: RingLayout,
}

fn welcome_of(socket: &UnixStream) -> (WelcomeImage, Vec<OwnedFd>) {
    let mut bytes = [0; size_of::<WelcomeImage>()];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 2]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    let mut fd: Vec<OwnedFd> = Vec::new();
    for control in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(fds) = control {
            #[expect(unsafe_code, reason = "descriptors come as numbers")]
            // SAFETY: the kernel has just made these descriptors for us.
            let own = unsafe { fds.into_iter().map(|fd| OwnedFd::from_raw_fd(fd)).collect() };
            fd = own;
        }
    }
    let len = message.bytes;
    (&mut &*socket).read_exact(&mut bytes[len..]).unwrap();
    (WelcomeImage::read_from_bytes(&bytes).unwrap(), fd)
}

impl Raw {
    fn open(path: &Path) -> Raw {
        let socket = UnixStream::connect(path).unwrap();
        (&socket).write_all(HelloImage::new(8, 4096).as_bytes()).unwrap();
        let (welcome, fd) = welcome_of(&socket);
        assert_eq!(welcome.errno.get(), 0, "{}", text_of(&welcome.message));
        let layout = RingLayout::new(welcome.depth.get(), welcome.arena_bytes.get()).unwrap();
        let [memory, bell] = <[OwnedFd; 2]>::try_from(fd).unwrap();
        let memory = SharedMap::open(memory, layout.memory_bytes()).unwrap();
        Raw { socket, bell: bell.into(), memory, layout }
    }

    fn ring(&self) -> bool {
        (&self.bell).write_all(&1u64.to_ne_bytes()).is_ok()
    }
}

struct Served {
    _place: Place,
    gate: Gate,
}

fn serve() -> Served {
    let place = Place::new(64 << 20, &[AckLevel::Memory]);
    let engine = place.open().unwrap();
    let path = place.path("v.sock");
    let gate = Gate::open(engine, Arc::default(), V1, &path, Access::default()).unwrap();
    Served { _place: place, gate }
}

fn honest_works(device: &Device, round: u64) {
    // Where nobody else writes: whoever may write to a volume may write anywhere.
    let at = (32 << 20) + round % 100 * 5000;
    let data = pattern(round, 5000);
    let ticket = device.write(at, &[&data], 0).unwrap();
    device.persist(ticket, Some(Duration::from_secs(30))).unwrap();
    let mut back = vec![0; data.len()];
    device.read(at, &mut back).unwrap();
    assert!(back == data, "round {round}");
}

#[test]
fn greetings_that_make_no_sense_are_refused_with_words() {
    let served = serve();
    let refused = |hello: &HelloImage, errno: i32| {
        let socket = UnixStream::connect(served.gate.path()).unwrap();
        (&socket).write_all(hello.as_bytes()).unwrap();
        let (welcome, fd) = welcome_of(&socket);
        assert_eq!(welcome.errno.get(), errno);
        assert!(text_of(&welcome.message).len() > 20 && fd.is_empty());
    };
    let good = HelloImage::new(0, 0);
    refused(&HelloImage { magic: *b"GET / HT", ..good }, nix::libc::EPROTO);
    refused(&HelloImage { version: 2.into(), ..good }, nix::libc::EPROTONOSUPPORT);
    refused(&HelloImage { flags: 2.into(), ..good }, nix::libc::EOPNOTSUPP);
    refused(&HelloImage::new(7, 0), nix::libc::EINVAL);
    refused(&HelloImage::new(0, 1), nix::libc::EINVAL);
    refused(&HelloImage::new(u32::MAX, u32::MAX), nix::libc::EINVAL);
    // Half a greeting, and none at all: the server does not wait for them to let others in.
    let mut half = UnixStream::connect(served.gate.path()).unwrap();
    half.write_all(&good.as_bytes()[..50]).unwrap();
    let silent = UnixStream::connect(served.gate.path()).unwrap();
    let device = Device::open(served.gate.path().to_str().unwrap(), &Options::default()).unwrap();
    honest_works(&device, 1);
    drop((half, silent));
    served.gate.close();
}

#[test]
fn lies_about_the_rings_end_the_session_and_no_other() {
    let served = serve();
    let honest = Device::open(served.gate.path().to_str().unwrap(), &Options::default()).unwrap();
    for (at, value) in [(SUBMISSION_TAIL, 9), (SUBMISSION_TAIL, u64::MAX), (SUBMISSION_TAIL, 1 << 63)] {
        let liar = Raw::open(served.gate.path());
        liar.memory.word(at).store(value, Ordering::Release);
        assert!(liar.ring());
        let (farewell, _) = welcome_of(&liar.socket);
        assert_eq!(farewell.errno.get(), nix::libc::EPROTO);
        assert!(text_of(&farewell.message).contains("submission tail"));
        honest_works(&honest, 2);
    }
}

#[test]
fn clients_that_scribble_stall_and_die_hurt_only_themselves() {
    let served = serve();
    let path = served.gate.path().to_owned();
    let seed = rand::rng().next_u64();
    println!("seed {seed}");
    let honest = Device::open(path.to_str().unwrap(), &Options::default()).unwrap();
    std::thread::scope(|scope| {
        let hostile: Vec<_> = (0..2)
            .map(|thread| {
                let path = &path;
                scope.spawn(move || {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ thread);
                    for _ in 0..40 {
                        scribble(&Raw::open(path), &mut rng);
                    }
                })
            })
            .collect();
        let mut round = 0;
        while hostile.iter().any(|thread| !thread.is_finished()) {
            round += 1;
            honest_works(&honest, round);
        }
        println!("{round} rounds of honest work beside it");
    });
    // One that stalls with everything in flight and full rings, until the gate closes.
    let stalled = Raw::open(&path);
    for slot in 0..8 {
        stalled.memory.put_image(stalled.layout.submission(slot), &[3u64, 0, 64, slot, 0, 0, 0, 0]);
    }
    stalled.memory.word(SUBMISSION_TAIL).store(8, Ordering::Release);
    stalled.ring();
    honest_works(&honest, 7);
    drop(honest);
    served.gate.close();
}

/// Everything that can be written, for a while: whole pages of noise, words, heads and tails, rings of the bell.
fn scribble(raw: &Raw, rng: &mut ChaCha8Rng) {
    for _ in 0..rng.random_range(1..300) {
        match rng.random_range(0..6) {
            0 => {
                let at = rng.random_range(0..raw.memory.len_bytes() / 8) * 8;
                raw.memory.word(at).store(rng.next_u64(), Ordering::Relaxed);
            }
            1 => {
                let add = rng.random_range(0..3);
                raw.memory.word(SUBMISSION_TAIL).fetch_add(add, Ordering::Release);
            }
            2 => drop(raw.memory.word(COMPLETION_HEAD).fetch_add(rng.random_range(0..2), Ordering::Release)),
            3 => {
                let operation = u64::from(rng.random_range(0..8u8));
                let words =
                    [operation, rng.random_range(0..1 << 20), rng.random_range(0..5000), 1, 0, 0, 0, 0];
                raw.memory.put_image(raw.layout.submission(rng.random_range(0..8)), &words);
            }
            4 => drop((&raw.socket).write_all(&vec![rng.random(); rng.random_range(1..200)])),
            _ => drop(raw.ring()),
        }
    }
}
