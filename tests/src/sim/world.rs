//! A seed's story: servers that run and die in turn, and the checks between them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use tidegate_driver::base::{ErrorKind, Lsn, VolumeId};
use tidegate_driver::format::superblock::StageState;
use tidegate_driver::io::Disk;
use tidegate_driver::recovery::{Environment, Opened, open, superblocks};
use uuid::Uuid;

use super::aim::{Aim, PATIENCE_ORDINARY, Plan};
use super::client::Habits;
use super::disk::{Control, Ctl, Faults, Moment, lock};
use super::report::{CrashKind, Failure, Options, Report};
use super::rng::Rng;
use super::running::Running;
use super::script::Do;
use super::setup::{World, site_of};
use super::site::Stop;

/// Most events of a story: beyond it, it is stuck.
const TICKS_MAX: u64 = 2_000_000;

/// Events of a life after which nothing fails any more: a long epoch whose every attempt meets a fault would never end.
const FAULTY_TICKS_MAX: u64 = 20_000;

/// Runs a story.
pub fn run(options: Options) -> Result<Report, Box<Failure>> {
    let ctl: Ctl = Arc::new(Mutex::new(Control {
        rng: Rng::new(options.seed, 10),
        step: 0,
        crash_at: u64::MAX,
        crash_while: Moment::Any,
        patience: PATIENCE_ORDINARY,
        trap: None,
        cut: None,
        crashed: false,
        faults: Faults::default(),
        faults_injected: 0,
        subset: options.subset,
        sectors: [0; 4],
        trace: 0,
        log: options.log.then(Vec::new),
    }));
    let told = catch_unwind(AssertUnwindSafe(|| World::new(options, &ctl).story()));
    let mut ctl = ctl.lock().unwrap_or_else(PoisonError::into_inner);
    let what = match told {
        Ok(Ok(mut report)) => {
            report.trace = ctl.trace;
            report.steps = ctl.step;
            report.faults = ctl.faults_injected;
            report.sectors = ctl.sectors;
            return Ok(report);
        }
        Ok(Err(what)) => what,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            format!("panic: {}", text.unwrap_or_default())
        }
    };
    Err(Box::new(Failure { options, step: ctl.step, what, log: ctl.log.take().unwrap_or_default() }))
}

impl World {
    fn story(mut self) -> Result<Report, String> {
        let lives = match self.options.short {
            Some(crash) => 2 + u64::from(crash.again > 0),
            None => self.rng.range(2, 12),
        };
        for life in 0..lives {
            let last = life + 1 == lives;
            if self.options.short.is_none() && self.rng.chance(300) {
                self.old_disks = self.saved_disks();
            }
            let plan = self.crash_plan(life, last);
            let plan = self.aimed(lives - 1 - life).unwrap_or(plan);
            let cut = self.aimed_cut();
            {
                let mut ctl = lock(&self.ctl);
                let at = if last { u64::MAX } else { ctl.step.saturating_add(plan.steps) };
                ctl.crash_at = at.min(u64::MAX / 2);
                ctl.crash_while = plan.moment;
                (ctl.patience, ctl.trap, ctl.cut) = (plan.patience, plan.trap, cut);
                ctl.crashed = false;
            }
            let ended = if last { self.last_life() } else { self.life() };
            if life == 0 {
                self.report.first_life = lock(&self.ctl).step;
            }
            match ended {
                Ok(()) => self.last_crash = None,
                Err(Stop::Crash) => {
                    if life == 0 {
                        self.report.first_trace = lock(&self.ctl).trace;
                    }
                    self.crash(plan.kind);
                    if life == 0 {
                        self.report.first_cut = lock(&self.ctl).sectors[0];
                    }
                    lock(&self.ctl).subset = None;
                }
                Err(Stop::Fail(what)) => return Err(what),
            }
            if self.options.short.is_none() && self.rng.chance(400) {
                self.probe()?;
            }
        }
        Ok(self.report)
    }

