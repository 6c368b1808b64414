//! The supervisor: starts the server again when it dies, and does nothing else, so that nothing can happen to it.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_ublk::Status;
use uuid::Uuid;

use crate::cli::StageArg;
use crate::engine;
use crate::registry::{Registry, StageDir};
use crate::signals::Signals;

/// Exit code of a supervisor that found another one.
pub const ALREADY: u8 = 75;
/// A server that dies sooner than this after its start died quickly.
const QUICK: Duration = Duration::from_secs(10);
/// So many quick deaths in a row are too many for a server that never served, with no device that waits for one.
const QUICK_MAX: u32 = 6;
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// `supervise`.
pub fn run(registry: &Registry, args: &StageArg) -> Result<ExitCode> {
    let dir = registry.stage_dir(args.stage);
    let Some(_lock) = dir.try_lock()? else { return Ok(ExitCode::from(ALREADY)) };
    let signals = Signals::block()?;
    super::start_logging();
    // Away from the terminal. Fails only for the leader of a process group: then somebody started it by hand.
    let _ = setsid();
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(
            "cannot set oom_score_adj to -1000: {e}; the kernel may kill the supervisor for memory"
        );
    }
    dir.put_start_error(None)?;
    let mut quick = 0;
    let mut served = false;
    let mut accept_loss = args.accept_loss;
    loop {
        let begun = Instant::now();
        let (pid, status, told_to_end) = run_server(registry, args, accept_loss, &signals)?;
        if status.success() || told_to_end {
            return Ok(ExitCode::SUCCESS);
        }
        let lived = begun.elapsed();
        // What cannot be looked at decides nothing.
        match dir.start_error().ok().flatten() {
            // It said why it cannot start; whoever waits for it reports that.
            Some(e) if !served => return Err(e),
            Some(_) => {}
            None => served |= lived >= QUICK || was_serving(&dir, pid),
        }
        // Loss is accepted once, not for every crash to come.
        accept_loss = false;
        quick = if lived < QUICK { quick + 1 } else { 1 };
        // Clients of a device wait for a server for as long as it takes.
        if quick > QUICK_MAX && !served && !device_waits(registry, args.stage) {
            let what = format!(
                "the server died {QUICK_MAX} times in a row ({status}): given up; find out why, then attach again"
            );
            let e = Error::new(ErrorKind::Io, what);
            tracing::error!("{}", e.report());
            dir.put_start_error(Some(&e))?;
            return Err(e);
        }
        let pause = pause_after(quick);
        tracing::error!(
            "the server died after {} s ({status}): starting another in {} ms",
            lived.as_secs(),
            pause.as_millis()
        );
        if wait(pause, &signals) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Whether the server `pid`, which died, had got as far as serving.
fn was_serving(dir: &StageDir, pid: u32) -> bool {
    dir.runtime().ok().flatten().is_some_and(|r| r.server_pid == pid)
}

fn device_waits(registry: &Registry, stage: Uuid) -> bool {
    let entries = registry.entries().unwrap_or_default();
    entries.iter().filter(|e| e.stage_uuid == stage).any(|e| {
        let device = engine::device_of(e.volume_uuid);
        // One that cannot be looked at may well be there.
        device.map_or(true, |found| found.is_some_and(|(_, status)| status != Status::Dead))
    })
}

/// How long to wait after so many quick deaths in a row.
fn pause_after(quick: u32) -> Duration {
    if quick <= 1 { Duration::ZERO } else { (BACKOFF_FIRST * 2u32.pow((quick - 1).min(10))).min(BACKOFF_MAX) }
}

/// Waits. Whether it was told to end.
fn wait(pause: Duration, signals: &Signals) -> bool {
    let until = Instant::now() + pause;
    loop {
        if let Some(Signal::SIGTERM | Signal::SIGINT) = signals.next() {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// Runs a server to its end. Its number, how it ended, and whether it was told to, by a signal to this
/// process.
fn run_server(
    registry: &Registry,
    args: &StageArg,
    accept_loss: bool,
    signals: &Signals,
) -> Result<(u32, ExitStatus, bool)> {
    let mut command = Command::new(crate::paths::own_executable());
    command.arg0("tidegate").arg("--state-dir").arg(registry.dir()).arg("serve").arg(args.stage.to_string());
    command.arg("--supervisor").arg(std::process::id().to_string());
    if accept_loss {
        command.arg("--accept-loss");
    }
    let mut child = command.spawn().map_err(|e| Error::io("cannot start the server", e))?;
    let number = child.id();
    let pid = Pid::from_raw(number.cast_signed());
    let (sender, ended) = mpsc::channel();
    // A process of its own is waited for at once; signals are looked for now and then.
    std::thread::spawn(move || {
        let _ = sender.send(child.wait());
    });
    let mut told_to_end = false;
    loop {
        match ended.recv_timeout(Duration::from_millis(200)) {
            Ok(status) => {
                let status = status.map_err(|e| Error::io("cannot wait for the server", e))?;
                return Ok((number, status, told_to_end));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::new(ErrorKind::Io, "cannot wait for the server"));
            }
        }
        if let Some(Signal::SIGTERM | Signal::SIGINT) = signals.next() {
            told_to_end = true;
            // The waiting thread has not reported its end, so the number is still its own (but for an instant).
            let _ = kill(pid, Signal::SIGTERM);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_half_a_minute() {
        assert_eq!(pause_after(1), Duration::ZERO);
        assert_eq!(pause_after(2), BACKOFF_FIRST * 2);
        assert!((2..40).all(|n| pause_after(n) <= pause_after(n + 1)));
        assert_eq!(pause_after(u32::MAX), BACKOFF_MAX);
    }
}
