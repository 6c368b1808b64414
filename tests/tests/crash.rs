//! Crash tests: worlds by seed, and every crash step of short ones.
//!
//! `TIDEGATE_SEEDS=N` runs that many worlds, `TIDEGATE_SEED=S` replays one (test `replay`), `TIDEGATE_CRASH=step,Kind,again`
//! makes it the short story with that crash, `TIDEGATE_LOG=1` prints its events.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tidegate_tests::sim::{CrashAt, CrashKind, Failure, Options, Report, run};

/// Worlds of an ordinary run.
const SEEDS: u64 = 300;
/// Threads: worlds are independent.
const THREADS: usize = 2;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.trim().is_empty())?;
    Some(text.trim().parse().unwrap_or_else(|_| panic!("{name} is a number, not '{text}'")))
}

/// Runs all stories; panics with the first few that break.
fn run_all(what: &str, stories: u64, story: impl Fn(u64) -> Options + Sync) -> Report {
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let total = Mutex::new((Report::default(), Vec::<Box<Failure>>::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= stories || total.lock().unwrap().1.len() >= 5 {
                        return;
                    }
                    let told = run(story(i));
                    let mut total = total.lock().unwrap();
                    match told {
                        Ok(report) => total.0.add(&report),
                        Err(failure) => total.1.push(failure),
                    }
                }
            });
        }
    });
    let (report, failures) = total.into_inner().unwrap();
    let seconds = started.elapsed().as_secs_f64();
    println!("{what}: {stories} worlds in {seconds:.1} s ({:.0}/s): {report:?}", stories as f64 / seconds);
    let texts: Vec<String> = failures.iter().map(|f| f.to_string()).collect();
    assert!(texts.is_empty(), "\n{}\n", texts.join("\n"));
    report
}

#[test]
fn worlds() {
    if number("TIDEGATE_SEED").is_some() {
        return;
    }
    let seeds = number("TIDEGATE_SEEDS").unwrap_or(SEEDS);
    let first = number("TIDEGATE_FIRST").unwrap_or(1);
    let report = run_all("worlds", seeds, |i| Options::long(first + i));
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
        ("tables used", report.tables),
        ("superblocks repaired", report.superblocks),
        ("refusals for a lost arena", report.refused),
        ("openings that failed", report.failed_opens),
        ("waits for space", report.sometimes.space_waits),
        ("log errors", report.sometimes.log_errors),
        ("backing errors", report.sometimes.backing_errors),
        ("epochs", report.sometimes.epochs),
        ("wraps of the log", report.sometimes.regions / 8),
    ];
    for (what, count) in seen {
        assert!(count > 0, "no world met {what}");
    }
}

#[test]
fn same_seed_same_story() {
    for seed in 1..=10 {
        let (once, again) = (run(Options::long(seed)), run(Options::long(seed)));
        match (once, again) {
            (Ok(once), Ok(again)) => assert_eq!(once, again, "seed {seed}"),
            (Err(failure), _) | (_, Err(failure)) => panic!("{failure}"),
        }
    }
}

#[test]
fn every_step() {
    if number("TIDEGATE_SEED").is_some() {
        return;
    }
    let kinds = [CrashKind::Power, CrashKind::Kill, CrashKind::KillWithoutArena];
    let mut stories = Vec::new();
    for seed in 1..=number("TIDEGATE_SHORT_SEEDS").unwrap_or(4) {
        let whole = Options {
            seed,
            short: Some(CrashAt { step: u64::MAX, kind: CrashKind::Power, again: 0 }),
            log: false,
        };
        let steps = run(whole).unwrap_or_else(|failure| panic!("{failure}")).first_life;
        for step in 1..steps {
            for (i, &kind) in kinds.iter().enumerate() {
                // Each first crash with another second one, so that all steps of recovery get their turn.
                for again in [0, 1 + (step * 7 + i as u64) % 60] {
                    stories.push(Options { seed, short: Some(CrashAt { step, kind, again }), log: false });
                }
            }
        }
    }
    run_all("every step", stories.len() as u64, |i| stories[i as usize]);
}

/// Replays what `TIDEGATE_SEED` and `TIDEGATE_CRASH` name.
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
    let log = number("TIDEGATE_LOG").is_some();
    match run(Options { seed, short, log }) {
        Ok(report) => println!("seed {seed}: {report:?}"),
        Err(failure) => {
            failure.log.iter().for_each(|line| println!("{line}"));
            panic!("{failure}");
        }
    }
}
