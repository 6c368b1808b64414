//! Who has which part of a session's arena, on the client's side.
//!
//! ```text
//!   0        half of it        three quarters              the end
//!   │ copies of writes │ slots for copied reads │ allocations of the program │
//! ```
//! Copies of writes are a ring: they are given back in the order in which the server takes the submissions. Slots for reads
//! are all of one size. The rest is a heap, first fit.

use std::collections::{BTreeMap, VecDeque};

/// Alignment of everything.
const ALIGN: u32 = 64;
/// Slots for reads, at most this many and at most this large.
const READ_SLOTS: u32 = 16;
const READ_SLOT_MAX: u32 = 64 << 10;

/// Where the parts of an arena begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    pub copies: u32,
    pub read_slot: u32,
    pub read_slots: u32,
    pub heap: u32,
    pub end: u32,
}

impl Parts {
    pub fn of(arena_bytes: u32) -> Parts {
        let copies = arena_bytes / 2 / ALIGN * ALIGN;
        let reads = arena_bytes / 4;
        let read_slot = (reads / READ_SLOTS).clamp(ALIGN, READ_SLOT_MAX) / ALIGN * ALIGN;
        let read_slots = (reads / read_slot).min(READ_SLOTS);
        Parts {
            copies,
            read_slot,
            read_slots,
            heap: copies + read_slot * read_slots,
            end: arena_bytes / ALIGN * ALIGN,
        }
    }
}

fn rounded(len: usize) -> Option<u32> {
    u32::try_from(len).ok().filter(|len| *len > 0)?.checked_next_multiple_of(ALIGN)
}

/// The ring of copies.
#[derive(Debug)]
pub(super) struct Copies {
    size: u64,
    /// Bytes ever given out and ever given back; what is skipped at the end of the ring is among them.
    out: u64,
    back: u64,
    /// For each copy, in order: the submission that it belongs to, and what is back when that was taken.
    ends: VecDeque<(u64, u64)>,
}

impl Copies {
    pub fn new(parts: &Parts) -> Copies {
        Copies { size: u64::from(parts.copies), out: 0, back: 0, ends: VecDeque::new() }
    }

    /// Room for a copy that belongs to submission `sequence`; `None`: not now.
    pub fn take(&mut self, len: usize, sequence: u64) -> Option<u32> {
        let len = u64::from(rounded(len)?);
        let at = self.out % self.size;
        let skip = if at + len > self.size { self.size - at } else { 0 };
        if len > self.size || self.out + skip + len - self.back > self.size {
            return None;
        }
        let start = (self.out + skip) % self.size;
        self.out += skip + len;
        self.ends.push_back((sequence, self.out));
        Some(start as u32)
    }

    /// The server has taken the submissions up to `sequence`.
    pub fn give_back(&mut self, sequence: u64) {
        while let Some((_, end)) = self.ends.front().filter(|(of, _)| *of <= sequence) {
            self.back = *end;
            self.ends.pop_front();
        }
        if self.ends.is_empty() {
            // From the start again: memory that is in the cache.
            (self.out, self.back) = (0, 0);
        }
    }
}

/// The heap, and the slots for reads.
#[derive(Debug)]
pub(super) struct Heap {
    free: BTreeMap<u32, u32>,
    used: BTreeMap<u32, u32>,
    slots: Vec<u32>,
}

impl Heap {
    pub fn new(parts: &Parts) -> Heap {
        let slots = (0..parts.read_slots).rev().map(|i| parts.copies + i * parts.read_slot).collect();
        let free = BTreeMap::from([(parts.heap, parts.end - parts.heap)]);
        Heap { free: free.into_iter().filter(|(_, len)| *len > 0).collect(), used: BTreeMap::new(), slots }
    }

    pub fn alloc(&mut self, len: usize) -> Option<u32> {
        let len = rounded(len)?;
        let (&at, &there) = self.free.iter().find(|(_, there)| **there >= len)?;
        self.free.remove(&at);
        if there > len {
            self.free.insert(at + len, there - len);
        }
        self.used.insert(at, len);
        Some(at)
    }

    /// Whether `at` was the start of an allocation.
    pub fn free(&mut self, at: u32) -> bool {
        let Some(mut len) = self.used.remove(&at) else { return false };
        let mut at = at;
        if let Some(next) = self.free.remove(&(at + len)) {
            len += next;
        }
        if let Some((&before, &there)) = self.free.range(..at).next_back()
            && before + there == at
        {
            self.free.remove(&before);
            (at, len) = (before, there + len);
        }
        self.free.insert(at, len);
        true
    }

    pub fn take_slot(&mut self) -> Option<u32> {
        self.slots.pop()
    }

    pub fn give_slot(&mut self, at: u32) {
        self.slots.push(at);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_fill_the_arena_whatever_its_size() {
        for size in [4096, 8192, 65536, 1 << 20, 8 << 20, 256 << 20] {
            let parts = Parts::of(size);
            assert!(parts.read_slots >= 1 && parts.read_slot >= 64, "{parts:?}");
            assert!(parts.copies <= parts.heap && parts.heap < parts.end && parts.end <= size, "{parts:?}");
        }
    }

    proptest! {
        #[test]
        fn copies_never_overlap(lens in prop::collection::vec((1usize..900, any::<bool>()), 1..200)) {
            let parts = Parts::of(4096);
            let mut copies = Copies::new(&parts);
            let mut live: VecDeque<(u64, u32, u32)> = VecDeque::new();
            for (sequence, (len, give)) in (1..).zip(lens) {
                if give && let Some((oldest, ..)) = live.pop_front() {
                    copies.give_back(oldest);
                }
                if let Some(at) = copies.take(len, sequence) {
                    let end = at + len as u32;
                    prop_assert!(end <= parts.copies);
                    prop_assert!(live.iter().all(|(_, a, e)| end <= *a || *e <= at));
                    live.push_back((sequence, at, end));
                } else {
                    prop_assert!(!live.is_empty(), "an empty ring has room for {len}");
                }
            }
        }

        #[test]
        fn allocations_never_overlap_and_all_comes_back(
            steps in prop::collection::vec((1usize..600, any::<prop::sample::Index>()), 1..200),
        ) {
            let parts = Parts::of(8192);
            let mut heap = Heap::new(&parts);
            let whole = heap.free.clone();
            let mut live: Vec<(u32, u32)> = Vec::new();
            for (len, which) in steps {
                match heap.alloc(len) {
                    Some(at) => {
                        let end = at + len as u32;
                        prop_assert!(at >= parts.heap && end <= parts.end && at.is_multiple_of(64));
                        prop_assert!(live.iter().all(|(a, e)| end <= *a || *e <= at));
                        live.push((at, end));
                    }
                    None => {
                        let (at, _) = live.swap_remove(which.index(live.len()));
                        prop_assert!(heap.free(at) && !heap.free(at));
                    }
                }
            }
            for (at, _) in live {
                prop_assert!(heap.free(at));
            }
            prop_assert_eq!(heap.free, whole);
        }
    }
}