    fn crash_plan(&mut self, life: u64, last: bool) -> Plan {
        if let Some(crash) = self.options.short {
            // The second crash is the worst kind, whatever the first one was.
            return if life == 0 {
                Plan::ordinary(crash.step.max(1), crash.kind, Moment::Any)
            } else {
                Plan::ordinary(crash.again.max(1), CrashKind::Power, Moment::Any)
            };
        }
        let kind = match self.rng.below(10) {
            0..=3 => CrashKind::Power,
            4 => CrashKind::KillWithoutArena,
            _ => CrashKind::Kill,
        };
        let aims = [
            Moment::Any,
            Moment::LogWrite,
            Moment::RegionBegins,
            Moment::StageWrite,
            Moment::BackingWrite,
            Moment::Label,
            Moment::Sync,
        ];
        let aim = self.rng.pick(&aims);
        let (steps, kind, moment) = match self.rng.below(9) {
            8 => (self.rng.range(1, 200), kind, self.rng.pick(&[Moment::Label, Moment::Sync])),
            0 => (self.rng.range(1, 60), kind, Moment::Any),
            1 | 2 => (self.rng.range(20, 80), kind, Moment::LogWrite),
            3 => (self.rng.range(1, 300), kind, aim),
            4 if !last => (u64::MAX, kind, aim),
            _ => (self.rng.range(50, 2500), kind, aim),
        };
        Plan::ordinary(steps, kind, moment)
    }

    // ---- the parts of a life

    fn life(&mut self) -> Result<(), Stop> {
        self.open()?;
        if self.faulty > 0 {
            lock(&self.ctl).faults.stage_read = self.aims.pick(&[0, 0, 200, 900]);
        }
        let script: Vec<Do> = self.options.script.into_iter().flatten().collect();
        if script.is_empty() && self.rng.chance(700) {
            self.verify_through_doors()?;
        }
        self.ask_again();
        let habits = self.habits();
        let quota = match (self.options.short, self.aim) {
            (Some(_), _) => self.rng.range(4, 40),
            (None, Some(Aim::RegionTwice | Aim::FullStage)) => 400,
            (None, _) => self.rng.pick(&[20, 100, 400]),
        };
        let running = self.running.as_mut().expect("open");
        running.habits = Some(habits);
        running.quota = if script.is_empty() { quota } else { script.len() as u64 };
        running.script = script.into();
        let mut left = self.rng.pick(&[0, 100, 1000]);
        let mut ticks = 0;
        loop {
            let running = self.running.as_ref().expect("open");
            if running.quota == 0 && !running.is_waiting() {
                if left == 0 {
                    break;
                }
                left -= 1;
            }
            if ticks > if self.faulty < 3 { FAULTY_TICKS_MAX } else { FAULTY_TICKS_MAX / 8 } {
                lock(&self.ctl).faults = Faults::default();
            } else if self.faulty > 0 && ticks % 256 == 0 && self.aim != Some(Aim::FullStage) {
                self.draw_faults();
            }
            if self.flushes_now(ticks) || (self.options.short.is_none() && self.rng.chance(2)) {
                self.running.as_mut().expect("open").drain();
            }
            ticks += 1;
            if self.options.short.is_none() && self.rng.chance(1) && self.aim != Some(Aim::FullStage) {
                self.change_volumes()?;
            }
            if !self.tick()? && running_is_done(self.running.as_ref()) {
                break;
            }
            if ticks > TICKS_MAX / 10 {
                return Err(Stop::Fail(self.running.as_ref().expect("open").unfinished()));
            }
        }
        lock(&self.ctl).faults = Faults::default();
        if self.options.subset.is_some() || self.rng.chance(500) {
            self.drain()?;
        }
        self.close()
    }

