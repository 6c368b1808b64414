//! The running engine of one stage: opens it, runs its background thread, gives out doors, changes its volumes.
//!
//! Threads: door threads belong to the front ends; the background thread belongs to the engine and owns a
//! [`Background`] and a [`Reactor`]. Control calls come from any thread; they post to the background thread and wait,
//! and they write the superblock themselves under its lock. No door thread ever waits for any of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use super::admin::{self, NewVolume};
use super::background::{Background, BackgroundStatus};
use super::door::{VolumeDoor, VolumeShared};
use super::request::Wake;
use super::shared::{Clock, Shared};
use super::status::{Health, RecoveryReport, StageStatus, VolumeStatus};
use crate::base::{Error, ErrorKind, Lsn, Result, VolumeId};
use crate::flush::epoch::FlushTarget;
use crate::format::arena::ArenaIdentity;
use crate::format::label::{LABEL_BYTES, LABEL_SLOTS, Label, backing_bytes_for, label_offset};
use crate::format::superblock::{StageState, Superblock};
use crate::format::volume_entry::VolumeInfo;
use crate::io::file::FileDisk;
use crate::io::uring::{Event, Reactor, TargetOptions, Waker};
use crate::io::{Disk, Target};
use crate::recovery::{ArenaSource, Environment, Opened, open, superblocks};
use crate::stage::arena::Arena;
use crate::stage::core::DoorId;

/// Entries of the background's ring.
const BACKGROUND_RING: u32 = 64;

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

/// Wakes the background once its ring exists; it looks around by itself when it starts.
#[derive(Default)]
struct LateWake(OnceLock<Waker>);

impl Wake for LateWake {
    fn wake(&self) {
        if let Some(waker) = self.0.get() {
            waker.wake();
        }
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

type TargetChange = Box<dyn FnOnce(&mut FlushTarget) + Send>;

enum Control {
    Drain(Sender<Lsn>),
    AddTarget(VolumeId, FlushTarget, Arc<FileDisk>, Sender<Result<()>>),
    RemoveTarget(VolumeId, Sender<()>),
    /// Carried out when no epoch is being flushed.
    ChangeTarget(VolumeId, TargetChange),
    Stop,
}

struct Volume {
    info: VolumeInfo,
    shared: Arc<VolumeShared>,
    backing: Arc<FileDisk>,
}

/// What the background publishes, and the signal that it has changed.
#[derive(Default)]
struct Published {
    status: Mutex<BackgroundStatus>,
    changed: Condvar,
}

/// A running stage.
pub struct Engine {
    shared: Arc<Shared>,
    stage: Arc<FileDisk>,
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
        Engine::start(opened, config.stage, backings)
    }

    fn start(
        opened: Opened,
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
        let background =
            Background::new(shared.clone(), opened.targets, opened.checkpoint, opened.report.arena_used);
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

    /// Adds a volume. Durable when it returns.
    pub fn add_volume(&self, backing: Arc<FileDisk>, new: NewVolume) -> Result<VolumeInfo> {
        let mut superblock = self.superblock.lock();
        let info = admin::plan_volume(&superblock, &*backing, &new)?;
        let label = admin::first_label(&superblock, &info);
        admin::write_only_label(&*backing, &label)?;
        let mut next = superblock.clone();
        next.volumes.push(info.clone());
        next.next_volume_id += 1;
        self.write_superblock(&mut superblock, next)?;
        self.use_backing(&info, label, backing)?;
        Ok(info)
    }

    /// Brings in the backing of a volume that was opened without it.
    pub fn add_backing(&self, volume: VolumeId, backing: Arc<FileDisk>) -> Result<()> {
        let superblock = self.superblock.lock();
        let info =
            superblock.volumes.iter().find(|v| v.id == volume).ok_or_else(|| no_volume(volume))?.clone();
        if self.volumes.read().contains_key(&volume) {
            return Err(Error::new(ErrorKind::Busy, format!("volume '{}' is already in use", info.name)));
        }
        let checkpoint = crate::recovery::scan::read_checkpoints(&*self.stage, &superblock)?
            .into_iter()
            .next()
            .ok_or_else(|| Error::new(ErrorKind::Damaged, "no checkpoint is valid"))?;
        let durable = self.shared.core.lock().durable();
        let label = crate::recovery::open::check_label(&superblock, &info, &*backing, &checkpoint, durable)?;
        // As in recovery: the label that was read must be durable before the other slot is written.
        backing.sync()?;
        self.use_backing(&info, label, backing)
    }

    fn use_backing(&self, info: &VolumeInfo, label: Label, backing: Arc<FileDisk>) -> Result<()> {
        let capabilities = backing.capabilities();
        let target = FlushTarget {
            attempted: label.flushed_lsn,
            label,
            block_bytes: backing.block_bytes(),
            zeroes: capabilities.write_zeroes,
            discards: capabilities.discard,
        };
        let (reply, answer) = channel();
        self.post(Control::AddTarget(info.id, target, backing.clone(), reply))?;
        answer.recv().map_err(|_| Error::new(ErrorKind::Io, "the engine is closed"))??;
        self.shared.core.lock().add_volume(info.id);
        self.volumes.write().insert(info.id, Volume::new(info.clone(), backing));
        Ok(())
    }

    /// Removes a volume that has no open door, after flushing it. Its backing keeps its data and loses its label.
    /// Durable when it returns.
    pub fn remove_volume(&self, volume: VolumeId) -> Result<()> {
        let (info, backing) = {
            let volumes = self.volumes.read();
            let found = volumes.get(&volume).ok_or_else(|| no_volume(volume))?;
            (found.info.clone(), found.backing.clone())
        };
        self.drain()?;
        let mut superblock = self.superblock.lock();
        {
            let mut volumes = self.volumes.write();
            let doors = volumes.get(&volume).map_or(0, |v| v.shared.doors.load(Ordering::Acquire));
            if doors > 0 || self.shared.core.lock().is_staged(volume) {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("volume '{}' is attached: detach it first", info.name),
                ));
            }
            volumes.remove(&volume);
        }
        let mut next = superblock.clone();
        next.volumes.retain(|v| v.id != volume);
        if let Err(error) = self.write_superblock(&mut superblock, next) {
            self.volumes.write().insert(volume, Volume::new(info, backing));
            return Err(error);
        }
        self.shared.core.lock().remove_volume(volume);
        let (reply, answer) = channel();
        self.post(Control::RemoveTarget(volume, reply))?;
        let _ = answer.recv();
        admin::wipe_labels(&*backing, info.size_bytes)
    }

