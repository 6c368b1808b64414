//! `detach`: ends the device, flushes the stage.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_ublk::Status;

use super::attach;
use crate::cli::Detach;
use crate::client::Client;
use crate::protocol::{Reply, Request};
use crate::registry::{Entry, Registry, StageDir};
use crate::report::{self, Progress};
use crate::size::human;
use crate::{engine, links};

/// How long the end of a server that has answered is waited for.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// `detach`.
pub fn run(registry: &Registry, args: &Detach) -> Result<ExitCode> {
    let entry = registry.get(&args.name)?;
    let dir = registry.stage_dir(entry.stage_uuid);
    let request = Request::Detach { volume: entry.name.clone(), flush: !args.no_flush, force: args.force };
    if Client::connect(&dir).is_none() && !has_device(registry, &entry)? && !(args.force && exists(&entry)?) {
        return Err(not_attached(&entry.name));
    }
    let done = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| show_progress(registry, &entry, &done));
        // A device whose server died is ended by a new one, which knows what is still to be flushed.
        let outcome = attach::ask_or_start(registry, &entry, &request);
        done.store(true, Ordering::Release);
        outcome
    });
    let outcome = match outcome {
        Err(e) if args.force => {
            end_without_server(&dir, &entry, e)?;
            return Ok(ExitCode::SUCCESS);
        }
        outcome => outcome,
    };
    match outcome? {
        Reply::Done => {}
        other => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the server gave an answer that does not fit: {other:?}"),
            ));
        }
    }
    wait_for_end(&dir)?;
    report::note(format!("detached '{}'", args.name));
    Ok(ExitCode::SUCCESS)
}

/// The last detach ends the server. Devices and files are free for others only when its process is gone.
fn wait_for_end(dir: &StageDir) -> Result<()> {
    let deadline = Instant::now() + END_PATIENCE;
    while Instant::now() < deadline {
        let Some(runtime) = dir.runtime()?.filter(|r| r.ended) else { break };
        if !Path::new("/proc").join(runtime.server_pid.to_string()).exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Error for a volume without a device.
pub fn not_attached(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("volume '{name}' is not attached: nothing to detach"))
}

/// Whether a device of the volume waits for a server.
fn has_device(registry: &Registry, entry: &Entry) -> Result<bool> {
    let runtime = registry.stage_dir(entry.stage_uuid).runtime()?;
    Ok(runtime.is_some_and(|r| {
        r.devices.iter().any(|d| d.volume_uuid == entry.volume_uuid)
            || r.gates.iter().any(|g| g.volume_uuid == entry.volume_uuid)
    }))
}

fn exists(entry: &Entry) -> Result<bool> {
    Ok(engine::device_of(entry.volume_uuid)?.is_some_and(|(_, status)| status != Status::Dead))
}

/// Ends a device that waits for a server which cannot be started because of `problem`.
fn end_without_server(dir: &StageDir, entry: &Entry, problem: Error) -> Result<()> {
    // A server that is there has decided. A supervisor alone may be at its next attempt: that finds the device gone.
    if Client::connect(dir).is_some() {
        return Err(problem);
    }
    let device = engine::device_of(entry.volume_uuid)?;
    let runtime = dir.runtime()?;
    let is_gate =
        runtime.as_ref().is_some_and(|r| r.gates.iter().any(|g| g.volume_uuid == entry.volume_uuid));
    match device {
        Some((device_id, _)) => {
            tidegate_ublk::delete(device_id)?;
            links::remove(&entry.name, device_id);
        }
        None if is_gate => {}
        None => return Err(problem),
    }
    if let Some(mut runtime) = runtime {
        runtime.devices.retain(|d| d.volume_uuid != entry.volume_uuid);
        runtime.gates.retain(|g| g.volume_uuid != entry.volume_uuid);
        dir.put_runtime(&runtime)?;
    }
    let _ = writeln!(
        std::io::stderr(),
        "tidegate: note: the device of '{}' is ended; what is staged stays in the stage, which has a problem: {}",
        entry.name,
        problem.report()
    );
    Ok(())
}

fn show_progress(registry: &Registry, entry: &Entry, done: &AtomicBool) {
    let dir = registry.stage_dir(entry.stage_uuid);
    let mut progress = Progress::new();
    let mut rounds = 0;
    while !done.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(50));
        rounds += 1;
        if rounds % 10 == 0
            && progress.is_visible()
            && let Some(status) = Client::connect(&dir).and_then(|c| c.status().ok())
        {
            progress.show(&format!(
                "flushing '{}': {} in the stage",
                entry.name,
                human(status.stage.used_bytes)
            ));
        }
    }
}
