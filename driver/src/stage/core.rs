//! The core: every decision about claims, publishing, commit, acknowledgement, reads and reclaim, in one value without
//! I/O. The running engine keeps it behind one lock that is held for decisions only; the simulator owns it directly.
//!
//! Decisions come out as [`Outcome`]s, gathered in a list that the caller takes with [`Core::take_outcomes`] and carries
//! out after it has let go of the lock.
//!
//! Life of a write:
//! ```text
//!  claim ──▶ Slot (LSN fixed) ──▶ filled and indexed by its holder ──▶ publish ──▶ prefix advances ──▶ memory ack
//!    │ full                                                                         │
//!    ▼                                                                              ▼
//!  waits, in order ──▶ Outcome::Claimed                                 group written ──▶ durable ──▶ log ack, flush ack
//! ```
//!
//! Invariants (asserted here or in the parts):
//! - C1 an acknowledgement is given only for records in the published prefix, and one that promises durability only for
//!   records at or below the durable LSN;
//! - C2 checkpoint ≤ durable ≤ published < next LSN;
//! - C3 the index (see `volume_index.rs`) holds a byte's newest record above the durable checkpoint, which may be ahead of
//!   ours; below it the backing holds it;
//! - C4 requests that wait for space are served in the order of their arrival, and later claims queue behind them;
//! - C5 the log on the device begins at the durable checkpoint's head: that region and all behind it are live;
//! - C6 what a read finds in the index is published, or it waits until it is. So where it is answered from the stage it shows
//!   one state of the published prefix, and a flush after it covers what it showed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::commit::Committer;
use super::early::EarlyReads;
use super::index::Source;
pub use super::outcome::{Ack, Claim, DoorId, Outcome};
use super::pacing::Pacing;
use super::ring::{Ring, Slot};
use super::volume_index::{EXTENTS_A_RECORD_MAX, Indexed, VolumeIndex};
use super::window::Window;
use crate::base::limits::INDEX_EXTENTS_MAX;
use crate::base::mutation::{Mutation, is};
use crate::base::{Lsn, RegionSeq, VolumeId};
use crate::format::record::{RECORD_HEADER_BYTES, RecordKind};
use crate::format::volume_entry::OnLogError;
use crate::io::Errno;

/// In `memory` ack the open group is written once it holds this much, if nobody asks for durability before.
const LAZY_GROUP_BYTES: u32 = 256 << 10;

/// What a publisher tells of a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Published {
    payload_bytes: u32,
    lsn: Lsn,
    ack: Option<Ack>,
}

#[derive(Clone, Copy, Debug)]
struct DurableWait {
    lsn: Lsn,
    ack: Ack,
}

#[derive(Clone, Copy, Debug)]
struct SpaceWait {
    door: DoorId,
    tag: u32,
    payload_bytes: u32,
    on_log_error: OnLogError,
}

/// Counters since the core was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Records published.
    pub records: u64,
    /// Their payload bytes.
    pub record_bytes: u64,
    /// Groups durable.
    pub groups: u64,
    /// Bytes written to the log.
    pub log_bytes: u64,
    /// Claims that had to wait for room.
    pub space_waits: u64,
    /// Claims that had to wait for the flusher's progress, although there was room.
    pub paced_waits: u64,
    /// Failed log writes.
    pub log_errors: u64,
}

/// How far the stage is, for those who do not hold the core. What it says is true; by the time it is read more may be.
#[derive(Debug)]
pub struct Marks {
    published: AtomicU64,
    durable: AtomicU64,
}

impl Marks {
    /// Everything up to here is published without a gap, and reads that begin now see it.
    #[must_use]
    pub fn published(&self) -> Lsn {
        Lsn(self.published.load(Ordering::Acquire))
    }

    /// Everything up to here is durable on the log device.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::Acquire))
    }
}

