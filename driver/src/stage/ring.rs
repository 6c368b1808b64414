//! Ring arithmetic: where the next record goes. Pure; owns no memory.
//!
//! The log is a ring of region slots. `regions` holds the live ones, oldest first; the last is the open one, where claims
//! go. Within the open region claims advance `cursor`; a group is open from its first claim until it is closed, which
//! moves the cursor to the next block boundary so that no later write touches a block of a closed group.
//!
//! Invariants (asserted):
//! - R1 slots handed out never overlap and lie between the region header's block and the room kept for the table;
//! - R2 LSNs are handed out densely, in the order of positions;
//! - R3 a closed group ends at a block boundary, and groups are closed in the order of their sequence numbers;
//! - R4 a region slot is given to a new region only after its previous region was reclaimed;
//! - R5 only the open region has an open group.

use std::collections::VecDeque;

use crate::base::limits::GROUP_BYTES_MAX;
use crate::base::mutation::{Mutation, is};
use crate::base::units::align_up;
use crate::base::{Lsn, RegionSeq};
use crate::format::geometry::Geometry;
use crate::format::group::GROUP_HEADER_BYTES;
use crate::format::record::{RECORD_HEADER_BYTES, record_bytes};
use crate::format::region::{RegionStart, table_bytes};

/// A claimed place: the right to fill it and the duty to publish it. Not copyable, so that it is filled once.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    lsn: Lsn,
    region: RegionSeq,
    offset: u32,
    payload_bytes: u32,
}

impl Slot {
    /// The record's LSN.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// The region that holds it.
    #[must_use]
    pub fn region(&self) -> RegionSeq {
        self.region
    }

    /// Offset of the record header within the region.
    #[must_use]
    pub fn offset(&self) -> u32 {
        self.offset
    }

    /// Payload bytes.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        self.payload_bytes
    }

    /// Offset of the payload within the region.
    #[must_use]
    pub fn payload_offset(&self) -> u32 {
        self.offset + RECORD_HEADER_BYTES
    }
}

/// A group that takes no more records and waits for its turn to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClosedGroup {
    /// Region that holds it.
    pub region: RegionSeq,
    /// First byte to write: 0 for a region's first group (its header goes along), else the group header's offset.
    pub write_from: u32,
    /// Offset of the group header.
    pub header_offset: u32,
    /// End of the last record.
    pub records_end: u32,
    /// End of the group: a block boundary.
    pub end: u32,
    /// LSN of the first record.
    pub first_lsn: Lsn,
    /// Number of records.
    pub record_count: u32,
    /// Sequence number.
    pub group_seq: u64,
}

impl ClosedGroup {
    /// Whether it is the first of its region, whose header is written with it.
    #[must_use]
    pub fn begins_region(&self) -> bool {
        self.write_from == 0
    }

    /// LSN of the last record.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        Lsn(self.first_lsn.0 + u64::from(self.record_count) - 1)
    }
}

/// Whether a region's table of contents is on the log device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableState {
    /// Not written.
    Missing,
    /// A write is in flight: the slot must not be given up.
    Writing,
    /// Written.
    Written,
}

/// A live region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionState {
    /// Where it starts.
    pub start: RegionStart,
    /// Records claimed in it.
    pub record_count: u32,
    /// Groups closed in it.
    pub group_count: u32,
    /// End of the last closed group; the first block (the header's) if there is none.
    pub data_end: u32,
    /// End of the last group that is durable on the log device, likewise.
    pub durable_end: u32,
    /// Whether the arena holds its bytes.
    pub resident: bool,
    /// Its table.
    pub table: TableState,
}

impl RegionState {
    /// LSN of the last record claimed in it; the LSN before the first if there is none.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        Lsn(self.start.first_lsn.0 + u64::from(self.record_count) - 1)
    }
}

#[derive(Clone, Copy, Debug)]
struct OpenGroup {
    header_offset: u32,
    first_lsn: Lsn,
    record_count: u32,
}

/// The ring.
#[derive(Debug)]
pub struct Ring {
    geometry: Geometry,
    regions: VecDeque<RegionState>,
    cursor: u32,
    group: Option<OpenGroup>,
    closed: VecDeque<ClosedGroup>,
    next_lsn: Lsn,
    next_group_seq: u64,
}

