//! `resize`: another size, online if the kernel can.

use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::io::FileDisk;

use super::by_server_or_here;
use crate::cli::Resize;
use crate::protocol::Request;
use crate::registry::{Entry, Registry};
use crate::size::human;
use crate::{engine, report};

/// `resize`.
pub fn run(registry: &Registry, args: &Resize) -> Result<ExitCode> {
    let entry = registry.get(&args.name)?;
    let bytes = args.size.0;
    check_size(&entry, bytes)?;
    let request = Request::Resize { volume: entry.name.clone(), size_bytes: bytes };
    by_server_or_here(registry, &entry, request, |server| server.resize(&entry.name, bytes))?;
    report::note(format!("volume '{}' has {}", args.name, human(bytes)));
    Ok(ExitCode::SUCCESS)
}

/// Refuses what cannot be before a stage is opened, which writes to it.
fn check_size(entry: &Entry, bytes: u64) -> Result<()> {
    let superblock = engine::read_superblock(&FileDisk::open_to_look(&entry.stage)?)?.superblock;
    let Some(mut volume) = superblock.volumes.into_iter().find(|v| v.uuid == entry.volume_uuid) else {
        let what = format!("stage {} has no volume '{}'", entry.stage.display(), entry.name);
        return Err(Error::new(ErrorKind::NotFound, what));
    };
    let old = std::mem::replace(&mut volume.size_bytes, bytes);
    volume.validate()?;
    if bytes < old {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "volume '{}' has {old} bytes and cannot shrink to {bytes}: make a smaller one and copy",
                entry.name
            ),
        ));
    }
    Ok(())
}
