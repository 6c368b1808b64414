//! What a story begins with: a stage, its volumes and their disks.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use tidegate_driver::format::arena::ArenaIdentity;
use tidegate_driver::format::geometry::Geometry;
use tidegate_driver::format::label::backing_bytes_for;
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::recovery::ArenaSource;
use tidegate_driver::stage::arena::Arena;
use tidegate_driver::volume::admin::{self, NewVolume, StageOptions};
use uuid::Uuid;

use super::aim::Aim;
use super::client::Habits;
use super::disk::{Ctl, Saved, SimDisk, lock};
use super::door_io::Asked;
use super::model::Model;
use super::report::{CrashKind, Options, Report};
use super::rng::Rng;
use super::running::Running;
use super::site::SimClock;

/// Where the servers of a story stand.
macro_rules! site_of {
    ($world:expr) => {
        $crate::sim::site::Site {
            ctl: &$world.ctl,
            stage: &$world.stage,
            backings: &$world.backings,
            clock: &$world.clock,
            latency_ns: $world.latency_ns,
        }
    };
}
pub(super) use site_of;

/// Arenas that outlive their servers.
#[derive(Default)]
pub struct Arenas(pub BTreeMap<u64, File>);

impl ArenaSource for Arenas {
    fn find(&mut self, identity: &ArenaIdentity, _salt: u64) -> tidegate_driver::base::Result<Option<Arena>> {
        self.0.get(&identity.arena_id).map(|memory| Arena::map_anonymous(memory, identity)).transpose()
    }

    fn make(&mut self, identity: &ArenaIdentity, _salt: u64) -> tidegate_driver::base::Result<Arena> {
        let memory = Arena::anonymous_memory(identity)?;
        let arena = Arena::map_anonymous(&memory, identity)?;
        self.0.insert(identity.arena_id, memory);
        Ok(arena)
    }
}

/// A story in the making.
pub struct World {
    pub(super) options: Options,
    /// Chance of the story itself; disks and scheduling have their own.
    pub(super) rng: Rng,
    pub(super) ctl: Ctl,
    pub(super) stage: SimDisk,
    pub(super) backings: Vec<SimDisk>,
    pub(super) clock: Arc<SimClock>,
    pub(super) latency_ns: u64,
    pub(super) model: Model,
    pub(super) arenas: Arenas,
    pub(super) boot: u128,
    pub(super) next_arena: u64,
    pub(super) at_risk: bool,
    pub(super) doors: Vec<usize>,
    pub(super) running: Option<Running>,
    /// What the next server has to bring back.
    pub(super) required: u64,
    /// Requests that clients ask again.
    pub(super) unanswered: Vec<Asked>,
    pub(super) arena_lost: bool,
    /// What the last server had acknowledged when it was killed.
    pub(super) at_stake: u64,
    /// Whether somebody has said that this loss is to be gone on from.
    pub(super) loss_accepted: bool,
    /// A backing that is not there.
    pub(super) missing: Option<usize>,
    /// How the last server ended; `None`: in order, or there was none.
    pub(super) last_crash: Option<CrashKind>,
    /// The disks as they were when an earlier server began: stage first.
    pub(super) old_disks: Vec<Saved>,
    /// Chance of what is aimed: worlds without an aim are as they would be without it.
    pub(super) aims: Rng,
    /// Chance of which volumes are byte devices, and whether any ever are: worlds without are as they would be.
    pub(super) sessions: Rng,
    pub(super) has_sessions: bool,
    /// What this life is led up to.
    pub(super) aim: Option<Aim>,
    /// Whether this is the second life of its aim.
    pub(super) is_second: bool,
    /// How the clients of the last server behaved.
    pub(super) habits: Option<Habits>,
    /// 0: nothing fails but by crashes; else which rates faults come at.
    pub(super) faulty: u64,
    pub(super) report: Report,
}

/// How large a story's devices are.
struct Scale {
    region_bytes: u32,
    blocks_max: u64,
}

