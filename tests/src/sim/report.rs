//! What stories tell: their numbers, and what broke.

use std::fmt;

use super::script::Script;

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKind {
    /// The process is killed; its arena and its clients stay.
    Kill,
    /// The process is killed and its arena is gone.
    KillWithoutArena,
    /// Power is cut: arena and clients are gone, disks lose what they like of what was not flushed.
    Power,
}

/// A crash at a chosen place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashAt {
    /// Steps after the first server began.
    pub step: u64,
    /// How.
    pub kind: CrashKind,
    /// Steps after the second server began, for another crash; 0: none.
    pub again: u64,
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The seed.
    pub seed: u64,
    /// A short story with this crash in it, instead of a long one with crashes by chance.
    pub short: Option<CrashAt>,
    /// What the clients of a short story ask for, instead of requests by chance.
    pub script: Script,
    /// Which of the unflushed sectors the first power cut keeps, a bit each, instead of a choice by chance.
    pub subset: Option<u64>,
    /// Keep a line per event.
    pub log: bool,
}

impl Options {
    /// A long story.
    #[must_use]
    pub fn long(seed: u64) -> Options {
        Options { seed, short: None, script: [None; 3], subset: None, log: false }
    }

    /// A short story with a crash in it.
    #[must_use]
    pub fn short(seed: u64, crash: CrashAt) -> Options {
        Options { short: Some(crash), ..Options::long(seed) }
    }
}

/// What a story was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Hash of all events.
    pub trace: u64,
    /// Steps.
    pub steps: u64,
    /// Steps until the first server ended.
    pub first_life: u64,
    /// Unflushed sectors that the first server's end met, if that was a power cut; of a script, those that had changed.
    pub first_cut: u64,
    /// Hash of all events until then.
    pub first_trace: u64,
    /// Servers that began to open the stage.
    pub opens: u64,
    /// Kills, kills without arena, power cuts.
    pub crashes: [u64; 3],
    /// Of them, while a server was opening the stage.
    pub crashes_in_recovery: u64,
    /// Orderly ends.
    pub closes: u64,
    /// Records that only the arena held.
    pub from_arena: u64,
    /// Recoveries that brought back records from the log.
    pub by_log: u64,
    /// Recoveries that brought back records from the arena.
    pub by_arena: u64,
    /// Sectors that a power cut found unflushed, and of them those lost, torn and turned to garbage.
    pub sectors: [u64; 4],
    /// Openings of damaged, old or wrong devices that were refused.
    pub probes_refused: u64,
    /// Those that were survived.
    pub probes_survived: u64,
    /// Openings with a damaged arena that ended below what was acknowledged in memory.
    pub arena_shorter: u64,
    /// Damaged last groups that were taken for torn ones, as the claims allow.
    pub last_groups_given_up: u64,
    /// Volumes grown.
    pub resizes: u64,
    /// Doors closed and opened again.
    pub reattaches: u64,
    /// Patch images restored.
    pub patches: u64,
    /// Torn groups given up.
    pub torn: u64,
    /// Regions read by their tables.
    pub tables: u64,
    /// Superblock copies repaired.
    pub superblocks: u64,
    /// Refusals because the arena was gone.
    pub refused: u64,
    /// Openings that an injected fault ended.
    pub failed_opens: u64,
    /// Faults injected.
    pub faults: u64,
    /// What the servers saw.
    pub sometimes: Sometimes,
}

