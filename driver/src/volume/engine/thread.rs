//! The engine's background thread: owns a [`Background`] and a [`Reactor`], obeys control calls, publishes its status.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::options_of;
use crate::base::{Lsn, RegionSeq, Result, VolumeId};
use crate::flush::FlushTarget;
use crate::io::Target;
use crate::io::file::FileDisk;
use crate::io::uring::{Event, Reactor, Waker};
use crate::volume::background::{Background, BackgroundStatus, LOADS_AT_ONCE_MAX};
use crate::volume::request::Wake;
use crate::volume::shared::{Clock, Shared};

/// Entries of the background's ring.
const BACKGROUND_RING: u32 = 64;

/// Wakes the background once its ring exists; it looks around by itself when it starts.
#[derive(Default)]
pub(super) struct LateWake(OnceLock<Waker>);

impl Wake for LateWake {
    fn wake(&self) {
        if let Some(waker) = self.0.get() {
            waker.wake();
        }
    }
}

pub(super) type TargetChange = Box<dyn FnOnce(&mut FlushTarget) + Send>;

pub(super) enum Control {
    Drain(Sender<Lsn>),
    AddTarget(VolumeId, FlushTarget, Arc<FileDisk>, Sender<Result<()>>),
    RemoveTarget(VolumeId, Sender<()>),
    /// Carried out when no epoch is being flushed.
    ChangeTarget(VolumeId, TargetChange),
    Stop,
}

/// What the background publishes, and the signal that it has changed.
#[derive(Default)]
pub(super) struct Published {
    pub(super) status: Mutex<BackgroundStatus>,
    pub(super) changed: Condvar,
}

pub(super) struct BackgroundThread<'a> {
    background: Background,
    reactor: Reactor,
    commands: &'a Receiver<Control>,
    changes: Vec<(VolumeId, TargetChange)>,
    stopping: bool,
}

impl BackgroundThread<'_> {
    pub(super) fn run(
        background: Background,
        files: &[(Target, Arc<FileDisk>)],
        commands: &Receiver<Control>,
        published: &Published,
        wake: &LateWake,
        ready: &Sender<Result<()>>,
    ) {
        let made = Reactor::new(BACKGROUND_RING).and_then(|mut reactor| {
            for (target, disk) in files {
                reactor.register(*target, disk.file().clone(), options_of(disk))?;
            }
            Ok(reactor)
        });
        let reactor = match made {
            Ok(reactor) => reactor,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        assert!(wake.0.set(reactor.waker()).is_ok(), "one background per engine");
        let _ = ready.send(Ok(()));
        let clock = background.clock();
        let shared = background.shared();
        let mut thread =
            BackgroundThread { background, reactor, commands, changes: Vec::new(), stopping: false };
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let helper = std::thread::Builder::new().name("tidegate-mem".into());
            // Nobody needs it: without it the background makes the memory.
            let _ = helper.spawn_scoped(scope, || make_memory(&shared, &is_over));
            while thread.turn(&*clock, published) {}
            is_over.store(true, Ordering::Relaxed);
        });
    }

    fn turn(&mut self, clock: &dyn Clock, published: &Published) -> bool {
        let now_ns = clock.monotonic_ns();
        let reactor = &mut self.reactor;
        let deadline_ns = self.background.step(now_ns, &mut |op| reactor.push(op));
        {
            let mut status = published.status.lock();
            if *status != self.background.status {
                announce(&status, &self.background.status);
                status.clone_from(&self.background.status);
            }
            published.changed.notify_all();
        }
        // An epoch may have ended in the step, and with it the wait of a change; nothing else may come to end the sleep.
        if self.change_targets() {
            return true;
        }
        if self.stopping && !self.background.is_busy() {
            return false;
        }
        let timeout = deadline_ns.map(|at| Duration::from_nanos(at.saturating_sub(now_ns)));
        if let Err(error) = self.reactor.submit_and_wait(timeout) {
            // Without its ring the background can flush nothing and tell nobody: let the next server recover.
            tracing::error!("the background's ring failed: {}", error.report());
            std::process::abort();
        }
        while let Some(event) = self.reactor.next_event() {
            if let Event::Op(done) = event {
                self.background.op_done(done);
            }
        }
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        true
    }

    fn obey(&mut self, command: Control) {
        match command {
            Control::Drain(reply) => {
                let _ = reply.send(self.background.drain());
            }
            Control::AddTarget(volume, target, disk, reply) => {
                let registered =
                    self.reactor.register(Target::Backing(volume), disk.file().clone(), options_of(&disk));
                if registered.is_ok() {
                    self.background.add_target(volume, target);
                }
                let _ = reply.send(registered);
            }
            Control::RemoveTarget(volume, reply) => {
                self.background.remove_target(volume);
                let _ = self.reactor.unregister(Target::Backing(volume));
                let _ = reply.send(());
            }
            Control::ChangeTarget(volume, change) => {
                self.changes.push((volume, change));
                self.background.hold(true);
            }
            Control::Stop => self.stopping = true,
        }
    }

    /// Carries out the changes that wait, unless an epoch is under way. Returns whether there were any.
    fn change_targets(&mut self) -> bool {
        if self.changes.is_empty() || self.background.is_flushing() {
            return false;
        }
        // A change takes its time; a log write that is queued must not wait for it. What fails here fails again below.
        let _ = self.reactor.submit_and_wait(Some(Duration::ZERO));
        for (volume, change) in self.changes.drain(..) {
            if let Some(target) = self.background.target_mut(volume) {
                change(target);
            }
        }
        self.background.hold(false);
        true
    }
}

