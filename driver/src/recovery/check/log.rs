//! The regions of the log: every group, every record, every payload, every table.

use std::collections::BTreeMap;

use zerocopy::{FromBytes, IntoBytes};

use super::{CheckReport, RESTORE};
use crate::base::checksum::crc64;
use crate::base::units::align_up;
use crate::base::{Lsn, RegionSeq, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::Geometry;
use crate::format::group::{GROUP_HEADER_BYTES, Group, RecordsDigest};
use crate::format::record::{RECORD_ALIGN, RECORD_HEADER_BYTES, Record, RecordKind, record_bytes};
use crate::format::region::{FOOTER_BYTES, RegionStart, TABLE_ENTRY_BYTES, TableEntry, TableInfo};
use crate::format::superblock::Superblock;
use crate::io::Disk;
use crate::recovery::scan::rules_of;
use crate::stage::walk::{Expected, Placed, Rules, group_header, later_group};

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

/// Something wrong at an offset of a region.
type Fault = (u32, String);

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
            let next = self.next_of(start.seq, first.seq);
            let end = self.region(start, next);
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
            if self.goes_on_in(head.seq) {
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

    fn next_of(&self, seq: RegionSeq, first: RegionSeq) -> Next {
        let Some(next) = seq.0.checked_add(1).map(RegionSeq) else { return Next::Nothing };
        if next.0 - first.0 >= u64::from(self.geometry.region_count) {
            return Next::Nothing;
        }
        match self.at(next) {
            Some(start) => Next::Region(start),
            None if self.newest > seq || self.goes_on_in(next) => Next::Headless,
            None => Next::Nothing,
        }
    }

    /// Whether the slot of region `seq`, which has no valid header, holds a group that proves that the first one, and so the
    /// header, had been durable.
    fn goes_on_in(&self, seq: RegionSeq) -> bool {
        let (image, _) = self.read_region(seq);
        let block = self.rules.block_bytes;
        later_group(&image, block, seq, 0, &self.rules).is_some_and(|(at, group)| {
            (at > block && group.undurable_before == 0)
                || later_group(&image, at.saturating_add(block), seq, group.group_seq, &self.rules).is_some()
        })
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

    /// Checks a region and returns what should come behind it.
    fn region(&mut self, start: RegionStart, next: Next) -> Expected {
        let seq = start.seq;
        let (image, unreadable) = self.read_region(seq);
        for offset in unreadable {
            self.problem(seq, offset, "cannot be read");
        }
        let geometry = self.geometry;
        let footer_at = (geometry.region_bytes - FOOTER_BYTES) as usize;
        let (salt, block) = (self.rules.salt, self.rules.block_bytes);
        let table = TableInfo::decode(&image[footer_at..], salt, start, geometry.region_bytes, block);
        // Groups below this offset were durable once.
        let proven = match next {
            Next::Nothing => table.map_or(0, |t| t.data_end),
            _ => u32::MAX,
        };
        let walk = if self.not_begun == Some(seq) {
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
            (Next::Nothing, _) => self.tail(&image, &walk),
            _ => {}
        }
        self.table(start, next, &image, table, &walk);
        walk.next
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
                "the last group, {}, was cut short: {torn} bytes that were never acknowledged as durable are \
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

/// What was found in a region.
#[derive(Debug)]
struct Walk {
    /// Records with a valid header, with whole payload or not.
    records: Vec<Placed>,
    /// Number of those with a whole payload.
    whole: u64,
    payload_bytes: u64,
    groups: u64,
    faults: Vec<Fault>,
    /// End of the last group.
    end: u32,
    /// What should follow.
    next: Expected,
    spoken: Lsn,
}

impl Walk {
    fn at_start_of(start: RegionStart, block_bytes: u32) -> Walk {
        Walk {
            records: Vec::new(),
            whole: 0,
            payload_bytes: 0,
            groups: 0,
            faults: Vec::new(),
            end: block_bytes,
            next: Expected {
                region: start.seq,
                group_seq: start.first_group_seq,
                first_lsn: start.first_lsn,
            },
            spoken: Lsn::ZERO,
        }
    }

    fn add(&mut self, found: Content) {
        self.whole += found.whole;
        self.payload_bytes += found.payload_bytes;
        self.records.extend(found.records);
        self.faults.extend(found.faults);
    }
}

/// Walks a region and does not stop at damage as long as something behind it, or below `proven`, is recognisable.
fn walk(image: &[u8], start: RegionStart, proven: u32, rules: &Rules) -> Walk {
    let mut walk = Walk::at_start_of(start, rules.block_bytes);
    let mut search_from = walk.end;
    loop {
        let at = walk.end;
        if let Some(group) = group_header(image, at, walk.next, rules) {
            let content = read_group(image, at, &group, rules);
            let later = || later_group(image, at + rules.block_bytes, start.seq, group.group_seq, rules);
            if !content.faults.is_empty() && at >= proven && later().is_none() {
                return walk;
            }
            walk.groups += u64::from(content.faults.is_empty());
            walk.add(content);
            walk.end += group.group_bytes;
            walk.next.group_seq = walk.next.group_seq.saturating_add(1);
            walk.next.first_lsn = after(&group);
            walk.spoken = walk.spoken.max(group.checkpoint_lsn);
            search_from = walk.end;
            continue;
        }
        let Some((found_at, group)) = later_group(image, search_from, start.seq, walk.next.group_seq, rules)
        else {
            return walk;
        };
        let what = format!(
            "group {} is invalid, but group {} at offset {found_at} exists",
            walk.next.group_seq, group.group_seq
        );
        walk.faults.push((at, what));
        // Its records may still be whole.
        let lost = Span { from: at.saturating_add(GROUP_HEADER_BYTES), to: found_at };
        let count = group.first_lsn.0.saturating_sub(walk.next.first_lsn.0);
        walk.add(read_records(image, lost, walk.next, count, rules));
        walk.end = found_at;
        walk.next.group_seq = group.group_seq;
        walk.next.first_lsn = group.first_lsn;
        search_from = found_at.saturating_add(rules.block_bytes);
    }
}

fn after(group: &Group) -> Lsn {
    Lsn(group.first_lsn.0.saturating_add(u64::from(group.record_count)))
}

#[derive(Clone, Copy, Debug)]
struct Span {
    from: u32,
    to: u32,
}

#[derive(Debug, Default)]
struct Content {
    records: Vec<Placed>,
    whole: u64,
    payload_bytes: u64,
    faults: Vec<Fault>,
}

/// Reads the records of a group whose header is valid.
fn read_group(image: &[u8], at: u32, group: &Group, rules: &Rules) -> Content {
    let end = at + group.group_bytes;
    let expected = Expected { region: group.region, group_seq: group.group_seq, first_lsn: group.first_lsn };
    let span = Span { from: at + GROUP_HEADER_BYTES, to: end };
    let mut content = read_records(image, span, expected, u64::from(group.record_count), rules);
    if content.faults.is_empty() {
        let records_end =
            content.records.last().map_or(span.from, |(o, r)| o + record_bytes(r.payload_bytes));
        if align_up(u64::from(records_end), u64::from(rules.block_bytes)) != u64::from(end) {
            let what = format!("group {} is longer than its records", group.group_seq);
            content.faults.push((at, what));
        }
        let digest = |digest: RecordsDigest, (offset, _): &Placed| digest.with(&image[*offset as usize..]);
        if content.records.iter().fold(RecordsDigest::default(), digest) != group.records_digest {
            let what = format!("group {} holds other records than it was written with", group.group_seq);
            content.faults.push((at, what));
        }
    }
    content
}

/// Reads `count` records in `span`. A payload that is damaged does not hide what follows; behind a header that is,
/// the next one is looked for.
fn read_records(image: &[u8], span: Span, expected: Expected, count: u64, rules: &Rules) -> Content {
    let mut content = Content::default();
    let image = &image[..image.len().min(span.to as usize)];
    let mut offset = span.from;
    let mut lsn = expected.first_lsn.0;
    let last = lsn.saturating_add(count);
    while lsn < last {
        let found = header_at(image, offset, expected.region, rules).filter(|r| r.lsn.0 == lsn);
        let Some(record) = found else {
            let what = format!("the header of record {lsn} is invalid");
            content.faults.push((offset, what));
            let next = (offset..image.len() as u32).step_by(RECORD_ALIGN as usize).skip(1).find_map(|at| {
                let record = header_at(image, at, expected.region, rules)?;
                (record.lsn.0 > lsn && record.lsn.0 < last).then_some((at, record.lsn.0))
            });
            let Some((at, found)) = next else { return content };
            (offset, lsn) = (at, found);
            continue;
        };
        let from = (offset + RECORD_HEADER_BYTES) as usize;
        let payload = &image[from..from + record.payload_bytes as usize];
        if crc64(payload) == record.payload_checksum {
            content.whole += 1;
            content.payload_bytes += u64::from(record.payload_bytes);
        } else {
            let what = format!(
                "the payload of record {lsn} ({} bytes for volume {}, bytes {}) is damaged",
                record.payload_bytes, record.volume, record.range
            );
            content.faults.push((offset, what));
        }
        content.records.push((offset, record));
        offset += record_bytes(record.payload_bytes);
        lsn += 1;
    }
    content
}

/// The record header at `offset`, if it is valid and its payload lies within `image`.
fn header_at(image: &[u8], offset: u32, region: RegionSeq, rules: &Rules) -> Option<Record> {
    let record =
        Record::decode(image.get(offset as usize..)?, rules.salt, region).filter(|r| rules.admits(r))?;
    let end = align_up(
        u64::from(offset) + u64::from(RECORD_HEADER_BYTES) + u64::from(record.payload_bytes),
        u64::from(RECORD_ALIGN),
    );
    (end <= image.len() as u64).then_some(record)
}

/// How many bytes from `from` on are recognisable as written by the current incarnation for what should come next.
fn remains(image: &[u8], from: u32, expected: Expected, rules: &Rules) -> u32 {
    let mut end = u64::from(from);
    for at in (from..image.len() as u32).step_by(RECORD_ALIGN as usize) {
        let bytes = &image[at as usize..];
        if let Some(group) = Group::decode(bytes, rules.salt)
            && group.region == expected.region
            && group.group_seq >= expected.group_seq
            && group.incarnation == rules.incarnation as u32
        {
            end = end.max(u64::from(at) + u64::from(group.group_bytes));
        }
        if let Some(record) = Record::decode(bytes, rules.salt, expected.region)
            && record.lsn >= expected.first_lsn
            && rules.admits(&record)
        {
            let len = u64::from(RECORD_HEADER_BYTES) + u64::from(record.payload_bytes);
            end = end.max(u64::from(at) + len);
        }
    }
    (align_up(end, u64::from(rules.block_bytes)).min(image.len() as u64) - u64::from(from)) as u32
}
