//! Many stories on several threads, and their totals.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::report::{Failure, Options, Report};
use super::world::run;

/// Failures after which no more stories begin.
const FAILURES_MAX: usize = 5;

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many stories.
    Count(u64),
    /// After this time.
    Time(Duration),
}

/// What many stories told.
#[derive(Debug, Default)]
pub struct Totals {
    /// Stories.
    pub worlds: u64,
    /// Their numbers.
    pub report: Report,
    /// Those that broke.
    pub failures: Vec<Box<Failure>>,
    /// The slowest: its seconds and its seed.
    pub slowest: (f64, u64),
    /// How long it took.
    pub seconds: f64,
}

/// Runs the stories that `story` makes of 0, 1, 2 …, on `threads` threads: worlds are independent, so a story is the same
/// whatever runs beside it. Nothing of a story is kept but its numbers.
pub fn run_all(until: Until, threads: usize, story: impl Fn(u64) -> Options + Sync) -> Totals {
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let totals = Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let over = match until {
                        Until::Count(count) => i >= count,
                        Until::Time(time) => started.elapsed() >= time,
                    };
                    if over || totals.lock().expect("no thread panics").failures.len() >= FAILURES_MAX {
                        return;
                    }
                    let (begun, options) = (Instant::now(), story(i));
                    let told = run(options);
                    let took = begun.elapsed().as_secs_f64();
                    let mut totals = totals.lock().expect("no thread panics");
                    totals.worlds += 1;
                    if took > totals.slowest.0 {
                        totals.slowest = (took, options.seed);
                    }
                    match told {
                        Ok(report) => totals.report.add(&report),
                        Err(failure) => totals.failures.push(failure),
                    }
                }
            });
        }
    });
    let mut totals = totals.into_inner().expect("no thread panics");
    totals.seconds = started.elapsed().as_secs_f64();
    totals
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { crashes: [kills, lost, cuts], sectors: [unflushed, gone, torn, garbage], .. } =
            self.report;
        let r = &self.report;
        let s = &r.sometimes;
        let a_minute = self.worlds as f64 * 60.0 / self.seconds.max(0.001);
        writeln!(f, "{} worlds in {:.0} s: {a_minute:.0} a minute", self.worlds, self.seconds)?;
        writeln!(
            f,
            "  {} steps, {} requests, {} epochs, {} waits for space",
            r.steps, s.requests, s.epochs, s.space_waits
        )?;
        writeln!(
            f,
            "  {kills} kills, {lost} kills with the arena lost, {cuts} power cuts; {} of them in recovery; {} orderly ends",
            r.crashes_in_recovery, r.closes
        )?;
        writeln!(
            f,
            "  {unflushed} unflushed sectors met a power cut: {gone} lost, {torn} torn, {garbage} garbage, the others kept"
        )?;
        writeln!(
            f,
            "  {} openings: {} with records from the log, {} with records from the arena, {} torn groups given up, {} block \
             images restored, {} superblock repairs, {} ended by a fault, {} refusals of a lost arena",
            r.opens, r.by_log, r.by_arena, r.torn, r.patches, r.superblocks, r.failed_opens, r.refused
        )?;
        writeln!(
            f,
            "  {} faults injected: {} failed log writes, {} failed flush attempts on backings, {} failed reads of regions",
            r.faults, s.log_errors, s.backing_errors, s.load_errors
        )?;
        writeln!(
            f,
            "  {} damaged, old or wrong devices refused, {} survived; {} damaged last groups taken for torn, {} \
             damaged arenas whose end was given up",
            r.probes_refused, r.probes_survived, r.last_groups_given_up, r.arena_shorter
        )?;
        let b = &s.sessions;
        let [gone, told, broken] = b.ends;
        writeln!(
            f,
            "  {} sessions of byte devices, {} completions, {} barriers: {gone} clients died ({} of them, waited for), {told} \
             sessions were told to end, {broken} broken; {} left submissions that would have waited, {} requests waited in \
             vain, {} silent failures",
            b.begun, b.completions, b.barriers, b.gave_up, b.cut_short, b.cancelled, b.silent_failures
        )?;
        let (slowest, seed) = self.slowest;
        writeln!(f, "  {} volumes grown, {} doors closed and opened", r.resizes, r.reattaches)?;
        write!(f, "  the slowest world took {slowest:.1} s: seed {seed}")
    }
}
