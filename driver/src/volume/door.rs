//! A volume's door: turns client requests into claims, copies, lookups and device operations. One per thread; see
//! [`super::request`] for the contract and [`crate::stage::core`] for the life of a write.
//!
//! Life of a read:
//! ```text
//!  lookup (regions pinned) ──▶ all staged: copied out at once
//!     │                   └──▶ some not: one read of the backing over the gaps, staged pieces laid over it, copied out
//!     └─ a region is not in memory, or a record is not published yet: waits for it, then looks up again
//! ```

mod changes;
mod reads;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use self::changes::Changes;
use super::gather::Gather;
use super::request::{Door, DoorIo, Request, RequestKind};
use super::shared::{Mailbox, Shared, log_write_of};
use crate::base::mutation::{Mutation, is};
use crate::base::patience::Patience;
use crate::base::{ByteRange, Lsn, VolumeId};
use crate::format::volume_entry::{AckLevel, OnLogError};
use crate::io::{AlignedBuf, Done, Errno};
use crate::stage::core::{Ack, Core, DoorId, Outcome};
use crate::stage::serve::ReadPiece;
use crate::stage::volume_index::VolumeIndex;

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
    /// A read that waits for a region, a buffer, or a record to be published.
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

/// What the core is asked when what it decided is taken out.
#[derive(Clone, Copy)]
enum Ask {
    Nothing,
    /// To begin the log writes that are due.
    Commit {
        now_ns: u64,
    },
    /// To take the end of a log write.
    Written {
        group_seq: u64,
        result: Result<(), Errno>,
        now_ns: u64,
    },
}

/// A door to a volume.
pub struct VolumeDoor {
    shared: Arc<Shared>,
    volume: Arc<VolumeShared>,
    id: DoorId,
    mailbox: Arc<Mailbox>,
    index: Arc<VolumeIndex>,
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
    changes: Changes,
    /// The core was told something since it was last asked what is due: at the end of the batch it is.
    unheard: bool,
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
        let index = shared.core.lock().index(volume.id).expect("a volume that has doors is indexed");
        VolumeDoor {
            shared,
            volume,
            id,
            mailbox,
            index,
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
            changes: Changes::default(),
            unheard: false,
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

    /// Hands what is filled over to the core, asks what is to be asked, and carries out what that decided, until it has
    /// nothing more to say.
    fn run<IO: DoorIo>(&mut self, io: &mut IO, ask: Ask) {
        let mut written = match ask {
            Ask::Written { group_seq, result, now_ns } => Some((group_seq, result, now_ns)),
            Ask::Nothing | Ask::Commit { .. } => None,
        };
        let mut decide = |core: &mut Core, changes: &mut Changes| {
            changes.publish(core);
            if let Some((group_seq, result, now_ns)) = written.take() {
                core.log_written(group_seq, result, now_ns);
            }
            // Every time: what was published just now may make a group due.
            if let Ask::Commit { now_ns } = ask {
                core.pump_commit(now_ns);
            }
        };
        self.unheard &= !matches!(ask, Ask::Commit { .. });
        if self.retired {
            decide(&mut self.shared.core.lock(), &mut self.changes);
            self.answer_failed(io);
            self.shared.kick_background();
            return;
        }
        loop {
            let mut outcomes = std::mem::take(&mut self.outcomes);
            let changes = &mut self.changes;
            let own = Some((self.id, &*self.mailbox));
            let mut decide = |core: &mut Core| decide(core, changes);
            self.log_writes +=
                self.shared.carry_out(own, &mut outcomes, &mut decide, &mut |op| io.submit(op));
            self.outcomes = outcomes;
            self.answer_failed(io);
            if self.outcomes.is_empty() || !self.handle_own(io) {
                return;
            }
        }
    }

    /// Whether changes have arrived that have no place yet.
    pub(crate) fn has_gathered(&self) -> bool {
        self.changes.have_arrived()
    }

    /// Has what was asked so far placed, filled and published, and not only at the end of the batch.
    pub(crate) fn settle<IO: DoorIo>(&mut self, io: &mut IO) {
        self.take_in(io);
        self.run(io, Ask::Nothing);
    }

    /// Carries out what the core decided for this door. Returns whether the core may have more to say after it.
    fn handle_own<IO: DoorIo>(&mut self, io: &mut IO) -> bool {
        std::mem::swap(&mut self.outcomes, &mut self.own);
        let mut own = std::mem::take(&mut self.own);
        let mut core_is_asked = false;
        for outcome in own.drain(..) {
            match outcome {
                Outcome::Complete { tag, result, .. } => self.finish(tag, result, io),
                Outcome::Refused { tag, errno, .. } => self.finish(tag, Err(errno), io),
                Outcome::Claimed { tag, slot, .. } => {
                    let Job::Change(request) = self.jobs[tag as usize] else {
                        panic!("a place for a request that did not ask")
                    };
                    self.fill(slot, &request, io);
                    // A read may come next, and publishes what there is.
                    self.index_filled();
                    core_is_asked = true;
                }
                Outcome::RetryRead { tag, .. } => {
                    self.retry_read(tag, io);
                    // A region may have to be asked for, or claims that waited for this read go on.
                    core_is_asked |= self.unheard;
                }
                // Being woken was all that was asked for.
                Outcome::Published { .. } => {}
                Outcome::WriteLog(_) | Outcome::KickBackground => unreachable!("carried out"),
            }
        }
        self.own = own;
        core_is_asked
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
                self.take_in(io);
                let mut core = self.shared.core.lock();
                self.changes.publish(&mut core);
                core.flush(ack);
                self.unheard = true;
            }
            _ if request.len == 0 => self.finish(request.tag, Ok(()), io),
            RequestKind::Read => {
                self.take_in(io);
                self.read(request, io);
            }
            RequestKind::Write | RequestKind::WriteZeroes | RequestKind::Discard => self.change(request, io),
        }
    }

    fn op_done(&mut self, done: Done, io: &mut IO) {
        if let Some(group_seq) = log_write_of(done.token) {
            self.log_writes -= 1;
            let now_ns = self.shared.clock.monotonic_ns();
            self.unheard = true;
            self.run(io, Ask::Written { group_seq, result: done.result, now_ns });
        } else {
            self.read_done(done.token.0 as u32, done.result, done.memory, io);
        }
    }

    fn woken(&mut self, io: &mut IO) {
        if self.retired {
            self.mailbox.take(&mut self.outcomes);
            self.handle_own(io);
        }
        self.unheard = true;
        self.run(io, Ask::Nothing);
    }

    fn batch_end(&mut self, io: &mut IO) {
        self.take_in(io);
        if !self.retired {
            self.gather.batch_ended();
            // Reads alone leave nothing to decide, and whoever makes a group due looks after it.
            if self.unheard {
                let now_ns = self.shared.clock.monotonic_ns();
                self.run(io, Ask::Commit { now_ns });
            }
        }
        // What got its place just now belongs to this batch, too.
        self.batch_ns = None;
    }

    fn waits_for_more(&mut self, io: &mut IO) -> bool {
        if self.retired || !self.gather.is_possible() {
            return false;
        }
        self.take_in(io);
        if !self.unheard {
            // What may be due is not this door's, and its own look after it.
            return false;
        }
        let now_ns = self.shared.clock.monotonic_ns();
        let due = {
            let mut core = self.shared.core.lock();
            self.changes.publish(&mut core);
            core.commit_is_due(now_ns)
        };
        due.is_some_and(|write_ns| self.gather.waits(now_ns, write_ns))
    }

    fn retire(&mut self) {
        assert!(self.changes.is_empty(), "a round is over");
        self.retired = true;
    }
}
