//! The byte door: a server's gate and clients of it, on real files, in one process.

mod support;

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{Place, V1, V2, VOLUME_BYTES, pattern};
use tidegate_driver::bytes::client::{Device, Options};
use tidegate_driver::bytes::gate::{Access, Gate};
use tidegate_driver::bytes::local::LocalDevice;
use tidegate_driver::bytes::ties::Ties;
use tidegate_driver::bytes::{ByteStore, Completion, DURABLE, Operation, SILENT, Submission, Ticket};
use tidegate_driver::format::volume_entry::AckLevel;
use tidegate_driver::io::peer::Peer;
use tidegate_driver::volume::{Engine, LocalClient};

struct Served {
    place: Place,
    engine: Arc<Engine>,
    gates: Vec<Gate>,
}

impl Served {
    fn new(acks: &[AckLevel]) -> Served {
        Served::on(Place::new(64 << 20, acks), acks.len())
    }

    fn on(place: Place, volumes: usize) -> Served {
        let engine = place.open().unwrap();
        let ties = Arc::new(Ties::default());
        let gates = [V1, V2][..volumes].iter().map(|id| {
            let path = place.path(&format!("v{}.sock", id.0));
            Gate::open(engine.clone(), ties.clone(), *id, &path, Access::default()).unwrap()
        });
        let gates = gates.collect();
        Served { engine, gates, place }
    }

    fn socket(&self, index: usize) -> String {
        self.gates[index].path().to_str().unwrap().to_owned()
    }

    fn device(&self, index: usize) -> Device {
        Device::open(&self.socket(index), &Options::default()).unwrap()
    }

    fn end(mut self) -> (Place, PathBuf) {
        self.gates.clear();
        self.engine.close(true).unwrap();
        let path = self.place.path("backing0");
        (self.place, path)
    }
}

fn errno_of<T: std::fmt::Debug>(result: Result<T, tidegate_driver::bytes::Failure>) -> i32 {
    let failure = result.unwrap_err();
    assert!(failure.what.len() > 10, "says what is wrong: {failure}");
    failure.errno.0
}

fn reap(device: &Device, count: usize) -> Vec<Completion> {
    let mut all = Vec::new();
    while all.len() < count {
        let mut some = [Completion::default(); 7];
        let got = device.reap(&mut some, Some(Duration::from_secs(20))).unwrap();
        assert!(got > 0, "{} of {count} completions came", all.len());
        all.extend_from_slice(&some[..got]);
    }
    all
}

#[test]
fn bytes_are_written_read_and_flushed_to_the_backing() {
    for ack in [AckLevel::Log, AckLevel::Memory] {
        let served = Served::new(&[ack]);
        let device = served.device(0);
        assert_eq!((device.info().name.as_str(), device.info().volume_bytes), ("v0", VOLUME_BYTES));
        let first = device.write(1, &[b"one", b"-", b"record"], 0).unwrap();
        let second = device.write(3, &[b"X"], DURABLE).unwrap();
        assert!(first < second && device.durable() >= second, "{:?}", device.durable());
        device.write_zeroes(5, 2, 0).unwrap();
        let mut read = [9; 12];
        device.read(0, &mut read).unwrap();
        assert_eq!(&read, b"\0onX-\0\0cord\0");
        let large = pattern(3, 1_000_000);
        let ticket = device.write(777_777, &[&large], 0).unwrap();
        device.persist(ticket, None).unwrap();
        let mut back = vec![0; large.len()];
        device.read(777_777, &mut back).unwrap();
        assert!(back == large);
        device.discard(777_777, 500).unwrap();
        device.flush().unwrap();
        drop(device);
        let (place, _) = served.end();
        assert_eq!(place.backing_bytes(0, 0, 12), b"\0onX-\0\0cord\0");
        assert!(place.backing_bytes(0, 778_277, 5000) == large[500..5500]);
    }
}