    /// Grows a volume to `size_bytes`; its backing must have the room (a file gets it). Durable when it returns.
    pub fn resize_volume(&self, volume: VolumeId, size_bytes: u64) -> Result<()> {
        let mut superblock = self.superblock.lock();
        let (old, backing) = {
            let volumes = self.volumes.read();
            let found = volumes.get(&volume).ok_or_else(|| no_volume(volume))?;
            (found.info.clone(), found.backing.clone())
        };
        if size_bytes == old.size_bytes {
            return Ok(());
        }
        let info = VolumeInfo { size_bytes, ..old.clone() };
        info.validate()?;
        check_growth(&old, size_bytes, &backing)?;
        let mut next = superblock.clone();
        next.sequence += 1;
        next.volumes.iter_mut().filter(|v| v.id == volume).for_each(|v| v.size_bytes = size_bytes);
        // No sequence number is used twice, whatever becomes of this update.
        superblock.sequence = next.sequence;
        self.move_label(volume, size_bytes, backing.clone(), next.clone())?;
        *superblock = next;
        wipe_old_tail(&*backing, old.size_bytes, size_bytes)?;
        if let Some(found) = self.volumes.write().get_mut(&volume) {
            found.info = info;
            found.shared.size_bytes.store(size_bytes, Ordering::Release);
        }
        Ok(())
    }

    /// Writes the label behind the new end and then the superblock, while no epoch is under way: an epoch's label and
    /// checkpoint must not come between the two. Until the superblock knows the new size the old labels are valid; then
    /// they are part of the volume. A crash before they are zeroed leaves old label bytes in the space that was added.
    fn move_label(
        &self,
        volume: VolumeId,
        size_bytes: u64,
        backing: Arc<FileDisk>,
        next: Superblock,
    ) -> Result<()> {
        let (reply, answer) = channel();
        let stage = self.stage.clone();
        let change: TargetChange = Box::new(move |target| {
            let label = Label { volume_bytes: size_bytes, ..target.label.clone() };
            let written =
                admin::write_only_label(&*backing, &label).and_then(|()| superblocks::write(&*stage, &next));
            if written.is_ok() {
                target.label = label;
            }
            let _ = reply.send(written);
        });
        self.post(Control::ChangeTarget(volume, change))?;
        answer.recv().map_err(|_| Error::new(ErrorKind::Io, "the engine is closed"))?
    }