/// The core.
#[derive(Debug)]
pub struct Core {
    marks: Arc<Marks>,
    pub(super) ring: Ring,
    window: Window<Published>,
    pub(super) committer: Committer,
    pub(super) indexes: BTreeMap<VolumeId, Arc<VolumeIndex>>,
    /// Of all indexes, as far as it was told (X4).
    extent_count: isize,
    pub(super) checkpoint: Lsn,
    /// The region where the durable checkpoint lets the log begin: what it names stays, or the next recovery would look for
    /// it in vain.
    pub(super) head: RegionSeq,
    durable_waits: VecDeque<DurableWait>,
    published_waits: Vec<(Lsn, DoorId)>,
    space_waits: VecDeque<SpaceWait>,
    pub(super) cold_reads: Vec<(RegionSeq, DoorId, u32)>,
    pub(super) early: EarlyReads,
    /// Somebody wants everything up to here durable.
    commit_to: Lsn,
    /// Slots of the arena whose memory exists.
    pub(super) allocated: Vec<bool>,
    /// Set when damage was found: nothing more is accepted.
    pub(super) damaged: bool,
    pub(super) kicked: bool,
    pub(super) high_regions: u32,
    pub(super) pacing: Pacing,
    outcomes: Vec<Outcome>,
    /// Counters.
    pub counters: Counters,
}

/// What a new core starts from.
#[derive(Debug)]
pub struct CoreStart {
    /// The log.
    pub ring: Ring,
    /// Everything up to here is durable on the log.
    pub durable: Lsn,
    /// Everything up to here is on the backings.
    pub checkpoint: Lsn,
    /// One index per volume.
    pub indexes: BTreeMap<VolumeId, VolumeIndex>,
    /// Whether the memory of all slots exists; otherwise only the open region's does.
    pub allocated: bool,
}

impl Core {
    /// Core of a log that was opened.
    #[must_use]
    pub fn new(start: CoreStart) -> Core {
        let next = start.ring.next_lsn();
        assert!(start.checkpoint <= start.durable && start.durable < next, "C2");
        let region_count = start.ring.geometry().region_count;
        let mut allocated = vec![start.allocated; region_count as usize];
        allocated[start.ring.open_seq().slot(region_count) as usize] = true;
        let head = start.ring.regions().next().expect("an open region").start.seq;
        let marks = Marks { published: (next.0 - 1).into(), durable: start.durable.0.into() };
        Core {
            marks: Arc::new(marks),
            allocated,
            window: Window::new(next),
            committer: Committer::new(start.durable),
            extent_count: start.indexes.values().map(VolumeIndex::extent_count).sum::<usize>() as isize,
            indexes: start.indexes.into_iter().map(|(volume, index)| (volume, Arc::new(index))).collect(),
            checkpoint: start.checkpoint,
            head,
            durable_waits: VecDeque::new(),
            published_waits: Vec::new(),
            space_waits: VecDeque::new(),
            cold_reads: Vec::new(),
            early: EarlyReads::default(),
            // Records that were found in the arena only go to the log at once.
            commit_to: Lsn(next.0 - 1),
            damaged: false,
            kicked: false,
            high_regions: (region_count / 2).max(2),
            pacing: Pacing::new(start.ring.log_bytes()),
            outcomes: Vec::new(),
            counters: Counters::default(),
            ring: start.ring,
        }
    }

    /// How far the stage is, to be looked at without the core.
    #[must_use]
    pub fn marks(&self) -> Arc<Marks> {
        self.marks.clone()
    }

    /// Whether there are outcomes that nobody has taken yet.
    #[must_use]
    pub fn has_outcomes(&self) -> bool {
        !self.outcomes.is_empty()
    }

    /// Moves the outcomes gathered so far to the end of `into`.
    pub fn take_outcomes(&mut self, into: &mut Vec<Outcome>) {
        into.append(&mut self.outcomes);
    }

    /// Claims a place for a record with `payload_bytes` on behalf of a request.
    pub fn claim(&mut self, door: DoorId, tag: u32, payload_bytes: u32, on_log_error: OnLogError) -> Claim {
        if self.damaged {
            return Claim::Refused(Errno::EIO);
        }
        if self.committer.has_failed() && on_log_error == OnLogError::Fail {
            return Claim::Refused(Errno::EIO);
        }
        if self.space_waits.is_empty()
            && let Some(slot) = self.try_claim(payload_bytes)
        {
            return Claim::Slot(slot);
        }
        if self.is_held_back() {
            self.counters.paced_waits += 1;
        } else if !self.early.hold_claims_back() {
            self.counters.space_waits += 1;
        }
        self.space_waits.push_back(SpaceWait { door, tag, payload_bytes, on_log_error });
        self.kick();
        Claim::Wait
    }

