//! Devices on a real kernel: needs root and a kernel with ublk, so run it in the test machine (`tests/vm/run`).
//! Elsewhere every test is reported as ignored, with the reason.
//!
//! The server is a process of its own (`examples/ramdisk.rs`), because most tests kill it. Tests run one after the other.
//! Arguments: parts of names of tests to run.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tidegate_driver::base::ErrorKind;
use tidegate_ublk::{Status, ctrl::Control, delete, list, size_bytes, state, sys};

#[path = "device/support.rs"]
mod support;

use support::*;

type Test = (&'static str, fn());

const TESTS: &[Test] = &[
    ("features_are_understood", features_are_understood),
    ("data_survives_on_every_path", data_survives_on_every_path),
    ("a_file_system_lives_on_it", a_file_system_lives_on_it),
    ("large_requests_and_two_queues", large_requests_and_two_queues),
    ("discards_zero", discards_zero),
    ("a_backing_that_only_discards", a_backing_that_only_discards),
    ("flushes_arrive_only_with_a_volatile_cache", flushes_arrive_only_with_a_volatile_cache),
    ("a_killed_server_is_only_a_pause", a_killed_server_is_only_a_pause),
    ("only_the_owner_recovers", only_the_owner_recovers),
    ("a_quiesced_device_changes_hands", a_quiesced_device_changes_hands),
    ("a_mounted_device_is_not_stopped", a_mounted_device_is_not_stopped),
    ("an_open_device_is_not_stopped", an_open_device_is_not_stopped),
    ("it_grows_while_live", it_grows_while_live),
    ("a_door_that_does_not_open_leaves_nothing", a_door_that_does_not_open_leaves_nothing),
    ("a_device_removed_from_outside_ends_the_server", a_device_removed_from_outside_ends_the_server),
    ("idle_is_idle", idle_is_idle),
    ("attach_and_detach_a_hundred_times", attach_and_detach_a_hundred_times),
];

fn main() {
    // Arguments of the usual test harness are accepted and have no meaning here.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if std::env::args().any(|a| a == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let tests: Vec<&Test> = TESTS
        .iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())))
        .collect();
    println!("\nrunning {} tests", tests.len());
    if let Err(e) = Control::open() {
        if std::env::var_os("TIDEGATE_TESTS_LATER").is_some() {
            println!(
                "\nlater, in the test machine: device tests\ntest result: ok. 0 passed; 0 failed; 0 ignored"
            );
            return;
        }
        for (name, _) in &tests {
            println!("test {name} ... ignored");
        }
        println!("\nSKIPPED: all {} device tests: {}\n", tests.len(), e.report());
        println!("test result: ok. 0 passed; 0 failed; {} ignored", tests.len());
        return;
    }
    let (mut passed, mut failed, mut ignored) = (0, Vec::new(), 0);
    for (name, test) in tests {
        print!("test {name} ... ");
        std::io::stdout().flush().unwrap();
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(test);
        let seconds = start.elapsed().as_secs_f32();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("ok ({seconds:.1} s)");
            }
            Err(panic) => match panic.downcast_ref::<Skipped>() {
                Some(Skipped(why)) => {
                    ignored += 1;
                    println!("ignored\nSKIPPED: {name}: {why}");
                }
                None => {
                    failed.push(*name);
                    println!("FAILED ({seconds:.1} s)");
                    clean_up();
                }
            },
        }
    }
    let result = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("\ntest result: {result}. {passed} passed; {} failed; {ignored} ignored", failed.len());
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
        std::process::exit(1);
    }
}

// ---- tests -------------------------------------------------------------------------------------------------------

fn features_are_understood() {
    let features = Control::open().unwrap().features().unwrap();
    println!("features {features:#x}");
    let needed =
        sys::F_USER_RECOVERY | sys::F_USER_RECOVERY_REISSUE | sys::F_CMD_IOCTL_ENCODE | sys::F_USER_COPY;
    assert_eq!(features & needed, needed);
}

fn data_survives_on_every_path() {
    let verify = ["--bs=512-64k", "--rw=randwrite", "--verify=crc32c", "--iodepth=16", "--size=24m"];
    for door in ["ram", "file"] {
        for copy in [false, true] {
            let data = Data::new("paths");
            let mut args = vec!["--door", door, "--file", data.arg(), "--size-mib", "64"];
            if copy {
                args.push("--copy");
            }
            let server = Server::start(&args);
            assert_eq!(server.user_copy, !copy);
            fio_run(server.path(), &verify);
            server.stop();
        }
    }
}

