//! Opening a stage for use.
//!
//! Order, and why:
//! 1. read superblock, log, labels, arena; append to the log, in memory, what only the arena holds; refuse what does not
//!    fit together. No device is written until here, so a refusal leaves everything as it was;
//! 2. sync the stage and the backings: what was read may sit in a device's volatile cache, written by a process that was
//!    killed before its sync; from now on it counts as durable. For a backing that is its newest label: the next one goes
//!    to the other slot, over the only label that was durable;
//! 3. write the patch zone's images to the backings, if their epoch is unfinished, and sync them (idempotent);
//! 4. make the arena if there was none;
//! 5. write the superblock: new incarnation, in use. From here on groups of the earlier incarnation that were given up
//!    can never be taken for valid again.
//!
//! A crash in any step is met by the same steps from the start.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::scan::{Found, ScannedLog, rules_of, scan};
use super::staged::Staged;
use super::{patches, superblocks};
use crate::base::mutation::{Mutation, is};
use crate::base::{Error, ErrorKind, Lsn, RegionSeq, Result, VolumeId};
use crate::flush::FlushTarget;
use crate::format::arena::ArenaIdentity;
use crate::format::checkpoint::Checkpoint;
use crate::format::label::{LABEL_BYTES, LABEL_SLOTS, Label, backing_bytes_for, label_offset};
use crate::format::region::RegionStart;
use crate::format::superblock::{StageState, Superblock};
use crate::format::volume_entry::{AckLevel, VolumeInfo};
use crate::io::Disk;
use crate::stage::arena::Arena;
use crate::stage::core::{Core, CoreStart};
use crate::stage::ring::{ClosedGroup, RegionState, Ring, RingTail, TableState};
use crate::stage::walk::{Rules, arena_groups};
use crate::volume::status::RecoveryReport;

/// Where arenas come from.
pub trait ArenaSource {
    /// The existing arena, `None` if there is none; an error if there is something else in its place.
    fn find(&mut self, identity: &ArenaIdentity, salt: u64) -> Result<Option<Arena>>;
    /// A new arena.
    fn make(&mut self, identity: &ArenaIdentity, salt: u64) -> Result<Arena>;
}

/// Arenas of this process alone: none is found, and new ones end with it.
#[derive(Debug)]
pub struct OwnArenas;

impl ArenaSource for OwnArenas {
    fn find(&mut self, _: &ArenaIdentity, _: u64) -> Result<Option<Arena>> {
        Ok(None)
    }
    fn make(&mut self, identity: &ArenaIdentity, _: u64) -> Result<Arena> {
        Arena::anonymous(identity)
    }
}

/// What opening needs to know of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Environment {
    /// Boot id: an arena cannot outlive a boot, so its absence is an alarm only in the same one.
    pub boot_id: Uuid,
    /// Id for a new arena: random.
    pub arena_id: u64,
    /// Go on although writes acknowledged in memory are gone.
    pub accept_loss: bool,
    /// Delete this volume, with what is staged for it: the way out when its backing is lost.
    pub forget: Option<VolumeId>,
}

/// An open stage: what the engine starts from.
#[derive(Debug)]
pub struct Opened {
    /// The superblock as it is on the device now.
    pub superblock: Superblock,
    /// The core.
    pub core: Core,
    /// The arena.
    pub arena: Arena,
    /// Rules of this incarnation.
    pub rules: Rules,
    /// The newest checkpoint.
    pub checkpoint: Checkpoint,
    /// Backings by volume.
    pub targets: BTreeMap<VolumeId, FlushTarget>,
    /// What was found.
    pub report: RecoveryReport,
}

