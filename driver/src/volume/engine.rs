//! The running engine of one stage: opens it, runs its background thread, gives out doors, changes its volumes.
//!
//! Threads: door threads belong to the front ends; the background thread belongs to the engine and owns a
//! [`Background`] and a [`Reactor`]. Control calls come from any thread; they post to the background thread and wait,
//! and they write the superblock themselves under its lock. No door thread ever waits for any of them.

mod thread;
mod volumes;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use self::thread::{BackgroundThread, Control, LateWake, Published};
use super::admin;
use super::background::{Background, BackgroundStatus};
use super::door::{VolumeDoor, VolumeShared};
use super::request::Wake;
use super::shared::{Clock, Shared};
use super::status::{Health, RecoveryReport, StageStatus, VolumeStatus};
use crate::base::{Error, ErrorKind, Lsn, Result, VolumeId};
use crate::flush::epoch::flush_pool;
use crate::format::arena::ArenaIdentity;
use crate::format::superblock::{StageState, Superblock};
use crate::format::volume_entry::VolumeInfo;
use crate::io::file::FileDisk;
use crate::io::uring::{Reactor, TargetOptions};
use crate::io::{AlignedBuf, Disk, Target};
use crate::recovery::{ArenaSource, Environment, Opened, open, superblocks};
use crate::stage::arena::Arena;
use crate::stage::core::DoorId;

/// What an engine is opened with.
#[derive(Debug)]
pub struct EngineConfig {
    /// The stage device.
    pub stage: Arc<FileDisk>,
    /// The backing of each volume that is to be used.
    pub backings: Vec<(VolumeId, Arc<FileDisk>)>,
    /// Folder of arena files, on a tmpfs.
    pub arena_dir: PathBuf,
    /// Go on although writes acknowledged in memory are gone.
    pub accept_loss: bool,
    /// Delete this volume, with what is staged for it: the way out when its backing is lost.
    pub forget: Option<VolumeId>,
}

/// The machine's clocks.
#[derive(Debug)]
struct SystemClock(Instant);

impl Clock for SystemClock {
    fn unix_ns(&self) -> u64 {
        admin::unix_ns()
    }

    fn monotonic_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}

struct ArenaDir(PathBuf);

impl ArenaSource for ArenaDir {
    fn find(&mut self, identity: &ArenaIdentity, salt: u64) -> Result<Option<Arena>> {
        Arena::open(&self.0, identity, salt)
    }

    fn make(&mut self, identity: &ArenaIdentity, salt: u64) -> Result<Arena> {
        Arena::create(&self.0, identity, salt)
    }
}

struct Volume {
    info: VolumeInfo,
    shared: Arc<VolumeShared>,
    backing: Arc<FileDisk>,
}

/// A running stage.
pub struct Engine {
    shared: Arc<Shared>,
    stage: Arc<FileDisk>,
    /// Held through a change of the superblock, with its I/O: one at a time.
    changing: Mutex<()>,
    /// As it was written last. Held for moments.
    superblock: Mutex<Superblock>,
    volumes: RwLock<BTreeMap<VolumeId, Volume>>,
    report: RecoveryReport,
    next_door: AtomicU32,
    control: Sender<Control>,
    wake: Arc<LateWake>,
    published: Arc<Published>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn boot_id() -> uuid::Uuid {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().parse().unwrap_or_default()
}

fn options_of(disk: &FileDisk) -> TargetOptions {
    TargetOptions { direct: disk.is_direct(), is_block_device: disk.is_block_device() }
}

impl Engine {
    /// Opens a stage and starts its background. Reads can be served when it returns.
    pub fn open(config: EngineConfig) -> Result<Arc<Engine>> {
        let started = Instant::now();
        let disks: BTreeMap<VolumeId, &dyn Disk> =
            config.backings.iter().map(|(id, disk)| (*id, &**disk as &dyn Disk)).collect();
        let environment = Environment {
            boot_id: boot_id(),
            arena_id: admin::random_u64(),
            accept_loss: config.accept_loss,
            forget: config.forget,
        };
        // Some milliseconds of touching memory, which nobody has to wait for.
        let pool = std::thread::Builder::new()
            .name("tidegate-pool".into())
            .spawn(flush_pool)
            .map_err(|e| Error::io("cannot start a thread", e))?;
        let mut opened = open(&*config.stage, &disks, &mut ArenaDir(config.arena_dir.clone()), environment)?;
        // A backing that was not accepted belongs to a volume that cannot be used.
        let backings: BTreeMap<VolumeId, Arc<FileDisk>> =
            config.backings.into_iter().filter(|(id, _)| opened.targets.contains_key(id)).collect();
        for (id, target) in &mut opened.targets {
            let capabilities = backings[id].capabilities();
            target.zeroes = capabilities.write_zeroes;
            target.discards = capabilities.discard;
        }
        remove_stale_arenas(&config.arena_dir, &opened.superblock);
        opened.report.open_micros = started.elapsed().as_micros() as u64;
        let pool = pool.join().map_err(|_| Error::new(ErrorKind::Io, "cannot make the flusher's buffers"))?;
        Engine::start(opened, pool, config.stage, backings)
    }

