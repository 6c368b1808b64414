//! Devices of a server: made, recovered, ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::volume_entry::VolumeInfo;
use tidegate_driver::io::Disk;
use tidegate_driver::io::file::mount_points;
use tidegate_ublk::{Device, Start, Status, StopMode, sys};

use super::Server;
use crate::engine::{self, Doors};
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

/// A ublk device of this volume that is there already.
fn existing(volume: &VolumeInfo) -> Option<(u32, Status)> {
    let identity = engine::identity_of(volume.uuid);
    let ids = tidegate_ublk::list().unwrap_or_default();
    let mut found: Vec<_> = ids
        .into_iter()
        .filter_map(|id| tidegate_ublk::state(id).ok())
        .filter(|d| d.identity == identity)
        .collect();
    // One that was ended while somebody had it open keeps its number for a while: it is not the one that counts.
    found.sort_by_key(|d| d.status == Status::Dead);
    found.first().map(|d| (d.device_id, d.status))
}

impl Server {
    /// A volume whose device waits for a server.
    pub fn waiting_device(&self) -> Option<String> {
        self.engine
            .volumes()
            .into_iter()
            .find(|v| existing(v).is_some_and(|(_, s)| s != Status::Dead))
            .map(|v| v.name)
    }

    /// Takes over the devices that a server which died left waiting.
    pub fn recover_devices(&self) {
        let _one = self.operations.lock();
        for volume in self.engine.volumes() {
            if existing(&volume).is_none() {
                continue;
            }
            match self.start(&volume) {
                Ok(path) => tracing::info!("recovered {} of volume '{}'", path.display(), volume.name),
                Err(e) => {
                    tracing::error!("cannot recover the device of volume '{}': {}", volume.name, e.report())
                }
            }
        }
    }

    /// Starts the device of a volume, which is one that waits if there is one.
    fn start(&self, volume: &VolumeInfo) -> Result<PathBuf> {
        let backing = self.backing(volume)?;
        if let Err(e) = self.engine.set_backing_path(volume.id, &backing.name()) {
            tracing::warn!("cannot note the path of the backing of volume '{}': {}", volume.name, e.report());
        }
        let start = match existing(volume) {
            // Added, never started: its server died in between.
            Some((device_id, Status::Dead)) => {
                tidegate_ublk::delete(device_id)?;
                Start::New
            }
            Some((device_id, _)) => Start::Recover { device_id },
            None => Start::New,
        };
        let config = engine::device_config(&self.engine, volume, &backing);
        let doors = Doors { engine: Arc::clone(&self.engine), volume: volume.id };
        let device = Device::start(&config, start, Arc::new(doors))?;
        let path = device.path();
        let attached = Attached {
            device_id: device.id(),
            path: path.clone(),
            recovered: start != Start::New,
            device: Arc::new(Mutex::new(device)),
        };
        self.attached.lock().insert(volume.name.clone(), attached);
        Ok(path)
    }

    /// Attaches a volume; the path of its device. One that came through a crash is there already: that is no error once.
    pub fn attach(&self, name: &str) -> Result<String> {
        let _one = self.begin()?;
        let volume = self.volume(name)?;
        let mut attached = self.attached.lock();
        if attached.get(name).is_some_and(|a| a.device.lock().ended()) {
            tracing::warn!("the device of volume '{name}' was ended by somebody else");
            attached.remove(name);
        }
        if let Some(device) = attached.get_mut(name) {
            let path = device.path.display().to_string();
            if std::mem::take(&mut device.recovered) {
                return Ok(path);
            }
            return Err(Error::new(
                ErrorKind::Busy,
                format!("volume '{name}' is attached already, as {path}"),
            ));
        }
        drop(attached);
        let path = self.start(&volume)?;
        self.note_runtime();
        tracing::info!("attached volume '{name}' as {}", path.display());
        Ok(path.display().to_string())
    }

