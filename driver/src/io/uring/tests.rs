use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::entry::{self, Verdict, Way};
use super::slab::{InFlight, Slab};
use super::*;
use crate::base::VolumeId;
use crate::io::AlignedBuf;
use crate::io::op::{Memory, SharedMemory, Token};
use crate::volume::Wake;

const BUFFERED: TargetOptions = TargetOptions { direct: false, is_block_device: false };

fn temp_file(len: u64) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    Arc::new(file)
}

fn reactor_on(file: &Arc<File>) -> Reactor {
    let mut reactor = Reactor::new(64).unwrap();
    reactor.register(Target::Stage, Arc::clone(file), BUFFERED).unwrap();
    reactor
}

fn op(token: u64, kind: OpKind, offset: u64, memory: AlignedBuf) -> Op {
    let len = memory.len() as u64;
    Op { token: Token(token), target: Target::Stage, kind, offset, len, memory: Memory::Owned(memory) }
}

fn bare(token: u64, kind: OpKind, offset: u64, len: u64) -> Op {
    Op { token: Token(token), target: Target::Stage, kind, offset, len, memory: Memory::None }
}

fn finish(reactor: &mut Reactor, count: usize) -> Vec<Done> {
    let mut all = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    while all.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} operations finished", all.len());
        reactor.submit_and_wait(Some(Duration::from_secs(5))).unwrap();
        while let Some(event) = reactor.next_event() {
            match event {
                Event::Op(done) => all.push(done),
                other => panic!("{other:?}"),
            }
        }
    }
    all
}

fn run(reactor: &mut Reactor, op: Op) -> Done {
    reactor.push(op);
    finish(reactor, 1).pop().unwrap()
}

