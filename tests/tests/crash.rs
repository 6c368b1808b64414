//! Crash tests: worlds by seed, all seeds that ever failed, every crash step of short stories, and everything within bounds.
//!
//! | variable | does |
//! |---|---|
//! | `TIDEGATE_SEEDS=N` | runs that many worlds instead of an ordinary number, from seed `TIDEGATE_FIRST` on |
//! | `TIDEGATE_FRESH=seconds` | runs seeds that nobody has seen for so long |
//! | `TIDEGATE_SCRIPT_LENGTH=N` | scripts of up to N requests in `everything_within_bounds` instead of 2; at most 3 |
//! | `TIDEGATE_SEED=S` | replays one (test `replay`) |
//! | `TIDEGATE_CRASH=step,Kind,again` | makes it the short story with that crash |
//! | `TIDEGATE_SCRIPT=Write,Flush,…`, `TIDEGATE_SUBSET=bits` | its requests, and the sectors that the power cut keeps |
//! | `TIDEGATE_LOG=1` | prints its events |

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tidegate_tests::sim::runner::{Totals, Until, run_all};
use tidegate_tests::sim::script::{ALPHABET, Script, scripts};
use tidegate_tests::sim::{CrashAt, CrashKind, Options, Report, run};

/// Worlds of an ordinary run.
const SEEDS: u64 = 1000;
/// Threads: worlds are independent.
const THREADS: usize = 2;
/// Changed unflushed sectors up to which every subset of them is tried.
const SUBSET_SECTORS: u64 = 7;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.trim().is_empty())?;
    Some(text.trim().parse().unwrap_or_else(|_| panic!("{name} is a number, not '{text}'")))
}

/// Whether only one story is to be replayed.
fn is_replay() -> bool {
    number("TIDEGATE_SEED").is_some()
}

/// Prints the totals; panics with the first few stories that broke.
fn finish(what: &str, totals: Totals) -> Report {
    println!("{what}: {totals}");
    let texts: Vec<String> = totals.failures.iter().map(|f| f.to_string()).collect();
    assert!(texts.is_empty(), "\n{}\nAdd the seeds to tests/seeds.txt.\n", texts.join("\n"));
    totals.report
}

#[test]
fn worlds() {
    if is_replay() {
        return;
    }
    let seeds = number("TIDEGATE_SEEDS").unwrap_or(SEEDS);
    let first = number("TIDEGATE_FIRST").unwrap_or(1);
    let report = finish("worlds", run_all(Until::Count(seeds), THREADS, |i| Options::long(first + i)));
    if seeds < SEEDS {
        return;
    }
    // What the worlds must have met, or they prove less than they seem to.
    let seen = [
        ("kills", report.crashes[0]),
        ("kills without arena", report.crashes[1]),
        ("power cuts", report.crashes[2]),
        ("crashes in recovery", report.crashes_in_recovery),
        ("orderly ends", report.closes),
        ("records that only the arena held", report.from_arena),
        ("patches restored", report.patches),
        ("torn groups", report.torn),
        ("torn sectors", report.sectors[2]),
        ("tables used", report.tables),
        ("superblocks repaired", report.superblocks),
        ("refusals for a lost arena", report.refused),
        ("openings that failed", report.failed_opens),
        ("wrong devices refused", report.probes_refused),
        ("damaged devices survived", report.probes_survived),
        ("volumes grown", report.resizes),
        ("doors opened again", report.reattaches),
        ("waits for space", report.sometimes.space_waits),
        ("log errors", report.sometimes.log_errors),
        ("backing errors", report.sometimes.backing_errors),
        ("regions that could not be read", report.sometimes.load_errors),
        ("epochs", report.sometimes.epochs),
        ("wraps of the log", report.sometimes.regions / 8),
        ("sessions whose client died", report.sometimes.sessions.ends[0]),
        ("sessions told to end", report.sometimes.sessions.ends[1]),
        ("sessions that were broken", report.sometimes.sessions.ends[2]),
        ("work of a dead client that would have waited", report.sometimes.sessions.cut_short),
        ("requests that waited for a session in vain", report.sometimes.sessions.cancelled),
        ("submissions held for another session", report.sometimes.sessions.held),
        ("silent failures", report.sometimes.sessions.silent_failures),
        ("barriers", report.sometimes.sessions.barriers),
        ("sessions without room for completions", report.sometimes.sessions.full),
        ("clients that waited for each other", report.sometimes.sessions.gave_up),
    ];
    for (what, count) in seen {
        assert!(count > 0, "no world met {what}");
    }
}

/// Seeds that nobody has seen, for `TIDEGATE_FRESH` seconds.
#[test]
fn fresh_seeds() {
    let Some(seconds) = number("TIDEGATE_FRESH").filter(|_| !is_replay()) else { return };
    let first = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_nanos() as u64 >> 8;
    println!("fresh seeds from {first} on");
    let time = Until::Time(Duration::from_secs(seconds));
    finish("fresh seeds", run_all(time, THREADS, |i| Options::long(first + i)));
}

/// All seeds that ever failed.
#[test]
fn seeds_that_failed() {
    if is_replay() {
        return;
    }
    let text = include_str!("../seeds.txt");
    let lines = text.lines().filter_map(|line| line.split('#').next()?.split_whitespace().next());
    let seeds: Vec<u64> = lines.map(|seed| seed.parse().expect("a seed a line")).collect();
    assert!(!seeds.is_empty());
    let count = Until::Count(seeds.len() as u64);
    finish("seeds that failed", run_all(count, THREADS, |i| Options::long(seeds[i as usize])));
}

