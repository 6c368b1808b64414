//! The command as scripts see it: exit codes, messages, and that a refusal changes nothing. Everything here works
//! without ublk; what needs it is tested in the virtual machine.

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use support::{Bench, Loop, MIB, losetup_or_skip, mkfs_or_skip, snapshot};

const INVALID: i32 = 2;
const NOT_FOUND: i32 = 3;
const EXISTS: i32 = 4;
const BUSY: i32 = 5;
const PERMISSION: i32 = 6;
const FOREIGN: i32 = 7;
const WRONG_DEVICE: i32 = 8;
const NEWER: i32 = 9;
const DAMAGED: i32 = 10;
const NO_SPACE: i32 = 11;
const UNSUPPORTED: i32 = 12;

#[test]
fn create_makes_files_and_status_shows_them() {
    let bench = Bench::new();
    bench.ok(&[
        "create",
        "db",
        "--stage",
        "stage",
        "--backing",
        "backing",
        "--size",
        "64M",
        "--stage-size",
        "64M",
    ]);
    assert_eq!(bench.len("stage"), 64 * MIB);
    assert_eq!(bench.len("backing"), 64 * MIB + (64 << 10));
    let status = bench.json(&["status", "--json"]);
    let volume = &status["volumes"][0];
    assert_eq!(volume["name"], "db");
    assert_eq!(volume["state"], "detached");
    assert_eq!(volume["size_bytes"], 64 * MIB);
    assert!(volume["pid"].is_null() && volume["device"].is_null());
    assert_eq!(volume["stage"], bench.path("stage").to_str().unwrap());
    let text = bench.ok(&["status", "db"]);
    assert!(text.contains("64 MiB") && text.contains("detached"), "{text}");
    bench.ok(&["check", "db"]);
    let json = bench.json(&["check", "--stage", "stage", "--json"]);
    assert_eq!(json["result"], "clean");
    assert!(bench.json(&["inspect", "stage", "--json"])["structures"].as_array().unwrap().len() >= 4);
    assert_eq!(
        bench.json(&["status", "db", "--json"]).as_object().unwrap().keys().collect::<Vec<_>>(),
        ["problems", "stages", "volumes"]
    );
}

#[test]
fn a_second_volume_joins_the_stage_and_delete_takes_it_off() {
    let bench = Bench::with_volume();
    bench.ok(&["create", "two", "--stage", "stage", "--backing", "b2", "--size", "8M"]);
    let status = bench.json(&["status", "--json"]);
    assert_eq!(status["stages"].as_array().unwrap().len(), 1);
    assert_eq!(status["volumes"][0]["stage_uuid"], status["volumes"][1]["stage_uuid"]);
    let text = bench.ok(&["delete", "two"]);
    assert!(text.contains("stay on"), "{text}");
    assert!(bench.path("b2").exists(), "user files stay");
    bench.refused(&["status", "two"], NOT_FOUND, "no volume 'two'");
    // Nothing of ours is left on the backing: it can be used again without force.
    bench.ok(&["create", "three", "--stage", "stage", "--backing", "b2"]);
    bench.ok(&["delete", "three"]);
    bench.ok(&["delete", "db"]);
    assert!(bench.ok(&["status"]).contains("no volumes"));
}

