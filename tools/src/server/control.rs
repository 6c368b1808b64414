//! The server's ear: the control socket and the signals.

use std::io::BufReader;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use tidegate_driver::base::{Error, Result};
use tidegate_driver::bytes::gate::Access;

use super::Server;
use super::gates::GateConfig;
use crate::engine::NewVolume;
use crate::protocol::{self, Reply, Request, answer_of};
use crate::signals::Signals;

/// Commands that are served at the same time; further ones are turned away.
const CONNECTIONS_MAX: usize = 64;
/// How long a command may take to say what it wants.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// A server without a device ends after this: whoever started it did not come back.
const IDLE: Duration = Duration::from_secs(30);
const IDLE_LOOK_MS: u16 = 5000;
/// Pauses between attempts to take over devices that wait.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What a server listens with. Made before it takes a device over: afterwards nothing may go wrong any more.
pub struct Ear {
    signals: Signals,
    /// Written to by whoever has ended the server.
    end: Arc<UnixStream>,
    ended: UnixStream,
}

impl Ear {
    /// Ears for a server that ends by `signals`.
    pub fn new(signals: Signals) -> Result<Ear> {
        let (end, ended) =
            UnixStream::pair().map_err(|e| Error::io("cannot set up the server's control", e))?;
        Ok(Ear { signals, end: Arc::new(end), ended })
    }

    /// Waits for a signal, an end or a command: which of them there is.
    fn wait(&self, listener: Option<&UnixListener>) -> [bool; 3] {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ended.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(listener.map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN)));
        if let Err(e) = poll(&mut fds, PollTimeout::from(IDLE_LOOK_MS))
            && e != Errno::EINTR
        {
            // For want of memory: clients of the device do not depend on this.
            tracing::warn!("cannot wait for commands: {e}");
            std::thread::sleep(Duration::from_millis(100));
        }
        let is_ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any().unwrap_or(true));
        [is_ready(0), is_ready(1), is_ready(2)]
    }
}

/// Listens for commands. A server that cannot is no worse for the clients of its devices: it tries again now and then.
fn listen(server: &Server, is_known: &mut bool) -> Option<UnixListener> {
    let listener = crate::client::listen(&server.dir).and_then(|listener| {
        listener.set_nonblocking(true).map_err(|e| Error::io("cannot set up the control socket", e))?;
        Ok(listener)
    });
    match &listener {
        Err(e) if !std::mem::replace(is_known, true) => {
            tracing::warn!("serving without commands, which is tried again: {}", e.report());
        }
        _ => {}
    }
    listener.ok()
}

/// Serves until the last detach, a shutdown request, SIGTERM or SIGINT.
pub fn run(server: &Arc<Server>, ear: &Ear) -> ExitCode {
    let connections = Arc::new(AtomicUsize::new(0));
    let mut is_known = false;
    let mut listener = listen(server, &mut is_known);
    tracing::info!("serving, process {}", std::process::id());
    retry_in_thread(server);
    let mut idle_since = Instant::now();
    let mut told_to_end = false;
    loop {
        let [signalled, finished, called] = ear.wait(listener.as_ref());
        while let (true, Some(signal)) = (signalled, ear.signals.next()) {
            match signal {
                Signal::SIGHUP => tracing::info!("SIGHUP ignored"),
                other if std::mem::replace(&mut told_to_end, true) => {
                    tracing::info!("{other}: ending already")
                }
                other => {
                    tracing::info!("{other}: ending");
                    terminate_in_thread(server, &ear.end);
                }
            }
        }
        if finished {
            tracing::info!("ended in order");
            return ExitCode::SUCCESS;
        }
        server.forget_ended();
        if !server.is_idle() || server.is_ending() {
            idle_since = Instant::now();
        } else if idle_since.elapsed() > IDLE && server.end_if_idle() {
            tracing::info!("nothing to serve: ended");
            return ExitCode::SUCCESS;
        }
        if listener.is_none() {
            listener = listen(server, &mut is_known);
        } else if called && let Some(Ok((stream, _))) = listener.as_ref().map(UnixListener::accept) {
            answer_in_thread(server, stream, &ear.end, &connections);
        }
    }
}

