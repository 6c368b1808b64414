//! What the clients ask for.

use std::sync::Arc;

use tidegate_driver::volume::{Request, RequestKind};

use super::rng::Rng;

/// How the clients of a life behave.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Weights of write, write-zeroes, discard, flush, read.
    weights: [u64; 5],
    /// FUA among the changes, in a thousand.
    fua: u64,
    /// Requests that stay below a small part of the volume, in a thousand.
    hot: u64,
    /// Size of that part.
    hot_bytes: u64,
    /// Weights of tiny, block-sized, any and largest lengths.
    sizes: [u64; 4],
    /// One length for everything, so that what a recovery gave up and what takes its place have the same layout; 0: no.
    one_size: u64,
    /// Longest pause between requests in ns.
    pause_ns: u64,
    /// Pauses long enough for the idle flush, in a thousand.
    idle: u64,
    /// Most requests in flight per door.
    pub depth: u32,
    /// Payloads that cannot be fetched, in a thousand.
    pub fetch_fails: u64,
    /// Requests that make no sense, in a thousand.
    wrong: u64,
}

impl Habits {
    /// Habits by chance.
    pub fn draw(rng: &mut Rng) -> Habits {
        let weights = match rng.below(6) {
            0 => [10, 0, 0, 1, 1],
            1 => [6, 2, 2, 1, 4],
            2 => [4, 1, 0, 4, 1],
            3 => [3, 3, 3, 1, 3],
            _ => [8, 1, 1, 1, 4],
        };
        let sizes = rng.pick(&[[5, 3, 3, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [1, 1, 1, 1]]);
        Habits {
            weights,
            fua: rng.pick(&[0, 30, 300]),
            hot: rng.pick(&[0, 500, 900, 1000]),
            hot_bytes: rng.pick(&[600, 4096, 5000, 20_000]),
            sizes,
            one_size: rng.pick(&[0, 0, 0, 0, 100, 512, 1000, 4096]),
            pause_ns: rng.pick(&[0, 1_000, 100_000, 2_000_000]),
            idle: rng.pick(&[0, 0, 2, 20]),
            depth: rng.pick(&[1, 2, 4, 16]),
            fetch_fails: rng.pick(&[0, 0, 0, 20]),
            wrong: rng.pick(&[0, 5]),
        }
    }

    /// Writes of one size and nothing else: what takes the place of a group has its layout.
    pub fn steady(rng: &mut Rng, one_size: u64, pause_ns: u64) -> Habits {
        Habits {
            weights: [1, 0, 0, 0, 0],
            fua: 0,
            hot: 0,
            one_size,
            pause_ns,
            idle: 0,
            fetch_fails: 0,
            wrong: 0,
            depth: rng.pick(&[1, 2, 4]),
            ..Habits::draw(rng)
        }
    }

    /// The pause before the next request.
    pub fn pause_ns(&self, rng: &mut Rng) -> u64 {
        if rng.chance(self.idle) {
            return rng.range(250_000_000, 900_000_000);
        }
        if self.pause_ns == 0 { 0 } else { rng.below(self.pause_ns) }
    }

    /// The next request and its content. `Err` content: it must be refused.
    pub fn next(&self, rng: &mut Rng, tag: u32, size: u64, payload_max: u64) -> (Request, Option<Arc<[u8]>>) {
        let kinds = [
            RequestKind::Write,
            RequestKind::WriteZeroes,
            RequestKind::Discard,
            RequestKind::Flush,
            RequestKind::Read,
        ];
        let kind = kinds[weighted(rng, &self.weights)];
        let fua = !matches!(kind, RequestKind::Read | RequestKind::Flush) && rng.chance(self.fua);
        if kind == RequestKind::Flush {
            return (Request { tag, kind, offset: 0, len: 0, fua }, None);
        }
        let transfers = matches!(kind, RequestKind::Write | RequestKind::Read);
        let longest = if transfers || !rng.chance(100) { payload_max.min(size) } else { size };
        let mut len = match weighted(rng, &self.sizes) {
            0 => rng.range(1, 100),
            1 => 512 * rng.range(1, 16),
            2 => rng.range(1, longest),
            _ => longest,
        }
        .min(longest);
        if self.one_size > 0 {
            len = self.one_size.min(longest);
        }
        let reach = if rng.chance(self.hot) { self.hot_bytes.min(size) } else { size };
        let mut offset = rng.below(reach).min(size - len);
        if rng.chance(500) {
            offset = offset / 512 * 512;
        }
        if rng.chance(self.wrong) {
            match rng.below(3) {
                0 => offset = size - len + 1,
                1 if transfers => (offset, len) = (0, payload_max + 1),
                _ => len = 0,
            }
        }
        let content = (kind == RequestKind::Write).then(|| {
            let mut bytes = vec![0; len as usize];
            rng.fill(&mut bytes);
            bytes.into()
        });
        (Request { tag, kind, offset, len, fua }, content)
    }
}

fn weighted(rng: &mut Rng, weights: &[u64]) -> usize {
    let mut at = rng.below(weights.iter().sum());
    for (i, &weight) in weights.iter().enumerate() {
        if at < weight {
            return i;
        }
        at -= weight;
    }
    unreachable!("the sum bounds it")
}
