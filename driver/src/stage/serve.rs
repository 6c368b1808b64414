//! The other half of the core: reads, regions coming and going, flush epochs. See `core.rs` for the rules.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::arena::Arena;
use super::core::{Core, DoorId, Outcome};
use super::index::Source;
use super::pacing::Fill;
use super::ring::{RegionState, TableState};
use super::volume_index::{Forgotten, VolumeIndex};
use crate::base::limits::INDEX_EXTENTS_MAX;
use crate::base::mutation::{Mutation, is};
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};
use crate::format::region::RegionStart;

/// Most records that one epoch takes: bounds the flush plan's memory.
pub const EPOCH_RECORDS_MAX: u32 = 64 << 10;

/// Slots that get their memory while regions are brought back into memory.
const ALLOCATED_AHEAD: u64 = 8;

/// Where bytes of a read come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadSource {
    /// From the arena.
    Stage {
        /// Region.
        region: RegionSeq,
        /// Offset in the region.
        offset: u32,
    },
    /// Zeroes.
    Zero,
    /// From the backing.
    Backing,
}

/// What a read has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Where all its bytes are.
    All,
    /// A region that is not in memory. The background is to be asked for it.
    Cold,
    /// A record that is not published yet.
    Early,
}

impl ReadSource {
    /// Whether it goes on where `last`, the piece before it, ends.
    fn follows(self, last: &ReadPiece) -> bool {
        match (last.source, self) {
            (ReadSource::Stage { region, offset }, ReadSource::Stage { region: next, offset: at }) => {
                region == next && u64::from(offset) + last.range.len() == u64::from(at)
            }
            (before, next) => before == next,
        }
    }
}

/// A part of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPiece {
    /// Bytes of the volume.
    pub range: ByteRange,
    /// Where they are.
    pub source: ReadSource,
}

/// A flush epoch: records above `from` up to `to`, in regions `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// The checkpoint so far.
    pub from: Lsn,
    /// The checkpoint to be.
    pub to: Lsn,
    /// First region with such records.
    pub first: RegionSeq,
    /// Last region with such records.
    pub last: RegionSeq,
}

impl Core {
    /// Looks up where the bytes of `range` are, as pieces in order. Regions named in them are pinned in `arena` once per
    /// piece. Where not all is found nothing is pinned, and the request is told when it can try again.
    pub fn read(
        &mut self,
        arena: &Arena,
        (door, tag): (DoorId, u32),
        volume: VolumeId,
        range: ByteRange,
        pieces: &mut Vec<ReadPiece>,
    ) -> Found {
        pieces.clear();
        let Some(index) = self.indexes.get(&volume) else {
            pieces.push(ReadPiece { range, source: ReadSource::Backing });
            return Found::All;
        };
        let mut newest = Lsn::ZERO;
        let found = index.lookup(range, |piece| {
            newest = newest.max(piece.hit.map_or(Lsn::ZERO, |(lsn, _)| lsn));
            let source = match piece.hit {
                None => ReadSource::Backing,
                Some((_, Source::Discard)) if is(Mutation::DiscardReadsTheBacking) => ReadSource::Backing,
                Some((_, Source::Data { .. })) if is(Mutation::ReadIgnoresTheStage) => ReadSource::Backing,
                Some((_, Source::Zero | Source::Discard)) => ReadSource::Zero,
                Some((_, Source::Data { region, offset })) => {
                    if !self.ring.region(region).is_some_and(|r| r.resident) {
                        return ControlFlow::Break(region);
                    }
                    ReadSource::Stage { region, offset }
                }
            };
            match pieces.last_mut() {
                Some(last) if source.follows(last) => last.range.end = piece.range.end,
                _ => pieces.push(ReadPiece { range: piece.range, source }),
            }
            ControlFlow::Continue(())
        });
        if let ControlFlow::Break(region) = found {
            self.read_ended(door, tag);
            self.cold_reads.push((region, door, tag));
            self.kick();
            return Found::Cold;
        }
        // All that is published was in the index, as a whole, before the core was locked; what is not may be there in part.
        if newest > self.published() && !is(Mutation::ReadsRunAhead) {
            self.early.met(door, tag, newest);
            return Found::Early;
        }
        self.read_ended(door, tag);
        for piece in pieces.iter() {
            if let ReadSource::Stage { region, .. } = piece.source {
                arena.pin_raw(region);
            }
        }
        Found::All
    }