/// Opens the stage on `stage`. `backings` holds the backing of every volume that is to be used; a volume with staged
/// records cannot be missing.
pub fn open(
    stage: &dyn Disk,
    backings: &BTreeMap<VolumeId, &dyn Disk>,
    arenas: &mut dyn ArenaSource,
    environment: Environment,
) -> Result<Opened> {
    stage.drop_cache()?;
    let read = superblocks::read(stage)?;
    check_block(stage, &read.superblock)?;
    let mut superblock = read.superblock.clone();
    superblock.volumes.retain(|v| Some(v.id) != environment.forget);
    let mut report =
        RecoveryReport { clean: superblock.state == StageState::Clean, ..RecoveryReport::default() };
    let mut staged = Staged::new(superblock.volumes.iter().map(|v| (v.id, v.size_bytes)));

    let mut log = scan(stage, &superblock, &mut |found| {
        report.records_from_log += 1;
        staged.add(found);
    })?;
    log.checkpoint.flushed.retain(|id, _| staged.knows(*id));
    let log_end = Lsn(log.next_lsn.0 - 1);
    check_closed_end(stage, &superblock, log_end)?;
    let mut unusable = BTreeMap::new();
    let targets = check_backings(&superblock, &log.checkpoint, log_end, backings, &mut unusable)?;
    let found_arena = find_arena(&superblock, arenas, environment)?;
    let first_new_group = log.next_group_seq;
    let mut closed = Vec::new();
    if let Some(arena) = &found_arena
        && !is(Mutation::ArenaRecordsAreDropped)
    {
        closed = extend_from_arena(&mut log, arena, &read.superblock, &mut staged, environment.accept_loss)?;
        report.arena_used = true;
        report.records_from_arena = log.next_lsn.0 - 1 - log_end.0;
    }
    let patches = patches::pending(stage, &superblock, &log.checkpoint, log_end)?;
    check_staged(&staged, &mut unusable)?;
    if targets.is_empty()
        && let Some((_, error)) = unusable.pop_first()
    {
        return Err(error);
    }
    let building = staged.finish();

    // Not those of volumes that cannot be used or are forgotten: what fails there is no business of the others.
    let usable: BTreeMap<VolumeId, &dyn Disk> = backings
        .iter()
        .filter(|(id, _)| targets.contains_key(id))
        .map(|(id, backing)| (*id, *backing))
        .collect();
    if !is(Mutation::RecoveryDoesNotSync) {
        stage.sync()?;
        for backing in usable.values() {
            backing.sync()?;
        }
    }
    report.superblocks_repaired = superblocks::repair(stage, &read)?;
    report.patches_restored = patches::restore(&patches, &usable)?;

    superblock.sequence += 1;
    superblock.incarnation += 1;
    if is(Mutation::GivenUpGroupsComeBack) {
        superblock.incarnation -= 1;
    } else {
        superblock.incarnation_group_seq = first_new_group;
    }
    superblock.boot_id = environment.boot_id;
    superblock.state = StageState::InUse;
    let arena = match found_arena {
        Some(arena) => arena,
        None => {
            superblock.arena_id = environment.arena_id;
            let identity =
                ArenaIdentity::new(superblock.stage_uuid, superblock.arena_id, &superblock.geometry);
            let arena = arenas.make(&identity, superblock.salt)?;
            adopt_tail(&log, &arena, superblock.geometry.block_bytes)?;
            arena
        }
    };
    if !is(Mutation::GivenUpGroupsComeBack) {
        superblock.incarnation_lsn = log.next_lsn;
    }
    let rules = rules_of(&superblock);
    superblocks::write(stage, &superblock)?;

    report.torn_bytes = log.torn_bytes;
    report.regions_by_table = log.by_table;
    report.regions_by_scan = log.by_scan;
    report.notes.append(&mut log.notes);
    report
        .notes
        .extend(unusable.values().map(|error| format!("a volume cannot be used: {}", error.report())));
    if report.superblocks_repaired > 0 {
        let count = report.superblocks_repaired;
        report.notes.push(format!("{count} damaged or old superblock copies were repaired from the others"));
    }
    let tail =
        RingTail { regions: log.regions, closed, next_lsn: log.next_lsn, next_group_seq: log.next_group_seq };
    let ring = Ring::resume(superblock.geometry, tail);
    let core = Core::new(CoreStart {
        ring,
        durable: log_end,
        checkpoint: log.checkpoint.lsn,
        indexes: building.wait(),
        allocated: false,
    });
    Ok(Opened { superblock, core, arena, rules, checkpoint: log.checkpoint, targets, report })
}