fn owned(done: Done) -> AlignedBuf {
    match done.memory {
        Memory::Owned(buf) => buf,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_written_is_read_back() {
    let file = temp_file(1 << 20);
    let mut reactor = reactor_on(&file);
    let data: Vec<u8> = (0..65536u32).map(|i| (i * 7) as u8).collect();
    for kind in [OpKind::Write, OpKind::WriteDurable] {
        let done = run(&mut reactor, op(1, kind, 8192, AlignedBuf::from_slice(&data)));
        assert_eq!((done.token, done.result), (Token(1), Ok(())));
    }
    assert_eq!(run(&mut reactor, bare(2, OpKind::Sync, 0, 0)).result, Ok(()));
    let done = run(&mut reactor, op(3, OpKind::Read, 8192, AlignedBuf::zeroed(65536)));
    assert_eq!(done.result, Ok(()));
    assert_eq!(owned(done)[..], data[..]);
}

#[test]
fn punched_ranges_read_as_zeroes() {
    for kind in [OpKind::Discard, OpKind::WriteZeroes] {
        let file = temp_file(1 << 20);
        file.write_all_at(&[7; 1 << 16], 0).unwrap();
        let mut reactor = reactor_on(&file);
        let done = run(&mut reactor, bare(1, kind, 4096, 8192));
        if done.result == Err(Errno::EOPNOTSUPP) {
            // The file system under the temporary folder cannot; then the answer is the caller's to deal with.
            continue;
        }
        assert_eq!(done.result, Ok(()));
        let bytes = owned(run(&mut reactor, op(2, OpKind::Read, 0, AlignedBuf::zeroed(16384))));
        assert!(bytes[..4096].iter().all(|&b| b == 7));
        assert!(bytes[4096..12288].iter().all(|&b| b == 0));
        assert!(bytes[12288..].iter().all(|&b| b == 7));
        assert_eq!(file.metadata().unwrap().len(), 1 << 20, "the length is kept");
    }
}

#[test]
fn a_read_across_the_end_fails_whole() {
    let file = temp_file(10_000);
    let mut reactor = reactor_on(&file);
    assert_eq!(
        run(&mut reactor, op(1, OpKind::Read, 8192, AlignedBuf::zeroed(4096))).result,
        Err(Errno::EIO)
    );
    assert_eq!(
        run(&mut reactor, op(2, OpKind::Read, 1 << 20, AlignedBuf::zeroed(4096))).result,
        Err(Errno::EIO)
    );
    assert_eq!(run(&mut reactor, op(3, OpKind::Read, 0, AlignedBuf::zeroed(10_000))).result, Ok(()));
}

#[test]
fn a_short_transfer_is_continued_where_it_stopped() {
    // A pipe gives what it has: the read of 4096 bytes needs several entries. Offset 0 means "no position" there, so
    // only the reactor's own count of progress is tested; offsets are covered by the tests of `judge` below.
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written to `ends`.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both are new and owned by nobody else.
    let (read_end, write_end) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    let mut reactor = Reactor::new(64).unwrap();
    reactor.register(Target::Stage, Arc::new(read_end), BUFFERED).unwrap();
    let writer = std::thread::spawn(move || {
        use std::io::Write;
        for part in 0..4u8 {
            std::thread::sleep(Duration::from_millis(20));
            (&write_end).write_all(&[part; 1024]).unwrap();
        }
    });
    reactor.push(op(1, OpKind::Read, 0, AlignedBuf::zeroed(4096)));
    let mut first = finish(&mut reactor, 1);
    writer.join().unwrap();
    let done = first.pop().unwrap();
    // Pipes refuse positions other than 0 on some kernels; what matters is that no partial result passes for a whole.
    match done.result {
        Ok(()) => {
            assert!(owned(done).chunks(1024).zip(0u8..).all(|(chunk, part)| chunk.iter().all(|&b| b == part)))
        }
        Err(errno) => assert_eq!(errno, Errno(libc::ESPIPE)),
    }
}

#[test]
fn judge_continues_fails_and_retries() {
    let mut f = InFlight {
        op: op(1, OpKind::Write, 0, AlignedBuf::zeroed(4096)),
        transferred: 0,
        retries: 0,
        way: Way::First,
    };
    let direct = Some(TargetOptions { direct: true, is_block_device: true });
    assert_eq!(entry::judge(&mut f, 1000, Some(BUFFERED)), Verdict::Again);
    assert_eq!(f.transferred, 1000);
    f.transferred = 0;
    assert_eq!(entry::judge(&mut f, 1000, direct), Verdict::Again);
    assert_eq!(f.transferred, 512, "direct transfers continue block aligned");
    assert_eq!(entry::judge(&mut f, 100, direct), Verdict::Done(Err(Errno::EIO)), "no block of progress");
    assert_eq!(entry::judge(&mut f, -libc::EINTR, direct), Verdict::Again);
    assert_eq!(entry::judge(&mut f, -libc::ENOSPC, direct), Verdict::Done(Err(Errno::ENOSPC)));
    assert_eq!(entry::judge(&mut f, 4096 - 512, direct), Verdict::Done(Ok(())));
    f.transferred = 0;
    for _ in 0..RETRIES_MAX {
        assert_eq!(entry::judge(&mut f, -libc::EAGAIN, direct), Verdict::Again);
    }
    assert_eq!(entry::judge(&mut f, -libc::EAGAIN, direct), Verdict::Done(Err(Errno(libc::EAGAIN))));
}

#[test]
fn judge_sends_a_refused_discard_the_other_way() {
    let device = Some(TargetOptions { direct: true, is_block_device: true });
    let discard =
        || InFlight { op: bare(1, OpKind::Discard, 0, 4096), transferred: 0, retries: 0, way: Way::First };
    let mut f = discard();
    assert_eq!(entry::judge(&mut f, -libc::EOPNOTSUPP, device), Verdict::Again);
    assert_eq!(f.way, Way::DiscardCommand);
    assert_eq!(entry::judge(&mut f, -libc::EINVAL, device), Verdict::Done(Err(Errno::EOPNOTSUPP)));
    let mut f = discard();
    assert_eq!(
        entry::judge(&mut f, -libc::EOPNOTSUPP, Some(BUFFERED)),
        Verdict::Done(Err(Errno::EOPNOTSUPP))
    );
    let mut f = InFlight { op: bare(1, OpKind::WriteZeroes, 0, 4096), ..discard() };
    assert_eq!(entry::judge(&mut f, -libc::EOPNOTSUPP, device), Verdict::Done(Err(Errno::EOPNOTSUPP)));
}

#[test]
fn more_operations_than_the_queue_holds() {
    let file = temp_file(16 << 20);
    let mut reactor = reactor_on(&file);
    let count = 2000u64;
    for i in 0..count {
        reactor.push(op(i, OpKind::Write, i * 4096, AlignedBuf::from_slice(&[i as u8; 4096])));
    }
    let done = finish(&mut reactor, count as usize);
    assert!(done.iter().all(|d| d.result == Ok(())));
    assert_eq!(done.iter().map(|d| d.token.0).collect::<HashSet<_>>().len(), count as usize);
    let mut block = [0; 4096];
    for i in 0..count {
        file.read_exact_at(&mut block, i * 4096).unwrap();
        assert!(block.iter().all(|&b| b == i as u8), "block {i}");
    }
    assert_eq!(reactor.ops_in_flight(), 0);
}

#[derive(Debug)]
struct Arena {
    bytes: Box<[u8]>,
    dropped: Arc<AtomicU32>,
}

impl SharedMemory for Arena {
    fn base(&self) -> *mut u8 {
        self.bytes.as_ptr().cast_mut()
    }
    fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn drop_drains_in_flight_operations() {
    let file = temp_file(4 << 20);
    let dropped = Arc::new(AtomicU32::new(0));
    let arena: Arc<dyn SharedMemory> =
        Arc::new(Arena { bytes: vec![9; 1 << 20].into_boxed_slice(), dropped: Arc::clone(&dropped) });
    let mut reactor = reactor_on(&file);
    for i in 0..64usize {
        let memory = Memory::Shared { region: Arc::clone(&arena), offset: i * 16384, len: 16384 };
        reactor.push(Op {
            token: Token(i as u64),
            target: Target::Stage,
            kind: OpKind::Write,
            offset: i as u64 * 16384,
            len: 16384,
            memory,
        });
    }
    drop(arena);
    drop(reactor);
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "the memory was given back exactly once");
    let mut bytes = vec![0; 1 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&b| b == 9), "what was pushed was carried out");
}

#[test]
#[should_panic(expected = "lies outside of the region")]
fn memory_outside_of_its_region_is_refused() {
    let file = temp_file(4096);
    let region: Arc<dyn SharedMemory> =
        Arc::new(Arena { bytes: vec![0; 4096].into_boxed_slice(), dropped: Arc::default() });
    let memory = Memory::Shared { region, offset: 4000, len: 512 };
    let op = Op { token: Token(0), target: Target::Stage, kind: OpKind::Read, offset: 0, len: 512, memory };
    reactor_on(&file).push(op);
}

#[test]
fn wakes_merge_and_are_never_lost() {
    let mut reactor = Reactor::new(64).unwrap();
    let waker = reactor.waker();
    for _ in 0..3 {
        for _ in 0..100 {
            waker.wake();
        }
        reactor.submit_and_wait(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(reactor.next_event(), Some(Event::Wake)));
        assert!(reactor.next_event().is_none());
        reactor.submit_and_wait(Some(Duration::from_millis(5))).unwrap();
        assert!(reactor.next_event().is_none(), "merged into one");
    }
    // From another thread while this one waits without limit.
    let handle = std::thread::spawn(move || {
        for _ in 0..200 {
            waker.wake();
            std::thread::yield_now();
        }
    });
    let mut woken = 0;
    while !handle.is_finished() || woken == 0 {
        reactor.submit_and_wait(Some(Duration::from_millis(50))).unwrap();
        while let Some(event) = reactor.next_event() {
            assert!(matches!(event, Event::Wake));
            woken += 1;
        }
    }
    handle.join().unwrap();
    assert!((1..=200).contains(&woken));
}

#[test]
fn a_wake_after_the_end_of_the_reactor_is_harmless() {
    let reactor = Reactor::new(64).unwrap();
    let waker = reactor.waker();
    drop(reactor);
    waker.wake();
    waker.wake();
}

#[test]
fn a_wake_just_before_the_end_of_the_reactor_does_not_hold_it_up() {
    for submitted in [false, true] {
        let mut reactor = Reactor::new(64).unwrap();
        if submitted {
            reactor.submit_and_wait(Some(Duration::ZERO)).unwrap();
        }
        reactor.waker().wake();
        let start = Instant::now();
        drop(reactor);
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }
}

#[test]
fn a_wait_ends_at_its_limit() {
    let mut reactor = Reactor::new(64).unwrap();
    let start = Instant::now();
    reactor.submit_and_wait(Some(Duration::from_millis(30))).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(29));
    assert!(reactor.next_event().is_none());
    reactor.submit_and_wait(Some(Duration::ZERO)).unwrap();
}

