//! `delete`: takes a volume off its stage and forgets its name. Files and devices are the user's and stay.

use std::fs::File;
use std::io::Write as _;
use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::volume_entry::VolumeInfo;
use tidegate_driver::io::FileDisk;
use tidegate_ublk::Status;

use super::{attach, by_server_or_here};
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
        Err(e) if args.force => note = Some(remove_by_force(registry, &entry, e)?),
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

/// Deletes a volume that cannot be removed because of `e`, if what it lacks is its own; what that means, for people. Nothing
/// is discarded for the sake of another error: that can be repaired, or is another volume's.
fn remove_by_force(registry: &Registry, entry: &Entry, e: Error) -> Result<String> {
    let volume = match listed(entry) {
        Ok(Some(volume)) => volume,
        Ok(None) => {
            refuse_if_served(registry, entry)?;
            return Ok("the stage did not list the volume: only its name was deleted".to_owned());
        }
        Err(lost) => {
            refuse_if_served(registry, entry)?;
            return Ok(format!("only the name was deleted, for the stage cannot be read: {}", lost.report()));
        }
    };
    let problem = FileDisk::open_to_look(&entry.backing)
        .map_err(|e| e.within("backing"))
        .and_then(|_| attach::refuse_other_backing(&entry.backing, entry.stage_uuid, &volume));
    let Err(problem) = problem else {
        return Err(
            e.within("nothing is deleted, for the backing is there and the writes staged for it are good")
        );
    };
    remove_offline(registry, entry)?;
    let why = problem.report();
    Ok(format!("writes for the volume that were still in the stage, if any, are discarded: {why}"))
}

/// The volume as its stage lists it.
fn listed(entry: &Entry) -> Result<Option<VolumeInfo>> {
    let superblock = engine::read_superblock(&FileDisk::open_to_look(&entry.stage)?)?.superblock;
    if superblock.stage_uuid != entry.stage_uuid {
        let what = format!("{} holds another stage, {}", entry.stage.display(), superblock.stage_uuid);
        return Err(Error::new(ErrorKind::WrongDevice, what));
    }
    Ok(superblock.volumes.into_iter().find(|v| v.uuid == entry.volume_uuid))
}

/// Refuses what has a server or a device that waits for one.
fn refuse_if_served(registry: &Registry, entry: &Entry) -> Result<File> {
    let dir = registry.stage_dir(entry.stage_uuid);
    let busy = |what: String| Err(Error::new(ErrorKind::Busy, what));
    let Some(lock) = dir.try_lock()? else {
        return busy(format!(
            "the stage of '{}' has a server or a supervisor, which lacks the stage or the backing: detach the other volumes \
             first; a supervisor without a device gives up by itself, within a minute",
            entry.name
        ));
    };
    if let Some((device_id, _)) = engine::device_of(entry.volume_uuid)?.filter(|(_, s)| *s != Status::Dead) {
        return busy(format!(
            "ublk device {device_id} of '{}' waits for a server: `tidegate detach --force {}` first",
            entry.name, entry.name
        ));
    }
    Ok(lock)
}

/// Takes the volume off its stage without its backing, with what is staged for it.
fn remove_offline(registry: &Registry, entry: &Entry) -> Result<()> {
    let _lock = refuse_if_served(registry, entry)?;
    let opening = Opening { accept_loss: false, forget: Some(entry.volume_uuid) };
    Server::open(registry, entry.stage_uuid, opening)?.close(true)
}
