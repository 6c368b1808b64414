//! The byte door: a log whose device loses its cache, a volume that is one kind of device at a time, bytes that become blocks.

use std::time::Duration;

use tidegate_driver::base::ByteRange;
use tidegate_driver::bytes::client::{Device, Options};
use tidegate_driver::bytes::log::{AppendLog, OpenMode, Position};

use super::power::Disk;
use super::support::{Place, signal};

const LOG: ByteRange = ByteRange { start: 0, end: 4 << 20 };
const PATIENCE: Option<Duration> = Some(Duration::from_secs(30));

fn open(path: &str) -> Device {
    Device::open(path, &Options::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// Entry `number`: its length and content follow from it.
fn entry(number: u64) -> Vec<u8> {
    let len = 8 + number * 37 % 700;
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend((8..len).map(|i| (number * 31 + i) as u8));
    bytes
}

/// Number of entries in the log, which must be those from 0 on.
fn count(log: &AppendLog<&Device>) -> u64 {
    let mut number = 0;
    for found in log.iter() {
        let (_, bytes) = found.unwrap_or_else(|e| panic!("entry {number}: {e}"));
        assert!(bytes == entry(number), "entry {number} is not what was appended");
        number += 1;
    }
    number
}

/// Appends entries; the last is durable, some after it are not waited for. How many are durable, and how many were begun.
fn append(log: &AppendLog<&Device>, from: u64) -> (u64, u64) {
    let mut last = Position(0);
    for number in from..from + 150 {
        let bytes = entry(number);
        let (head, tail) = bytes.split_at(3);
        (last, _) = log.append(&[head, tail]).unwrap_or_else(|e| panic!("{e}"));
        if number % 50 == 49 {
            log.persist(last, PATIENCE).unwrap_or_else(|e| panic!("{e}"));
        }
    }
    log.persist(last, PATIENCE).unwrap_or_else(|e| panic!("{e}"));
    for number in from + 150..from + 160 {
        log.append(&[&entry(number)]).unwrap_or_else(|e| panic!("{e}"));
    }
    (from + 150, from + 160)
}

fn power_is_cut(ack: &str) {
    let place = Place::new("bytes-power");
    let mut disk = Disk::new(&place);
    let backing = place.path("v.img");
    let stage = Disk::DEVICE;
    let args =
        ["create", "v", "--stage", stage, "--backing", &backing, "--size", "32M", "--block-size", "512"];
    place.tidegate(&[&args[..], &["--ack", ack]].concat());
    let mut socket = place.tidegate(&["attach", "v", "--bytes"]);
    let mut there = 0;
    for _ in 0..4 {
        let device = open(&socket);
        let mode = if there == 0 { OpenMode::CreateIfMissing } else { OpenMode::MustExist };
        let log = AppendLog::open(&device, LOG, mode).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(count(&log), there);
        let (durable, begun) = append(&log, there);
        // The power fails for the log first, so that nothing can be written to it any more.
        disk.kill();
        place.kill_all("v");
        assert!(log.append(&[b"to nobody"]).is_err() || log.persist(log.bounds().1, PATIENCE).is_err());
        disk.return_after_power_cut();
        place.arenas().iter().for_each(|a| std::fs::remove_file(a).unwrap());
        let again: &[&str] = &["attach", "v", "--bytes", "--accept-loss"];
        socket = place.tidegate(if ack == "memory" { again } else { &again[..3] });
        let device = open(&socket);
        let log = AppendLog::open(&device, LOG, OpenMode::MustExist).unwrap_or_else(|e| panic!("{e}"));
        let found = count(&log);
        assert!((durable..=begun).contains(&found), "{durable} durable, {begun} begun, {found} there");
        there = found;
    }
    place.tidegate(&["detach", "v"]);
    place.check_clean("v");
}

pub fn an_append_log_survives_power_cuts_ack_log() {
    power_is_cut("log");
}

pub fn an_append_log_survives_power_cuts_ack_memory() {
    power_is_cut("memory");
}

/// What is written through one door is there for the other, once it is the one that is open.
pub fn a_volume_is_a_block_device_or_a_byte_device() {
    let place = Place::new("bytes-doors");
    place.create("v", "32M", "64M", &[]);
    let socket = place.tidegate(&["attach", "v", "--bytes"]);
    let said = place.refused(5, &["attach", "v"]);
    assert!(said.contains("never both"), "{said}");
    let device = open(&socket);
    device.write(5000, &[b"through the byte door"], 0).unwrap_or_else(|e| panic!("{e}"));
    let said = place.refused(5, &["detach", "v"]);
    assert!(said.contains("--force"), "{said}");
    drop(device);
    place.tidegate(&["detach", "v"]);
    let block = place.attach("v");
    let mut bytes = std::fs::read(&block).unwrap();
    assert_eq!(&bytes[5000..5021], b"through the byte door");
    let said = place.refused(5, &["attach", "v", "--bytes"]);
    assert!(said.contains("detach it first"), "{said}");
    bytes[5000..5007].copy_from_slice(b"by-way ");
    std::fs::write(&block, &bytes).unwrap();
    place.detach("v");
    let socket = place.tidegate(&["attach", "v", "--bytes"]);
    let device = open(&socket);
    let mut seen = [0; 21];
    device.read(5000, &mut seen).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(&seen, b"by-way  the byte door");
    drop(device);
    // A killed server is replaced, and the gate is there again.
    let (server, _) = place.processes("v");
    signal(server, "KILL");
    place.wait_for_new_server("v", server);
    let device = open(&socket);
    device.read(5000, &mut seen).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(&seen, b"by-way  the byte door");
    drop(device);
    assert_eq!(
        place.tidegate(&["attach", "v", "--bytes"]),
        socket,
        "after a crash attaching again is no error"
    );
    place.tidegate(&["detach", "v"]);
    place.check_clean("v");
}