#[test]
fn an_unknown_target_is_an_answer_not_a_loss() {
    let mut reactor = Reactor::new(64).unwrap();
    let mut op = op(5, OpKind::Write, 0, AlignedBuf::zeroed(512));
    op.target = Target::Backing(VolumeId(3));
    reactor.push(op);
    reactor.submit_and_wait(None).unwrap();
    let Some(Event::Op(done)) = reactor.next_event() else { panic!("no answer") };
    assert_eq!((done.token, done.result), (Token(5), Err(Errno(libc::EBADF))));
    assert_eq!(owned(done).len(), 512);
}

#[test]
fn targets_come_and_go() {
    let (a, b) = (temp_file(8192), temp_file(8192));
    let mut reactor = reactor_on(&a);
    assert_eq!(
        reactor.register(Target::Stage, Arc::clone(&b), BUFFERED).unwrap_err().kind(),
        ErrorKind::Exists
    );
    reactor.push(op(1, OpKind::Write, 0, AlignedBuf::from_slice(&[1; 512])));
    reactor.unregister(Target::Stage).unwrap();
    reactor.register(Target::Stage, Arc::clone(&b), BUFFERED).unwrap();
    reactor.push(op(2, OpKind::Write, 0, AlignedBuf::from_slice(&[2; 512])));
    assert!(finish(&mut reactor, 2).iter().all(|d| d.result == Ok(())));
    let mut byte = [0];
    a.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
    b.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [2]);
}