#[test]
fn asynchronous_requests_complete_in_the_order_of_their_records() {
    let served = Served::new(&[AckLevel::Memory]);
    let device = served.device(0);
    let at = device.alloc(64 * 256).unwrap();
    let mut last = Ticket::NONE;
    for i in 0..256 {
        device.put(at + i * 64, &[i as u8; 64]).unwrap();
        let write = Submission {
            operation: Operation::Write as u8,
            arena_offset: at + i * 64,
            offset: u64::from(i) * 64,
            len: 64,
            cookie: u64::from(i),
            ..Submission::default()
        };
        loop {
            match device.submit(&[write]) {
                Ok(ticket) => {
                    assert!(ticket > last);
                    last = ticket;
                    break;
                }
                Err(e) if e.errno.0 == libc::EAGAIN => drop(device.reap(&mut [], None).unwrap()),
                Err(e) => panic!("{e}"),
            }
        }
    }
    let all = reap(&device, 256);
    assert!(all.iter().all(|c| c.result == 0));
    assert!(all.windows(2).all(|w| w[0].lsn < w[1].lsn && w[0].cookie < w[1].cookie), "{all:?}");
    assert!(device.accepted() >= last);
    device.persist(last, Some(Duration::from_secs(20))).unwrap();
    assert!(device.durable() >= last);
    device.free(at).unwrap();
    assert_eq!(errno_of(device.free(at)), libc::EINVAL);
}

#[test]
fn a_read_sees_what_was_submitted_before_it() {
    let served = Served::new(&[AckLevel::Log]);
    let device = served.device(0);
    let at = device.alloc(128).unwrap();
    for round in 1..100u8 {
        device.put(at, &[round; 64]).unwrap();
        let submission = |operation, arena_offset, cookie| Submission {
            operation: operation as u8,
            arena_offset,
            offset: 100,
            len: 64,
            cookie,
            flags: if operation == Operation::Write { SILENT } else { 0 },
            ..Submission::default()
        };
        let batch = [submission(Operation::Write, at, 1), submission(Operation::Read, at + 64, 2)];
        device.submit(&batch).unwrap();
        assert_eq!(reap(&device, 1)[0].cookie, 2);
        let mut read = [0; 64];
        device.get(at + 64, &mut read).unwrap();
        assert_eq!(read, [round; 64]);
    }
}

#[test]
fn barriers_and_dependencies_order_what_sessions_do() {
    let served = Served::new(&[AckLevel::Memory, AckLevel::Log]);
    let (one, two) = (served.device(0), served.device(1));
    let zeroes = |cookie, after: &[Ticket]| {
        let mut submission = Submission {
            operation: Operation::WriteZeroes as u8,
            offset: 0,
            len: 100,
            cookie,
            ..Submission::default()
        };
        submission.after[..after.len()].copy_from_slice(after);
        submission
    };
    // The other session's next request, which is submitted later.
    let session = one.submit(&[zeroes(1, &[])]).unwrap().session();
    assert_eq!(reap(&one, 1)[0].result, 0);
    let to_come = Ticket::new(session, 2);
    two.submit(&[zeroes(7, &[to_come])]).unwrap();
    assert_eq!(two.reap(&mut [Completion::default()], Some(Duration::from_millis(50))).unwrap(), 0);
    one.submit(&[zeroes(2, &[])]).unwrap();
    let (first, second) = (reap(&one, 1)[0], reap(&two, 1)[0]);
    assert!(first.lsn < second.lsn && first.ticket == to_come, "{first:?} {second:?}");
    // Of itself, of nobody, of one that is over.
    two.submit(&[zeroes(8, &[Ticket::new(second.ticket.session(), 99)]), zeroes(9, &[Ticket(77 << 48 | 1)])])
        .unwrap();
    assert_eq!(reap(&two, 2).iter().map(|c| c.result).collect::<Vec<_>>(), [-libc::EINVAL; 2]);
    two.submit(&[zeroes(10, &[Ticket::new(session, 3)])]).unwrap();
    drop(one);
    assert_eq!(reap(&two, 1)[0].result, -libc::ECANCELED);
    two.submit(&[zeroes(11, &[to_come])]).unwrap();
    assert_eq!(reap(&two, 1)[0].result, 0);
    let barrier = Submission { operation: Operation::Barrier as u8, cookie: 13, ..Submission::default() };
    two.submit(&[zeroes(12, &[]), barrier, zeroes(14, &[])]).unwrap();
    let order: Vec<u64> = reap(&two, 3).iter().map(|c| c.cookie).collect();
    assert_eq!(order, [12, 13, 14]);
}

