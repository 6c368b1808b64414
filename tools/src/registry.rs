//! The state directory: which name is which volume on which stage, and where each stage's server is to be found.
//!
//! ```text
//! STATE/lock                      held while names are added or removed
//! STATE/volumes/NAME.json         one volume
//! STATE/stages/UUID/supervisor.lock   held by the supervisor (or the foreground server) of a stage
//! STATE/stages/UUID/control.sock  where the server listens
//! STATE/stages/UUID/runtime.json  what the server is doing; tells a crash from an end in order
//! STATE/stages/UUID/error.json    why the server could not start
//! STATE/stages/UUID/accept-loss   the next server may go on without writes that were lost with an arena
//! STATE/stages/UUID/server.log
//! ```
//!
//! The superblock is the truth; this only maps names to places. Losing it loses no data: `attach NAME --stage PATH` enters a
//! volume again. Every file is replaced whole (written, synced, renamed, directory synced).

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::format::volume_entry::check_name;
use tidegate_driver::io::file::sync_dir_of;
use uuid::Uuid;

use crate::engine::Wishes;

/// Version of the files here.
const VERSION: u32 = 1;

/// A volume's entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Version of this file.
    pub version: u32,
    /// Name of the volume.
    pub name: String,
    /// Path of the stage.
    pub stage: PathBuf,
    /// The stage's UUID.
    pub stage_uuid: Uuid,
    /// Path of the backing.
    pub backing: PathBuf,
    /// The volume's UUID.
    pub volume_uuid: Uuid,
    /// Microseconds that its queues look for requests before they sleep; `None`: as many as is usual.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_us: Option<u32>,
    /// Queues of its device when that is made; `None`: as many as is usual.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

impl Entry {
    /// Entry in the current version.
    pub fn new(name: &str, stage: PathBuf, stage_uuid: Uuid, backing: PathBuf, volume_uuid: Uuid) -> Entry {
        Entry {
            version: VERSION,
            name: name.to_owned(),
            stage,
            stage_uuid,
            backing,
            volume_uuid,
            poll_us: None,
            queues: None,
        }
    }

    /// What was asked for of its device.
    pub fn wishes(&self) -> Wishes {
        Wishes { poll_us: self.poll_us, queues: self.queues }
    }
}

/// A state directory.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// State directory at `dir`, which need not exist yet.
    pub fn new(dir: &Path) -> Result<Registry> {
        let dir = std::path::absolute(dir)
            .map_err(|e| Error::io(format!("'{}' cannot be a state directory", dir.display()), e))?;
        Ok(Registry { dir })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn volumes(&self) -> PathBuf {
        self.dir.join("volumes")
    }

    fn entry_path(&self, name: &str) -> PathBuf {
        self.volumes().join(format!("{name}.json"))
    }

    /// What belongs to the stage `uuid`.
    pub fn stage_dir(&self, uuid: Uuid) -> StageDir {
        StageDir { dir: self.dir.join("stages").join(uuid.to_string()) }
    }

    /// Keeps everybody else from adding and removing names while the returned file is open.
    pub fn lock(&self) -> Result<File> {
        let file = self.open_lock()?;
        file.lock().map_err(|e| self.cannot_lock(e))?;
        Ok(file)
    }

    /// The same lock, unless somebody has it.
    pub fn try_lock(&self) -> Result<Option<File>> {
        let file = self.open_lock()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(self.cannot_lock(e)),
        }
    }

    fn open_lock(&self) -> Result<File> {
        make_dir(&self.dir)?;
        open_lock(&self.lock_path()).map_err(|e| self.cannot_lock(e))
    }

    fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    fn cannot_lock(&self, e: std::io::Error) -> Error {
        let path = self.lock_path();
        Error::io(format!("cannot lock the state directory with {}", path.display()), e)
    }

    /// The entry of `name`.
    pub fn get(&self, name: &str) -> Result<Entry> {
        self.find(name)?.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "there is no volume '{name}' in {}: `tidegate status` lists the volumes, `tidegate create` makes one, \
                     `tidegate attach {name} --stage PATH` enters one that another machine made",
                    self.dir.display()
                ),
            )
        })
    }

    /// The entry of `name`, if there is one.
    pub fn find(&self, name: &str) -> Result<Option<Entry>> {
        check_name(name)?;
        let path = self.entry_path(name);
        let entry: Option<Entry> = read_json(&path)?;
        match entry {
            Some(e) if e.version > VERSION => Err(Error::new(
                ErrorKind::NewerFormat,
                format!(
                    "{} has version {}; this tidegate knows {VERSION}: use a newer one",
                    path.display(),
                    e.version
                ),
            )),
            Some(e) if e.name != name => Err(Error::new(
                ErrorKind::Damaged,
                format!("{} describes '{}': restore the file or remove it", path.display(), e.name),
            )),
            entry => Ok(entry),
        }
    }

    /// All entries, by name; those that cannot be read as errors.
    pub fn list(&self) -> Result<Vec<Result<Entry>>> {
        let entries = match fs::read_dir(self.volumes()) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(format!("cannot list {}", self.volumes().display()), e)),
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        Ok(names.iter().filter_map(|name| self.find(name).transpose()).collect())
    }

    /// All entries that can be read.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        Ok(self.list()?.into_iter().flatten().collect())
    }

    /// Writes the entry, new or in place of the old one. Hold the lock for a new one.
    pub fn put(&self, entry: &Entry) -> Result<()> {
        make_dir(&self.volumes())?;
        write_json(&self.entry_path(&entry.name), entry)
    }

    /// Removes the entry of `name`.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.entry_path(name);
        fs::remove_file(&path).map_err(|e| Error::io(format!("cannot remove {}", path.display()), e))?;
        sync_dir_of(&path)
    }
}

