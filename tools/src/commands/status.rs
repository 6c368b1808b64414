//! `status`: what is there, attached or not, served or not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::superblock::Superblock;
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::FileDisk;
use tidegate_driver::volume::status::{Health, RecoveryReport, StageStatus};
use tidegate_ublk::Status as DeviceStatus;
use uuid::Uuid;

use crate::cli::Status;
use crate::client::Client;
use crate::protocol::ServerStatus;
use crate::registry::{Entry, Registry, Runtime};
use crate::size::human;
use crate::{engine, links, report};

const WATCH: Duration = Duration::from_secs(1);

/// Everything: the JSON output, whose keys are stable.
#[derive(Debug, Default, Serialize)]
struct Listing {
    volumes: Vec<Volume>,
    stages: Vec<Stage>,
    /// Entries that cannot be read.
    problems: Vec<String>,
}

/// Where a volume is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// Its device is live.
    Attached,
    /// Its device is live, and its server was told to end.
    Ending,
    /// It has no device.
    Detached,
    /// Its server is starting: the device, if any, waits.
    Recovering,
    /// Its device waits for a server after an orderly end.
    Waiting,
    /// Its device waits for a server after a crash.
    ServerDied,
    /// Its server is there and does not answer.
    NotAnswering,
    /// Its stage cannot be read.
    Error,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Attached => "attached",
            State::Ending => "ending",
            State::Detached => "detached",
            State::Recovering => "recovering",
            State::Waiting => "waiting",
            State::ServerDied => "server-died",
            State::NotAnswering => "not-answering",
            State::Error => "error",
        }
    }
}

#[derive(Debug, Serialize)]
struct Volume {
    name: String,
    uuid: Uuid,
    state: State,
    /// Path of the block device, or of the socket of a byte device.
    device: Option<String>,
    device_id: Option<u32>,
    /// Process ids of the clients of a byte device; `null` if it is none.
    clients: Option<Vec<u32>>,
    /// The stable name that leads to the device.
    link: Option<PathBuf>,
    /// Process id of the server.
    pid: Option<u32>,
    /// The device came through the death of a server since the last attach.
    recovered: bool,
    size_bytes: Option<u64>,
    block_bytes: Option<u32>,
    ack: Option<AckLevel>,
    on_log_error: Option<OnLogError>,
    stage: String,
    stage_uuid: Uuid,
    backing: String,
    problem: Option<String>,
    /// Counters start with the server, and are `null` without one.
    reads: Option<u64>,
    writes: Option<u64>,
    discards: Option<u64>,
    flushes: Option<u64>,
    read_bytes: Option<u64>,
    write_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Stage {
    uuid: Uuid,
    path: String,
    pid: Option<u32>,
    supervisor_pid: Option<u32>,
    log_file: String,
    problem: Option<String>,
    /// State of the running server, `null` without one.
    status: Option<StageStatus>,
    /// What opening the stage found.
    recovery: Option<RecoveryReport>,
}

/// What is known of a stage.
struct Known {
    server: Option<ServerStatus>,
    /// There is a server, but it does not answer.
    hangs: Option<Error>,
    runtime: Option<Runtime>,
    supervised: bool,
    /// The stage as it is on its device. Not looked at while a server answers, which knows better, and may have reason not
    /// to be kept from its device.
    superblock: Option<std::result::Result<Superblock, Error>>,
}

impl Known {
    /// Process id of the server, which one that does not answer has noted.
    fn pid(&self) -> Option<u32> {
        let noted = || self.runtime.as_ref().filter(|_| self.hangs.is_some()).map(|r| r.server_pid);
        self.server.as_ref().map(|s| s.pid).or_else(noted)
    }

    /// Process id of the supervisor, which without a server is the one that the last server noted.
    fn supervisor_pid(&self) -> Option<u32> {
        match &self.server {
            Some(server) => server.supervisor_pid,
            None => self.runtime.as_ref().filter(|_| self.supervised)?.supervisor_pid,
        }
    }

    /// Why the stage cannot be read.
    fn unread(&self) -> Option<&Error> {
        self.superblock.as_ref()?.as_ref().err()
    }

