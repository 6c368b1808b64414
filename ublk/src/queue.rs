//! A queue's thread: takes requests from the kernel, feeds them to a door, hands completions back.
//!
//! One round is: wait; feed every event at hand to the door, and look again if it waits for more; end the batch; submit,
//! with the same system call that waits for the next round, everything that was completed and started meanwhile. Without
//! requests the thread sleeps, after it has looked for some for a while ([`Linger`]).
//!
//! A queue thread that cannot go on takes the whole process with it: clients then see a pause until a new server
//! recovers the device, where a device with one dead queue would hang for ever.

#![expect(unsafe_code, reason = "commands that name the tags' buffers")]

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use io_uring::opcode;
use tidegate_driver::base::abort::AbortOnPanic;
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::io::uring::{Event, FileSlot, Linger, RAW, Reactor, Waker};
use tidegate_driver::io::{Errno, Memory, Op};
use tidegate_driver::volume::{Door, DoorIo, Request, RequestKind, Wake};
use zerocopy::IntoBytes;

use crate::memory::{IoDescs, TagBuffers};
use crate::sys::{self, IoCmd, IoDesc};
use crate::tag::{TagEvent, TagState};

/// So many completed requests are handed to the kernel in the middle of a round: the client works on them while the rest of
/// the round is served.
const TELL_EVERY: u32 = 8;

/// Makes the doors of a device: one for each queue, on the queue's thread.
pub trait DoorFactory: Send + Sync {
    /// What serves a queue's requests.
    type Door: Door<QueueIo>;

    /// Makes the door of `queue`. Registers the files that the door works on with the queue's `reactor`; `waker` is for
    /// whoever has something to hand to the door.
    fn open(&self, queue: u16, waker: Arc<dyn Wake>, reactor: &mut Reactor) -> Result<Self::Door>;
}

/// What a queue's thread needs to know.
pub(crate) struct QueueSetup {
    pub device_id: u32,
    pub queue: u16,
    pub depth: u16,
    pub max_io_bytes: u32,
    pub user_copy: bool,
    /// The kernel puts the clients' memory into the ring's table of buffers.
    pub client_memory: bool,
    /// For so long news are looked for before the thread sleeps.
    pub poll: Duration,
    /// Processors to run on; all zero: any.
    pub cpus: [u64; 16],
    /// Set (and the queue woken) when the device will not start after all.
    pub give_up: Arc<AtomicBool>,
}

/// What a queue's thread is told to do next, once all queues have done what was before. Everything that may well fail
/// (memory, rings, doors) is done before the first step: a device whose recovery has begun may be lost if that is not
/// brought to its end.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Use this char device.
    Open(Arc<File>),
    /// Fetch every tag, then serve.
    Fetch,
}

#[derive(Clone, Copy, Debug)]
struct Tag {
    state: TagState,
    kind: RequestKind,
    /// Bytes of payload: 0 for requests without.
    payload: u32,
    /// Its client's memory is in the table of buffers.
    in_table: bool,
}

/// How payload moves.
#[derive(Debug)]
enum Copying {
    /// pread and pwrite on the char device, straight from and to the client's pages.
    User,
    /// The kernel copies between the client's pages and the tag's buffer.
    Plain(TagBuffers),
}

/// The door's view of its queue.
pub struct QueueIo {
    reactor: Reactor,
    cdev: Arc<File>,
    slot: FileSlot,
    queue: u16,
    descs: IoDescs,
    copying: Copying,
    client_memory: bool,
    tags: Box<[Tag]>,
    /// Tags that the kernel may still use.
    tags_alive: u32,
    /// Requests completed since the kernel was last told.
    completed: u32,
    /// Events that came while the queue was being set up.
    early: VecDeque<Event>,
}

impl QueueIo {
    fn new(setup: &QueueSetup, prepared: Prepared, cdev: Arc<File>) -> Result<QueueIo> {
        let Prepared { mut reactor, copying } = prepared;
        let slot = reactor.register_file(cdev.as_fd())?;
        let idle = Tag { state: TagState::Idle, kind: RequestKind::Flush, payload: 0, in_table: false };
        Ok(QueueIo {
            slot,
            queue: setup.queue,
            descs: IoDescs::map(&*cdev, setup.queue, setup.depth)?,
            reactor,
            cdev,
            copying,
            client_memory: setup.client_memory,
            tags: vec![idle; usize::from(setup.depth)].into_boxed_slice(),
            tags_alive: u32::from(setup.depth),
            completed: 0,
            early: VecDeque::new(),
        })
    }

    /// Queue number.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// The thread's reactor, to register further targets.
    pub fn reactor(&mut self) -> &mut Reactor {
        &mut self.reactor
    }

