//! A volume's door: turns client requests into claims, copies, lookups and device operations. One per thread; see
//! [`super::request`] for the contract and [`crate::stage::core`] for the life of a write.
//!
//! Life of a read:
//! ```text
//!  lookup (regions pinned) ──▶ all staged: copied out at once
//!     │                   └──▶ some not: one read of the backing over the gaps, staged pieces laid over it, copied out
//!     └─ a region is not in memory yet: waits for it, then looks up again
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::IntoBytes;

use super::gather::Gather;
use super::request::{Door, DoorIo, Request, RequestKind};
use super::shared::{Mailbox, Shared, log_write_of};
use crate::base::checksum::crc64;
use crate::base::mutation::{Mutation, is};
use crate::base::patience::Patience;
use crate::base::units::{align_down, align_up};
use crate::base::{ByteRange, Lsn, VolumeId};
use crate::format::record::{RECORD_HEADER_BYTES, Record, RecordKind};
use crate::format::volume_entry::{AckLevel, OnLogError};
use crate::io::{AlignedBuf, Done, Errno, Memory, Op, OpKind, Target, Token};
use crate::stage::core::{Ack, Claim, DoorId, Outcome};
use crate::stage::ring::Slot;
use crate::stage::serve::{ReadPiece, ReadSource};

/// Most bytes of read buffers in flight on a door; further reads wait for one to finish.
const READ_BYTES_MAX: u64 = 16 << 20;
/// Acknowledgements are taken out after so many records, so that clients of `memory` acks go on while the rest of a large
/// batch is filled.
const REAP_EVERY: u32 = 8;
/// Most buffers kept for reuse.
const SPARE_BUFFERS_MAX: usize = 128;
/// Most bytes of buffers kept for reuse.
const SPARE_BYTES_MAX: usize = 8 << 20;

/// What all doors of a volume share.
#[derive(Debug)]
pub struct VolumeShared {
    /// Id within the stage.
    pub id: VolumeId,
    /// Size; changes when the volume is resized.
    pub size_bytes: AtomicU64,
    /// Ack level.
    pub ack: AckLevel,
    /// Policy on log errors.
    pub on_log_error: OnLogError,
    /// Smallest unit of the backing device.
    pub backing_block_bytes: u32,
    /// Open doors.
    pub doors: AtomicU32,
    /// Completed reads, writes, discards (and write-zeroes), flushes (and FUA writes), bytes read, bytes written.
    pub counters: [AtomicU64; 6],
}

const READS: usize = 0;
const WRITES: usize = 1;
const DISCARDS: usize = 2;
const FLUSHES: usize = 3;
const READ_BYTES: usize = 4;
const WRITE_BYTES: usize = 5;

impl VolumeShared {
    fn count(&self, counter: usize, by: u64) {
        self.counters[counter].fetch_add(by, Ordering::Relaxed);
    }
}

/// A request between its arrival and its completion.
#[derive(Debug, Default)]
enum Job {
    #[default]
    Idle,
    /// A change or a flush, waiting for its place or its acknowledgement.
    Change(Request),
    /// A read that waits for memory: a region, or a buffer.
    ReadWaits(Request),
    /// A read of the backing into the client's memory in flight.
    ReadDirect(Request),
    /// A read of the backing in flight.
    ReadBacking {
        request: Request,
        /// Bytes of the volume that the buffer holds.
        hull: ByteRange,
        pieces: Vec<ReadPiece>,
    },
}

/// A door to a volume.
pub struct VolumeDoor {
    shared: Arc<Shared>,
    volume: Arc<VolumeShared>,
    id: DoorId,
    mailbox: Arc<Mailbox>,
    jobs: Vec<Job>,
    /// Log writes of this door in flight.
    log_writes: u32,
    gather: Gather,
    /// Whether the backing takes clients' memory.
    direct: Patience,
    outcomes: Vec<Outcome>,
    own: Vec<Outcome>,
    pieces: Vec<ReadPiece>,
    spare_pieces: Vec<Vec<ReadPiece>>,
    spare_buffers: Vec<AlignedBuf>,
    spare_bytes: usize,
    read_bytes: u64,
    reads_waiting: VecDeque<u32>,
    /// No more requests come.
    retired: bool,
    /// Records published since outcomes were last taken.
    published: u32,
    /// Timestamp of the current batch: one look at the clock serves all its records.
    batch_ns: Option<u64>,
}

