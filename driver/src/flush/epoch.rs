//! One flush epoch: from the records above the checkpoint to a new checkpoint. A state machine without I/O: it hands
//! out [`Op`]s and takes [`Done`]s.
//!
//! ```text
//!  Settle ─▶ Runs ─▶ ┌ PatchRead ─▶ PatchLog ─▶ PatchWrite ┐ ─▶ Labels ─▶ Sync ─▶ Checkpoint ─▶ finished
//!                    └────── PatchSync ◀── more patches ───┘
//! ```
//!
//! | phase | what | why then |
//! |---|---|---|
//! | Settle | images that a failed attempt may have left half-written are written again and synced | the next patches read those blocks |
//! | Runs | whole blocks | order within the epoch does not matter: the plan has one winner per byte |
//! | PatchRead, PatchLog, PatchWrite | blocks in part: image, image to the patch zone durably, image in place | a torn block can be restored |
//! | PatchSync | the images in place become durable | before the patch zone is used again |
//! | Labels | each touched backing notes the epoch's end | before the sync, so it is never behind the checkpoint |
//! | Sync | touched backings | everything of the epoch is durable |
//! | Checkpoint | slot on the stage, durable | only now may regions be reclaimed |
//!
//! Any error ends the attempt once nothing is in flight; the next attempt does everything again (all of it is
//! idempotent), so a failed sync is never taken for a success by repeating only the sync. One exception: after a failed
//! checkpoint write only that is repeated. It may be on the device, so the log may not cover the blocks any more.

use std::collections::BTreeMap;

use super::plan::{Plan, Run, RunKind};
use super::pool::take_buffer;
pub use super::pool::{FLUSH_BUFFER_BYTES, flush_pool};
use super::target::FlushTarget;
use crate::base::mutation::{Mutation, is};
use crate::base::{ByteRange, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::{PATCH_OFFSET, checkpoint_offset};
use crate::format::label::{Label, label_offset};
use crate::format::patch::{PatchImage, encode_patches, patch_images_max};
use crate::io::{AlignedBuf, Done, Errno, Memory, Op, OpKind, Target, Token};
use crate::stage::arena::Arena;
use crate::stage::index::Source;
use crate::stage::serve::Epoch;
use zerocopy::IntoBytes;

/// Most operations in flight.
pub(super) const DEPTH: usize = 32;
/// Longest zero or discard operation.
const ZERO_BYTES_MAX: u64 = 1 << 30;

/// Phases in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Settle,
    SettleSync,
    Runs,
    PatchRead,
    PatchLog,
    PatchWrite,
    PatchSync,
    Labels,
    Sync,
    Checkpoint,
    Finished,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The checkpoint is durable.
    Flushed,
    /// An operation on `target` failed.
    Failed {
        /// The device.
        target: Target,
        /// Its error.
        errno: Errno,
    },
}

/// An attempt at an epoch.
#[derive(Debug)]
pub struct EpochRun {
    /// The epoch.
    pub epoch: Epoch,
    checkpoint: Checkpoint,
    plans: Vec<(VolumeId, Plan)>,
    salt: u64,
    patch_zone_bytes: u32,
    phase: Phase,
    /// Next thing to submit in the phase: meaning depends on it.
    cursor: usize,
    /// Bytes of `plans[..].runs[cursor]` that were submitted already (long zero runs).
    run_done_bytes: u64,
    /// Ranges to be zeroed with data, because the device cannot do it without.
    zero_queue: Vec<(VolumeId, ByteRange)>,
    /// Patches of all plans, as (plan, patch).
    patches: Vec<(usize, usize)>,
    /// First patch of the current batch and its images.
    batch_start: usize,
    images: Vec<PatchImage>,
    in_flight: BTreeMap<u64, Flight>,
    next_token: u64,
    failed: Option<(Target, Errno)>,
    /// Bytes written to backings.
    pub written_bytes: u64,
}

#[derive(Debug)]
struct Flight {
    target: Target,
    kind: OpKind,
    /// Index of the image a patch read is for.
    image: usize,
    /// The range of a zero operation that can be done with data instead.
    zero: Option<ByteRange>,
}

/// What an attempt needs from outside.
#[derive(Debug)]
pub struct EpochIo<'a> {
    /// Payloads.
    pub arena: &'a Arena,
    /// What is known of the backings.
    pub targets: &'a mut BTreeMap<VolumeId, FlushTarget>,
    /// Images that may be half-written in place; survive a failed attempt.
    pub unsettled: &'a mut Vec<PatchImage>,
    /// Free buffers.
    pub pool: &'a mut Vec<AlignedBuf>,
}

