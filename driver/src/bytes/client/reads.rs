//! Reads: in parts, each into a slot of the arena.

use std::time::Duration;

use super::Device;
use super::rings::{OWN_COOKIE, Own};
use super::store::check;
use super::wait::{Limit, interrupted};
use crate::bytes::{Operation, Result, Submission};

/// Slots of reads that were given up come back with their completions, for which a thread that waits for a slot looks itself.
const SLOT_PATIENCE: Duration = Duration::from_millis(100);

impl Device {
    /// Reads. More than 64 KiB at once is read in parts.
    pub fn read(&self, offset: u64, mut into: &mut [u8]) -> Result<()> {
        let limit = self.limit(None)?;
        let slot_bytes = self.parts.read_slot as usize;
        let mut at = offset;
        while !into.is_empty() {
            // Whoever has slots waits for no other: all might have some, and wait for ever.
            let slots = self.take_slots(into.len().div_ceil(slot_bytes), limit)?;
            let (now, later) = into.split_at_mut(into.len().min(slots.len() * slot_bytes));
            into = later;
            let mut reads = Vec::with_capacity(slots.len());
            for (i, (slot, part)) in slots.iter().zip(now.chunks(slot_bytes)).enumerate() {
                match self.begin_read(at, part.len(), *slot, limit) {
                    Ok(read) => reads.push(read),
                    Err(e) => {
                        slots[i..].iter().for_each(|slot| self.give_slot(*slot));
                        self.abandon_reads(&reads);
                        return Err(e);
                    }
                }
                at += part.len() as u64;
            }
            self.end_reads(&reads, now.chunks_mut(slot_bytes), limit)?;
        }
        Ok(())
    }

    /// Up to `want` slots: as many as are free, or the first that comes back.
    fn take_slots(&self, want: usize, limit: Limit) -> Result<Vec<u32>> {
        loop {
            let mut heap = self.heap.lock();
            let slots: Vec<u32> = std::iter::from_fn(|| heap.take_slot()).take(want).collect();
            if !slots.is_empty() {
                return Ok(slots);
            }
            if let Some(gone) = self.waiting.gone() {
                return Err(gone.clone());
            }
            if self.waiting.is_interrupted(limit) {
                return Err(interrupted());
            }
            // Not at the socket: the server sends nothing when another thread gives a slot back.
            let timed_out = self.slot_back.wait_for(&mut heap, SLOT_PATIENCE).timed_out();
            drop(heap);
            if timed_out {
                self.collect();
            }
        }
    }

    /// Sequence and slot of a read of one slot's bytes or fewer.
    fn begin_read(&self, offset: u64, len: usize, slot: u32, limit: Limit) -> Result<(u64, u32)> {
        let submission = Submission {
            operation: Operation::Read as u8,
            offset,
            len: len as u64,
            cookie: OWN_COOKIE,
            ..Submission::default()
        };
        let sequence = self.submit_own(submission, Some(Own::Awaited), limit, |_| Some(slot))?;
        Ok((sequence.expect("without a deadline"), slot))
    }

    fn give_slot(&self, slot: u32) {
        self.heap.lock().give_slot(slot);
        self.slot_back.notify_one();
    }

    fn end_reads<'a>(
        &self,
        reads: &[(u64, u32)],
        parts: impl Iterator<Item = &'a mut [u8]>,
        limit: Limit,
    ) -> Result<()> {
        for (i, ((sequence, slot), part)) in reads.iter().zip(parts).enumerate() {
            // A slot whose read is under way must not be given to another.
            let outcome = self.finished(*sequence, Own::AbandonedRead(*slot), limit).and_then(|completion| {
                let completion = completion.expect("without a deadline");
                let outcome = check(&completion, || format!("cannot read volume '{}'", self.info.name))
                    .and_then(|()| self.get(*slot, part));
                self.give_slot(*slot);
                outcome
            });
            if let Err(e) = outcome {
                self.abandon_reads(&reads[i + 1..]);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Their slots come back with their completions.
    fn abandon_reads(&self, reads: &[(u64, u32)]) {
        let mut reaper = self.reaper.lock();
        reads.iter().for_each(|(sequence, slot)| reaper.give_up(*sequence, Own::AbandonedRead(*slot)));
    }
}
