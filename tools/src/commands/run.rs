//! `run`: one directory, one command, to try it out.

use std::fs::{self, DirBuilder};
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_ublk::Status;

use super::{attach, create};
use crate::cli::{Ack, Create, OnError, Run};
use crate::registry::{Entry, Registry};
use crate::size::Size;
use crate::{engine, server};

const SIZE_DEFAULT: Size = Size(1 << 30);
const STAGE_SIZE: Size = Size(256 << 20);

/// `run`.
pub fn run(registry: &Registry, args: &Run) -> Result<ExitCode> {
    // Before anything is made.
    attach::preflight()?;
    let made = !args.dir.exists();
    let entry = entry_of(registry, args).inspect_err(|_| {
        if made {
            // Only if it is empty, that is, if nothing but it was made.
            let _ = fs::remove_dir(&args.dir);
        }
    })?;
    match server::foreground(registry, &entry, false, None, false)? {
        None => Ok(ExitCode::SUCCESS),
        Some(left) => Err(Error::new(ErrorKind::Busy, left)),
    }
}

fn entry_of(registry: &Registry, args: &Run) -> Result<Entry> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&args.dir)
        .map_err(|e| Error::io(format!("cannot make the directory {}", args.dir.display()), e))?;
    let dir = fs::canonicalize(&args.dir)
        .map_err(|e| Error::io(format!("cannot use the directory {}", args.dir.display()), e))?;
    let (stage, backing) = (dir.join("stage"), dir.join("backing"));
    let known = registry.entries()?.into_iter().find(|e| e.stage == stage && e.backing == backing);
    if let Some(entry) = known.filter(|_| stage.exists() || backing.exists()) {
        if let Some(gone) = [&stage, &backing].into_iter().find(|path| !path.exists()) {
            let what = format!(
                "volume '{}' has lost {}: bring the file back, or `tidegate delete --force {}` and remove the other one",
                entry.name,
                gone.display(),
                entry.name
            );
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        if args.size.is_some() {
            let what = format!(
                "{} holds volume '{}' already: leave --size out, or use resize",
                dir.display(),
                entry.name
            );
            return Err(Error::new(ErrorKind::Exists, what));
        }
        return Ok(entry);
    }
    forget_cleared(registry, &stage, &backing)?;
    let name = free_name(registry, &dir)?;
    if stage.exists() && backing.exists() {
        // Made by a run under another state directory, perhaps under a name like that.
        return known_stage(registry, &dir, stage, backing);
    }
    let (entry, _) = create::create(registry, &new_volume(name, stage, backing, args.size))?;
    Ok(entry)
}

/// Forgets volumes whose files were both removed, as directories for temporary files are cleared.
fn forget_cleared(registry: &Registry, stage: &Path, backing: &Path) -> Result<()> {
    if stage.exists() || backing.exists() {
        return Ok(());
    }
    let _lock = registry.lock()?;
    for entry in registry.entries()?.iter().filter(|e| e.stage == stage && e.backing == backing) {
        if engine::device_of(entry.volume_uuid)?.is_some_and(|(_, status)| status != Status::Dead) {
            let what = format!(
                "the files of volume '{}' are gone while its device is there: `tidegate detach --force {}` first",
                entry.name, entry.name
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        registry.remove(&entry.name)?;
        let others = registry.entries()?.iter().any(|e| e.stage_uuid == entry.stage_uuid);
        let dir = registry.stage_dir(entry.stage_uuid);
        if !others && !dir.is_supervised() {
            dir.remove();
        }
        let _ = writeln!(
            std::io::stderr(),
            "tidegate: note: {} and {} of volume '{}' are gone, and its data with them: it is made anew, empty",
            stage.display(),
            backing.display(),
            entry.name
        );
    }
    Ok(())
}

fn known_stage(registry: &Registry, dir: &Path, stage: PathBuf, backing: PathBuf) -> Result<Entry> {
    let disk = tidegate_driver::io::FileDisk::open_to_look(&stage)?;
    let superblock =
        engine::read_superblock(&disk).map_err(|e| e.within(format!("{}", dir.display())))?.superblock;
    let [volume] = superblock.volumes.as_slice() else {
        let what = format!(
            "stage {} has {} volumes: attach them by name",
            stage.display(),
            superblock.volumes.len()
        );
        return Err(Error::new(ErrorKind::Invalid, what));
    };
    let _lock = registry.lock()?;
    if registry.find(&volume.name)?.is_some() {
        let what = format!(
            "the volume in {} is called '{}', and another one here is too",
            dir.display(),
            volume.name
        );
        return Err(Error::new(ErrorKind::Exists, what));
    }
    let entry = Entry::new(&volume.name, stage, superblock.stage_uuid, backing, volume.uuid);
    registry.put(&entry)?;
    Ok(entry)
}

fn new_volume(name: String, stage: PathBuf, backing: PathBuf, size: Option<Size>) -> Create {
    let size = if backing.exists() { size } else { Some(size.unwrap_or(SIZE_DEFAULT)) };
    Create {
        name,
        stage_size: (!stage.exists()).then_some(STAGE_SIZE),
        stage,
        backing,
        size,
        ack: Ack::Log,
        block_size: 4096,
        on_log_error: OnError::Stall,
        force: false,
        json: false,
    }
}

/// A name that is free, after the directory's.
fn free_name(registry: &Registry, dir: &Path) -> Result<String> {
    let raw = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut base: String = raw
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' })
        .take(48)
        .collect();
    if !base.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        base.insert_str(0, "run");
    }
    let numbered = (2..100).map(|n| format!("{base}-{n}"));
    for name in std::iter::once(base.clone()).chain(numbered) {
        if registry.find(&name)?.is_none() {
            return Ok(name);
        }
    }
    Err(Error::new(
        ErrorKind::Exists,
        format!("the names '{base}' to '{base}-99' are taken: use another directory name"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_were_cleared_away_are_made_anew_and_half_of_them_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let registry = Registry::new(&place.path().join("state")).unwrap();
        let args = Run { dir: place.path().join("try"), size: None };
        let first = entry_of(&registry, &args).unwrap();
        assert_eq!(entry_of(&registry, &args).unwrap(), first, "known");
        fs::remove_file(&first.backing).unwrap();
        let error = entry_of(&registry, &args).unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && error.report().contains("has lost"), "{error}");
        fs::remove_dir_all(&args.dir).unwrap();
        let second = entry_of(&registry, &args).unwrap();
        assert!(second.name == first.name && second.volume_uuid != first.volume_uuid);
        assert_eq!(registry.entries().unwrap(), [second]);
    }
}