/// Makes the memory of cold regions, oldest first, beside the background that fills and verifies them: making it may take more
/// time than that. What fails is found by the background, which tells.
fn make_memory(shared: &Shared, is_over: &AtomicBool) {
    let arena = &shared.arena;
    let cold = shared.core.lock().cold_region_seqs();
    // The background begins with the first ones itself.
    let mut later = cold.into_iter().skip(LOADS_AT_ONCE_MAX).take_while(|_| !is_over.load(Ordering::Relaxed));
    if !arena.is_new() {
        // What was left in it is used as it is: it is waited for.
        let _ = later.try_for_each(|seq| arena.allocate(seq));
        return;
    }
    loop {
        let seqs: Vec<RegionSeq> = later.by_ref().take(arena.regions_ahead()).collect();
        if seqs.is_empty() || arena.allocate_ahead(&seqs).1.is_err() {
            return;
        }
    }
}

/// Tells the log what has begun to fail and what works again.
fn announce(before: &BackgroundStatus, now: &BackgroundStatus) {
    let changed = |what: &str, before: Option<&str>, now: Option<&str>| match (before, now) {
        (None, Some(problem)) => tracing::error!("{what}: {problem}; it is tried again"),
        (Some(_), None) => tracing::info!("{what}: works again"),
        _ => {}
    };
    let backing = |status: &BackgroundStatus| status.backing_problem.as_ref().map(|(volume, _)| *volume);
    if let Some(volume) = backing(before).or(backing(now)) {
        let problem =
            |status: &'_ BackgroundStatus| status.backing_problem.clone().map(|(_, problem)| problem);
        let what = format!("the backing of volume {volume}");
        changed(&what, problem(before).as_deref(), problem(now).as_deref());
    }
    let log = |status: &BackgroundStatus| status.log_fails.then_some("cannot be written");
    changed("the log", log(before), log(now));
    changed("the stage device", before.stage_problem(), now.stage_problem());
    changed("memory of the arena", before.memory_problem.as_deref(), now.memory_problem.as_deref());
    if let (None, Some(damage)) = (&before.damage, &now.damage) {
        tracing::error!("nothing more is accepted: {damage}");
    }
}
