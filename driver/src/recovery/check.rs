//! Offline verification of a stage and its backings. Reads everything that is live, writes nothing.
//!
//! Unlike opening, it does not stop at the first thing that is wrong, trusts no table, and looks at every payload.
//!
//! | finding | is |
//! |---|---|
//! | what a crash explains: torn last groups, a torn checkpoint, patch zone or table | a note |
//! | everything else that is not as its rule of validity says | a problem |
//! | not a stage, a device that cannot be read or has shrunk, a newer format | an error: it could not be checked |
//!
//! What only an arena holds is not looked at.

mod log;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeMap;

use serde::Serialize;

use super::open::check_label;
use super::patches::{beyond_the_log, misplaced};
use super::superblocks;
use crate::base::{Error, ErrorKind, Lsn, Result, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::{
    CHECKPOINT_SLOT_BYTES, CHECKPOINT_SLOTS, PATCH_OFFSET, SUPERBLOCK_COPIES, checkpoint_offset,
};
use crate::format::label::label_offset;
use crate::format::patch::decode_patches;
use crate::format::region::RegionStart;
use crate::format::superblock::{SUPERBLOCK_BYTES, StageState, Superblock};
use crate::format::volume_entry::VolumeInfo;
use crate::io::Disk;
use log::{LogCheck, LogFacts};

/// Most problems that are listed one by one.
const PROBLEMS_MAX: usize = 1000;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What it is.
    pub what: String,
    /// Device or file it is on.
    pub device: String,
    /// Where on it, in bytes.
    pub offset: Option<u64>,
    /// What to do.
    pub advice: String,
}

/// What was found of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumeCheck {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: String,
    /// Id within the stage.
    pub id: VolumeId,
    /// Size.
    pub size_bytes: u64,
    /// Path of the backing as the stage has noted it.
    pub backing: String,
    /// Whether the backing was given and looked at.
    pub backing_checked: bool,
    /// How far the backing was flushed by its label, if that could be read.
    pub flushed_lsn: Option<Lsn>,
    /// Records above the checkpoint: what the backing may not hold yet.
    pub staged_records: u64,
    /// Their payload bytes.
    pub staged_bytes: u64,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Damage. Empty: the stage is sound.
    pub problems: Vec<Problem>,
    /// Remarks for people; nothing in them is damage.
    pub notes: Vec<String>,
    /// UUID of the stage.
    pub stage_uuid: String,
    /// Whether it was closed in order.
    pub closed_in_order: bool,
    /// Superblock copies that are whole and current, of four.
    pub superblock_copies: u32,
    /// Valid checkpoints, of sixteen.
    pub checkpoints: u32,
    /// Live regions.
    pub regions: u64,
    /// Live regions with a table that says what their records say.
    pub tables: u64,
    /// Whole groups in them.
    pub groups: u64,
    /// Whole records in them.
    pub records: u64,
    /// Payload bytes of those.
    pub payload_bytes: u64,
    /// Bytes of groups that were in flight when the log was cut short.
    pub torn_bytes: u64,
    /// Block images that the next attach restores to backings.
    pub pending_patches: u64,
    /// Everything up to here is on the backings.
    pub checkpoint_lsn: Lsn,
    /// The newest record of the log.
    pub log_end_lsn: Lsn,
    /// The volumes.
    pub volumes: Vec<VolumeCheck>,
    /// Problems beyond those listed.
    pub problems_not_listed: u64,
}

impl CheckReport {
    /// Whether no damage was found.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    fn problem(&mut self, disk: &dyn Disk, offset: Option<u64>, what: impl Into<String>, advice: &str) {
        if self.problems.len() >= PROBLEMS_MAX {
            self.problems_not_listed += 1;
            return;
        }
        let (what, device, advice) = (what.into(), disk.name(), advice.to_owned());
        self.problems.push(Problem { what, device, offset, advice });
    }
}

const REWRITTEN: &str =
    "the next attach writes it again; if it comes back, the device is failing: replace it";
const RESTORE: &str =
    "restore the device from a copy, or use a partner's; `tidegate inspect` shows what is there";
