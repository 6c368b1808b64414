//! Faults that meet a stage between two servers: rot, misdirected and lost writes, old, swapped, foreign, shrunk and missing
//! devices, a damaged arena. Each is tried on a fork of the story: the stage is opened with the fault in place, what comes of
//! it is judged by [`super::checkers::devices`], and everything is put back.

use std::os::unix::fs::FileExt;

use tidegate_driver::base::{Lsn, VolumeId};
use tidegate_driver::format::checkpoint::Checkpoint;
use tidegate_driver::format::geometry::{
    CHECKPOINT_SLOT_BYTES, CHECKPOINT_SLOTS, Geometry, PATCH_OFFSET, SUPERBLOCK_COPIES, checkpoint_offset,
};
use tidegate_driver::format::superblock::{SUPERBLOCK_BYTES, StageState};
use tidegate_driver::io::Disk;
use tidegate_driver::recovery::open::read_label;
use tidegate_driver::recovery::scan::{read_checkpoints, rules_of, scan};
use tidegate_driver::recovery::{Opened, superblocks};
use tidegate_driver::stage::walk::{Expected, Rules, whole_group};

use super::checkers::devices::{Allowed, refused};
use super::disk::{Saved, SimDisk, lock};
use super::report::CrashKind;
use super::running::Running;
use super::setup::{World, site_of};
use super::site::Stop;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Bytes of the stage change.
    Rot,
    /// A block of the stage holds what was written for another.
    Misdirected,
    /// A block of the stage holds what it held when an earlier server began.
    LostWrite,
    /// The stage is a copy from when an earlier server began.
    OldStage,
    /// A backing is a copy from when an earlier server began.
    OldBacking(usize),
    /// Two backings have changed places.
    Swapped(usize, usize),
    /// A backing is some other device.
    ForeignBacking(usize),
    /// A backing is not there.
    MissingBacking(usize),
    /// A backing has lost its end.
    ShrunkBacking(usize),
    /// The stage's device has lost its end.
    ShrunkStage,
    /// The stage's device is some other.
    ForeignStage,
    /// Bytes of the arena change.
    DamagedArena,
}

/// What the undamaged devices say.
pub struct Truth {
    /// Superblock's map.
    geometry: Geometry,
    closed: bool,
    /// Newest record of the log.
    log_end: u64,
    /// Newest checkpoint.
    pub checkpoint: Checkpoint,
    /// LSN that each backing's label names.
    pub labels: Vec<u64>,
    /// Of each group that no later one proves to have been durable: the LSN before it, and where it lies on the stage.
    pub unproven: Vec<(u64, u64, u64)>,
    /// Used parts of the log: offset and length.
    used: Vec<(u64, u64)>,
}

struct Fork {
    disks: Vec<Saved>,
    arenas: Vec<(u64, Vec<u8>)>,
    model: super::model::Model,
    required: u64,
    next_arena: u64,
}

impl World {
    /// Tries one fault.
    pub(super) fn probe(&mut self) -> Result<(), String> {
        let Ok(truth) = self.truth() else { return Ok(()) };
        lock(&self.ctl).crash_at = u64::MAX;
        let fork = self.fork();
        let settle = |world: &World| {
            std::iter::once(&world.stage).chain(&world.backings).for_each(SimDisk::settle);
        };
        settle(self);
        let hurt = self.hurt(&truth);
        settle(self);
        let told = match hurt {
            None => Ok(()),
            Some((fault, allowed)) => {
                lock(&self.ctl).note(&format!("probe {fault:?}"), &[]);
                self.judge_probe(fault, &allowed).map_err(|what| format!("{fault:?}: {what}"))
            }
        };
        self.unfork(fork);
        told
    }

    /// The disks as they are now: stage first.
    pub(super) fn saved_disks(&self) -> Vec<Saved> {
        std::iter::once(&self.stage).chain(&self.backings).map(|disk| disk.save()).collect()
    }