fn check_block(stage: &dyn Disk, superblock: &Superblock) -> Result<()> {
    let (device, log) = (stage.block_bytes(), superblock.geometry.block_bytes);
    if device <= log {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::WrongDevice,
        format!(
            "{} has blocks of {device} bytes, the stage on it was made for blocks of {log}: copy it to a device with blocks of \
             at most {log} bytes",
            stage.name()
        ),
    ))
}

fn check_closed_end(stage: &dyn Disk, superblock: &Superblock, log_end: Lsn) -> Result<()> {
    if superblock.state == StageState::InUse
        || log_end >= superblock.closed_lsn
        || is(Mutation::CloseIsNotChecked)
    {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Damaged,
        format!(
            "{}: the log ends at LSN {log_end}, but it reached LSN {} when the stage was closed in order: its end is \
             damaged. Nothing was changed. Restore the device from a copy",
            stage.name(),
            superblock.closed_lsn
        ),
    ))
}

/// The newest valid label of a backing.
pub fn read_label(backing: &dyn Disk, volume_bytes: u64) -> Result<Option<Label>> {
    let mut newest: Option<Label> = None;
    let mut bytes = vec![0; LABEL_BYTES as usize];
    for slot in 0..LABEL_SLOTS {
        let offset = label_offset(volume_bytes, slot);
        if offset + LABEL_BYTES > backing.len_bytes() {
            continue;
        }
        backing.read(offset, &mut bytes)?;
        let label = Label::decode(&bytes, slot).map_err(|e| e.within(backing.name()))?;
        if label.as_ref().is_some_and(|l| newest.as_ref().is_none_or(|n| n.sequence < l.sequence)) {
            newest = label;
        }
    }
    Ok(newest)
}

/// Checks that `backing` is the one of `volume`, as the checkpoint and the log end require.
pub fn check_label(
    superblock: &Superblock,
    volume: &VolumeInfo,
    backing: &dyn Disk,
    checkpoint: &Checkpoint,
    log_end: Lsn,
) -> Result<Label> {
    let label = check_identity(superblock, volume, backing, checkpoint)?;
    check_log_reaches(volume, &label, &backing.name(), log_end)?;
    Ok(label)
}

/// Checks that `backing` is the one of `volume` and not an old copy of it.
fn check_identity(
    superblock: &Superblock,
    volume: &VolumeInfo,
    backing: &dyn Disk,
    checkpoint: &Checkpoint,
) -> Result<Label> {
    // A label that a failed sync has left in the cache alone would be taken for durable, and the next one be written over the
    // only one that is.
    if !is(Mutation::CachedLabelIsTrusted) {
        backing.drop_cache()?;
    }
    let name = backing.name();
    let wrong = |what: String| Error::new(ErrorKind::WrongDevice, what);
    let needed = backing_bytes_for(volume.size_bytes);
    if backing.len_bytes() < needed {
        return Err(wrong(format!(
            "{name} has {} bytes, volume '{}' needs {needed}: it is another device or it has shrunk",
            backing.len_bytes(),
            volume.name
        )));
    }
    let Some(label) = read_label(backing, volume.size_bytes)? else {
        return Err(wrong(format!(
            "{name} carries no label of volume '{}': it is another device, or its content was replaced; give the path of \
             the right one with --backing",
            volume.name
        )));
    };
    let wrong_uuid = label.stage_uuid != superblock.stage_uuid || label.volume_uuid != volume.uuid;
    if wrong_uuid && !is(Mutation::WrongBackingIsAccepted) {
        return Err(wrong(format!(
            "{name} is the backing of volume '{}' ({}) of stage {}; expected was volume '{}' ({}) of stage {}",
            label.name, label.volume_uuid, label.stage_uuid, volume.name, volume.uuid, superblock.stage_uuid
        )));
    }
    let flushed = checkpoint.flushed.get(&volume.id).copied().unwrap_or(Lsn::ZERO);
    if label.flushed_lsn < flushed && !is(Mutation::OldBackingIsAccepted) {
        return Err(wrong(format!(
            "{name} is an old copy of the backing of '{}': it holds what was flushed up to LSN {}, the stage has flushed \
             up to {flushed}; bring back the current one",
            volume.name, label.flushed_lsn
        )));
    }
    Ok(label)
}

