//! Devices that fail for a while.

use std::time::Duration;

use super::devices::{Mapped, ram_disks};
use super::numbered::Writer;
use super::support::{Place, wait_for};

const RAM: &str = "/dev/ram0";
const SECTORS: u64 = 16384;
/// Longest pause between two tries is 5 s.
const PATIENCE: Duration = Duration::from_secs(20);

fn healthy(place: &Place, wanted: &str) {
    let mut last = String::new();
    wait_for(&format!("health {wanted}"), PATIENCE, || {
        last = place.health("v");
        last == wanted
    });
}

fn problem(place: &Place) -> String {
    place.status("v")["stages"][0]["problem"].as_str().unwrap_or_default().to_owned()
}

fn backing_fails(fail: impl Fn(&Mapped)) {
    let place = Place::new("backing");
    ram_disks(1, 64);
    let backing = Mapped::over("backing", RAM, "linear");
    let (stage, path) = (place.path("stage"), backing.path());
    let args = ["create", "v", "--stage", &stage, "--stage-size", "32M", "--backing", &path, "--size", "32M"];
    place.tidegate(&[&args[..], &["--block-size", "512"]].concat());
    let device = place.attach("v");
    let mut writer = Writer::new(&device, SECTORS);
    writer.write_many(100);
    place.tidegate(&["flush", "v"]);

    fail(&backing);
    writer.write_many(200);
    healthy(&place, "degraded");
    assert!(!problem(&place).is_empty(), "degraded without a reason");
    let text = place.tidegate(&["status"]);
    assert!(text.contains("degraded"), "{text}");
    assert!(place.counter("v", "backing_errors") > 0);
    writer.write_many(100);
    // A server that dies meanwhile changes nothing.
    let (server, _) = place.processes("v");
    super::support::signal(server, "KILL");
    backing.heal(RAM);
    place.wait_for_new_server("v", server);
    writer.write_many(20);
    healthy(&place, "ok");

    fail(&backing);
    writer.write_many(50);
    healthy(&place, "degraded");
    backing.heal(RAM);
    healthy(&place, "ok");
    writer.verify(&device);
    place.tidegate(&["flush", "v"]);
    writer.verify(RAM);

    // Detached while nothing can be flushed: said, and kept in the stage.
    fail(&backing);
    writer.write_many(50);
    let writer = writer.closed();
    let said = place.refused(1, &["detach", "v"]);
    assert!(said.contains("stage"), "{said}");
    backing.heal(RAM);
    let device = place.attach("v");
    writer.verify(&device);
    place.detach("v");
    writer.verify(RAM);
    place.check_clean("v");
    backing.remove();
}

pub fn a_failing_backing_degrades_and_heals() {
    backing_fails(Mapped::break_down);
}

pub fn a_backing_that_refuses_writes_degrades_and_heals() {
    backing_fails(|backing| backing.refuse_writes(RAM));
}

fn on_failing_log(policy: &str) -> (Place, Mapped, Writer) {
    let place = Place::new("log");
    ram_disks(1, 48);
    let stage = Mapped::over("stage", RAM, "linear");
    let (stage_path, backing) = (stage.path(), place.path("v.img"));
    let args = ["create", "v", "--stage", &stage_path, "--backing", &backing, "--size", "32M"];
    place.tidegate(&[&args[..], &["--block-size", "512", "--on-log-error", policy]].concat());
    let device = place.attach("v");
    let mut writer = Writer::new(&device, SECTORS);
    writer.write_many(100);
    (place, stage, writer)
}

fn after_the_failure(place: &Place, stage: &Mapped, mut writer: Writer) {
    healthy(place, "ok");
    writer.write_many(50);
    let device = place.status("v")["volumes"][0]["device"].as_str().unwrap().to_owned();
    let backing = place.path("v.img");
    writer.verify(&device);
    let writer = writer.closed();
    place.detach("v");
    writer.verify(&backing);
    place.check_clean("v");
    stage.remove();
}

pub fn a_failing_log_stalls_writers() {
    let (place, stage, mut writer) = on_failing_log("stall");
    stage.break_down();
    let waiting = std::thread::spawn(move || {
        let outcome = writer.write();
        (writer, outcome)
    });
    healthy(&place, "log-error");
    assert!(!problem(&place).is_empty(), "a failing log without a reason");
    std::thread::sleep(Duration::from_secs(1));
    assert!(!waiting.is_finished(), "a write was acknowledged without a log");
    stage.heal(RAM);
    wait_for("the writer goes on", PATIENCE, || waiting.is_finished());
    let (writer, outcome) = waiting.join().unwrap();
    assert_eq!(outcome, Ok(101));
    after_the_failure(&place, &stage, writer);
}

pub fn a_failing_log_fails_writers_if_told_so() {
    let (place, stage, mut writer) = on_failing_log("fail");
    stage.break_down();
    let failed = writer.write();
    assert!(failed.is_err(), "a write was acknowledged without a log");
    healthy(&place, "log-error");
    stage.heal(RAM);
    healthy(&place, "ok");
    // What failed may be there or not; written again it is.
    writer.again();
    after_the_failure(&place, &stage, writer);
}
