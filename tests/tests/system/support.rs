//! What every test uses: a place of its own, commands with time limits, the `tidegate` command, cleaning up.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Everything the tests make is below it. In memory in the test machine.
const ROOT: &str = "/run/tidegate-system";
/// Longest that any one command may take.
const LIMIT: Duration = Duration::from_secs(60);
const MARK: &str = "tidegate-system-test";

/// What a test panics with that cannot run here.
pub struct Skipped(pub String);

/// Ends the test as ignored.
pub fn skip(why: impl Into<String>) -> ! {
    std::panic::resume_unwind(Box::new(Skipped(why.into())))
}

/// Whether tests can run here at all.
pub fn usable() -> Result<(), String> {
    if std::env::var_os("TIDEGATE_VM").is_none() {
        return Err(
            "they load modules and make devices, so they run in the test machine (tests/vm/run) only".into(),
        );
    }
    tidegate_ublk::ctrl::Control::open().map_err(|e| e.report())?;
    let program = program();
    if program.exists() { Ok(()) } else { Err(format!("{} is missing: build it first", program.display())) }
}

/// The `tidegate` command of the same build as this test.
pub fn program() -> PathBuf {
    std::env::var_os("TIDEGATE_BIN").map_or_else(
        || {
            let test = std::env::current_exe().unwrap();
            test.parent().and_then(Path::parent).unwrap().join("tidegate")
        },
        PathBuf::from,
    )
}

// ---- commands ----------------------------------------------------------------------------------------------------

/// How a command ended and what it said.
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

/// Runs a command to its end, which must come within `limit`.
pub fn run_limited(mut command: Command, limit: Duration) -> Ended {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    wait_limited(child, limit, &format!("{command:?}"))
}

