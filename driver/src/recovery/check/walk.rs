//! Reading a region that may be damaged: what is still recognisable, and what is wrong where.

use crate::base::checksum::crc64;
use crate::base::units::align_up;
use crate::base::{Lsn, RegionSeq};
use crate::format::group::{GROUP_HEADER_BYTES, Group, RecordsDigest};
use crate::format::record::{RECORD_ALIGN, RECORD_HEADER_BYTES, Record, record_bytes};
use crate::format::region::RegionStart;
use crate::stage::walk::{Expected, Placed, Rules, group_header, later_group, next_group};

/// Something wrong at an offset of a region.
type Fault = (u32, String);

/// What was found in a region.
#[derive(Debug)]
pub(super) struct Walk {
    /// Records with a valid header, with whole payload or not.
    pub records: Vec<Placed>,
    /// Number of those with a whole payload.
    pub whole: u64,
    pub payload_bytes: u64,
    pub groups: u64,
    pub faults: Vec<Fault>,
    /// End of the last group.
    pub end: u32,
    /// What should follow.
    pub next: Expected,
    pub spoken: Lsn,
}

impl Walk {
    pub fn at_start_of(start: RegionStart, block_bytes: u32) -> Walk {
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
pub(super) fn walk(image: &[u8], start: RegionStart, proven: u32, rules: &Rules) -> Walk {
    let mut walk = Walk::at_start_of(start, rules.block_bytes);
    let mut search_from = walk.end;
    loop {
        let at = walk.end;
        if let Some(group) = group_header(image, at, walk.next, rules) {
            let content = read_group(image, at, &group, rules);
            let later = || later_group(image, at + rules.block_bytes, start.seq, group.group_seq, rules);
            let is_proven = || at < proven || rules.was_durable(group.group_seq) || later().is_some();
            if !content.faults.is_empty() && !is_proven() {
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
        let number = walk.next.group_seq;
        let Some((_, proof)) = later_group(image, search_from, start.seq, number, rules) else {
            return walk;
        };
        // It is damage; the nearest group behind it may prove less than the one that proves it.
        let span = (number, proof.group_seq);
        let (found_at, group) =
            next_group(image, search_from, start.seq, span, rules).expect("the proof is one of them");
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