/// A stage's part of the state directory.
#[derive(Clone, Debug)]
pub struct StageDir {
    dir: PathBuf,
}

/// What a server notes for its successor and for `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// Boot id of the machine: a process id means nothing after a reboot.
    pub boot_id: String,
    /// Process id of the server.
    pub server_pid: u32,
    /// Process id of its supervisor.
    pub supervisor_pid: Option<u32>,
    /// The server ended in order.
    pub ended: bool,
    /// Devices that are started, or were left waiting for a server.
    pub devices: Vec<RuntimeDevice>,
    /// Byte devices that are open.
    #[serde(default)]
    pub gates: Vec<RuntimeGate>,
    /// Where the server keeps its arena.
    #[serde(default)]
    pub arena_dir: Option<PathBuf>,
}

/// A device in [`Runtime`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeDevice {
    /// Name of the volume.
    pub volume: String,
    /// UUID of the volume.
    pub volume_uuid: Uuid,
    /// Number of the ublk device.
    pub device_id: u32,
}

/// A byte device in [`Runtime`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeGate {
    /// Name of the volume.
    pub volume: String,
    /// UUID of the volume.
    pub volume_uuid: Uuid,
    /// Its socket.
    pub path: PathBuf,
    /// Users that may use it.
    pub users: Vec<u32>,
    /// Groups that may use it.
    pub groups: Vec<u32>,
}

/// Why a server could not start, for the command that waits for it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartError {
    /// Name of the error's kind.
    pub kind: String,
    /// The message.
    pub message: String,
}

impl StageDir {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes it if it is not there.
    pub fn make(&self) -> Result<()> {
        make_dir(&self.dir)
    }

    /// The server's log.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    /// Name of the control socket within the directory.
    pub const SOCKET: &'static str = "control.sock";

    fn lock_path(&self) -> PathBuf {
        self.dir.join("supervisor.lock")
    }

