//! Servers that die, end and are started again; volumes that come and go.

use std::process::Child;
use std::time::{Duration, Instant};

use super::numbered::Writer;
use super::support::{
    Place, finish, fio, fio_start, is_alive, kernel_saw_no_error, nothing_is_left, run, servers, shell,
    signal, start, ublk_devices, wait_for,
};

const SHORT: Duration = Duration::from_secs(20);

/// A mounted ext4 on volume `v`; its device.
fn mounted(place: &Place) -> String {
    place.create("v", "96M", "48M", &[]);
    let device = place.attach("v");
    run("mkfs.ext4", &["-q", "-F", &device]);
    run("mount", &[&device, &place.mount_point()]);
    device
}

/// fio in the mounted file system, writing and verifying, one round after the other until `stop` is there.
fn rounds(place: &Place) -> Child {
    let script = format!(
        "round=0
         while [ ! -e {stop} ]; do
             round=$((round + 1))
             fio --name=t --filename={mount}/data --ioengine=io_uring --iodepth=8 --direct=1 --rw=randwrite --bsrange=4k-32k \
                 --size=4m --fsync=16 --verify=crc32c --verify_state_save=0 --randseed=$round
         done
         echo rounds: $round",
        stop = place.path("stop"),
        mount = place.mount_point(),
    );
    start("sh", &["-ec", &script])
}

pub fn ten_killed_servers_under_a_file_system() {
    let place = Place::new("kill");
    let device = mounted(&place);
    let client = rounds(&place);
    for kill in 1..=10 {
        std::thread::sleep(Duration::from_millis(150 + kill * 97 % 400));
        let (server, _) = place.processes("v");
        if kill % 4 == 0 {
            // The supervisor too: then it is `attach` that brings the device back.
            place.kill_all("v");
            // The kernel takes a moment to end a process.
            wait_for("the end of the server", SHORT, || place.state("v") == "server-died");
            assert_eq!(place.attach("v"), device);
        } else {
            signal(server, "KILL");
            place.wait_for_new_server("v", server);
        }
    }
    std::fs::write(place.path("stop"), "").unwrap();
    let said = finish(client, SHORT, "fio");
    assert!(said.contains("rounds: "), "{said}");
    let recovered = place.status("v")["stages"][0]["recovery"]["arena_used"].as_bool();
    assert_eq!(recovered, Some(true), "the arena outlives the server");
    let mount = place.mount_point();
    run("umount", &[&mount]);
    run("fsck.ext4", &["-f", "-n", &device]);
    run("mount", &[&device, &mount]);
    // The last round once more, from the device.
    let round = said.split("rounds: ").nth(1).unwrap().trim();
    let seed = format!("--randseed={round}");
    let data = format!("{mount}/data");
    let again = ["--rw=randwrite", "--iodepth=8", "--bsrange=4k-32k", "--size=4m", "--verify=crc32c", &seed];
    fio(&data, &[&again[..], &["--verify_only"]].concat());
    run("umount", &[&mount]);
    place.detach("v");
    place.check_clean("v");
    run("fsck.ext4", &["-f", "-n", &place.path("v.img")]);
    kernel_saw_no_error();
}

/// Some with the server starting and ending each time, the rest on a server that stays. On a busy machine fewer than a
/// hundred, which is said.
pub fn attach_and_detach_a_hundred_times() {
    let place = Place::new("cycles");
    place.create("v", "16M", "20M", &[]);
    place.create("w", "16M", "", &[]);
    place.create("x", "16M", "", &[]);
    let begun = Instant::now();
    let mut whole = 0;
    while whole < 5 || (whole < 100 && begun.elapsed() < Duration::from_secs(10)) {
        place.attach("v");
        place.detach("v");
        whole += 1;
    }
    let each = begun.elapsed().as_millis() / whole;
    nothing_is_left(&place);
    place.attach("v");
    let (server, _) = place.processes("v");
    let count = |what: &str| std::fs::read_dir(format!("/proc/{server}/{what}")).unwrap().count();
    let before = (count("fd"), count("task"));
    let rest = 100 - whole;
    let times: u128 = std::thread::scope(|scope| {
        let cycles = |name: &'static str, times: u128| {
            let place = &place;
            scope.spawn(move || {
                let in_time = (0..times).take_while(|i| *i < 5 || begun.elapsed() < Duration::from_secs(34));
                in_time
                    .inspect(|_| {
                        place.attach(name);
                        place.detach(name);
                    })
                    .count() as u128
            })
        };
        let both = [cycles("w", rest / 2), cycles("x", rest - rest / 2)];
        both.into_iter().map(|t| t.join().unwrap()).sum()
    });
    // Threads of commands and queues end a moment after their last word.
    wait_for("no more files and threads than before", SHORT, || {
        let now = (count("fd"), count("task"));
        now.0 <= before.0 && now.1 <= before.1
    });
    assert_eq!(ublk_devices().len(), 1);
    place.detach("v");
    nothing_is_left(&place);
    print!("({whole} whole cycles of {each} ms, {times} on one server) ");
    kernel_saw_no_error();
}

