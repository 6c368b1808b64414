//! `attach`: finds or starts the server and has it make the device.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::{Group, User};
use serde_json::json;
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::bytes::client::socket_path;
use tidegate_driver::bytes::gate::Access;
use tidegate_driver::format::volume_entry::{VolumeInfo, check_name};
use tidegate_driver::io::FileDisk;
use tidegate_ublk::Status;
use tidegate_ublk::info::block_path;

use crate::cli::{Allow, Attach};
use crate::client::Client;
use crate::engine::Wishes;
use crate::protocol::{Reply, Request};
use crate::registry::{Entry, Registry, StageDir};
use crate::server::GateConfig;
use crate::{engine, links, paths, report, server, stacking};

/// How long the server may vanish under our eyes before that is an error.
const RETRY: Duration = Duration::from_secs(60);
/// The same for `detach --force`, which knows what to do then.
const RETRY_FORCED: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);
/// How long a server may take to listen after its device is live.
const SOCKETLESS: Duration = Duration::from_secs(5);
/// How often stage and backing are looked for.
const WAIT_LOOK: Duration = Duration::from_millis(500);

/// `attach`.
pub fn run(registry: &Registry, args: &Attach) -> Result<ExitCode> {
    let entry = locate(registry, args)?;
    let gate = if args.bytes { Some(gate_of(&entry.name, &args.allow)?) } else { None };
    if gate.is_none() {
        preflight()?;
    }
    wait_for_devices(&entry, Duration::from_secs(args.wait));
    stacking::refuse(&engine::volumes_on(registry, &entry), &[&entry.stage, &entry.backing])?;
    if wishes_of(args, &entry) != entry.wishes()
        && let Err(e) = keep(registry, &entry.name, args)
    {
        let what = "--poll and --queues may have no effect, as they cannot be kept";
        report::note(format!("{what}: {}", e.report()));
    }
    if args.foreground {
        server::foreground(registry, &entry, args.accept_loss, gate, args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let is_bytes = gate.is_some();
    let device = attach(registry, &entry, gate, args.accept_loss)?;
    if is_bytes && !Path::new(&device).exists() {
        let what = format!(
            "the server of '{}' runs where {device} cannot be reached: name a folder of the root file system with \
             TIDEGATE_RUN_DIR, or detach the stage's other volumes first",
            entry.name
        );
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    tell_repairs(registry, &entry);
    print_device(&entry, &device, is_bytes, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// What is asked for of the device now, or was before.
fn wishes_of(args: &Attach, entry: &Entry) -> Wishes {
    Wishes { poll_us: args.poll.or(entry.poll_us), queues: args.queues.or(entry.queues) }
}

/// Notes it for the server.
fn keep(registry: &Registry, name: &str, args: &Attach) -> Result<()> {
    // Others may hold it for long, and a device is waited for.
    let Some(_lock) = registry.try_lock()? else {
        return Err(Error::new(ErrorKind::Busy, "another command is changing the state directory"));
    };
    let entry = registry.get(name)?;
    let Wishes { poll_us, queues } = wishes_of(args, &entry);
    registry.put(&Entry { poll_us, queues, ..entry })
}

/// Waits for stage and backing, which at boot may appear after this is started. Those that stay away are missed by
/// whoever opens them.
fn wait_for_devices(entry: &Entry, patience: Duration) {
    let deadline = Instant::now() + patience;
    let is_missing =
        |path: &Path| matches!(std::fs::metadata(path), Err(e) if e.kind() == std::io::ErrorKind::NotFound);
    for path in [&entry.stage, &entry.backing] {
        if is_missing(path) && !patience.is_zero() {
            report::note(format!("waiting for {} for up to {} s…", path.display(), patience.as_secs()));
        }
        while is_missing(path) && Instant::now() < deadline {
            std::thread::sleep(WAIT_LOOK);
        }
    }
}

/// Tells people that a device begins to fail.
fn tell_repairs(registry: &Registry, entry: &Entry) {
    let status = Client::connect(&registry.stage_dir(entry.stage_uuid)).and_then(|c| c.status().ok());
    let repaired = status.map_or(0, |s| s.recovery.superblocks_repaired);
    if repaired > 0 {
        let _ = writeln!(
            std::io::stderr(),
            "tidegate: note: {repaired} of the superblock copies on {} were damaged and have been written again",
            entry.stage.display()
        );
    }
}

/// Prints what scripts wait for.
pub fn print_device(entry: &Entry, device: &str, is_bytes: bool, json: bool) -> Result<()> {
    let printed = if json && is_bytes {
        report::json(&json!({ "name": entry.name, "socket": device }))
    } else if json {
        report::json(&json!({ "name": entry.name, "device": device, "link": links::path(&entry.name) }))
    } else {
        report::line(device)
    };
    printed.map(drop)
}

/// Folder of the sockets of byte devices.
pub fn run_dir() -> PathBuf {
    let path = socket_path("x");
    path.parent().map(Path::to_owned).unwrap_or_default()
}

/// The byte device that was asked for.
fn gate_of(name: &str, allowed: &[Allow]) -> Result<GateConfig> {
    let path = std::path::absolute(socket_path(name))
        .map_err(|e| Error::io("cannot tell where TIDEGATE_RUN_DIR is", e))?;
    let mut access = Access::default();
    let unknown = |what: &str, name: &str| {
        Error::new(ErrorKind::NotFound, format!("--allow: this machine has no {what} '{name}'"))
    };
    for allow in allowed {
        match allow {
            Allow::User(name) => {
                let named = || User::from_name(name).ok().flatten().map(|user| user.uid.as_raw());
                access.users.push(name.parse().ok().or_else(named).ok_or_else(|| unknown("user", name))?);
            }
            Allow::Group(name) => {
                let named = || Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw());
                access.groups.push(name.parse().ok().or_else(named).ok_or_else(|| unknown("group", name))?);
            }
        }
    }
    Ok(GateConfig { path, access })
}

/// What making a device needs of the machine.
pub fn preflight() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(
            ErrorKind::Permission,
            "attach makes a block device, which only root may: run it with sudo",
        ));
    }
    tidegate_ublk::ctrl::Control::open().map(|_| ())
}

/// The volume's entry; entered or corrected from `--stage` and `--backing`.
fn locate(registry: &Registry, args: &Attach) -> Result<Entry> {
    check_name(&args.name)?;
    if args.stage.is_none() && args.backing.is_none() {
        return registry.get(&args.name);
    }
    let _lock = registry.lock()?;
    let known = registry.find(&args.name)?;
    let stage = match (&args.stage, &known) {
        (Some(path), _) => paths::absolute(path)?,
        (None, Some(entry)) => entry.stage.clone(),
        (None, None) => return registry.get(&args.name),
    };
    let (stage_uuid, volume) = volume_on(&stage, &args.name)?;
    if let Some(entry) = &known
        && (entry.stage_uuid, entry.volume_uuid) != (stage_uuid, volume.uuid)
    {
        return Err(Error::new(
            ErrorKind::WrongDevice,
            format!(
                "{} holds stage {stage_uuid}; volume '{}' is on stage {}: find that one, or attach the other volume under \
                 another state directory",
                stage.display(),
                args.name,
                entry.stage_uuid
            ),
        ));
    }
    let Wishes { poll_us, queues } = known.as_ref().map_or_else(Wishes::default, Entry::wishes);
    let backing = match (&args.backing, known) {
        (Some(path), _) => {
            let path = paths::absolute(path)?;
            refuse_other_backing(&path, stage_uuid, &volume)?;
            path
        }
        (None, Some(entry)) => entry.backing,
        (None, None) => volume.backing.into(),
    };
    // Volumes of one stage are found together.
    for mut other in
        registry.entries()?.into_iter().filter(|e| e.stage_uuid == stage_uuid && e.stage != stage)
    {
        other.stage.clone_from(&stage);
        registry.put(&other)?;
    }
    let entry = Entry { poll_us, queues, ..Entry::new(&args.name, stage, stage_uuid, backing, volume.uuid) };
    registry.put(&entry)?;
    Ok(entry)
}

/// Refuses what is not the backing of the volume, before it is entered as that.
pub fn refuse_other_backing(path: &Path, stage_uuid: uuid::Uuid, volume: &VolumeInfo) -> Result<()> {
    let disk = FileDisk::open_to_look(path).map_err(|e| e.within("backing"))?;
    let label = engine::read_label(&disk, volume.size_bytes)?;
    let what = match label {
        Some(label) if (label.stage_uuid, label.volume_uuid) == (stage_uuid, volume.uuid) => return Ok(()),
        Some(label) => {
            format!("is the backing of volume '{}' of stage {}", label.name, label.stage_uuid)
        }
        None => "carries no label of it".to_owned(),
    };
    Err(Error::new(
        ErrorKind::WrongDevice,
        format!("{} is not the backing of volume '{}': it {what}", path.display(), volume.name),
    ))
}

fn volume_on(stage: &Path, name: &str) -> Result<(uuid::Uuid, VolumeInfo)> {
    let superblock = engine::read_superblock(&FileDisk::open_to_look(stage)?)?.superblock;
    let names: Vec<&str> = superblock.volumes.iter().map(|v| v.name.as_str()).collect();
    let not_there = || {
        Error::new(
            ErrorKind::NotFound,
            format!("stage {} has no volume '{name}'; it has: {}", stage.display(), names.join(", ")),
        )
    };
    let volume = superblock.volumes.iter().find(|v| v.name == name).ok_or_else(not_there)?;
    Ok((superblock.stage_uuid, volume.clone()))
}

/// Has the volume attached; the path of its device, or of its socket.
pub fn attach(
    registry: &Registry,
    entry: &Entry,
    gate: Option<GateConfig>,
    accept_loss: bool,
) -> Result<String> {
    let volume = entry.name.clone();
    let request = match gate {
        None => Request::Attach { volume },
        Some(GateConfig { path, access }) => {
            Request::AttachBytes { volume, path, users: access.users, groups: access.groups }
        }
    };
    let dir = registry.stage_dir(entry.stage_uuid);
    // For the next server, whoever starts it: a supervisor may be at its attempts. One that answers has lost nothing.
    if accept_loss && Client::connect(&dir).is_none() {
        dir.put_accept_loss()?;
    }
    let reply = ask_or_start(registry, entry, &request);
    if accept_loss {
        // Not for a loss to come.
        dir.take_accept_loss();
    }
    match reply? {
        Reply::Device(path) => Ok(path),
        other => Err(Error::new(
            ErrorKind::Unsupported,
            format!("the server gave an answer that does not fit: {other:?}"),
        )),
    }
}

/// Asks the server, which is started if there is none. A server that ends while it is asked is asked, or started, again.
pub fn ask_or_start(registry: &Registry, entry: &Entry, request: &Request) -> Result<Reply> {
    let dir = registry.stage_dir(entry.stage_uuid);
    let mut child: Option<Child> = None;
    let mut give_up = Instant::now() + RETRY;
    let mut noted = false;
    let mut asked = false;
    let begun = Instant::now();
    loop {
        if let Some(client) = Client::connect(&dir) {
            match client.ask_unless_gone(request.clone()) {
                // The one that ended before it answered had done it.
                Some(Err(e)) if asked && e.kind() == ErrorKind::NotFound && is_detach(request) => {
                    return Ok(Reply::Done);
                }
                Some(outcome) => return outcome,
                None if Instant::now() >= give_up => return client.ask(request.clone()),
                None => asked = true,
            }
        } else if begun.elapsed() > SOCKETLESS
            && let Some(served) = served_without_socket(entry, request)
        {
            return Ok(served);
        } else if let Some(started) = &mut child {
            let ended = started.try_wait().map_err(|e| Error::io("cannot watch the supervisor", e))?;
            if let Some(status) = ended {
                // One that ended in order had nothing to serve when it did: the next one has.
                if !status.success() && status.code() != Some(i32::from(server::supervise::ALREADY)) {
                    return Err(start_failure(&dir));
                }
                child = None;
            } else {
                // It is at work: opening a stage after a crash may take its time.
                give_up = Instant::now() + RETRY;
            }
        } else if dir.is_supervised() {
            // It starts one server after the other, for the sake of clients that wait: that may take a repair.
            let is_forced = matches!(request, Request::Detach { force: true, .. });
            let patience = if is_forced { RETRY_FORCED } else { RETRY };
            if begun.elapsed() > patience
                && let Some(e) = dir.start_error()?
            {
                return Err(e.within("the server cannot be started, which is tried again and again"));
            }
            give_up = Instant::now() + RETRY;
        } else if Instant::now() >= give_up {
            return Err(start_failure(&dir));
        } else {
            child = Some(spawn_supervisor(registry, entry)?);
        }
        if !noted && begun.elapsed() > Duration::from_secs(2) {
            report::note(format!("waiting for the server of '{}' to open its stage…", entry.name));
            noted = true;
        }
        std::thread::sleep(POLL);
    }
}

/// The answer of a server that has taken the device over and cannot be asked, for nothing can be written where its socket
/// should be.
fn served_without_socket(entry: &Entry, request: &Request) -> Option<Reply> {
    let Request::Attach { .. } = request else { return None };
    let (device_id, status) = engine::device_of(entry.volume_uuid).ok()??;
    (status == Status::Live).then(|| Reply::Device(block_path(device_id).display().to_string()))
}

fn is_detach(request: &Request) -> bool {
    matches!(request, Request::Detach { .. })
}

fn start_failure(dir: &StageDir) -> Error {
    match dir.start_error() {
        Ok(Some(e)) | Err(e) => e,
        Ok(None) => Error::new(
            ErrorKind::Io,
            format!("the server ended before it answered; its log is {}", dir.log_path().display()),
        ),
    }
}

fn spawn_supervisor(registry: &Registry, entry: &Entry) -> Result<Child> {
    let dir = registry.stage_dir(entry.stage_uuid);
    dir.make()?;
    let share = |log: File| log.try_clone().map(|other| (log, other));
    let log = server::open_log(&dir)
        .and_then(|log| share(log).map_err(|e| Error::io("cannot share the server's log", e)));
    // Where no log can be written clients may wait for a server all the same.
    let (out, err) = match log {
        Ok((out, err)) => (Stdio::from(out), Stdio::from(err)),
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "tidegate: note: there will be no log: {}", e.report());
            (Stdio::null(), Stdio::null())
        }
    };
    let mut command = Command::new(crate::paths::own_executable());
    command
        .arg0("tidegate")
        .arg("--state-dir")
        .arg(registry.dir())
        .arg("supervise")
        .arg(entry.stage_uuid.to_string());
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .map_err(|e| Error::io("cannot start the supervisor", e))
}