/// Ends the server beside the commands, which learn that it is ending.
fn terminate_in_thread(server: &Arc<Server>, end: &Arc<UnixStream>) {
    // From now on commands other than `status` are turned away.
    server.begin_end();
    let work = {
        let (server, end) = (Arc::clone(server), Arc::clone(end));
        move || {
            server.terminate();
            finish(&end);
        }
    };
    if let Err(e) = std::thread::Builder::new().name("terminate".into()).spawn(work) {
        tracing::warn!("cannot start a thread for the end: {e}; no command is answered meanwhile");
        server.terminate();
        finish(end);
    }
}

/// Has the server's loop end.
fn finish(end: &UnixStream) {
    use std::io::Write;
    let mut end = end;
    if let Err(e) = end.write_all(&[1]) {
        tracing::error!("cannot end the server's loop: {e}");
    }
}

/// Goes on trying to take over the devices that could not be taken over at once, beside the commands.
fn retry_in_thread(server: &Arc<Server>) {
    if !server.has_waiting() {
        return;
    }
    let server = Arc::clone(server);
    let spawned = std::thread::Builder::new().name("recover".into()).spawn(move || {
        let mut pause = RETRY_FIRST;
        while server.has_waiting() {
            std::thread::sleep(pause);
            pause = (pause * 2).min(RETRY_MAX);
            server.retry_waiting();
        }
    });
    if let Err(e) = spawned {
        tracing::error!("cannot start a thread for the devices that wait: {e}; attach them again by command");
    }
}

fn answer_in_thread(
    server: &Arc<Server>,
    stream: UnixStream,
    end: &Arc<UnixStream>,
    connections: &Arc<AtomicUsize>,
) {
    if connections.load(Ordering::Acquire) >= CONNECTIONS_MAX {
        tracing::warn!("too many commands at once: one turned away");
        return;
    }
    connections.fetch_add(1, Ordering::AcqRel);
    let (server, end, count) = (Arc::clone(server), Arc::clone(end), Arc::clone(connections));
    let spawned = std::thread::Builder::new().name("control".into()).spawn(move || {
        if let Err(e) = answer(&server, stream, &end) {
            tracing::debug!("a command went away: {e}");
        }
        count.fetch_sub(1, Ordering::AcqRel);
    });
    if let Err(e) = spawned {
        connections.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!("cannot start a thread for a command: {e}");
    }
}

/// Answers one request. A server that is ending hangs up, which tells the command to start another.
fn answer(server: &Server, stream: UnixStream, end: &UnixStream) -> std::io::Result<()> {
    // Accepted sockets do not inherit the listener's mode.
    stream.set_read_timeout(Some(REQUEST_PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let Some(line) = protocol::receive(&mut reader)? else { return Ok(()) };
    let request = match protocol::parse_request(&line) {
        Ok(request) => request,
        Err(e) => return protocol::send(&mut &stream, &answer_of(Err(e))),
    };
    if server.is_ending() && request != Request::Status {
        return Ok(());
    }
    let ends = matches!(
        request,
        Request::Attach { .. } | Request::AttachBytes { .. } | Request::Detach { .. } | Request::Shutdown
    );
    let outcome = carry_out(server, request);
    // Without a device there is nothing to serve: after the last detach, after a first attach that failed.
    let ended = ends && server.end_if_idle();
    if Server::came_too_late(&outcome) {
        return Ok(());
    }
    let sent = protocol::send(&mut &stream, &answer_of(outcome));
    if ended {
        finish(end);
    }
    sent
}

fn carry_out(server: &Server, request: Request) -> Result<Reply> {
    match request {
        Request::Status => Ok(Reply::Status(Box::new(server.status()))),
        Request::Attach { volume } => server.attach(&volume).map(Reply::Device),
        Request::AttachBytes { volume, path, users, groups } => {
            let config = GateConfig { path, access: Access { users, groups } };
            server.attach_bytes(&volume, config).map(Reply::Device)
        }
        Request::Detach { volume, flush, force } => {
            server.detach(&volume, flush, force).map(|()| Reply::Done)
        }
        Request::AddVolume { name, backing, size_bytes, block_bytes, ack, on_log_error } => {
            let new = NewVolume { name, size_bytes, block_bytes, ack, on_log_error, backing };
            server.add_volume(new).map(Reply::Volume)
        }
        Request::RemoveVolume { volume } => server.remove_volume(&volume).map(|()| Reply::Done),
        Request::Resize { volume, size_bytes } => server.resize(&volume, size_bytes).map(|()| Reply::Done),
        Request::Flush => server.flush().map(|()| Reply::Done),
        Request::Shutdown => {
            server.terminate();
            Ok(Reply::Done)
        }
    }
}