    /// The supervisor's lock: `None` if somebody else has it. Works where nothing can be written any more, too: clients
    /// may wait for a server.
    pub fn try_lock(&self) -> Result<Option<File>> {
        self.make()?;
        let path = self.lock_path();
        let fail = |e| Error::io(format!("cannot lock {}", path.display()), e);
        let file = match open_lock(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::ReadOnlyFilesystem => File::open(&path),
            opened => opened,
        }
        .map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => return Err(fail(e)),
        }
        // For those who only want to know: `flock` can be tested by taking it only, which would make others fail.
        fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_RDLCK))).map_err(|e| fail(e.into()))?;
        Ok(Some(file))
    }

    /// Whether somebody supervises or serves the stage.
    pub fn is_supervised(&self) -> bool {
        let Ok(file) = File::open(self.lock_path()) else { return false };
        let mut lock = whole_file(libc::F_WRLCK);
        let asked = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock));
        asked.is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
    }

    /// Lets the next server go on although writes acknowledged in memory are gone.
    pub fn put_accept_loss(&self) -> Result<()> {
        self.make()?;
        write_json(&self.accept_loss_path(), &boot_id())
    }

    /// Takes that permission: whether there was one, in this boot of the machine. It holds once.
    pub fn take_accept_loss(&self) -> bool {
        let path = self.accept_loss_path();
        let permitted: Option<String> = read_json(&path).ok().flatten();
        // One that cannot be taken away would hold for every loss to come.
        permitted.is_some_and(|boot| fs::remove_file(&path).is_ok() && boot == boot_id())
    }

    fn accept_loss_path(&self) -> PathBuf {
        self.dir.join("accept-loss")
    }

    /// What the last server noted, if it was in this boot of the machine.
    pub fn runtime(&self) -> Result<Option<Runtime>> {
        let runtime: Option<Runtime> = read_json(&self.dir.join("runtime.json"))?;
        Ok(runtime.filter(|r| r.boot_id == boot_id()))
    }

    /// Where the last server kept its arena, if it was in this boot of the machine.
    pub fn arena_dir(&self) -> Option<PathBuf> {
        self.runtime().ok().flatten()?.arena_dir
    }

    /// Notes where the arena is kept, before there is one that could be missed.
    pub fn put_arena_dir(&self, arena_dir: &Path) -> Result<()> {
        let mut runtime = self.runtime()?.unwrap_or_default();
        if runtime.arena_dir.as_deref() == Some(arena_dir) {
            return Ok(());
        }
        runtime.boot_id = boot_id();
        runtime.arena_dir = Some(arena_dir.to_owned());
        self.put_runtime(&runtime)
    }

    /// Notes what the server does.
    pub fn put_runtime(&self, runtime: &Runtime) -> Result<()> {
        write_json(&self.dir.join("runtime.json"), runtime)
    }

    /// Why the last start failed, if it did.
    pub fn start_error(&self) -> Result<Option<Error>> {
        let error: Option<StartError> = read_json(&self.dir.join("error.json"))?;
        Ok(error.map(|e| Error::new(crate::exit::kind_named(&e.kind), e.message)))
    }

    /// Notes why a start failed; `None` when one begins.
    pub fn put_start_error(&self, error: Option<&Error>) -> Result<()> {
        let path = self.dir.join("error.json");
        match error {
            Some(e) => {
                let kind = crate::exit::name_of(e.kind()).to_owned();
                write_json(&path, &StartError { kind, message: e.report() })
            }
            None => match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::io(format!("cannot remove {}", path.display()), e))
                }
                _ => Ok(()),
            },
        }
    }

    /// Forgets the stage.
    pub fn remove(&self) {
        if let Err(e) = fs::remove_dir_all(&self.dir)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {e}", self.dir.display());
        }
    }
}

/// Boot id of the running kernel.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|e| {
        let what_to_do = "run as root, or name another with --state-dir or TIDEGATE_STATE_DIR";
        Error::io(format!("cannot make the state directory {} ({what_to_do})", dir.display()), e)
    })
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn open_lock(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(format!("cannot read {}", path.display()), e)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|e| {
        Error::new(
            ErrorKind::Damaged,
            format!("{} cannot be understood ({e}): restore or remove it", path.display()),
        )
    })
}