/// Checks that the log reaches what the backing of `volume` says was flushed from it.
fn check_log_reaches(volume: &VolumeInfo, label: &Label, name: &str, log_end: Lsn) -> Result<()> {
    if label.flushed_lsn > log_end && !is(Mutation::OldStageIsAccepted) {
        return Err(Error::new(
            ErrorKind::WrongDevice,
            format!(
                "the stage is an old copy or lost its end: its log ends at LSN {log_end}, but {name}, the backing of '{}', was \
             flushed up to LSN {}; bring back the current stage",
                volume.name, label.flushed_lsn
            ),
        ));
    }
    Ok(())
}

/// What is known of the backings that are there and right. A backing that is missing or wrong keeps only its own volume
/// from being used, as long as nothing is staged for it: that is remembered in `unusable`.
fn check_backings(
    superblock: &Superblock,
    checkpoint: &Checkpoint,
    log_end: Lsn,
    backings: &BTreeMap<VolumeId, &dyn Disk>,
    unusable: &mut BTreeMap<VolumeId, Error>,
) -> Result<BTreeMap<VolumeId, FlushTarget>> {
    let mut targets = BTreeMap::new();
    for volume in &superblock.volumes {
        let Some(backing) = backings.get(&volume.id) else {
            let what = format!("the backing {} of volume '{}' is not there", volume.backing, volume.name);
            unusable.insert(volume.id, Error::new(ErrorKind::NotFound, what));
            continue;
        };
        match check_identity(superblock, volume, *backing, checkpoint) {
            Ok(label) => {
                check_log_reaches(volume, &label, &backing.name(), log_end)?;
                let block_bytes = backing.block_bytes();
                let attempted = label.flushed_lsn;
                targets.insert(
                    volume.id,
                    FlushTarget { label, attempted, block_bytes, zeroes: true, discards: true },
                );
            }
            Err(error) => {
                unusable.insert(volume.id, error);
            }
        }
    }
    Ok(targets)
}

/// Refuses the stage if something is staged for a volume whose backing cannot be used: the volumes of a stage share one
/// order, so none could be flushed past it.
fn check_staged(staged: &Staged, unusable: &mut BTreeMap<VolumeId, Error>) -> Result<()> {
    let Some(id) = unusable.keys().copied().find(|id| staged.has(*id)) else { return Ok(()) };
    let error = unusable.remove(&id).expect("found above");
    Err(Error::new(
        error.kind(),
        format!(
            "{}; it has writes in the stage, and the volumes of a stage share one order, so all backings with staged writes \
             are needed",
            error.report()
        ),
    ))
}

/// The arena of the previous server, if it should still be there and is.
fn find_arena(
    superblock: &Superblock,
    arenas: &mut dyn ArenaSource,
    environment: Environment,
) -> Result<Option<Arena>> {
    if superblock.state == StageState::Clean {
        return Ok(None);
    }
    let identity = ArenaIdentity::new(superblock.stage_uuid, superblock.arena_id, &superblock.geometry);
    let found = arenas.find(&identity, superblock.salt);
    let at_risk = superblock.volumes.iter().any(|v| v.ack == AckLevel::Memory);
    let told = is(Mutation::ArenaLossIsNotTold);
    if superblock.boot_id != environment.boot_id || !at_risk || environment.accept_loss || told {
        return Ok(found.unwrap_or(None));
    }
    let problem = match found {
        Ok(Some(arena)) => return Ok(Some(arena)),
        Ok(None) => "its arena is gone".to_owned(),
        Err(error) => error.report(),
    };
    Err(Error::new(
        ErrorKind::Lost,
        format!(
            "the stage was in use when its server died, and {problem}: writes acknowledged in memory since the last flush are \
             lost. Bring the arena file back, or attach with --accept-loss to go on from what the log device holds"
        ),
    ))
}

/// Puts the bytes of the log's last region into a new arena.
fn adopt_tail(log: &ScannedLog, arena: &Arena, block_bytes: u32) -> Result<()> {
    let tail = log.regions.last().expect("a log has a region");
    arena.allocate(tail.start.seq)?;
    arena.put(tail.start.seq, 0, &log.tail_image);
    arena.zero(tail.start.seq, tail.data_end.max(block_bytes), arena.region_bytes());
    Ok(())
}

