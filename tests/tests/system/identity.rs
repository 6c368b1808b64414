//! Devices that are not what they should be: replaced, shrunk, rolled back, damaged.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use super::devices::{Mapped, ram_disks};
use super::numbered::{Writer, content, read};
use super::support::{Place, nothing_is_left, remove_devices, run, shell};

const SECTORS: u64 = 16384;
const WRONG_DEVICE: i32 = 8;
const DAMAGED: i32 = 10;

/// A volume with some writes, detached.
fn written(place: &Place) -> Writer {
    place.create("v", "32M", "20M", &["--block-size", "512"]);
    more(place, None)
}

fn more(place: &Place, writer: Option<Writer>) -> Writer {
    let device = place.attach("v");
    let mut writer = writer.map_or_else(|| Writer::new(&device, SECTORS), |w| w.reopened(&device));
    writer.write_many(50);
    let writer = writer.closed();
    place.detach("v");
    writer
}

fn copy(place: &Place, from: &str, to: &str) {
    run("cp", &["--sparse=always", &place.path(from), &place.path(to)]);
}

pub fn wrong_backings_are_refused() {
    let place = Place::new("wrong");
    let writer = written(&place);
    copy(&place, "v.img", "old.img");
    let writer = more(&place, Some(writer));
    copy(&place, "v.img", "right.img");
    place.create("other", "32M", "", &[]);
    copy(&place, "other.img", "copy.img");
    // With it on the stage, the stage would be opened: one volume that can be used is enough.
    place.tidegate(&["delete", "other"]);
    let bytes = fs::metadata(place.path("v.img")).unwrap().len();
    let refuse = |what: &str, words: &[&str]| {
        let before = shell(&format!("md5sum {} {}", place.path("stage"), place.path("v.img")));
        let said = place.refused(WRONG_DEVICE, &["attach", "v"]);
        assert!(words.iter().all(|w| said.contains(w)), "{what}: {said}");
        let after = shell(&format!("md5sum {} {}", place.path("stage"), place.path("v.img")));
        assert_eq!(before, after, "{what}: nothing may be written");
        nothing_is_left(&place);
    };
    shell(&format!("rm {0} && truncate -s {bytes} {0}", place.path("v.img")));
    refuse("replaced", &["no label"]);
    copy(&place, "right.img", "v.img");
    shell(&format!("truncate -s {} {}", bytes - (1 << 20), place.path("v.img")));
    refuse("shrunk", &["shrunk", &bytes.to_string()]);
    copy(&place, "old.img", "v.img");
    refuse("rolled back", &["old copy"]);
    copy(&place, "copy.img", "v.img");
    refuse("another volume's", &["'other'", "'v'"]);
    copy(&place, "right.img", "v.img");
    let device = place.attach("v");
    writer.verify(&device);
    place.detach("v");
    // Elsewhere: found with --backing.
    fs::rename(place.path("v.img"), place.path("moved.img")).unwrap();
    let device = place.tidegate(&["attach", "v", "--backing", &place.path("moved.img")]);
    writer.verify(&device);
    place.detach("v");
    place.check_clean("v");
}

pub fn an_old_stage_is_refused() {
    let place = Place::new("old");
    let writer = written(&place);
    copy(&place, "stage", "old.stage");
    let writer = more(&place, Some(writer));
    fs::rename(place.path("stage"), place.path("right.stage")).unwrap();
    copy(&place, "old.stage", "stage");
    let said = place.refused(WRONG_DEVICE, &["attach", "v"]);
    assert!(said.contains("old copy"), "{said}");
    nothing_is_left(&place);
    // Another stage altogether.
    fs::remove_file(place.path("stage")).unwrap();
    let (stage, backing) = (place.path("stage"), place.path("x.img"));
    let args =
        ["create", "x", "--stage", &stage, "--stage-size", "20M", "--backing", &backing, "--size", "8M"];
    place.tidegate(&args);
    let said = place.refused(WRONG_DEVICE, &["attach", "v"]);
    assert!(said.contains("--stage"), "{said}");
    let device = place.tidegate(&["attach", "v", "--stage", &place.path("right.stage")]);
    writer.verify(&device);
    place.detach("v");
    nothing_is_left(&place);
}