    fn fork(&self) -> Fork {
        let arenas = self.arenas.0.iter().map(|(id, memory)| {
            let mut bytes = vec![0; memory.metadata().expect("memory has a size").len() as usize];
            memory.read_exact_at(&mut bytes, 0).expect("memory can be read");
            (*id, bytes)
        });
        Fork {
            disks: self.saved_disks(),
            arenas: arenas.collect(),
            model: self.model.clone(),
            required: self.required,
            next_arena: self.next_arena,
        }
    }

    fn unfork(&mut self, fork: Fork) {
        self.running = None;
        self.missing = None;
        for (disk, saved) in std::iter::once(&self.stage).chain(&self.backings).zip(&fork.disks) {
            disk.put_back(saved);
        }
        self.arenas.0.retain(|id, _| fork.arenas.iter().any(|(known, _)| known == id));
        for (id, bytes) in &fork.arenas {
            self.arenas.0[id].write_all_at(bytes, 0).expect("memory can be written");
        }
        self.model = fork.model;
        self.required = fork.required;
        self.next_arena = fork.next_arena;
    }

    fn truth(&self) -> tidegate_driver::base::Result<Truth> {
        let superblock = superblocks::read(&self.stage)?.superblock;
        let checkpoint = read_checkpoints(&self.stage, &superblock)?.remove(0);
        let log = scan(&self.stage, &superblock, &mut |_| {})?;
        let mut labels = Vec::new();
        for (info, backing) in superblock.volumes.iter().zip(&self.backings) {
            let label = read_label(backing, info.size_bytes)?;
            labels.push(label.map_or(0, |label| label.flushed_lsn.0));
        }
        let rules = rules_of(&superblock);
        let tail = log.regions.last().expect("a log has a region").start;
        let base = superblock.geometry.region_offset(tail.seq);
        let first = Expected { region: tail.seq, group_seq: tail.first_group_seq, first_lsn: tail.first_lsn };
        let unproven = unproven_groups(&log.tail_image, first, &rules)
            .into_iter()
            .map(|(from, to, before)| (before, base + from, base + to))
            .collect();
        let used = log
            .regions
            .iter()
            .map(|region| (superblock.geometry.region_offset(region.start.seq), u64::from(region.data_end)));
        Ok(Truth {
            closed: superblock.state == StageState::Clean,
            geometry: superblock.geometry,
            checkpoint,
            log_end: log.next_lsn.0 - 1,
            labels,
            unproven,
            used: used.collect(),
        })
    }

    /// Puts a fault in place; says what may come of it. `None`: this one cannot be here.
    fn hurt(&mut self, truth: &Truth) -> Option<(Fault, Allowed)> {
        let count = self.backings.len() as u64;
        let volume = self.rng.below(count) as usize;
        let one = Allowed { without: vec![volume], ..Allowed::default() };
        Some(match self.rng.below(16) {
            0..=3 => (Fault::Rot, self.hurt_stage(truth, Fault::Rot)?),
            4 | 5 => (Fault::Misdirected, self.hurt_stage(truth, Fault::Misdirected)?),
            6 | 7 => (Fault::LostWrite, self.hurt_stage(truth, Fault::LostWrite)?),
            8 => {
                self.stage.put_back(self.old_disks.first()?);
                let flushed = truth.labels.clone();
                (Fault::OldStage, Allowed { flushed, any_content: true, ..Allowed::default() })
            }
            9 => self.hurt_old_backing(volume, truth)?,
            10 => {
                let other = (volume + 1) % self.backings.len();
                let (a, b) = (self.backings[volume].save(), self.backings[other].save());
                self.backings[volume].put_back(&b);
                self.backings[other].put_back(&a);
                let allowed = Allowed { without: vec![volume, other], ..Allowed::default() };
                (volume != other).then_some((Fault::Swapped(volume, other), allowed))?
            }
            11 => {
                let mut bytes = vec![0; self.backings[volume].len_bytes() as usize];
                self.rng.fill(&mut bytes);
                self.backings[volume].damage(0, &bytes);
                (Fault::ForeignBacking(volume), one)
            }
            12 => {
                self.missing = Some(volume);
                (Fault::MissingBacking(volume), one)
            }
            13 => {
                let spare = self.backings[volume].len_bytes() - self.model.size(volume);
                let cut = spare.saturating_sub(self.rng.range(0, 8 << 10)) / 4096 * 4096;
                self.backings[volume].shrink(cut);
                (Fault::ShrunkBacking(volume), one)
            }
            14 => {
                let blank = self.rng.chance(500);
                if blank {
                    self.stage.damage(0, &vec![0; self.stage.len_bytes() as usize]);
                } else {
                    self.stage.shrink(4096 * self.rng.range(1, 16));
                }
                let fault = if blank { Fault::ForeignStage } else { Fault::ShrunkStage };
                (fault, Allowed { refusal_only: true, ..Allowed::default() })
            }
            _ => (Fault::DamagedArena, self.hurt_arena()?),
        })
    }

