//! `flush`: brings everything to the backings now.

use std::process::ExitCode;

use tidegate_driver::base::Result;

use super::by_server_or_here;
use crate::cli::Name;
use crate::protocol::Request;
use crate::registry::Registry;

/// `flush`.
pub fn run(registry: &Registry, args: &Name) -> Result<ExitCode> {
    let entry = registry.get(&args.name)?;
    by_server_or_here(registry, &entry, Request::Flush, |server| server.flush())?;
    Ok(ExitCode::SUCCESS)
}