const RESTORE_BACKING: &str = "bring back the right backing, or restore it from a copy";

/// Checks the stage on `stage` and those of its volumes' backings that are given.
///
/// Errors say that it could not be checked; damage is in the report.
pub fn check(stage: &dyn Disk, backings: &BTreeMap<VolumeId, &dyn Disk>) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let superblock = match superblocks::read(stage) {
        Ok(read) => read.superblock,
        Err(error) if error.kind() == ErrorKind::Damaged => {
            report.problem(stage, Some(0), error.report(), RESTORE);
            return Ok(report);
        }
        Err(error) => return Err(readable(stage).err().unwrap_or(error)),
    };
    report.stage_uuid = superblock.stage_uuid.to_string();
    report.closed_in_order = superblock.state == StageState::Clean;
    if !report.closed_in_order {
        report.notes.push(
            "the stage was not closed in order: it is in use, or its server died; what only its arena holds was not \
             checked"
                .to_owned(),
        );
    }
    check_copies(stage, &superblock, &mut report);
    let newest = check_checkpoints(stage, &superblock, &mut report);
    let facts = LogCheck::new(stage, &superblock, &mut report).run(newest.as_ref());
    let checkpoint = newest.unwrap_or_else(|| invented(facts.first_lsn));
    check_end(stage, &superblock, &checkpoint, &facts, &mut report);
    for volume in &superblock.volumes {
        let checked = check_volume(volume, &superblock, &checkpoint, &facts, backings, &mut report);
        report.volumes.push(checked);
    }
    check_patches(stage, &superblock, &checkpoint, &mut report);
    Ok(report)
}

/// Stands for the checkpoint when there is none.
fn invented(first_lsn: Lsn) -> Checkpoint {
    Checkpoint {
        sequence: 0,
        lsn: Lsn(first_lsn.0.saturating_sub(1)),
        head: RegionStart { seq: crate::base::RegionSeq(1), first_lsn, first_group_seq: 0 },
        time_ns: 0,
        flushed: BTreeMap::new(),
    }
}

/// Whether the first block can be read: "is not a stage" and "cannot be read" are different things.
fn readable(disk: &dyn Disk) -> Result<()> {
    if disk.len_bytes() < 4096 { Ok(()) } else { disk.read(0, &mut [0; 4096]) }
}

fn read_at(disk: &dyn Disk, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    disk.read(offset, &mut bytes).map(|()| bytes)
}

fn is_blank(bytes: &[u8]) -> bool {
    bytes.iter().all(|&b| b == 0)
}

/// A copy of the superblock, compared with the one that counts.
#[derive(Debug)]
enum Copy {
    Current,
    Older,
    Bad(String),
}

fn look_at_copy(stage: &dyn Disk, superblock: &Superblock, copy: u32) -> Copy {
    let offset = superblock.geometry.superblock_offset(copy);
    match read_at(stage, offset, SUPERBLOCK_BYTES).and_then(|bytes| Superblock::decode(&bytes, copy)) {
        Ok(Some(found)) if found == *superblock => Copy::Current,
        Ok(Some(found))
            if found.stage_uuid == superblock.stage_uuid && found.sequence < superblock.sequence =>
        {
            Copy::Older
        }
        Ok(Some(found)) if found.stage_uuid == superblock.stage_uuid => {
            Copy::Bad("has the same number as the others and another content".to_owned())
        }
        Ok(Some(found)) => Copy::Bad(format!("belongs to stage {}", found.stage_uuid)),
        Ok(None) => Copy::Bad("is damaged".to_owned()),
        Err(error) => Copy::Bad(format!("cannot be used: {}", error.report())),
    }
}