impl VolumeDoor {
    /// Door `id` to `volume`.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        volume: Arc<VolumeShared>,
        id: DoorId,
        mailbox: Arc<Mailbox>,
    ) -> VolumeDoor {
        volume.doors.fetch_add(1, Ordering::Relaxed);
        VolumeDoor {
            shared,
            volume,
            id,
            mailbox,
            jobs: Vec::new(),
            log_writes: 0,
            gather: Gather::default(),
            direct: Patience::default(),
            outcomes: Vec::with_capacity(64),
            own: Vec::with_capacity(64),
            pieces: Vec::with_capacity(16),
            spare_pieces: Vec::new(),
            spare_buffers: Vec::new(),
            spare_bytes: 0,
            read_bytes: 0,
            reads_waiting: VecDeque::new(),
            retired: false,
            published: 0,
            batch_ns: None,
        }
    }

    /// Whether requests or operations of this door are in flight.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.log_writes > 0 || self.jobs.iter().any(|job| !matches!(job, Job::Idle))
    }

    /// Everything up to the first is accepted, up to the second durable.
    #[must_use]
    pub fn progress(&self) -> (Lsn, Lsn) {
        let marks = &self.shared.marks;
        (marks.published(), marks.durable())
    }

    /// Wakes this door once everything up to `lsn` is accepted; `false` if it is already.
    #[must_use]
    pub fn tell_when_accepted(&self, lsn: Lsn) -> bool {
        self.shared.core.lock().tell_when_published(self.id, lsn)
    }

    /// The engine's time, from a fixed instant on.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.shared.clock.monotonic_ns()
    }

    /// Longest transfer in bytes.
    #[must_use]
    pub fn request_bytes_max(&self) -> u32 {
        self.shared.geometry.payload_bytes_max()
    }

    /// Size of the volume now.
    #[must_use]
    pub fn volume_bytes(&self) -> u64 {
        self.volume.size_bytes.load(Ordering::Acquire)
    }

    fn ack(&self, request: &Request) -> Ack {
        Ack {
            door: self.id,
            tag: request.tag,
            durable: (self.volume.ack == AckLevel::Log && !is(Mutation::AckBeforeDurable))
                || (request.fua && !is(Mutation::FuaIsIgnored))
                || request.kind == RequestKind::Flush,
            on_log_error: self.volume.on_log_error,
        }
    }

    /// Whether the log answers this request.
    fn waits_for_log(&self, request: &Request) -> bool {
        request.kind != RequestKind::Read && self.ack(request).durable
    }

    fn check(&self, request: &Request) -> Result<(), Errno> {
        let size = self.volume.size_bytes.load(Ordering::Acquire);
        let inside = request.offset.checked_add(request.len).is_some_and(|end| end <= size);
        let transfers = matches!(request.kind, RequestKind::Read | RequestKind::Write);
        let bounded = !transfers || request.len <= u64::from(self.shared.geometry.payload_bytes_max());
        if inside && bounded { Ok(()) } else { Err(Errno::EINVAL) }
    }

    fn finish<IO: DoorIo>(&mut self, tag: u32, result: Result<(), Errno>, io: &mut IO) {
        let job = std::mem::take(&mut self.jobs[tag as usize]);
        let (Job::Change(request)
        | Job::ReadWaits(request)
        | Job::ReadDirect(request)
        | Job::ReadBacking { request, .. }) = job
        else {
            panic!("request {tag} completed twice");
        };
        if self.waits_for_log(&request) {
            self.gather.answered();
        }
        if result.is_ok() {
            match request.kind {
                RequestKind::Read => {
                    self.volume.count(READS, 1);
                    self.volume.count(READ_BYTES, request.len);
                }
                RequestKind::Write => {
                    self.volume.count(WRITES, 1);
                    self.volume.count(WRITE_BYTES, request.len);
                    self.volume.count(FLUSHES, u64::from(request.fua));
                }
                RequestKind::WriteZeroes | RequestKind::Discard => self.volume.count(DISCARDS, 1),
                RequestKind::Flush => self.volume.count(FLUSHES, 1),
            }
        }
        io.complete(tag, result);
    }

    /// Carries out what the core decided, until it has nothing more to say.
    fn run<IO: DoorIo>(&mut self, io: &mut IO) {
        self.published = 0;
        if self.retired {
            self.shared.kick_background();
            return;
        }
        loop {
            let mut outcomes = std::mem::take(&mut self.outcomes);
            let own = Some((self.id, &*self.mailbox));
            self.log_writes += self.shared.carry_out(own, &mut outcomes, &mut |op| io.submit(op));
            self.outcomes = outcomes;
            if self.outcomes.is_empty() {
                return;
            }
            self.handle_own(io);
        }
    }

    fn handle_own<IO: DoorIo>(&mut self, io: &mut IO) {
        std::mem::swap(&mut self.outcomes, &mut self.own);
        let mut own = std::mem::take(&mut self.own);
        for outcome in own.drain(..) {
            match outcome {
                Outcome::Complete { tag, result, .. } => self.finish(tag, result, io),
                Outcome::Refused { tag, errno, .. } => self.finish(tag, Err(errno), io),
                Outcome::Claimed { tag, slot, .. } => {
                    let Job::Change(request) = self.jobs[tag as usize] else {
                        panic!("a place for a request that did not ask")
                    };
                    self.fill(slot, &request, io);
                }
                Outcome::RetryRead { tag, .. } => self.retry_read(tag, io),
                // Being woken was all that was asked for.
                Outcome::Published { .. } => {}
                Outcome::WriteLog(_) | Outcome::KickBackground => unreachable!("carried out"),
            }
        }
        self.own = own;
    }

    fn change<IO: DoorIo>(&mut self, request: Request, io: &mut IO) {
        let payload_bytes = if request.kind == RequestKind::Write { request.len as u32 } else { 0 };
        self.jobs[request.tag as usize] = Job::Change(request);
        let claim =
            self.shared.core.lock().claim(self.id, request.tag, payload_bytes, self.volume.on_log_error);
        match claim {
            Claim::Slot(slot) => {
                self.fill(slot, &request, io);
                self.published += 1;
                if self.published >= REAP_EVERY {
                    self.run(io);
                }
            }
            Claim::Wait => {}
            Claim::Refused(errno) => self.finish(request.tag, Err(errno), io),
        }
    }

    fn fill<IO: DoorIo>(&mut self, mut slot: Slot, request: &Request, io: &mut IO) {
        let region = slot.region();
        let lsn = slot.lsn();
        io.placed(request.tag, lsn);
        let payload_bytes = slot.payload_bytes();
        let timestamp_ns = *self.batch_ns.get_or_insert_with(|| self.shared.clock.unix_ns());
        let bytes = self.shared.arena.slot_bytes(&mut slot);
        let (header, rest) = bytes.split_at_mut(RECORD_HEADER_BYTES as usize);
        let (payload, padding) = rest.split_at_mut(payload_bytes as usize);
        padding.fill(0);
        let mut kind = match request.kind {
            RequestKind::Write => RecordKind::Write,
            RequestKind::WriteZeroes => RecordKind::WriteZeroes,
            _ => RecordKind::Discard,
        };
        let mut failed = None;
        if kind == RecordKind::Write
            && let Err(errno) = io.fetch(request.tag, 0, payload)
        {
            // The place is claimed, so the log must hold something there: a record without effect.
            payload.fill(0);
            if !is(Mutation::UnfetchedWriteCounts) {
                kind = RecordKind::Void;
            }
            failed = Some(errno);
        }
        let record = Record {
            lsn,
            volume: self.volume.id,
            kind,
            range: ByteRange::at(request.offset, request.len),
            payload_bytes,
            payload_checksum: crc64(payload),
            timestamp_ns,
            incarnation: self.shared.rules.incarnation as u16,
        };
        header.copy_from_slice(record.encode(self.shared.rules.salt, region).as_bytes());
        let ack = failed.is_none().then(|| self.ack(request));
        self.shared.core.lock().publish(slot, record, ack);
        if let Some(errno) = failed {
            self.finish(request.tag, Err(errno), io);
        }
    }

    fn read<IO: DoorIo>(&mut self, request: Request, io: &mut IO) {
        let range = ByteRange::at(request.offset, request.len);
        if self.read_bytes > 0 && self.read_bytes + request.len > READ_BYTES_MAX {
            self.jobs[request.tag as usize] = Job::ReadWaits(request);
            self.reads_waiting.push_back(request.tag);
            return;
        }
        self.jobs[request.tag as usize] = Job::ReadWaits(request);
        let mut pieces = std::mem::take(&mut self.pieces);
        let found = {
            let mut core = self.shared.core.lock();
            if core.is_damaged() && core.cold_regions() > 0 && core.is_staged(self.volume.id) {
                // Which bytes are behind the damage cannot be told, so none are given out.
                None
            } else {
                Some(core.read(
                    &self.shared.arena,
                    (self.id, request.tag),
                    self.volume.id,
                    range,
                    &mut pieces,
                ))
            }
        };
        match found {
            None => self.finish(request.tag, Err(Errno::EIO), io),
            Some(false) => {}
            Some(true) => self.read_pieces(request, &mut pieces, io),
        }
        self.pieces = pieces;
    }

    fn read_pieces<IO: DoorIo>(&mut self, request: Request, pieces: &mut [ReadPiece], io: &mut IO) {
        let range = ByteRange::at(request.offset, request.len);
        if let [ReadPiece { source: ReadSource::Backing, .. }] = pieces[..]
            && let Some(memory) = self.direct_memory(&request, io)
        {
            self.jobs[request.tag as usize] = Job::ReadDirect(request);
            return io.submit(self.read_of_backing(request.tag, range, memory));
        }
        if let [ReadPiece { source: ReadSource::Stage { region, offset }, .. }] = pieces[..] {
            let bytes = self.shared.arena.bytes(region, offset, offset + request.len as u32);
            let result = io.deliver(request.tag, 0, bytes);
            self.shared.arena.unpin(region);
            self.finish(request.tag, result, io);
            return;
        }
        self.read_backing(request, pieces, io);
    }

    /// The client's memory, if the backing can be read straight into it.
    fn direct_memory<IO: DoorIo>(&mut self, request: &Request, io: &IO) -> Option<Memory> {
        let block = u64::from(self.volume.backing_block_bytes);
        let aligned = request.offset.is_multiple_of(block) && request.len.is_multiple_of(block);
        if aligned && self.direct.attempts() { io.client_memory(request.tag) } else { None }
    }

    fn read_of_backing(&self, tag: u32, range: ByteRange, memory: Memory) -> Op {
        Op {
            token: Token(u64::from(tag)),
            target: Target::Backing(self.volume.id),
            kind: OpKind::Read,
            offset: range.start,
            len: range.len(),
            memory,
        }
    }

    /// Reads what is not staged from the backing, and lays what is over it.
    fn read_backing<IO: DoorIo>(&mut self, request: Request, pieces: &mut [ReadPiece], io: &mut IO) {
        let range = ByteRange::at(request.offset, request.len);
        let mut gaps = pieces.iter().filter(|p| p.source == ReadSource::Backing);
        let Some(first) = gaps.next() else {
            let mut buf = self.take_buffer(range.len() as usize);
            self.lay_over(pieces, range, &mut buf);
            let result = io.deliver(request.tag, 0, &buf);
            self.give_buffer(buf);
            self.finish(request.tag, result, io);
            return;
        };
        let block = u64::from(self.volume.backing_block_bytes);
        let end = gaps.next_back().unwrap_or(first).range.end;
        let whole = ByteRange { start: align_down(range.start, block), end: align_up(range.end, block) };
        let hull = ByteRange { start: align_down(first.range.start, block), end: align_up(end, block) };
        // One buffer serves the read and the result, so it spans the request even where only its middle is read.
        let hull = if pieces.len() == 1 { hull } else { whole };
        let buf = self.take_buffer(hull.len() as usize);
        self.read_bytes += hull.len();
        let mut kept = self.spare_pieces.pop().unwrap_or_default();
        kept.clear();
        kept.extend_from_slice(pieces);
        self.jobs[request.tag as usize] = Job::ReadBacking { request, hull, pieces: kept };
        io.submit(self.read_of_backing(request.tag, hull, Memory::Owned(buf)));
    }

    fn read_done<IO: DoorIo>(&mut self, tag: u32, result: Result<(), Errno>, memory: Memory, io: &mut IO) {
        if let Job::ReadDirect(request) = self.jobs[tag as usize] {
            if result.is_ok() {
                self.direct.paid();
                return self.finish(tag, result, io);
            }
            // The device may not like the client's memory; what else is wrong shows again. At least the next read is not
            // direct, which is this one unless it has to wait for a buffer.
            self.direct.in_vain();
            return self.read(request, io);
        }
        let Job::ReadBacking { request, hull, pieces } = &mut self.jobs[tag as usize] else {
            panic!("no read of the backing is in flight for request {tag}")
        };
        let (request, hull, mut pieces) = (*request, *hull, std::mem::take(pieces));
        let Memory::Owned(mut buf) = memory else { panic!("reads of the backing own their buffer") };
        self.read_bytes -= hull.len();
        self.lay_over(&pieces, hull, &mut buf);
        let from = (request.offset - hull.start) as usize;
        let result = result.and_then(|()| io.deliver(tag, 0, &buf[from..from + request.len as usize]));
        pieces.clear();
        self.spare_pieces.push(pieces);
        self.give_buffer(buf);
        self.finish(tag, result, io);
        while let Some(&waiting) = self.reads_waiting.front() {
            let Job::ReadWaits(request) = self.jobs[waiting as usize] else { panic!("a read that waits") };
            if self.read_bytes > 0 && self.read_bytes + request.len > READ_BYTES_MAX {
                break;
            }
            self.reads_waiting.pop_front();
            self.read(request, io);
        }
    }

    fn retry_read<IO: DoorIo>(&mut self, tag: u32, io: &mut IO) {
        let Job::ReadWaits(request) = self.jobs[tag as usize] else { panic!("a read that waits") };
        self.read(request, io);
    }

    /// Copies staged pieces and zeroes to their place in `buf`, which holds the bytes of `range`, and unpins them.
    fn lay_over(&self, pieces: &[ReadPiece], range: ByteRange, buf: &mut [u8]) {
        for piece in pieces {
            let from = (piece.range.start - range.start) as usize;
            let into = || from..from + piece.range.len() as usize;
            match piece.source {
                ReadSource::Backing => {}
                ReadSource::Zero => buf[into()].fill(0),
                ReadSource::Stage { region, offset } => {
                    let bytes = self.shared.arena.bytes(region, offset, offset + piece.range.len() as u32);
                    buf[into()].copy_from_slice(bytes);
                    self.shared.arena.unpin(region);
                }
            }
        }
    }

    fn take_buffer(&mut self, len: usize) -> AlignedBuf {
        // A buffer of the same length costs nothing; another would be zeroed where it grows.
        match self.spare_buffers.iter().rposition(|buf| buf.len() == len) {
            Some(at) => {
                self.spare_bytes -= len;
                self.spare_buffers.swap_remove(at)
            }
            None => AlignedBuf::zeroed(len),
        }
    }

    fn give_buffer(&mut self, buf: AlignedBuf) {
        while !self.spare_buffers.is_empty()
            && (self.spare_buffers.len() >= SPARE_BUFFERS_MAX
                || self.spare_bytes + buf.len() > SPARE_BYTES_MAX)
        {
            self.spare_bytes -= self.spare_buffers.swap_remove(0).len();
        }
        self.spare_bytes += buf.len();
        self.spare_buffers.push(buf);
    }
}