#[test]
fn bad_arguments() {
    let bench = Bench::new();
    let with = |size: &'static str, more: &[&'static str]| {
        let mut args = vec!["create", "v", "--stage", "s", "--backing", "b", "--size", size];
        args.extend(more);
        args
    };
    bench.refused(&with("1000", &[]), INVALID, "multiple of its block size");
    bench.refused(&with("0", &[]), INVALID, "positive multiple");
    bench.refused(&with("-5", &[]), INVALID, "not a size");
    bench.refused(&with("1Q", &[]), INVALID, "not a size");
    bench.refused(&with("16E", &[]), INVALID, "size");
    bench.refused(&with("8E", &[]), INVALID, "largest volume");
    bench.refused(&with("1M", &["--block-size", "1000"]), INVALID, "power of two");
    bench.refused(&with("1M", &["--block-size", "8192"]), INVALID, "power of two");
    bench.refused(&with("1M", &["--ack", "maybe"]), INVALID, "maybe");
    bench.refused(&with("1M", &["--stage-size", "1M"]), INVALID, "too small");
    for name in ["", "../x", "-x", "a b", "é", &"x".repeat(65)] {
        bench.refused_any(
            &["create", "--stage", "s", "--backing", "b", "--size", "1M", "--", name],
            &[INVALID],
        );
    }
    bench.refused(&["create", "v", "--stage", "s", "--backing", "b"], INVALID, "--size");
    bench.refused(&["create", "v", "--stage", "no/s", "--backing", "b", "--size", "1M"], NOT_FOUND, "no");
    bench.refused(
        &["create", "v", "--stage", "/dev/no-such", "--backing", "b", "--size", "1M"],
        NOT_FOUND,
        "no device",
    );
    bench.refused(&["frobnicate"], INVALID, "frobnicate");
    bench.refused(&["check"], INVALID, "required");
}

#[test]
fn what_is_no_device_or_file() {
    let bench = Bench::new();
    fs::create_dir(bench.path("dir")).unwrap();
    bench.refused(&["create", "v", "--stage", "dir", "--backing", "b", "--size", "1M"], INVALID, "directory");
    bench.refused(&["create", "v", "--stage", "s", "--backing", "/dev/null"], INVALID, "character device");
    symlink("nowhere", bench.path("link")).unwrap();
    bench.refused(
        &["create", "v", "--stage", "link", "--backing", "b", "--size", "1M"],
        NOT_FOUND,
        "leads nowhere",
    );
}

#[test]
fn too_small() {
    let bench = Bench::new();
    bench.file("tiny", MIB);
    bench.refused(
        &["create", "v", "--stage", "tiny", "--backing", "b", "--size", "1M"],
        INVALID,
        "too small",
    );
    bench.refused(
        &["create", "v", "--stage", "s", "--backing", "tiny", "--size", "1M"],
        INVALID,
        "too small",
    );
    bench.file("empty", 0);
    bench.refused(&["create", "v", "--stage", "s", "--backing", "empty"], INVALID, "too small");
    bench.refused(
        &["create", "v", "--stage", "empty", "--backing", "b", "--size", "1M"],
        INVALID,
        "too small",
    );
}

#[test]
fn stage_and_backing_are_the_same() {
    let bench = Bench::new();
    bench.file("disk", 64 * MIB);
    symlink("disk", bench.path("soft")).unwrap();
    fs::hard_link(bench.path("disk"), bench.path("hard")).unwrap();
    for other in ["disk", "./disk", "soft", "hard"] {
        bench.refused(&["create", "v", "--stage", "disk", "--backing", other], INVALID, "same thing");
    }
    bench.refused(
        &["create", "v", "--stage", "new", "--backing", "new", "--size", "1M"],
        INVALID,
        "same thing",
    );
    if let Some(device) = losetup_or_skip(&bench.path("disk")) {
        bench.refused(&["create", "v", "--stage", &device.0, "--backing", "disk"], INVALID, "same thing");
        bench.refused(&["create", "v", "--stage", "disk", "--backing", "b", "--size", "1M"], BUSY, "loop");
    }
}

#[test]
fn devices_of_other_volumes() {
    let bench = Bench::with_volume();
    bench.refused(&["create", "db", "--stage", "s2", "--backing", "b2", "--size", "1M"], EXISTS, "already");
    bench.refused(
        &["create", "v", "--stage", "s2", "--backing", "backing"],
        EXISTS,
        "belongs to volume 'db'",
    );
    bench.refused(&["create", "v", "--stage", "s2", "--backing", "stage"], EXISTS, "belongs to volume 'db'");
    bench.refused(
        &["create", "v", "--stage", "backing", "--backing", "b2", "--size", "1M"],
        EXISTS,
        "backing of volume",
    );
    // From another state directory the label and the superblock tell.
    let other = bench.other_state();
    other.refused(&["create", "v", "--stage", "s2", "--backing", "backing"], FOREIGN, "backing label");
    other.refused(
        &["create", "v", "--stage", "s2", "--backing", "backing", "--size", "1M"],
        FOREIGN,
        "label",
    );
    other.refused(&["create", "v", "--stage", "s2", "--backing", "stage"], FOREIGN, "Tidegate stage");
    other.refused(
        &["create", "db", "--stage", "stage", "--backing", "b2", "--size", "1M"],
        EXISTS,
        "has a volume 'db'",
    );
}