    /// What is known of a volume: from the server, or else from the stage.
    fn volume(&self, uuid: Uuid) -> Option<Info> {
        if let Some(server) = &self.server {
            let text = uuid.to_string();
            let v = server.stage.volumes.iter().find(|v| v.uuid == text)?;
            return Some(Info {
                size_bytes: v.size_bytes,
                block_bytes: v.block_bytes,
                ack: v.ack,
                on_log_error: v.on_log_error,
            });
        }
        let v = self.superblock.as_ref()?.as_ref().ok()?.volumes.iter().find(|v| v.uuid == uuid)?;
        Some(Info {
            size_bytes: v.size_bytes,
            block_bytes: v.block_bytes,
            ack: v.ack,
            on_log_error: v.on_log_error,
        })
    }

    fn noted_server_is_gone(&self) -> bool {
        self.runtime.as_ref().is_some_and(|r| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", r.server_pid));
            // Or waits to be buried.
            stat.map_or(true, |stat| stat.contains(") Z ") || stat.contains(") X "))
        })
    }

    /// Whether a volume was a byte device when its server died.
    fn left_gate(&self, entry: &Entry) -> bool {
        let is_it = |r: &Runtime| !r.ended && r.gates.iter().any(|g| g.volume_uuid == entry.volume_uuid);
        self.runtime.as_ref().is_some_and(is_it)
    }

    /// The device of a volume that has no server to ask. The kernel knows whether there is one; where it cannot be asked,
    /// what the last server noted has to do.
    fn left(&self, entry: &Entry) -> Option<Left> {
        let state = match &self.runtime {
            Some(runtime) if runtime.ended => State::Waiting,
            _ => State::ServerDied,
        };
        match engine::device_of(entry.volume_uuid) {
            Ok(None | Some((_, DeviceStatus::Dead))) => None,
            // Somebody serves it whose socket is not there. The kernel takes a moment to notice that a server is gone.
            Ok(Some((device_id, DeviceStatus::Live))) if !self.noted_server_is_gone() => {
                Some(Left { device_id, state: State::NotAnswering })
            }
            Ok(Some((device_id, _))) => Some(Left { device_id, state }),
            Err(_) => {
                let mut noted = self.runtime.as_ref()?.devices.iter();
                let device_id = noted.find(|d| d.volume_uuid == entry.volume_uuid)?.device_id;
                Some(Left { device_id, state })
            }
        }
    }
}

/// A device without a server that answers.
struct Left {
    device_id: u32,
    state: State,
}

/// A volume's properties.
struct Info {
    size_bytes: u64,
    block_bytes: u32,
    ack: AckLevel,
    on_log_error: OnLogError,
}

