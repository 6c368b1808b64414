//! The regions of the log: every group, every record, every payload, every table.

use std::collections::BTreeMap;

use zerocopy::{FromBytes, IntoBytes};

use super::walk::{Walk, walk};
use super::{CheckReport, RESTORE};
use crate::base::checksum::crc64;
use crate::base::{Lsn, RegionSeq, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::Geometry;
use crate::format::record::RecordKind;
use crate::format::region::{FOOTER_BYTES, RegionStart, TABLE_ENTRY_BYTES, TableEntry, TableInfo};
use crate::format::superblock::Superblock;
use crate::io::Disk;
use crate::recovery::scan::{rules_of, walk_region};
use crate::stage::walk::{Expected, Placed, Rules, later_group, remains};

/// Records of a volume above the checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Staged {
    pub records: u64,
    pub bytes: u64,
}

/// What the log says.
#[derive(Debug, Default)]
pub(super) struct LogFacts {
    /// First record of the first live region.
    pub first_lsn: Lsn,
    /// Newest record.
    pub log_end: Lsn,
    /// Where on the device the log ends.
    pub end_offset: u64,
    /// Newest checkpoint that a group speaks of.
    pub spoken: Lsn,
    /// What is above the checkpoint.
    pub staged: BTreeMap<VolumeId, Staged>,
}

/// What follows a region.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// A region with a valid header.
    Region(RegionStart),
    /// A region that must exist, but has no valid header.
    Headless,
    /// Nothing: it is the last one.
    Nothing,
}

pub(super) struct LogCheck<'a> {
    stage: &'a dyn Disk,
    superblock: &'a Superblock,
    geometry: Geometry,
    rules: Rules,
    starts: Vec<Option<RegionStart>>,
    newest: RegionSeq,
    checkpoint_lsn: Lsn,
    /// The first region has no header, so its first write was never whole and counts for nothing.
    not_begun: Option<RegionSeq>,
    report: &'a mut CheckReport,
    facts: LogFacts,
}

impl<'a> LogCheck<'a> {
    pub(super) fn new(stage: &'a dyn Disk, superblock: &'a Superblock, report: &'a mut CheckReport) -> Self {
        LogCheck {
            stage,
            superblock,
            geometry: superblock.geometry,
            rules: rules_of(superblock),
            starts: Vec::new(),
            newest: RegionSeq(0),
            checkpoint_lsn: Lsn::ZERO,
            not_begun: None,
            report,
            facts: LogFacts::default(),
        }
    }

    /// Checks the log from the region that `checkpoint` names on.
    pub(super) fn run(mut self, checkpoint: Option<&Checkpoint>) -> LogFacts {
        self.read_starts();
        self.checkpoint_lsn = checkpoint.map_or(Lsn::ZERO, |c| c.lsn);
        let Some(first) = self.first(checkpoint) else { return self.facts };
        self.facts.first_lsn = first.first_lsn;
        let mut start = first;
        let mut spoken_needed = Lsn::ZERO;
        if checkpoint.is_some_and(|c| c.head.seq < first.seq) || checkpoint.is_none() {
            spoken_needed = Lsn(first.first_lsn.0.saturating_sub(1));
        }
        for _ in 0..self.geometry.region_count {
            let (end, next) = self.region(start, first.seq);
            self.facts.log_end = Lsn(end.first_lsn.0.saturating_sub(1));
            start = match next {
                Next::Region(next) => next,
                Next::Headless => {
                    let seq = start.seq.next();
                    self.problem(
                        seq,
                        0,
                        "the header of the region is damaged or missing, but the log goes on in it",
                    );
                    RegionStart { seq, first_lsn: end.first_lsn, first_group_seq: end.group_seq }
                }
                Next::Nothing => break,
            };
        }
        if self.facts.spoken < spoken_needed {
            let what = format!(
                "regions before LSN {} are missing: nothing tells that they were flushed",
                first.first_lsn
            );
            self.problem(first.seq, 0, &what);
        }
        self.facts
    }