#[test]
fn nonsense_is_refused_and_hurts_nothing() {
    let served = Served::new(&[AckLevel::Memory]);
    let device = served.device(0);
    let good = Submission { operation: Operation::Write as u8, len: 10, ..Submission::default() };
    let arena = device.info().arena_bytes;
    let most = u64::from(device.info().write_bytes_max);
    let bad = [
        (Submission { operation: 0, ..good }, libc::EOPNOTSUPP),
        (Submission { operation: 77, ..good }, libc::EOPNOTSUPP),
        (Submission { flags: 4, ..good }, libc::EINVAL),
        (Submission { flags: SILENT, operation: Operation::Read as u8, ..good }, libc::EINVAL),
        (Submission { len: 0, ..good }, libc::EINVAL),
        (Submission { len: u64::MAX, ..good }, libc::ERANGE),
        (Submission { offset: VOLUME_BYTES, ..good }, libc::ERANGE),
        (Submission { offset: u64::MAX, ..good }, libc::ERANGE),
        (Submission { arena_offset: arena - 9, ..good }, libc::EFAULT),
        (Submission { arena_offset: u32::MAX, ..good }, libc::EFAULT),
        (Submission { operation: Operation::Read as u8, arena_offset: arena, ..good }, libc::EFAULT),
        (Submission { operation: Operation::Flush as u8, ..good }, libc::EINVAL),
        (
            Submission { after: [Ticket(5 << 48), Ticket::NONE, Ticket::NONE, Ticket::NONE], ..good },
            libc::EINVAL,
        ),
    ];
    for (submission, errno) in bad {
        device.submit(&[submission]).unwrap();
        assert_eq!(reap(&device, 1)[0].result, -errno, "{submission:?}");
    }
    assert_eq!(errno_of(device.submit(&[])), libc::EINVAL);
    assert_eq!(errno_of(device.submit(&[Submission { cookie: u64::MAX, ..good }])), libc::EINVAL);
    assert_eq!(errno_of(device.write(0, &[&vec![0; most as usize + 1]], 0)), libc::EMSGSIZE);
    assert_eq!(errno_of(device.write(0, &[b""], 0)), libc::EINVAL);
    assert_eq!(errno_of(device.write(VOLUME_BYTES - 1, &[b"ab"], 0)), libc::ERANGE);
    assert_eq!(errno_of(device.read(VOLUME_BYTES - 1, &mut [0; 2])), libc::ERANGE);
    assert_eq!(errno_of(device.persist(Ticket(1), None)), libc::EINVAL);
    assert_eq!(errno_of(device.alloc(0)), libc::EINVAL);
    assert_eq!(errno_of(device.alloc(1 << 30)), libc::EINVAL);
    let ticket = device.write_async(VOLUME_BYTES - 1, &[b"ab"], 0).unwrap();
    let later = device.write(0, &[b"still alive"], 0).unwrap();
    assert!(device.durable() <= later);
    for _ in 0..2 {
        assert_eq!(errno_of(device.persist(ticket, None)), libc::ERANGE);
        assert_eq!(errno_of(device.persist(later, None)), libc::ERANGE, "there is a hole before it");
    }
}

