//! The background: flushing, bringing cold regions into memory, writing tables of full regions, retrying after errors.
//! One per engine, driven by its thread (or the simulator) through [`Background::step`] and [`Background::op_done`];
//! it decides and emits operations, and never blocks.
//!
//! It sleeps without a deadline when nothing is staged and nothing has failed.

mod back_off;
mod load;
mod status;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use self::back_off::BackOff;
pub use self::load::LOADS_AT_ONCE_MAX;
use self::load::Loads;
pub use self::status::BackgroundStatus;
use super::shared::{Clock, Shared, log_write_of};
use crate::base::checksum::crc64;
use crate::base::mutation::{Mutation, is};
use crate::base::{Lsn, VolumeId};
use crate::flush::epoch::{Ended, EpochIo, EpochRun, FLUSH_BUFFER_BYTES, flush_pool};
use crate::flush::{FlushTarget, Plan, PlanParams};
use crate::format::checkpoint::Checkpoint;
use crate::format::patch::PatchImage;
use crate::format::record::Record;
use crate::format::region::{FOOTER_BYTES, TABLE_ENTRY_BYTES, TableEntry, TableInfo, table_bytes};
use crate::io::{AlignedBuf, Done, Errno, Memory, Op, OpKind, Target, Token};
use crate::stage::core::{Outcome, payload_offset, source_of};
use crate::stage::index::Extent;
use crate::stage::ring::{RegionState, TableState};
use crate::stage::serve::Epoch;
use crate::stage::volume_index::Forgotten;
use crate::stage::walk::{Expected, visit_headers};
use zerocopy::IntoBytes;

/// Staged data are flushed when nothing arrived for this long.
const IDLE_NS: u64 = 300_000_000;
/// How often a region that readers hold is tried again.
const RECLAIM_RETRY_NS: u64 = 5_000_000;
/// First and longest pause before a failed flush is tried again.
const FLUSH_RETRY_NS: (u64, u64) = (100_000_000, 5_000_000_000);
/// First and longest pause before a failed log write is tried again.
const LOG_RETRY_NS: (u64, u64) = (50_000_000, 2_000_000_000);
/// Tokens: what the operation belongs to in the high half, the epoch's own token in the low one.
const EPOCH_TOKENS: u64 = 1 << 32;
const SEAL_TOKEN: Token = Token(2 << 32);
/// With the region's slot in the low half.
const LOAD_TOKENS: u64 = 3 << 32;

/// The background of an engine.
pub struct Background {
    shared: Arc<Shared>,
    targets: BTreeMap<VolumeId, FlushTarget>,
    unsettled: Vec<PatchImage>,
    pool: Vec<AlignedBuf>,
    checkpoint: Checkpoint,
    epoch: Option<EpochRun>,
    /// An epoch that lacks nothing but its checkpoint, whose write failed.
    unfinished: Option<EpochRun>,
    /// The epoch that failed. Exactly it is tried again: its checkpoint may be on the device although the write failed, so
    /// nothing older may be written to a backing any more than what it covers.
    failed_epoch: Option<Epoch>,
    sealing: Option<RegionState>,
    loads: Loads,
    /// Whether the arena came from the previous server, so that cold regions may be whole in it.
    arena_reused: bool,
    /// Log writes of the background in flight.
    log_writes: u32,
    flush_retry: BackOff,
    log_retry: BackOff,
    allocate_retry: BackOff,
    held: bool,
    idle_since_ns: u64,
    seen_claimed: Lsn,
    /// Flush everything up to here at once.
    drain_to: Lsn,
    outcomes: Vec<Outcome>,
    /// What it has to tell.
    pub status: BackgroundStatus,
}

