//! Power cuts: a record of every write to stage and backings (dm-log-writes below all of them, so that there is one
//! order), replayed up to chosen points and opened there. What is found must be a prefix of the writes, with
//! everything that was acknowledged as durable before that point (P1).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidegate_driver::io::FileDisk;
use tidegate_driver::volume::{Engine, EngineConfig, LocalClient, admin};

use super::devices::{Mapped, need_module, ram_disks, sectors};
use super::numbered::{History, Random, open};
use super::support::{Place, remove_devices, wait_for};

/// Points that are tried.
const POINTS: usize = 27;
const WRITES: usize = 500;
/// A mark after so many writes relates acknowledgements to the record.
const MARK_EVERY: u64 = 12;
const VOLUMES: [&str; 2] = ["a", "b"];
const VOLUME_SECTORS: u64 = 4 << 11;
const BACKING_SECTORS: u64 = VOLUME_SECTORS + 128;
const STAGE_SECTORS: u64 = 19 << 11;

// ---- the record --------------------------------------------------------------------------------------------------

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// An entry of the record.
#[derive(Debug)]
struct Entry {
    flags: u64,
    /// First byte on the device, and how many.
    at: u64,
    len: u64,
    /// Where the bytes are in the record.
    data: u64,
    mark: Option<u64>,
}

impl Entry {
    fn is(&self, flags: u64) -> bool {
        self.flags & flags != 0
    }

    /// A write that a power cut may lose until the next flush.
    fn is_volatile(&self) -> bool {
        self.len > 0 && !self.is(FLUSH | FUA | MARK)
    }
}

fn read_record(file: &File) -> Vec<Entry> {
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let mut sector = [0; 4096];
    file.read_exact_at(&mut sector[..512], 0).unwrap();
    assert_eq!((word(&sector, 0), word(&sector, 8)), (MAGIC, 1), "not a record of dm-log-writes");
    let count = word(&sector, 16);
    let unit = u64::from(u32::from_le_bytes(sector[24..28].try_into().unwrap()));
    assert_eq!(unit, 512);
    let mut position = unit;
    (0..count)
        .map(|_| {
            file.read_exact_at(&mut sector[..512], position).unwrap();
            let [at, blocks, flags, data_len] = [0, 8, 16, 24].map(|i| word(&sector, i));
            let mark = (flags & MARK != 0).then(|| {
                let text = &sector[32..32 + data_len as usize];
                String::from_utf8_lossy(text).trim_end_matches('\0').parse().unwrap_or(0)
            });
            let data = position + unit;
            position = data + if flags & DISCARD == 0 { blocks * unit } else { 0 };
            Entry { flags, at: at * unit, len: blocks * unit, data, mark }
        })
        .collect()
}

/// The device as it is after some entries.
struct Image {
    bytes: Vec<u8>,
    done: usize,
}

impl Image {
    fn apply(bytes: &mut [u8], entry: &Entry, from: &File) {
        let target = &mut bytes[entry.at as usize..(entry.at + entry.len) as usize];
        if entry.is(DISCARD) {
            target.fill(0);
        } else if !entry.is(MARK) {
            from.read_exact_at(target, entry.data).unwrap();
        }
    }

    fn advance(&mut self, entries: &[Entry], upto: usize, from: &File) {
        for entry in &entries[self.done..upto] {
            Image::apply(&mut self.bytes, entry, from);
        }
        self.done = upto;
    }
}

// ---- the workload ------------------------------------------------------------------------------------------------

struct Recorded {
    history: History,
    record: File,
}

