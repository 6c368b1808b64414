//! `delete`: takes a volume off its stage and forgets its name. Files and devices are the user's and stay.

use std::io::Write as _;
use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::io::FileDisk;
use tidegate_ublk::Status;

use super::by_server_or_here;
use crate::cli::Delete;
use crate::client::Client;
use crate::protocol::Request;
use crate::registry::{Entry, Registry};
use crate::server::{Opening, Server};
use crate::{engine, report};

/// `delete`.
pub fn run(registry: &Registry, args: &Delete) -> Result<ExitCode> {
    let _lock = registry.lock()?;
    let entry = registry.get(&args.name)?;
    let request = Request::RemoveVolume { volume: entry.name.clone() };
    let removed = look_for_backing(registry, &entry).and_then(|()| {
        by_server_or_here(registry, &entry, request, |server| server.remove_volume(&entry.name))
    });
    let mut note = None;
    match removed {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::Busy => return Err(e),
        Err(e) if args.force => {
            note = Some(match remove_offline(registry, &entry)? {
                Ok(()) => {
                    "its backing was not there: writes to it that were still in the stage are discarded"
                        .into()
                }
                Err(other) if other.kind() == ErrorKind::NotFound => {
                    format!("the stage may still list the volume: {}", e.report())
                }
                Err(other) => format!("the stage still lists the volume: {}; {}", e.report(), other.report()),
            });
        }
        Err(e) => {
            return Err(Error::new(
                e.kind(),
                format!(
                    "{}; `tidegate delete --force {}` deletes it all the same, with what is staged for it",
                    e.report(),
                    args.name
                ),
            ));
        }
    }
    registry.remove(&args.name)?;
    let others = registry.entries()?.iter().any(|e| e.stage_uuid == entry.stage_uuid);
    if !others && !registry.stage_dir(entry.stage_uuid).is_supervised() {
        registry.stage_dir(entry.stage_uuid).remove();
    }
    if let Some(note) = note {
        let _ = writeln!(std::io::stderr(), "tidegate: note: {note}");
    }
    report::line(format!("deleted volume '{}'; its data stay on {}", args.name, entry.backing.display()))?;
    if !others {
        report::line(format!(
            "no volume uses the stage {} any more; remove it if you like",
            entry.stage.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether the backing is there, found out before the stage is opened, which writes to it. What has a server or a device is
/// refused for other reasons.
fn look_for_backing(registry: &Registry, entry: &Entry) -> Result<()> {
    let served = Client::connect(&registry.stage_dir(entry.stage_uuid)).is_some();
    if served || engine::device_of(entry.volume_uuid)?.is_some() {
        return Ok(());
    }
    FileDisk::open_to_look(&entry.backing).map(drop).map_err(|e| e.within("backing"))
}

/// Takes the volume off its stage without its backing. The outer error: not now.
fn remove_offline(registry: &Registry, entry: &Entry) -> Result<Result<()>> {
    let dir = registry.stage_dir(entry.stage_uuid);
    let busy = |what: String| Err(Error::new(ErrorKind::Busy, what));
    let Some(_lock) = dir.try_lock()? else {
        return busy(format!(
            "the stage of '{}' has a server, which cannot use the backing: detach its other volumes first",
            entry.name
        ));
    };
    if let Some((device_id, _)) = engine::device_of(entry.volume_uuid)?.filter(|(_, s)| *s != Status::Dead) {
        return busy(format!(
            "ublk device {device_id} of '{}' waits for a server: `tidegate detach --force {}` first",
            entry.name, entry.name
        ));
    }
    let opening = Opening { accept_loss: false, forget: Some(entry.volume_uuid) };
    match Server::open(registry, entry.stage_uuid, opening).and_then(|server| server.close(true)) {
        Err(e) if e.kind() == ErrorKind::Busy => Err(e),
        outcome => Ok(outcome),
    }
}
