//! The control protocol: one JSON object per line each way, over the stage's unix socket.
//!
//! `{"version":1,"request":{"attach":{"volume":"db"}}}` → `{"version":1,"ok":{…}}` or
//! `{"version":1,"error":{"kind":"busy","message":"…"}}`. A server answers a version it does not know with an error; fields
//! it does not know are ignored, so that a newer command can talk to an older server as far as they understand each
//! other.

use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::volume::status::{RecoveryReport, StageStatus};

use crate::exit;

/// Version of the protocol.
pub const VERSION: u32 = 1;
/// Longest line either side accepts.
const LINE_BYTES_MAX: u64 = 4 << 20;

/// A request with its version.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope {
    /// Version of the protocol.
    pub version: u32,
    /// The request.
    pub request: Request,
}

/// What a server is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// How the stage and its devices are.
    Status,
    /// Make the device of a volume.
    Attach {
        /// Name.
        volume: String,
    },
    /// Make a volume a byte device.
    AttachBytes {
        /// Name.
        volume: String,
        /// Where its socket is to be.
        path: std::path::PathBuf,
        /// Users that may use it besides root and the server's own.
        users: Vec<u32>,
        /// Groups that may use it.
        groups: Vec<u32>,
    },
    /// End the device of a volume.
    Detach {
        /// Name.
        volume: String,
        /// Flush the stage afterwards.
        flush: bool,
        /// Also under whoever uses it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
    },
    /// Add a volume to the stage. Everything was checked by the command, the backing is not locked.
    AddVolume {
        /// Name.
        name: String,
        /// Path of the backing.
        backing: String,
        /// Size.
        size_bytes: u64,
        /// Logical block.
        block_bytes: u32,
        /// Ack level.
        ack: tidegate_driver::format::volume_entry::AckLevel,
        /// Policy on log errors.
        on_log_error: tidegate_driver::format::volume_entry::OnLogError,
    },
    /// Remove a volume, which must be detached, from the stage.
    RemoveVolume {
        /// Name.
        volume: String,
    },
    /// Change the size of a volume.
    Resize {
        /// Name.
        volume: String,
        /// New size.
        size_bytes: u64,
    },
    /// Bring everything that was accepted to the backings.
    Flush,
    /// End as on SIGTERM.
    Shutdown,
}

/// Answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Ok(Reply),
    /// Not done.
    Error {
        /// Name of the kind, see [`exit`].
        kind: String,
        /// Message.
        message: String,
    },
}

/// An answer with its version.
#[derive(Debug, Serialize, Deserialize)]
pub struct AnswerEnvelope {
    /// Version of the protocol.
    pub version: u32,
    /// The answer.
    #[serde(flatten)]
    pub answer: Answer,
}

/// What a request yields.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Nothing to say.
    Done,
    /// To `Status`.
    Status(Box<ServerStatus>),
    /// To `Attach` and `AttachBytes`: the path of the device, or of the socket.
    Device(String),
    /// To `AddVolume`: UUID of the volume.
    Volume(uuid::Uuid),
}

/// A server as it describes itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Process id.
    pub pid: u32,
    /// Process id of the supervisor, if there is one.
    pub supervisor_pid: Option<u32>,
    /// It was told to end, and brings what is staged to the backings.
    #[serde(default)]
    pub ending: bool,
    /// Devices.
    pub devices: Vec<DeviceStatus>,
    /// Byte devices.
    #[serde(default)]
    pub gates: Vec<GateStatus>,
    /// The stage.
    pub stage: StageStatus,
    /// What opening the stage found.
    pub recovery: RecoveryReport,
}

/// A device as its server sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Name of the volume.
    pub volume: String,
    /// Number of the ublk device.
    pub device_id: u32,
    /// Path.
    pub path: String,
    /// The device came through the death of a server since it was last attached by command.
    pub recovered: bool,
    /// Why it is not served (yet): clients wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A byte device as its server sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GateStatus {
    /// Name of the volume.
    pub volume: String,
    /// Its socket.
    pub path: String,
    /// Who is in a session.
    pub clients: Vec<ClientStatus>,
    /// It cannot be opened yet; that is tried again.
    #[serde(default)]
    pub is_lost: bool,
}

/// A client of a byte device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientStatus {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