    fn last_life(&mut self) -> Result<(), Stop> {
        self.faulty = 0;
        self.open()?;
        self.verify_through_doors()?;
        self.ask_again();
        let mut habits = Habits::draw(&mut self.rng);
        habits.fetch_fails = 0;
        let quota = if self.options.short.is_some() { 0 } else { self.rng.range(0, 50) };
        let running = self.running.as_mut().expect("open");
        running.habits = Some(habits);
        running.quota = quota;
        self.until("every request is answered", |r| r.quota == 0 && !r.is_waiting())?;
        if self.rng.chance(500) {
            self.until("an idle stage is flushed", |r| r.checkpoint() >= r.published())?;
        }
        self.drain()?;
        self.check_backings()?;
        self.verify_through_doors()?;
        self.close()?;
        if self.rng.chance(500) {
            self.crash(CrashKind::Power);
        }
        self.open()?;
        self.verify_through_doors()?;
        self.close()
    }

    /// Opens the stage as often as it takes.
    fn open(&mut self) -> Result<(), Stop> {
        for attempt in 0.. {
            self.report.opens += 1;
            if self.faulty > 0 && attempt < 4 && self.rng.chance(300) {
                let rate = self.rng.pick(&[3, 20]);
                lock(&self.ctl).faults =
                    Faults { read: rate, backing_write: rate, stage_write: rate, sync: rate, stage_read: 0 };
            }
            let faults_before = lock(&self.ctl).faults_injected;
            let opened = self.open_once(self.loss_accepted);
            let faults_now = {
                let mut ctl = lock(&self.ctl);
                ctl.faults = Faults::default();
                ctl.faults_injected
            };
            match opened {
                // A label that cannot be read keeps its volume from being used.
                Ok(opened) if opened.targets.len() < self.backings.len() => {
                    if faults_now == faults_before {
                        let notes = opened.report.notes.join("; ");
                        return Err(Stop::Fail(format!("a backing was refused: {notes}")));
                    }
                    self.report.failed_opens += 1;
                }
                Ok(opened) => return self.opened(opened),
                Err(_) if lock(&self.ctl).crashed => return Err(Stop::Crash),
                Err(error) if error.kind() == ErrorKind::Lost && self.arena_lost && self.at_risk => {
                    self.report.refused += 1;
                    self.loss_accepted = true;
                }
                Err(_) if faults_now > faults_before => self.report.failed_opens += 1,
                Err(error) => {
                    return Err(Stop::Fail(format!("the stage was refused: {}", error.report())));
                }
            }
        }
        unreachable!("attempts end")
    }

    /// One attempt at opening the stage with the backings that are there.
    pub(super) fn open_once(&mut self, accept_loss: bool) -> tidegate_driver::base::Result<Opened> {
        self.next_arena += 1;
        let environment = Environment {
            boot_id: Uuid::from_u128(self.boot),
            arena_id: self.next_arena,
            accept_loss,
            forget: None,
        };
        let backings: BTreeMap<VolumeId, &dyn Disk> = self
            .backings
            .iter()
            .enumerate()
            .filter(|(i, _)| self.missing != Some(*i))
            .map(|(i, disk)| (VolumeId(i as u16 + 1), disk as &dyn Disk))
            .collect();
        open(&self.stage, &backings, &mut self.arenas, environment)
    }

