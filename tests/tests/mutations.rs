//! Deliberate bugs: each is switched on in the engine and must be found by the simulator within [`SEEDS`] seeds.
//!
//! `TIDEGATE_MUTATION=Name` runs one, `TIDEGATE_SEEDS=N` changes the bound. Only with the feature `mutations`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tidegate_driver::base::mutation::{self, Mutation};
use tidegate_tests::sim::{Options, run};

/// Seeds within which a bug must be found.
const SEEDS: u64 = 5000;
/// Threads: worlds are independent.
const THREADS: usize = 2;

/// A bug that was found: after how many seeds, and by what.
struct Hit {
    seed: u64,
    what: String,
}

fn short(what: &str) -> String {
    let line = what.lines().next().unwrap_or_default().replace('|', "/");
    line.chars().take(110).collect()
}

#[test]
fn every_bug_is_found() {
    let only = std::env::var("TIDEGATE_MUTATION").ok().filter(|name| !name.is_empty());
    let seeds = std::env::var("TIDEGATE_SEEDS").ok().and_then(|n| n.trim().parse().ok()).unwrap_or(SEEDS);
    let chosen: Vec<Mutation> = mutation::ALL
        .iter()
        .copied()
        .filter(|m| only.as_ref().is_none_or(|name| *name == format!("{m:?}")))
        .collect();
    assert!(!chosen.is_empty(), "no such bug");
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = find(&chosen, seeds);
    std::panic::set_hook(quiet);
    println!("| bug | seeds | found by |\n|---|---|---|");
    for mutation in &chosen {
        match found.get(mutation) {
            Some(hit) => println!("| `{mutation:?}` | {} | {} |", hit.seed, hit.what),
            None => println!("| `{mutation:?}` | not within {seeds} | – |"),
        }
    }
    let missed: Vec<&Mutation> = chosen.iter().filter(|m| !found.contains_key(m)).collect();
    assert!(missed.is_empty(), "not found within {seeds} seeds: {missed:?}");
}

/// Each bug gets the first seed that finds it. A thread works on one bug at a time.
fn find(chosen: &[Mutation], seeds: u64) -> BTreeMap<Mutation, Hit> {
    let found = Mutex::new(BTreeMap::new());
    let at = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(&mutation) = chosen.get(at.fetch_add(1, Ordering::Relaxed)) {
                    mutation::set(Some(mutation));
                    let hit = (1..=seeds).find_map(|seed| {
                        let failure = run(Options::long(seed)).err()?;
                        Some(Hit { seed, what: short(&failure.what) })
                    });
                    mutation::set(None);
                    if let Some(hit) = hit {
                        found.lock().unwrap().insert(mutation, hit);
                    }
                }
            });
        }
    });
    found.into_inner().unwrap()
}