fn check_copies(stage: &dyn Disk, superblock: &Superblock, report: &mut CheckReport) {
    let copies: Vec<Copy> = (0..SUPERBLOCK_COPIES).map(|c| look_at_copy(stage, superblock, c)).collect();
    let bad = copies.iter().filter(|copy| matches!(copy, Copy::Bad(_))).count();
    for (i, copy) in copies.iter().enumerate() {
        // Copies are updated in order, so an update that was cut short leaves one that is torn, current ones before it
        // and older ones behind it.
        let (before, behind) = (&copies[..i], &copies[i + 1..]);
        let cut_short = bad == 1
            && (behind.iter().all(|c| matches!(c, Copy::Older)) || before.is_empty())
            && before.iter().all(|c| matches!(c, Copy::Current));
        match copy {
            Copy::Current => report.superblock_copies += 1,
            Copy::Older => report.notes.push(format!(
                "superblock copy {i} is of an earlier update, which was cut short; the next attach writes it again"
            )),
            Copy::Bad(what) if cut_short => report.notes.push(format!(
                "superblock copy {i} {what}, as an update that is cut short leaves it; the next attach writes it again"
            )),
            Copy::Bad(what) => {
                let offset = superblock.geometry.superblock_offset(i as u32);
                report.problem(stage, Some(offset), format!("superblock copy {i} {what}"), REWRITTEN);
            }
        }
    }
}

/// Returns the newest checkpoint.
fn check_checkpoints(
    stage: &dyn Disk,
    superblock: &Superblock,
    report: &mut CheckReport,
) -> Option<Checkpoint> {
    let slots: Vec<(Result<Vec<u8>>, Option<Checkpoint>)> = (0..CHECKPOINT_SLOTS)
        .map(|slot| {
            let bytes = read_at(stage, checkpoint_offset(slot), CHECKPOINT_SLOT_BYTES as usize);
            let found = bytes.as_ref().ok().and_then(|b| Checkpoint::decode(b, superblock.salt, slot));
            (bytes, found)
        })
        .collect();
    let valid = || slots.iter().filter_map(|(_, found)| found.as_ref());
    report.checkpoints = valid().count() as u32;
    let oldest = valid().map(|c| c.sequence).min().unwrap_or(0);
    let newest = valid().max_by_key(|c| c.sequence).cloned();
    let mut unexplained = Vec::new();
    for (slot, (bytes, found)) in (0..CHECKPOINT_SLOTS).zip(&slots) {
        let at = Some(checkpoint_offset(slot));
        match bytes {
            Ok(_) if found.is_some() => {}
            Err(error) => {
                report.problem(stage, at, format!("checkpoint slot {slot}: {}", error.report()), REWRITTEN);
            }
            Ok(_) if newest.as_ref().is_some_and(|newest| was_valid(slot, oldest, newest.sequence)) => {
                let what =
                    format!("an earlier checkpoint, in slot {slot}, is damaged; the newest one counts");
                report.problem(stage, at, what, REWRITTEN);
            }
            Ok(bytes) if !is_blank(bytes) => unexplained.push(slot),
            Ok(_) => {}
        }
    }
    if !unexplained.is_empty() {
        report.notes.push(format!(
            "checkpoint slots {unexplained:?} hold none that is valid: never used, cut short while written, or damaged"
        ));
    }
    if newest.is_none() {
        let what =
            "no checkpoint is valid, so it is not known where the log begins; its oldest region is taken";
        report.problem(stage, Some(checkpoint_offset(0)), what, RESTORE);
    }
    newest
}

/// Whether the slot once held a checkpoint between the oldest and the newest valid ones. The slot that comes next may
/// be torn.
fn was_valid(slot: u32, oldest: u64, newest: u64) -> bool {
    let slots = u64::from(CHECKPOINT_SLOTS);
    let age = (newest % slots + slots - u64::from(slot)) % slots;
    age < slots - 1 && newest.checked_sub(age).is_some_and(|expected| expected > oldest)
}