/// Where an existing log goes on.
#[derive(Debug)]
pub struct RingTail {
    /// Live regions, oldest first; the last one is open.
    pub regions: Vec<RegionState>,
    /// Groups that are in the arena but not on the log yet.
    pub closed: Vec<ClosedGroup>,
    /// LSN of the next record.
    pub next_lsn: Lsn,
    /// Sequence number of the next group to be closed.
    pub next_group_seq: u64,
}

impl Ring {
    /// Ring of an empty log whose first region is `start`.
    #[must_use]
    pub fn empty(geometry: Geometry, start: RegionStart) -> Ring {
        let tail = RingTail {
            regions: vec![RegionState {
                start,
                record_count: 0,
                group_count: 0,
                data_end: geometry.block_bytes,
                durable_end: geometry.block_bytes,
                resident: true,
                table: TableState::Missing,
            }],
            closed: Vec::new(),
            next_lsn: start.first_lsn,
            next_group_seq: start.first_group_seq,
        };
        Ring::resume(geometry, tail)
    }

    /// Ring that goes on where recovery found the end.
    #[must_use]
    pub fn resume(geometry: Geometry, tail: RingTail) -> Ring {
        let open = tail.regions.last().expect("a log has an open region");
        assert!(open.data_end >= geometry.block_bytes && open.data_end <= geometry.region_bytes);
        assert_eq!(open.last_lsn().next(), tail.next_lsn, "R2: the open region ends the log");
        Ring {
            geometry,
            cursor: open.data_end,
            regions: tail.regions.into(),
            group: None,
            closed: tail.closed.into(),
            next_lsn: tail.next_lsn,
            next_group_seq: tail.next_group_seq,
        }
    }

    /// The region that a claim of `payload_bytes` would open, if it does not fit into the open one.
    #[must_use]
    pub fn would_open(&self, payload_bytes: u32) -> Option<RegionSeq> {
        (!self.fits(record_bytes(payload_bytes))).then(|| self.open_seq().next())
    }

    /// Claims the next place for a record with `payload_bytes`. `None`: the stage is full; nothing has changed.
    #[must_use]
    pub fn claim(&mut self, payload_bytes: u32) -> Option<Slot> {
        assert!(payload_bytes <= self.geometry.payload_bytes_max(), "doors bound their requests");
        let bytes = record_bytes(payload_bytes);
        if !self.fits(bytes) {
            if !self.can_open_region() {
                return None;
            }
            self.close_group();
            self.open_region();
            assert!(self.fits(bytes), "R1: an empty region holds any record");
        }
        let group = self.group.get_or_insert_with(|| {
            let header_offset = self.cursor;
            self.cursor += GROUP_HEADER_BYTES;
            OpenGroup { header_offset, first_lsn: self.next_lsn, record_count: 0 }
        });
        group.record_count += 1;
        let group_bytes = self.cursor + bytes - group.header_offset;
        let region = self.regions.back_mut().expect("an open region");
        region.record_count += 1;
        let slot = Slot { lsn: self.next_lsn, region: region.start.seq, offset: self.cursor, payload_bytes };
        self.cursor += bytes;
        self.next_lsn = self.next_lsn.next();
        if group_bytes >= GROUP_BYTES_MAX {
            self.close_group();
        }
        Some(slot)
    }

    fn fits(&self, record_bytes: u32) -> bool {
        let open = self.regions.back().expect("an open region");
        let header = if self.group.is_some() { 0 } else { GROUP_HEADER_BYTES };
        let end =
            align_up(u64::from(self.cursor + header + record_bytes), u64::from(self.geometry.block_bytes));
        let table = table_bytes(open.record_count + 1, self.geometry.block_bytes);
        end + u64::from(table) <= u64::from(self.geometry.region_bytes)
    }

    fn can_open_region(&self) -> bool {
        self.regions.len() < self.geometry.region_count as usize + usize::from(is(Mutation::StageOverfills))
    }

    fn open_region(&mut self) {
        assert!(self.can_open_region() && self.group.is_none(), "R4, R5");
        let seq = self.regions.back().expect("an open region").start.seq.next();
        self.regions.push_back(RegionState {
            start: RegionStart { seq, first_lsn: self.next_lsn, first_group_seq: self.next_group_seq },
            record_count: 0,
            group_count: 0,
            data_end: self.geometry.block_bytes,
            durable_end: self.geometry.block_bytes,
            resident: true,
            table: TableState::Missing,
        });
        self.cursor = self.geometry.block_bytes;
    }

