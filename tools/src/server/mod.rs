//! The process that serves a stage.
//!
//! ```text
//! attach ─> supervise ─> serve:  open stage, recover devices that wait, listen
//!                                 attach/detach/… on the socket, one at a time
//!                                 last detach: flush, close, end
//! ```
//!
//! A server that is killed leaves its devices waiting and its arena in memory; the next one, started by the supervisor or by
//! `attach`, takes both over. SIGTERM and SIGINT end it in order: devices that nobody uses are ended; others are left
//! waiting after everything accepted was brought to the backings. SIGHUP is ignored.

mod control;
mod devices;
pub mod gates;
mod namespace;
mod state;
pub mod supervise;

use std::fs::{File, OpenOptions};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::cli::Serve;
use crate::commands::attach::print_device;
use crate::registry::{Entry, Registry, StageDir};
use crate::signals::Signals;

pub use gates::GateConfig;
pub use state::{Opening, Server};

/// Largest log file kept; one older one is kept beside it.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// Opens the server's log for appending, moving an old large one aside.
pub fn open_log(dir: &StageDir) -> Result<File> {
    let path = dir.log_path();
    if std::fs::metadata(&path).is_ok_and(|m| m.len() > LOG_BYTES_MAX) {
        let _ = std::fs::rename(&path, path.with_extension("log.1"));
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Error::io(format!("cannot open the log {}", path.display()), e))
}

/// Sends events to standard error, which is the log file of a server in the background. One that cannot be written (full
/// file system, closed terminal) is lost: complaining about it, to the same place, would panic.
pub fn start_logging() {
    let filter = EnvFilter::try_from_env("TIDEGATE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails if it was started before, which is fine.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .try_init();
}

/// Notes why a start failed (`None`: it did not) for those who wait for it. That it cannot be noted changes nothing.
fn note_start_error(dir: &StageDir, error: Option<&Error>) {
    if let Err(e) = dir.put_start_error(error) {
        tracing::warn!("cannot note how the start went: {}", e.report());
    }
}

/// Makes this process a server of `stage`: opens it and takes its devices over. From then on clients depend on it, and
/// nothing that is only bookkeeping may end it.
fn open(registry: &Registry, stage: Uuid, accept_loss: bool, supervisor: Option<u32>) -> Result<Arc<Server>> {
    let noted = registry.stage_dir(stage).arena_dir();
    let arena_dir = crate::engine::arena_dir();
    let gates = gates::noted(&registry.stage_dir(stage));
    let folders = gates::folders(&gates);
    let needed: Vec<&Path> = [registry.dir(), &arena_dir]
        .into_iter()
        .chain(noted.as_deref())
        .chain(folders.iter().map(|folder| folder.as_path()))
        .collect();
    namespace::prepare(&needed);
    let mut server = Server::open(registry, stage, Opening { accept_loss, forget: None })?;
    server.set_supervisor(supervisor);
    let server = Arc::new(server);
    server.recover_devices()?;
    server.recover_gates(gates);
    server.note_runtime();
    Ok(server)
}

/// `serve`: started by the supervisor.
pub fn serve(registry: &Registry, args: &Serve) -> Result<ExitCode> {
    let signals = Signals::block()?;
    start_logging();
    let stage = args.stage.stage;
    let dir = registry.stage_dir(stage);
    let started = control::Ear::new(signals)
        .and_then(|ear| Ok((open(registry, stage, dir.take_accept_loss(), args.supervisor)?, ear)));
    note_start_error(&dir, started.as_ref().err());
    let (server, ear) = started.inspect_err(|e| tracing::error!("cannot start: {}", e.report()))?;
    Ok(control::run(&server, &ear))
}

/// Serves in this process until SIGTERM, SIGINT or the last detach. Devices that are left waiting then, in words.
pub fn foreground(
    registry: &Registry,
    entry: &Entry,
    accept_loss: bool,
    gate: Option<GateConfig>,
    json: bool,
) -> Result<Option<String>> {
    let dir = registry.stage_dir(entry.stage_uuid);
    let Some(_lock) = dir.try_lock()? else {
        return Err(Error::new(
            ErrorKind::Busy,
            format!(
                "the stage of volume '{}' has a server already: `tidegate attach {}` without --foreground uses it",
                entry.name, entry.name
            ),
        ));
    };
    let ear = control::Ear::new(Signals::block()?)?;
    start_logging();
    // While its socket can be reached: /run is among the mounts that are dropped.
    let systemd = systemd_socket();
    let server = open(registry, entry.stage_uuid, accept_loss, None)?;
    let is_bytes = gate.is_some();
    let attached = match gate {
        Some(gate) => server.attach_bytes(&entry.name, gate),
        None => server.attach(&entry.name),
    };
    let device = match attached {
        Ok(device) => device,
        Err(e) => {
            server.terminate();
            return Err(e);
        }
    };
    note_start_error(&dir, None);
    if let Err(e) = print_device(entry, &device, is_bytes, json) {
        // It is served all the same.
        tracing::warn!("{}", e.report());
    }
    tell_systemd(systemd.as_ref(), "READY=1");
    control::run(&server, &ear);
    Ok(server.left_behind())
}

/// A socket to systemd, if it started this process and wants to know how it does.
fn systemd_socket() -> Option<UnixDatagram> {
    let path = std::env::var_os("NOTIFY_SOCKET")?;
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let connected = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        Ok(socket)
    });
    connected.inspect_err(|e| tracing::warn!("cannot reach systemd at {}: {e}", path.display())).ok()
}

/// Tells systemd.
fn tell_systemd(socket: Option<&UnixDatagram>, state: &str) {
    if let Some(Err(e)) = socket.map(|socket| socket.send(state.as_bytes())) {
        tracing::warn!("cannot notify systemd: {e}");
    }
}