#[test]
fn same_seed_same_story() {
    for seed in 1..=30 {
        let (once, again) = (run(Options::long(seed)), run(Options::long(seed)));
        match (once, again) {
            (Ok(once), Ok(again)) => assert_eq!(once, again, "seed {seed}"),
            (Err(failure), _) | (_, Err(failure)) => panic!("{failure}"),
        }
    }
}

/// Steps of the first server of a story if nothing stops it.
fn first_life(options: Options) -> u64 {
    let whole = CrashAt { step: u64::MAX, kind: CrashKind::Power, again: 0 };
    let told = run(Options { short: Some(whole), ..options });
    told.unwrap_or_else(|failure| panic!("{failure}")).first_life
}

#[test]
fn every_step() {
    if is_replay() {
        return;
    }
    let kinds = [CrashKind::Power, CrashKind::Kill, CrashKind::KillWithoutArena];
    let mut stories = Vec::new();
    for seed in 1..=number("TIDEGATE_SHORT_SEEDS").unwrap_or(4) {
        for step in 1..first_life(Options::long(seed)) {
            for (i, &kind) in kinds.iter().enumerate() {
                // Each first crash with another second one, so that all steps of recovery get their turn.
                for again in [0, 1 + (step * 7 + i as u64) % 60] {
                    stories.push(Options::short(seed, CrashAt { step, kind, again }));
                }
            }
        }
    }
    let count = Until::Count(stories.len() as u64);
    finish("every step", run_all(count, THREADS, |i| stories[i as usize]));
}

/// The power cuts of a script: every step, and every subset of what is unflushed then. Of two scripts that met the same events
/// up to a step the same is on the disks, and nothing else is left of them after the cut: `met` holds those that had their
/// turn.
fn cuts_of(options: Options, met: &Mutex<HashSet<(u64, u64)>>) -> Vec<Options> {
    let mut cuts = Vec::new();
    for step in 1..first_life(options) {
        let short = Some(CrashAt { step, kind: CrashKind::Power, again: 0 });
        let none_kept = run(Options { short, ..options }).unwrap_or_else(|failure| panic!("{failure}"));
        if !met.lock().unwrap().insert((options.seed, none_kept.first_trace)) {
            continue;
        }
        let cut = none_kept.first_cut;
        // Of many sectors: each alone, all but each, all.
        let subsets: Vec<u64> = if cut <= SUBSET_SECTORS {
            (0..1 << cut).collect()
        } else {
            let all = (1 << cut.min(63)) - 1;
            (0..cut.min(63)).flat_map(|bit| [1 << bit, all ^ (1 << bit)]).chain([0, all]).collect()
        };
        cuts.extend(subsets.into_iter().map(|subset| Options { short, subset: Some(subset), ..options }));
    }
    cuts
}

/// Every sequence of a few requests, a power cut at every step, and every subset of what was not flushed then.
#[test]
fn everything_within_bounds() {
    if is_replay() {
        return;
    }
    let most = number("TIDEGATE_SCRIPT_LENGTH").unwrap_or(2) as usize;
    let (met, next, cuts) = (Mutex::default(), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let scripts = scripts(most);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let at = || next.fetch_add(1, Ordering::Relaxed);
                while let Some((i, &script)) = Some(at()).and_then(|i| Some((i, scripts.get(i)?))) {
                    // Other block sizes and ack levels for each.
                    let options = Options { script, subset: Some(0), ..Options::long(1 + i as u64 % 16) };
                    let of_script = cuts_of(options, &met);
                    cuts.lock().unwrap().extend(of_script);
                }
            });
        }
    });
    let cuts: Vec<Options> = cuts.into_inner().unwrap();
    let count = Until::Count(cuts.len() as u64);
    let what = format!("{} scripts of up to {most}, every step, every subset", scripts.len());
    finish(&what, run_all(count, THREADS, |i| cuts[i as usize]));
}

/// The script that a text names.
fn script_of(text: &str) -> Script {
    let mut script = [None; 3];
    for (place, name) in script.iter_mut().zip(text.split(',')) {
        *place = ALPHABET.into_iter().find(|op| format!("{op:?}") == name);
        assert!(place.is_some(), "{name} is no request of a script");
    }
    script
}

/// Replays what the variables name.
#[test]
fn replay() {
    let Some(seed) = number("TIDEGATE_SEED") else { return };
    let short = std::env::var("TIDEGATE_CRASH").ok().map(|text| {
        let parts: Vec<&str> = text.split(',').collect();
        let kind = match parts[1] {
            "Kill" => CrashKind::Kill,
            "KillWithoutArena" => CrashKind::KillWithoutArena,
            "Power" => CrashKind::Power,
            other => panic!("{other} is no kind of crash"),
        };
        CrashAt { step: parts[0].parse().unwrap(), kind, again: parts[2].parse().unwrap() }
    });
    let script = std::env::var("TIDEGATE_SCRIPT").map_or([None; 3], |text| script_of(&text));
    let (subset, log) = (number("TIDEGATE_SUBSET"), number("TIDEGATE_LOG").is_some());
    match run(Options { seed, short, script, subset, log }) {
        Ok(report) => println!("seed {seed}: {report:?}"),
        Err(failure) => {
            failure.log.iter().for_each(|line| println!("{line}"));
            panic!("{failure}");
        }
    }
}
