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

impl Server {
    /// Opens the gate of a volume; the path of its socket.
    pub fn attach_bytes(&self, name: &str, config: GateConfig) -> Result<String> {
        let _one = self.begin()?;
        let volume = self.volume(name)?;
        self.forget_ended();
        self.free(name)?;
        self.open_gate(&volume, config.clone())?;
        self.note_runtime();
        let path = config.path.display().to_string();
        tracing::info!("attached volume '{name}' as byte device {path}");
        Ok(path)
    }

    fn open_gate(&self, volume: &VolumeInfo, config: GateConfig) -> Result<()> {
        let backing = self.backing(volume)?;
        if let Err(e) = self.engine.set_backing_path(volume.id, &backing.path().display().to_string()) {
            tracing::warn!("cannot note the path of the backing of volume '{}': {}", volume.name, e.report());
        }
        let gate = Gate::open(
            Arc::clone(&self.engine),
            Arc::clone(&self.ties),
            volume.id,
            &config.path,
            config.access.clone(),
        )?;
        self.gates.lock().insert(volume.name.clone(), (Arc::new(gate), config.access));
        Ok(())
    }

    /// Opens the gates of a server that died. One that cannot be opened is missed by its clients, who are told so.
    pub fn recover_gates(&self, noted: &[RuntimeGate]) {
        let _one = self.operations.lock();
        for gate in noted {
            let Some(volume) = self.engine.volumes().into_iter().find(|v| v.uuid == gate.volume_uuid) else {
                continue;
            };
            let access = Access { users: gate.users.clone(), groups: gate.groups.clone() };
            match self.open_gate(&volume, GateConfig { path: gate.path.clone(), access }) {
                Ok(()) => tracing::info!("volume '{}' is a byte device again", volume.name),
                Err(e) => {
                    tracing::error!("volume '{}' is no byte device any more: {}", volume.name, e.report())
                }
            }
        }
    }

    /// Closes the gate of a volume; `None` if it has none.
    pub(super) fn end_gate(&self, name: &str, force: bool) -> Option<Result<PathBuf>> {
        let gate = self.gates.lock().get(name).map(|(gate, _)| Arc::clone(gate))?;
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
        let status = |(name, (gate, _)): (&String, &(Arc<Gate>, Access))| GateStatus {
            volume: name.clone(),
            path: gate.path().display().to_string(),
            clients: gate.sessions().iter().map(|s| ClientStatus { pid: s.pid, uid: s.uid }).collect(),
        };
        gates.iter().map(status).collect()
    }

    /// Gates as a successor has to open them.
    pub(super) fn gates_to_note(&self) -> Vec<RuntimeGate> {
        let volumes = self.engine.volumes();
        let gates = self.gates.lock();
        let note = |(name, (gate, access)): (&String, &(Arc<Gate>, Access))| {
            Some(RuntimeGate {
                volume: name.clone(),
                volume_uuid: volumes.iter().find(|v| v.name == *name)?.uuid,
                path: gate.path().to_owned(),
                users: access.users.clone(),
                groups: access.groups.clone(),
            })
        };
        gates.iter().filter_map(note).collect()
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
