//! What is written is read: raw, under file systems, through a stage that is much too small.

use std::fs;

use super::devices::{ram_disks, slow};
use super::support::{Place, fio, kernel_saw_no_error, run, shell, skip, try_run};

fn mixed(ack: &str) {
    let place = Place::new("mixed");
    place.create("v", "96M", "48M", &["--ack", ack, "--block-size", "512"]);
    let device = place.attach("v");
    let verify = ["--verify=crc32c", "--randrepeat=0", "--size=10m", "--numjobs=3", "--offset_increment=24m"];
    // What is read back in between may be staged or on the backing.
    let writes =
        ["--rw=randwrite", "--bsrange=512-1m", "--iodepth=8", "--verify_backlog=32", "--io_size=10m"];
    fio(&device, &[&verify[..], &writes].concat());
    // Sizes of metadata, with reads beside the writes.
    let small = ["--rw=randrw", "--bsrange=512-8k", "--iodepth=16", "--io_size=1m", "--fsync=64"];
    fio(&device, &[&verify[..], &small].concat());
    let trims = ["--rw=randtrimwrite", "--bs=4k", "--iodepth=8", "--size=2m", "--io_size=2m", "--offset=76m"];
    fio(&device, &[&trims[..], &["--trim_verify_zero=1"]].concat());
    assert!(place.status("v")["volumes"][0]["discards"].as_u64().unwrap() > 0, "no trim arrived");
    fio(&device, &[&verify[..], &["--rw=write", "--bs=256k", "--iodepth=4", "--do_verify=0"]].concat());
    place.detach("v");
    place.check_clean("v");
    // Once more, from the backing alone.
    let device = place.attach("v");
    fio(&device, &[&verify[..], &["--rw=write", "--bs=256k", "--iodepth=4", "--verify_only"]].concat());
    place.detach("v");
    kernel_saw_no_error();
}

pub fn fio_verifies_mixed_sizes_with_ack_log() {
    mixed("log");
}

pub fn fio_verifies_mixed_sizes_with_ack_memory() {
    mixed("memory");
}

/// Checksums of everything below `dir`, in one order.
fn sums(dir: &str) -> String {
    shell(&format!("cd {dir} && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum"))
}

fn tree(kind: &str, size: &str, mkfs: &[&str], fsck: &[&str]) {
    if !try_run("sh", &["-c", &format!("command -v {}", mkfs[0])]) {
        skip(format!("{} is not installed", mkfs[0]));
    }
    let place = Place::new("tree");
    place.create("v", size, "48M", &[]);
    let device = place.attach("v");
    let mount = place.mount_point();
    run(mkfs[0], &[&mkfs[1..], &[&device]].concat());
    run("mount", &["-t", kind, &device, &mount]);
    // Real files of all sizes, some megabytes; what is made here has holes, renames and deletions.
    shell(&format!(
        "cp -a /usr/share/zoneinfo/America {mount}/tree 2>/dev/null || cp -a /etc {mount}/tree
         head -c 3000000 /dev/urandom > {mount}/large
         for i in $(seq 60); do echo $i > {mount}/f$i; done
         truncate -s 5M {mount}/sparse; echo end >> {mount}/sparse
         for i in $(seq 1 3 60); do rm {mount}/f$i; done
         mv {mount}/f2 {mount}/tree/moved"
    ));
    let before = sums(&mount);
    assert!(before.lines().count() > 40);
    run("umount", &[&mount]);
    run(fsck[0], &[&fsck[1..], &[&device]].concat());
    // The server goes and comes in between: from the backing alone.
    place.detach("v");
    place.check_clean("v");
    let device = place.attach("v");
    run("mount", &["-t", kind, &device, &mount]);
    assert!(sums(&mount) == before, "{kind}: files differ after a remount");
    shell(&format!("rm -r {mount}/tree && fstrim {mount} && sync"));
    run("umount", &[&mount]);
    run(fsck[0], &[&fsck[1..], &[&device]].concat());
    place.detach("v");
    // And without Tidegate.
    run(fsck[0], &[&fsck[1..], &[&place.path("v.img")]].concat());
    kernel_saw_no_error();
}

pub fn a_tree_survives_on_ext4() {
    tree("ext4", "96M", &["mkfs.ext4", "-q", "-F"], &["fsck.ext4", "-f", "-n"]);
}

pub fn a_tree_survives_on_xfs() {
    tree("xfs", "320M", &["mkfs.xfs", "-q", "-f"], &["xfs_repair", "-n"]);
}

pub fn a_tree_survives_on_btrfs() {
    tree("btrfs", "128M", &["mkfs.btrfs", "-q", "-f"], &["btrfs", "check"]);
}

/// A stage of 20 MiB, a backing that takes 20 ms a write, 200 MiB in no order: writers are slowed down, nothing fails.
pub fn a_small_stage_before_a_slow_backing() {
    let place = Place::new("full");
    ram_disks(1, 256);
    let backing = slow("slow", "/dev/ram0", 20);
    let stage = place.path("stage");
    let args = [
        "create",
        "v",
        "--stage",
        &stage,
        "--stage-size",
        "20M",
        "--backing",
        &backing.path(),
        "--size",
        "220M",
    ];
    place.tidegate(&args);
    let device = place.attach("v");
    fio(
        &device,
        &["--rw=randwrite", "--bs=16k", "--iodepth=8", "--size=200m", "--verify=crc32c", "--do_verify=0"],
    );
    // Writers are paced before the stage is full; that a full one stops them is seen in the simulation.
    let waits = place.counter("v", "stage_full_waits") + place.counter("v", "paced_waits");
    assert!(waits > 0, "no writer ever waited");
    assert_eq!(place.health("v"), "ok");
    place.detach("v");
    let direct =
        ["--rw=randwrite", "--bs=16k", "--iodepth=8", "--size=200m", "--verify=crc32c", "--verify_only"];
    fio("/dev/ram0", &direct);
    assert_eq!(fs::metadata(&stage).unwrap().len(), 20 << 20);
    kernel_saw_no_error();
}