fn check_end(
    stage: &dyn Disk,
    superblock: &Superblock,
    checkpoint: &Checkpoint,
    facts: &LogFacts,
    report: &mut CheckReport,
) {
    report.checkpoint_lsn = checkpoint.lsn;
    report.log_end_lsn = facts.log_end;
    if facts.log_end < checkpoint.lsn {
        let what = format!(
            "the log ends at LSN {}, but everything up to LSN {} was flushed from it",
            facts.log_end, checkpoint.lsn
        );
        report.problem(stage, Some(facts.end_offset), what, RESTORE);
    }
    if facts.spoken > checkpoint.lsn {
        let what = format!(
            "the newest checkpoint is lost: the log speaks of one at LSN {}, the newest found is at LSN {}",
            facts.spoken, checkpoint.lsn
        );
        let advice = "attach: the log is applied again from the older one, with the same result";
        report.problem(stage, Some(checkpoint_offset(0)), what, advice);
    }
    if superblock.state == StageState::Clean && facts.log_end < superblock.closed_lsn {
        let what = format!(
            "the log ends at LSN {}, but it reached LSN {} when the stage was closed in order",
            facts.log_end, superblock.closed_lsn
        );
        report.problem(stage, Some(facts.end_offset), what, RESTORE);
    }
    if superblock.state == StageState::Clean && facts.log_end > superblock.closed_lsn {
        report.notes.push(format!(
            "the stage was closed in order at LSN {}, but its log goes on to LSN {}",
            superblock.closed_lsn, facts.log_end
        ));
    }
}

fn check_volume(
    volume: &VolumeInfo,
    superblock: &Superblock,
    checkpoint: &Checkpoint,
    facts: &LogFacts,
    backings: &BTreeMap<VolumeId, &dyn Disk>,
    report: &mut CheckReport,
) -> VolumeCheck {
    let staged = facts.staged.get(&volume.id).copied().unwrap_or_default();
    let mut checked = VolumeCheck {
        name: volume.name.clone(),
        uuid: volume.uuid.to_string(),
        id: volume.id,
        size_bytes: volume.size_bytes,
        backing: volume.backing.clone(),
        backing_checked: false,
        flushed_lsn: None,
        staged_records: staged.records,
        staged_bytes: staged.bytes,
    };
    let Some(backing) = backings.get(&volume.id) else {
        report.notes.push(format!("the backing of volume '{}' was not given: not checked", volume.name));
        return checked;
    };
    checked.backing_checked = true;
    match check_label(superblock, volume, *backing, checkpoint, facts.log_end) {
        Ok(label) => {
            checked.flushed_lsn = Some(label.flushed_lsn);
            if label.volume_bytes != volume.size_bytes {
                report.notes.push(format!(
                    "the label of volume '{}' on {} speaks of {} bytes, the stage of {}",
                    volume.name,
                    backing.name(),
                    label.volume_bytes,
                    volume.size_bytes
                ));
            }
        }
        Err(error) => {
            let at = Some(label_offset(volume.size_bytes, 0));
            report.problem(*backing, at, error.report(), label_advice(&error));
        }
    }
    checked
}

fn label_advice(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::NewerFormat => "use a newer tidegate",
        ErrorKind::WrongDevice => RESTORE_BACKING,
        _ => "look at the device: it could not be read",
    }
}

fn check_patches(
    stage: &dyn Disk,
    superblock: &Superblock,
    checkpoint: &Checkpoint,
    report: &mut CheckReport,
) {
    let zone = match read_at(stage, PATCH_OFFSET, superblock.geometry.patch_bytes as usize) {
        Ok(zone) => zone,
        Err(error) => {
            report.problem(stage, Some(PATCH_OFFSET), format!("patch zone: {}", error.report()), RESTORE);
            return;
        }
    };
    // One that is not valid was torn while it was written, when what it held before was no longer needed. Labels prove
    // nothing here: the attempt that wrote them may have failed, and the zone is written again by the next.
    let Some((epoch_end, images)) = decode_patches(&zone, superblock.salt) else {
        if !is_blank(&zone) {
            report.notes.push(
                "the patch zone is not valid: never used, cut short while written, or damaged".to_owned(),
            );
        }
        return;
    };
    if epoch_end <= checkpoint.lsn {
        return;
    }
    report.pending_patches = images.len() as u64;
    let beyond = beyond_the_log(epoch_end, report.log_end_lsn);
    for what in beyond.into_iter().chain(images.iter().filter_map(|image| misplaced(image, superblock))) {
        report.problem(stage, Some(PATCH_OFFSET), what, RESTORE);
    }
}