impl EpochRun {
    /// Attempt at `epoch` with one plan per touched volume.
    #[must_use]
    pub fn new(
        epoch: Epoch,
        checkpoint: Checkpoint,
        plans: Vec<(VolumeId, Plan)>,
        salt: u64,
        patch_zone_bytes: u32,
    ) -> EpochRun {
        let patches = plans
            .iter()
            .enumerate()
            .flat_map(|(p, (_, plan))| (0..plan.patches.len()).map(move |i| (p, i)))
            .collect();
        EpochRun {
            epoch,
            checkpoint,
            plans,
            salt,
            patch_zone_bytes,
            phase: Phase::Settle,
            cursor: 0,
            run_done_bytes: 0,
            zero_queue: Vec::new(),
            patches,
            batch_start: 0,
            images: Vec::new(),
            in_flight: BTreeMap::new(),
            next_token: 0,
            failed: None,
            written_bytes: 0,
        }
    }

    /// Whether everything is durable but the checkpoint, whose write failed. Such an attempt must not be made again from the
    /// start: the failed write may be on the device all the same, and then the log no longer covers the blocks that would be
    /// written again.
    #[must_use]
    pub fn only_checkpoint_failed(&self) -> bool {
        self.phase == Phase::Checkpoint && self.failed.is_some()
    }

    /// Goes on after [`EpochRun::only_checkpoint_failed`]: writes the checkpoint again.
    pub fn resume(&mut self) {
        assert!(self.only_checkpoint_failed() && self.in_flight.is_empty());
        self.failed = None;
        self.cursor = 0;
    }

    /// The checkpoint this attempt writes.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The byte ranges that the epoch changes.
    pub fn written_ranges(&self) -> impl Iterator<Item = (VolumeId, ByteRange)> {
        self.plans.iter().flat_map(|(volume, plan)| plan.written_ranges().map(|range| (*volume, range)))
    }

    /// Submits what can be submitted. `Some`: the attempt is over and nothing is in flight.
    pub fn pump(&mut self, io: &mut EpochIo<'_>, submit: &mut dyn FnMut(Op)) -> Option<Ended> {
        loop {
            if let Some((target, errno)) = self.failed {
                return self.in_flight.is_empty().then_some(Ended::Failed { target, errno });
            }
            if self.phase == Phase::Finished {
                return Some(Ended::Flushed);
            }
            while self.in_flight.len() < DEPTH && self.submit_next(io, submit) {}
            if !self.in_flight.is_empty() {
                return None;
            }
            self.next_phase(io);
        }
    }

