//! Sizes, memory, rest.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use super::support::{Place, fio, kernel_saw_no_error, run};

/// Memory of a process that is its own, in KiB: without what it shares, which is the arena.
fn own_kib(pid: u64) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    field("VmRSS:") - field("RssShmem:")
}

pub fn a_huge_sparse_volume() {
    let place = Place::new("huge");
    place.create("v", "64T", "64M", &[]);
    let begun = Instant::now();
    let device = place.attach("v");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "attaching took {took:?}");
    assert_eq!(run("blockdev", &["--getsize64", &device]).trim(), (64u64 << 40).to_string());
    let verify = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=4m", "--verify=crc32c"];
    let end = format!("--offset={}", (64u64 << 40) - (4 << 20));
    fio(&device, &verify);
    fio(&device, &[&verify[..], &[&end]].concat());
    // Extents spread over the whole of it.
    fio(
        &device,
        &["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=64t", "--io_size=16m", "--norandommap"],
    );
    let (server, _) = place.processes("v");
    let own = own_kib(server);
    assert!(own <= 64 << 10, "the server takes {own} KiB beside the arena");
    place.detach("v");
    let device = place.attach("v");
    place.refused(2, &["check", "v"]);
    fio(&device, &[&verify[..], &[&end, "--verify_only"]].concat());
    place.detach("v");
    place.check_clean("v");
    let blocks = fs::metadata(place.path("v.img")).unwrap().blocks();
    assert!(blocks * 512 < 64 << 20, "the backing is not sparse any more: {blocks} sectors");
    print!("(attached in {:.1} s, {own} KiB) ", took.as_secs_f32());
    kernel_saw_no_error();
}

/// Ticks of processor time and context switches of a process so far.
fn activity(pid: u64) -> (u64, u64) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<u64> =
        stat.rsplit(") ").next().unwrap().split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
    let mut switches = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        // The kernel's own workers (iou-wrk) go away after some idle seconds, which is a switch.
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if !name.starts_with("iou-wrk") {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let lines = status.lines().filter(|l| l.contains("ctxt_switches"));
            switches += lines.filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>();
        }
    }
    (fields[11] + fields[12], switches)
}

pub fn idle_is_idle() {
    const SECONDS: u64 = 6;
    let place = Place::new("idle");
    place.create("v", "32M", "32M", &[]);
    let device = place.attach("v");
    fio(&device, &["--rw=randrw", "--bs=4k", "--iodepth=8", "--size=4m"]);
    place.tidegate(&["flush", "v"]);
    std::thread::sleep(Duration::from_secs(1));
    let (server, supervisor) = place.processes("v");
    let before = [server, supervisor].map(activity);
    std::thread::sleep(Duration::from_secs(SECONDS));
    let after = [server, supervisor].map(activity);
    let ticks: u64 = (0..2).map(|i| after[i].0 - before[i].0).sum();
    let switches = [0, 1].map(|i| after[i].1 - before[i].1);
    // A tick is 10 ms, so 1 % of a second.
    assert!(ticks < SECONDS, "{ticks} ticks in {SECONDS} s");
    assert!(switches[0] <= SECONDS, "{} wake-ups of the server in {SECONDS} s", switches[0]);
    assert!(switches[1] <= SECONDS * 12, "{} wake-ups of the supervisor in {SECONDS} s", switches[1]);
    print!("({ticks} ticks, {} + {} wake-ups in {SECONDS} s) ", switches[0], switches[1]);
    place.detach("v");
    kernel_saw_no_error();
}
