//! The server and its supervisor, as far as they go without ublk: a server without devices serves the socket all the same.

mod support;

use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Bench, MIB, signal};

const BUSY: i32 = 5;

/// A process that is ended when the test is over, however it ends.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            signal(self.0.id(), "TERM");
            let _ = self.0.wait();
        }
    }
}

fn uuid(bench: &Bench) -> String {
    bench.json(&["status", "--json"])["stages"][0]["uuid"].as_str().unwrap().to_owned()
}

fn start(bench: &Bench, command: &str) -> Process {
    let process = Process(bench.spawn(&[command, &uuid(bench)]));
    pid_other_than(bench, None);
    process
}

fn stage(bench: &Bench) -> Value {
    bench.json(&["status", "--json"])["stages"][0].clone()
}

/// Waits for a server whose process id is not `old`.
fn pid_other_than(bench: &Bench, old: Option<u32>) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(pid) = stage(bench)["pid"].as_u64().map(|p| p as u32).filter(|p| Some(*p) != old) {
            return pid;
        }
        assert!(Instant::now() < deadline, "no server: {}", stage(bench));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn commands_go_through_a_running_server() {
    let bench = Bench::with_volume();
    let _server = start(&bench, "serve");
    assert_eq!(bench.json(&["status", "db", "--json"])["volumes"][0]["state"], "detached");
    bench.ok(&["create", "two", "--stage", "stage", "--backing", "b2", "--size", "8M"]);
    bench.refused(&["create", "three", "--stage", "stage", "--backing", "b2"], 4, "belongs to volume 'two'");
    bench.ok(&["flush", "two"]);
    bench.ok(&["resize", "two", "16M"]);
    let listing = bench.json(&["status", "two", "--json"]);
    assert_eq!(listing["volumes"][0]["size_bytes"], 16 * MIB);
    bench.ok(&["delete", "two"]);
    bench.refused(&["check", "db"], 2, "in use by process");
    bench.refused(&["status", "two"], 3, "no volume");
}

#[test]
fn signals_end_a_server_in_order_and_hangups_do_not() {
    for name in ["TERM", "INT"] {
        let bench = Bench::with_volume();
        let mut server = start(&bench, "serve");
        signal(server.0.id(), "HUP");
        std::thread::sleep(Duration::from_millis(100));
        pid_other_than(&bench, None);
        signal(server.0.id(), name);
        assert_eq!(server.0.wait().unwrap().code(), Some(0), "SIG{name}");
        assert!(stage(&bench)["pid"].is_null());
        bench.ok(&["check", "db"]);
    }
}

#[test]
fn a_killed_server_is_started_again_and_an_ended_one_is_not() {
    let bench = Bench::with_volume();
    let mut supervisor = start(&bench, "supervise");
    let mut pid = pid_other_than(&bench, None);
    assert_ne!(pid, supervisor.0.id());
    assert_eq!(stage(&bench)["supervisor_pid"], supervisor.0.id());
    for _ in 0..2 {
        signal(pid, "KILL");
        pid = pid_other_than(&bench, Some(pid));
    }
    signal(supervisor.0.id(), "HUP");
    // The end in order reaches the supervisor through its server.
    signal(pid, "TERM");
    assert_eq!(supervisor.0.wait().unwrap().code(), Some(0));
    assert!(stage(&bench)["pid"].is_null());
}

#[test]
fn the_supervisor_hands_sigterm_on() {
    let bench = Bench::with_volume();
    let mut supervisor = start(&bench, "supervise");
    signal(supervisor.0.id(), "TERM");
    assert_eq!(supervisor.0.wait().unwrap().code(), Some(0));
    assert!(stage(&bench)["pid"].is_null());
}

#[test]
fn one_server_per_stage() {
    let bench = Bench::with_volume();
    let _supervisor = start(&bench, "supervise");
    let uuid = uuid(&bench);
    let mut second = bench.spawn(&["supervise", &uuid]);
    assert_eq!(second.wait().unwrap().code(), Some(75), "the first one is at it");
    // Under another state directory the lock on the stage decides.
    let other = bench.other_state();
    let entry = std::fs::read(bench.state().join("volumes/db.json")).unwrap();
    std::fs::create_dir_all(other.state().join("volumes")).unwrap();
    std::fs::write(other.state().join("volumes/db.json"), entry).unwrap();
    let mut third = other.spawn(&["supervise", &uuid]);
    assert_eq!(third.wait().unwrap().code(), Some(BUSY));
    let problem = stage(&other)["problem"].as_str().unwrap().to_owned();
    assert!(problem.contains("in use by process"), "{problem}");
}