#[test]
fn a_write_to_a_read_only_file_fails_and_hands_the_memory_back() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let file = Arc::new(OpenOptions::new().read(true).open(path.path()).unwrap());
    let mut reactor = reactor_on(&file);
    let done = run(&mut reactor, op(1, OpKind::Write, 0, AlignedBuf::from_slice(&[1; 512])));
    assert_eq!(done.result, Err(Errno(libc::EBADF)));
    assert_eq!(owned(done)[..], [1; 512]);
}

#[test]
fn slots_are_reused_with_new_keys() {
    let mut slab = Slab::with_capacity(4);
    let insert = |slab: &mut Slab, token| {
        slab.insert(InFlight {
            op: bare(token, OpKind::Sync, 0, 0),
            transferred: 0,
            retries: 0,
            way: Way::First,
        })
    };
    let a = insert(&mut slab, 1);
    let b = insert(&mut slab, 2);
    assert_eq!(slab.remove(a).op.token, Token(1));
    let c = insert(&mut slab, 3);
    assert_eq!(c as u32, a as u32, "same slot");
    assert_ne!(c, a, "other key");
    assert_eq!((slab.get(b).op.token, slab.get(c).op.token, slab.len()), (Token(2), Token(3), 2));
}

#[test]
fn a_bell_that_overruns_the_completions_is_heard_again() {
    let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut reactor = Reactor::new(64).unwrap();
    reactor.listen_to(bell.as_fd().try_clone_to_owned().unwrap(), ours.into());
    let heard = |reactor: &mut Reactor| {
        let mut count = 0;
        while let Some(event) = reactor.next_event() {
            assert!(matches!(event, Event::Bell { closed: false }), "{event:?}");
            count += 1;
        }
        count
    };
    for round in 0..3 {
        // Many more than the ring has completions for, none of them taken: the kernel gives up polling.
        for _ in 0..5000 {
            bell.write(1).unwrap();
            let _ = reactor.enter(false, None);
        }
        assert!(heard(&mut reactor) >= 256, "round {round} filled the ring");
        // Whatever was overrun is taken, then the bell is silent, then one ring is heard.
        for _ in 0..3 {
            reactor.submit_and_wait(Some(Duration::ZERO)).unwrap();
            heard(&mut reactor);
        }
        bell.write(1).unwrap();
        reactor.submit_and_wait(Some(Duration::from_secs(5))).unwrap();
        assert!(heard(&mut reactor) > 0, "round {round}");
    }
    drop(theirs);
    reactor.submit_and_wait(Some(Duration::from_secs(5))).unwrap();
    assert!(matches!(reactor.next_event(), Some(Event::Bell { closed: true })));
}