impl World {
    pub(super) fn new(options: Options, ctl: &Ctl) -> World {
        let mut rng = Rng::new(options.seed, 20);
        // Requests of a MiB need large regions, which cost time: a few worlds have them.
        let large = options.short.is_none() && rng.chance(4);
        let scale = Scale {
            region_bytes: if large { 4 << 20 } else { rng.pick(&[32 << 10, 32 << 10, 64 << 10]) },
            blocks_max: if large { 8192 } else { rng.pick(&[64, 200]) },
        };
        let stage = new_stage(&mut rng, &scale, ctl);
        let volume_count = rng.range(1, if options.short.is_some() { 2 } else { 4 });
        let acks: &[AckLevel] = match rng.below(3) {
            0 => &[AckLevel::Log],
            1 => &[AckLevel::Memory],
            _ => &[AckLevel::Log, AckLevel::Memory],
        };
        let mut backings = Vec::new();
        let mut volumes = Vec::new();
        let mut at_risk = false;
        for i in 0..volume_count {
            let ack = rng.pick(acks);
            at_risk |= ack == AckLevel::Memory;
            let (backing, size_bytes) = new_volume(&mut rng, &stage, i, ack, scale.blocks_max, ctl);
            volumes.push((backing.visible(0, size_bytes as usize), backing.discards));
            backings.push(backing);
        }
        let (has_sessions, sessions) = World::sessions_of(options.seed);
        let doors = (0..volume_count).map(|_| rng.range(1, 3) as usize).collect();
        let mut control = lock(ctl);
        control.step = 0;
        control.trace = 0;
        if let Some(log) = &mut control.log {
            log.clear();
        }
        drop(control);
        World {
            options,
            ctl: ctl.clone(),
            stage,
            backings,
            clock: Arc::new(SimClock::default()),
            latency_ns: rng.pick(&[0, 10_000, 1_000_000, 50_000_000]),
            model: Model::new(volumes),
            arenas: Arenas::default(),
            boot: 1,
            next_arena: 1,
            at_risk,
            doors,
            running: None,
            required: 0,
            unanswered: Vec::new(),
            arena_lost: false,
            at_stake: 0,
            loss_accepted: false,
            missing: None,
            last_crash: None,
            old_disks: Vec::new(),
            aims: Rng::new(options.seed, 30),
            sessions,
            has_sessions,
            aim: None,
            is_second: false,
            habits: None,
            faulty: if options.short.is_some() { 0 } else { rng.pick(&[0, 0, 0, 1, 1, 2, 2, 3, 4]) },
            report: Report::default(),
            rng,
        }
    }
}

fn new_stage(rng: &mut Rng, scale: &Scale, ctl: &Ctl) -> SimDisk {
    let sector = rng.pick(&[512, 512, 4096]);
    let block_bytes = rng.pick(&[sector, 4096]);
    let patch_bytes = rng.pick(&[8 << 10, 16 << 10, 64 << 10]);
    let region_bytes = scale.region_bytes;
    let more = if region_bytes > 1 << 20 { 0 } else { rng.range(0, 4) };
    let bytes = Geometry::device_bytes_min(region_bytes, patch_bytes) + more * u64::from(region_bytes);
    let stage = SimDisk::new("stage", true, bytes, sector, ctl);
    let options = StageOptions { region_bytes, patch_bytes, block_bytes };
    admin::create_stage_as(&stage, options, Uuid::from_u128(7), rng.draw())
        .expect("a new stage can be created");
    stage
}

fn new_volume(
    rng: &mut Rng,
    stage: &SimDisk,
    number: u64,
    ack: AckLevel,
    blocks_max: u64,
    ctl: &Ctl,
) -> (SimDisk, u64) {
    let sector = rng.pick(&[512, 512, 4096]);
    let size_bytes = 512 * rng.range(1, blocks_max);
    // Some have room to grow.
    let room = rng.pick(&[0, 16 << 10, 64 << 10]);
    let bytes = backing_bytes_for(size_bytes).next_multiple_of(4096) + room;
    let mut backing = SimDisk::new("backing", false, bytes, sector, ctl);
    backing.discards = rng.chance(700);
    backing.zeroes = rng.chance(700);
    let new = NewVolume {
        name: format!("v{number}"),
        size_bytes,
        block_bytes: 512,
        ack,
        on_log_error: if rng.chance(250) { OnLogError::Fail } else { OnLogError::Stall },
        backing: String::new(),
    };
    admin::add_volume(stage, &backing, new).expect("a volume can be added");
    (backing, size_bytes)
}
