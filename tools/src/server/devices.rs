//! Devices of a server: made, recovered, ended.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use parking_lot::Mutex;
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::volume_entry::VolumeInfo;
use tidegate_driver::io::Disk;
use tidegate_driver::io::file::mount_points;
use tidegate_ublk::info::block_path;
use tidegate_ublk::{Device, Start, Status, StopMode, sys};

use super::Server;
use super::gates::Opened;
use super::state::close;
use crate::engine::{self, Doors, Wishes};
use crate::links;
use crate::protocol::{DeviceStatus, ServerStatus};

/// How long requests in flight may take when a device is handed over.
const HAND_OVER: Duration = Duration::from_secs(10);

/// A device that is served.
pub struct Attached {
    /// Its number.
    pub device_id: u32,
    /// Path of the block device.
    pub path: PathBuf,
    /// It came through the death of a server since it was last attached by command.
    pub recovered: bool,
    /// The device. Locked while it is stopped or resized.
    pub device: Arc<Mutex<Device>>,
}

/// Whether a live device can change its size.
pub fn can_resize(device: &Device) -> bool {
    device.flags() & sys::F_UPDATE_SIZE != 0
}

/// A device that waits for this server, which could not take it over.
pub struct Waiting {
    /// Its number.
    pub device_id: u32,
    /// Why.
    pub problem: String,
}

impl Server {
    /// A volume whose device waits for a server.
    pub fn waiting_device(&self) -> Result<Option<String>> {
        for volume in self.engine.volumes() {
            if engine::device_of(volume.uuid)?.is_some_and(|(_, status)| status != Status::Dead) {
                return Ok(Some(volume.name));
            }
        }
        Ok(None)
    }

    /// Takes over the devices that a server which died left waiting. Those that cannot be taken over go on waiting.
    pub fn recover_devices(&self) -> Result<()> {
        let _one = self.operations.lock();
        // All are looked for before the first is taken over: from then on nothing may end this process.
        let mut found = Vec::new();
        for volume in self.engine.volumes() {
            found.push((engine::device_of(volume.uuid)?, volume));
        }
        for (device, volume) in found {
            match device {
                None => {}
                // Ended, or added and never started, when its server died: nobody waits for it.
                Some((device_id, Status::Dead)) => {
                    if let Err(e) = tidegate_ublk::delete(device_id) {
                        tracing::warn!("cannot remove dead ublk device {device_id}: {}", e.report());
                    }
                }
                Some((device_id, _)) => self.recover(&volume, device_id),
            }
        }
        Ok(())
    }

    fn recover(&self, volume: &VolumeInfo, device_id: u32) {
        match self.start(volume) {
            Ok(path) => tracing::info!("recovered {} of volume '{}'", path.display(), volume.name),
            Err(e) => {
                let problem = e.report();
                tracing::error!("cannot recover the device of volume '{}' yet: {problem}", volume.name);
                self.waiting.lock().insert(volume.name.clone(), Waiting { device_id, problem });
            }
        }
    }

    /// Whether a device could not be taken over yet, and still should be.
    pub fn has_waiting(&self) -> bool {
        let is_waiting = !self.waiting.lock().is_empty() || !self.lost_gates.lock().is_empty();
        is_waiting && !self.is_ending()
    }

    /// Tries again to take over the devices that wait.
    pub fn retry_waiting(&self) {
        let Ok(_one) = self.begin() else { return };
        let waiting: Vec<(String, u32)> =
            self.waiting.lock().iter().map(|(name, w)| (name.clone(), w.device_id)).collect();
        for (name, device_id) in waiting {
            let is_gone = match tidegate_ublk::state(device_id) {
                Ok(device) => device.status == Status::Dead,
                Err(e) => e.kind() == ErrorKind::NotFound,
            };
            match self.volume(&name) {
                Ok(volume) if !is_gone => self.recover(&volume, device_id),
                // Somebody has ended it.
                _ => drop(self.waiting.lock().remove(&name)),
            }
        }
        self.retry_gates();
        self.note_runtime();
    }