    fn opened(&mut self, mut opened: Opened) -> Result<(), Stop> {
        let end = opened.core.claimed().0;
        lock(&self.ctl).note("opened", &[end, opened.report.records_from_arena]);
        self.report.from_arena += opened.report.records_from_arena;
        self.report.by_arena += u64::from(opened.report.records_from_arena > 0);
        self.report.by_log += u64::from(opened.report.records_from_log > 0);
        self.report.patches += opened.report.patches_restored;
        self.report.torn += u64::from(opened.report.torn_bytes > 0);
        self.report.tables += opened.report.regions_by_table;
        self.report.superblocks += u64::from(opened.report.superblocks_repaired);
        if self.arena_lost && self.at_risk && !self.loss_accepted && end < self.at_stake {
            let acknowledged = self.at_stake;
            return Err(Stop::Fail(format!(
                "P7: the arena is gone and the log ends at LSN {end}, but LSN {acknowledged} was acknowledged: not a word"
            )));
        }
        if let Some(note) = opened.report.notes.iter().find(|note| note.contains("is older than the log")) {
            return Err(Stop::Fail(format!("P7: no checkpoint was damaged, said: {note}")));
        }
        for (i, info) in opened.superblock.volumes.iter().enumerate() {
            self.model.grow(i, info.size_bytes);
        }
        self.model.recovered(end, self.required)?;
        self.required = self.model.durable();
        (self.arena_lost, self.loss_accepted) = (false, false);
        for (backing, target) in self.backings.iter().zip(opened.targets.values_mut()) {
            if self.rng.chance(500) {
                (target.discards, target.zeroes) = (backing.discards, backing.zeroes);
            }
        }
        self.running = Some(Running::start(opened, &site_of!(self), &self.doors));
        self.attach_bytes();
        Ok(())
    }

    pub(super) fn tick(&mut self) -> Result<bool, Stop> {
        let site = site_of!(self);
        self.running.as_mut().expect("open").tick(&site, &mut self.model)
    }

    pub(super) fn until(&mut self, what: &str, done: impl Fn(&Running) -> bool) -> Result<(), Stop> {
        for _ in 0..TICKS_MAX / 10 {
            if done(self.running.as_ref().expect("open")) {
                return Ok(());
            }
            if !self.tick()? && !done(self.running.as_ref().expect("open")) {
                return Err(Stop::Fail(format!("nothing can happen any more, but not yet: {what}")));
            }
        }
        Err(Stop::Fail(format!("it takes too long until {what}")))
    }

    fn ask_again(&mut self) {
        let again = std::mem::take(&mut self.unanswered);
        self.running.as_mut().expect("open").again.extend(again);
    }

    fn draw_faults(&mut self) {
        let most: &[u64] = match self.faulty {
            1 => &[0, 0, 0, 5, 20],
            2 => &[0, 0, 20, 200, 900],
            // One device is bad for long: the stage fills up, or epochs come to their end and not to their checkpoint.
            3 => {
                lock(&self.ctl).faults = Faults { backing_write: 1000, ..Faults::default() };
                return;
            }
            _ => {
                let stage_write = self.rng.pick(&[200, 600]);
                lock(&self.ctl).faults = Faults { stage_write, ..Faults::default() };
                return;
            }
        };
        let faults = Faults {
            read: self.rng.pick(most),
            backing_write: self.rng.pick(most),
            stage_write: self.rng.pick(most),
            sync: self.rng.pick(most),
            stage_read: self.aims.pick(most),
        };
        lock(&self.ctl).faults = faults;
    }

    pub(super) fn verify_through_doors(&mut self) -> Result<(), Stop> {
        self.verify_usable(&vec![true; self.backings.len()])
    }

    /// Reads all of the volumes that are served.
    pub(super) fn verify_usable(&mut self, usable: &[bool]) -> Result<(), Stop> {
        let running = self.running.as_mut().expect("open");
        let step = running.payload_max();
        for volume in (0..self.backings.len()).filter(|&volume| usable[volume]) {
            let size = self.model.size(volume);
            for offset in (0..size).step_by(step as usize) {
                running.read(volume, offset, step.min(size - offset));
            }
        }
        self.until("all volumes are read", |r| !r.is_waiting())
    }

    pub(super) fn drain(&mut self) -> Result<(), Stop> {
        self.until("every request is answered", |r| !r.is_waiting())?;
        let end = self.running.as_mut().expect("open").drain();
        self.until("everything is flushed", |r| r.checkpoint() >= end && !r.is_busy())
    }