    /// How much of the work is done, of how much: runs and patches.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let runs: usize = self.plans.iter().map(|(_, plan)| plan.runs.len()).sum();
        let over = |submitted: usize| submitted.saturating_sub(self.in_flight.len());
        let done = match self.phase {
            Phase::Settle | Phase::SettleSync => 0,
            Phase::Runs => over(self.cursor),
            Phase::PatchRead | Phase::PatchLog => runs + self.batch_start,
            Phase::PatchWrite => runs + self.batch_start + over(self.cursor),
            Phase::PatchSync => runs + self.batch_start + self.images.len(),
            Phase::Labels | Phase::Sync | Phase::Checkpoint | Phase::Finished => runs + self.patches.len(),
        };
        (done as u64, (runs + self.patches.len()) as u64)
    }

    /// Takes a completion of an operation submitted by [`EpochRun::pump`].
    pub fn op_done(&mut self, done: Done, io: &mut EpochIo<'_>) {
        let flight = self.in_flight.remove(&done.token.0).expect("an operation in flight");
        match done.result {
            Ok(()) => {
                if let (Phase::PatchRead, Memory::Owned(buf)) = (self.phase, &done.memory) {
                    self.images[flight.image].bytes.copy_from_slice(buf);
                }
            }
            Err(errno) => self.op_failed(&flight, errno, io),
        }
        if let Memory::Owned(buf) = done.memory
            && io.pool.len() < DEPTH
            && buf.capacity() >= FLUSH_BUFFER_BYTES
        {
            io.pool.push(buf);
        }
    }

    fn op_failed(&mut self, flight: &Flight, errno: Errno, io: &mut EpochIo<'_>) {
        let Target::Backing(volume) = flight.target else {
            self.failed.get_or_insert((flight.target, errno));
            return;
        };
        let target = io.targets.get_mut(&volume);
        match (flight.kind, target) {
            (OpKind::Sync, _) if is(Mutation::FailedSyncCountsAsSync) => {}
            (OpKind::WriteZeroes, Some(_))
                if is(Mutation::ZeroesAreDropped) && errno == Errno::EOPNOTSUPP => {}
            // A device that cannot discard keeps the old bytes, as the client allowed.
            (OpKind::Discard, Some(target)) if errno == Errno::EOPNOTSUPP => target.discards = false,
            (OpKind::WriteZeroes, Some(target)) if errno == Errno::EOPNOTSUPP => {
                target.zeroes = false;
                self.zero_queue.push((volume, flight.zero.expect("a zero run")));
            }
            _ => {
                self.failed.get_or_insert((flight.target, errno));
            }
        }
    }

    fn submit_next(&mut self, io: &mut EpochIo<'_>, submit: &mut dyn FnMut(Op)) -> bool {
        match self.phase {
            Phase::Settle => self.submit_image(io.unsettled.get(self.cursor).cloned(), io, submit),
            Phase::Runs => self.submit_run(io, submit),
            Phase::PatchRead => self.submit_patch_read(io, submit),
            Phase::PatchLog => self.submit_patch_log(submit),
            Phase::PatchWrite => self.submit_image(self.images.get(self.cursor).cloned(), io, submit),
            Phase::Labels => self.submit_label(io, submit),
            Phase::SettleSync | Phase::PatchSync | Phase::Sync => self.submit_sync(io, submit),
            Phase::Checkpoint => self.submit_checkpoint(submit),
            Phase::Finished => false,
        }
    }

    fn next_phase(&mut self, io: &mut EpochIo<'_>) {
        self.cursor = 0;
        self.phase = match self.phase {
            Phase::Settle if io.unsettled.is_empty() => Phase::Runs,
            Phase::Settle => Phase::SettleSync,
            Phase::SettleSync => {
                io.unsettled.clear();
                Phase::Runs
            }
            Phase::Runs => self.begin_batch(),
            Phase::PatchRead => {
                self.apply_patches(io.arena);
                Phase::PatchLog
            }
            Phase::PatchLog if is(Mutation::HalfWrittenPatchesAreForgotten) => Phase::PatchWrite,
            Phase::PatchLog => {
                io.unsettled.clone_from(&self.images);
                Phase::PatchWrite
            }
            Phase::PatchWrite
                if is(Mutation::PatchZoneReusedBeforeSync)
                    && self.batch_start + self.images.len() < self.patches.len() =>
            {
                self.batch_start += self.images.len();
                self.begin_batch()
            }
            Phase::PatchWrite if self.batch_start + self.images.len() < self.patches.len() => {
                Phase::PatchSync
            }
            Phase::PatchWrite => Phase::Labels,
            Phase::PatchSync => {
                io.unsettled.clear();
                self.batch_start += self.images.len();
                self.begin_batch()
            }
            Phase::Labels => Phase::Sync,
            Phase::Sync => {
                io.unsettled.clear();
                // The labels are durable: from now on the checkpoint may rely on them, so the next go to the other slot.
                for (volume, _) in &self.plans {
                    if let Some(target) = io.targets.get_mut(volume) {
                        target.label.sequence += 1 + u64::from(is(Mutation::LabelsShareOneSlot));
                        target.label.flushed_lsn = target.attempted;
                    }
                }
                Phase::Checkpoint
            }
            Phase::Checkpoint => Phase::Finished,
            Phase::Finished => unreachable!("pump stops at the end"),
        };
    }

    fn begin_batch(&mut self) -> Phase {
        let max = patch_images_max(self.patch_zone_bytes);
        let batch = &self.patches[self.batch_start..];
        if batch.is_empty() {
            return Phase::Labels;
        }
        let plans = &self.plans;
        self.images = batch
            .iter()
            .take(max)
            .map(|&(p, i)| PatchImage {
                volume: plans[p].0,
                offset: plans[p].1.patches[i].block_offset,
                bytes: Vec::new(),
            })
            .collect();
        Phase::PatchRead
    }

    fn send(&mut self, op: Op, flight: Flight, submit: &mut dyn FnMut(Op)) {
        if matches!(op.kind, OpKind::Write) {
            self.written_bytes += op.len;
        }
        self.in_flight.insert(op.token.0, flight);
        submit(op);
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    fn write(
        &mut self,
        target: Target,
        kind: OpKind,
        offset: u64,
        buf: AlignedBuf,
        submit: &mut dyn FnMut(Op),
    ) {
        let token = self.token();
        let op = Op { token, target, kind, offset, len: buf.len() as u64, memory: Memory::Owned(buf) };
        self.send(op, Flight { target, kind, image: 0, zero: None }, submit);
    }

    fn submit_run(&mut self, io: &mut EpochIo<'_>, submit: &mut dyn FnMut(Op)) -> bool {
        if self.submit_zero_data(io, submit) {
            return true;
        }
        let mut index = self.cursor;
        let found = self.plans.iter().find_map(|(volume, plan)| match plan.runs.get(index) {
            Some(run) => Some((*volume, plan, run.clone())),
            None => {
                index -= plan.runs.len();
                None
            }
        });
        let Some((volume, plan, run)) = found else { return false };
        if run.kind == RunKind::Data {
            let buf = fill_run(plan, &run, io);
            self.cursor += 1;
            self.write(Target::Backing(volume), OpKind::Write, run.range.start, buf, submit);
            return true;
        }
        let from = run.range.start + self.run_done_bytes;
        let part = ByteRange { start: from, end: run.range.end.min(from.saturating_add(ZERO_BYTES_MAX)) };
        self.run_done_bytes += part.len();
        if part.end == run.range.end {
            self.cursor += 1;
            self.run_done_bytes = 0;
        }
        let target = io.targets.get(&volume).expect("a planned volume has a target");
        match run.kind {
            RunKind::Discard if !target.discards => {}
            RunKind::Zero if !target.zeroes => self.zero_queue.push((volume, part)),
            RunKind::Discard => self.submit_zero(volume, OpKind::Discard, part, submit),
            RunKind::Zero | RunKind::Data => self.submit_zero(volume, OpKind::WriteZeroes, part, submit),
        }
        true
    }

    fn submit_zero(&mut self, volume: VolumeId, kind: OpKind, range: ByteRange, submit: &mut dyn FnMut(Op)) {
        let target = Target::Backing(volume);
        let token = self.token();
        let op = Op { token, target, kind, offset: range.start, len: range.len(), memory: Memory::None };
        self.send(op, Flight { target, kind, image: 0, zero: Some(range) }, submit);
    }

    /// Submits one buffer of zeroes of a range that the device cannot zero by itself.
    fn submit_zero_data(&mut self, io: &mut EpochIo<'_>, submit: &mut dyn FnMut(Op)) -> bool {
        let Some((volume, range)) = self.zero_queue.last_mut() else { return false };
        let (volume, at) = (*volume, range.start);
        let len = range.len().min(FLUSH_BUFFER_BYTES as u64);
        range.start += len;
        if range.is_empty() {
            self.zero_queue.pop();
        }
        let mut buf = take_buffer(io.pool);
        buf.set_len(len as usize);
        buf.fill(0);
        self.write(Target::Backing(volume), OpKind::Write, at, buf, submit);
        true
    }

    fn submit_patch_read(&mut self, io: &mut EpochIo<'_>, submit: &mut dyn FnMut(Op)) -> bool {
        while self.cursor < self.images.len() {
            let image = self.cursor;
            self.cursor += 1;
            let (p, i) = self.patches[self.batch_start + image];
            let (volume, plan) = &self.plans[p];
            let target = Target::Backing(*volume);
            let block_bytes =
                io.targets.get(volume).expect("a planned volume has a target").block_bytes as usize;
            let (offset, needs_read) = (plan.patches[i].block_offset, plan.patches[i].needs_read);
            self.images[image].bytes.resize(block_bytes, 0);
            if needs_read {
                let mut buf = take_buffer(io.pool);
                buf.set_len(block_bytes);
                let token = self.token();
                let memory = Memory::Owned(buf);
                let op = Op { token, target, kind: OpKind::Read, offset, len: block_bytes as u64, memory };
                self.send(op, Flight { target, kind: OpKind::Read, image, zero: None }, submit);
                return true;
            }
        }
        false
    }

    fn apply_patches(&mut self, arena: &Arena) {
        for (index, image) in self.images.iter_mut().enumerate() {
            let (p, i) = self.patches[self.batch_start + index];
            let plan = &self.plans[p].1;
            for piece in plan.patch_pieces(&plan.patches[i]) {
                let from = (piece.range.start - image.offset) as usize;
                let into = &mut image.bytes[from..from + piece.range.len() as usize];
                copy_source(arena, piece.source, into);
            }
        }
    }

    fn submit_patch_log(&mut self, submit: &mut dyn FnMut(Op)) -> bool {
        if self.cursor > 0 {
            return false;
        }
        self.cursor = 1;
        // Blocks that the log covers completely need no image: replay restores them.
        let start = self.batch_start;
        let needed: Vec<PatchImage> = self
            .images
            .iter()
            .enumerate()
            .filter(|(index, _)| {
                let (p, i) = self.patches[start + index];
                self.plans[p].1.patches[i].needs_read
            })
            .map(|(_, image)| image.clone())
            .collect();
        if needed.is_empty() || is(Mutation::PatchLogIsSkipped) {
            return false;
        }
        let zone = encode_patches(&needed, self.epoch.to, self.salt);
        let kind = if is(Mutation::PatchLogIsNotDurable) { OpKind::Write } else { OpKind::WriteDurable };
        self.write(Target::Stage, kind, PATCH_OFFSET, zone, submit);
        true
    }

    fn submit_image(
        &mut self,
        image: Option<PatchImage>,
        io: &mut EpochIo<'_>,
        submit: &mut dyn FnMut(Op),
    ) -> bool {
        let Some(image) = image else { return false };
        self.cursor += 1;
        let mut buf = take_buffer(io.pool);
        buf.set_len(image.bytes.len());
        buf.copy_from_slice(&image.bytes);
        self.write(Target::Backing(image.volume), OpKind::Write, image.offset, buf, submit);
        true
    }

    fn submit_label(&mut self, io: &mut EpochIo<'_>, submit: &mut dyn FnMut(Op)) -> bool {
        let Some((volume, _)) = self.plans.get(self.cursor) else { return false };
        if is(Mutation::LabelIsNotWritten) {
            return false;
        }
        self.cursor += 1;
        let volume = *volume;
        let target = io.targets.get_mut(&volume).expect("a planned volume has a target");
        target.attempted = target.attempted.max(self.epoch.to);
        // The sequence moves on only when the epoch succeeds: attempts use one slot and leave the other whole.
        let label = Label {
            sequence: target.label.sequence + 1,
            flushed_lsn: target.attempted,
            ..target.label.clone()
        };
        let offset = label_offset(label.volume_bytes, label.slot());
        let buf = AlignedBuf::from_slice(label.encode().as_bytes());
        self.write(Target::Backing(volume), OpKind::Write, offset, buf, submit);
        true
    }

    fn submit_sync(&mut self, io: &mut EpochIo<'_>, submit: &mut dyn FnMut(Op)) -> bool {
        let mut volumes: Vec<VolumeId> = match self.phase {
            Phase::Sync => self.plans.iter().map(|(volume, _)| *volume).collect(),
            _ => io.unsettled.iter().map(|image| image.volume).collect(),
        };
        volumes.dedup();
        if self.phase == Phase::Sync && is(Mutation::EpochSyncIsSkipped) {
            return false;
        }
        if self.phase == Phase::Sync && is(Mutation::CheckpointBeforeSync) && self.cursor == 0 {
            return self.submit_checkpoint(submit);
        }
        let before = usize::from(self.phase == Phase::Sync && is(Mutation::CheckpointBeforeSync));
        let Some(&volume) = volumes.get(self.cursor - before) else { return false };
        self.cursor += 1;
        let target = Target::Backing(volume);
        let token = self.token();
        let op = Op { token, target, kind: OpKind::Sync, offset: 0, len: 0, memory: Memory::None };
        self.send(op, Flight { target, kind: OpKind::Sync, image: 0, zero: None }, submit);
        true
    }

    fn submit_checkpoint(&mut self, submit: &mut dyn FnMut(Op)) -> bool {
        if self.cursor > 0 {
            return false;
        }
        self.cursor = 1;
        let buf = AlignedBuf::from_slice(self.checkpoint.encode(self.salt).as_bytes());
        let offset = checkpoint_offset(self.checkpoint.slot());
        let kind = if is(Mutation::CheckpointIsNotDurable) { OpKind::Write } else { OpKind::WriteDurable };
        self.write(Target::Stage, kind, offset, buf, submit);
        true
    }
}

fn fill_run(plan: &Plan, run: &Run, io: &mut EpochIo<'_>) -> AlignedBuf {
    let mut buf = take_buffer(io.pool);
    buf.set_len(run.range.len() as usize);
    for piece in plan.run_pieces(run) {
        let from = (piece.range.start - run.range.start) as usize;
        copy_source(io.arena, piece.source, &mut buf[from..from + piece.range.len() as usize]);
    }
    buf
}

fn copy_source(arena: &Arena, source: Source, into: &mut [u8]) {
    match source {
        Source::Data { region, offset } => {
            into.copy_from_slice(arena.bytes(region, offset, offset + into.len() as u32));
        }
        Source::Zero | Source::Discard => into.fill(0),
    }
}