fn a_file_system_lives_on_it() {
    for copy in [false, true] {
        let data = Data::new("ext4");
        let mut args = vec!["--file", data.arg(), "--size-mib", "128", "--block", "4096"];
        if copy {
            args.push("--copy");
        }
        let server = Server::start(&args);
        run("mkfs.ext4", &["-q", "-F", server.path()]);
        let dir = mount_dir();
        let dir = dir.to_str().unwrap();
        for round in 0..2 {
            run("mount", &[server.path(), dir]);
            run(
                "sh",
                &[
                    "-c",
                    &format!("mkdir {dir}/{round} && cp -r /etc/. {dir}/{round} 2>/dev/null; sync; true"),
                ],
            );
            if round == 1 {
                run("diff", &["-r", "--no-dereference", &format!("{dir}/0"), &format!("{dir}/1")]);
            }
            run("umount", &[dir]);
            run("fsck.ext4", &["-f", "-n", server.path()]);
        }
        server.stop();
    }
}

fn large_requests_and_two_queues() {
    for copy in [false, true] {
        let data = Data::new("large");
        let max_io = (4 << 20).to_string();
        let mut args = vec!["--file", data.arg(), "--size-mib", "64", "--queues", "2", "--max-io", &max_io];
        if copy {
            args.push("--copy");
        }
        let server = Server::start(&args);
        fio_run(
            server.path(),
            &[
                "--bs=4m",
                "--rw=write",
                "--verify=crc32c",
                "--iodepth=4",
                "--size=32m",
                "--numjobs=2",
                "--offset_increment=32m",
            ],
        );
        server.stop();
    }
}

fn discards_zero() {
    for door in ["ram", "file"] {
        let data = Data::new("discard");
        let server = Server::start(&["--door", door, "--file", data.arg(), "--size-mib", "64"]);
        for zeroes in [false, true] {
            let disk = open_disk(&server.path, true);
            disk.write_all_at(&vec![0xa5; 8 << 20], 0).unwrap();
            disk.sync_all().unwrap();
            drop(disk);
            let mut args = vec!["-o", "1048576", "-l", "2097152"];
            if zeroes {
                args.push("-z");
            }
            args.push(server.path());
            run("blkdiscard", &args);
            let mut bytes = vec![0; 8 << 20];
            open_disk(&server.path, false).read_exact(&mut bytes).unwrap();
            assert!(bytes[..1 << 20].iter().all(|&b| b == 0xa5));
            assert!(bytes[1 << 20..3 << 20].iter().all(|&b| b == 0), "{door} {zeroes}");
            assert!(bytes[3 << 20..].iter().all(|&b| b == 0xa5));
        }
        server.stop();
    }
}

fn a_backing_that_only_discards() {
    let loaded = Command::new("modprobe")
        .args(["null_blk", "nr_devices=1", "memory_backed=1", "discard=1", "gb=1"])
        .output();
    if !loaded.is_ok_and(|o| o.status.success()) || !Path::new("/dev/nullb0").exists() {
        skip("the kernel has no null_blk");
    }
    let server = Server::start(&["--door", "file", "--file", "/dev/nullb0", "--direct", "--size-mib", "64"]);
    fio_run(
        server.path(),
        &["--bs=4k", "--rw=randwrite", "--verify=crc32c", "--iodepth=16", "--size=8m", "--fsync=32"],
    );
    for _ in 0..2 {
        run("blkdiscard", &["-o", "0", "-l", "1048576", server.path()]);
    }
    // What cannot be zeroed by the device is zeroed by the kernel above, by writing.
    run("blkdiscard", &["-z", "-o", "0", "-l", "1048576", server.path()]);
    let mut bytes = vec![1; 1 << 20];
    open_disk(&server.path, false).read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 0));
    server.stop();
    let _ = Command::new("modprobe").args(["-r", "null_blk"]).status();
}

fn flushes_arrive_only_with_a_volatile_cache() {
    for volatile in [false, true] {
        let data = Data::new("flush");
        let mut args = vec!["--door", "file", "--file", data.arg(), "--size-mib", "64"];
        if volatile {
            args.push("--volatile-cache");
        }
        let server = Server::start(&args);
        let queue = format!("/sys/block/ublkb{}/queue", server.id);
        let cache = fs::read_to_string(format!("{queue}/write_cache")).unwrap();
        assert_eq!(cache.trim(), if volatile { "write back" } else { "write through" });
        assert_eq!(
            fs::read_to_string(format!("{queue}/fua")).unwrap().trim(),
            if volatile { "1" } else { "0" }
        );
        let flushes = || {
            let stat = fs::read_to_string(format!("/sys/block/ublkb{}/stat", server.id)).unwrap();
            stat.split_whitespace().nth(15).unwrap().parse::<u64>().unwrap()
        };
        let before = flushes();
        fio_run(server.path(), &["--bs=4k", "--rw=randwrite", "--fsync=1", "--size=1m", "--iodepth=1"]);
        // O_DSYNC makes FUA writes.
        fio_run(server.path(), &["--bs=4k", "--rw=randwrite", "--sync=dsync", "--size=1m", "--iodepth=4"]);
        assert_eq!(flushes() > before, volatile);
        server.stop();
    }
}