    /// A read waits for no record any more: it is served, is refused, or waits for a region.
    pub fn read_ended(&mut self, door: DoorId, tag: u32) {
        if self.early.ended(door, tag) {
            self.claims_go_on();
        }
    }

    /// A read that may have been told has to wait for a buffer.
    pub fn read_parked(&mut self, door: DoorId, tag: u32) {
        if self.early.parked(door, tag) {
            self.claims_go_on();
        }
    }

    pub(super) fn is_allocated(&self, seq: RegionSeq) -> bool {
        self.allocated[seq.slot(self.ring.geometry().region_count) as usize]
    }

    /// The next region whose slot has no memory yet, in the order in which claims will get there. While regions have to be
    /// brought into memory, which need some themselves, only the slots that are needed soon.
    #[must_use]
    pub fn next_unallocated(&self) -> Option<RegionSeq> {
        let open = self.ring.open_seq();
        let count = u64::from(self.ring.geometry().region_count);
        let ahead = (1..count).find(|i| !self.is_allocated(RegionSeq(open.0 + i)))?;
        let is_loading = || !self.damaged && self.ring.regions().any(|r| self.is_needed_cold(r));
        // Regions are looked at last: most of the time all slots have memory.
        (ahead <= ALLOCATED_AHEAD || !is_loading()).then_some(RegionSeq(open.0 + ahead))
    }

    /// Regions from `first` on whose slots have no memory, one right behind the other, at most `most`.
    #[must_use]
    pub fn unallocated_from(&self, first: RegionSeq, most: usize) -> Vec<RegionSeq> {
        (first.0..).map(RegionSeq).take(most).take_while(|seq| !self.is_allocated(*seq)).collect()
    }

    /// Whether nobody waits for room, for a region or for a full region's table to be written.
    #[must_use]
    pub fn has_time(&self) -> bool {
        self.waiting() == 0 && self.cold_regions() == 0 && self.next_seal().is_none()
    }

    /// The memory of a region's slot exists now.
    pub fn slot_allocated(&mut self, seq: RegionSeq) {
        let slot = seq.slot(self.ring.geometry().region_count) as usize;
        self.allocated[slot] = true;
        self.serve_space_waits();
    }

    /// The region that should be brought into memory next: one that a read waits for, else the oldest, if it need not be
    /// `wanted_only`. Not one that is `under_way`.
    #[must_use]
    pub fn next_cold_region(
        &self,
        under_way: impl Fn(RegionSeq) -> bool,
        wanted_only: bool,
    ) -> Option<RegionState> {
        let wanted = self.cold_reads.iter().filter_map(|&(seq, ..)| self.ring.region(seq));
        let is_next = |r: &&RegionState| self.is_needed_cold(r) && !under_way(r.start.seq);
        let others = self.ring.regions().filter(|_| !wanted_only);
        wanted.chain(others).find(is_next).copied()
    }

    /// The regions that are needed and not in memory, oldest first.
    #[must_use]
    pub fn cold_region_seqs(&self) -> Vec<RegionSeq> {
        self.ring.regions().filter(|r| self.is_needed_cold(r)).map(|r| r.start.seq).collect()
    }

    /// Whether a region is not in memory and something in it is not flushed yet.
    fn is_needed_cold(&self, region: &RegionState) -> bool {
        !region.resident && region.last_lsn() > self.checkpoint
    }

    /// Number of regions that are needed and not in memory.
    #[must_use]
    pub fn cold_regions(&self) -> usize {
        self.ring.regions().filter(|r| self.is_needed_cold(r)).count()
    }

    /// The volumes that have something staged.
    pub fn staged_volumes(&self) -> impl Iterator<Item = VolumeId> {
        self.indexes.iter().filter(|(_, index)| !index.is_empty()).map(|(volume, _)| *volume)
    }

    /// The volumes that exist.
    #[must_use]
    pub fn volumes(&self) -> BTreeSet<VolumeId> {
        self.indexes.keys().copied().collect()
    }

