//! P7: what a server says of itself is what its disks did.

use std::collections::BTreeSet;

use tidegate_driver::base::VolumeId;
use tidegate_driver::io::{Errno, OpKind, Target};
use tidegate_driver::stage::core::Core;
use tidegate_driver::volume::background::BackgroundStatus;

use super::super::flight::{Flight, Owner};
use tidegate_driver::volume::shared::log_write_of;

/// High half of the tokens of a flush epoch's operations.
const EPOCH: u64 = 1;

/// What the disks of one server did.
#[derive(Debug, Default)]
pub struct Status {
    epochs: u64,
    /// First device that failed in the attempt to flush that is under way.
    failing: Option<Target>,
    /// Groups whose last write failed.
    log_failed: BTreeSet<u64>,
    /// Whether the last attempt to read a region from the stage failed.
    load_failed: bool,
    /// Such attempts.
    pub load_errors: u64,
    log_errors: u64,
}

impl Status {
    /// An operation ended.
    pub fn ended(&mut self, flight: &Flight, result: Result<(), Errno>) {
        let op = &flight.op;
        if let Some(group_seq) = log_write_of(op.token) {
            if result.is_err() {
                self.log_failed.insert(group_seq);
            } else {
                self.log_failed.remove(&group_seq);
            }
            self.log_errors += u64::from(result.is_err());
        } else if op.target == Target::Stage && op.kind == OpKind::Read {
            self.load_failed = result.is_err();
            self.load_errors += u64::from(result.is_err());
        } else if flight.owner == Owner::Background && op.token.0 >> 32 == EPOCH {
            let cannot =
                matches!(op.kind, OpKind::Discard | OpKind::WriteZeroes) && result == Err(Errno::EOPNOTSUPP);
            if result.is_err() && !cannot {
                self.failing.get_or_insert(op.target);
            }
        }
    }

    /// The background has looked around.
    pub fn check(
        &mut self,
        said: &BackgroundStatus,
        core: &Core,
        is_flushing: bool,
        log_in_flight: bool,
    ) -> Result<(), String> {
        if !log_in_flight && core.log_has_failed() == self.log_failed.is_empty() {
            return Err(format!("P7: groups whose last write failed: {:?}, said: {said:?}", self.log_failed));
        }
        if core.counters.log_errors != self.log_errors {
            return Err(format!("P7: {} log errors, said: {}", self.log_errors, core.counters.log_errors));
        }
        if self.load_failed && said.load_problem.is_none() {
            return Err(format!("P7: a region cannot be read, said: {said:?}"));
        }
        if said.checkpoint_lsn != core.checkpoint() {
            return Err(format!("P7: flushed up to {}, said: {said:?}", core.checkpoint()));
        }
        if said.epochs > self.epochs {
            self.epochs = said.epochs;
            if said.backing_problem.is_some() || said.flush_problem.is_some() {
                return Err(format!("P7: flushed, said: {said:?}"));
            }
        }
        if is_flushing {
            return Ok(());
        }
        let told = |volume: VolumeId| said.backing_problem.as_ref().is_some_and(|(of, _)| *of == volume);
        match self.failing.take() {
            Some(Target::Backing(volume)) if !told(volume) => {
                Err(format!("P7: the backing of {volume} failed, said: {said:?}"))
            }
            Some(Target::Stage) if said.flush_problem.is_none() => {
                Err(format!("P7: the stage failed, said: {said:?}"))
            }
            _ => Ok(()),
        }
    }
}
