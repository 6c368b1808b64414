//! `resize`: another size, online if the kernel can.

use std::process::ExitCode;

use tidegate_driver::base::Result;

use super::by_server_or_here;
use crate::cli::Resize;
use crate::protocol::Request;
use crate::registry::Registry;
use crate::report;
use crate::size::human;

/// `resize`.
pub fn run(registry: &Registry, args: &Resize) -> Result<ExitCode> {
    let entry = registry.get(&args.name)?;
    let bytes = args.size.0;
    let request = Request::Resize { volume: entry.name.clone(), size_bytes: bytes, shrink: args.shrink };
    by_server_or_here(registry, &entry, request, |server| server.resize(&entry.name, bytes, args.shrink))?;
    report::note(format!("volume '{}' has {}", args.name, human(bytes)));
    Ok(ExitCode::SUCCESS)
}