impl Background {
    /// Background of an engine whose log starts at `checkpoint`.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        targets: BTreeMap<VolumeId, FlushTarget>,
        checkpoint: Checkpoint,
        arena_reused: bool,
    ) -> Background {
        Background::with_pool(shared, targets, checkpoint, arena_reused, flush_pool())
    }

    /// [`Background::new`] with buffers of the caller's. With fewer than a full pool flushing allocates, as simulations may.
    #[must_use]
    pub fn with_pool(
        shared: Arc<Shared>,
        targets: BTreeMap<VolumeId, FlushTarget>,
        checkpoint: Checkpoint,
        arena_reused: bool,
        pool: Vec<AlignedBuf>,
    ) -> Background {
        let status = BackgroundStatus { checkpoint_lsn: checkpoint.lsn, ..BackgroundStatus::default() };
        Background {
            shared,
            targets,
            unsettled: Vec::new(),
            pool,
            checkpoint,
            epoch: None,
            unfinished: None,
            failed_epoch: None,
            sealing: None,
            loads: Loads::default(),
            arena_reused,
            log_writes: 0,
            flush_retry: BackOff::default(),
            log_retry: BackOff::default(),
            allocate_retry: BackOff::default(),
            held: false,
            idle_since_ns: 0,
            seen_claimed: Lsn::ZERO,
            drain_to: Lsn::ZERO,
            outcomes: Vec::new(),
            status,
        }
    }

    /// Flushes everything published so far as soon as possible. Done when the checkpoint has reached the returned LSN.
    pub fn drain(&mut self) -> Lsn {
        let mut core = self.shared.core.lock();
        core.request_commit();
        self.drain_to = core.published();
        self.flush_retry.until_ns = 0;
        self.drain_to
    }

    /// Begins to flush a volume.
    pub fn add_target(&mut self, volume: VolumeId, target: FlushTarget) {
        self.targets.insert(volume, target);
    }

    /// Stops flushing a volume, which has nothing staged.
    pub fn remove_target(&mut self, volume: VolumeId) {
        self.targets.remove(&volume);
        self.checkpoint.flushed.remove(&volume);
    }

    /// The label of a volume was rewritten (resize).
    pub fn target_mut(&mut self, volume: VolumeId) -> Option<&mut FlushTarget> {
        self.targets.get_mut(&volume)
    }

    /// Begins no new epoch while `held`.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// What it shares with the doors.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// The engine's clock.
    #[must_use]
    pub fn clock(&self) -> Arc<dyn Clock> {
        self.shared.clock.clone()
    }

    /// Whether an epoch is being flushed.
    #[must_use]
    pub fn is_flushing(&self) -> bool {
        self.epoch.is_some()
    }

    /// Whether operations of the background are in flight.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.epoch.is_some() || self.sealing.is_some() || self.loads.are_in_flight() || self.log_writes > 0
    }

    /// Does what is due at `now_ns` (monotonic). Returns when it wants to be called again at the latest; `None`: only
    /// when something happens.
    pub fn step(&mut self, now_ns: u64, submit: &mut dyn FnMut(Op)) -> Option<u64> {
        self.shared.core.lock().background_came();
        self.retry_log(now_ns);
        self.run(submit);
        self.allocate(now_ns);
        self.load(now_ns, submit);
        self.seal(submit);
        self.flush(now_ns, submit);
        {
            let mut core = self.shared.core.lock();
            if core.reclaim_is_pending() {
                core.reclaim(&self.shared.arena);
            }
            core.pump_commit(now_ns);
        }
        self.run(submit);
        self.deadline(now_ns)
    }

    fn deadline(&self, now_ns: u64) -> Option<u64> {
        let core = self.shared.core.lock();
        let mut deadline: Option<u64> = None;
        let mut at_latest = |at: u64| deadline = Some(deadline.map_or(at, |d| d.min(at)));
        if core.log_has_failed() {
            at_latest(self.log_retry.until_ns);
        }
        self.loads.deadline(now_ns).into_iter().for_each(&mut at_latest);
        if core.reclaim_is_pending() {
            at_latest(now_ns + RECLAIM_RETRY_NS);
        }
        if core.next_unallocated().is_some() {
            at_latest(self.allocate_retry.until_ns.max(now_ns));
        }
        if core.claimed() > core.checkpoint() && self.epoch.is_none() && !core.is_damaged() {
            // An epoch that is due and could not begin waits for the log or for a region, both of which call. The pause is
            // for what does not: a change that its door has not finished yet.
            let due = self.flush_retry.until_ns.max(self.idle_since_ns + IDLE_NS);
            at_latest(if due > now_ns { due } else { now_ns + IDLE_NS });
        }
        deadline
    }

    fn run(&mut self, submit: &mut dyn FnMut(Op)) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        self.log_writes += self.shared.carry_out(None, &mut outcomes, &mut |_| (), submit);
        assert!(outcomes.is_empty(), "the background has no door");
        self.outcomes = outcomes;
    }

    fn retry_log(&mut self, now_ns: u64) {
        let mut core = self.shared.core.lock();
        self.status.log_fails = core.log_is_failing();
        if !self.status.log_fails {
            self.log_retry = BackOff::default();
            return;
        }
        if !core.log_has_failed() {
            return;
        }
        if self.log_retry.until_ns == 0 {
            self.log_retry.failed(now_ns, LOG_RETRY_NS);
        } else if now_ns >= self.log_retry.until_ns {
            self.log_retry.failed(now_ns, LOG_RETRY_NS);
            core.retry_log();
        }
    }

    // ---- memory

    /// Brings more slots of the arena into being: one, so that requests are not held up for long, or a few together as large
    /// pages while nobody waits.
    fn allocate(&mut self, now_ns: u64) {
        if now_ns < self.allocate_retry.until_ns {
            return;
        }
        let arena = &self.shared.arena;
        let (seqs, has_time) = {
            let core = self.shared.core.lock();
            let Some(next) = core.next_unallocated() else { return };
            // Asked last, as it looks at all regions: most of the time all slots have memory.
            let has_time =
                self.epoch.is_none() && self.log_writes == 0 && !core.log_is_failing() && core.has_time();
            (core.unallocated_from(next, if has_time { arena.regions_ahead() } else { 1 }), has_time)
        };
        let (made, end) = if has_time {
            arena.allocate_ahead(&seqs)
        } else {
            let made = arena.allocate(seqs[0]);
            (usize::from(made.is_ok()), made)
        };
        {
            let mut core = self.shared.core.lock();
            seqs[..made].iter().for_each(|seq| core.slot_allocated(*seq));
        }
        match end {
            Ok(()) => {
                self.allocate_retry = BackOff::default();
                self.memory_came();
            }
            Err(error) => {
                self.allocate_retry.failed(now_ns, FLUSH_RETRY_NS);
                self.status.memory_problem = Some(error.report());
            }
        }
    }

    /// Memory was had: no more problem, unless others still pause for want of it.
    fn memory_came(&mut self) {
        if self.allocate_retry.until_ns == 0 && !self.loads.lack_memory() {
            self.status.memory_problem = None;
        }
    }

    // ---- tables of full regions

    fn seal(&mut self, submit: &mut dyn FnMut(Op)) {
        if self.sealing.is_some() {
            return;
        }
        let region = {
            let mut core = self.shared.core.lock();
            let Some(region) = core.next_seal() else { return };
            core.set_table_state(region.start.seq, TableState::Writing);
            region
        };
        let seq = region.start.seq;
        let geometry = self.shared.geometry;
        let offset = geometry.region_bytes - table_bytes(region.record_count, geometry.block_bytes);
        let mut table: Vec<u8> = Vec::with_capacity((region.record_count * TABLE_ENTRY_BYTES) as usize);
        self.visit(&region, |record_offset, record| {
            table.extend_from_slice(TableEntry::new(record, record_offset).as_bytes());
        });
        let info = TableInfo {
            start: region.start,
            entry_count: region.record_count,
            group_count: region.group_count,
            data_end: region.data_end,
            table_checksum: crc64(&table),
        };
        let arena = &self.shared.arena;
        arena.zero(seq, offset, geometry.region_bytes);
        arena.put(seq, offset, &table);
        arena.put(seq, geometry.region_bytes - FOOTER_BYTES, info.encode(self.shared.rules.salt).as_bytes());
        let len = geometry.region_bytes - offset;
        submit(Op {
            token: SEAL_TOKEN,
            target: Target::Stage,
            kind: OpKind::Write,
            offset: geometry.region_offset(seq) + u64::from(offset),
            len: u64::from(len),
            memory: Memory::Shared {
                region: self.shared.arena.clone(),
                offset: arena.position(seq, offset),
                len: len as usize,
            },
        });
        self.sealing = Some(region);
    }

    fn visit(&self, region: &RegionState, visit: impl FnMut(u32, &Record)) {
        let image = self.shared.arena.bytes(region.start.seq, 0, region.durable_end);
        let expected = Expected {
            region: region.start.seq,
            group_seq: region.start.first_group_seq,
            first_lsn: region.start.first_lsn,
        };
        let whole = visit_headers(image, expected, &self.shared.rules, visit);
        assert!(whole, "P3: the arena's copy of region {} was damaged in memory", region.start.seq);
    }

    // ---- flushing

    fn flush(&mut self, now_ns: u64, submit: &mut dyn FnMut(Op)) {
        if self.epoch.is_none() && !self.held && now_ns >= self.flush_retry.until_ns {
            self.begin_epoch(now_ns);
        }
        let Some(epoch) = &mut self.epoch else { return };
        let mut io = EpochIo {
            arena: &self.shared.arena,
            targets: &mut self.targets,
            unsettled: &mut self.unsettled,
            pool: &mut self.pool,
        };
        let ended = epoch.pump(&mut io, &mut |mut op| {
            op.token.0 |= EPOCH_TOKENS;
            submit(op);
        });
        match ended {
            None => self.shared.core.lock().pace(epoch.progress()),
            Some(Ended::Flushed) => self.epoch_flushed(now_ns, submit),
            Some(Ended::Failed { target, errno }) => self.epoch_failed(now_ns, target, errno),
        }
    }

    fn begin_epoch(&mut self, now_ns: u64) {
        if let Some(mut run) = self.unfinished.take() {
            run.resume();
            self.epoch = Some(run);
            return;
        }
        let (epoch, regions, head) = {
            let mut core = self.shared.core.lock();
            if core.is_damaged() && core.cold_regions() > 0 {
                return;
            }
            if core.claimed() != self.seen_claimed {
                self.seen_claimed = core.claimed();
                self.idle_since_ns = now_ns;
            }
            let unflushed = core.claimed() > core.checkpoint();
            let idle = unflushed && now_ns >= self.idle_since_ns + IDLE_NS;
            let draining = self.drain_to > core.checkpoint();
            if !(idle || draining || core.above_high_mark() || self.failed_epoch.is_some()) {
                return;
            }
            // Regions come back into memory first: the flusher's writes would make that several times as long.
            let is_urgent = draining || self.failed_epoch.is_some() || !core.has_room_to_spare();
            if !is_urgent && core.cold_regions() > 0 && self.status.load_problem.is_none() {
                return;
            }
            let all = idle || draining || core.waits_for_room();
            if all && core.durable() < core.published() {
                core.request_commit();
                core.pump_commit(now_ns);
            }
            if let Some(volume) = core.staged_volumes().find(|v| !self.targets.contains_key(v)) {
                // Opening refuses such a stage; were one here all the same, flushing past the volume's records would lose them.
                self.status.backing_problem = Some((volume, "the backing is not there".to_owned()));
                return;
            }
            let Some(epoch) = self.failed_epoch.or_else(|| core.next_epoch(all)) else { return };
            let regions = core.epoch_regions(&epoch);
            core.pace_by(&regions, epoch.to);
            // Volumes that were deleted have no place in the checkpoint any more.
            let volumes = core.volumes();
            self.checkpoint.flushed.retain(|volume, _| volumes.contains(volume));
            (epoch, regions, core.head_after(epoch.to))
        };
        let plans = self.plan(&epoch, &regions);
        let time_ns = self.shared.clock.unix_ns();
        let volumes = plans.iter().map(|(volume, _)| *volume);
        let mut checkpoint = self.checkpoint.followed_by(epoch.to, head, time_ns, volumes);
        if is(Mutation::CheckpointTooHigh) {
            checkpoint.lsn = self.shared.core.lock().durable();
        }
        let rules = &self.shared.rules;
        self.epoch =
            Some(EpochRun::new(epoch, checkpoint, plans, rules.salt, self.shared.geometry.patch_bytes));
    }

    /// One plan per volume that the epoch touches. Records of volumes that were deleted concern nobody.
    fn plan(&self, epoch: &Epoch, regions: &[RegionState]) -> Vec<(VolumeId, Plan)> {
        let mut extents: BTreeMap<VolumeId, Vec<Extent>> = BTreeMap::new();
        for region in regions {
            let seq = region.start.seq;
            self.visit(region, |record_offset, record| {
                let source = source_of(record.kind, seq, payload_offset(record_offset));
                let in_epoch = record.lsn > epoch.from && record.lsn <= epoch.to;
                if let Some(source) = source.filter(|_| in_epoch && self.targets.contains_key(&record.volume))
                {
                    let extent = Extent { range: record.range, lsn: record.lsn, source };
                    extents.entry(record.volume).or_default().push(extent);
                }
            });
        }
        extents
            .into_iter()
            .map(|(volume, extents)| {
                let params = PlanParams {
                    block_bytes: self.targets[&volume].block_bytes,
                    run_bytes_max: FLUSH_BUFFER_BYTES as u32,
                };
                (volume, Plan::build(extents.into_iter(), params))
            })
            .collect()
    }

    fn epoch_flushed(&mut self, now_ns: u64, submit: &mut dyn FnMut(Op)) {
        let run = self.epoch.take().expect("an epoch ended");
        self.failed_epoch = None;
        self.checkpoint = run.checkpoint().clone();
        self.status.epochs += 1;
        self.status.flushed_bytes += run.written_bytes;
        if !is(Mutation::ErrorStaysInStatus) {
            self.status.backing_problem = None;
            self.status.flush_problem = None;
        }
        if is(Mutation::FlushHidesUnreadableRegions) {
            self.status.load_problem = None;
        }
        self.status.checkpoint_lsn = run.epoch.to;
        self.flush_retry = BackOff::default();
        let head = self.checkpoint.head.seq;
        // What reads find meanwhile is on the backing as it was in the stage, or was discarded.
        let indexes = self.shared.core.lock().indexes();
        let forgotten = Forgotten::of(run.written_ranges(), run.epoch.to, &indexes);
        let mut core = self.shared.core.lock();
        core.checkpointed(&self.shared.arena, head, forgotten);
        core.end_pacing();
        drop(core);
        self.run(submit);
        self.flush(now_ns, submit);
    }

    fn epoch_failed(&mut self, now_ns: u64, target: Target, errno: Errno) {
        let run = self.epoch.take().expect("an epoch has failed");
        self.failed_epoch = Some(run.epoch);
        let repeated = is(Mutation::FailedCheckpointRepeatsTheEpoch);
        self.unfinished = Some(run).filter(|run| run.only_checkpoint_failed() && !repeated);
        self.flush_retry.failed(now_ns, FLUSH_RETRY_NS);
        self.shared.core.lock().end_pacing();
        match target {
            Target::Backing(volume) => {
                self.status.backing_errors += 1;
                if !is(Mutation::BackingErrorIsHidden) {
                    self.status.backing_problem = Some((volume, errno.to_string()));
                }
            }
            Target::Stage => {
                self.status.stage_errors += 1;
                self.status.flush_problem = Some(format!("writing to the stage device failed: {errno}"));
            }
        }
    }

    /// Takes the completion of an operation that was submitted by this background. Call [`Background::step`] after it.
    pub fn op_done(&mut self, done: Done) {
        if let Some(group_seq) = log_write_of(done.token) {
            self.log_writes -= 1;
            let now_ns = self.shared.clock.monotonic_ns();
            self.shared.core.lock().log_written(group_seq, done.result, now_ns);
        } else if done.token.0 & !u64::from(u32::MAX) == LOAD_TOKENS {
            self.load_done(done.token, done.result);
        } else if done.token == SEAL_TOKEN {
            // A table that could not be written is missed by nobody but the next recovery, which scans the region.
            let region = self.sealing.take().expect("a table is being written");
            self.shared.core.lock().set_table_state(region.start.seq, TableState::Written);
        } else {
            let epoch = self.epoch.as_mut().expect("an epoch is being flushed");
            let mut io = EpochIo {
                arena: &self.shared.arena,
                targets: &mut self.targets,
                unsettled: &mut self.unsettled,
                pool: &mut self.pool,
            };
            let token = Token(done.token.0 & (EPOCH_TOKENS - 1));
            epoch.op_done(Done { token, ..done }, &mut io);
        }
    }
}