#[test]
fn a_server_that_cannot_start_says_why_once() {
    let bench = Bench::with_volume();
    let uuid = uuid(&bench);
    std::fs::remove_file(bench.path("stage")).unwrap();
    let begun = Instant::now();
    let mut supervisor = bench.spawn(&["supervise", &uuid]);
    assert_eq!(supervisor.wait().unwrap().code(), Some(3));
    assert!(begun.elapsed() < Duration::from_secs(5), "no restarts");
    let volume = bench.json(&["status", "db", "--json"])["volumes"][0].clone();
    assert_eq!(volume["state"], "error");
    assert!(volume["problem"].as_str().unwrap().contains("does not exist"), "{volume}");
}

#[test]
fn a_supervisor_gives_up_on_a_stage_that_is_gone_where_no_device_waits() {
    let bench = Bench::with_volume();
    let mut supervisor = start(&bench, "supervise");
    let pid = pid_other_than(&bench, None);
    std::fs::rename(bench.path("stage"), bench.path("away")).unwrap();
    signal(pid, "KILL");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !stage(&bench)["pid"].is_null() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    // While it still tries, it can be found.
    assert_eq!(stage(&bench)["supervisor_pid"], supervisor.0.id());
    assert_eq!(supervisor.0.wait().unwrap().code(), Some(3), "it says why");
    assert!(stage(&bench)["supervisor_pid"].is_null());
    bench.ok(&["delete", "db", "--force"]);
}

#[test]
fn a_state_directory_that_cannot_be_written_to_ends_no_server() {
    let bench = Bench::with_volume();
    let Some(_state) = support::ReadOnly::or_skip(bench.state()) else { return };
    let mut server = Process(bench.spawn(&["serve", &uuid(&bench)]));
    std::thread::sleep(Duration::from_secs(1));
    assert!(matches!(server.0.try_wait(), Ok(None)), "it serves without a socket");
    signal(server.0.id(), "TERM");
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_later_server_looks_for_the_arena_where_the_one_before_had_it() {
    let bench = Bench::with_volume();
    bench.ok(&["create", "m", "--stage", "stage", "--backing", "b2", "--size", "8M", "--ack", "memory"]);
    let server = start(&bench, "serve");
    signal(server.0.id(), "KILL");
    drop(server);
    // Told another place: the noted one counts as long as there is an arena in it.
    let elsewhere = bench.path("elsewhere");
    let flush = || bench.command(&["flush", "m"]).env("TIDEGATE_ARENA_DIR", &elsewhere).output().unwrap();
    std::fs::rename(bench.path("arena"), bench.path("hidden")).unwrap();
    let lost = flush();
    let said = String::from_utf8(lost.stderr).unwrap();
    assert_eq!(lost.status.code(), Some(13), "{said}");
    for path in [bench.path("arena"), elsewhere.clone()] {
        assert!(said.contains(path.to_str().unwrap()), "{said}");
    }
    std::fs::rename(bench.path("hidden"), bench.path("arena")).unwrap();
    let found = flush();
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    assert!(!elsewhere.exists());
}

#[test]
fn a_permission_to_lose_is_used_up_by_the_next_server() {
    let bench = Bench::with_volume();
    bench.ok(&["create", "m", "--stage", "stage", "--backing", "b2", "--size", "8M", "--ack", "memory"]);
    let server = start(&bench, "serve");
    signal(server.0.id(), "KILL");
    drop(server);
    std::fs::remove_dir_all(bench.path("arena")).unwrap();
    let uuid = uuid(&bench);
    assert_eq!(bench.spawn(&["serve", &uuid]).wait().unwrap().code(), Some(13));
    let marker = bench.state().join("stages").join(&uuid).join("accept-loss");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(&marker, format!("\"{}\"", boot.trim())).unwrap();
    let _server = start(&bench, "serve");
    assert!(!marker.exists());
}

#[test]
fn nonsense_on_the_socket_harms_nobody() {
    use std::io::{Read, Write};
    let bench = Bench::with_volume();
    let _server = start(&bench, "serve");
    let socket = bench.state().join("stages").join(uuid(&bench)).join("control.sock");
    for line in ["\n", "{}\n", "\0\0\0\n", "{\"version\":9,\"request\":\"status\"}\n"] {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("\"error\""), "{line:?}: {answer}");
    }
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    pid_other_than(&bench, None);
}