/// Waits for a child with both outputs piped.
pub fn wait_limited(mut child: Child, limit: Duration, what: &str) -> Ended {
    fn reader(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut from) = from {
                let _ = from.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    let (out, err) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                panic!("not done after {} s: {what}", limit.as_secs());
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    Ended { status, out: out.join().unwrap(), err: err.join().unwrap() }
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    // There is no udev that device mapper could wait for.
    command.args(args).env("DM_DISABLE_UDEV", "1");
    command
}

/// Runs a program that must succeed; its standard output.
pub fn run(program: &str, args: &[&str]) -> String {
    let ended = run_limited(command(program, args), LIMIT);
    assert!(ended.status.success(), "{program} {args:?}: {}\n{}{}", ended.status, ended.out, ended.err);
    ended.out
}

/// Runs a program whose failure is no concern.
pub fn try_run(program: &str, args: &[&str]) -> bool {
    run_limited(command(program, args), LIMIT).status.success()
}

/// Runs a shell script that must succeed.
pub fn shell(script: &str) -> String {
    run("sh", &["-ec", script])
}

/// Starts a program in the background, both outputs piped.
pub fn start(program: &str, args: &[&str]) -> Child {
    let mut command = command(program, args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Waits for a child that must succeed.
pub fn finish(child: Child, limit: Duration, what: &str) -> String {
    let ended = wait_limited(child, limit, what);
    assert!(ended.status.success(), "{what}: {}\n{}{}", ended.status, ended.out, ended.err);
    ended.out
}

/// Arguments of fio for direct I/O with io_uring on `path`.
pub fn fio_args<'a>(path: &'a str, args: &[&'a str]) -> Vec<String> {
    let mut all = vec![format!("--filename={path}")];
    let common =
        ["--name=t", "--ioengine=io_uring", "--direct=1", "--group_reporting", "--verify_state_save=0"];
    all.extend(common.iter().chain(args).map(|a| (*a).to_owned()));
    all
}

/// Runs fio on `path`; it must see no error.
pub fn fio(path: &str, args: &[&str]) -> String {
    let args = fio_args(path, args);
    run("fio", &args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Starts fio on `path` in the background.
pub fn fio_start(path: &str, args: &[&str]) -> Child {
    let args = fio_args(path, args);
    start("fio", &args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Sends a signal to a process.
pub fn signal(pid: u64, name: &str) {
    run("kill", &[&format!("-{name}"), &pid.to_string()]);
}

/// Waits until `condition` holds, at most `limit`.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {} s for: {what}", limit.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process exists and is not a zombie.
pub fn is_alive(pid: u64) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

// ---- a place -----------------------------------------------------------------------------------------------------

/// State directory, arenas and files of one test.
pub struct Place {
    dir: PathBuf,
}

impl Place {
    /// An empty place.
    pub fn new(name: &str) -> Place {
        let dir = Path::new(ROOT).join(name);
        let _ = fs::remove_dir_all(&dir);
        for part in ["state", "arena", "mnt"] {
            fs::create_dir_all(dir.join(part)).unwrap();
        }
        Place { dir }
    }

    /// Path of something in it.
    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    /// The mount point.
    pub fn mount_point(&self) -> String {
        self.path("mnt")
    }

    /// The `tidegate` command.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(args);
        command.env("TIDEGATE_STATE_DIR", self.path("state")).env("TIDEGATE_ARENA_DIR", self.path("arena"));
        command.env("TIDEGATE_RUN_DIR", self.path("run"));
        command
    }

    /// Runs it to its end.
    pub fn try_tidegate(&self, args: &[&str]) -> Ended {
        run_limited(self.command(args), LIMIT)
    }

    /// Runs it; it must succeed. Its output without the last newline.
    pub fn tidegate(&self, args: &[&str]) -> String {
        let ended = self.try_tidegate(args);
        assert!(ended.status.success(), "tidegate {args:?}: {}\n{}{}", ended.status, ended.out, ended.err);
        ended.out.trim_end().to_owned()
    }

    /// Runs it; it must end with this code. What it said on standard error.
    pub fn refused(&self, code: i32, args: &[&str]) -> String {
        let ended = self.try_tidegate(args);
        assert_eq!(ended.status.code(), Some(code), "tidegate {args:?}\n{}{}", ended.out, ended.err);
        ended.err
    }

    /// Makes a volume with files `stage` and `NAME.img`.
    pub fn create(&self, name: &str, size: &str, stage_size: &str, more: &[&str]) {
        let (stage, backing) = (self.path("stage"), self.path(&format!("{name}.img")));
        let mut args = vec!["create", name, "--stage", &stage, "--backing", &backing, "--size", size];
        if !Path::new(&stage).exists() {
            args.extend(["--stage-size", stage_size]);
        }
        args.extend(more);
        self.tidegate(&args);
    }

    /// Attaches; the device.
    pub fn attach(&self, name: &str) -> String {
        let device = self.tidegate(&["attach", name]);
        assert!(device.starts_with("/dev/ublkb"), "{device}");
        device
    }

    /// Detaches.
    pub fn detach(&self, name: &str) {
        self.tidegate(&["detach", name]);
    }

    /// `status NAME --json`.
    pub fn status(&self, name: &str) -> Value {
        serde_json::from_str(&self.tidegate(&["status", name, "--json"])).unwrap()
    }

    /// State of a volume.
    pub fn state(&self, name: &str) -> String {
        self.status(name)["volumes"][0]["state"].as_str().unwrap().to_owned()
    }

    /// Health of its stage.
    pub fn health(&self, name: &str) -> String {
        self.status(name)["stages"][0]["status"]["health"].as_str().unwrap_or("no server").to_owned()
    }

    /// A number in the status of its stage.
    pub fn counter(&self, name: &str, key: &str) -> u64 {
        let status = self.status(name);
        status["stages"][0]["status"][key].as_u64().unwrap_or_else(|| panic!("no {key} in {status}"))
    }

    /// Process ids of server and supervisor.
    pub fn processes(&self, name: &str) -> (u64, u64) {
        let status = self.status(name);
        let stage = &status["stages"][0];
        let pid = |key: &str| stage[key].as_u64().unwrap_or_else(|| panic!("no {key} in {status}"));
        (pid("pid"), pid("supervisor_pid"))
    }

    /// Kills supervisor and server, as the out-of-memory killer in a bad mood would.
    pub fn kill_all(&self, name: &str) {
        let (server, supervisor) = self.processes(name);
        run("kill", &["-9", &supervisor.to_string(), &server.to_string()]);
        wait_for("the server is gone", Duration::from_secs(10), || {
            !is_alive(server) && !is_alive(supervisor)
        });
    }

    /// Waits until a server other than `old` serves the volume's device.
    pub fn wait_for_new_server(&self, name: &str, old: u64) -> u64 {
        let mut pid = 0;
        wait_for("another server", Duration::from_secs(25), || {
            let status = self.status(name);
            let volume = &status["volumes"][0];
            pid = volume["pid"].as_u64().unwrap_or(0);
            pid != 0 && pid != old && volume["state"] == "attached"
        });
        pid
    }

    /// `check` finds nothing.
    pub fn check_clean(&self, name: &str) {
        self.tidegate(&["check", name]);
    }

    /// `check` finds damage.
    pub fn check_damaged(&self, name: &str) {
        self.refused(1, &["check", name]);
    }

    /// Files in the arena directory.
    pub fn arenas(&self) -> Vec<PathBuf> {
        fs::read_dir(self.path("arena")).unwrap().flatten().map(|e| e.path()).collect()
    }
}

// ---- the kernel's log --------------------------------------------------------------------------------------------

/// Notes in the kernel's log that a test begins.
pub fn mark_kernel_log(name: &str) {
    if let Ok(mut log) = fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one line there.
        let _ = log.write_all(format!("{MARK}: {name}").as_bytes());
    }
}

fn kernel_log() -> Vec<String> {
    let log = run("dmesg", &[]);
    let lines: Vec<&str> = log.lines().collect();
    let start = lines.iter().rposition(|l| l.contains(MARK)).map_or(0, |at| at + 1);
    lines[start..].iter().map(|l| (*l).to_owned()).collect()
}

/// The kernel has complained about no ublk device since the test began.
pub fn kernel_saw_no_error() {
    let bad = |l: &&String| {
        let l = l.to_lowercase();
        l.contains("ublkb")
            && ["error", "lost", "corrupt", "timeout", "timed out"].iter().any(|w| l.contains(w))
    };
    let log = kernel_log();
    let found: Vec<&String> = log.iter().filter(bad).collect();
    assert!(found.is_empty(), "the kernel's log: {found:#?}");
}

// ---- before and after --------------------------------------------------------------------------------------------

/// After a failure: the end of the servers' logs and of the kernel's.
pub fn show_logs() {
    println!(
        "{}",
        // By name: whoever looks around may get to a mount whose device waits for ever.
        shell(&format!(
            "for f in {ROOT}/*/state/stages/*/*.log; do echo \"-- $f\"; tail -n 25 $f || true; done"
        ))
    );
    println!("-- kernel");
    kernel_log().iter().rev().take(15).rev().for_each(|l| println!("{l}"));
}

/// Ublk devices there are.
pub fn ublk_devices() -> Vec<u32> {
    tidegate_ublk::list().unwrap_or_default()
}

/// Removes the devices of servers that were killed, and with them whatever was in flight: as a power cut does.
pub fn remove_devices() {
    for id in ublk_devices() {
        // The kernel notices the end of a server a moment after it.
        wait_for("a device without a server can be removed", Duration::from_secs(10), || {
            tidegate_ublk::delete(id).is_ok()
        });
    }
}

/// Processes of the `tidegate` command.
pub fn servers() -> Vec<u64> {
    let pids =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u64>().ok());
    pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "tidegate"))
        .filter(|pid| is_alive(*pid))
        .collect()
}

/// Everything that served `place` has ended, and left nothing behind. Processes end a moment after the command.
pub fn nothing_is_left(place: &Place) {
    let limit = Duration::from_secs(5);
    wait_for("no server and no supervisor", limit, || servers().is_empty());
    assert_eq!(ublk_devices(), [0; 0]);
    assert!(place.arenas().is_empty(), "{:?}", place.arenas());
}

/// Removes everything a test left, whether it failed or not.
pub fn clean_up() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for point in mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|p| p.starts_with(ROOT)) {
        try_run("umount", &["-q", "-l", point]);
    }
    for pid in servers() {
        try_run("kill", &["-9", &pid.to_string()]);
    }
    for id in ublk_devices() {
        let deadline = Instant::now() + Duration::from_secs(5);
        while tidegate_ublk::delete(id).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    super::devices::clean_up();
    let _ = fs::remove_dir_all(ROOT);
}
