//! How much is measured.

use std::time::Duration;

/// Runs of each measurement, and how long one takes.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Runs.
    pub runs: usize,
    /// Length of each.
    pub span: Duration,
}

impl Effort {
    /// From `ROUNDS` and `SECONDS_EACH`.
    #[must_use]
    pub fn from_environment() -> Effort {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
        Effort {
            runs: number("ROUNDS").map_or(5, |rounds| rounds.max(1.0) as usize),
            span: Duration::from_secs_f64(number("SECONDS_EACH").unwrap_or(2.0).clamp(0.1, 3600.0)),
        }
    }
}

/// The value below which `part` of `sorted` lies; 0 if there are none.
#[must_use]
pub fn percentile(sorted: &[f64], part: f64) -> f64 {
    let at = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(0.0)
}