    fn start(
        opened: Opened,
        pool: Vec<AlignedBuf>,
        stage: Arc<FileDisk>,
        backings: BTreeMap<VolumeId, Arc<FileDisk>>,
    ) -> Result<Arc<Engine>> {
        let wake = Arc::new(LateWake::default());
        let shared = Arc::new(Shared::new(
            opened.core,
            Arc::new(opened.arena),
            opened.rules,
            Arc::new(SystemClock(Instant::now())),
            wake.clone(),
        ));
        let background = Background::with_pool(
            shared.clone(),
            opened.targets,
            opened.checkpoint,
            opened.report.arena_used,
            pool,
        );
        let mut files = vec![(Target::Stage, stage.clone())];
        files.extend(backings.iter().map(|(id, disk)| (Target::Backing(*id), disk.clone())));
        let (control, commands) = channel();
        let published = Arc::new(Published::default());
        let (ready, is_ready) = channel();
        let thread = {
            let (published, wake) = (published.clone(), wake.clone());
            std::thread::Builder::new()
                .name("tidegate-bg".into())
                .spawn(move || {
                    BackgroundThread::run(background, &files, &commands, &published, &wake, &ready)
                })
                .map_err(|e| Error::io("cannot start the background thread", e))?
        };
        is_ready.recv().map_err(|_| Error::new(ErrorKind::Io, "the background thread did not start"))??;
        let volumes = opened
            .superblock
            .volumes
            .iter()
            .filter_map(|info| Some((info.id, Volume::new(info.clone(), backings.get(&info.id)?.clone()))))
            .collect();
        Ok(Arc::new(Engine {
            shared,
            stage,
            changing: Mutex::new(()),
            superblock: Mutex::new(opened.superblock),
            volumes: RwLock::new(volumes),
            report: opened.report,
            next_door: AtomicU32::new(1),
            control,
            wake,
            published,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// What opening found.
    #[must_use]
    pub fn recovery(&self) -> RecoveryReport {
        self.report.clone()
    }

    /// The volumes of the stage, with or without their backing.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.superblock.lock().volumes.clone()
    }

    /// The stage.
    #[must_use]
    pub fn stage_uuid(&self) -> uuid::Uuid {
        self.superblock.lock().stage_uuid
    }

    /// Largest request in bytes that doors take.
    #[must_use]
    pub fn request_bytes_max(&self) -> u32 {
        self.shared.geometry.payload_bytes_max()
    }

    /// Opens a door to `volume`. `reactor`, which belongs to the calling thread, learns the files the door works on;
    /// `wake` is triggered when other threads have left something for the door.
    pub fn door(&self, volume: VolumeId, wake: Arc<dyn Wake>, reactor: &mut Reactor) -> Result<VolumeDoor> {
        let volumes = self.volumes.read();
        let found = volumes.get(&volume).ok_or_else(|| no_volume(volume))?;
        reactor.register(Target::Stage, self.stage.file().clone(), options_of(&self.stage))?;
        reactor.register(
            Target::Backing(volume),
            found.backing.file().clone(),
            options_of(&found.backing),
        )?;
        let id = DoorId(self.next_door.fetch_add(1, Ordering::Relaxed));
        let mailbox = self.shared.add_door(id, wake);
        Ok(VolumeDoor::new(self.shared.clone(), found.shared.clone(), id, mailbox))
    }

    fn post(&self, command: Control) -> Result<()> {
        self.control.send(command).map_err(|_| Error::new(ErrorKind::Io, "the engine is closed"))?;
        self.wake.wake();
        Ok(())
    }

    /// Writes the superblock with a change. The caller holds `changing`. After an error everything is as before.
    fn change_superblock(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let update = self.superblock_update(change);
        update.write()?;
        *self.superblock.lock() = update.next;
        Ok(())
    }

    fn superblock_update(&self, change: impl FnOnce(&mut Superblock)) -> SuperblockUpdate {
        let mut superblock = self.superblock.lock();
        let before = superblock.clone();
        // No number is used twice, whatever becomes of the update: one for it, one to take it back.
        superblock.sequence += 2;
        let mut next = Superblock { sequence: before.sequence + 1, ..before.clone() };
        change(&mut next);
        let undo = Superblock { sequence: before.sequence + 2, ..before };
        let log_fails = self.shared.core.lock().log_is_failing();
        SuperblockUpdate { stage: self.stage.clone(), log_fails, next, undo }
    }

    /// Flushes everything that was accepted before the call to the backings. Blocks. Fails if a device does; what is
    /// staged stays staged then.
    pub fn drain(&self) -> Result<()> {
        let before = errors_of(&self.published.status.lock());
        let (reply, answer) = channel();
        self.post(Control::Drain(reply))?;
        let lsn = answer.recv().map_err(|_| Error::new(ErrorKind::Io, "the engine is closed"))?;
        self.wait_until(before, |core_lsn, _| core_lsn >= lsn, "flush")
    }

    /// Waits for `done(checkpoint, durable)`.
    fn wait_until(&self, errors_before: u64, done: impl Fn(Lsn, Lsn) -> bool, what: &str) -> Result<()> {
        let mut status = self.published.status.lock();
        loop {
            let (checkpoint, durable, log_failed) = {
                let core = self.shared.core.lock();
                (core.checkpoint(), core.durable(), core.log_is_failing())
            };
            if done(checkpoint, durable) {
                return Ok(());
            }
            let problem = if let Some(damage) = &status.damage {
                Some(damage.clone())
            } else if log_failed {
                Some("the stage device fails".to_owned())
            } else if errors_of(&status) > errors_before {
                let backing = status
                    .backing_problem
                    .as_ref()
                    .map(|(volume, problem)| format!("the backing of volume {volume} fails: {problem}"));
                Some(
                    backing
                        .or_else(|| status.stage_problem().map(str::to_owned))
                        .unwrap_or("a device failed".to_owned()),
                )
            } else {
                None
            };
            if let Some(problem) = problem {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "cannot {what}: {problem}. Everything accepted stays in the stage; repair the device and try again"
                    ),
                ));
            }
            self.published.changed.wait_for(&mut status, Duration::from_millis(200));
        }
    }