    /// Starts the device of a volume, which is one that waits if there is one.
    fn start(&self, volume: &VolumeInfo) -> Result<PathBuf> {
        let backing = self.backing(volume)?;
        if let Err(e) = self.engine.set_backing_path(volume.id, &backing.name()) {
            tracing::warn!("cannot note the path of the backing of volume '{}': {}", volume.name, e.report());
        }
        let start = match engine::device_of(volume.uuid)? {
            // Added, never started: its server died in between.
            Some((device_id, Status::Dead)) => {
                tidegate_ublk::delete(device_id)?;
                Start::New
            }
            Some((device_id, _)) => Start::Recover { device_id },
            None => Start::New,
        };
        // Nothing to hold a device up for.
        let wishes = self.entry(volume).ok().flatten().map_or_else(Wishes::default, |entry| entry.wishes());
        let config = engine::device_config(&self.engine, volume, &backing, wishes);
        let doors = Doors { engine: Arc::clone(&self.engine), volume: volume.id };
        let device = Device::start(&config, start, Arc::new(doors))?;
        let path = device.path();
        links::make(&volume.name, device.id());
        let attached = Attached {
            device_id: device.id(),
            path: path.clone(),
            recovered: start != Start::New,
            device: Arc::new(Mutex::new(device)),
        };
        self.attached.lock().insert(volume.name.clone(), attached);
        self.waiting.lock().remove(&volume.name);
        Ok(path)
    }

    /// Lets go of devices that another program has stopped or deleted.
    pub fn forget_ended(&self) {
        let mut forgotten = false;
        self.attached.lock().retain(|name, attached| {
            // One that is locked is being stopped or resized, by us.
            let ended = attached.device.try_lock().is_some_and(|device| device.ended_by_others());
            if ended {
                tracing::warn!("{} of volume '{name}' was ended by somebody else", attached.path.display());
                links::remove(name, attached.device_id);
            }
            forgotten |= ended;
            !ended
        });
        if forgotten {
            self.note_runtime();
        }
    }

