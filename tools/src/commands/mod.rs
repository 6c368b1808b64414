//! One file per command.

pub mod attach;
pub mod check;
pub mod create;
pub mod delete;
pub mod detach;
pub mod flush;
pub mod inspect;
pub mod resize;
pub mod run;
pub mod status;

use std::process::ExitCode;

use clap::CommandFactory;
use tidegate_driver::base::{Error, ErrorKind, Result};

use crate::client::Client;
use crate::protocol::{Reply, Request};
use crate::registry::{Entry, Registry};
use crate::server::{Opening, Server};

/// `completion`.
pub fn completion(shell: clap_complete::Shell) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut crate::cli::Cli::command(), "tidegate", &mut text);
    crate::report::print(&String::from_utf8_lossy(&text))?;
    Ok(ExitCode::SUCCESS)
}

/// Has the server of the stage do `request`, or does it here if there is no server.
fn by_server_or_here(
    registry: &Registry,
    entry: &Entry,
    request: Request,
    here: impl FnOnce(&Server) -> Result<()>,
) -> Result<()> {
    let dir = registry.stage_dir(entry.stage_uuid);
    if let Some(client) = Client::connect(&dir) {
        return match client.ask(request)? {
            Reply::Done => Ok(()),
            other => Err(client.odd(&other)),
        };
    }
    let Some(_lock) = dir.try_lock()? else {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("the server of volume '{}' is starting or ending: try again in a moment", entry.name),
        ));
    };
    let server = Server::open(registry, entry.stage_uuid, Opening::default())?;
    let outcome = match server.waiting_device() {
        Err(e) => Err(e),
        Ok(Some(volume)) => Err(Error::new(
            ErrorKind::Busy,
            format!("the device of volume '{volume}' waits for a server: `tidegate attach {volume}` first"),
        )),
        Ok(None) => here(&server),
    };
    server.close(true).and(outcome)
}
