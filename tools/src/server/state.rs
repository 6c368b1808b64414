//! The server's state: the engine, the backings, the devices.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::bytes::ties::Ties;
use tidegate_driver::format::superblock::Superblock;
use tidegate_driver::format::volume_entry::VolumeInfo;
use tidegate_driver::io::file::overlap;
use tidegate_driver::io::{Disk, FileDisk};
use uuid::Uuid;

use super::devices::{Attached, Waiting};
use super::gates::Opened;
use super::namespace::open_exclusive;
use crate::engine::{self, Engine, EngineConfig, NewVolume};
use crate::registry::{Entry, Registry, Runtime, RuntimeDevice, RuntimeGate, StageDir, boot_id};

/// A stage with its engine open, in this process.
///
/// Locks, in this order: `operations` (held through attach, detach and the like, which so happen one at a time), then
/// `attached`, `waiting`, `gates` or `backings` (held for moments; `status` needs only these).
pub struct Server {
    registry: Registry,
    pub(super) dir: StageDir,
    arena_dir: PathBuf,
    pub(super) engine: Arc<Engine>,
    pub(super) stage: Arc<FileDisk>,
    supervisor: Option<u32>,
    pub(super) operations: Mutex<()>,
    pub(super) attached: Mutex<BTreeMap<String, Attached>>,
    /// Devices that could not be taken over yet.
    pub(super) waiting: Mutex<BTreeMap<String, Waiting>>,
    /// Volumes that are byte devices.
    pub(super) gates: Mutex<BTreeMap<String, Opened>>,
    /// Those of a server that died and that could not be opened yet.
    pub(super) lost_gates: Mutex<Vec<RuntimeGate>>,
    pub(super) ties: Arc<Ties>,
    backings: Mutex<BTreeMap<VolumeId, Arc<FileDisk>>>,
    /// Nothing more is accepted.
    ending: AtomicBool,
    closed: AtomicBool,
    /// The end is over.
    done: AtomicBool,
}

/// How to open a stage.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening {
    /// Go on although writes acknowledged in memory are gone.
    pub accept_loss: bool,
    /// Delete this volume, with what is staged for it.
    pub forget: Option<Uuid>,
}

/// What operations fail with once the server is ending; not told to commands, which look for another server instead.
const ENDING: &str = "the server is ending";

impl Server {
    /// Opens the stage `uuid` where the registry says it is.
    pub fn open(registry: &Registry, uuid: Uuid, opening: Opening) -> Result<Server> {
        let entries: Vec<Entry> = registry.entries()?.into_iter().filter(|e| e.stage_uuid == uuid).collect();
        let Some(entry) = entries.first() else {
            return Err(Error::new(ErrorKind::NotFound, format!("no volume is on stage {uuid}")));
        };
        let (stage, superblock) = open_stage(entry)?;
        let forget = match opening.forget {
            None => None,
            Some(volume) => {
                Some(superblock.volumes.iter().find(|v| v.uuid == volume).map(|v| v.id).ok_or_else(|| {
                    Error::new(
                        ErrorKind::NotFound,
                        format!("{} lists volume {volume} no more", entry.stage.display()),
                    )
                })?)
            }
        };
        let (mut backings, missing) = open_backings(&superblock, &entries, &stage);
        let list = backings.iter().map(|(id, disk)| (*id, Arc::clone(disk))).collect();
        let dir = registry.stage_dir(uuid);
        let noted = dir.arena_dir();
        let arena_dir = engine::arena_dir_of(uuid, noted.clone());
        let config = EngineConfig {
            stage: Arc::clone(&stage),
            backings: list,
            arena_dir: arena_dir.clone(),
            accept_loss: opening.accept_loss,
            forget,
        };
        let engine = Engine::open(config)
            .map_err(|e| explain(engine::explain_loss(e, noted.as_deref()), &superblock, &missing))?;
        if let Err(e) = dir.make().and_then(|()| dir.put_arena_dir(&arena_dir)) {
            tracing::warn!("cannot note for the next server where the arena is: {}", e.report());
        }
        // What the engine did not accept is tried again when it is needed, at the place that holds then.
        backings.retain(|id, disk| {
            Some(*id) != forget
                && match engine.add_backing(*id, Arc::clone(disk)) {
                    Err(e) if e.kind() != ErrorKind::Busy => {
                        tracing::warn!("a volume cannot be used: {}", e.report());
                        false
                    }
                    // In use already.
                    _ => true,
                }
        });
        let repaired = engine.recovery().superblocks_repaired;
        if repaired > 0 {
            tracing::warn!("{}: {repaired} damaged superblock copies were written again", stage.name());
        }
        Ok(Server {
            registry: registry.clone(),
            dir,
            arena_dir,
            engine,
            stage,
            supervisor: None,
            operations: Mutex::new(()),
            attached: Mutex::default(),
            waiting: Mutex::default(),
            gates: Mutex::default(),
            lost_gates: Mutex::default(),
            ties: Arc::default(),
            backings: backings.into(),
            ending: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            done: AtomicBool::new(false),
        })
    }

