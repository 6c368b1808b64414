//! Disks with a volatile cache.
//!
//! A disk holds three things: what is persistent, what a reader sees, and between the two the versions of each sector
//! that were written and not flushed. At a power cut each sector with such versions, or with a write in flight, becomes on
//! its own one of: the persistent version, any of the others, the halves of two of them, or garbage.
//!
//! The same disk serves both kinds of access: operations that the world starts and ends at times of its choice, and
//! blocking calls, each of which is a step at which the world may end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::io::Disk;

use super::aim::Trap;
use super::rng::Rng;

/// How often things fail, in a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Reads of backings, and any read while recovering.
    pub read: u64,
    /// Writes, discards and the like on backings.
    pub backing_write: u64,
    /// Writes on the stage.
    pub stage_write: u64,
    /// Syncs.
    pub sync: u64,
    /// Reads of the stage while it is in use: regions that a recovery left on the device.
    pub stage_read: u64,
}

/// What a crash interrupts, if it comes within a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Whatever there is.
    Any,
    /// A write of a group.
    LogWrite,
    /// A write of the first group of a region.
    RegionBegins,
    /// Another write on the stage: patch zone, checkpoint, table.
    StageWrite,
    /// A write on a backing.
    BackingWrite,
    /// A write of a backing's label.
    Label,
    /// A sync.
    Sync,
}

/// What disks and world share.
#[derive(Debug)]
pub struct Control {
    /// Chance of disks and scheduling.
    pub rng: Rng,
    /// Steps so far.
    pub step: u64,
    /// The step at which everything stops.
    pub crash_at: u64,
    /// What the server should be doing then.
    pub crash_while: Moment,
    /// Steps that the crash waits for that.
    pub patience: u64,
    /// What has to happen before.
    pub trap: Option<Trap>,
    /// Sectors that the next power cut loses, tears and turns to garbage, in a thousand; without it that is up to chance.
    pub cut: Option<(u64, u64, u64)>,
    /// Set by a blocking call that reached that step.
    pub crashed: bool,
    /// Rates now.
    pub faults: Faults,
    /// Faults injected so far.
    pub faults_injected: u64,
    /// Changed sectors that the next power cut keeps, in order, the others being lost; without it that is up to chance.
    pub subset: Option<u64>,
    /// Sectors that a power cut found unflushed, and of them those that kept nothing, got parts, or garbage.
    pub sectors: [u64; 4],
    /// Hash of everything that happened.
    pub trace: u64,
    /// Lines for people, if wanted.
    pub log: Option<Vec<String>>,
}

impl Control {
    /// Notes an event in the trace.
    pub fn note(&mut self, what: &str, values: &[u64]) {
        let mut hash = self.trace;
        for byte in what.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        for value in values {
            hash = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
        self.trace = hash;
        if let Some(log) = &mut self.log {
            log.push(format!("{:6} {what} {values:?}", self.step));
        }
    }
}

/// Shared control.
pub type Ctl = Arc<Mutex<Control>>;

/// Locks it: there is one thread.
pub fn lock(ctl: &Ctl) -> MutexGuard<'_, Control> {
    ctl.lock().expect("no other thread panicked with it")
}

#[derive(Clone, Debug)]
struct Version {
    at: u64,
    bytes: Vec<u8>,
}

#[derive(Clone, Debug)]
struct State {
    persistent: Vec<u8>,
    visible: Vec<u8>,
    unflushed: BTreeMap<u64, Vec<Version>>,
    clock: u64,
}

/// A disk's state, to be put back.
#[derive(Clone, Debug)]
pub struct Saved(State);

impl Saved {
    /// What a reader saw then in a range.
    #[must_use]
    pub fn visible(&self, offset: u64, len: usize) -> &[u8] {
        &self.0.visible[offset as usize..][..len]
    }
}

/// What becomes of dirty data when a sync fails.
#[derive(Clone, Copy, Debug)]
pub enum SyncFailure {
    /// They stay dirty.
    Kept,
    /// Some are gone at once.
    Dropped,
    /// Readers still see them, but no later sync will write them.
    Forgotten,
}

/// A disk.
#[derive(Debug)]
pub struct SimDisk {
    name: &'static str,
    is_stage: bool,
    sector: u32,
    /// Whether it can discard.
    pub discards: bool,
    /// Whether it can zero.
    pub zeroes: bool,
    ctl: Ctl,
    state: Mutex<State>,
}