#[test]
fn foreign_content_needs_force() {
    let bench = Bench::new();
    bench.file("fs", 64 * MIB);
    if mkfs_or_skip("mkfs.ext4", &["-q", "-F"], &bench.path("fs")) {
        bench.refused(&["create", "v", "--stage", "fs", "--backing", "b", "--size", "1M"], FOREIGN, "ext4");
        bench.refused(&["create", "v", "--stage", "s", "--backing", "fs"], FOREIGN, "--force");
        bench.ok(&["create", "kept", "--stage", "s", "--stage-size", "64M", "--backing", "fs", "--force"]);
        let found = bench.json(&["inspect", "fs", "--json"])["findings"].to_string();
        assert!(found.contains("ext4"), "a backing keeps its content: {found}");
        bench.ok(&["delete", "kept"]);
        bench.ok(&["create", "v", "--stage", "fs", "--backing", "b", "--size", "1M", "--force"]);
        let found = bench.json(&["inspect", "fs", "--json"])["findings"].to_string();
        assert!(!found.contains("ext4") && found.contains("Tidegate stage"), "{found}");
    }
    fs::write(bench.path("letter"), "dear diary ".repeat(10_000_000)).unwrap();
    bench.refused(
        &["create", "w", "--stage", "letter", "--backing", "b2", "--size", "1M"],
        FOREIGN,
        "unknown data",
    );
}

#[test]
fn mounted_devices() {
    let bench = Bench::new();
    bench.file("disk", 64 * MIB);
    if !mkfs_or_skip("mkfs.ext4", &["-q", "-F"], &bench.path("disk")) {
        return;
    }
    let Some(device) = losetup_or_skip(&bench.path("disk")) else { return };
    let Some(mount) = support::Mount::or_skip(&device, &bench.path("mnt")) else { return };
    let at = mount.0.to_str().unwrap().to_owned();
    bench.refused(
        &["create", "v", "--stage", &device.0, "--backing", "b", "--size", "1M", "--force"],
        BUSY,
        &at,
    );
    bench.refused(&["create", "v", "--stage", "s", "--backing", &device.0, "--force"], BUSY, &at);
}

#[test]
fn block_devices_work_and_are_exclusive() {
    let bench = Bench::new();
    bench.file("a", 64 * MIB);
    bench.file("b", 64 * MIB);
    let (Some(stage), Some(backing)) = (losetup_or_skip(&bench.path("a")), losetup_or_skip(&bench.path("b")))
    else {
        return;
    };
    bench.ok(&["create", "v", "--stage", &stage.0, "--backing", &backing.0]);
    bench.ok(&["check", "v"]);
    let _holder = fs::OpenOptions::new().read(true).open(&stage.0).unwrap();
    _holder.lock().unwrap();
    let text = bench.refused(
        &["create", "w", "--stage", &stage.0, "--backing", "b2", "--size", "1M"],
        BUSY,
        "in use",
    );
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    let _: (&Loop, &Loop) = (&stage, &backing);
}

#[test]
fn a_locked_stage_is_busy() {
    let bench = Bench::with_volume();
    let holder = fs::File::open(bench.path("stage")).unwrap();
    holder.lock().unwrap();
    bench.refused(
        &["create", "v", "--stage", "stage", "--backing", "b", "--size", "1M"],
        BUSY,
        "in use by process",
    );
    bench.refused(&["check", "db"], 2, "in use");
    bench.refused(&["delete", "db"], BUSY, "in use");
    bench.refused(&["flush", "db"], BUSY, "in use");
}