    /// Closes the engine; all doors must be closed. With `flush`, everything is on the backings first; without, it is
    /// durable on the log device. After an error in flushing the engine goes on; after a later one it is of no more use, and
    /// the next opening recovers.
    pub fn close(&self, flush: bool) -> Result<()> {
        if let Some(volume) =
            self.volumes.read().values().find(|v| v.shared.doors.load(Ordering::Acquire) > 0)
        {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("volume '{}' is attached: detach it first", volume.info.name),
            ));
        }
        if flush {
            self.drain()?;
        }
        self.make_durable()?;
        self.stop_thread();
        let _one = self.changing.lock();
        let durable = self.shared.core.lock().durable();
        let update = self.superblock_update(|next| {
            next.state = StageState::Clean;
            next.closed_lsn = durable;
        });
        // Everything is durable: whichever state the next opening finds, it is true.
        superblocks::write(&*self.stage, &update.next)?;
        self.shared.arena.unlink()
    }

    /// Makes everything accepted so far durable on the log device. Blocks.
    pub fn make_durable(&self) -> Result<()> {
        let lsn = {
            let mut core = self.shared.core.lock();
            core.request_commit();
            core.published()
        };
        self.wake.wake();
        self.wait_until(u64::MAX, |_, durable| durable >= lsn, "make everything durable")
    }

    fn stop_thread(&self) {
        if let Some(thread) = self.thread.lock().take() {
            let _ = self.post(Control::Stop);
            let _ = thread.join();
        }
    }

    /// State of the stage.
    #[must_use]
    pub fn status(&self) -> StageStatus {
        let background = self.published.status.lock().clone();
        let superblock = self.superblock.lock().clone();
        let volumes = self.volumes.read();
        let core = self.shared.core.lock();
        let geometry = self.shared.geometry;
        let (health, problem) = if let Some(damage) = &background.damage {
            (Health::Damaged, Some(damage.clone()))
        } else if core.log_is_failing() {
            (Health::LogError, Some("the stage's log device fails; writing is retried".to_owned()))
        } else if let Some((volume, problem)) = &background.backing_problem {
            let name = volumes.get(volume).map_or_else(|| volume.to_string(), |v| v.info.name.clone());
            (
                Health::Degraded,
                Some(format!("the backing of volume '{name}' fails: {problem}; flushing is retried")),
            )
        } else if let Some(problem) = background.stage_problem().or(background.memory_problem.as_deref()) {
            (Health::Degraded, Some(problem.to_owned()))
        } else {
            (Health::Ok, None)
        };
        StageStatus {
            health,
            problem,
            stage_uuid: superblock.stage_uuid.to_string(),
            incarnation: superblock.incarnation,
            stage_bytes: geometry.regions_bytes(),
            used_bytes: core.used_bytes(),
            claimed_lsn: core.claimed().0,
            published_lsn: core.published().0,
            durable_lsn: core.durable().0,
            checkpoint_lsn: core.checkpoint().0,
            records: core.counters.records,
            record_bytes: core.counters.record_bytes,
            groups: core.counters.groups,
            log_bytes: core.counters.log_bytes,
            epochs: background.epochs,
            flushed_bytes: background.flushed_bytes,
            stage_full_waits: core.counters.space_waits,
            paced_waits: core.counters.paced_waits,
            waiting: core.waiting() as u64,
            log_errors: core.counters.log_errors,
            backing_errors: background.backing_errors,
            index_extents: core.extent_count() as u64,
            cold_regions: core.cold_regions() as u64,
            volumes: superblock
                .volumes
                .iter()
                .map(|info| volume_status(info, volumes.get(&info.id), &background))
                .collect(),
        }
    }
}