#[test]
fn many_threads_share_a_session_and_many_sessions_a_volume() {
    let served = Served::new(&[AckLevel::Log]);
    let shared = served.device(0);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let shared = &shared;
            let served = &served;
            scope.spawn(move || {
                let own = served.device(0);
                for i in 0..200u64 {
                    let at = (thread * 200 + i) * 1000;
                    let device = if i % 2 == 0 { shared } else { &own };
                    let ticket = device.write_async(at, &[&pattern(at, 1000)], 0).unwrap();
                    if i % 20 == 0 {
                        device.persist(ticket, None).unwrap();
                    }
                    let mut back = vec![0; 1000];
                    device.read(at, &mut back).unwrap();
                    assert!(back == pattern(at, 1000), "thread {thread}, write {i}");
                }
            });
        }
    });
    // A session ends a moment after its client.
    while served.gates[0].sessions().len() > 1 {
        std::thread::yield_now();
    }
    shared.flush().unwrap();
}

/// What a client that is gone left in its ring comes before everything that a later client does: it may have looked at the
/// volume, and must not find that changed behind its back.
#[test]
fn a_session_begins_when_those_of_clients_that_are_gone_are_over() {
    let served = Served::new(&[AckLevel::Memory]);
    for round in 0..30u8 {
        let old = Device::open(&served.socket(0), &Options { depth: 4096, ..Options::default() }).unwrap();
        let at = old.alloc(8).unwrap();
        old.put(at, &[round; 8]).unwrap();
        let write = Submission {
            operation: Operation::Write as u8,
            flags: SILENT,
            arena_offset: at,
            len: 8,
            ..Submission::default()
        };
        old.submit(&[write; 4000]).unwrap();
        drop(old);
        let new = served.device(0);
        let mut seen = [0; 8];
        new.read(0, &mut seen).unwrap();
        assert_eq!(seen, [round; 8], "everything that was submitted is there");
        new.write(0, &[&[255 - round; 8]], 0).unwrap();
        while served.gates[0].sessions().len() > 1 {
            std::thread::yield_now();
        }
        new.read(0, &mut seen).unwrap();
        assert_eq!(seen, [255 - round; 8], "and nothing comes after");
    }
}

#[test]
fn long_reads_of_many_threads_share_the_slots() {
    let served = Served::new(&[AckLevel::Memory]);
    let device = served.device(0);
    let bytes = pattern(7, 1 << 20);
    device.write(0, &[&bytes], 0).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                for round in 0..40 {
                    let mut back = vec![0; (1 << 20) - round * 1000];
                    device.read(round as u64 * 1000, &mut back).unwrap();
                    assert!(back == bytes[round * 1000..], "round {round}");
                }
            });
        }
    });
}

#[test]
fn a_store_never_passes_a_write_that_failed() {
    let served = Served::new(&[AckLevel::Log]);
    let device = served.device(0);
    let store = &device;
    let before = ByteStore::write(&store, 0, &[b"a"]).unwrap();
    let failed = ByteStore::write(&store, VOLUME_BYTES, &[b"b"]).unwrap();
    let after = ByteStore::write(&store, 1, &[b"c"]).unwrap();
    for _ in 0..2 {
        assert_eq!(errno_of(ByteStore::persist(&store, after, None)), libc::ERANGE);
        assert_eq!(errno_of(ByteStore::persist(&store, failed, None)), libc::ERANGE);
        assert_eq!(ByteStore::durable(&store), before);
    }
    ByteStore::persist(&store, before, None).unwrap();
}