    fn try_claim(&mut self, payload_bytes: u32) -> Option<Slot> {
        let extents = self.extent_count() + EXTENTS_A_RECORD_MAX * (self.window.len() + 1);
        let is_full = extents > INDEX_EXTENTS_MAX || self.is_held_back();
        if self.committer.has_failed() || is_full || self.early.hold_claims_back() {
            return None;
        }
        if let Some(next) = self.ring.would_open(payload_bytes)
            && !self.is_allocated(next)
        {
            return None;
        }
        let regions = self.ring.regions().len();
        let was_idle = self.ring.next_lsn() == self.checkpoint.next();
        let slot = self.ring.claim(payload_bytes)?;
        self.pacing.claimed(self.ring.log_bytes(), self.fill());
        self.window.claimed(slot.lsn());
        if was_idle || self.ring.regions().len() != regions {
            self.kick();
        }
        Some(slot)
    }

    /// No read holds claims back any more. What still waits, waits for room, which the background was not told.
    pub(super) fn claims_go_on(&mut self) {
        self.serve_space_waits();
        if !self.space_waits.is_empty() {
            self.kick();
        }
    }

    /// Gives freed space to those who wait for it, in order.
    pub(super) fn serve_space_waits(&mut self) {
        if self.committer.has_failed() {
            let outcomes = &mut self.outcomes;
            self.space_waits.retain(|wait| {
                let fail = wait.on_log_error == OnLogError::Fail;
                if fail {
                    outcomes.push(Outcome::Refused { door: wait.door, tag: wait.tag, errno: Errno::EIO });
                }
                !fail
            });
        }
        while let Some(&wait) = self.space_waits.front() {
            if self.damaged {
                self.outcomes.push(Outcome::Refused { door: wait.door, tag: wait.tag, errno: Errno::EIO });
            } else if let Some(slot) = self.try_claim(wait.payload_bytes) {
                self.outcomes.push(Outcome::Claimed { door: wait.door, tag: wait.tag, slot });
            } else {
                break;
            }
            self.space_waits.pop_front();
        }
    }

    /// The index of a volume that exists.
    #[must_use]
    pub fn index(&self, volume: VolumeId) -> Option<Arc<VolumeIndex>> {
        self.indexes.get(&volume).cloned()
    }

    /// The indexes of all volumes.
    #[must_use]
    pub fn indexes(&self) -> BTreeMap<VolumeId, Arc<VolumeIndex>> {
        self.indexes.clone()
    }

    /// Takes over a filled place.
    pub fn publish(&mut self, indexed: Indexed, ack: Option<Ack>) {
        let Indexed { slot, grown } = indexed;
        self.grown(grown);
        let lsn = slot.lsn();
        self.window.published(lsn, Published { payload_bytes: slot.payload_bytes(), lsn, ack });
        let before = self.published();
        while let Some(published) = self.window.advance() {
            self.accept(published);
        }
        let prefix = self.published();
        if prefix == before {
            return;
        }
        self.marks.published.store(prefix.0, Ordering::Release);
        if !self.published_waits.is_empty() {
            let reached = self.published_waits.extract_if(.., |(lsn, _)| *lsn <= prefix);
            self.outcomes.extend(reached.map(|(_, door)| Outcome::Published { door }));
        }
        let outcomes = &mut self.outcomes;
        self.early.reached(prefix, |door, tag| outcomes.push(Outcome::RetryRead { door, tag }));
    }

    fn accept(&mut self, published: Published) {
        let Published { payload_bytes, lsn, ack } = published;
        self.counters.records += 1;
        self.counters.record_bytes += u64::from(payload_bytes);
        match ack {
            Some(ack) if ack.durable => self.durable_waits.push_back(DurableWait { lsn, ack }),
            Some(ack) => {
                self.outcomes.push(Outcome::Complete { door: ack.door, tag: ack.tag, result: Ok(()) });
            }
            None => {}
        }
    }

    /// Tells `door` once everything up to `lsn` is published; `false` if it is already. One such wait per door.
    pub fn tell_when_published(&mut self, door: DoorId, lsn: Lsn) -> bool {
        if lsn <= self.published() {
            return false;
        }
        self.published_waits.retain(|(_, waiting)| *waiting != door);
        self.published_waits.push((lsn, door));
        true
    }