    fn hurt_old_backing(&mut self, volume: usize, truth: &Truth) -> Option<(Fault, Allowed)> {
        let size = self.model.size(volume);
        self.backings[volume].put_back(self.old_disks.get(volume + 1)?);
        let old = read_label(&self.backings[volume], size).ok()?.map(|label| label.flushed_lsn);
        let flushed = truth.checkpoint.flushed.get(&VolumeId(volume as u16 + 1)).copied();
        // Without a flush in between the old copy is as good as the new one: the log covers the difference.
        let must_be_noticed = old.is_none_or(|old| old < flushed.unwrap_or(Lsn::ZERO));
        let without = if must_be_noticed { vec![volume] } else { Vec::new() };
        Some((
            Fault::OldBacking(volume),
            Allowed { without, may_be_without: true, any_content: !must_be_noticed, ..Allowed::default() },
        ))
    }

    /// A place on the stage where damage is interesting.
    fn place(&mut self, truth: &Truth) -> u64 {
        let (used, used_bytes) = self.rng.pick(&truth.used);
        match self.rng.below(10) {
            0 => self.rng.below(self.stage.len_bytes()),
            1 => {
                let copy = self.rng.below(u64::from(SUPERBLOCK_COPIES)) as u32;
                truth.geometry.superblock_offset(copy) + self.rng.below(SUPERBLOCK_BYTES as u64)
            }
            2 => {
                checkpoint_offset(self.rng.below(u64::from(CHECKPOINT_SLOTS)) as u32)
                    + self.rng.below(CHECKPOINT_SLOT_BYTES)
            }
            3 => used + u64::from(truth.geometry.region_bytes) - 1 - self.rng.below(2048),
            4 => used + self.rng.below(64),
            _ => used + self.rng.below(used_bytes.max(1)),
        }
    }

    fn hurt_stage(&mut self, truth: &Truth, fault: Fault) -> Option<Allowed> {
        let at = self.place(truth);
        let (from, bytes) = match fault {
            Fault::Rot => {
                let len = self.rng.range(1, 8).min(self.stage.len_bytes() - at);
                let mut bytes = self.stage.visible(at, len as usize);
                bytes.iter_mut().for_each(|byte| *byte ^= self.rng.range(1, 255) as u8);
                (at, bytes)
            }
            _ => {
                let block = u64::from(truth.geometry.block_bytes);
                let from = at / block * block;
                let source =
                    if fault == Fault::Misdirected { self.place(truth) / block * block } else { from };
                let bytes = match fault {
                    Fault::Misdirected => self.stage.visible(source, block as usize),
                    _ => self.old_disks.first()?.visible(source, block as usize).to_vec(),
                };
                (from, bytes)
            }
        };
        let to = from + bytes.len() as u64;
        let patches = PATCH_OFFSET..PATCH_OFFSET + u64::from(truth.geometry.patch_bytes);
        let power = self.last_crash == Some(CrashKind::Power);
        if power && from < patches.end && to > patches.start {
            // With the images of blocks that the power cut has torn their bytes are gone: outside the promise.
            return None;
        }
        lock(&self.ctl).note("damage", &[from, bytes.len() as u64]);
        self.stage.damage(from, &bytes);
        let hit = truth.unproven.iter().find(|&&(_, start, end)| !truth.closed && from < end && to > start);
        let floor = hit.map(|&(before, ..)| before);
        Some(Allowed { floor, log_end: truth.log_end, damage: true, ..Allowed::default() })
    }