    /// Attaches a volume; the path of its device. One that came through a crash is there already: that is no error once.
    pub fn attach(&self, name: &str) -> Result<String> {
        let _one = self.begin()?;
        let volume = self.volume(name)?;
        self.forget_ended();
        if self.lost_gates.lock().iter().any(|lost| lost.volume == name) {
            let what = format!(
                "volume '{name}' is a byte device whose socket cannot be opened yet: detach it first"
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        if let Some(Opened { gate, .. }) = self.gates.lock().get(name) {
            let what = format!(
                "volume '{name}' is attached as byte device {}, and a volume is a block device or a byte device, never both: \
                 detach it first",
                gate.path().display()
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        if let Some(device) = self.attached.lock().get_mut(name) {
            let path = device.path.display().to_string();
            if std::mem::take(&mut device.recovered) {
                return Ok(path);
            }
            return Err(Error::new(
                ErrorKind::Busy,
                format!("volume '{name}' is attached already, as {path}"),
            ));
        }
        let path = self.start(&volume)?;
        if let Some(device) = self.attached.lock().get_mut(name) {
            device.recovered = false;
        }
        self.note_runtime();
        tracing::info!("attached volume '{name}' as {}", path.display());
        Ok(path.display().to_string())
    }

    /// Ends the device of a volume and, if asked to, flushes the stage. With the last device the engine is closed and the
    /// server is to end.
    pub fn detach(&self, name: &str, flush: bool, force: bool) -> Result<()> {
        let _one = self.begin()?;
        let path = match self.end_gate(name, force) {
            Some(ended) => ended?,
            None if force && !self.attached.lock().contains_key(name) => self.end_waiting(name)?,
            None => self.end_attached(name, force)?,
        };
        let last = self.is_idle();
        tracing::info!("detached volume '{name}' from {}", path.display());
        let flushed = if last {
            self.close(flush)
        } else if flush {
            self.engine.drain()
        } else {
            Ok(())
        };
        self.note_runtime();
        flushed.map_err(|e| e.within(format!("volume '{name}' is detached, but its flush failed")))
    }

    fn end_attached(&self, name: &str, force: bool) -> Result<PathBuf> {
        if self.waiting.lock().contains_key(name) {
            // What clients have handed over is to be carried out before the device goes.
            self.start(&self.volume(name)?).map_err(|e| {
                let what = format!(
                    "the device of volume '{name}' waits and cannot be served: {}; `tidegate detach --force {name}` ends it \
                     all the same, with errors for whoever uses it",
                    e.report()
                );
                Error::new(e.kind(), what)
            })?;
        }
        let device =
            self.attached.lock().get(name).map(|a| (Arc::clone(&a.device), a.path.clone(), a.device_id));
        let Some((device, path, device_id)) = device else {
            return Err(crate::commands::detach::not_attached(name));
        };
        if force {
            stop_within(&device, StopMode::Force).ok_or_else(|| {
                let what = format!(
                    "{} does not end: requests in it wait for the stage or the backing; repair these, or kill process {} \
                     and its supervisor and detach with --force again",
                    path.display(),
                    std::process::id()
                );
                Error::new(ErrorKind::Busy, what)
            })??;
        } else {
            device.lock().stop(StopMode::RefuseIfOpen).map_err(|e| busy(e, name, &path))?;
        }
        links::remove(name, device_id);
        self.attached.lock().remove(name);
        Ok(path)
    }

    /// Ends a device that waits, unserved.
    fn end_waiting(&self, name: &str) -> Result<PathBuf> {
        let device_id = self.waiting.lock().get(name).map(|w| w.device_id);
        let Some(device_id) = device_id else { return Err(crate::commands::detach::not_attached(name)) };
        tidegate_ublk::delete(device_id)?;
        links::remove(name, device_id);
        self.waiting.lock().remove(name);
        Ok(block_path(device_id))
    }

    /// Ends the server: devices that nobody uses are ended, others are left waiting for the next server. When this
    /// returns, everything that was accepted is safe.
    pub fn terminate(&self) {
        self.begin_end();
        match self.operations.try_lock_for(HAND_OVER) {
            Some(_one) => self.end_all(),
            None => {
                tracing::error!(
                    "an operation does not end: devices are left for the next server as after a crash"
                );
                self.make_durable_within();
            }
        }
        self.note_runtime();
        self.set_done();
    }

    fn end_all(&self) {
        let mut left = Vec::new();
        let mut stuck = !self.end_gates();
        let attached = self.attached.lock();
        let devices: Vec<_> =
            attached.iter().map(|(name, a)| (name.clone(), a.device_id, Arc::clone(&a.device))).collect();
        drop(attached);
        for (name, device_id, device) in devices {
            let problem = match stop_within(&device, StopMode::RefuseIfOpen) {
                Some(Ok(())) => {
                    links::remove(&name, device_id);
                    self.attached.lock().remove(&name);
                    continue;
                }
                Some(Err(e)) => {
                    left.push(device);
                    e.report()
                }
                None => {
                    stuck = true;
                    "it does not end, its requests wait for the stage or the backing".to_owned()
                }
            };
            tracing::warn!("the device of volume '{name}' is left waiting for the next server: {problem}");
        }
        if stuck {
            // Its requests are sent again to the next server, which finds the arena and goes on.
            self.make_durable_within();
        } else if left.is_empty() {
            self.close(true).unwrap_or_else(|e| tracing::error!("{}", e.report()));
        } else {
            self.leave_waiting(&left);
        }
    }

    /// Leaves devices that are in use for the next server. Takes no longer than a few times [`HAND_OVER`]: a backing that
    /// fails, or a stage that is full because of it, must not keep the process from ending.
    fn leave_waiting(&self, devices: &[Arc<Mutex<Device>>]) {
        // While they are served, so that clients pause for as short as possible.
        let engine = Arc::clone(&self.engine);
        let drained = match within(HAND_OVER, move || engine.drain()) {
            Some(Ok(())) => true,
            Some(Err(e)) => {
                tracing::error!("not everything is on the backings: {}", e.report());
                false
            }
            None => {
                let patience = HAND_OVER.as_secs();
                tracing::error!(
                    "not everything is on the backings after {patience} s: the rest stays in the stage"
                );
                false
            }
        };
        if !drained && !self.make_durable_within() {
            return;
        }
        let problems: Vec<String> = devices.iter().filter_map(quiesce_within).collect();
        if problems.is_empty() {
            self.close_within(drained, HAND_OVER);
        } else {
            // The kernel sends what these devices have in flight again, to the next server; the arena is still there.
            let why = problems.join("; ");
            tracing::info!("the next server recovers the devices as after a crash: {why}");
        }
    }

    /// As [`Server::close`]; a stage that takes longer is left as after a crash.
    fn close_within(&self, flush: bool, patience: Duration) {
        let engine = Arc::clone(&self.engine);
        match within(patience, move || close(&engine, flush)) {
            Some(Ok(())) => {}
            Some(Err(e)) => tracing::error!("{}", e.report()),
            None => tracing::error!(
                "the stage is not closed after {} s: left as after a crash",
                patience.as_secs()
            ),
        }
    }

    /// Makes everything accepted durable on the log device. Whether it is, before the patience is over.
    fn make_durable_within(&self) -> bool {
        let engine = Arc::clone(&self.engine);
        match within(HAND_OVER, move || engine.make_durable()) {
            Some(Ok(())) => return true,
            Some(Err(e)) => tracing::error!("{}", e.report()),
            None => tracing::error!("the stage does not answer: what it does not hold is in shared memory"),
        }
        false
    }

    /// What is left waiting for another server once this one has ended, in words.
    pub fn left_behind(&self) -> Option<String> {
        let attached = self.attached.lock();
        let (name, device) = attached.iter().next()?;
        let path = device.path.display();
        let mounts = mounts_of(&device.path);
        let used =
            if mounts.is_empty() { "open".to_owned() } else { format!("mounted on {}", mounts.join(", ")) };
        Some(format!(
            "{path} is still {used}: it waits for a server, nothing is lost; `tidegate attach {name}` serves it again, then \
             unmount it and `tidegate detach {name}`"
        ))
    }

    /// What `status` tells.
    pub fn status(&self) -> ServerStatus {
        self.forget_ended();
        let devices = self
            .attached
            .lock()
            .iter()
            .map(|(name, a)| DeviceStatus {
                volume: name.clone(),
                device_id: a.device_id,
                path: a.path.display().to_string(),
                recovered: a.recovered,
                problem: None,
            })
            .collect::<Vec<_>>();
        let waiting = self.waiting.lock();
        let devices = devices.into_iter().chain(waiting.iter().map(|(name, w)| DeviceStatus {
            volume: name.clone(),
            device_id: w.device_id,
            path: block_path(w.device_id).display().to_string(),
            recovered: false,
            problem: Some(w.problem.clone()),
        }));
        let devices = devices.collect();
        ServerStatus {
            pid: std::process::id(),
            supervisor_pid: self.supervisor(),
            ending: self.is_ending(),
            devices,
            gates: self.gate_status(),
            stage: self.engine.status(),
            recovery: self.engine.recovery(),
        }
    }

    /// Whether no volume is attached, and no device waits for this server.
    pub fn is_idle(&self) -> bool {
        let has_gates = !(self.gates.lock().is_empty() && self.lost_gates.lock().is_empty());
        self.attached.lock().is_empty() && self.waiting.lock().is_empty() && !has_gates
    }

    /// Ends a server that has nothing to serve. Whether it has ended.
    pub fn end_if_idle(&self) -> bool {
        let Ok(_one) = self.begin() else { return self.is_done() };
        if !self.is_idle() {
            return false;
        }
        self.close(true).unwrap_or_else(|e| tracing::error!("{}", e.report()));
        self.note_runtime();
        true
    }
}

/// Stops a device, for as long as that may take; `None` if it takes longer, and goes on, holding the device's lock.
fn stop_within(device: &Arc<Mutex<Device>>, mode: StopMode) -> Option<Result<()>> {
    let device = Arc::clone(device);
    within(HAND_OVER, move || device.lock().stop(mode))
}

/// Hands a device over; why it could not be, in words. It waits for requests in flight itself, but only once they are
/// with the kernel's driver.
fn quiesce_within(device: &Arc<Mutex<Device>>) -> Option<String> {
    let device = Arc::clone(device);
    match within(HAND_OVER * 2, move || device.lock().quiesce(HAND_OVER)) {
        Some(Ok(())) => None,
        Some(Err(e)) => Some(e.report()),
        None => Some("a device does not end".to_owned()),
    }
}

/// Does `work` in a thread of its own; `None` if it takes longer, and goes on.
pub(super) fn within(
    patience: Duration,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> Option<Result<()>> {
    let (sender, outcome) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("end".into()).spawn(move || {
        // The receiver is gone when the patience was over: then nobody is interested.
        let _ = sender.send(work());
    });
    match spawned {
        Ok(_) => outcome.recv_timeout(patience).ok(),
        Err(e) => Some(Err(Error::io("cannot start a thread", e))),
    }
}

/// Where a device is mounted, as process 1 sees it.
fn mounts_of(path: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map(|m| mount_points(m.rdev())).unwrap_or_default()
}

/// The refusal to stop a device, with the mount points as process 1 sees them.
fn busy(e: Error, name: &str, path: &Path) -> Error {
    if e.kind() != ErrorKind::Busy {
        return e;
    }
    let mounts = mounts_of(path);
    let (who, what_to_do) = if mounts.is_empty() {
        let who = e.report();
        (who.split(": close or unmount").next().unwrap_or_default().to_owned(), "close")
    } else {
        (format!("{} is mounted on {}", path.display(), mounts.join(", ")), "unmount")
    };
    let forced = format!("`tidegate detach --force {name}` fails its users' requests");
    Error::new(ErrorKind::Busy, format!("{who}: {what_to_do} it first; {forced}"))
}
