//! What the device tests share: a server of their own, data to serve, fio.

use std::fs;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use tidegate_driver::base::ErrorKind;
use tidegate_ublk::{ctrl::Control, delete, list, state};

pub struct Skipped(pub String);

pub fn skip(why: impl Into<String>) -> ! {
    std::panic::resume_unwind(Box::new(Skipped(why.into())))
}

/// After a failure: no server, no device, nothing mounted.
pub fn clean_up() {
    let _ = Command::new("umount").args(["-q", "-l"]).arg(mount_dir()).status();
    for id in list().unwrap_or_default() {
        if let Some(pid) = state(id).ok().and_then(|s| s.server_pid) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        for _ in 0..100 {
            if delete(id).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

// ---- the server --------------------------------------------------------------------------------------------------

pub struct Server {
    pub child: Child,
    pub input: ChildStdin,
    pub output: BufReader<ChildStdout>,
    pub id: u32,
    pub path: PathBuf,
    pub user_copy: bool,
}

pub fn spawn(args: &[&str]) -> (Child, ChildStdin, BufReader<ChildStdout>, String) {
    let program = std::env::var_os("TIDEGATE_RAMDISK").map_or_else(
        || std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples/ramdisk"),
        PathBuf::from,
    );
    let mut child = Command::new(&program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| {
            panic!("cannot run {}: {e}; build it with `cargo build --examples`", program.display())
        });
    let input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    (child, input, output, line)
}

impl Server {
    pub fn start(args: &[&str]) -> Server {
        let (child, input, output, line) = spawn(args);
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("ready"), "{args:?}: {line}");
        let id = words.next().unwrap().parse().unwrap();
        let path = PathBuf::from(words.next().unwrap());
        let user_copy = words.next() == Some("user_copy=true");
        Server { child, input, output, id, path, user_copy }
    }

    pub fn ask(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub fn stop(mut self) {
        assert_eq!(self.ask("stop"), "ok stopped");
        assert!(self.child.wait().unwrap().success());
        assert!(!self.path.exists());
        assert_eq!(state(self.id).unwrap_err().kind(), ErrorKind::NotFound);
    }

    pub fn kill(mut self) -> u32 {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.id
    }

    pub fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new("timeout").arg("200").arg(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}{errors}", output.status);
    text
}

/// A file for the server's data, in memory, gone after the test.
pub struct Data(pub PathBuf);

impl Data {
    pub fn new(name: &str) -> Data {
        let path = Path::new("/dev/shm").join(format!("tidegate-ublk-{name}"));
        let _ = fs::remove_file(&path);
        Data(path)
    }
    pub fn arg(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

pub fn mount_dir() -> PathBuf {
    let dir = PathBuf::from("/tmp/tidegate-ublk-mount");
    fs::create_dir_all(&dir).unwrap();
    dir
}

pub fn fio(path: &str, args: &[&str]) -> Vec<String> {
    let mut all = vec![format!("--filename={path}")];
    all.extend(
        ["--name=t", "--ioengine=io_uring", "--direct=1", "--group_reporting", "--verify_state_save=0"]
            .map(str::to_owned),
    );
    all.extend(args.iter().map(|a| (*a).to_owned()));
    all
}

pub fn fio_run(path: &str, args: &[&str]) {
    let args = fio(path, args);
    run("fio", &args.iter().map(String::as_str).collect::<Vec<_>>());
}

pub fn open_disk(path: &Path, write: bool) -> fs::File {
    fs::OpenOptions::new().read(true).write(write).open(path).unwrap()
}

pub fn size_of_disk(path: &Path) -> u64 {
    open_disk(path, false).seek(SeekFrom::End(0)).unwrap()
}

pub fn kernel_has(flag: u64) -> bool {
    Control::open().unwrap().features().unwrap() & flag != 0
}