    fn next_event(&mut self) -> Option<Event> {
        if self.early.is_empty() { self.reactor.next_event() } else { self.early.pop_front() }
    }

    fn fetch_all(&mut self) {
        for tag in 0..self.tags.len() as u16 {
            self.advance(tag, TagEvent::Fetch);
            self.command(sys::IO_FETCH_REQ, tag, 0);
        }
    }

    /// Moves the tag along its state machine; breaking it is a bug of ours.
    fn advance(&mut self, tag: u16, event: TagEvent) {
        let state = &mut self.tags[usize::from(tag)].state;
        match state.after(event) {
            Some(next) => *state = next,
            None => panic!("{event:?} of tag {tag} of queue {} while {state:?}", self.queue),
        }
    }

    fn command(&mut self, op: u32, tag: u16, result: i32) {
        let addr = match &self.copying {
            Copying::User => 0,
            Copying::Plain(buffers) => buffers.address(tag),
        };
        let mut cmd = [0; 16];
        cmd.copy_from_slice(IoCmd { q_id: self.queue, tag, result, addr }.as_bytes());
        let entry = opcode::UringCmd16::new(self.slot.fixed(), op)
            .cmd(cmd)
            .addr(self.client_memory.then(|| sys::auto_buf_address(tag)))
            .build()
            .user_data(RAW | u64::from(tag));
        // SAFETY: the tag's buffer, if any, stays mapped until the queue ends, which it does after the kernel gave the
        // tag up (`tags_alive`), or without the device ever having been started.
        unsafe { self.reactor.push_raw(&entry) };
    }

    /// The kernel answered for a tag: its next request, or `None` when there is none to feed.
    fn answered(&mut self, user_data: u64, result: i32) -> Result<Option<Request>> {
        let tag = (user_data & !RAW) as u16;
        let known = usize::from(tag) < self.tags.len() && user_data & !RAW <= u64::from(u16::MAX);
        let event = match result {
            sys::IO_RES_OK => TagEvent::Request,
            sys::IO_RES_ABORT => TagEvent::Abort,
            _ => {
                return Err(Error::io(
                    format!("the kernel refused the command for tag {tag} of ublk queue {}", self.queue),
                    io_error(result),
                ));
            }
        };
        if !known || self.tags[usize::from(tag)].state.after(event).is_none() {
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "the kernel answered {result} for tag {tag} of ublk queue {}, which it does not have",
                    self.queue
                ),
            ));
        }
        self.advance(tag, event);
        if event == TagEvent::Abort {
            self.tags_alive -= 1;
            return Ok(None);
        }
        let desc = self.descs.get(tag);
        let Some(request) = request_of(tag, &desc) else {
            tracing::warn!(op = desc.op(), tag, "request of a kind that was not offered");
            self.commit(tag, -libc::EOPNOTSUPP);
            return Ok(None);
        };
        let entry = &mut self.tags[usize::from(tag)];
        entry.kind = request.kind;
        entry.payload = match request.kind {
            RequestKind::Read | RequestKind::Write => request.len as u32,
            RequestKind::WriteZeroes | RequestKind::Discard | RequestKind::Flush => 0,
        };
        entry.in_table = self.client_memory && desc.op_flags & sys::IO_F_NEED_REG_BUF == 0;
        Ok(Some(request))
    }

    fn commit(&mut self, tag: u16, result: i32) {
        self.advance(tag, TagEvent::Commit);
        self.completed += 1;
        self.command(sys::IO_COMMIT_AND_FETCH_REQ, tag, result);
    }

    /// Panics unless the door may move these bytes now: it owns the request and stays within it.
    fn assert_payload(&self, tag: u32, kind: RequestKind, offset: u32, len: usize) -> u16 {
        let entry = &self.tags[tag as usize];
        assert!(
            entry.state == TagState::Owned
                && entry.kind == kind
                && u64::from(offset) + len as u64 <= u64::from(entry.payload),
            "{offset}+{len} is no payload of tag {tag}: {entry:?}"
        );
        tag as u16
    }
}

/// A request as the door sees it; `None` for a kind that the device does not offer.
fn request_of(tag: u16, desc: &IoDesc) -> Option<Request> {
    let kind = match desc.op() {
        sys::IO_OP_READ => RequestKind::Read,
        sys::IO_OP_WRITE => RequestKind::Write,
        sys::IO_OP_FLUSH => RequestKind::Flush,
        sys::IO_OP_DISCARD => RequestKind::Discard,
        sys::IO_OP_WRITE_ZEROES => RequestKind::WriteZeroes,
        _ => return None,
    };
    let (offset, len) = match kind {
        RequestKind::Flush => (0, 0),
        _ => (desc.start_sector.checked_mul(512)?, u64::from(desc.nr_sectors) * 512),
    };
    if matches!(kind, RequestKind::Read | RequestKind::Write) && len > u64::from(sys::IO_BYTES_MAX) {
        return None;
    }
    Some(Request { tag: u32::from(tag), kind, offset, len, fua: desc.op_flags & sys::IO_F_FUA != 0 })
}