#[test]
fn unknown_names() {
    let bench = Bench::new();
    for command in ["attach", "detach", "status", "delete", "flush"] {
        bench.refused(&[command, "nobody"], NOT_FOUND, "no volume 'nobody'");
    }
    bench.refused(&["resize", "nobody", "1G"], NOT_FOUND, "no volume");
    bench.refused(&["check", "nobody"], 2, "no volume");
    bench.refused(&["check", "--stage", "nowhere"], 2, "does not exist");
    bench.refused(&["inspect", "nowhere"], NOT_FOUND, "does not exist");
    let with = Bench::with_volume();
    with.refused(&["detach", "db"], NOT_FOUND, "not attached");
}

#[test]
fn damaged_superblocks() {
    let bench = Bench::with_volume();
    // One copy may be torn by a crash in the middle of an update: said, and repaired by the next update.
    bench.flip("stage", 5000);
    let torn = "superblock copy 0 is damaged";
    assert!(bench.ok(&["check", "db"]).contains(torn));
    bench.ok(&["create", "two", "--stage", "stage", "--backing", "b2", "--size", "1M"]);
    assert!(!bench.ok(&["check", "db"]).contains(torn));
    // Two never are.
    bench.flip("stage", 5000);
    bench.flip("stage", (128 << 10) + 5000);
    bench.refused(&["check", "db"], 1, torn);
    bench.ok(&["flush", "db"]);
    assert!(!bench.ok(&["check", "db"]).contains(torn));
    // All copies: damaged, refused everywhere, not overwritten.
    let end = 64 * MIB - (256 << 10);
    for copy in [0, 128 << 10, end, end + (128 << 10)] {
        bench.flip("stage", copy + 5000);
    }
    bench.refused(&["check", "db"], 1, "damaged");
    bench.refused(&["flush", "db"], DAMAGED, "damaged");
    bench.refused(
        &["create", "v", "--stage", "stage", "--backing", "b3", "--size", "1M"],
        DAMAGED,
        "damaged",
    );
    assert_eq!(bench.json(&["status", "db", "--json"])["volumes"][0]["state"], "error");
    // Zeroed: not a stage at all.
    bench.file("stage", 64 * MIB);
    bench.refused(&["check", "db"], 2, "not a Tidegate stage");
    bench.refused(&["flush", "db"], NOT_FOUND, "not a Tidegate stage");
    // Cut off.
    let cut = Bench::with_volume();
    cut.truncate("stage", 32 * MIB);
    cut.refused(&["check", "db"], 2, "shrunk");
    cut.refused(&["flush", "db"], WRONG_DEVICE, "shrunk");
}

#[test]
fn a_stage_from_a_newer_version() {
    let bench = Bench::with_volume();
    bench.make_newer("stage");
    bench.refused(&["check", "db"], 2, "newer");
    bench.refused(&["flush", "db"], NEWER, "newer");
    bench.refused(&["create", "v", "--stage", "stage", "--backing", "b", "--size", "1M"], NEWER, "newer");
}

#[test]
fn another_stage_under_the_name() {
    let bench = Bench::with_volume();
    bench.ok(&["create", "o", "--stage", "s2", "--stage-size", "64M", "--backing", "b2", "--size", "1M"]);
    fs::rename(bench.path("s2"), bench.path("stage")).unwrap();
    bench.refused(&["flush", "db"], WRONG_DEVICE, "expected");
    assert_eq!(bench.json(&["status", "db", "--json"])["volumes"][0]["state"], "error");
}

#[test]
fn no_room_for_the_stage() {
    let bench = Bench::new();
    let args = ["create", "v", "--stage", "s", "--stage-size", "900T", "--backing", "b", "--size", "1M"];
    bench.refused(&args, NO_SPACE, "no room");
    if let Some(small) = support::Tmpfs::or_skip(&bench.path("small"), "32m") {
        let stage = small.0.join("s").display().to_string();
        bench.refused(
            &["create", "v", "--stage", &stage, "--backing", "b", "--size", "1M"],
            NO_SPACE,
            "no room",
        );
        assert_eq!(fs::read_dir(&small.0).unwrap().count(), 0);
    }
}

