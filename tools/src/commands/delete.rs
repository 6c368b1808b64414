//! `delete`: takes a volume off its stage and forgets its name. Files and devices are the user's and stay.

use std::io::Write as _;
use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};

use super::by_server_or_here;
use crate::cli::Delete;
use crate::protocol::Request;
use crate::registry::Registry;
use crate::report;

/// `delete`.
pub fn run(registry: &Registry, args: &Delete) -> Result<ExitCode> {
    let _lock = registry.lock()?;
    let entry = registry.get(&args.name)?;
    let request = Request::RemoveVolume { volume: entry.name.clone() };
    let removed = by_server_or_here(registry, &entry, request, |server| server.remove_volume(&entry.name));
    let mut note = None;
    match removed {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::Busy => return Err(e),
        Err(e) if args.force => note = Some(format!("the stage still lists the volume: {}", e.report())),
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
