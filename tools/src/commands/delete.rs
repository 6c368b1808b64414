//! `delete`: takes a volume off its stage and forgets its name. Files and devices are the user's and stay.

use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::label::{LABEL_BYTES, LABEL_SLOTS, label_offset};
use tidegate_driver::io::{Disk, FileDisk};

use super::by_server_or_here;
use crate::cli::Delete;
use crate::protocol::Request;
use crate::registry::{Entry, Registry};
use crate::{engine, report};

/// `delete`.
pub fn run(registry: &Registry, args: &Delete) -> Result<ExitCode> {
    let _lock = registry.lock()?;
    let entry = registry.get(&args.name)?;
    let request = Request::RemoveVolume { volume: entry.name.clone() };
    let volume_bytes = size_on_stage(&entry);
    let removed = by_server_or_here(registry, &entry, request, |server| server.remove_volume(&entry.name));
    let mut notes = Vec::new();
    match removed {
        Ok(()) => {
            let wiped = volume_bytes.map(|bytes| wipe_label(&entry, bytes));
            notes.extend(
                wiped
                    .and_then(Result::err)
                    .map(|e| format!("its label stays on the backing: {}", e.report())),
            );
        }
        Err(e) if e.kind() == ErrorKind::Busy => return Err(e),
        Err(e) if args.force => notes.push(format!("the stage still lists the volume: {}", e.report())),
        Err(e) => {
            return Err(Error::new(
                e.kind(),
                format!(
                    "{}; `tidegate delete --force {}` forgets the name all the same",
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
    for note in notes {
        eprintln!("tidegate: note: {note}");
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

/// Size of the volume as its stage has it; `None` if it is not there or cannot be read.
fn size_on_stage(entry: &Entry) -> Option<u64> {
    let disk = FileDisk::open_to_look(&entry.stage).ok()?;
    let superblock = engine::read_superblock(&disk).ok()?.superblock;
    superblock.volumes.iter().find(|v| v.uuid == entry.volume_uuid).map(|v| v.size_bytes)
}

/// Makes the backing an ordinary device again, if the label on it is this volume's.
fn wipe_label(entry: &Entry, volume_bytes: u64) -> Result<()> {
    let disk = FileDisk::open_exclusive(&entry.backing)?;
    if engine::read_label(&disk, volume_bytes)?.is_none_or(|label| label.volume_uuid != entry.volume_uuid) {
        return Ok(());
    }
    for slot in 0..LABEL_SLOTS {
        disk.write(label_offset(volume_bytes, slot), &[0; LABEL_BYTES as usize])?;
    }
    disk.sync()
}
