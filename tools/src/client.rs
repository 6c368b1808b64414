//! The command's side of the control socket.

use std::fs::OpenOptions;
use std::io::BufReader;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tidegate_driver::base::{Error, ErrorKind, Result};

use crate::exit;
use crate::protocol::{self, Answer, AnswerEnvelope, Envelope, Reply, Request, ServerStatus};
use crate::registry::StageDir;

/// How long a server may take to answer a question about its state.
const STATUS_PATIENCE: Duration = Duration::from_secs(10);

/// A server that can be asked.
#[derive(Debug)]
pub struct Client {
    dir: StageDir,
}

/// Runs `f` with a short path to the socket, for socket paths are limited to 107 bytes and state directories are not.
fn with_socket_path<T>(dir: &StageDir, f: impl FnOnce(PathBuf) -> std::io::Result<T>) -> std::io::Result<T> {
    let open =
        OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir.path())?;
    f(PathBuf::from(format!("/proc/self/fd/{}/{}", open.as_raw_fd(), StageDir::SOCKET)))
}

/// Listens for commands. Whoever calls it holds the supervisor's lock, so a socket that is there is a dead one's.
pub fn listen(dir: &StageDir) -> Result<UnixListener> {
    let path = dir.path().join(StageDir::SOCKET);
    if let Err(e) = std::fs::remove_file(&path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        return Err(Error::io(format!("cannot remove the old socket {}", path.display()), e));
    }
    with_socket_path(dir, UnixListener::bind)
        .map_err(|e| Error::io(format!("cannot listen on {}", path.display()), e))
}

impl Client {
    /// The server of the stage of `dir`, if one answers.
    pub fn connect(dir: &StageDir) -> Option<Client> {
        with_socket_path(dir, UnixStream::connect).ok()?;
        Some(Client { dir: dir.clone() })
    }

    /// Asks, waits for the answer as long as it takes.
    pub fn ask(&self, request: Request) -> Result<Reply> {
        self.ask_within(request, None)
    }

    /// Asks; `None` if the server ended before it answered.
    pub fn ask_unless_gone(&self, request: Request) -> Option<Result<Reply>> {
        match self.exchange(request, None) {
            Ok(Answer::Ok(reply)) => Some(Ok(reply)),
            Ok(Answer::Error { kind, message }) => Some(Err(Error::new(exit::kind_named(&kind), message))),
            Err(_) => None,
        }
    }

    /// State of the server.
    pub fn status(&self) -> Result<ServerStatus> {
        match self.ask_within(Request::Status, Some(STATUS_PATIENCE))? {
            Reply::Status(status) => Ok(*status),
            other => Err(self.odd(&other)),
        }
    }

    /// Error for an answer that does not fit the question.
    pub fn odd(&self, reply: &Reply) -> Error {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "the server of {} gave an answer that does not fit: {reply:?}",
                self.dir.path().display()
            ),
        )
    }

    fn ask_within(&self, request: Request, patience: Option<Duration>) -> Result<Reply> {
        let answer = self.exchange(request, patience).map_err(|e| {
            let what = match e.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => "does not answer",
                _ => "ended before it answered",
            };
            Error::io(format!("the server {what}; see {}", self.dir.log_path().display()), e)
        })?;
        match answer {
            Answer::Ok(reply) => Ok(reply),
            Answer::Error { kind, message } => Err(Error::new(exit::kind_named(&kind), message)),
        }
    }

    fn exchange(&self, request: Request, patience: Option<Duration>) -> std::io::Result<Answer> {
        let mut stream = with_socket_path(&self.dir, UnixStream::connect)?;
        stream.set_read_timeout(patience)?;
        protocol::send(&mut stream, &Envelope { version: protocol::VERSION, request })?;
        let line = protocol::receive(&mut BufReader::new(stream))?
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
        Ok(serde_json::from_str::<AnswerEnvelope>(&line)?.answer)
    }
}