#[test]
fn the_end_of_the_server_is_told_and_what_was_accepted_is_there() {
    let served = Served::new(&[AckLevel::Memory]);
    let device = served.device(0);
    let ticket = device.write(10, &[b"kept"], 0).unwrap();
    assert!(device.accepted() >= ticket);
    served.gates[0].close();
    assert_eq!(errno_of(device.read(0, &mut [0; 4])), libc::ENOTCONN);
    assert_eq!(errno_of(device.write(0, &[b"x"], 0)), libc::ENOTCONN);
    assert_eq!(errno_of(device.persist(ticket, None)), libc::ENOTCONN);
    assert_eq!(errno_of(device.reap(&mut [Completion::default()], None)), libc::ENOTCONN);
    let refused = Device::open(&served.socket(0), &Options::default()).unwrap_err();
    assert!(refused.what.contains("--bytes"), "{refused}");
    drop(device);
    let mut client = LocalClient::new(&served.engine, V1, 1).unwrap();
    assert_eq!(client.read(10, 4).unwrap(), b"kept");
}

#[test]
fn what_a_client_that_died_had_submitted_is_carried_out() {
    let served = Served::new(&[AckLevel::Memory]);
    for round in 0..20u64 {
        let device = served.device(0);
        for i in 0..100u64 {
            device.write_async(i * 8, &[&(round * 100 + i).to_le_bytes()], 0).unwrap();
        }
        drop(device);
        let reader = served.device(0);
        let expected = round * 100 + 99;
        let mut last = [0; 8];
        for _ in 0..2000 {
            reader.read(99 * 8, &mut last).unwrap();
            if u64::from_le_bytes(last) == expected {
                break;
            }
            std::thread::yield_now();
        }
        assert_eq!(u64::from_le_bytes(last), expected);
    }
}

#[test]
fn descriptors_tell_of_completions() {
    let served = Served::new(&[AckLevel::Log]);
    let device = served.device(0);
    let mut some = [Completion::default(); 4];
    for round in 0..50 {
        assert_eq!(device.reap(&mut some, Some(Duration::ZERO)).unwrap(), 0);
        let flush = Submission { operation: Operation::Flush as u8, cookie: round, ..Submission::default() };
        device.submit(&[flush]).unwrap();
        let mut got = 0;
        while got == 0 {
            let mut fd = [nix::poll::PollFd::new(device.event_fd(), nix::poll::PollFlags::POLLIN)];
            assert_eq!(nix::poll::poll(&mut fd, 20_000u16).unwrap(), 1, "it became readable");
            got = device.reap(&mut some, Some(Duration::ZERO)).unwrap();
        }
        assert_eq!((got, some[0].cookie), (1, round));
    }
    assert!(device.event_fd().as_raw_fd() >= 0);
}

#[test]
fn in_process_writes_are_ordered_and_wait_for_room_in_a_full_stage() {
    let place = Place::new(24 << 20, &[AckLevel::Memory]);
    let engine = place.open().unwrap();
    let device = LocalDevice::open(&engine, V1).unwrap();
    let mut last = Ticket::NONE;
    for i in 0..3000u64 {
        let payload = pattern(i, 20_000);
        let (head, tail) = payload.split_at(3);
        let ticket = device.write(i % 500 * 20_000 + 7, &[head, tail]).unwrap();
        assert!(ticket > last, "{ticket:?} after {last:?}");
        last = ticket;
        if i % 200 == 0 {
            let mut back = vec![0; 20_000];
            device.read(i % 500 * 20_000 + 7, &mut back).unwrap();
            assert!(back == payload, "write {i}");
        }
    }
    assert_eq!(errno_of(device.persist(Ticket(last.0 + 1), None)), libc::EINVAL);
    assert_eq!(errno_of(device.write(VOLUME_BYTES - 1, &[b"ab"])), libc::ERANGE);
    assert_eq!(errno_of(device.write(0, &[b""])), libc::EINVAL);
    device.persist(last, Some(Duration::from_secs(20))).unwrap();
    assert!(device.durable() >= last && device.accepted() >= last);
    drop(device);
    engine.close(true).unwrap();
    assert!(place.backing_bytes(0, 499 * 20_000 + 7, 20_000) == pattern(2999, 20_000));
}