    fn write_superblock(&self, current: &mut Superblock, mut next: Superblock) -> Result<()> {
        next.sequence += 1;
        // No sequence number is used twice: a copy of a failed update may be on the device all the same.
        current.sequence = next.sequence;
        superblocks::write(&*self.stage, &next)?;
        *current = next;
        Ok(())
    }

    /// Notes where the backing of a volume is now. Durable when it returns.
    pub fn set_backing_path(&self, volume: VolumeId, path: &str) -> Result<()> {
        let mut superblock = self.superblock.lock();
        let mut next = superblock.clone();
        for info in next.volumes.iter_mut().filter(|v| v.id == volume) {
            path.clone_into(&mut info.backing);
            info.validate()?;
        }
        if next == *superblock {
            return Ok(());
        }
        self.write_superblock(&mut superblock, next)
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
                (core.checkpoint(), core.durable(), core.log_has_failed())
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
                Some(backing.or_else(|| status.stage_problem.clone()).unwrap_or("a device failed".to_owned()))
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
        let mut superblock = self.superblock.lock();
        let mut next = superblock.clone();
        next.state = StageState::Clean;
        next.closed_lsn = self.shared.core.lock().durable();
        self.write_superblock(&mut superblock, next)?;
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
        } else if core.log_has_failed() {
            (Health::LogError, Some("the stage's log device fails; writing is retried".to_owned()))
        } else if let Some((volume, problem)) = &background.backing_problem {
            let name = volumes.get(volume).map_or_else(|| volume.to_string(), |v| v.info.name.clone());
            (
                Health::Degraded,
                Some(format!("the backing of volume '{name}' fails: {problem}; flushing is retried")),
            )
        } else if let Some(problem) = background.stage_problem.as_ref().or(background.memory_problem.as_ref())
        {
            (Health::Degraded, Some(problem.clone()))
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

/// Checks that a volume can grow to `size_bytes`, and gives a backing file the room.
fn check_growth(old: &VolumeInfo, size_bytes: u64, backing: &FileDisk) -> Result<()> {
    if size_bytes < old.size_bytes {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("volume '{}' has {} bytes and cannot shrink to {size_bytes}", old.name, old.size_bytes),
        ));
    }
    let old_labels_end = label_offset(old.size_bytes, 0) + LABEL_BYTES * u64::from(LABEL_SLOTS);
    if label_offset(size_bytes, 0) < old_labels_end {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("volume '{}' can grow to {old_labels_end} bytes or more, not to {size_bytes}", old.name),
        ));
    }
    let needed = backing_bytes_for(size_bytes);
    backing.grow_file(needed)?;
    let available = backing.refresh_len()?;
    if available < needed {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "{} has {available} bytes, {needed} are needed: enlarge the device first",
                backing.name()
            ),
        ));
    }
    Ok(())
}

/// Zeroes what used to be the labels of a backing and is volume now. Whole blocks, so that no byte of the volume beside
/// them is read and written back while the flusher changes it.
fn wipe_old_tail(backing: &dyn Disk, old_bytes: u64, new_bytes: u64) -> Result<()> {
    let start = label_offset(old_bytes, 0);
    let end = backing_bytes_for(old_bytes).min(label_offset(new_bytes, 0));
    backing.write(start, &vec![0; (end - start) as usize])?;
    backing.sync()
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

struct BackgroundThread<'a> {
    background: Background,
    reactor: Reactor,
    commands: &'a Receiver<Control>,
    changes: Vec<(VolumeId, TargetChange)>,
    stopping: bool,
}

impl BackgroundThread<'_> {
    fn run(
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
        let mut thread =
            BackgroundThread { background, reactor, commands, changes: Vec::new(), stopping: false };
        while thread.turn(&*clock, published) {}
    }

    fn turn(&mut self, clock: &dyn Clock, published: &Published) -> bool {
        let now_ns = clock.monotonic_ns();
        let reactor = &mut self.reactor;
        let deadline_ns = self.background.step(now_ns, &mut |op| reactor.push(op));
        {
            let mut status = published.status.lock();
            if *status != self.background.status {
                status.clone_from(&self.background.status);
            }
            published.changed.notify_all();
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
        self.change_targets();
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

    fn change_targets(&mut self) {
        if self.background.is_flushing() {
            return;
        }
        for (volume, change) in self.changes.drain(..) {
            if let Some(target) = self.background.target_mut(volume) {
                change(target);
            }
        }
        self.background.hold(false);
    }
}