    /// Remembers who restarts this process.
    pub fn set_supervisor(&mut self, pid: Option<u32>) {
        self.supervisor = pid;
    }

    /// Process id of the supervisor.
    pub fn supervisor(&self) -> Option<u32> {
        self.supervisor
    }

    /// Whether nothing more is accepted.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// From now on nothing is accepted.
    pub(super) fn begin_end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// The volume `name`.
    pub fn volume(&self, name: &str) -> Result<VolumeInfo> {
        self.engine.volumes().into_iter().find(|v| v.name == name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("stage {} has no volume '{name}'", self.stage.name()))
        })
    }

    /// What is known here of a volume.
    pub(super) fn entry(&self, volume: &VolumeInfo) -> Result<Option<Entry>> {
        Ok(self.registry.entries()?.into_iter().find(|e| e.volume_uuid == volume.uuid))
    }

    /// The open backing of a volume. One that could not be opened with the stage is tried again.
    pub(super) fn backing(&self, volume: &VolumeInfo) -> Result<Arc<FileDisk>> {
        if let Some(disk) = self.backings.lock().get(&volume.id) {
            return Ok(Arc::clone(disk));
        }
        let path = self.entry(volume)?.map_or_else(|| PathBuf::from(&volume.backing), |e| e.backing);
        let disk = Arc::new(open_backing(&path, &self.stage).map_err(|e| e.within("backing"))?);
        self.engine.add_backing(volume.id, Arc::clone(&disk))?;
        self.backings.lock().insert(volume.id, Arc::clone(&disk));
        Ok(disk)
    }

    /// Begins an operation: one at a time, none once the server is ending.
    pub(super) fn begin(&self) -> Result<MutexGuard<'_, ()>> {
        let guard = self.operations.lock();
        if self.is_ending() { Err(Error::new(ErrorKind::Busy, ENDING)) } else { Ok(guard) }
    }

    /// Whether an operation failed only because the server is ending.
    pub fn came_too_late<T>(outcome: &Result<T>) -> bool {
        outcome.as_ref().is_err_and(|e| e.report() == ENDING)
    }

    /// Refuses a volume that is attached.
    pub(super) fn free(&self, name: &str) -> Result<()> {
        if let Some(Opened { gate, .. }) = self.gates.lock().get(name) {
            let what = format!(
                "volume '{name}' is attached as byte device {}: detach it first",
                gate.path().display()
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        if self.waiting.lock().contains_key(name) {
            let what = format!("the device of volume '{name}' waits to be served: detach it first");
            return Err(Error::new(ErrorKind::Busy, what));
        }
        match self.attached.lock().get(name) {
            None => Ok(()),
            Some(device) => Err(Error::new(
                ErrorKind::Busy,
                format!("volume '{name}' is attached as {}: detach it first", device.path.display()),
            )),
        }
    }

    /// Adds a volume with the backing at `path`.
    pub fn add_volume(&self, new: NewVolume) -> Result<Uuid> {
        let _one = self.begin()?;
        let disk =
            Arc::new(open_backing(Path::new(&new.backing), &self.stage).map_err(|e| e.within("backing"))?);
        let info = self.engine.add_volume(Arc::clone(&disk), new)?;
        self.backings.lock().insert(info.id, disk);
        Ok(info.uuid)
    }

    /// Removes a volume that is not attached, after bringing everything to the backings.
    pub fn remove_volume(&self, name: &str) -> Result<()> {
        let _one = self.begin()?;
        self.free(name)?;
        let volume = self.volume(name)?;
        self.backing(&volume)?;
        self.engine.remove_volume(volume.id)?;
        self.backings.lock().remove(&volume.id);
        Ok(())
    }

    /// Makes a volume larger, attached or not.
    pub fn resize(&self, name: &str, bytes: u64) -> Result<()> {
        let _one = self.begin()?;
        let volume = self.volume(name)?;
        // The engine changes only what it has the backing of.
        self.backing(&volume)?;
        let device = self.attached.lock().get(name).map(|a| Arc::clone(&a.device));
        if device.as_ref().is_some_and(|d| !super::devices::can_resize(&d.lock())) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "this kernel cannot resize a live device (Linux 6.16 can): detach, resize, attach",
            ));
        }
        self.engine.resize_volume(volume.id, bytes)?;
        if let Some(open) = self.gates.lock().get(name) {
            open.gate.nudge();
        }
        device.map_or(Ok(()), |d| d.lock().resize(bytes))
    }

    /// Brings everything that was accepted to the backings.
    pub fn flush(&self) -> Result<()> {
        // Beside other operations: it may take long and changes nothing that they look at.
        self.engine.drain()
    }

    /// Closes the engine, once; if it cannot flush, what is staged stays in the stage.
    pub fn close(&self, flush: bool) -> Result<()> {
        self.begin_end();
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let outcome = close(&self.engine, flush);
        self.set_done();
        outcome
    }

    /// From now on the process may end.
    pub(super) fn set_done(&self) {
        self.done.store(true, Ordering::Release);
    }

    /// Whether it has ended, and not only begun to.
    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Notes for others what this server does. That it cannot be noted is no reason to stop serving.
    pub fn note_runtime(&self) {
        let volumes = self.engine.volumes();
        let mut devices: Vec<(String, u32)> =
            self.attached.lock().iter().map(|(name, a)| (name.clone(), a.device_id)).collect();
        devices.extend(self.waiting.lock().iter().map(|(name, w)| (name.clone(), w.device_id)));
        let devices = devices
            .into_iter()
            .filter_map(|(name, device_id)| {
                let volume_uuid = volumes.iter().find(|v| v.name == name)?.uuid;
                Some(RuntimeDevice { volume: name, volume_uuid, device_id })
            })
            .collect();
        let runtime = Runtime {
            boot_id: boot_id(),
            server_pid: std::process::id(),
            supervisor_pid: self.supervisor,
            ended: self.is_ending(),
            devices,
            gates: self.gates_to_note(),
            arena_dir: Some(self.arena_dir.clone()),
        };
        if let Err(e) = self.dir.put_runtime(&runtime) {
            tracing::warn!("{}", e.report());
        }
    }
}

