//! Byte doors of a server: gates that are opened, opened again after a crash, closed.
//!
//! A volume has a block device or a gate, never both: the kernel's cache of the one would not see what comes through the
//! other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::bytes::gate::{Access, Gate};
use tidegate_driver::format::volume_entry::VolumeInfo;
use tidegate_driver::io::Disk;

use super::Server;
use super::devices::within;
use crate::protocol::{ClientStatus, GateStatus};
use crate::registry::{RuntimeGate, StageDir};

/// How long sessions may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a gate is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateConfig {
    /// Path of its socket.
    pub path: PathBuf,
    /// Who may come in.
    pub access: Access,
}

/// A gate that is open.
pub struct Opened {
    /// It.
    pub gate: Arc<Gate>,
    /// It came through the death of a server since the volume was last attached by command.
    pub recovered: bool,
}

impl Server {
    /// Opens the gate of a volume; the path of its socket. One that came through a crash is there already: that is no
    /// error once, and from then on those may come in who are named here.
    pub fn attach_bytes(&self, name: &str, config: GateConfig) -> Result<String> {
        let _one = self.begin()?;
        let volume = self.volume(name)?;
        self.forget_ended();
        let path = config.path.display().to_string();
        if let Some(gate) = self.recovered_gate(name, &config.path) {
            gate.set_access(config.access)?;
            self.note_runtime();
            return Ok(path);
        }
        self.free(name)?;
        self.open_gate(&volume, config, false)?;
        self.lost_gates.lock().retain(|lost| lost.volume != name);
        self.note_runtime();
        tracing::info!("attached volume '{name}' as byte device {path}");
        Ok(path)
    }

    /// The gate of a volume that came through a crash, once.
    fn recovered_gate(&self, name: &str, path: &Path) -> Option<Arc<Gate>> {
        let mut gates = self.gates.lock();
        let open = gates.get_mut(name).filter(|open| open.gate.path() == path)?;
        std::mem::take(&mut open.recovered).then(|| Arc::clone(&open.gate))
    }

    fn open_gate(&self, volume: &VolumeInfo, config: GateConfig, recovered: bool) -> Result<()> {
        let backing = self.backing(volume)?;
        if let Err(e) = self.engine.set_backing_path(volume.id, &backing.name()) {
            tracing::warn!("cannot note the path of the backing of volume '{}': {}", volume.name, e.report());
        }
        let gate = Gate::open(
            Arc::clone(&self.engine),
            Arc::clone(&self.ties),
            volume.id,
            &config.path,
            config.access,
        )?;
        self.gates.lock().insert(volume.name.clone(), Opened { gate: Arc::new(gate), recovered });
        Ok(())
    }

    /// Opens the gates of a server that died. Those that cannot be opened are tried again, while their clients are told that
    /// nobody serves them.
    pub fn recover_gates(&self, noted: Vec<RuntimeGate>) {
        let _one = self.operations.lock();
        *self.lost_gates.lock() = noted;
        self.retry_gates();
    }

    /// Tries to open the gates that are lost. The caller holds `operations`.
    pub(super) fn retry_gates(&self) {
        let lost = std::mem::take(&mut *self.lost_gates.lock());
        for gate in lost {
            if self.attached.lock().contains_key(&gate.volume)
                || self.waiting.lock().contains_key(&gate.volume)
            {
                tracing::error!(
                    "volume '{}' is a block device, so it is no byte device any more",
                    gate.volume
                );
                continue;
            }
            let Some(volume) = self.engine.volumes().into_iter().find(|v| v.uuid == gate.volume_uuid) else {
                continue;
            };
            let access = Access { users: gate.users.clone(), groups: gate.groups.clone() };
            let config = GateConfig { path: gate.path.clone(), access };
            match self.open_gate(&volume, config, true) {
                Ok(()) => tracing::info!("volume '{}' is a byte device again", volume.name),
                Err(e) => {
                    tracing::error!("volume '{}' is no byte device yet: {}", volume.name, e.report());
                    self.lost_gates.lock().push(gate);
                }
            }
        }
    }

    /// Closes the gate of a volume; `None` if it has none.
    pub(super) fn end_gate(&self, name: &str, force: bool) -> Option<Result<PathBuf>> {
        let lost = self.lost_gates.lock().iter().position(|lost| lost.volume == name);
        if let Some(lost) = lost {
            return Some(Ok(self.lost_gates.lock().swap_remove(lost).path));
        }
        let gate = self.gates.lock().get(name).map(|open| Arc::clone(&open.gate))?;
        let sessions = gate.sessions();
        if let Some(session) = sessions.first()
            && !force
        {
            let what = format!(
                "{} clients use byte device '{name}', one of them process {}: end them first; `tidegate detach --force {name}` \
                 ends their sessions",
                sessions.len(),
                session.pid
            );
            return Some(Err(Error::new(ErrorKind::Busy, what)));
        }
        let path = gate.path().to_owned();
        let closed = within(PATIENCE, move || {
            gate.close();
            Ok(())
        });
        if closed.is_none() {
            let what = format!(
                "the sessions of byte device '{name}' do not end: their requests wait for the stage or the backing; repair \
                 these, then try again"
            );
            return Some(Err(Error::new(ErrorKind::Busy, what)));
        }
        self.gates.lock().remove(name);
        Some(Ok(path))
    }

    /// Closes all gates, those in use too. Whether all are closed.
    pub(super) fn end_gates(&self) -> bool {
        let names: Vec<String> = self.gates.lock().keys().cloned().collect();
        let mut all = true;
        for name in names {
            if let Some(Err(e)) = self.end_gate(&name, true) {
                tracing::error!("{}", e.report());
                all = false;
            }
        }
        all
    }

    /// Gates for `status`.
    pub(super) fn gate_status(&self) -> Vec<GateStatus> {
        let gates = self.gates.lock();
        let status = |(name, open): (&String, &Opened)| GateStatus {
            volume: name.clone(),
            path: open.gate.path().display().to_string(),
            clients: open.gate.sessions().iter().map(|s| ClientStatus { pid: s.pid, uid: s.uid }).collect(),
            is_lost: false,
        };
        let lost = self.lost_gates.lock();
        let lost = lost.iter().map(|lost| GateStatus {
            volume: lost.volume.clone(),
            path: lost.path.display().to_string(),
            clients: Vec::new(),
            is_lost: true,
        });
        gates.iter().map(status).chain(lost).collect()
    }

    /// Gates as a successor has to open them.
    pub(super) fn gates_to_note(&self) -> Vec<RuntimeGate> {
        let volumes = self.engine.volumes();
        let gates = self.gates.lock();
        let note = |(name, open): (&String, &Opened)| {
            let access = open.gate.access();
            Some(RuntimeGate {
                volume: name.clone(),
                volume_uuid: volumes.iter().find(|v| v.name == *name)?.uuid,
                path: open.gate.path().to_owned(),
                users: access.users,
                groups: access.groups,
            })
        };
        let open = gates.iter().filter_map(note);
        open.chain(self.lost_gates.lock().iter().cloned()).collect()
    }
}

/// Gates that the last server of a stage had open when it died, in this boot of the machine.
pub fn noted(dir: &StageDir) -> Vec<RuntimeGate> {
    dir.runtime().ok().flatten().map(|runtime| runtime.gates).unwrap_or_default()
}

/// Folders that gates need: a server keeps their mounts.
pub fn folders(noted: &[RuntimeGate]) -> Vec<PathBuf> {
    let usual = crate::commands::attach::run_dir();
    std::iter::once(usual).chain(noted.iter().filter_map(|g| g.path.parent().map(Path::to_owned))).collect()
}
