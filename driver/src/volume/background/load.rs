//! Cold regions: those that recovery found on the log and that are not in memory yet.

use super::back_off::BackOff;
use super::{Background, LOAD_TOKEN, LOG_RETRY_NS};
use crate::base::mutation::{Mutation, is};
use crate::io::{Errno, Memory, Op, OpKind, Target};
use crate::recovery::scan::walk_region;
use crate::stage::ring::RegionState;

impl Background {
    pub(super) fn load(&mut self, now_ns: u64, submit: &mut dyn FnMut(Op)) {
        if std::mem::take(&mut self.load_failed) {
            self.load_retry.failed(now_ns, LOG_RETRY_NS);
        }
        if now_ns < self.load_retry.until_ns {
            return;
        }
        while self.loading.is_none() && self.status.damage.is_none() {
            let region = {
                let core = self.shared.core.lock();
                let Some(region) = core.next_cold_region() else { return };
                // The flusher must not get past the region and give its slot away while it is filled.
                self.shared.arena.pin_raw(region.start.seq);
                region
            };
            if let Err(error) = self.shared.arena.allocate(region.start.seq) {
                self.shared.arena.unpin(region.start.seq);
                self.status.memory_problem = Some(error.report());
                return;
            }
            if self.arena_reused && (is(Mutation::ArenaIsTrusted) || self.is_whole(&region)) {
                self.loaded(&region);
                continue;
            }
            let len = self.shared.geometry.region_bytes;
            submit(Op {
                token: LOAD_TOKEN,
                target: Target::Stage,
                kind: OpKind::Read,
                offset: self.shared.geometry.region_offset(region.start.seq),
                len: u64::from(len),
                memory: Memory::Shared {
                    region: self.shared.arena.clone(),
                    offset: self.shared.arena.position(region.start.seq, 0),
                    len: len as usize,
                },
            });
            self.loading = Some(region);
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
        self.shared.core.lock().region_loaded(region.start.seq, &mut self.outcomes);
    }

    pub(super) fn load_done(&mut self, result: Result<(), Errno>) {
        let region = self.loading.take().expect("a region is being loaded");
        let position = self.shared.geometry.region_offset(region.start.seq);
        match result {
            Ok(()) if self.is_whole(&region) => {
                self.load_retry = BackOff::default();
                self.status.load_problem = None;
                self.loaded(&region);
                return;
            }
            Ok(()) => {
                let image = self.shared.arena.bytes(region.start.seq, 0, region.data_end);
                let good = walk_region(image, region.start, &self.shared.rules).data_end;
                self.status.damage = Some(format!(
                    "damage in the log at byte {} (region {}, offset {good}): the group there is invalid, newer ones exist",
                    position + u64::from(good),
                    region.start.seq
                ));
            }
            Err(errno) => {
                // The bytes may well be there: it is tried again.
                self.shared.arena.unpin(region.start.seq);
                self.load_failed = true;
                self.status.stage_errors += 1;
                self.status.load_problem = Some(format!(
                    "the log cannot be read at byte {position} (region {}): {errno}",
                    region.start.seq
                ));
                return;
            }
        }
        self.shared.arena.unpin(region.start.seq);
        self.shared.core.lock().refuse_everything();
    }
}