#[test]
fn attach_needs_root_and_ublk() {
    let bench = Bench::with_volume();
    if let Some(output) = bench.as_nobody(&["attach", "db"]) {
        assert_eq!(output.0, PERMISSION, "{}", output.1);
        assert!(output.1.contains("root") || output.1.contains("ermission"), "{}", output.1);
    }
    if std::path::Path::new("/dev/ublk-control").exists() {
        eprintln!("SKIPPED: this kernel has ublk, so its absence cannot be tested");
        return;
    }
    bench.refused(&["attach", "db"], UNSUPPORTED, "ublk_drv");
    bench.refused(&["attach", "db", "--foreground"], UNSUPPORTED, "ublk_drv");
    bench.refused(&["run", "try"], UNSUPPORTED, "ublk_drv");
    assert!(!bench.path("try").exists(), "nothing was made");
}

#[test]
fn nothing_without_permission() {
    let bench = Bench::with_volume();
    let Some((code, text)) =
        bench.as_nobody(&["create", "v", "--stage", "/tmp/x", "--backing", "/tmp/y", "--size", "1M"])
    else {
        return;
    };
    assert_eq!(code, PERMISSION, "{text}");
    let (code, text) = bench.as_nobody(&["inspect", bench.path("stage").to_str().unwrap()]).unwrap();
    assert_eq!(code, PERMISSION, "{text}");
}

#[test]
fn signals_while_creating_leave_nothing() {
    let bench = Bench::new();
    for signal in ["TERM", "INT", "HUP"] {
        let before = snapshot(&bench);
        let mut child = bench.spawn(&[
            "create",
            "v",
            "--stage",
            "s",
            "--stage-size",
            "2G",
            "--backing",
            "b",
            "--size",
            "1M",
        ]);
        std::thread::sleep(std::time::Duration::from_millis(150));
        support::signal(child.id(), signal);
        let status = child.wait().unwrap();
        if status.success() {
            eprintln!("SKIPPED: create was faster than SIG{signal}");
            bench.ok(&["delete", "v"]);
            fs::remove_file(bench.path("s")).unwrap();
            fs::remove_file(bench.path("b")).unwrap();
            continue;
        }
        assert_eq!(status.code(), Some(130), "SIG{signal}");
        assert_eq!(snapshot(&bench), before, "SIG{signal}");
    }
    let mut child =
        bench.spawn(&["create", "v", "--stage", "s", "--stage-size", "2G", "--backing", "b", "--size", "1M"]);
    std::thread::sleep(std::time::Duration::from_millis(150));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!bench.path("s").exists() || bench.len("s") == 2 << 30, "whole or not at all");
}

#[test]
fn resize_and_flush_without_a_server() {
    let bench = Bench::with_volume();
    bench.ok(&["flush", "db"]);
    bench.ok(&["resize", "db", "128M"]);
    assert_eq!(bench.json(&["status", "db", "--json"])["volumes"][0]["size_bytes"], 128 * MIB);
    assert!(bench.len("backing") >= 128 * MIB);
    bench.refused(&["resize", "db", "64M"], INVALID, "cannot shrink");
    bench.refused(&["resize", "db", "1000"], INVALID, "multiple");
}

#[test]
fn a_lost_stage_can_be_forgotten_with_force() {
    let bench = Bench::with_volume();
    fs::remove_file(bench.path("stage")).unwrap();
    bench.refused(&["delete", "db"], NOT_FOUND, "--force");
    bench.ok(&["delete", "db", "--force"]);
    bench.refused(&["status", "db"], NOT_FOUND, "no volume");
}

#[test]
fn a_lost_backing_does_not_hold_up_the_others() {
    let bench = Bench::with_volume();
    bench.ok(&["create", "two", "--stage", "stage", "--backing", "b2", "--size", "8M"]);
    fs::remove_file(bench.path("b2")).unwrap();
    bench.ok(&["flush", "db"]);
    bench.refused(&["delete", "two"], NOT_FOUND, "--force");
    bench.ok(&["delete", "two", "--force"]);
    assert_eq!(bench.json(&["check", "db", "--json"])["report"]["volumes"].as_array().unwrap().len(), 1);
    bench.ok(&["check", "db"]);
    bench.ok(&["create", "two", "--stage", "stage", "--backing", "b2", "--size", "8M"]);
}