    /// Region `seq` is in memory now.
    pub fn region_loaded(&mut self, seq: RegionSeq, out: &mut Vec<Outcome>) {
        if let Some(region) = self.ring.region_mut(seq) {
            region.resident = true;
        }
        self.cold_reads.retain(|&(region, door, tag)| {
            if region == seq {
                out.push(Outcome::RetryRead { door, tag });
            }
            region != seq
        });
    }

    pub(super) fn sealed_region_needs_table(&self) -> bool {
        self.next_seal().is_some()
    }

    /// The oldest full region whose records are all durable and whose table is not written.
    #[must_use]
    pub fn next_seal(&self) -> Option<RegionState> {
        let open = self.ring.open_seq();
        self.ring
            .regions()
            .find(|r| {
                r.start.seq != open
                    && r.resident
                    && r.table == TableState::Missing
                    && r.record_count > 0
                    && (r.last_lsn() <= self.durable() || is(Mutation::TableBeforeDurable))
            })
            .copied()
    }

    /// Notes the state of a region's table.
    pub fn set_table_state(&mut self, seq: RegionSeq, state: TableState) {
        if let Some(region) = self.ring.region_mut(seq) {
            region.table = state;
        }
    }

    /// Whether claims wait for the flusher's progress, whatever room there is.
    #[must_use]
    pub fn is_held_back(&self) -> bool {
        self.pacing.holds_back(self.fill())
    }

    pub(super) fn fill(&self) -> Fill {
        Fill { used: self.ring.regions().len() as u32, count: self.ring.geometry().region_count }
    }

    /// An epoch up to `to` begins, which takes `regions`: claims are paced by it, if it gives room back.
    pub fn pace_by(&mut self, regions: &[RegionState], to: Lsn) {
        let open = self.ring.open_seq();
        let is_given_back = |r: &&RegionState| r.last_lsn() <= to && r.start.seq != open;
        let whole = regions.iter().filter(is_given_back).count();
        self.pacing.begin(whole as u64 * u64::from(self.ring.geometry().region_bytes));
        self.pace((0, 1));
    }

    /// The epoch in flight has done `done` of `total` parts of its work.
    pub fn pace(&mut self, progress: (u64, u64)) {
        self.pacing.advance(progress, self.fill());
        self.room_came();
    }

    /// The epoch in flight is over: claims are free.
    pub fn end_pacing(&mut self) {
        self.pacing.end();
        self.room_came();
    }

    fn room_came(&mut self) {
        if self.waiting() > 0 && !is(Mutation::SpaceWaitersAreForgotten) {
            self.serve_space_waits();
        }
    }

    /// Whether so much is staged that it should be flushed now.
    #[must_use]
    pub fn above_high_mark(&self) -> bool {
        self.ring.regions().len() as u32 > self.high_regions
            || self.waits_for_room()
            || self.has_many_extents()
    }

    /// Whether nobody waits for room, nor would soon.
    #[must_use]
    pub fn has_room_to_spare(&self) -> bool {
        !self.waits_for_room() && !self.fill().is_paced() && !self.has_many_extents()
    }

    fn has_many_extents(&self) -> bool {
        self.extent_count() > INDEX_EXTENTS_MAX / 2
    }

    /// The next epoch: whole durable regions from the oldest on, as many as have [`EPOCH_RECORDS_MAX`] records together but at
    /// least one, and an eighth of the stage at most (see `pacing.rs`); or with `all` everything durable. `None`: nothing
    /// to flush, or a region is not in memory yet.
    #[must_use]
    pub fn next_epoch(&self, all: bool) -> Option<Epoch> {
        let durable = if is(Mutation::EpochTakesUndurable) { self.published() } else { self.durable() };
        let open = self.ring.open_seq();
        let mut epoch: Option<Epoch> = None;
        let regions_max = (self.ring.geometry().region_count / 8).max(1);
        let (mut records, mut regions) = (0, 0);
        for region in self.ring.regions() {
            if region.record_count == 0 || region.last_lsn() <= self.checkpoint {
                continue;
            }
            let whole = region.start.seq != open && region.last_lsn() <= durable;
            let first_new = region.start.first_lsn.max(self.checkpoint.next());
            if !(whole || all && first_new <= durable) || !region.resident {
                break;
            }
            records += region.record_count;
            regions += 1;
            if epoch.is_some() && (records > EPOCH_RECORDS_MAX || regions > regions_max) {
                break;
            }
            let to = region.last_lsn().min(durable);
            let first = epoch.map_or(region.start.seq, |e| e.first);
            epoch = Some(Epoch { from: self.checkpoint, to, first, last: region.start.seq });
            if !whole {
                break;
            }
        }
        epoch
    }

