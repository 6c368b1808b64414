//! Cold regions: those that recovery found on the log and that are not in memory yet.
//!
//! Several are read at once, so that the device works while another one is verified and gets its memory. One that cannot be
//! read makes the rest pause, too: the device fails.

use std::collections::BTreeSet;

use super::back_off::BackOff;
use super::{Background, LOAD_TOKENS, LOG_RETRY_NS};
use crate::base::RegionSeq;
use crate::base::mutation::{Mutation, is};
use crate::io::{Errno, Memory, Op, OpKind, Target, Token};
use crate::recovery::scan::walk_region;
use crate::stage::ring::RegionState;

/// Most regions that are read at once of those that no read waits for.
const LOADS_MAX: usize = 2;

/// Most regions that are read at once: there is place for one that a read waits for, since what is begun is before it in the
/// device's queue.
pub const LOADS_AT_ONCE_MAX: usize = LOADS_MAX + 1;

/// What is being loaded.
#[derive(Debug, Default)]
pub(super) struct Loads {
    /// Being read, each pinned.
    reading: Vec<RegionState>,
    /// Could not be read when that was tried last.
    unreadable: BTreeSet<RegionSeq>,
    /// A read has failed since the last step.
    has_failed: bool,
    /// The step has left something that can be done at once.
    goes_on: bool,
    retry: BackOff,
    /// The arena cannot get its memory.
    memory_retry: BackOff,
}

impl Loads {
    pub(super) fn are_in_flight(&self) -> bool {
        !self.reading.is_empty()
    }

    /// When it wants to be called again at the latest, unless an operation ends before.
    pub(super) fn deadline(&self, now_ns: u64) -> Option<u64> {
        if self.has_failed || self.goes_on {
            return Some(now_ns);
        }
        Some(self.paused_until_ns()).filter(|at| *at > now_ns)
    }

    /// Whether they pause for want of memory.
    pub(super) fn lack_memory(&self) -> bool {
        self.memory_retry.until_ns > 0
    }

    fn paused_until_ns(&self) -> u64 {
        self.retry.until_ns.max(self.memory_retry.until_ns)
    }

    fn is_reading(&self, seq: RegionSeq) -> bool {
        self.reading.iter().any(|region| region.start.seq == seq)
    }
}

impl Background {
    pub(super) fn load(&mut self, now_ns: u64, submit: &mut dyn FnMut(Op)) {
        self.loads.goes_on = false;
        if std::mem::take(&mut self.loads.has_failed) {
            self.loads.retry.failed(now_ns, LOG_RETRY_NS);
        }
        if now_ns < self.loads.paused_until_ns() {
            return;
        }
        while self.loads.reading.len() < LOADS_AT_ONCE_MAX && self.status.damage.is_none() {
            let region = {
                let core = self.shared.core.lock();
                let has_room = self.loads.reading.len() < LOADS_MAX;
                let next = core.next_cold_region(|seq| self.loads.is_reading(seq), !has_room);
                let Some(region) = next else { return };
                // The flusher must not get past the region and give its slot away while it is filled.
                self.shared.arena.pin_raw(region.start.seq);
                region
            };
            if let Err(error) = self.shared.arena.allocate(region.start.seq) {
                self.shared.arena.unpin(region.start.seq);
                self.loads.memory_retry.failed(now_ns, LOG_RETRY_NS);
                self.status.memory_problem = Some(error.report());
                return;
            }
            self.loads.memory_retry = BackOff::default();
            self.memory_came();
            if self.arena_reused && (is(Mutation::ArenaIsTrusted) || self.is_whole(&region)) {
                self.loaded(&region);
                // Those who wait for it come first.
                self.loads.goes_on = true;
                return;
            }
            let seq = region.start.seq;
            let geometry = &self.shared.geometry;
            submit(Op {
                token: Token(LOAD_TOKENS | u64::from(seq.slot(geometry.region_count))),
                target: Target::Stage,
                kind: OpKind::Read,
                offset: geometry.region_offset(seq),
                len: u64::from(region.data_end),
                memory: Memory::Shared {
                    region: self.shared.arena.clone(),
                    offset: self.shared.arena.position(seq, 0),
                    len: region.data_end as usize,
                },
            });
            self.loads.reading.push(region);
        }
    }

    /// Whether the arena holds the region as the log has it, every record checked.
    fn is_whole(&self, region: &RegionState) -> bool {
        let image = self.shared.arena.bytes(region.start.seq, 0, region.data_end);
        let walked = walk_region(image, region.start, &self.shared.rules);
        walked.data_end == region.data_end
            && walked.group_count == region.group_count
            && walked.records.len() == region.record_count as usize
    }

    fn loaded(&mut self, region: &RegionState) {
        self.shared.arena.unpin(region.start.seq);
        self.loads.unreadable.remove(&region.start.seq);
        if self.loads.unreadable.is_empty() {
            self.loads.retry = BackOff::default();
            self.status.load_problem = None;
        }
        let mut core = self.shared.core.lock();
        core.region_loaded(region.start.seq, &mut self.outcomes);
        core.slot_allocated(region.start.seq);
    }

    /// Takes the end of the read with this token.
    pub(super) fn load_done(&mut self, token: Token, result: Result<(), Errno>) {
        let count = self.shared.geometry.region_count;
        let slot = (token.0 & !LOAD_TOKENS) as u32;
        let at = self.loads.reading.iter().position(|region| region.start.seq.slot(count) == slot);
        let region = self.loads.reading.remove(at.expect("a region is being read"));
        let seq = region.start.seq;
        let position = self.shared.geometry.region_offset(seq);
        match result {
            Ok(()) if self.is_whole(&region) => {
                self.loaded(&region);
                return;
            }
            Ok(()) => {
                let image = self.shared.arena.bytes(seq, 0, region.data_end);
                let good = walk_region(image, region.start, &self.shared.rules).data_end;
                self.status.damage.get_or_insert_with(|| {
                    format!(
                        "damage in the log at byte {} (region {seq}, offset {good}): the group there is invalid, newer ones \
                         exist",
                        position + u64::from(good),
                    )
                });
            }
            Err(errno) => {
                // The bytes may well be there: it is tried again.
                self.shared.arena.unpin(seq);
                self.loads.unreadable.insert(seq);
                self.loads.has_failed = true;
                self.status.stage_errors += 1;
                self.status.load_problem =
                    Some(format!("the log cannot be read at byte {position} (region {seq}): {errno}"));
                return;
            }
        }
        self.shared.arena.unpin(seq);
        self.shared.core.lock().refuse_everything();
    }
}
