//! Devices below Tidegate: RAM disks, and device-mapper targets that are slow, fail or keep a record.

use std::fs;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use super::support::{run, skip, try_run};

const PREFIX: &str = "tgsys-";

/// Loads a module or ends the test as ignored.
pub fn need_module(name: &str) {
    if !try_run("modprobe", &["-q", name]) {
        skip(format!("the kernel has no module {name}"));
    }
}

/// RAM disks `/dev/ram0` … of `mib` each; their memory is given back after the test.
pub fn ram_disks(count: usize, mib: usize) {
    if Path::new("/dev/ram0").exists() {
        try_run("modprobe", &["-r", "brd"]);
    }
    let (count, kib) = (format!("rd_nr={count}"), format!("rd_size={}", mib << 10));
    if !try_run("modprobe", &["-q", "brd", &count, &kib]) {
        skip("the kernel has no RAM disks");
    }
}

/// Sectors of a block device.
pub fn sectors(path: &str) -> u64 {
    fs::File::open(path).and_then(|mut f| f.seek(SeekFrom::End(0))).unwrap() / 512
}

/// A device-mapper device.
pub struct Mapped {
    name: String,
}

impl Mapped {
    /// Makes one; each line of `table` is `START LENGTH TARGET …`.
    pub fn new(name: &str, table: &str) -> Mapped {
        let name = format!("{PREFIX}{name}");
        run("dmsetup", &["create", &name, "--table", table]);
        Mapped { name }
    }

    /// The whole of a device, `target` being what comes between length and device, e.g. `linear`.
    pub fn over(name: &str, device: &str, target: &str) -> Mapped {
        let module = format!("dm-{}", target.split(' ').next().unwrap());
        if target != "linear" {
            need_module(&module);
        }
        Mapped::new(name, &Mapped::table(device, target, ""))
    }

    fn table(device: &str, target: &str, rest: &str) -> String {
        format!("0 {} {target} {device} 0 {rest}", sectors(device)).trim_end().to_owned()
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    /// Replaces the table; requests in flight end with the old one.
    pub fn load(&self, table: &str) {
        run("dmsetup", &["suspend", "--nolockfs", &self.name]);
        run("dmsetup", &["load", &self.name, "--table", table]);
        run("dmsetup", &["resume", &self.name]);
    }

    /// From now on everything fails.
    pub fn break_down(&self) {
        self.load(&format!("0 {} error", sectors(&self.path())));
    }

    /// From now on writes fail; reads do not.
    pub fn refuse_writes(&self, device: &str) {
        need_module("dm-flakey");
        self.load(&Mapped::table(device, "flakey", "0 1 1 error_writes"));
    }

    /// It works.
    pub fn heal(&self, device: &str) {
        self.load(&Mapped::table(device, "linear", ""));
    }

    /// Sends it a message.
    pub fn message(&self, text: &str) {
        let mut args = vec!["message", self.name.as_str(), "0"];
        args.extend(text.split(' '));
        run("dmsetup", &args);
    }

    /// Removes it.
    pub fn remove(&self) {
        run("dmsetup", &["remove", "--retry", &self.name]);
    }
}

/// A device whose writes take `ms` longer.
pub fn slow(name: &str, device: &str, ms: u32) -> Mapped {
    need_module("dm-delay");
    let table = format!("0 {} delay {device} 0 0 {device} 0 {ms}", sectors(device));
    Mapped::new(name, &table)
}

/// Removes all of them.
pub fn clean_up() {
    // Those above first: as many rounds as layers.
    for _ in 0..3 {
        let Ok(entries) = fs::read_dir("/dev/mapper") else { break };
        let left: Vec<_> = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| n.starts_with(PREFIX))
            .collect();
        if left.is_empty() {
            break;
        }
        for name in left {
            try_run("dmsetup", &["remove", "--force", "--retry", &name]);
        }
    }
    if fs::read_to_string("/sys/block/nbd0/pid").is_ok() {
        try_run("nbd-client", &["-d", "/dev/nbd0"]);
    }
    if Path::new("/dev/ram0").exists() {
        try_run("modprobe", &["-r", "brd"]);
    }
}
