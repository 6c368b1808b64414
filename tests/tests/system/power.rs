//! A log device with a volatile cache that is really lost: nbdkit, killed.

use std::path::Path;
use std::process::Child;
use std::time::Duration;

use super::devices::need_module;
use super::numbered::{Writer, read};
use super::support::{Place, remove_devices, run, signal, skip, start, try_run, wait_for};

const DEVICE: &str = "/dev/nbd0";
const SECTORS: u64 = 16384;

/// A disk with a volatile write cache. What was not flushed is gone when its process is killed.
pub struct Disk {
    server: Child,
    socket: String,
    image: String,
}

fn serve(socket: &str, image: &str) -> Child {
    let _ = std::fs::remove_file(socket);
    let args = ["-f", "-U", socket, "--filter=cache", "file", image, "cache=writeback"];
    let server = start("nbdkit", &args);
    wait_for("nbdkit", Duration::from_secs(10), || Path::new(socket).exists());
    run("nbd-client", &["-unix", socket, DEVICE, "-b", "512"]);
    server
}

impl Disk {
    pub const DEVICE: &'static str = DEVICE;

    pub fn new(place: &Place) -> Disk {
        need_module("nbd");
        if !try_run("sh", &["-c", "command -v nbdkit && command -v nbd-client"]) {
            skip("nbdkit or nbd-client is not installed");
        }
        let (socket, image) = (place.path("nbd.sock"), place.path("nbd.img"));
        std::fs::File::create(&image).unwrap().set_len(24 << 20).unwrap();
        Disk { server: serve(&socket, &image), socket, image }
    }

    pub fn kill(&mut self) {
        signal(u64::from(self.server.id()), "KILL");
        let _ = self.server.wait();
    }

    pub fn return_after_power_cut(&mut self) {
        run("nbd-client", &["-d", DEVICE]);
        let size = || std::fs::read_to_string("/sys/block/nbd0/size").unwrap();
        wait_for("the device is disconnected", Duration::from_secs(10), || size().trim() == "0");
        self.server = serve(&self.socket, &self.image);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        try_run("nbd-client", &["-d", DEVICE]);
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn cut(ack: &str) {
    let place = Place::new("power");
    let mut disk = Disk::new(&place);
    let backing = place.path("v.img");
    let args =
        ["create", "v", "--stage", DEVICE, "--backing", &backing, "--size", "32M", "--block-size", "512"];
    place.tidegate(&[&args[..], &["--ack", ack]].concat());
    let mut device = place.attach("v");
    let mut writer = Writer::new(&device, SECTORS);
    for round in 0..3 {
        writer.write_many(120);
        if ack == "memory" {
            writer.sync();
        }
        let safe = writer.history.writes.len() as u64;
        if ack == "memory" {
            writer.write_many(7);
        }
        // The power fails for the log first, so that nothing can be written to it any more.
        disk.kill();
        place.kill_all("v");
        writer = writer.closed();
        // Whoever had the device open has died as well.
        remove_devices();
        disk.return_after_power_cut();
        if ack == "memory" {
            let arenas = place.arenas();
            assert_eq!(arenas.len(), 1);
            std::fs::remove_file(&arenas[0]).unwrap();
            let said = place.refused(13, &["attach", "v"]);
            assert!(said.contains("--accept-loss"), "says what to do: {said}");
            device = place.tidegate(&["attach", "v", "--accept-loss"]);
        } else {
            // Half of the rounds with the arena, half without: the log alone is enough.
            if round % 2 == 0 {
                place.arenas().iter().for_each(|a| std::fs::remove_file(a).unwrap());
            }
            device = place.attach("v");
        }
        let found = writer.history.prefix_in(&[read(&device, SECTORS)]).unwrap_or_else(|e| panic!("{e}"));
        assert!(found >= safe, "{safe} writes were durable, {found} are there");
        // What was lost was never made.
        writer.history.writes.truncate(found as usize);
        writer = writer.reopened(&device);
    }
    writer.write_many(20);
    writer.verify(&device);
    let writer = writer.closed();
    place.detach("v");
    writer.verify(&backing);
    place.check_clean("v");
}

pub fn a_volatile_cache_loses_nothing_acknowledged() {
    cut("log");
}

pub fn a_volatile_cache_keeps_what_was_synced() {
    cut("memory");
}