impl DoorIo for QueueIo {
    fn submit(&mut self, op: Op) {
        self.reactor.push(op);
    }

    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> std::result::Result<(), Errno> {
        let tag = self.assert_payload(tag, RequestKind::Write, offset, into.len());
        match &self.copying {
            Copying::User => {
                self.cdev.read_exact_at(into, sys::user_copy_position(self.queue, tag, offset)).map_err(errno)
            }
            Copying::Plain(buffers) => {
                buffers.copy_from(tag, offset as usize, into);
                Ok(())
            }
        }
    }

    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> std::result::Result<(), Errno> {
        let tag = self.assert_payload(tag, RequestKind::Read, offset, from.len());
        match &mut self.copying {
            Copying::User => {
                self.cdev.write_all_at(from, sys::user_copy_position(self.queue, tag, offset)).map_err(errno)
            }
            Copying::Plain(buffers) => {
                buffers.copy_to(tag, offset as usize, from);
                Ok(())
            }
        }
    }

    fn client_memory(&self, tag: u32) -> Option<Memory> {
        let entry = &self.tags[tag as usize];
        entry.in_table.then_some(Memory::Client { index: tag as u16, len: entry.payload as usize })
    }

    fn complete(&mut self, tag: u32, result: std::result::Result<(), Errno>) {
        let result = match result {
            // All or nothing; requests without payload report none.
            Ok(()) => self.tags[tag as usize].payload as i32,
            Err(Errno(errno)) if (1..4096).contains(&errno) => -errno,
            Err(_) => -libc::EIO,
        };
        self.commit(tag as u16, result);
    }
}

fn io_error(result: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(-result)
}

fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno)
}

/// What a queue has before it has its device.
struct Prepared {
    reactor: Reactor,
    copying: Copying,
}

/// The thread's body. Reports through `ready` when it is prepared and after each of the `steps`, or that it failed; then
/// serves until the kernel gives every tag up. Ends if there is no next step.
pub(crate) fn run<F: DoorFactory>(
    setup: QueueSetup,
    factory: &F,
    steps: &Receiver<Step>,
    ready: &SyncSender<Result<Waker>>,
) {
    let _abort = AbortOnPanic;
    let (mut io, mut door) = match start(&setup, factory, steps, ready) {
        Ok(Some(started)) => started,
        Ok(None) => return,
        Err(e) => {
            let _ = ready
                .send(Err(e.within(format!("queue {} of ublk device {}", setup.queue, setup.device_id))));
            return;
        }
    };
    let _ = ready.send(Ok(io.reactor.waker()));
    if let Err(e) = serve(&mut io, &mut door, &setup.give_up, setup.poll) {
        tracing::error!(
            device = setup.device_id,
            queue = setup.queue,
            "{}; aborting, to be recovered",
            e.report()
        );
        // To whoever watches; that nobody can be told is no reason to panic.
        let _ = writeln!(
            std::io::stderr(),
            "tidegate: ublk device {} queue {}: {}; aborting",
            setup.device_id,
            setup.queue,
            e.report()
        );
        std::process::abort();
    }
    // The door may own what operations in flight belong to: none are left (see `serve`). The ring goes before the
    // buffers that its commands name: `reactor` is the first field of `io`.
    drop(door);
    drop(io);
}

/// Everything up to the first request; `None` if the device is given up.
fn start<F: DoorFactory>(
    setup: &QueueSetup,
    factory: &F,
    steps: &Receiver<Step>,
    ready: &SyncSender<Result<Waker>>,
) -> Result<Option<(QueueIo, F::Door)>> {
    let (prepared, door) = prepare(setup, factory)?;
    let waker = prepared.reactor.waker();
    let _ = ready.send(Ok(waker.clone()));
    let Ok(Step::Open(cdev)) = steps.recv() else { return Ok(None) };
    let mut io = QueueIo::new(setup, prepared, cdev)?;
    let _ = ready.send(Ok(waker));
    let Ok(Step::Fetch) = steps.recv() else { return Ok(None) };
    fetch(&mut io)?;
    Ok(Some((io, door)))
}

