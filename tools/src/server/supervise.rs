//! The supervisor: starts the server again when it dies, and does nothing else, so that nothing can happen to it.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};
use tidegate_driver::base::{Error, ErrorKind, Result};

use crate::cli::StageArg;
use crate::registry::Registry;
use crate::signals::Signals;

/// Exit code of a supervisor that found another one.
pub const ALREADY: u8 = 75;
/// A server that dies sooner than this after its start died quickly.
const QUICK: Duration = Duration::from_secs(10);
/// So many quick deaths in a row are too many.
const QUICK_MAX: u32 = 6;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);

/// `supervise`.
pub fn run(registry: &Registry, args: &StageArg) -> Result<ExitCode> {
    let dir = registry.stage_dir(args.stage);
    let Some(_lock) = dir.try_lock()? else { return Ok(ExitCode::from(ALREADY)) };
    let signals = Signals::block()?;
    super::start_logging();
    // Away from the terminal. Fails only for the leader of a process group: then somebody started it by hand.
    let _ = setsid();
    dir.put_start_error(None)?;
    let mut quick = 0;
    let mut served = false;
    let mut accept_loss = args.accept_loss;
    loop {
        let begun = Instant::now();
        let (status, told_to_end) = run_server(registry, args, accept_loss, &signals)?;
        if status.success() || told_to_end {
            return Ok(ExitCode::SUCCESS);
        }
        let lived = begun.elapsed();
        match dir.start_error()? {
            // It said why it cannot start; whoever waits for it reports that.
            Some(e) if !served => return Err(e),
            Some(_) => {}
            None => served = true,
        }
        // Loss is accepted once, not for every crash to come.
        accept_loss = false;
        quick = if lived < QUICK { quick + 1 } else { 1 };
        if quick > QUICK_MAX {
            let what = format!(
                "the server died {QUICK_MAX} times in a row ({status}): given up; find out why, then attach again"
            );
            let e = Error::new(ErrorKind::Io, what);
            tracing::error!("{}", e.report());
            dir.put_start_error(Some(&e))?;
            return Err(e);
        }
        let pause = if quick == 1 { Duration::ZERO } else { BACKOFF_FIRST * 2u32.pow(quick) };
        tracing::error!(
            "the server died after {} s ({status}): starting another in {} ms",
            lived.as_secs(),
            pause.as_millis()
        );
        std::thread::sleep(pause);
    }
}

/// Runs a server to its end. Whether it was told to end, by a signal to this process.
fn run_server(
    registry: &Registry,
    args: &StageArg,
    accept_loss: bool,
    signals: &Signals,
) -> Result<(ExitStatus, bool)> {
    let mut command = Command::new(crate::paths::own_executable());
    command.arg0("tidegate").arg("--state-dir").arg(registry.dir()).arg("serve").arg(args.stage.to_string());
    command.arg("--supervisor").arg(std::process::id().to_string());
    if accept_loss {
        command.arg("--accept-loss");
    }
    let mut child = command.spawn().map_err(|e| Error::io("cannot start the server", e))?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let (sender, ended) = mpsc::channel();
    // A process of its own is waited for at once; signals are looked for now and then.
    std::thread::spawn(move || {
        let _ = sender.send(child.wait());
    });
    let mut told_to_end = false;
    loop {
        match ended.recv_timeout(Duration::from_millis(200)) {
            Ok(status) => {
                return Ok((status.map_err(|e| Error::io("cannot wait for the server", e))?, told_to_end));
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
