//! The `tidegate` command and its server.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`commands`] | one file per command |
//! | [`registry`] | the state directory |
//! | [`server`] | the process that serves a stage, and its supervisor |
//! | [`client`], [`protocol`] | how they talk |
//! | [`engine`] | the one place that meets the engine |
//! | [`report`] | what people and scripts see |
//! | [`links`] | stable names of devices |
//! | [`stacking`] | what lies on what |
//! | [`exit`] | exit codes |

mod cli;
mod client;
mod commands;
mod engine;
mod exit;
mod links;
mod paths;
mod protocol;
mod registry;
mod report;
mod server;
mod signals;
mod size;
mod stacking;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};
use registry::Registry;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let run = || {
        let registry = Registry::new(&cli.state_dir)?;
        match &cli.command {
            Command::Create(args) => commands::create::run(&registry, args),
            Command::Attach(args) => commands::attach::run(&registry, args),
            Command::Detach(args) => commands::detach::run(&registry, args),
            Command::Status(args) => commands::status::run(&registry, args),
            Command::Check(args) => commands::check::run(&registry, args),
            Command::Inspect(args) => commands::inspect::run(args),
            Command::Run(args) => commands::run::run(&registry, args),
            Command::Delete(args) => commands::delete::run(&registry, args),
            Command::Resize(args) => commands::resize::run(&registry, args),
            Command::Flush(args) => commands::flush::run(&registry, args),
            Command::Serve(args) => server::serve(&registry, args),
            Command::Supervise(args) => server::supervise::run(&registry, args),
            Command::LinkOf { device } => links::run(&registry, device),
            Command::Completion { shell } => commands::completion(*shell),
        }
    };
    run().unwrap_or_else(|e| exit::report(&e))
}
