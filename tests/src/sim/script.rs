//! Bounded-exhaustive stories: a few chosen requests instead of clients by chance.

use std::sync::Arc;

use tidegate_driver::volume::{Request, RequestKind};

use super::rng::Rng;

/// A request of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// A write of a block and a bit.
    Write,
    /// A write of a few bytes that overlaps it.
    Overlap,
    /// Zeroes over a part of both.
    Zero,
    /// A discard over a part of both.
    Discard,
    /// A flush.
    Flush,
    /// A write that is durable when it is acknowledged.
    Fua,
}

/// All of them.
pub const ALPHABET: [Do; 6] = [Do::Write, Do::Overlap, Do::Zero, Do::Discard, Do::Flush, Do::Fua];

/// Up to three requests.
pub type Script = [Option<Do>; 3];

/// All scripts of one to `most` requests.
#[must_use]
pub fn scripts(most: usize) -> Vec<Script> {
    let mut all: Vec<Script> = vec![[None; 3]];
    let mut from = 0;
    for at in 0..most.min(3) {
        let to = all.len();
        for i in from..to {
            all.extend(ALPHABET.map(|op| {
                let mut script = all[i];
                script[at] = Some(op);
                script
            }));
        }
        from = to;
    }
    all.remove(0);
    all
}

/// The request that `op` is on a volume of `size` bytes.
pub fn request(op: Do, tag: u32, size: u64, rng: &mut Rng) -> (Request, Option<Arc<[u8]>>) {
    let (kind, offset, len) = match op {
        Do::Write => (RequestKind::Write, 0, 700),
        Do::Overlap => (RequestKind::Write, 500, 100),
        Do::Zero => (RequestKind::WriteZeroes, 300, 900),
        Do::Discard => (RequestKind::Discard, 0, 1024),
        Do::Flush => (RequestKind::Flush, 0, 0),
        Do::Fua => (RequestKind::Write, 512, 512),
    };
    let len = len.min(size);
    let offset = offset.min(size - len);
    let content = (kind == RequestKind::Write).then(|| {
        let mut bytes = vec![0; len as usize];
        rng.fill(&mut bytes);
        bytes.into()
    });
    (Request { tag, kind, offset, len, fua: op == Do::Fua }, content)
}