/// Appends to `log` the records that the arena holds behind its end, and returns their groups, which the committer has to
/// write. What lies behind them was never accepted; the first LSN of the new incarnation keeps later recoveries from
/// taking it for a record.
fn extend_from_arena(
    log: &mut ScannedLog,
    arena: &Arena,
    superblock: &Superblock,
    staged: &mut Staged,
    accept_loss: bool,
) -> Result<Vec<ClosedGroup>> {
    let geometry = superblock.geometry;
    let rules = &rules_of(superblock);
    let mut closed = Vec::new();
    let tail = *log.regions.last().expect("a log has a region");
    // The log's bytes are proven; the arena's copy of them is not.
    arena.allocate(tail.start.seq)?;
    arena.put(tail.start.seq, 0, &log.tail_image);
    loop {
        let region = log.regions.last_mut().expect("a log has a region");
        let seq = region.start.seq;
        let image = arena.bytes(seq, 0, arena.region_bytes());
        let mut records = Vec::new();
        let groups = arena_groups(image, region.data_end, seq, log.next_lsn, rules, &mut records);
        for group in &groups {
            let end = group.records_end.next_multiple_of(geometry.block_bytes);
            closed.push(ClosedGroup {
                region: seq,
                write_from: if region.group_count == 0 { 0 } else { group.header_offset },
                header_offset: group.header_offset,
                records_end: group.records_end,
                end,
                first_lsn: group.first_lsn,
                record_count: group.record_count,
                group_seq: log.next_group_seq,
            });
            log.next_group_seq += 1;
            region.group_count += 1;
            region.record_count += group.record_count;
            region.data_end = end;
        }
        log.next_lsn = log.next_lsn.plus(records.len() as u64);
        for (record_offset, record) in records {
            let (lsn, volume, kind, range) = (record.lsn, record.volume, record.kind, record.range);
            staged.add(&Found { lsn, volume, kind, range, region: seq, record_offset });
        }
        // What lies between and behind the records was never accepted, and is destroyed: an LSN of it may become one that
        // later incarnations admit.
        for group in &groups {
            arena.zero(seq, group.records_end, group.records_end.next_multiple_of(geometry.block_bytes));
        }
        arena.zero(seq, region.data_end, arena.region_bytes());
        // Looking at memory that does not exist would need it, too.
        arena.allocate(seq.next())?;
        if log.regions.len() == geometry.region_count as usize {
            // Only an older checkpoint than the last one lets a full ring go on: which region made room is not known.
            if goes_on(arena, seq.next(), log.next_lsn, rules) && !accept_loss {
                return Err(no_room(log.next_lsn));
            }
            break;
        }
        if !goes_on(arena, seq.next(), log.next_lsn, rules) {
            break;
        }
        log.regions.push(empty_region(seq.next(), log, geometry.block_bytes));
    }
    Ok(closed)
}

fn no_room(lsn: Lsn) -> Error {
    Error::new(
        ErrorKind::Lost,
        format!(
            "the newest checkpoint is damaged, and so the records from LSN {lsn} on, which only the arena holds, have no \
             place in the log. Restore the stage device from a copy, or attach with --accept-loss to go on without them"
        ),
    )
}

/// Region `seq`, with which the log goes on.
fn empty_region(seq: RegionSeq, log: &ScannedLog, block_bytes: u32) -> RegionState {
    RegionState {
        start: RegionStart { seq, first_lsn: log.next_lsn, first_group_seq: log.next_group_seq },
        record_count: 0,
        group_count: 0,
        data_end: block_bytes,
        durable_end: block_bytes,
        resident: true,
        table: TableState::Missing,
    }
}

/// Whether the slot of region `seq` starts with the record `lsn` of that region.
fn goes_on(arena: &Arena, seq: RegionSeq, lsn: Lsn, rules: &Rules) -> bool {
    let image = arena.bytes(seq, 0, arena.region_bytes());
    !arena_groups(image, rules.block_bytes, seq, lsn, rules, &mut Vec::new()).is_empty()
}