/// A stage whose log holds 60 writes that are not on the backing; what it would take to read them is `stage`.
pub fn damage_in_the_log_is_found_and_refused() {
    let place = Place::new("flip");
    ram_disks(1, 48);
    let backing = Mapped::over("backing", "/dev/ram0", "linear");
    let (stage, path) = (place.path("stage"), backing.path());
    let args = ["create", "v", "--stage", &stage, "--stage-size", "20M", "--backing", &path, "--size", "32M"];
    place.tidegate(&[&args[..], &["--block-size", "512"]].concat());
    let device = place.attach("v");
    backing.break_down();
    let mut writer = Writer::new(&device, SECTORS);
    writer.write_many(60);
    let writer = writer.closed();
    place.kill_all("v");
    remove_devices();
    backing.heal("/dev/ram0");
    place.arenas().iter().for_each(|a| fs::remove_file(a).unwrap());
    place.check_clean("v");

    // A bit in the payload of write 30, wherever it is.
    let write = writer.history.writes[29];
    let needle = &content(30, write.sector, 1);
    let bytes = read(&stage, (20 << 20) / 512);
    let at =
        bytes.windows(needle.len()).position(|w| w == needle.as_slice()).expect("the write is in the log");
    let file = OpenOptions::new().write(true).open(&stage).unwrap();
    file.write_all_at(&[bytes[at + 100] ^ 0x10], at as u64 + 100).unwrap();
    file.sync_all().unwrap();
    let sums = || shell(&format!("md5sum {stage} /dev/ram0"));
    let before = sums();
    let found = place.try_tidegate(&["check", "v"]);
    assert_eq!(found.status.code(), Some(1), "check: {}{}", found.out, found.err);
    assert!(found.out.contains("byte"), "check names the position: {}", found.out);
    let said = place.refused(DAMAGED, &["attach", "v"]);
    assert!(said.contains(&stage), "attach names the device: {said}");
    assert_eq!(sums(), before, "nothing may be written");
    nothing_is_left(&place);
    // Restored from a copy, everything is there.
    file.write_all_at(&[bytes[at + 100]], at as u64 + 100).unwrap();
    drop(file);
    let device = place.attach("v");
    writer.verify(&device);
    place.detach("v");
    writer.verify("/dev/ram0");
    place.check_clean("v");
}

pub fn superblock_copies_are_repaired() {
    let place = Place::new("copies");
    let mut writer = written(&place);
    let stage = place.path("stage");
    let end = 20u64 << 20;
    let copies = [0, 128 << 10, end - (256 << 10), end - (128 << 10)];
    let spoil = |which: &[usize]| {
        let file = OpenOptions::new().write(true).open(&stage).unwrap();
        for copy in which {
            // Behind the magic number: it was a stage, and that shows.
            file.write_all_at(&[0x5a; 512], copies[*copy] + 64).unwrap();
        }
    };
    for which in [&[0][..], &[1, 3], &[0, 1, 2], &[1, 2, 3]] {
        spoil(which);
        // One that is torn can come from a crash, more cannot.
        if which.len() == 1 {
            place.check_clean("v")
        } else {
            place.check_damaged("v")
        }
        writer = more(&place, Some(writer));
        place.check_clean("v");
        let device = place.attach("v");
        writer.verify(&device);
        place.detach("v");
    }
    spoil(&[2, 3]);
    place.attach("v");
    let repaired = place.status("v")["stages"][0]["recovery"]["superblocks_repaired"].as_u64();
    assert_eq!(repaired, Some(2), "it is said");
    place.detach("v");
    spoil(&[0, 1, 2, 3]);
    place.refused(DAMAGED, &["attach", "v"]);
    nothing_is_left(&place);
}