/// Runs numbered writes; the record holds marks that say how many were durable then.
fn record(place: &Place, acks: [&str; 2]) -> Recorded {
    need_module("dm-log-writes");
    ram_disks(2, 192);
    let all = STAGE_SECTORS + 2 * BACKING_SECTORS;
    assert!(all < sectors("/dev/ram0"));
    let log = Mapped::new("log", &format!("0 {all} log-writes /dev/ram0 /dev/ram1"));
    let part = |name: &str, start: u64, len: u64| {
        Mapped::new(name, &format!("0 {len} linear {} {start}", log.path()))
    };
    let stage = part("stage", 0, STAGE_SECTORS);
    let backings =
        [0, 1].map(|i| part(VOLUMES[i], STAGE_SECTORS + i as u64 * BACKING_SECTORS, BACKING_SECTORS));
    for (i, name) in VOLUMES.iter().enumerate() {
        let (stage, backing) = (stage.path(), backings[i].path());
        let args =
            ["create", name, "--stage", &stage, "--backing", &backing, "--size", "4M", "--block-size", "512"];
        place.tidegate(&[&args[..], &["--ack", acks[i]]].concat());
    }
    let devices = VOLUMES.map(|name| open(&place.attach(name)));
    log.message("mark 0");
    let mut history = History::default();
    let mut random = Random::new(7);
    let mut durable = 0;
    let mut marked = 0;
    for _ in 0..WRITES {
        let (number, write, bytes) = history.next(&mut random, 2, VOLUME_SECTORS, false);
        let disk = &devices[write.volume];
        tidegate_driver::io::Disk::write(disk, write.sector * 512, &bytes)
            .unwrap_or_else(|e| panic!("{}", e.report()));
        if acks[write.volume] == "log" {
            // Everything before it, too: there is one order.
            durable = number;
        } else if random.below(8) == 0 {
            tidegate_driver::io::Disk::sync(disk).unwrap_or_else(|e| panic!("{}", e.report()));
            durable = number;
        }
        if durable >= marked + MARK_EVERY {
            log.message(&format!("mark {durable}"));
            marked = durable;
        }
        if number % 100 == 0 {
            let epochs = place.counter("a", "epochs");
            wait_for("an idle flush", Duration::from_secs(20), || place.counter("a", "epochs") > epochs);
        }
    }
    place.tidegate(&["flush", "a"]);
    assert!(place.counter("a", "epochs") > 3, "the flusher was to be at work, too");
    drop(devices);
    place.kill_all("a");
    remove_devices();
    stage.remove();
    backings.iter().for_each(Mapped::remove);
    // Writes the end of the record.
    log.remove();
    Recorded { history, record: File::open("/dev/ram1").unwrap() }
}

// ---- the check ---------------------------------------------------------------------------------------------------

/// What the volumes hold when the stage is opened after the cut.
fn open_after_cut(place: &Place, bytes: &[u8], accept_loss: bool) -> Result<Vec<Vec<u8>>, String> {
    let part = |name: &str, start: u64, len: u64| {
        let path = place.path(name);
        let start = start as usize * 512;
        std::fs::write(&path, &bytes[start..start + len as usize * 512]).unwrap();
        path
    };
    let stage = part("replay.stage", 0, STAGE_SECTORS);
    let paths = [0, 1].map(|i| {
        part(&format!("replay.{}", VOLUMES[i]), STAGE_SECTORS + i as u64 * BACKING_SECTORS, BACKING_SECTORS)
    });
    let report = |e: tidegate_driver::base::Error| e.report();
    let disk = |path: &str| FileDisk::open_exclusive(Path::new(path)).map(Arc::new).map_err(report);
    let stage = disk(&stage)?;
    let ids: Vec<_> =
        admin::read_superblock(&*stage).map_err(report)?.superblock.volumes.iter().map(|v| v.id).collect();
    assert_eq!(ids.len(), 2);
    let backings = vec![(ids[0], disk(&paths[0])?), (ids[1], disk(&paths[1])?)];
    let arena_dir = place.path("replay.arena").into();
    let engine = Engine::open(EngineConfig { stage, backings, arena_dir, accept_loss, forget: None })
        .map_err(report)?;
    let read = |id| -> Result<Vec<u8>, String> {
        let mut client = LocalClient::new(&engine, id, 4).map_err(report)?;
        let mut bytes = Vec::new();
        for at in (0..VOLUME_SECTORS * 512).step_by(1 << 20) {
            bytes.extend(client.read(at, 1 << 20).map_err(report)?);
        }
        Ok(bytes)
    };
    let found = ids.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
    engine.close(true).map_err(report)?;
    drop(engine);
    // Closed in order, the backings hold the same.
    for (path, found) in paths.iter().zip(&found) {
        if super::numbered::read(path, VOLUME_SECTORS) != *found {
            return Err(format!("{path} does not hold what the volume held"));
        }
    }
    Ok(found)
}