impl Report {
    /// Adds another story's numbers.
    pub fn add(&mut self, other: &Report) {
        self.steps += other.steps;
        self.opens += other.opens;
        (0..3).for_each(|i| self.crashes[i] += other.crashes[i]);
        self.crashes_in_recovery += other.crashes_in_recovery;
        self.closes += other.closes;
        self.from_arena += other.from_arena;
        self.by_log += other.by_log;
        self.by_arena += other.by_arena;
        (0..4).for_each(|i| self.sectors[i] += other.sectors[i]);
        self.probes_refused += other.probes_refused;
        self.probes_survived += other.probes_survived;
        self.arena_shorter += other.arena_shorter;
        self.last_groups_given_up += other.last_groups_given_up;
        self.resizes += other.resizes;
        self.reattaches += other.reattaches;
        self.patches += other.patches;
        self.torn += other.torn;
        self.tables += other.tables;
        self.superblocks += other.superblocks;
        self.refused += other.refused;
        self.failed_opens += other.failed_opens;
        self.faults += other.faults;
        self.sometimes.add(&other.sometimes);
    }
}

impl Sometimes {
    /// Adds another server's numbers.
    pub fn add(&mut self, other: &Sometimes) {
        self.requests += other.requests;
        self.space_waits += other.space_waits;
        self.log_errors += other.log_errors;
        self.backing_errors += other.backing_errors;
        self.load_errors += other.load_errors;
        self.epochs += other.epochs;
        self.regions = self.regions.max(other.regions);
        self.sessions.add(&other.sessions);
    }
}

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What ran.
    pub options: Options,
    /// Where it broke.
    pub step: u64,
    /// What was expected and found.
    pub what: String,
    /// The last events, if they were kept.
    pub log: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {} broke at step {}: {}", self.options.seed, self.step, self.what)?;
        write!(f, "replay: TIDEGATE_SEED={} ", self.options.seed)?;
        if let Some(CrashAt { step, kind, again }) = self.options.short {
            write!(f, "TIDEGATE_CRASH={step},{kind:?},{again} ")?;
        }
        let script: Vec<String> = self.options.script.iter().flatten().map(|op| format!("{op:?}")).collect();
        if !script.is_empty() {
            write!(f, "TIDEGATE_SCRIPT={} ", script.join(","))?;
        }
        if let Some(subset) = self.options.subset {
            write!(f, "TIDEGATE_SUBSET={subset} ")?;
        }
        write!(f, "TIDEGATE_LOG=1 cargo test --release -p tidegate-tests --test crash replay -- --nocapture")
    }
}

/// Things that should happen in some world or other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sometimes {
    /// Requests completed.
    pub requests: u64,
    /// Claims that waited for space.
    pub space_waits: u64,
    /// Log writes that failed.
    pub log_errors: u64,
    /// Flush attempts that failed.
    pub backing_errors: u64,
    /// Regions that could not be read from the stage.
    pub load_errors: u64,
    /// Epochs flushed.
    pub epochs: u64,
    /// Most regions opened in one life.
    pub regions: u64,
    /// What sessions of the byte door met.
    pub sessions: SessionsSeen,
}

/// Things that should happen to some session or other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionsSeen {
    /// Sessions begun.
    pub begun: u64,
    /// Completions.
    pub completions: u64,
    /// Sessions whose client was gone, that were told to end, whose client broke the rules.
    pub ends: [u64; 3],
    /// Of the first: what they had submitted was not all carried out, as it would have waited for another session.
    pub cut_short: u64,
    /// Requests that named a ticket of a session that was over.
    pub cancelled: u64,
    /// Changes that asked for no completion and failed.
    pub silent_failures: u64,
    /// Barriers.
    pub barriers: u64,
    /// Rounds that ended with a submission that waits for another session.
    pub held: u64,
    /// Rounds that ended without room for another completion.
    pub full: u64,
    /// Clients that waited for each other.
    pub gave_up: u64,
}

impl SessionsSeen {
    fn add(&mut self, other: &SessionsSeen) {
        self.begun += other.begun;
        self.completions += other.completions;
        (0..3).for_each(|i| self.ends[i] += other.ends[i]);
        self.cut_short += other.cut_short;
        self.cancelled += other.cancelled;
        self.silent_failures += other.silent_failures;
        self.barriers += other.barriers;
        self.held += other.held;
        self.full += other.full;
        self.gave_up += other.gave_up;
    }
}