fn a_killed_server_is_only_a_pause() {
    for copy in [false, true] {
        let data = Data::new("kill");
        let mut args = vec!["--file", data.arg(), "--size-mib", "64", "--delay-ms", "1"];
        if copy {
            args.push("--copy");
        }
        let mut server = Server::start(&args);
        let path = server.path.clone();
        let fio_args = fio(
            path.to_str().unwrap(),
            &[
                "--bs=4k",
                "--rw=randwrite",
                "--verify=crc32c",
                "--iodepth=32",
                "--size=32m",
                "--io_size=8m",
                "--do_verify=1",
            ],
        );
        let mut client = Command::new("fio")
            .args(&fio_args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut kills = 0;
        while kills < 4 {
            std::thread::sleep(Duration::from_millis(700));
            if client.try_wait().unwrap().is_some() {
                break;
            }
            let id = server.kill();
            kills += 1;
            if kills == 2 {
                // For a while without any server.
                std::thread::sleep(Duration::from_millis(500));
                assert_eq!(state(id).unwrap().status, Status::Quiesced);
            }
            let number = id.to_string();
            let mut again = args.clone();
            again.extend(["--recover", &number]);
            server = Server::start(&again);
            assert_eq!(server.id, id);
        }
        let output = client.wait_with_output().unwrap();
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        assert!(kills >= 2, "fio was done before the server was killed {kills} times");
        // Once more from the device itself: what the client was told is there.
        let again = [
            "--bs=4k",
            "--rw=randwrite",
            "--verify=crc32c",
            "--iodepth=32",
            "--size=32m",
            "--io_size=8m",
            "--verify_only",
        ];
        fio_run(path.to_str().unwrap(), &again);
        server.stop();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn only_the_owner_recovers() {
    let data = Data::new("owner");
    let base = ["--file", data.arg(), "--size-mib", "64"];
    let server = Server::start(&base);
    let number = server.id.to_string();
    let found = state(server.id).unwrap();
    assert_eq!((found.status, found.server_pid), (Status::Live, Some(server.child.id())));
    assert_eq!((found.identity, size_bytes(server.id).unwrap()), (0x7469_6465, 64 << 20));
    assert_eq!(delete(server.id).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(list().unwrap(), [server.id]);
    let id = server.kill();
    // The kernel lets go of the device some time after its server is gone.
    let until = Instant::now() + Duration::from_secs(20);
    while state(id).unwrap().status == Status::Live && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let with = |more: &[&'static str]| -> Vec<String> {
        base.iter()
            .copied()
            .chain(["--recover", &number])
            .chain(more.iter().copied())
            .map(str::to_owned)
            .collect()
    };
    for (more, kind) in [(&["--identity", "5"], "Foreign"), (&["--block", "4096"], "WrongDevice")] {
        let args = with(more);
        let (mut child, _input, _output, line) = spawn(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(line.starts_with(&format!("error {kind}")), "{line}");
        assert!(!child.wait().unwrap().success());
    }
    assert_eq!(state(id).unwrap().status, Status::Quiesced, "a refused recovery changes nothing");
    delete(id).unwrap();
    assert_eq!(state(id).unwrap_err().kind(), ErrorKind::NotFound);
}

fn a_quiesced_device_changes_hands() {
    if !kernel_has(sys::F_QUIESCE) {
        let data = Data::new("quiesce");
        let mut server = Server::start(&["--file", data.arg(), "--size-mib", "64"]);
        assert!(server.ask("quiesce").starts_with("error Unsupported"));
        server.stop();
        return;
    }
    let data = Data::new("quiesce");
    let args = ["--file", data.arg(), "--size-mib", "64"];
    let mut server = Server::start(&args);
    let path = server.path.clone();
    let fio_args = fio(
        path.to_str().unwrap(),
        &[
            "--bs=4k",
            "--rw=randwrite",
            "--verify=crc32c",
            "--iodepth=8",
            "--size=32m",
            "--time_based",
            "--runtime=4",
            "--do_verify=0",
        ],
    );
    let mut client = Command::new("fio").args(&fio_args).stdout(Stdio::null()).spawn().unwrap();
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(900));
        assert_eq!(server.ask("quiesce"), "ok quiesced");
        assert!(server.child.wait().unwrap().success());
        assert_eq!(state(server.id).unwrap().status, Status::Quiesced);
        let number = server.id.to_string();
        server = Server::start(&[&args[..], &["--recover", &number]].concat());
    }
    assert!(client.wait().unwrap().success());
    server.stop();
}

fn a_mounted_device_is_not_stopped() {
    let data = Data::new("mounted");
    let mut server = Server::start(&["--file", data.arg(), "--size-mib", "64"]);
    run("mkfs.ext4", &["-q", "-F", server.path()]);
    let dir = mount_dir();
    run("mount", &[server.path(), dir.to_str().unwrap()]);
    let answer = server.ask("stop");
    assert!(answer.starts_with("error Busy") && answer.contains(dir.to_str().unwrap()), "{answer}");
    fs::write(dir.join("file"), "still served").unwrap();
    run("umount", &[dir.to_str().unwrap()]);
    assert_eq!(server.ask("use"), "ok nobody");
    server.stop();
}

fn an_open_device_is_not_stopped() {
    let data = Data::new("open");
    let mut server = Server::start(&["--file", data.arg(), "--size-mib", "64"]);
    let disk = open_disk(&server.path, true);
    let answer = server.ask("stop");
    let pid = std::process::id().to_string();
    assert!(answer.starts_with("error Busy") && answer.contains(&pid), "{answer}");
    disk.write_all_at(&[1; 4096], 0).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    server.stop();
    // By force, with the device open: the opener gets errors, the server ends.
    let mut server = Server::start(&["--file", data.arg(), "--size-mib", "64"]);
    let disk = open_disk(&server.path, true);
    assert_eq!(server.ask("force"), "ok stopped");
    assert!(server.child.wait().unwrap().success());
    let mut block = [0; 4096];
    assert!(disk.read_exact_at(&mut block, 1 << 20).is_err());
}

fn it_grows_while_live() {
    let data = Data::new("grow");
    let mut server = Server::start(&["--file", data.arg(), "--size-mib", "64", "--spare-mib", "64"]);
    assert_eq!(size_of_disk(&server.path), 64 << 20);
    let answer = server.ask(&format!("resize {}", 128 << 20));
    if kernel_has(sys::F_UPDATE_SIZE) {
        assert_eq!(answer, format!("ok {}", 128 << 20));
        assert_eq!(size_of_disk(&server.path), 128 << 20);
        open_disk(&server.path, true).write_all_at(&[1; 4096], (128 << 20) - 4096).unwrap();
        // A recovered device keeps its size.
        let id = server.kill();
        let number = id.to_string();
        let args = ["--file", data.arg(), "--size-mib", "128", "--recover", &number];
        let server = Server::start(&args);
        assert_eq!(size_bytes(id).unwrap(), 128 << 20);
        server.stop();
    } else {
        assert!(answer.starts_with("error Unsupported"), "{answer}");
        server.stop();
    }
}

fn a_door_that_does_not_open_leaves_nothing() {
    for queue in ["0", "1"] {
        let (mut child, _input, _output, line) =
            spawn(&["--door", "null", "--queues", "2", "--fail-queue", queue]);
        assert!(line.starts_with("error Io") && line.contains("told to fail"), "{line}");
        assert!(!child.wait().unwrap().success());
        assert_eq!(list().unwrap(), []);
    }
}

fn a_device_removed_from_outside_ends_the_server() {
    let mut server = Server::start(&["--door", "null"]);
    Control::open().unwrap().stop(server.id).unwrap();
    assert!(!server.path.exists());
    // The server notices on its next command; its queue threads have ended by themselves.
    assert_eq!(server.ask("force"), "ok stopped");
    assert!(server.child.wait().unwrap().success());
}

fn idle_is_idle() {
    for door in ["null", "file"] {
        let data = Data::new("idle");
        let server =
            Server::start(&["--door", door, "--file", data.arg(), "--queues", "2", "--size-mib", "64"]);
        fio_run(server.path(), &["--bs=4k", "--rw=randrw", "--iodepth=8", "--size=4m"]);
        std::thread::sleep(Duration::from_millis(1000));
        let tasks = format!("/proc/{}/task", server.child.id());
        let switches = || {
            let mut total = 0u64;
            for task in fs::read_dir(&tasks).unwrap().flatten() {
                let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
                // Workers of the kernel's own (iou-wrk) go away after a few idle seconds, which is a switch.
                if !name.starts_with("iou-wrk") {
                    let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                    total += status
                        .lines()
                        .filter(|l| l.contains("ctxt_switches"))
                        .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
                        .sum::<u64>();
                }
            }
            total
        };
        let before = switches();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(switches(), before, "wake-ups while idle");
        server.stop();
    }
}

fn attach_and_detach_a_hundred_times() {
    let open_files = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open_files();
    for _ in 0..100 {
        Server::start(&["--door", "null", "--queues", "2"]).stop();
    }
    assert_eq!(open_files(), before);
    assert_eq!(list().unwrap(), []);
}
