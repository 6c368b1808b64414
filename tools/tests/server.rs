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