#[test]
fn those_who_are_not_on_the_list_stay_outside() {
    let peer = |uid, gids: &[u32]| Peer { pid: 1, uid, gids: gids.to_vec() };
    let access = Access { users: vec![7], groups: vec![50] };
    assert!(access.admits(&peer(0, &[0]), 3) && access.admits(&peer(3, &[9]), 3));
    assert!(access.admits(&peer(7, &[9]), 3) && access.admits(&peer(8, &[9, 50]), 3));
    assert!(!access.admits(&peer(8, &[9]), 3) && !Access::default().admits(&peer(7, &[50]), 3));
    let served = Served::new(&[AckLevel::Memory]);
    let mode = |gate: &Gate| std::fs::metadata(gate.path()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&served.gates[0]), 0o600);
    served.gates[0].set_access(access).unwrap();
    assert_eq!(mode(&served.gates[0]), 0o666);
}

#[test]
fn interrupted_calls_fail_and_hurt_nothing() {
    let served = Served::new(&[AckLevel::Memory]);
    let device = served.device(0);
    let done = std::sync::atomic::AtomicUsize::new(0);
    let interrupt_until = |count: usize| {
        while done.load(Ordering::Relaxed) < count {
            device.interrupt();
            std::thread::sleep(Duration::from_micros(200));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                assert_eq!(errno_of(device.reap(&mut [Completion::default()], None)), libc::EINTR);
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        interrupt_until(3);
    });
    assert_eq!(device.reap(&mut [Completion::default()], Some(Duration::from_millis(20))), Ok(0));
    // Slots of reads that were given up are used by others only when the server is through with them.
    let len = 300_000;
    device.write(0, &[&pattern(1, len)], 0).unwrap();
    device.write(1 << 20, &[&pattern(2, len)], 0).unwrap();
    let mut interrupted = 0;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4u64)
            .map(|number| {
                let (device, done) = (&device, &done);
                scope.spawn(move || {
                    let (mut interrupted, mut bytes) = (0, vec![0; len]);
                    for _ in 0..100 {
                        match device.read((number % 2) << 20, &mut bytes) {
                            Ok(()) => assert!(bytes == pattern(1 + number % 2, len), "another's bytes"),
                            Err(e) => {
                                assert_eq!(e.errno.0, libc::EINTR);
                                interrupted += 1;
                            }
                        }
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                    interrupted
                })
            })
            .collect();
        interrupt_until(7);
        interrupted = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    });
    assert!(interrupted > 0);
    // None is lost.
    let mut bytes = vec![0; 4 << 20];
    (0..50).for_each(|_| device.read(0, &mut bytes).unwrap());
    served.end();
}

#[test]
fn a_volume_has_one_sole_writer() {
    let served = Served::new(&[AckLevel::Memory, AckLevel::Memory]);
    let sole = Options { sole_writer: true, ..Options::default() };
    let open = |index| Device::open(&served.socket(index), &sole);
    for _ in 0..20 {
        let first = open(0).unwrap();
        let refused = open(0).unwrap_err();
        assert_eq!(refused.errno.0, libc::EBUSY);
        assert!(refused.what.contains(&std::process::id().to_string()), "{refused}");
        // Other volumes have their own, and others are not kept out.
        let (_other, plain) = (open(1).unwrap(), served.device(0));
        plain.write(0, &[b"plain"], 0).unwrap();
        let ticket = (0..50).map(|n| first.write_async(n * 1000, &[&[1; 1000]], 0).unwrap()).last().unwrap();
        drop(first);
        // What the first had submitted is through when the next begins.
        let second = open(0).unwrap();
        let mut before = [0; 50_000];
        second.read(0, &mut before).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let mut after = [0; 50_000];
        second.read(0, &mut after).unwrap();
        assert!(before == after && ticket.sequence() == 50);
    }
    served.end();
}