/// Closes an engine; if it cannot flush, what is staged stays in the stage.
pub(super) fn close(engine: &Engine, flush: bool) -> Result<()> {
    engine.close(flush).or_else(|e| {
        if flush {
            engine.close(false)?;
        }
        Err(Error::new(
            e.kind(),
            format!("not everything could be flushed, the rest stays in the stage: {}", e.report()),
        ))
    })
}

type Backings = (BTreeMap<VolumeId, Arc<FileDisk>>, BTreeMap<VolumeId, Error>);

/// Opens the stage where `entry` says it is.
fn open_stage(entry: &Entry) -> Result<(Arc<FileDisk>, Superblock)> {
    let stage = Arc::new(open_exclusive(&entry.stage).map_err(|e| e.within("stage"))?);
    let superblock = engine::read_superblock(&*stage).map_err(|e| e.within("stage"))?.superblock;
    if superblock.stage_uuid == entry.stage_uuid {
        return Ok((stage, superblock));
    }
    Err(Error::new(
        ErrorKind::WrongDevice,
        format!(
            "{} holds stage {}, expected {}: the device was replaced or its name has changed; name the right one with \
             attach --stage",
            entry.stage.display(),
            superblock.stage_uuid,
            entry.stage_uuid
        ),
    ))
}

/// Opens the backings of all volumes, where the registry or else the superblock says they are.
fn open_backings(superblock: &Superblock, entries: &[Entry], stage: &FileDisk) -> Backings {
    let mut backings: BTreeMap<VolumeId, Arc<FileDisk>> = BTreeMap::new();
    let mut missing = BTreeMap::new();
    for volume in &superblock.volumes {
        let entry = entries.iter().find(|e| e.volume_uuid == volume.uuid);
        let path = entry.map_or_else(|| PathBuf::from(&volume.backing), |e| e.backing.clone());
        match open_backing(&path, stage) {
            Ok(disk) => {
                backings.insert(volume.id, Arc::new(disk));
            }
            Err(e) => {
                tracing::warn!("backing of volume '{}': {}", volume.name, e.report());
                missing.insert(volume.id, e);
            }
        }
    }
    (backings, missing)
}

/// The engine's error, with the backings that could not be opened, which may be its cause.
fn explain(e: Error, superblock: &Superblock, missing: &BTreeMap<VolumeId, Error>) -> Error {
    let reasons: Vec<String> = superblock
        .volumes
        .iter()
        .filter_map(|v| {
            missing.get(&v.id).map(|why| format!("backing of volume '{}': {}", v.name, why.report()))
        })
        .collect();
    if reasons.is_empty() {
        e
    } else {
        // To the engine a backing that could not be opened is one that is not there.
        let opening = missing.values().next().map(Error::kind).filter(|_| e.kind() == ErrorKind::NotFound);
        Error::new(opening.unwrap_or(e.kind()), format!("{}; {}", e.report(), reasons.join("; ")))
    }
}

fn open_backing(path: &Path, stage: &FileDisk) -> Result<FileDisk> {
    let disk = open_exclusive(path)?;
    if overlap(disk.identity(), stage.identity()) {
        let what = format!("{} is the stage: name the right backing with attach --backing", path.display());
        return Err(Error::new(ErrorKind::WrongDevice, what));
    }
    Ok(disk)
}