    /// The live regions of an epoch.
    #[must_use]
    pub fn epoch_regions(&self, epoch: &Epoch) -> Vec<RegionState> {
        let in_epoch = |r: &&RegionState| (epoch.first..=epoch.last).contains(&r.start.seq);
        self.ring.regions().filter(in_epoch).copied().collect()
    }

    /// Where the log will begin once everything up to `checkpoint` is flushed.
    #[must_use]
    pub fn head_after(&self, checkpoint: Lsn) -> RegionStart {
        self.ring.head_after(checkpoint)
    }

    /// The checkpoint up to which the indexes have forgotten, with the log beginning at region `head`, is durable.
    pub fn checkpointed(&mut self, arena: &Arena, head: RegionSeq, forgotten: Forgotten) {
        let Forgotten { up_to, grown } = forgotten;
        assert!(up_to > self.checkpoint && up_to <= self.durable(), "C2");
        self.grown(grown);
        self.checkpoint = up_to;
        self.head = head;
        self.reclaim(arena);
    }

    /// Gives up regions that are flushed and not in use, and serves those who wait for space.
    pub fn reclaim(&mut self, arena: &Arena) {
        let indexes = &self.indexes;
        let checkpoint = self.checkpoint;
        let head = self.head;
        self.ring.reclaim(checkpoint, |region| {
            debug_assert!(indexes.values().all(|i| !i.refers_to(region.start.seq)), "C3");
            (region.start.seq < head
                || is(Mutation::ReclaimBeforeTheDurableHead)
                || is(Mutation::ReclaimAboveTheCheckpoint))
                && (!arena.is_pinned(region.start.seq) || is(Mutation::ReclaimWhilePinned))
        });
        self.room_came();
    }

    /// Whether a region could be given up if nobody had it pinned.
    #[must_use]
    pub fn reclaim_is_pending(&self) -> bool {
        let oldest = self.ring.regions().next().expect("an open region");
        oldest.start.seq < self.head && oldest.last_lsn() <= self.checkpoint
    }

    /// Begins to index a volume of `volume_bytes`.
    pub fn add_volume(&mut self, volume: VolumeId, volume_bytes: u64) {
        self.indexes.entry(volume).or_insert_with(|| Arc::new(VolumeIndex::new(volume, volume_bytes)));
    }

    /// Ends indexing a volume; its records must be flushed, and it has no door.
    pub fn remove_volume(&mut self, volume: VolumeId) {
        if let Some(index) = self.indexes.remove(&volume) {
            assert!(index.is_empty(), "X4: a volume is removed when nothing of it is staged");
        }
    }

    /// Whether the volume has anything staged.
    #[must_use]
    pub fn is_staged(&self, volume: VolumeId) -> bool {
        self.indexes.get(&volume).is_some_and(|index| !index.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record that reaches over a border of shards is copied out in one piece.
    #[test]
    fn payload_goes_on_within_a_record_only() {
        let stage = |region, offset| ReadSource::Stage { region: RegionSeq(region), offset };
        let last = |source| ReadPiece { range: ByteRange::at(512, 1024), source };
        assert!(stage(1, 5120).follows(&last(stage(1, 4096))));
        for other in [stage(1, 5184), stage(1, 4096), stage(2, 5120), ReadSource::Zero, ReadSource::Backing] {
            assert!(!other.follows(&last(stage(1, 4096))), "{other:?}");
        }
        assert!(ReadSource::Zero.follows(&last(ReadSource::Zero)));
        assert!(!ReadSource::Zero.follows(&last(ReadSource::Backing)));
    }
}