    /// Closes the open group, if there is one.
    pub fn close_group(&mut self) {
        let Some(group) = self.group.take() else { return };
        let region = self.regions.back_mut().expect("an open region");
        let records_end = self.cursor;
        let end = align_up(u64::from(self.cursor), u64::from(self.geometry.block_bytes)) as u32;
        let closed = ClosedGroup {
            region: region.start.seq,
            write_from: if region.group_count == 0 { 0 } else { group.header_offset },
            header_offset: group.header_offset,
            records_end,
            end,
            first_lsn: group.first_lsn,
            record_count: group.record_count,
            group_seq: self.next_group_seq,
        };
        self.next_group_seq += 1;
        self.cursor = end;
        region.group_count += 1;
        region.data_end = end;
        self.closed.push_back(closed);
    }

    /// The oldest closed group that was not taken yet.
    #[must_use]
    pub fn first_closed(&self) -> Option<&ClosedGroup> {
        self.closed.front()
    }

    /// Takes the oldest closed group.
    pub fn take_closed(&mut self) -> Option<ClosedGroup> {
        self.closed.pop_front()
    }

    /// Bytes claimed in the open group.
    #[must_use]
    pub fn open_group_bytes(&self) -> u32 {
        self.group.map_or(0, |group| self.cursor - group.header_offset)
    }

    /// Gives up the oldest regions whose records are all at or below `checkpoint`, as long as `may_go` agrees. The open
    /// region stays. Returns how many went.
    pub fn reclaim(&mut self, checkpoint: Lsn, may_go: impl Fn(&RegionState) -> bool) -> u32 {
        let mut count = 0;
        while self.regions.len() > 1 {
            let head = &self.regions[0];
            if (head.last_lsn() > checkpoint && !is(Mutation::ReclaimAboveTheCheckpoint))
                || head.table == TableState::Writing
                || !may_go(head)
            {
                break;
            }
            assert!(
                self.closed.front().is_none_or(|g| g.region > head.start.seq),
                "P1: reclaimed before durable"
            );
            self.regions.pop_front();
            count += 1;
        }
        count
    }

    /// The oldest region that a log after `checkpoint` needs.
    #[must_use]
    pub fn head_after(&self, checkpoint: Lsn) -> RegionStart {
        let open = self.regions.back().expect("an open region");
        let checkpoint = if is(Mutation::CheckpointHeadTooHigh) { checkpoint.plus(20) } else { checkpoint };
        self.regions.iter().find(|r| r.last_lsn() > checkpoint).unwrap_or(open).start
    }

    /// Live regions, oldest first.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &RegionState> {
        self.regions.iter()
    }

    /// The live region `seq`.
    #[must_use]
    pub fn region(&self, seq: RegionSeq) -> Option<&RegionState> {
        self.regions.get(self.position(seq)?)
    }

    /// The live region `seq`, to change its flags.
    pub fn region_mut(&mut self, seq: RegionSeq) -> Option<&mut RegionState> {
        let position = self.position(seq)?;
        self.regions.get_mut(position)
    }

    fn position(&self, seq: RegionSeq) -> Option<usize> {
        let head = self.regions.front()?.start.seq;
        usize::try_from(seq.0.checked_sub(head.0)?).ok().filter(|&i| i < self.regions.len())
    }

    /// The region that claims go to.
    #[must_use]
    pub fn open_seq(&self) -> RegionSeq {
        self.regions.back().expect("an open region").start.seq
    }

    /// Next free byte of the open region.
    #[must_use]
    pub fn cursor(&self) -> u32 {
        self.cursor
    }

    /// How far the log has come, in bytes since its beginning: headers, padding and what is left over at the ends of regions
    /// included. Differences count: it wraps.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.open_seq()
            .0
            .wrapping_mul(u64::from(self.geometry.region_bytes))
            .wrapping_add(u64::from(self.cursor))
    }

    /// LSN of the next record.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.next_lsn
    }

    /// Map of the device.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }
}