    fn problem(&mut self, seq: RegionSeq, offset: u32, what: &str) {
        let at = self.geometry.region_offset(seq) + u64::from(offset);
        self.report.problem(self.stage, Some(at), format!("region {seq}, offset {offset}: {what}"), RESTORE);
    }

    fn read_starts(&mut self) {
        let mut bytes = vec![0; self.geometry.block_bytes as usize];
        for slot in 0..self.geometry.region_count {
            let at = self.geometry.region_offset(RegionSeq(u64::from(slot) + 1));
            let start = match self.stage.read(at, &mut bytes) {
                Ok(()) => RegionStart::decode(&bytes, self.rules.salt, slot, self.geometry.region_count),
                Err(error) => {
                    self.report.problem(self.stage, Some(at), error.report(), RESTORE);
                    None
                }
            };
            self.newest = self.newest.max(start.map_or(RegionSeq(0), |s| s.seq));
            self.starts.push(start);
        }
    }

    fn slot_of(&self, seq: RegionSeq) -> Option<RegionStart> {
        self.starts[seq.slot(self.geometry.region_count) as usize]
    }

    fn at(&self, seq: RegionSeq) -> Option<RegionStart> {
        self.slot_of(seq).filter(|start| start.seq == seq)
    }

    /// The first live region.
    fn first(&mut self, checkpoint: Option<&Checkpoint>) -> Option<RegionStart> {
        let Some(checkpoint) = checkpoint else { return self.oldest_of_run() };
        let head = checkpoint.head;
        if let Some(found) = self.at(head.seq) {
            if found != head {
                let what = format!(
                    "the region starts at LSN {}, the checkpoint says LSN {}",
                    found.first_lsn, head.first_lsn
                );
                self.problem(head.seq, 0, &what);
            }
            return Some(found);
        }
        if self.newest < head.seq {
            // Not begun yet, or begun by a write that was cut short, or without the header it had.
            if self.goes_on_in(head.seq, head.first_group_seq) {
                self.problem(head.seq, 0, "the header of the region is damaged, but the log goes on in it");
            } else {
                self.not_begun = Some(head.seq);
            }
            return Some(head);
        }
        if self.slot_of(head.seq).is_some_and(|start| start.seq > head.seq) {
            let what = format!(
                "the log begins behind region {}, where checkpoint {} says it does: newer checkpoints are damaged",
                head.seq, checkpoint.sequence
            );
            self.problem(head.seq, 0, &what);
            return self.oldest_of_run();
        }
        self.problem(head.seq, 0, "the first region of the log is missing, newer ones exist");
        Some(head)
    }

    /// The oldest of the regions that lead to the newest one without a gap.
    fn oldest_of_run(&self) -> Option<RegionStart> {
        let mut first = self.at(RegionSeq(self.newest.0.max(1)))?;
        while first.seq.0 > 1
            && let Some(start) = self.at(RegionSeq(first.seq.0 - 1))
        {
            first = start;
        }
        Some(first)
    }

    /// What comes behind region `seq` of a log that begins in `first`. `group_seq` tells which group would, and is asked only
    /// if no header says what does.
    fn next_of(&self, seq: RegionSeq, first: RegionSeq, group_seq: impl FnOnce() -> u64) -> Next {
        let Some(next) = seq.0.checked_add(1).map(RegionSeq) else { return Next::Nothing };
        if next.0 - first.0 >= u64::from(self.geometry.region_count) {
            return Next::Nothing;
        }
        match self.at(next) {
            Some(start) => Next::Region(start),
            None if self.newest > seq || self.goes_on_in(next, group_seq()) => Next::Headless,
            None => Next::Nothing,
        }
    }

    /// Whether the slot of region `seq`, which has no valid header, holds a group that proves that the group `group_seq`, which
    /// would be written with that header, had been durable.
    fn goes_on_in(&self, seq: RegionSeq, group_seq: u64) -> bool {
        let (image, _) = self.read_region(seq);
        later_group(&image, self.rules.block_bytes, seq, group_seq, &self.rules).is_some()
    }