    /// Ends the device of a volume and, if asked to, flushes the stage. With the last device the engine is closed and the
    /// server is to end.
    pub fn detach(&self, name: &str, flush: bool) -> Result<()> {
        let _one = self.begin()?;
        let device = self.attached.lock().get(name).map(|a| (Arc::clone(&a.device), a.path.clone()));
        let Some((device, path)) = device else { return Err(crate::commands::detach::not_attached(name)) };
        device.lock().stop(StopMode::RefuseIfOpen).map_err(|e| busy(e, &path))?;
        self.attached.lock().remove(name);
        let last = self.attached.lock().is_empty();
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

    /// Ends the server: devices that nobody uses are ended, others are left waiting for the next server. When this
    /// returns, everything that was accepted is safe.
    pub fn terminate(&self) {
        self.begin_end();
        let _one = self.operations.lock();
        let mut attached = self.attached.lock();
        attached.retain(|name, a| match a.device.lock().stop(StopMode::RefuseIfOpen) {
            Ok(()) => false,
            Err(e) => {
                tracing::warn!(
                    "the device of volume '{name}' is left waiting for the next server: {}",
                    e.report()
                );
                true
            }
        });
        let left: Vec<_> = attached.values().map(|a| Arc::clone(&a.device)).collect();
        drop(attached);
        if left.is_empty() {
            self.close(true).unwrap_or_else(|e| tracing::error!("{}", e.report()));
        } else {
            self.leave_waiting(&left);
        }
        self.note_runtime();
    }

    fn leave_waiting(&self, devices: &[Arc<Mutex<Device>>]) {
        // While they are served, so that clients pause for as short as possible.
        if let Err(e) = self.engine.drain() {
            tracing::error!("not everything is on the backings: {}", e.report());
            self.engine.make_durable().unwrap_or_else(|e| tracing::error!("{}", e.report()));
        }
        let quiet = devices.iter().filter(|d| d.lock().quiesce(HAND_OVER).is_ok()).count();
        if quiet == devices.len() {
            self.close(true).unwrap_or_else(|e| tracing::error!("{}", e.report()));
        } else {
            // The kernel sends what these devices have in flight again, to the next server; the arena is still there.
            tracing::info!(
                "this kernel does not hand devices over: the next server recovers them as after a crash"
            );
        }
    }

    /// What `status` tells.
    pub fn status(&self) -> ServerStatus {
        let devices = self
            .attached
            .lock()
            .iter()
            .map(|(name, a)| DeviceStatus {
                volume: name.clone(),
                device_id: a.device_id,
                path: a.path.display().to_string(),
                recovered: a.recovered,
            })
            .collect();
        ServerStatus {
            pid: std::process::id(),
            supervisor_pid: self.supervisor(),
            devices,
            stage: self.engine.status(),
            recovery: self.engine.recovery(),
        }
    }

    /// Whether no device is attached.
    pub fn is_idle(&self) -> bool {
        self.attached.lock().is_empty()
    }

    /// Ends a server that has nothing to serve. Whether it is ended.
    pub fn end_if_idle(&self) -> bool {
        let Ok(_one) = self.begin() else { return true };
        if !self.is_idle() {
            return false;
        }
        self.close(true).unwrap_or_else(|e| tracing::error!("{}", e.report()));
        self.note_runtime();
        true
    }
}

/// The refusal to stop a device, with the mount points as process 1 sees them.
fn busy(e: Error, path: &std::path::Path) -> Error {
    use std::os::unix::fs::MetadataExt;
    if e.kind() != ErrorKind::Busy {
        return e;
    }
    let mounts = std::fs::metadata(path).map(|m| mount_points(m.rdev())).unwrap_or_default();
    if mounts.is_empty() {
        let who = e.report();
        let who = who.split(": close or unmount").next().unwrap_or_default();
        return Error::new(ErrorKind::Busy, format!("{who}: close it first"));
    }
    Error::new(
        ErrorKind::Busy,
        format!("{} is mounted on {}: unmount it first", path.display(), mounts.join(", ")),
    )
}