pub fn two_volumes_on_one_stage() {
    let place = Place::new("two");
    place.create("quick", "48M", "48M", &["--ack", "memory"]);
    place.create("safe", "48M", "", &[]);
    let (quick, safe) = (place.attach("quick"), place.attach("safe"));
    assert_eq!(place.processes("quick"), place.processes("safe"), "one server for one stage");
    let once = ["--rw=randwrite", "--bsrange=4k-64k", "--iodepth=8", "--verify=crc32c", "--size=8m"];
    let client = fio_start(&safe, &[&once[..], &["--loops=3"]].concat());
    fio(&quick, &once);
    place.refused(5, &["delete", "safe"]);
    place.detach("quick");
    assert_eq!(place.state("safe"), "attached");
    place.tidegate(&["delete", "quick"]);
    place.refused(3, &["status", "quick"]);
    // A new one in its place, while the other goes on.
    place.create("third", "48M", "", &[]);
    let third = place.attach("third");
    fio(&third, &once);
    finish(client, SHORT * 2, "fio on the volume that stays");
    place.detach("third");
    place.detach("safe");
    place.check_clean("safe");
    nothing_is_left(&place);
    kernel_saw_no_error();
}

pub fn a_mounted_device_is_not_detached() {
    let place = Place::new("busy");
    let device = mounted(&place);
    let mount = place.mount_point();
    let said = place.refused(5, &["detach", "v"]);
    assert!(said.contains(&mount), "the mount point is named: {said}");
    place.refused(5, &["delete", "v"]);
    place.refused(5, &["attach", "v"]);
    shell(&format!("echo served > {mount}/file; sync"));
    // Signals that are no order to end.
    let (server, supervisor) = place.processes("v");
    for pid in [server, supervisor] {
        signal(pid, "HUP");
    }
    shell(&format!("cp {mount}/file {mount}/copy; sync"));
    assert_eq!(place.processes("v"), (server, supervisor));
    run("umount", &[&mount]);
    let open = std::fs::File::open(&device).unwrap();
    let said = place.refused(5, &["detach", "v"]);
    assert!(said.contains(&std::process::id().to_string()), "the process is named: {said}");
    drop(open);
    place.detach("v");
    place.refused(3, &["detach", "v"]);
    kernel_saw_no_error();
}