fn prepare<F: DoorFactory>(setup: &QueueSetup, factory: &F) -> Result<(Prepared, F::Door)> {
    set_cpus(&setup.cpus);
    // Inherited from the process if that is hardened; harmless to repeat, and not allowed everywhere.
    let _ = crate::process::set_io_flusher();
    // As many device operations as requests, beside the commands for the tags.
    let mut reactor = Reactor::new(u32::from(setup.depth) * 2)?;
    let waker: Arc<dyn Wake> = Arc::new(reactor.waker());
    if setup.client_memory {
        reactor.reserve_buffers(u32::from(setup.depth))?;
    }
    let copying = if setup.user_copy {
        Copying::User
    } else {
        Copying::Plain(TagBuffers::new(setup.depth, setup.max_io_bytes)?)
    };
    let door = factory.open(setup.queue, waker, &mut reactor)?;
    Ok((Prepared { reactor, copying }, door))
}

fn fetch(io: &mut QueueIo) -> Result<()> {
    io.fetch_all();
    // Commands that the kernel refuses are answered at once, and START would wait for them for ever; accepted ones are
    // answered by the first request.
    io.reactor.submit_and_wait(Some(Duration::ZERO))?;
    while let Some(event) = io.reactor.next_event() {
        if let Event::Raw { result, .. } = event
            && result < 0
        {
            return Err(Error::io("the kernel refuses to hand requests out", io_error(result)));
        }
        io.early.push_back(event);
    }
    Ok(())
}

fn serve<D: Door<QueueIo>>(
    io: &mut QueueIo,
    door: &mut D,
    give_up: &AtomicBool,
    poll: Duration,
) -> Result<()> {
    let mut given_up = false;
    let mut linger = Linger::new(poll);
    loop {
        while let Some(event) = io.next_event() {
            match event {
                // Cancelled, or a request that the next server gets again.
                Event::Raw { .. } if given_up => {}
                Event::Raw { user_data, result, .. } => {
                    if let Some(request) = io.answered(user_data, result)? {
                        door.request(request, io);
                    }
                }
                Event::Op(done) => door.op_done(done, io),
                Event::Bell { .. } => {}
                Event::Wake => {
                    given_up |= give_up.load(Ordering::Acquire);
                    door.woken(io);
                }
            }
            if io.completed >= TELL_EVERY {
                // Telling the kernel brings new requests, so a round may have no end: what waits for one gets its turn here.
                door.batch_end(io);
                io.completed = 0;
                io.reactor.submit_and_wait(Some(Duration::ZERO))?;
            }
        }
        io.completed = 0;
        if !given_up && door.waits_for_more(io) {
            io.reactor.submit_and_wait(Some(Duration::ZERO))?;
            continue;
        }
        door.batch_end(io);
        // A door works for others too: it may have begun to write the log for all of them, and they wait for its end.
        if given_up || io.tags_alive == 0 {
            if io.reactor.ops_in_flight() == 0 {
                return Ok(());
            }
            door.retire();
        }
        if !linger.look(&mut io.reactor)? {
            io.reactor.submit_and_wait(None)?;
        }
    }
}

/// Best effort: a queue runs anywhere if it must.
fn set_cpus(cpus: &[u64; 16]) {
    let mut set = nix::sched::CpuSet::new();
    let mut any = false;
    for cpu in 0..nix::sched::CpuSet::count().min(cpus.len() * 64) {
        if cpus[cpu / 64] & (1 << (cpu % 64)) != 0 {
            any |= set.set(cpu).is_ok();
        }
    }
    if any {
        let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_in_bytes() {
        let desc = IoDesc {
            op_flags: u32::from(sys::IO_OP_WRITE) | sys::IO_F_FUA | 1 << 8,
            nr_sectors: 8,
            start_sector: 1 << 40,
            addr: 0,
        };
        let expected = Request { tag: 5, kind: RequestKind::Write, offset: 1 << 49, len: 4096, fua: true };
        assert_eq!(request_of(5, &desc), Some(expected));
        let discard = IoDesc { op_flags: u32::from(sys::IO_OP_DISCARD), nr_sectors: u32::MAX, ..desc };
        assert_eq!(request_of(0, &discard).unwrap().len, u64::from(u32::MAX) * 512);
        let flush = IoDesc { op_flags: u32::from(sys::IO_OP_FLUSH), ..desc };
        assert_eq!((request_of(0, &flush).unwrap().offset, request_of(0, &flush).unwrap().len), (0, 0));
    }

    #[test]
    fn what_was_not_offered_is_not_a_request() {
        for op in [4, 10, 18, 255] {
            assert_eq!(request_of(0, &IoDesc { op_flags: op, ..IoDesc::default() }), None);
        }
        let too_far = IoDesc { start_sector: u64::MAX / 2, nr_sectors: 1, ..IoDesc::default() };
        assert_eq!(request_of(0, &too_far), None);
        let too_long = IoDesc { nr_sectors: u32::MAX, ..IoDesc::default() };
        assert_eq!(request_of(0, &too_long), None);
    }
}