impl Drop for VolumeDoor {
    fn drop(&mut self) {
        self.volume.doors.fetch_sub(1, Ordering::Relaxed);
        self.shared.remove_door(self.id);
    }
}

impl<IO: DoorIo> Door<IO> for VolumeDoor {
    fn request(&mut self, request: Request, io: &mut IO) {
        let tag = request.tag as usize;
        if tag >= self.jobs.len() {
            self.jobs.resize_with(tag + 1, Job::default);
        }
        assert!(matches!(self.jobs[tag], Job::Idle), "tags are unique among the requests in flight");
        self.jobs[tag] = Job::Change(request);
        if self.waits_for_log(&request) {
            self.gather.arrived();
        }
        if let Err(errno) = self.check(&request) {
            self.finish(request.tag, Err(errno), io);
            return;
        }
        match request.kind {
            RequestKind::Flush => {
                let ack = self.ack(&request);
                self.shared.core.lock().flush(ack);
            }
            _ if request.len == 0 => self.finish(request.tag, Ok(()), io),
            RequestKind::Read => self.read(request, io),
            RequestKind::Write | RequestKind::WriteZeroes | RequestKind::Discard => self.change(request, io),
        }
    }

    fn op_done(&mut self, done: Done, io: &mut IO) {
        if let Some(group_seq) = log_write_of(done.token) {
            self.log_writes -= 1;
            let now_ns = self.shared.clock.monotonic_ns();
            self.shared.core.lock().log_written(group_seq, done.result, now_ns);
            self.run(io);
        } else {
            self.read_done(done.token.0 as u32, done.result, done.memory, io);
        }
    }

    fn woken(&mut self, io: &mut IO) {
        if self.retired {
            self.mailbox.take(&mut self.outcomes);
            self.handle_own(io);
        }
        self.run(io);
    }

    fn batch_end(&mut self, io: &mut IO) {
        self.batch_ns = None;
        if !self.retired {
            self.gather.batch_ended();
            let now_ns = self.shared.clock.monotonic_ns();
            self.shared.core.lock().pump_commit(now_ns);
            self.run(io);
        }
    }

    fn waits_for_more(&mut self) -> bool {
        if self.retired || !self.gather.is_possible() {
            return false;
        }
        let now_ns = self.shared.clock.monotonic_ns();
        let due = self.shared.core.lock().commit_is_due(now_ns);
        due.is_some_and(|write_ns| self.gather.waits(now_ns, write_ns))
    }

    fn retire(&mut self) {
        self.retired = true;
    }
}