#[test]
fn force_does_not_discard_for_the_sake_of_another_error() {
    let bench = Bench::with_volume();
    bench.ok(&["create", "two", "--stage", "stage", "--backing", "b2", "--size", "8M"]);
    // A wrong backing is as good as none; and the note says what happened.
    bench.file("b2", 9 * MIB);
    let said = bench.err(&["delete", "two", "--force"]);
    assert!(said.contains("discarded") && said.contains("not the backing"), "{said}");
    // All is well with the backing: what is wrong is said, and nothing is deleted.
    bench.make_newer("stage");
    let said = bench.err(&["delete", "db", "--force"]);
    assert!(said.contains("only the name was deleted") && said.contains("newer"), "{said}");
}

#[test]
fn the_error_of_a_stage_is_not_taken_for_that_of_a_backing() {
    let bench = Bench::with_volume();
    // An arena folder that anybody could have made: the stage cannot be opened, the backing is there.
    fs::create_dir(bench.path("arena")).unwrap();
    fs::set_permissions(bench.path("arena"), fs::Permissions::from_mode(0o777)).unwrap();
    bench.refused(&["flush", "db"], PERMISSION, "can be written to by others");
    bench.refused(&["delete", "db", "--force"], PERMISSION, "nothing is deleted");
    fs::set_permissions(bench.path("arena"), fs::Permissions::from_mode(0o700)).unwrap();
    bench.ok(&["flush", "db"]);
}

#[test]
fn a_watch_ends_with_its_reader() {
    use std::io::Read;
    let bench = Bench::with_volume();
    for json in [&[][..], &["--json"]] {
        let args = [&["status", "--watch"], json].concat();
        let mut child = bench.command(&args).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 8]).unwrap();
        drop(out);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(std::time::Instant::now() < deadline, "it goes on without a reader");
            std::thread::sleep(std::time::Duration::from_millis(50));
        };
        assert_eq!(status.code(), Some(0));
    }
}

#[test]
fn counters_are_unknown_without_a_server() {
    let bench = Bench::with_volume();
    let volume = bench.json(&["status", "db", "--json"])["volumes"][0].clone();
    for key in ["reads", "writes", "discards", "flushes", "read_bytes", "write_bytes", "link"] {
        assert!(volume[key].is_null(), "{key}: {volume}");
    }
}

#[test]
fn a_wrong_backing_is_not_entered() {
    let bench = Bench::with_volume();
    bench.ok(&["create", "two", "--stage", "stage", "--backing", "b2", "--size", "64M"]);
    bench.refused(&["attach", "db", "--backing", "b2"], 8, "volume 'two'");
    bench.file("blank", 80 * MIB);
    bench.refused(&["attach", "db", "--backing", "blank"], 8, "no label");
    bench.ok(&["check", "db"]);
}

#[test]
fn a_poll_is_some_microseconds_and_for_blocks() {
    let bench = Bench::with_volume();
    bench.refused(&["attach", "db", "--poll", "10001"], 2, "0..=10000");
    bench.refused(&["attach", "db", "--poll", "5", "--bytes"], 2, "cannot be used with");
}

#[test]
fn queues_are_few_and_for_blocks() {
    let bench = Bench::with_volume();
    bench.refused(&["attach", "db", "--queues", "0"], 2, "1..=4");
    bench.refused(&["attach", "db", "--queues", "5"], 2, "1..=4");
    bench.refused(&["attach", "db", "--queues", "2", "--bytes"], 2, "cannot be used with");
}

#[test]
fn help_documents_exit_codes_and_examples() {
    let bench = Bench::new();
    let help = bench.ok(&["--help"]);
    assert!(help.contains("Exit codes") && help.contains("Examples") && help.contains("wrong-device"));
    for command in
        ["create", "attach", "detach", "status", "check", "inspect", "run", "delete", "resize", "flush"]
    {
        assert!(help.contains(command));
        assert!(bench.ok(&[command, "--help"]).contains("xample"), "{command}");
    }
    assert!(bench.ok(&["completion", "bash"]).contains("complete"));
}