fn every_flush_is_a_good_place_to_die(acks: [&str; 2]) {
    let place = Place::new("cut");
    let Recorded { history, record } = record(&place, acks);
    let entries = read_record(&record);
    let begin = entries.iter().position(|e| e.mark == Some(0)).expect("the first mark");
    let points: Vec<usize> = (begin..entries.len()).filter(|&i| entries[i].is(FLUSH | FUA)).collect();
    assert!(points.len() > 100, "{} flushes", points.len());
    let total = (STAGE_SECTORS + 2 * BACKING_SECTORS) as usize * 512;
    let mut image = Image { bytes: vec![0; total], done: 0 };
    let mut random = Random::new(11);
    // A third of them: a flush that had something to make durable, and did not.
    let unflushed: Vec<usize> = points.iter().copied().filter(|&i| entries[i - 1].is_volatile()).collect();
    let mut cuts: Vec<(usize, bool)> =
        spread(&points, POINTS * 2 / 3, &mut random).map(|at| (at, true)).collect();
    cuts.extend(spread(&unflushed, POINTS / 3, &mut random).map(|at| (at, false)));
    cuts.sort_unstable();
    cuts.dedup();
    let partial = cuts.iter().filter(|(_, done)| !done).count();
    let (tried, mut durable_last) = (cuts.len(), 0);
    for (at, flush_done) in cuts {
        let durable = entries[..at].iter().filter_map(|e| e.mark).max().unwrap();
        let cut = if flush_done {
            image.advance(&entries, at + 1, &record);
            open_after_cut(&place, &image.bytes, acks[1] == "memory")
        } else {
            let start = (begin..at).rev().take_while(|&i| entries[i].is_volatile()).last().unwrap_or(at);
            image.advance(&entries, start, &record);
            let mut bytes = image.bytes.clone();
            for entry in &entries[start..at] {
                keep_some(&mut bytes, entry, &record, &mut random);
            }
            open_after_cut(&place, &bytes, acks[1] == "memory")
        };
        let found = cut.and_then(|volumes| history.prefix_in(&volumes));
        let found = found.unwrap_or_else(|e| panic!("cut at entry {at} of {}: {e}", entries.len()));
        assert!(found >= durable, "cut at entry {at}: {durable} writes were durable, {found} are there");
        assert!(durable >= durable_last);
        durable_last = durable;
    }
    assert!(durable_last as usize > WRITES / 2, "the marks are in the record: {durable_last}");
    print!("({tried} cuts of {}, {partial} of them with unflushed writes lost in part) ", points.len());
}

/// At most `count` of `points`, one at random of each part of the whole.
fn spread<'a>(points: &'a [usize], count: usize, random: &'a mut Random) -> impl Iterator<Item = usize> + 'a {
    let count = count.min(points.len());
    (0..count).map(move |i| {
        let (from, to) = (i * points.len() / count, (i + 1) * points.len() / count);
        points[from + random.below((to - from) as u64) as usize]
    })
}

/// Applies an unflushed write as a power cut may: whole, not at all, or some of its sectors.
fn keep_some(bytes: &mut [u8], entry: &Entry, record: &File, random: &mut Random) {
    match random.below(3) {
        0 => {}
        1 => Image::apply(bytes, entry, record),
        _ => {
            let before = bytes[entry.at as usize..(entry.at + entry.len) as usize].to_vec();
            Image::apply(bytes, entry, record);
            for (i, old) in before.chunks(512).enumerate() {
                if random.below(2) == 0 {
                    let at = entry.at as usize + i * 512;
                    bytes[at..at + 512].copy_from_slice(old);
                }
            }
        }
    }
}

pub fn every_flush_is_a_good_place_to_die_ack_log() {
    every_flush_is_a_good_place_to_die(["log", "log"]);
}

pub fn every_flush_is_a_good_place_to_die_mixed_acks() {
    every_flush_is_a_good_place_to_die(["log", "memory"]);
}
