//! What the background tells.

use crate::base::{Lsn, VolumeId};

/// What the background has to tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackgroundStatus {
    /// Epochs flushed.
    pub epochs: u64,
    /// Bytes written to backings.
    pub flushed_bytes: u64,
    /// Operations on backings that failed.
    pub backing_errors: u64,
    /// The backing that fails and how, while it does.
    pub backing_problem: Option<(VolumeId, String)>,
    /// Writes of the flusher to the stage device that failed.
    pub stage_errors: u64,
    /// Why the flusher cannot write to the stage device, while it cannot.
    pub flush_problem: Option<String>,
    /// Why a region of the log cannot be read, while it cannot. A flush that succeeds says nothing of it.
    pub load_problem: Option<String>,
    /// Whether the log cannot be written.
    pub log_fails: bool,
    /// Why the arena cannot get all its memory, while it cannot.
    pub memory_problem: Option<String>,
    /// Damage that was found.
    pub damage: Option<String>,
    /// The checkpoint.
    pub checkpoint_lsn: Lsn,
}

impl BackgroundStatus {
    /// Why the stage device fails, while it does.
    #[must_use]
    pub fn stage_problem(&self) -> Option<&str> {
        self.flush_problem.as_deref().or(self.load_problem.as_deref())
    }
}
