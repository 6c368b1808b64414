//! The supervisor: starts the server again when it dies, and does nothing else, so that nothing can happen to it.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, ExitStatus};
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
/// So many quick deaths in a row are too many where no device waits for a server.
const QUICK_MAX: u32 = 6;
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How often a server is looked at whose end was not signalled.
const LOOK: Duration = Duration::from_secs(1);

/// How a server ended.
struct End {
    /// Its process id, if it was started at all.
    pid: Option<u32>,
    /// It ended in order, or was told to end.
    in_order: bool,
    /// In words.
    how: String,
}

/// `supervise`.
pub fn run(registry: &Registry, args: &StageArg) -> Result<ExitCode> {
    let dir = registry.stage_dir(args.stage);
    let Some(_lock) = dir.try_lock()? else { return Ok(ExitCode::from(ALREADY)) };
    let signals = Signals::block_also(&[Signal::SIGCHLD])?;
    super::start_logging();
    // Away from the terminal. Fails only for the leader of a process group: then somebody started it by hand.
    let _ = setsid();
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(
            "cannot set oom_score_adj to -1000: {e}; the kernel may kill the supervisor for memory"
        );
    }
    super::note_start_error(&dir, None);
    let mut quick = 0;
    let mut served = false;
    loop {
        let begun = Instant::now();
        let end = run_server(registry, args, &signals);
        if end.in_order {
            return Ok(ExitCode::SUCCESS);
        }
        let lived = begun.elapsed();
        // What cannot be looked at decides nothing.
        let start_error = dir.start_error().ok().flatten();
        match &start_error {
            // It said why it cannot start; whoever waits for it reports that.
            Some(_) if !served => return start_error.map_or(Ok(ExitCode::FAILURE), Err),
            Some(_) => {}
            None => served |= end.pid.is_some_and(|pid| lived >= QUICK || was_serving(&dir, pid)),
        }
        // One that could not start has not lived, however long it took to find out.
        quick = if lived < QUICK || start_error.is_some() { quick + 1 } else { 1 };
        // Clients of a device wait for a server for as long as it takes.
        if quick > QUICK_MAX && !device_waits(registry, args.stage) {
            let how = &end.how;
            let e = start_error.unwrap_or_else(|| {
                let what = format!(
                    "the server died {QUICK_MAX} times in a row ({how}): given up; find out why, then attach again"
                );
                Error::new(ErrorKind::Io, what)
            });
            tracing::error!("given up, no device waits: {}", e.report());
            super::note_start_error(&dir, Some(&e));
            return Err(e);
        }
        let pause = pause_after(quick);
        tracing::error!(
            "the server died after {} s ({}): starting another in {} ms",
            lived.as_secs(),
            end.how,
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
    // What cannot be read or looked at may well be there.
    let Ok(entries) = registry.entries() else { return true };
    if !super::gates::noted(&registry.stage_dir(stage)).is_empty() {
        return true;
    }
    entries.iter().filter(|e| e.stage_uuid == stage).any(|e| {
        let device = engine::device_of(e.volume_uuid);
        device.map_or(true, |found| found.is_some_and(|(_, status)| status != Status::Dead))
    })
}

/// How long to wait after so many quick deaths in a row.
fn pause_after(quick: u32) -> Duration {
    if quick <= 1 { Duration::ZERO } else { (BACKOFF_FIRST * 2u32.pow((quick - 1).min(10))).min(BACKOFF_MAX) }
}

/// Whether a signal has come that tells to end.
fn told_to_end(signals: &Signals) -> bool {
    while let Some(signal) = signals.next() {
        if matches!(signal, Signal::SIGTERM | Signal::SIGINT) {
            return true;
        }
    }
    false
}

/// Waits. Whether it was told to end.
fn wait(pause: Duration, signals: &Signals) -> bool {
    let until = Instant::now() + pause;
    loop {
        if told_to_end(signals) {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        signals.wait(left);
    }
}

/// Runs a server to its end. One that cannot even be started, for want of memory or processes, has died at once: that may
/// pass, and clients wait.
fn run_server(registry: &Registry, args: &StageArg, signals: &Signals) -> End {
    let mut command = Command::new(crate::paths::own_executable());
    command.arg0("tidegate").arg("--state-dir").arg(registry.dir()).arg("serve").arg(args.stage.to_string());
    command.arg("--supervisor").arg(std::process::id().to_string());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return End { pid: None, in_order: false, how: format!("it cannot be started: {e}") },
    };
    let mut told = false;
    loop {
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return ended(child.id(), status, told),
            // There is no such child any more: somebody has taken its status.
            Err(e) => {
                return End {
                    pid: Some(child.id()),
                    in_order: told,
                    how: format!("it cannot be waited for: {e}"),
                };
            }
        }
        signals.wait(LOOK);
        if told_to_end(signals) {
            told = true;
            // It was not waited for, so the number is still its own.
            let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
        }
    }
}

fn ended(pid: u32, status: ExitStatus, told: bool) -> End {
    End { pid: Some(pid), in_order: told || status.success(), how: status.to_string() }
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
