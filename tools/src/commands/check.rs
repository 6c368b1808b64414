//! `check`: offline verification. Exit codes of its own: 0 clean, 1 damage found, 2 could not check.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::io::file::{Access, Lock};
use tidegate_driver::io::{Disk, FileDisk};

use crate::cli::Check;
use crate::registry::Registry;
use crate::{engine, exit, report};

const LOCK_WAIT: Duration = Duration::from_millis(500);

/// `check`.
pub fn run(registry: &Registry, args: &Check) -> Result<ExitCode> {
    Ok(ExitCode::from(match check(registry, args) {
        Ok(code) => code,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "tidegate: could not check: {}", e.report());
            // What cannot be read as a stage any more but was one is damage, not a failure to look.
            if e.kind() == ErrorKind::Damaged { exit::CHECK_DAMAGE } else { exit::CHECK_FAILED }
        }
    }))
}

fn open(path: &Path) -> Result<FileDisk> {
    FileDisk::open(path, Access::Read, Lock::Shared(LOCK_WAIT)).map_err(|e| match e.kind() {
        ErrorKind::Busy => {
            Error::new(ErrorKind::Busy, format!("{}; detach the volumes of the stage first", e.report()))
        }
        _ => e,
    })
}

fn check(registry: &Registry, args: &Check) -> Result<u8> {
    let path = match (&args.target.name, &args.target.stage) {
        (Some(name), _) => registry.get(name)?.stage,
        (None, Some(path)) => path.clone(),
        (None, None) => return Err(Error::new(ErrorKind::Invalid, "name a volume or a stage")),
    };
    let stage = open(&path)?;
    let superblock = engine::read_superblock(&stage)?.superblock;
    let entries = registry.entries().unwrap_or_default();
    let mut backings = Vec::new();
    let mut unchecked = Vec::new();
    for volume in &superblock.volumes {
        let entry = entries.iter().find(|e| e.volume_uuid == volume.uuid);
        let backing = entry.map_or_else(|| PathBuf::from(&volume.backing), |e| e.backing.clone());
        match open(&backing) {
            Ok(disk) => backings.push((volume.id, disk)),
            Err(e) => {
                unchecked.push(format!("backing of volume '{}' not checked: {}", volume.name, e.report()))
            }
        }
    }
    let disks: BTreeMap<VolumeId, &dyn Disk> =
        backings.iter().map(|(id, disk)| (*id, disk as &dyn Disk)).collect();
    let found = engine::check(&stage, &disks)?;
    let code = match (found.problems.is_empty(), unchecked.is_empty()) {
        (false, _) => exit::CHECK_DAMAGE,
        (true, false) => exit::CHECK_FAILED,
        (true, true) => exit::OK,
    };
    if args.json {
        let result = ["clean", "damaged", "not-checked"][usize::from(code)];
        report::json(&json!({
            "stage": path,
            "stage_uuid": superblock.stage_uuid,
            "result": result,
            "unchecked": unchecked,
            "report": found,
        }))?;
        return Ok(code);
    }
    for problem in &found.problems {
        report::line(engine::describe(problem))?;
    }
    for note in &found.notes {
        report::line(format!("note: {note}"))?;
    }
    for what in &unchecked {
        let _ = writeln!(std::io::stderr(), "tidegate: {what}");
    }
    report::line(match code {
        exit::OK => format!("{}: clean", path.display()),
        exit::CHECK_DAMAGE => {
            format!(
                "{}: {} problems found; nothing was changed",
                path.display(),
                found.problems.len() as u64 + found.problems_not_listed
            )
        }
        _ => format!("{}: no damage found, but not everything could be checked", path.display()),
    })?;
    Ok(code)
}