    fn hurt_arena(&mut self) -> Option<Allowed> {
        let (_, memory) = self.arenas.0.last_key_value()?;
        let len = memory.metadata().ok()?.len();
        for _ in 0..self.rng.pick(&[1, 20, 500]) {
            let mut bytes = [0; 8];
            self.rng.fill(&mut bytes);
            memory.write_all_at(&bytes, 4096 + self.rng.below(len - 4096 - 8)).ok()?;
        }
        // Records that only the arena holds end where the damage begins.
        Some(Allowed { floor: Some(self.model.durable()), damage: true, arena: true, ..Allowed::default() })
    }

    fn judge_probe(&mut self, fault: Fault, allowed: &Allowed) -> Result<(), String> {
        let before = self.saved_disks();
        let accept_loss = self.arena_lost;
        match self.open_once(accept_loss) {
            Err(error) => {
                self.report.probes_refused += 1;
                let disks = std::iter::once(&self.stage).chain(&self.backings);
                let changed = disks.zip(&before).any(|(disk, saved)| !disk.is_as(saved));
                refused(&error, allowed, changed)
            }
            Ok(opened) => {
                self.report.probes_survived += 1;
                self.survived(fault, opened, allowed)
            }
        }
    }

    fn survived(&mut self, fault: Fault, opened: Opened, allowed: &Allowed) -> Result<(), String> {
        let usable: Vec<bool> =
            (0..self.backings.len()).map(|v| opened.targets.contains_key(&VolumeId(v as u16 + 1))).collect();
        let end = opened.core.claimed().0;
        allowed.opened(&usable, end, self.required)?;
        if allowed.arena && end < self.required {
            self.report.arena_shorter += 1;
        }
        if allowed.any_content {
            return Ok(());
        }
        let required = allowed.floor.map_or(self.required, |floor| floor.min(self.required));
        if end < self.model.base() {
            // The list cannot go back behind what is settled, so the content cannot be known.
            return Ok(());
        }
        if end < allowed.log_end {
            // A group that none proves was taken for a torn one. Had its flush begun, the backings hold parts of it: a known
            // limit.
            self.report.last_groups_given_up += 1;
            return Ok(());
        }
        let required = required.max(self.model.base());
        self.model.give_up(required);
        self.model.recovered(end, required)?;
        let doors: Vec<usize> = usable.iter().map(|&usable| usize::from(usable)).collect();
        let mut running = Running::start(opened, &site_of!(self), &doors);
        running.damage_is_expected = allowed.damage;
        self.running = Some(running);
        lock(&self.ctl).faults_injected += u64::from(allowed.damage);
        let told = self.verify_usable(&usable);
        let damaged = |world: &World| world.running.as_ref().is_some_and(Running::is_damaged);
        match told {
            Err(Stop::Fail(what)) => Err(format!("{what} (survived {fault:?})")),
            Err(Stop::Crash) => Err("no crash was asked for".to_owned()),
            _ if damaged(self) || usable.contains(&false) => Ok(()),
            _ => match self.drain().and_then(|()| self.check_backings()) {
                Err(Stop::Fail(what)) if !damaged(self) => Err(format!("{what} (survived {fault:?})")),
                Err(Stop::Crash) => Err("no crash was asked for".to_owned()),
                _ => Ok(()),
            },
        }
    }
}

/// The groups of the region that `image` holds which no later one proves to have been durable, in order: where each begins
/// and ends, and the LSN before it.
fn unproven_groups(image: &[u8], mut expected: Expected, rules: &Rules) -> Vec<(u64, u64, u64)> {
    let mut at = rules.block_bytes;
    let mut found: Vec<(u64, (u64, u64, u64))> = Vec::new();
    let mut records = Vec::new();
    while let Some(group) = whole_group(image, at, expected, rules, &mut records) {
        let from = if at == rules.block_bytes { 0 } else { at };
        at += group.group_bytes;
        found.retain(|(seq, _)| !group.proves(*seq));
        found.push((group.group_seq, (u64::from(from), u64::from(at), group.first_lsn.0 - 1)));
        expected.group_seq += 1;
        expected.first_lsn = group.first_lsn.plus(u64::from(group.record_count));
    }
    found.into_iter().map(|(_, place)| place).collect()
}