/// `status`.
pub fn run(registry: &Registry, args: &Status) -> Result<ExitCode> {
    loop {
        let listing = list(registry, args.name.as_deref())?;
        let is_read = if args.json {
            report::json(&listing)?
        } else {
            let clear = if args.watch { "\x1b[H\x1b[2J" } else { "" };
            report::print(&format!("{clear}{}", render(&listing, args.name.is_some())))?
        };
        if !args.watch || !is_read {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(WATCH);
    }
}

fn list(registry: &Registry, name: Option<&str>) -> Result<Listing> {
    let mut listing = Listing::default();
    let entries = match name {
        Some(name) => vec![registry.get(name)?],
        None => {
            let (good, bad): (Vec<_>, Vec<_>) = registry.list()?.into_iter().partition(Result::is_ok);
            listing.problems = bad.into_iter().filter_map(Result::err).map(|e| e.report()).collect();
            good.into_iter().flatten().collect()
        }
    };
    let uuids: BTreeSet<Uuid> = entries.iter().map(|e| e.stage_uuid).collect();
    let mut stages = BTreeMap::new();
    for uuid in uuids {
        if let Some(entry) = entries.iter().find(|e| e.stage_uuid == uuid) {
            let known = look_at(registry, entry);
            listing.stages.push(stage_of(registry, entry, &known));
            stages.insert(uuid, known);
        }
    }
    listing.volumes =
        entries.iter().filter_map(|e| stages.get(&e.stage_uuid).map(|known| volume_of(e, known))).collect();
    Ok(listing)
}

fn look_at(registry: &Registry, entry: &Entry) -> Known {
    let dir = registry.stage_dir(entry.stage_uuid);
    // Whether it is supervised first: a server that has begun to answer meanwhile counts.
    let supervised = dir.is_supervised();
    let (server, hangs) = match Client::connect(&dir).map(|client| client.status()) {
        Some(Ok(status)) => (Some(status), None),
        Some(Err(e)) => (None, Some(e)),
        None => (None, None),
    };
    let superblock = server.is_none().then(|| read_stage(entry));
    Known { server, hangs, runtime: dir.runtime().ok().flatten(), supervised, superblock }
}

fn read_stage(entry: &Entry) -> Result<Superblock> {
    let superblock = engine::read_superblock(&FileDisk::open_to_look(&entry.stage)?)?.superblock;
    if superblock.stage_uuid == entry.stage_uuid {
        return Ok(superblock);
    }
    Err(Error::new(
        ErrorKind::WrongDevice,
        format!(
            "{} holds stage {}, not {}: find the right one, attach with --stage",
            entry.stage.display(),
            superblock.stage_uuid,
            entry.stage_uuid
        ),
    ))
}

fn stage_of(registry: &Registry, entry: &Entry, known: &Known) -> Stage {
    let server = known.server.as_ref();
    let start_error = || registry.stage_dir(entry.stage_uuid).start_error().ok().flatten();
    let problem = match (&server, &known.hangs, known.unread()) {
        (Some(server), _, _) => server.stage.problem.clone(),
        (None, Some(e), _) | (None, None, Some(e)) => Some(e.report()),
        (None, None, None) => start_error().map(|e| format!("the last start failed: {}", e.report())),
    };
    Stage {
        uuid: entry.stage_uuid,
        path: entry.stage.display().to_string(),
        pid: known.pid(),
        supervisor_pid: known.supervisor_pid(),
        log_file: registry.stage_dir(entry.stage_uuid).log_path().display().to_string(),
        problem,
        status: server.map(|s| s.stage.clone()),
        recovery: server.map(|s| s.recovery.clone()),
    }
}

fn volume_of(entry: &Entry, known: &Known) -> Volume {
    let server = known.server.as_ref();
    let device = server.and_then(|s| s.devices.iter().find(|d| d.volume == entry.name));
    let gate = server.and_then(|s| s.gates.iter().find(|g| g.volume == entry.name));
    let left = if server.is_none() { known.left(entry) } else { None };
    let state = match (server, device, &left) {
        (Some(_), Some(d), _) if d.problem.is_some() => State::Waiting,
        (Some(s), _, _) if s.ending && (device.is_some() || gate.is_some()) => State::Ending,
        (Some(_), Some(_), _) => State::Attached,
        (Some(_), None, _) if gate.is_some_and(|g| g.is_lost) => State::Waiting,
        (Some(_), None, _) if gate.is_some() => State::Attached,
        (Some(_), None, _) => State::Detached,
        (None, _, _) if known.hangs.is_some() => State::NotAnswering,
        (None, _, _) if known.supervised => State::Recovering,
        (None, _, Some(left)) => left.state,
        (None, _, None) if known.unread().is_some() => State::Error,
        (None, _, None) if known.left_gate(entry) => State::ServerDied,
        (None, _, None) => State::Detached,
    };
    let counters = server.and_then(|s| s.stage.volumes.iter().find(|v| v.name == entry.name));
    let info = known.volume(entry.volume_uuid);
    let missing = (known.unread().is_none() && info.is_none()).then(|| {
        format!("the stage does not list it: `tidegate delete --force {}` forgets the name", entry.name)
    });
    let device_id = device.map(|d| d.device_id).or(left.map(|l| l.device_id));
    Volume {
        name: entry.name.clone(),
        uuid: entry.volume_uuid,
        state,
        device: device_id
            .map(|id| tidegate_ublk::info::block_path(id).display().to_string())
            .or(gate.map(|g| g.path.clone())),
        clients: gate.map(|g| g.clients.iter().map(|client| client.pid).collect()),
        device_id,
        link: device_id.and_then(|id| links::of(&entry.name, id)),
        pid: known.pid(),
        recovered: device.is_some_and(|d| d.recovered),
        size_bytes: info.as_ref().map(|i| i.size_bytes),
        block_bytes: info.as_ref().map(|i| i.block_bytes),
        ack: info.as_ref().map(|i| i.ack),
        on_log_error: info.as_ref().map(|i| i.on_log_error),
        stage: entry.stage.display().to_string(),
        stage_uuid: entry.stage_uuid,
        backing: entry.backing.display().to_string(),
        problem: counters
            .and_then(|v| v.problem.clone())
            .or(device.and_then(|d| d.problem.clone()))
            .or(missing)
            .or(known.unread().map(Error::report)),
        reads: counters.map(|v| v.reads),
        writes: counters.map(|v| v.writes),
        discards: counters.map(|v| v.discards),
        flushes: counters.map(|v| v.flushes),
        read_bytes: counters.map(|v| v.read_bytes),
        write_bytes: counters.map(|v| v.write_bytes),
    }
}

fn render(listing: &Listing, detail: bool) -> String {
    if listing.volumes.is_empty() && listing.problems.is_empty() {
        return "no volumes; `tidegate create --help` shows how to make one\n".into();
    }
    let head = ["NAME", "STATE", "DEVICE", "SIZE", "ACK", "STAGED", "HEALTH", "BACKING"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for v in &listing.volumes {
        let stage = listing.stages.iter().find(|s| s.uuid == v.stage_uuid);
        let status = stage.and_then(|s| s.status.as_ref());
        let dash = || "-".to_owned();
        rows.push(vec![
            v.name.clone(),
            v.state.name().into(),
            v.device.clone().unwrap_or_else(dash),
            v.size_bytes.map_or_else(dash, human),
            v.ack.map_or_else(dash, |a| format!("{a:?}").to_lowercase()),
            status.map_or_else(dash, |s| human(s.used_bytes)),
            status.map_or_else(dash, |s| health(s.health).into()),
            v.backing.clone(),
        ]);
    }
    let mut text = report::table(&rows);
    for v in &listing.volumes {
        if let Some(problem) = &v.problem {
            let _ = writeln!(text, "! {}: {problem}", v.name);
        }
        if matches!(v.state, State::Waiting | State::ServerDied) {
            let _ =
                writeln!(text, "! {}: clients wait; `tidegate attach {}` serves them again", v.name, v.name);
        }
    }
    for stage in &listing.stages {
        if let Some(problem) = &stage.problem {
            let _ = writeln!(text, "! stage {}: {problem}", stage.path);
        }
    }
    for problem in &listing.problems {
        let _ = writeln!(text, "! {problem}");
    }
    if detail {
        details(listing, &mut text);
    }
    text
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Damaged => "damaged",
        Health::LogError => "log-error",
        Health::Degraded => "degraded",
        Health::Ok => "ok",
    }
}

fn details(listing: &Listing, text: &mut String) {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |key: &str, value: String| rows.push(vec![format!("  {key}"), value]);
    for v in &listing.volumes {
        row("uuid", v.uuid.to_string());
        row("block size", v.block_bytes.map_or("-".into(), |b| b.to_string()));
        if let Some(link) = &v.link {
            row("link", link.display().to_string());
        }
        if let Some(clients) = &v.clients {
            row("clients", format!("{} {clients:?}", clients.len()));
        }
        for (key, count, bytes) in [
            ("reads", v.reads, v.read_bytes),
            ("writes", v.writes, v.write_bytes),
            ("discards", v.discards, None),
            ("flushes", v.flushes, None),
        ] {
            if let Some(count) = count {
                row(key, bytes.map_or(count.to_string(), |bytes| format!("{count} ({})", human(bytes))));
            }
        }
    }
    for s in &listing.stages {
        row("stage", s.path.clone());
        row("stage uuid", s.uuid.to_string());
        row("log file", s.log_file.clone());
        if let Some(status) = &s.status {
            row("server", s.pid.map_or("-".into(), |pid| format!("process {pid}")));
            row("stage used", format!("{} of {}", human(status.used_bytes), human(status.stage_bytes)));
            row(
                "position",
                format!(
                    "accepted {}, durable {}, on the backing {}",
                    status.claimed_lsn, status.durable_lsn, status.checkpoint_lsn
                ),
            );
            let (full, paced) = (status.stage_full_waits, status.paced_waits);
            row("waits for space", format!("{full}, and {paced} for the flusher ({} now)", status.waiting));
            row("device errors", format!("{} log, {} backing", status.log_errors, status.backing_errors));
        }
        for note in s.recovery.iter().flat_map(|r| &r.notes) {
            row("recovery", note.clone());
        }
    }
    text.push('\n');
    text.push_str(&report::table(&rows));
}
