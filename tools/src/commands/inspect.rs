//! `inspect`: decodes what is on a device or file. Looks only, also while a server runs.

use std::process::ExitCode;

use serde_json::json;
use tidegate_driver::base::{ErrorKind, Result};
use tidegate_driver::io::FileDisk;
use tidegate_driver::io::probe::probe;

use crate::cli::Inspect;
use crate::{engine, report};

/// `inspect`.
pub fn run(args: &Inspect) -> Result<ExitCode> {
    let disk = FileDisk::open_to_look(&args.path)?;
    let findings = probe(&disk)?;
    let structures = match engine::inspect(&disk, args.limit) {
        // Nothing of ours is an answer too.
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        decoded => decoded?,
    };
    if args.json {
        report::json(&json!({ "path": args.path, "findings": findings, "structures": structures }))?;
        return Ok(ExitCode::SUCCESS);
    }
    for finding in &findings {
        report::line(format!("{:>12}  {}", finding.offset, finding.name))?;
    }
    if structures.is_empty() {
        report::line(format!("{}: no Tidegate structure found", args.path.display()))?;
    }
    for structure in &structures {
        let valid = if structure.valid { "" } else { "  NOT VALID" };
        report::line(format!("{:>12}  {}{valid}", structure.offset, structure.kind))?;
        for (key, value) in &structure.fields {
            report::line(format!("{:14}{key}: {value}", ""))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