/// Writes one value as a line.
pub fn send(stream: &mut impl Write, value: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// Reads one line; `None` at the end of the stream.
pub fn receive(stream: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let mut line = String::new();
    let read = std::io::Read::take(stream, LINE_BYTES_MAX).read_line(&mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if !line.ends_with('\n') {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "line too long or cut short"));
    }
    Ok(Some(line))
}

/// The request in a line.
pub fn parse_request(line: &str) -> Result<Request> {
    // The version first: a newer request may have a shape that we do not know.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let bad = |e: serde_json::Error| {
        Error::new(ErrorKind::Invalid, format!("the request cannot be understood: {e}"))
    };
    let Version { version } = serde_json::from_str(line).map_err(bad)?;
    if version != VERSION {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the command speaks version {version} of the control protocol, the running server {VERSION}: detach with the \
                 older tidegate and attach with the newer one"
            ),
        ));
    }
    serde_json::from_str::<Envelope>(line).map(|e| e.request).map_err(bad)
}

/// The answer that carries `result`.
pub fn answer_of(result: Result<Reply>) -> AnswerEnvelope {
    let answer = match result {
        Ok(reply) => Answer::Ok(reply),
        Err(e) => Answer::Error { kind: exit::name_of(e.kind()).to_owned(), message: e.report() },
    };
    AnswerEnvelope { version: VERSION, answer }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_and_answers_round_trip() {
        let request = Request::Detach { volume: "v".into(), flush: true, force: false };
        let line = serde_json::to_string(&Envelope { version: VERSION, request: request.clone() }).unwrap();
        assert_eq!(line, r#"{"version":1,"request":{"detach":{"volume":"v","flush":true}}}"#);
        assert_eq!(parse_request(&line).unwrap(), request);

        let line = serde_json::to_string(&answer_of(Err(Error::new(ErrorKind::Busy, "mounted")))).unwrap();
        assert_eq!(line, r#"{"version":1,"error":{"kind":"busy","message":"mounted"}}"#);
        let back: AnswerEnvelope = serde_json::from_str(&line).unwrap();
        assert!(matches!(back.answer, Answer::Error { kind, .. } if kind == "busy"));
        let line = serde_json::to_string(&answer_of(Ok(Reply::Done))).unwrap();
        assert_eq!(line, r#"{"version":1,"ok":"done"}"#);
    }

    #[test]
    fn other_versions_and_nonsense_are_refused() {
        let newer = parse_request(r#"{"version":2,"request":{"dance":{}}}"#).unwrap_err();
        assert_eq!(newer.kind(), ErrorKind::Unsupported);
        for line in ["", "{}", "[]", "{\"version\":1}", r#"{"version":1,"request":"dance"}"#, "\0"] {
            assert_eq!(parse_request(line).unwrap_err().kind(), ErrorKind::Invalid, "{line:?}");
        }
    }

    #[test]
    fn long_lines_do_not_fill_the_memory() {
        let endless = std::io::Read::take(std::io::repeat(b'x'), LINE_BYTES_MAX * 2);
        assert!(receive(&mut std::io::BufReader::new(endless)).is_err());
    }

    /// A line that was cut, or in which somebody changed a few bytes.
    fn spoiled() -> impl Strategy<Value = String> {
        let whole = [
            r#"{"version":1,"request":{"detach":{"volume":"v","flush":true}}}"#,
            r#"{"version":1,"request":{"add-volume":{"name":"v","backing":"/b","size_bytes":4096,"block_bytes":512}}}"#,
            r#"{"version":1,"request":"status"}"#,
        ];
        let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
        (prop::sample::select(whole.to_vec()), edits, any::<prop::sample::Index>()).prop_map(
            |(text, edits, cut)| {
                let mut bytes = text.as_bytes().to_vec();
                for (at, byte) in edits {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
                bytes.truncate(cut.index(bytes.len() * 4));
                String::from_utf8_lossy(&bytes).into_owned()
            },
        )
    }

    proptest! {
        #[test]
        fn no_line_is_too_strange(line in prop_oneof![spoiled(), ".*"]) {
            if let Err(e) = parse_request(&line) {
                prop_assert!(matches!(e.kind(), ErrorKind::Invalid | ErrorKind::Unsupported));
            }
            let _ = serde_json::from_str::<AnswerEnvelope>(&line);
        }
    }
}