pub fn of_two_attaches_one_wins() {
    let place = Place::new("race");
    place.create("v", "16M", "20M", &[]);
    for _ in 0..3 {
        let attach = || {
            let mut command = place.command(&["attach", "v"]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            command.spawn().unwrap()
        };
        let both = [attach(), attach()].map(|c| super::support::wait_limited(c, SHORT, "attach"));
        let mut codes = both.each_ref().map(|e| e.status.code());
        codes.sort_unstable();
        assert_eq!(codes, [Some(0), Some(5)], "{}{}", both[0].err, both[1].err);
        assert_eq!(ublk_devices().len(), 1);
        place.detach("v");
    }
    nothing_is_left(&place);
}

pub fn a_device_has_the_queues_that_were_asked_for() {
    let place = Place::new("queues");
    place.create("v", "16M", "20M", &[]);
    let queues = |device: &str| {
        let folder = device.replace("/dev", "/sys/block") + "/mq";
        std::fs::read_dir(folder).unwrap().count()
    };
    let asked = std::thread::available_parallelism().map_or(1, usize::from).min(2);
    for (more, expected) in [(&["--queues", "2"][..], asked), (&[][..], asked), (&["--queues", "1"][..], 1)] {
        let device = place.tidegate(&[&["attach", "v"], more].concat());
        assert_eq!(queues(&device), expected, "{more:?}");
        place.detach("v");
    }
    nothing_is_left(&place);
}

pub fn sigterm_hands_a_mounted_device_over() {
    let place = Place::new("term");
    let device = mounted(&place);
    let mount = place.mount_point();
    let client = rounds(&place);
    for to_supervisor in [false, true] {
        std::thread::sleep(Duration::from_millis(800));
        let (server, supervisor) = place.processes("v");
        signal(if to_supervisor { supervisor } else { server }, "TERM");
        wait_for("the server has ended", SHORT, || !is_alive(server) && !is_alive(supervisor));
        assert_eq!(place.state("v"), "waiting");
        // Who writes now waits.
        let mut writer = start("sh", &["-ec", &format!("echo new > {mount}/new; sync -f {mount}/new")]);
        std::thread::sleep(Duration::from_millis(500));
        assert!(writer.try_wait().unwrap().is_none(), "a write was completed without a server");
        assert_eq!(place.attach("v"), device);
        finish(writer, SHORT, "the writer that waited");
    }
    std::fs::write(place.path("stop"), "").unwrap();
    finish(client, SHORT, "fio");
    run("umount", &[&mount]);
    run("fsck.ext4", &["-f", "-n", &device]);
    // Nobody uses the device: now SIGTERM ends it.
    let (server, _) = place.processes("v");
    signal(server, "TERM");
    wait_for("the server has ended", SHORT, || servers().is_empty());
    assert_eq!(place.state("v"), "detached");
    nothing_is_left(&place);
    place.check_clean("v");
    kernel_saw_no_error();
}

/// Grows while it is written to, where the kernel can; elsewhere that is said and the volume grows detached.
pub fn a_live_device_grows() {
    let place = Place::new("grow");
    place.create("v", "32M", "20M", &["--block-size", "512"]);
    let device = place.attach("v");
    let mut writer = Writer::new(&device, 8192);
    writer.write_many(30);
    let size = |device: &str| run("blockdev", &["--getsize64", device]).trim().parse::<u64>().unwrap();
    place.refused(2, &["resize", "v", "16M"]);
    let grown = place.try_tidegate(&["resize", "v", "64M"]);
    match grown.status.code() {
        Some(0) => {
            assert_eq!(size(&device), 64 << 20);
            let client = fio_start(
                &device,
                &["--rw=randwrite", "--bs=4k", "--verify=crc32c", "--size=8m", "--offset=40m"],
            );
            place.tidegate(&["resize", "v", "80M"]);
            finish(client, SHORT, "fio beside a resize");
            let (server, _) = place.processes("v");
            signal(server, "KILL");
            place.wait_for_new_server("v", server);
            print!("(live) ");
        }
        Some(12) => {
            assert!(grown.err.contains("detach"), "says what to do: {}", grown.err);
            writer.verify(&device);
            writer = writer.closed();
            place.detach("v");
            place.tidegate(&["resize", "v", "80M"]);
            assert_eq!(place.attach("v"), device);
            print!("(detached: this kernel cannot resize a live device) ");
        }
        _ => panic!("resize: {}\n{}", grown.status, grown.err),
    }
    assert_eq!(size(&device), 80 << 20);
    let mut writer = writer.reopened(&device);
    writer.write_many(30);
    let writer = writer.closed();
    fio(&device, &["--rw=write", "--bs=64k", "--verify=crc32c", "--size=8m", "--offset=64m"]);
    place.detach("v");
    place.check_clean("v");
    let device = place.attach("v");
    writer.verify(&device);
    let again = ["--rw=write", "--bs=64k", "--verify=crc32c", "--size=8m", "--offset=64m", "--verify_only"];
    fio(&device, &again);
    place.detach("v");
    kernel_saw_no_error();
}