impl SimDisk {
    /// Disk of `bytes` random bytes (never zeroes: nothing may rely on a fresh disk).
    #[must_use]
    pub fn new(name: &'static str, is_stage: bool, bytes: u64, sector: u32, ctl: &Ctl) -> SimDisk {
        let mut content = vec![0; bytes as usize];
        lock(ctl).rng.fill(&mut content);
        SimDisk {
            name,
            is_stage,
            sector,
            discards: true,
            zeroes: true,
            ctl: ctl.clone(),
            state: Mutex::new(State {
                visible: content.clone(),
                persistent: content,
                unflushed: BTreeMap::new(),
                clock: 1,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no other thread panicked with it")
    }

    /// What a reader sees in a range.
    #[must_use]
    pub fn visible(&self, offset: u64, len: usize) -> Vec<u8> {
        self.state().visible[offset as usize..][..len].to_vec()
    }

    /// What would survive if everything unflushed were lost.
    #[must_use]
    pub fn persistent(&self, offset: u64, len: usize) -> Vec<u8> {
        self.state().persistent[offset as usize..][..len].to_vec()
    }

    /// Keeps its state.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved(self.state().clone())
    }

    /// Puts a state back: its own, or that of another disk that takes its place.
    pub fn put_back(&self, saved: &Saved) {
        *self.state() = saved.0.clone();
    }

    /// Whether readers see what they saw then.
    #[must_use]
    pub fn is_as(&self, saved: &Saved) -> bool {
        self.state().visible == saved.0.visible
    }

    /// Changes what is on the medium behind everybody's back.
    pub fn damage(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state();
        state.visible[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        state.persistent[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// What readers see is on the medium from now on.
    pub fn settle(&self) {
        let mut state = self.state();
        let state = &mut *state;
        state.persistent.clone_from(&state.visible);
        state.unflushed.clear();
    }

    /// Cuts the end off.
    pub fn shrink(&self, bytes: u64) {
        let mut state = self.state();
        let len = state.visible.len() - bytes as usize;
        state.visible.truncate(len);
        state.persistent.truncate(len);
        state.unflushed.retain(|&at, _| (at + 1) * u64::from(self.sector) <= len as u64);
    }

    /// Panics unless direct I/O would accept the range.
    pub fn check_aligned(&self, offset: u64, len: u64) {
        let sector = u64::from(self.sector);
        assert!(
            offset.is_multiple_of(sector) && len.is_multiple_of(sector) && len > 0,
            "{}: {offset}+{len} is not aligned to {sector}",
            self.name
        );
        assert!(offset + len <= self.len_bytes(), "{}: {offset}+{len} is beyond the end", self.name);
    }

    /// The moment for [`SimDisk::sync_from`].
    #[must_use]
    pub fn now(&self) -> u64 {
        self.state().clock
    }

    /// Carries out a write into the cache.
    pub fn apply(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let state = &mut *state;
        let sector = self.sector as usize;
        for (i, bytes) in data.chunks(sector).enumerate() {
            let at = offset as usize + i * sector;
            state.visible[at..at + sector].copy_from_slice(bytes);
            let version = Version { at: state.clock, bytes: bytes.to_vec() };
            state.unflushed.entry((at / sector) as u64).or_default().push(version);
        }
        state.clock += 1;
    }

    /// Carries out a write that fails: some sectors of it.
    pub fn apply_failed(&self, offset: u64, data: &[u8], rng: &mut Rng) {
        match rng.below(4) {
            0 => {}
            1 => self.apply(offset, data),
            2 => {
                // A short transfer: the first sectors only.
                let sectors = rng.below(data.len() as u64 / u64::from(self.sector));
                self.apply(offset, &data[..(sectors * u64::from(self.sector)) as usize]);
            }
            _ => {
                // Sectors stay, are written, or get one half: bytes that did not change stay what they were.
                let mut torn = self.visible(offset, data.len());
                for (old, new) in
                    torn.chunks_mut(self.sector as usize / 2).zip(data.chunks(self.sector as usize / 2))
                {
                    if rng.chance(500) {
                        old.copy_from_slice(new);
                    }
                }
                self.apply(offset, &torn);
            }
        }
    }

    /// Carries out a durable write.
    pub fn apply_durable(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        state.visible[offset as usize..][..data.len()].copy_from_slice(data);
        state.persistent[offset as usize..][..data.len()].copy_from_slice(data);
        let sector = u64::from(self.sector);
        for at in offset / sector..(offset + data.len() as u64) / sector {
            state.unflushed.remove(&at);
        }
        state.clock += 1;
    }

    /// Makes everything durable that was complete at `moment`.
    pub fn sync_from(&self, moment: u64) {
        let mut state = self.state();
        let state = &mut *state;
        let sector = self.sector as usize;
        for (&at, versions) in &mut state.unflushed {
            if let Some(newest) = versions.iter().rfind(|v| v.at < moment) {
                state.persistent[at as usize * sector..][..sector].copy_from_slice(&newest.bytes);
            }
            versions.retain(|v| v.at >= moment);
        }
        state.unflushed.retain(|_, versions| !versions.is_empty());
    }

    /// A sync that fails.
    pub fn sync_failed(&self, moment: u64, how: SyncFailure, rng: &mut Rng) {
        let mut state = self.state();
        let state = &mut *state;
        let sector = self.sector as usize;
        for (&at, versions) in &mut state.unflushed {
            let from = at as usize * sector;
            match how {
                SyncFailure::Kept => {}
                SyncFailure::Dropped if rng.chance(500) => {
                    versions.retain(|v| v.at >= moment);
                    let persistent = &state.persistent[from..from + sector];
                    let newest = versions.last().map_or(persistent, |v| &v.bytes);
                    state.visible[from..from + sector].copy_from_slice(newest);
                }
                SyncFailure::Dropped => {}
                SyncFailure::Forgotten => versions.retain(|v| v.at >= moment),
            }
        }
        state.unflushed.retain(|_, versions| !versions.is_empty());
    }

    /// Power is cut. `in_flight` are the writes that were not complete.
    pub fn power_cut(&self, in_flight: &[(u64, Vec<u8>)], rng: &mut Rng) {
        let mut state = self.state();
        let state = &mut *state;
        let sector = self.sector as usize;
        let (lost, torn, garbage) = lock(&self.ctl).cut.unwrap_or(cut_by_chance(rng));
        let mut versions: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
        for (&at, pending) in &state.unflushed {
            versions.entry(at).or_default().extend(pending.iter().map(|v| v.bytes.clone()));
        }
        for (offset, data) in in_flight {
            for (i, bytes) in data.chunks(sector).enumerate() {
                versions.entry(offset / sector as u64 + i as u64).or_default().push(bytes.to_vec());
            }
        }
        let mut counts = [versions.len() as u64, 0, 0, 0];
        for (at, candidates) in versions {
            let from = at as usize * sector;
            let kept = &mut state.persistent[from..from + sector];
            let newest = candidates.last().expect("a version");
            if let Some(subset) = &mut lock(&self.ctl).subset {
                // Kept or lost, a sector that did not change is the same.
                if newest == kept {
                    counts[0] -= 1;
                    continue;
                }
                if *subset & 1 == 1 {
                    kept.copy_from_slice(newest);
                } else {
                    counts[1] += 1;
                }
                *subset >>= 1;
                continue;
            }
            if rng.chance(lost) {
                counts[1] += 1;
                continue;
            }
            // The newest is the likeliest, but any may have reached the medium last.
            let choose = |rng: &mut Rng| {
                let index = if rng.chance(700) {
                    candidates.len() - 1
                } else {
                    rng.below(candidates.len() as u64) as usize
                };
                &candidates[index]
            };
            if rng.chance(torn) {
                counts[2] += 1;
                let (head, tail) = (choose(rng).clone(), choose(rng).clone());
                match rng.below(3) {
                    0 => kept[..sector / 2].copy_from_slice(&head[..sector / 2]),
                    1 => kept[sector / 2..].copy_from_slice(&tail[sector / 2..]),
                    _ => {
                        kept[..sector / 2].copy_from_slice(&head[..sector / 2]);
                        kept[sector / 2..].copy_from_slice(&tail[sector / 2..]);
                    }
                }
            } else if rng.chance(garbage) {
                counts[3] += 1;
                rng.fill(kept);
            } else {
                kept.copy_from_slice(choose(rng));
            }
        }
        state.unflushed.clear();
        state.visible.copy_from_slice(&state.persistent);
        let mut ctl = lock(&self.ctl);
        (0..4).for_each(|i| ctl.sectors[i] += counts[i]);
    }

    /// Counts a blocking call as a step. `Err`: it does not happen.
    fn step(&self, what: &'static str, offset: u64, len: usize) -> Result<()> {
        let mut ctl = lock(&self.ctl);
        ctl.step += 1;
        let step = ctl.step;
        ctl.note(what, &[u64::from(self.is_stage), offset, len as u64]);
        if ctl.crashed || (step >= ctl.crash_at && ctl.crash_while == Moment::Any) {
            ctl.crashed = true;
            return Err(Error::new(ErrorKind::Io, format!("{}: crashed in a {what}", self.name)));
        }
        Ok(())
    }

    fn fails(&self, rate: impl Fn(&Faults) -> u64) -> Option<Rng> {
        let mut ctl = lock(&self.ctl);
        let rate = rate(&ctl.faults);
        if rate == 0 || !ctl.rng.chance(rate) {
            return None;
        }
        ctl.faults_injected += 1;
        Some(Rng::new(ctl.rng.draw(), 1))
    }

    fn error(&self, what: &str) -> Error {
        Error::io(format!("{}: injected fault in a {what}", self.name), std::io::Error::from_raw_os_error(5))
    }

    /// `data` in whole sectors around `offset`, as a device gets it.
    fn whole_sectors(&self, offset: u64, data: &[u8]) -> (u64, Vec<u8>) {
        let sector = u64::from(self.sector);
        let from = offset / sector * sector;
        let to = (offset + data.len() as u64).next_multiple_of(sector);
        let mut bytes = self.visible(from, (to - from) as usize);
        bytes[(offset - from) as usize..][..data.len()].copy_from_slice(data);
        (from, bytes)
    }
}

/// How many unflushed sectors a power cut loses, tears and turns to garbage, in a thousand.
fn cut_by_chance(rng: &mut Rng) -> (u64, u64, u64) {
    match rng.below(8) {
        0 => (1000, 0, 0),
        1 => (0, 0, 0),
        2 => (500, 0, 0),
        3 => (100, 300, 300),
        _ => (rng.below(1001), rng.below(300), rng.below(200)),
    }
}

impl Disk for SimDisk {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.step("read", offset, buf.len())?;
        if self.fails(|f| f.read).is_some() {
            return Err(self.error("read"));
        }
        let state = self.state();
        let Some(bytes) = state.visible.get(offset as usize..offset as usize + buf.len()) else {
            return Err(Error::new(ErrorKind::Io, format!("{}: read beyond the end", self.name)));
        };
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let (offset, data) = self.whole_sectors(offset, data);
        if let Err(error) = self.step("write", offset, data.len()) {
            // The write that was in flight when it happened.
            let mut rng = Rng::new(lock(&self.ctl).rng.draw(), 2);
            self.apply_failed(offset, &data, &mut rng);
            return Err(error);
        }
        if let Some(mut rng) = self.fails(|f| if self.is_stage { f.stage_write } else { f.backing_write }) {
            self.apply_failed(offset, &data, &mut rng);
            return Err(self.error("write"));
        }
        self.apply(offset, &data);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.step("sync", 0, 0)?;
        if let Some(mut rng) = self.fails(|f| f.sync) {
            let how = rng.pick(&[SyncFailure::Kept, SyncFailure::Dropped]);
            self.sync_failed(u64::MAX, how, &mut rng);
            return Err(self.error("sync"));
        }
        self.sync_from(u64::MAX);
        Ok(())
    }

    fn drop_cache(&self) -> Result<()> {
        // What a failed sync has left for readers alone is gone; what is dirty stays.
        let mut state = self.state();
        let state = &mut *state;
        let sector = self.sector as usize;
        state.visible.copy_from_slice(&state.persistent);
        for (&at, versions) in &state.unflushed {
            let newest = &versions.last().expect("a version").bytes;
            state.visible[at as usize * sector..][..sector].copy_from_slice(newest);
        }
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        self.state().visible.len() as u64
    }

    fn block_bytes(&self) -> u32 {
        self.sector
    }

    fn preferred_block_bytes(&self) -> u32 {
        self.sector
    }

    fn name(&self) -> String {
        self.name.to_owned()
    }
}