    /// Forgets a door.
    pub fn forget_door(&mut self, door: DoorId) {
        self.published_waits.retain(|(_, waiting)| *waiting != door);
        self.cold_reads.retain(|(_, waiting, _)| *waiting != door);
        if self.early.forget_door(door) {
            self.claims_go_on();
        }
    }

    /// Completes the request of `ack` once everything published so far is durable.
    pub fn flush(&mut self, ack: Ack) {
        let lsn = self.published();
        if self.damaged || (self.committer.has_failed() && ack.on_log_error == OnLogError::Fail) {
            self.outcomes.push(Outcome::Complete { door: ack.door, tag: ack.tag, result: Err(Errno::EIO) });
        } else if lsn <= self.durable() || is(Mutation::FlushIsIgnored) {
            self.outcomes.push(Outcome::Complete { door: ack.door, tag: ack.tag, result: Ok(()) });
        } else {
            self.durable_waits.push_back(DurableWait { lsn, ack });
        }
    }

    /// Asks for everything published so far to become durable without anybody being told.
    pub fn request_commit(&mut self) {
        self.commit_to = self.published();
    }

    /// Starts the log writes that are due at `now_ns` (monotonic). Call after a batch of publishes and after the end of log
    /// writes.
    pub fn pump_commit(&mut self, now_ns: u64) {
        let published = self.published();
        loop {
            let close_open = self.commit_is_wanted();
            let Some(group) = self.committer.next(&mut self.ring, published, close_open, now_ns) else {
                return;
            };
            self.outcomes.push(Outcome::WriteLog(group));
        }
    }

    /// Whether what the open group holds should go to the log.
    fn commit_is_wanted(&self) -> bool {
        let wanted = self.durable_waits.back().map_or(Lsn::ZERO, |w| w.lsn).max(self.commit_to);
        wanted > self.committer.begun() || self.ring.open_group_bytes() >= LAZY_GROUP_BYTES
    }

    /// Whether [`Core::pump_commit`] would close the open group now for somebody who waits; then how long the write of a
    /// group takes, about, in nanoseconds.
    #[must_use]
    pub fn commit_is_due(&self, now_ns: u64) -> Option<u64> {
        let closes = self.ring.first_closed().is_none() && self.committer.may_close(now_ns);
        (closes && self.commit_is_wanted()).then(|| self.committer.write_ns())
    }

    /// Takes the result of the log write of the group `group_seq`, at `now_ns` (monotonic).
    pub fn log_written(&mut self, group_seq: u64, result: Result<(), Errno>, now_ns: u64) {
        self.committer.written(group_seq, result.is_ok(), now_ns);
        let before = self.durable();
        while let Some(group) = self.committer.take_durable() {
            self.counters.groups += 1;
            self.counters.log_bytes += u64::from(group.end - group.write_from);
            self.ring.region_mut(group.region).expect("P1: a region lives until it is flushed").durable_end =
                group.end;
        }
        if self.durable() > before {
            self.more_is_durable(before);
        }
        if result.is_err() {
            self.log_failed();
        }
    }

    fn more_is_durable(&mut self, before: Lsn) {
        let durable = self.durable();
        self.marks.durable.store(durable.0, Ordering::Release);
        while let Some(wait) = self.durable_waits.front().copied().filter(|w| w.lsn <= durable) {
            self.durable_waits.pop_front();
            let (door, tag) = (wait.ack.door, wait.ack.tag);
            if is(Mutation::AckIsLost) && wait.lsn.0.is_multiple_of(64) {
                continue;
            }
            self.outcomes.push(Outcome::Complete { door, tag, result: Ok(()) });
        }
        self.serve_space_waits();
        let requested = before < self.commit_to && self.commit_to <= durable;
        if requested || self.sealed_region_needs_table() || self.above_high_mark() {
            self.kick();
        }
    }

    fn log_failed(&mut self) {
        self.counters.log_errors += 1;
        // Requests whose volume prefers errors are told; their records stay and are written when the device works again,
        // which is within what a failed write may do. What another write in flight carries is not concerned.
        let Some(first_failed) = self.committer.first_failed() else { return };
        let outcomes = &mut self.outcomes;
        self.durable_waits.retain(|wait| {
            let fail = wait.ack.on_log_error == OnLogError::Fail && wait.lsn >= first_failed;
            if fail {
                let (door, tag) = (wait.ack.door, wait.ack.tag);
                outcomes.push(Outcome::Complete { door, tag, result: Err(Errno::EIO) });
            }
            !fail
        });
        self.serve_space_waits();
        self.kick();
    }