/// A change of the superblock, and how to take it back.
struct SuperblockUpdate {
    stage: Arc<FileDisk>,
    /// The stage is known to fail: nothing is begun.
    log_fails: bool,
    next: Superblock,
    undo: Superblock,
}

impl SuperblockUpdate {
    /// Writes it. If that fails some copies may say the new thing all the same, and the next opening would believe them, so
    /// the old content is written over them. If even that is impossible nobody knows which one holds: the process ends, and
    /// the next opening finds out.
    fn write(&self) -> Result<()> {
        if self.log_fails {
            let what = format!("{} cannot be written just now: repair it, then try again", self.stage.name());
            return Err(Error::new(ErrorKind::Io, what));
        }
        let Err(error) = superblocks::write(&*self.stage, &self.next) else { return Ok(()) };
        if let Err(again) = superblocks::write(&*self.stage, &self.undo) {
            tracing::error!(
                "the superblock of {} could be neither changed ({}) nor kept ({}): ending, to be recovered",
                self.stage.name(),
                error.report(),
                again.report()
            );
            std::process::abort();
        }
        Err(error)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop_thread();
    }
}

impl Volume {
    fn new(info: VolumeInfo, backing: Arc<FileDisk>) -> Volume {
        let shared = Arc::new(VolumeShared {
            id: info.id,
            size_bytes: AtomicU64::new(info.size_bytes),
            ack: info.ack,
            on_log_error: info.on_log_error,
            backing_block_bytes: backing.block_bytes(),
            doors: AtomicU32::new(0),
            counters: Default::default(),
        });
        Volume { info, shared, backing }
    }
}

fn volume_status(info: &VolumeInfo, volume: Option<&Volume>, background: &BackgroundStatus) -> VolumeStatus {
    let count = |i: usize| volume.map_or(0, |v| v.shared.counters[i].load(Ordering::Relaxed));
    let problem = match (&background.backing_problem, volume) {
        (Some((id, problem)), _) if *id == info.id => Some(problem.clone()),
        (_, None) => Some("the backing is not there".to_owned()),
        _ => None,
    };
    VolumeStatus {
        name: info.name.clone(),
        uuid: info.uuid.to_string(),
        id: info.id.0,
        size_bytes: info.size_bytes,
        block_bytes: info.block_bytes,
        ack: info.ack,
        on_log_error: info.on_log_error,
        backing: info.backing.clone(),
        problem,
        doors: volume.map_or(0, |v| v.shared.doors.load(Ordering::Relaxed)),
        reads: count(0),
        writes: count(1),
        discards: count(2),
        flushes: count(3),
        read_bytes: count(4),
        write_bytes: count(5),
    }
}

/// Failures of the flusher so far.
fn errors_of(status: &BackgroundStatus) -> u64 {
    status.backing_errors + status.stage_errors
}

fn no_volume(volume: VolumeId) -> Error {
    Error::new(ErrorKind::NotFound, format!("the stage has no usable volume with id {volume}"))
}

/// Removes arenas of this stage that are not in use: an earlier server made them and did not come to use them.
fn remove_stale_arenas(dir: &std::path::Path, superblock: &Superblock) {
    let current = ArenaIdentity::new(superblock.stage_uuid, superblock.arena_id, &superblock.geometry);
    let current = Arena::path_in(dir, &current);
    let prefix = superblock.stage_uuid.to_string();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(&prefix);
        if ours && entry.path() != current {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
