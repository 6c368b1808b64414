//! A directory to work in, the command, and what root can set up.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;
use tidegate_driver::base::checksum::crc64_salted;
use tidegate_driver::format::superblock::SUPERBLOCK_BYTES;

pub const MIB: u64 = 1 << 20;

/// A directory with a state directory of its own.
pub struct Bench {
    dir: std::sync::Arc<TempDir>,
    state: PathBuf,
}

impl Bench {
    pub fn new() -> Bench {
        let dir = std::sync::Arc::new(tempfile::tempdir().expect("a temporary directory"));
        Bench { state: dir.path().join("state"), dir }
    }

    /// With volume `db` of 64 MiB on a stage of 64 MiB.
    pub fn with_volume() -> Bench {
        let bench = Bench::new();
        bench.ok(&[
            "create",
            "db",
            "--stage",
            "stage",
            "--stage-size",
            "64M",
            "--backing",
            "backing",
            "--size",
            "64M",
        ]);
        bench
    }

    /// Same files, another state directory.
    pub fn other_state(&self) -> Bench {
        Bench { dir: self.dir.clone(), state: self.dir.path().join("state2") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.dir.path()).unwrap().join(name)
    }

    pub fn state(&self) -> &Path {
        &self.state
    }

    pub fn len(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().len()
    }

    /// An empty file in place of whatever was there.
    pub fn file(&self, name: &str, bytes: u64) {
        File::create(self.path(name)).unwrap().set_len(bytes).unwrap();
    }

    pub fn truncate(&self, name: &str, bytes: u64) {
        OpenOptions::new().write(true).open(self.path(name)).unwrap().set_len(bytes).unwrap();
    }

    pub fn flip(&self, name: &str, at: u64) {
        let file = OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }

    /// Raises the version in all superblock copies and seals them again.
    pub fn make_newer(&self, name: &str) {
        let file = OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap();
        let end = (self.len(name) & !0xffff) - (256 << 10);
        for at in [0, 128 << 10, end, end + (128 << 10)] {
            let mut copy = vec![0; SUPERBLOCK_BYTES];
            file.read_exact_at(&mut copy, at).unwrap();
            copy[16] += 1;
            let crc = crc64_salted(0, &copy[8..]);
            copy[..8].copy_from_slice(&crc.to_le_bytes());
            file.write_all_at(&copy, at).unwrap();
        }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command
            .arg("--state-dir")
            .arg(&self.state)
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command.env("TIDEGATE_ARENA_DIR", self.dir.path().join("arena"));
        command
    }

    pub fn spawn(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (status.code().expect("ended by itself"), text(stdout), text(stderr))
    }

    /// Must succeed; standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let (code, out, err) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {out}{err}");
        out
    }

    /// Must succeed; standard error.
    pub fn err(&self, args: &[&str]) -> String {
        let (code, out, err) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {out}{err}");
        err
    }

    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// Must fail with `code`, say `word` on standard error, and change nothing.
    pub fn refused(&self, args: &[&str], code: i32, word: &str) -> String {
        let before = snapshot(self);
        let (got, out, err) = self.run(args);
        assert_eq!(got, code, "{args:?}: {out}{err}");
        assert!(err.contains(word) || out.contains(word), "{args:?} does not say '{word}': {out}{err}");
        assert!(!err.is_empty() || code == 1, "{args:?} says nothing");
        let after = snapshot(self);
        assert_eq!(after, before, "{args:?} changed something");
        err
    }

    pub fn refused_any(&self, args: &[&str], codes: &[i32]) {
        let before = snapshot(self);
        let (got, out, err) = self.run(args);
        assert!(codes.contains(&got), "{args:?}: {got} {out}{err}");
        assert_eq!(snapshot(self), before, "{args:?} changed something");
    }

    /// Exit code and standard error as an ordinary user; `None`, loudly, if this is not root.
    pub fn as_nobody(&self, args: &[&str]) -> Option<(i32, String)> {
        if !is_root() {
            eprintln!("SKIPPED: needs root to become somebody else");
            return None;
        }
        let exe = self.dir.path().join("tidegate");
        fs::copy(env!("CARGO_BIN_EXE_tidegate"), &exe).unwrap();
        for path in [self.dir.path(), &exe] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let output = Command::new(exe)
            .arg("--state-dir")
            .arg(&self.state)
            .args(args)
            .uid(65534)
            .gid(65534)
            .output()
            .unwrap();
        Some((output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap()))
    }
}

/// Checksums of everything in the bench's directory but locks.
pub fn snapshot(bench: &Bench) -> BTreeMap<PathBuf, u64> {
    fn walk(dir: &Path, into: &mut BTreeMap<PathBuf, u64>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() {
                walk(&path, into);
            } else if kind.is_symlink() {
                into.insert(path, 0);
            } else if kind.is_file() && !path.ends_with("lock") && !path.ends_with("supervisor.lock") {
                into.insert(path.clone(), crc64_salted(0, &fs::read(&path).unwrap()));
            }
        }
    }
    let mut files = BTreeMap::new();
    walk(bench.dir.path(), &mut files);
    files
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

pub fn signal(pid: u32, name: &str) {
    let signal: nix::sys::signal::Signal = format!("SIG{name}").parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

fn tool(name: &str) -> Option<PathBuf> {
    let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .map(|d| Path::new(d).join(name))
        .into_iter()
        .find(|p| p.exists());
    if found.is_none() {
        eprintln!("SKIPPED: {name} is not installed");
    }
    found
}

/// Runs a tool that may not work here. Its standard output.
fn attempt(name: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(tool(name)?).args(args).output().ok()?;
    if !output.status.success() {
        eprintln!("SKIPPED: {name} {args:?} does not work here: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub fn mkfs_or_skip(name: &str, args: &[&str], path: &Path) -> bool {
    let mut all = args.to_vec();
    all.push(path.to_str().unwrap());
    attempt(name, &all).is_some()
}

/// A loop device, while it lives.
pub struct Loop(pub String);

pub fn losetup_or_skip(file: &Path) -> Option<Loop> {
    attempt("losetup", &["-f", "--show", file.to_str().unwrap()]).map(Loop)
}

impl Drop for Loop {
    fn drop(&mut self) {
        attempt("losetup", &["-d", &self.0]);
    }
}

/// A mount, while it lives.
pub struct Mount(pub PathBuf);

impl Mount {
    pub fn or_skip(device: &Loop, at: &Path) -> Option<Mount> {
        fs::create_dir_all(at).unwrap();
        attempt("mount", &[&device.0, at.to_str().unwrap()]).map(|_| Mount(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        attempt("umount", &[self.0.to_str().unwrap()]);
    }
}

/// A small file system in memory, while it lives.
pub struct Tmpfs(pub PathBuf);

impl Tmpfs {
    pub fn or_skip(at: &Path, size: &str) -> Option<Tmpfs> {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={size}");
        attempt("mount", &["-t", "tmpfs", "-o", &options, "none", at.to_str().unwrap()])
            .map(|_| Tmpfs(at.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        attempt("umount", &[self.0.to_str().unwrap()]);
    }
}

/// A directory that cannot be written to, while it lives.
pub struct ReadOnly(PathBuf);

impl ReadOnly {
    pub fn or_skip(dir: &Path) -> Option<ReadOnly> {
        let path = dir.to_str().unwrap();
        attempt("mount", &["--bind", path, path])?;
        let made = ReadOnly(dir.to_owned());
        attempt("mount", &["-o", "remount,ro,bind", path]).map(|_| made)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        attempt("umount", &[self.0.to_str().unwrap()]);
    }
}