    /// The bytes of a region, zeroes where it cannot be read, and the offsets of those places.
    fn read_region(&self, seq: RegionSeq) -> (Vec<u8>, Vec<u32>) {
        let at = self.geometry.region_offset(seq);
        let mut image = vec![0; self.geometry.region_bytes as usize];
        if self.stage.read(at, &mut image).is_ok() {
            return (image, Vec::new());
        }
        let mut bad = Vec::new();
        for (i, part) in image.chunks_mut(4096).enumerate() {
            if self.stage.read(at + i as u64 * 4096, part).is_err() {
                part.fill(0);
                bad.push(i as u32 * 4096);
            }
        }
        (image, bad)
    }

    /// Checks a region of a log that begins in `first`, and returns what should come behind it, and what does.
    fn region(&mut self, start: RegionStart, first: RegionSeq) -> (Expected, Next) {
        let seq = start.seq;
        let (image, unreadable) = self.read_region(seq);
        for offset in unreadable {
            self.problem(seq, offset, "cannot be read");
        }
        let geometry = self.geometry;
        let footer_at = (geometry.region_bytes - FOOTER_BYTES) as usize;
        let (salt, block) = (self.rules.salt, self.rules.block_bytes);
        let table = TableInfo::decode(&image[footer_at..], salt, start, geometry.region_bytes, block);
        let not_begun = self.not_begun == Some(seq);
        let next = self.next_of(seq, first, || {
            if not_begun {
                start.first_group_seq
            } else {
                walk_region(&image, start, &self.rules).next.group_seq
            }
        });
        // Groups below this offset were durable once.
        let proven = match next {
            Next::Nothing => table.map_or(0, |t| t.data_end),
            _ => u32::MAX,
        };
        let walk = if not_begun {
            Walk::at_start_of(start, block)
        } else {
            walk(&image, start, proven, &self.rules)
        };
        for (offset, what) in &walk.faults {
            self.problem(seq, *offset, what);
        }
        self.take(seq, &walk);
        match (next, table) {
            (Next::Region(n), _)
                if n.first_lsn != walk.next.first_lsn || n.first_group_seq != walk.next.group_seq =>
            {
                let what = format!(
                    "group {} is invalid, but newer ones exist: region {} starts with group {} and LSN {}, \
                     expected was LSN {}",
                    walk.next.group_seq, n.seq, n.first_group_seq, n.first_lsn, walk.next.first_lsn
                );
                self.problem(seq, walk.end, &what);
            }
            (Next::Nothing, Some(table)) if table.data_end > walk.end => {
                let what = format!(
                    "group {} is invalid, but the region's table tells that the log reached offset {}",
                    walk.next.group_seq, table.data_end
                );
                self.problem(seq, walk.end, &what);
            }
            (Next::Nothing, _) if self.rules.was_durable(walk.next.group_seq) => {
                let what = format!(
                    "group {} is invalid, but it was durable when the stage was opened last",
                    walk.next.group_seq
                );
                self.problem(seq, walk.end, &what);
            }
            (Next::Nothing, _) => self.tail(&image, &walk),
            _ => {}
        }
        self.table(start, next, &image, table, &walk);
        (walk.next, next)
    }