    pub(super) fn check_backings(&self) -> Result<(), Stop> {
        let end = self.model.newest();
        for (volume, disk) in self.backings.iter().enumerate() {
            let size = self.model.size(volume) as usize;
            for (what, bytes) in [("", disk.visible(0, size)), ("persistent ", disk.persistent(0, size))] {
                self.model
                    .check(volume, 0, &bytes, end, end)
                    .map_err(|e| format!("after everything was flushed, the {what}backing holds: {e}"))?;
            }
        }
        Ok(())
    }

    /// As `Engine::close` does it.
    fn close(&mut self) -> Result<(), Stop> {
        self.until("every request is answered", |r| !r.is_waiting())?;
        self.running.as_mut().expect("open").close_gates();
        self.until("every session is over", |r| !r.has_sessions())?;
        let end = self.running.as_mut().expect("open").make_durable();
        self.until("everything is durable", |r| r.durable() >= end && !r.is_busy())?;
        let running = self.running.as_ref().expect("open");
        let mut superblock = running.superblock.clone();
        superblock.sequence += 1;
        superblock.state = StageState::Clean;
        superblock.closed_lsn = Lsn(running.durable());
        if let Err(error) = superblocks::write(&self.stage, &superblock) {
            return Err(if lock(&self.ctl).crashed {
                Stop::Crash
            } else {
                Stop::Fail(format!("closing failed: {}", error.report()))
            });
        }
        let newest = self.model.newest();
        if running.durable() != newest {
            return Err(Stop::Fail(format!("closed at LSN {}, but {newest} was placed", running.durable())));
        }
        self.model.acknowledge(newest, true);
        self.required = newest;
        self.report.closes += 1;
        self.report.sometimes.add(&running.sometimes());
        self.running = None;
        self.at_stake = 0;
        self.arenas.0.clear();
        Ok(())
    }

    fn crash(&mut self, kind: CrashKind) {
        self.last_crash = Some(kind);
        self.report.crashes[kind as usize] += 1;
        self.report.crashes_in_recovery += u64::from(self.running.is_none());
        {
            let mut ctl = lock(&self.ctl);
            ctl.faults = Faults::default();
            ctl.crashed = false;
            ctl.crash_at = u64::MAX;
            ctl.trap = None;
            ctl.note("crash", &[kind as u64]);
        }
        let site = site_of!(self);
        let remains = self.running.take().map(|running| {
            self.report.sometimes.add(&running.sometimes());
            match kind {
                CrashKind::Power => running.power_cut(&site),
                _ => running.kill(&site),
            }
        });
        match kind {
            CrashKind::Power => {
                if remains.is_none() {
                    let mut rng = Rng::new(lock(&self.ctl).rng.draw(), 6);
                    std::iter::once(&self.stage)
                        .chain(&self.backings)
                        .for_each(|d| d.power_cut(&[], &mut rng));
                }
                self.boot += 1;
                self.arenas.0.clear();
                self.unanswered.clear();
                self.required = self.model.durable();
                // What was lost with the arena is now lost with the power.
                (self.arena_lost, self.at_stake) = (false, 0);
            }
            CrashKind::Kill | CrashKind::KillWithoutArena => {
                if let Some(remains) = remains {
                    self.at_stake = self.model.acknowledged();
                    self.required = self.model.acknowledged().max(remains.published);
                    self.unanswered.extend(remains.unanswered);
                    // Reads that only the check asked for are not asked again.
                    self.unanswered.retain(|a| a.content.is_some() || self.rng.chance(900));
                }
                if kind == CrashKind::KillWithoutArena {
                    self.arenas.0.clear();
                    self.arena_lost = true;
                    self.required = self.model.durable();
                }
            }
        }
    }
}

fn running_is_done(running: Option<&Running>) -> bool {
    running.is_some_and(|r| r.quota == 0 && !r.is_waiting())
}
