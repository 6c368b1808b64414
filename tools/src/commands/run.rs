//! `run`: one directory, one command, to try it out.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};

use super::{attach, create};
use crate::cli::{Ack, Create, OnError, Run};
use crate::registry::{Entry, Registry};
use crate::server;
use crate::size::Size;

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
    server::foreground(registry, &entry, false, false)
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
    if let Some(entry) = registry.entries()?.into_iter().find(|e| e.stage == stage && e.backing == backing) {
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
    let name = free_name(registry, &dir)?;
    if stage.exists() && backing.exists() {
        // Made by a run under another state directory, perhaps under a name like that.
        return known_stage(registry, &dir, stage, backing);
    }
    let (entry, _) = create::create(registry, &new_volume(name, stage, backing, args.size))?;
    Ok(entry)
}

fn known_stage(registry: &Registry, dir: &Path, stage: PathBuf, backing: PathBuf) -> Result<Entry> {
    let disk = tidegate_driver::io::FileDisk::open_to_look(&stage)?;
    let superblock =
        crate::engine::read_superblock(&disk).map_err(|e| e.within(format!("{}", dir.display())))?.superblock;
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