    /// Writes the groups that failed again.
    pub fn retry_log(&mut self) {
        self.outcomes.extend(self.committer.retry().map(Outcome::WriteLog));
    }

    /// How many groups before the group `group_seq`, which has begun, are not known to be durable.
    #[must_use]
    pub fn undurable_before(&self, group_seq: u64) -> u32 {
        self.committer.undurable_before(group_seq)
    }

    /// Damage was found: nothing more is accepted, everybody who waits is told.
    pub fn refuse_everything(&mut self) {
        self.damaged = true;
        for wait in self.durable_waits.drain(..) {
            let (door, tag) = (wait.ack.door, wait.ack.tag);
            self.outcomes.push(Outcome::Complete { door, tag, result: Err(Errno::EIO) });
        }
        self.serve_space_waits();
        for (_, door, tag) in std::mem::take(&mut self.cold_reads) {
            self.outcomes.push(Outcome::RetryRead { door, tag });
        }
    }

    /// Asks for the background, once until it came.
    pub(super) fn kick(&mut self) {
        if !self.kicked {
            self.kicked = true;
            self.outcomes.push(Outcome::KickBackground);
        }
    }

    /// The background is here.
    pub fn background_came(&mut self) {
        self.kicked = false;
    }

    /// Everything up to here is published without a gap.
    #[must_use]
    pub fn published(&self) -> Lsn {
        self.window.prefix()
    }

    /// Everything up to here is durable on the log device.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.committer.durable()
    }

    /// Everything up to here is on the backings.
    #[must_use]
    pub fn checkpoint(&self) -> Lsn {
        self.checkpoint
    }

    /// The newest LSN given out.
    #[must_use]
    pub fn claimed(&self) -> Lsn {
        Lsn(self.ring.next_lsn().0 - 1)
    }

    /// Whether a write of the log has failed and was not begun again.
    #[must_use]
    pub fn log_has_failed(&self) -> bool {
        self.committer.has_failed()
    }

    /// Whether the log device fails, as far as is known: until what failed was written again.
    #[must_use]
    pub fn log_is_failing(&self) -> bool {
        self.committer.is_failing()
    }

    /// Requests that wait for space.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.space_waits.len()
    }

    /// Whether requests wait for what flushing gives back, and not for a read that was too early.
    #[must_use]
    pub fn waits_for_room(&self) -> bool {
        !self.space_waits.is_empty() && !self.early.hold_claims_back()
    }

    /// The ring, to look at.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Bytes of regions that are not reclaimed yet; the open one counts as far as it is filled.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        let full = self.ring.regions().len() as u64 - 1;
        let geometry = self.ring.geometry();
        full * u64::from(geometry.region_bytes) + u64::from(self.ring.cursor())
    }

    /// Extents in all indexes, as far as was told: what is indexed and not published yet is missing, what the flusher is
    /// about to forget may be there.
    #[must_use]
    pub fn extent_count(&self) -> usize {
        self.extent_count.max(0).unsigned_abs()
    }

    /// The sum itself, which may be below zero.
    #[cfg(test)]
    pub(super) fn extent_sum(&self) -> isize {
        self.extent_count
    }

    /// The indexes have so many extents more.
    pub(super) fn grown(&mut self, by: isize) {
        self.extent_count += by;
    }

    /// Whether damage was found.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.damaged
    }
}

/// What the index keeps of a record; `None` for kinds that change nothing.
#[must_use]
pub fn source_of(kind: RecordKind, region: RegionSeq, payload_offset: u32) -> Option<Source> {
    match kind {
        RecordKind::Write => Some(Source::Data { region, offset: payload_offset }),
        RecordKind::WriteZeroes => Some(Source::Zero),
        RecordKind::Discard => Some(Source::Discard),
        RecordKind::Marker | RecordKind::Void => None,
    }
}

/// Offset of the payload of the record whose header is at `record_offset`.
#[must_use]
pub fn payload_offset(record_offset: u32) -> u32 {
    record_offset + RECORD_HEADER_BYTES
}