/// Replaces `path` by the JSON of `value`: at every instant it holds the old or the new content, whole.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    // A name of our own, so that two writers do not share a temporary file; nobody reads names that start with a dot.
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    let tmp = path.with_file_name(format!(".{file_name}.{}", std::process::id()));
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::new(ErrorKind::Invalid, format!("cannot encode {}: {e}", path.display())))?;
    text.push(b'\n');
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&tmp)
        .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&tmp, path));
    if let Err(e) = written {
        let _ = fs::remove_file(&tmp);
        return Err(Error::io(format!("cannot write {}", path.display()), e));
    }
    sync_dir_of(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Entry {
        Entry::new(name, "/s".into(), Uuid::from_u128(1), "/b".into(), Uuid::from_u128(2))
    }

    #[test]
    fn entries_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(&dir.path().join("a/b")).unwrap();
        assert!(registry.list().unwrap().is_empty());
        let _lock = registry.lock().unwrap();
        registry.put(&entry("two")).unwrap();
        registry.put(&entry("one")).unwrap();
        let names: Vec<_> = registry.entries().unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["one", "two"]);
        assert_eq!(registry.get("one").unwrap(), entry("one"));
        registry.remove("one").unwrap();
        let error = registry.get("one").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(registry.get("../two").unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn a_failed_write_leaves_the_old_entry_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(dir.path()).unwrap();
        registry.put(&entry("v")).unwrap();
        let path = registry.entry_path("v");
        // A directory in the way of the rename.
        fs::create_dir_all(registry.entry_path("w").join("x")).unwrap();
        assert!(registry.put(&entry("w")).is_err());
        assert_eq!(registry.get("v").unwrap(), entry("v"));
        let litter: Vec<_> = fs::read_dir(path.parent().unwrap())
            .unwrap()
            .flatten()
            .filter(|e| e.file_name().as_encoded_bytes()[0] == b'.')
            .collect();
        assert!(litter.is_empty(), "{litter:?}");
    }

    #[test]
    fn readers_never_see_half_an_entry() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(dir.path()).unwrap();
        registry.put(&entry("v")).unwrap();
        let writer = {
            let registry = registry.clone();
            std::thread::spawn(move || {
                for i in 0..100 {
                    let mut e = entry("v");
                    e.backing = "x".repeat(i * 100).into();
                    registry.put(&e).unwrap();
                }
            })
        };
        while !writer.is_finished() {
            registry.get("v").unwrap();
        }
        writer.join().unwrap();
    }

    #[test]
    fn damaged_and_newer_entries_are_told_apart_and_do_not_hide_others() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(dir.path()).unwrap();
        registry.put(&entry("good")).unwrap();
        fs::write(registry.entry_path("half"), "{\"version\":").unwrap();
        registry.put(&Entry { version: 99, ..entry("newer") }).unwrap();
        assert_eq!(registry.get("half").unwrap_err().kind(), ErrorKind::Damaged);
        assert_eq!(registry.get("newer").unwrap_err().kind(), ErrorKind::NewerFormat);
        assert_eq!(registry.list().unwrap().len(), 3);
        assert_eq!(registry.entries().unwrap().len(), 1);
    }

    #[test]
    fn one_supervisor_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Registry::new(dir.path()).unwrap().stage_dir(Uuid::from_u128(7));
        assert!(!stage.is_supervised());
        let lock = stage.try_lock().unwrap();
        assert!(lock.is_some() && stage.try_lock().unwrap().is_none() && stage.is_supervised());
        drop(lock);
        assert!(!stage.is_supervised());
    }

    #[test]
    fn whoever_asks_for_a_supervisor_keeps_none_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Registry::new(dir.path()).unwrap().stage_dir(Uuid::from_u128(7));
        drop(stage.try_lock().unwrap());
        let asking = {
            let stage = stage.clone();
            std::thread::spawn(move || (0..20_000).filter(|_| stage.is_supervised()).count())
        };
        while !asking.is_finished() {
            assert!(stage.try_lock().unwrap().is_some(), "the question was in the way");
        }
        asking.join().unwrap();
    }

    #[test]
    fn a_loss_is_accepted_once_and_in_this_boot() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Registry::new(dir.path()).unwrap().stage_dir(Uuid::from_u128(7));
        assert!(!stage.take_accept_loss());
        stage.put_accept_loss().unwrap();
        assert!(stage.take_accept_loss() && !stage.take_accept_loss());
        write_json(&stage.accept_loss_path(), &"another".to_owned()).unwrap();
        assert!(!stage.take_accept_loss() && !stage.accept_loss_path().exists());
    }

    #[test]
    fn what_another_boot_noted_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Registry::new(dir.path()).unwrap().stage_dir(Uuid::from_u128(7));
        stage.make().unwrap();
        let mut runtime = Runtime { boot_id: boot_id(), server_pid: 1, ..Runtime::default() };
        stage.put_runtime(&runtime).unwrap();
        assert_eq!(stage.runtime().unwrap().as_ref(), Some(&runtime));
        runtime.boot_id = "another".into();
        stage.put_runtime(&runtime).unwrap();
        assert_eq!(stage.runtime().unwrap(), None);
    }
}