    /// Counts what a walk found and checks what the records say.
    fn take(&mut self, seq: RegionSeq, walk: &Walk) {
        self.report.regions += 1;
        self.report.groups += walk.groups;
        self.report.records += walk.whole;
        self.report.payload_bytes += walk.payload_bytes;
        self.facts.spoken = self.facts.spoken.max(walk.spoken);
        self.facts.end_offset = self.geometry.region_offset(seq) + u64::from(walk.end);
        let checkpoint_lsn = self.checkpoint_lsn;
        for (offset, record) in walk.records.iter().filter(|(_, r)| r.lsn > checkpoint_lsn) {
            let staged = self.facts.staged.entry(record.volume).or_default();
            staged.records += 1;
            staged.bytes += u64::from(record.payload_bytes);
            let size = self.superblock.volumes.iter().find(|v| v.id == record.volume).map(|v| v.size_bytes);
            let changes = !matches!(record.kind, RecordKind::Marker | RecordKind::Void);
            if changes && size.is_some_and(|size| record.range.end > size) {
                let what = format!(
                    "record {} changes bytes {} of volume {}, behind its end",
                    record.lsn, record.range, record.volume
                );
                self.problem(seq, *offset, &what);
            }
        }
    }

    /// Notes what is left of a group that was cut short.
    fn tail(&mut self, image: &[u8], walk: &Walk) {
        let seq = walk.next.region;
        let mut torn = remains(image, walk.end, walk.next, &self.rules);
        if torn == 0
            && let Some(after) = seq.0.checked_add(1).map(RegionSeq).filter(|next| self.at(*next).is_none())
        {
            // A first group without its region's header.
            let (image, _) = self.read_region(after);
            let expected = Expected { region: after, ..walk.next };
            torn = remains(&image, self.rules.block_bytes, expected, &self.rules);
        }
        if torn > 0 {
            self.report.torn_bytes = u64::from(torn);
            self.report.notes.push(format!(
                "the log was cut short at group {}: {torn} bytes that were never acknowledged as durable are \
                 given up (normal after a power cut)",
                walk.next.group_seq
            ));
        }
    }

    /// Compares the table with the records.
    fn table(&mut self, start: RegionStart, next: Next, image: &[u8], table: Option<TableInfo>, walk: &Walk) {
        let seq = start.seq;
        let (region_bytes, block) = (self.geometry.region_bytes, self.rules.block_bytes);
        let Some(info) = table else {
            if !matches!(next, Next::Nothing) {
                self.report.notes.push(format!(
                    "region {seq} has no valid table: not written yet, cut short, or damaged; the region is scanned"
                ));
            }
            return;
        };
        let from = info.table_offset(region_bytes, block) as usize;
        let entries = &image[from..from + (info.entry_count * TABLE_ENTRY_BYTES) as usize];
        if crc64(entries) != info.table_checksum {
            self.report.notes.push(format!(
                "the entries of the table of region {seq} are not valid: cut short, or damaged; \
                 the region is scanned"
            ));
            return;
        }
        let end_lsn = start.first_lsn.0.saturating_add(u64::from(info.entry_count));
        let end_group = start.first_group_seq.saturating_add(u64::from(info.group_count));
        let leads_on =
            matches!(next, Next::Region(n) if (n.first_lsn.0, n.first_group_seq) == (end_lsn, end_group));
        if !leads_on {
            self.report.notes.push(format!(
                "the table of region {seq} is of {} records, the region has more or is the last one: it is scanned",
                info.entry_count
            ));
            return;
        }
        let by_lsn: BTreeMap<u64, &Placed> = walk.records.iter().map(|p| (p.1.lsn.0, p)).collect();
        let mut agrees = true;
        for (i, bytes) in entries.chunks_exact(TABLE_ENTRY_BYTES as usize).enumerate() {
            let lsn = start.first_lsn.0.saturating_add(i as u64);
            // A record that is not there was reported as such.
            let Some((offset, record)) = by_lsn.get(&lsn) else { continue };
            if TableEntry::new(record, *offset).as_bytes() != bytes {
                agrees = false;
                let told = TableEntry::read_from_bytes(bytes).map_or(0, |e| e.record_offset.get());
                let what = format!(
                    "the table says something else of record {lsn} (at offset {told}) than the record itself, \
                     at offset {offset}"
                );
                self.problem(seq, (from + i * TABLE_ENTRY_BYTES as usize) as u32, &what);
            }
        }
        self.report.tables += u64::from(agrees);
    }
}
