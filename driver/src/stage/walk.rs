//! Reading regions: from bytes to groups and records, by the validity rules of `format`. Pure.
//!
//! Three readers use it: recovery on bytes from the log device (everything is checked), recovery on bytes of the arena
//! (records without their group header are possible there), and the flusher (headers only).

use crate::base::checksum::crc64;
use crate::base::mutation::{Mutation, is};
use crate::base::units::align_up;
use zerocopy::FromBytes;

use crate::base::{Lsn, RegionSeq};
use crate::format::group::{GROUP_HEADER_BYTES, Group, RecordsDigest};
use crate::format::record::{RECORD_ALIGN, RECORD_HEADER_BYTES, Record, RecordHeader, record_bytes};

/// A record and the offset of its header within its region.
pub type Placed = (u32, Record);

/// What does not change during a walk.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The stage's salt.
    pub salt: u64,
    /// Block of the log.
    pub block_bytes: u32,
    /// Incarnation that wrote the groups from `incarnation_group_seq` on.
    pub incarnation: u64,
    /// First group of that incarnation: a group at or above it written by an earlier incarnation was given up by a
    /// recovery and must not come back.
    pub incarnation_group_seq: u64,
    /// First LSN of that incarnation, likewise for records.
    pub incarnation_lsn: Lsn,
}

impl Rules {
    /// Whether a group of this number may have been written by the incarnation it names.
    #[must_use]
    pub fn admits_group(&self, group: &Group) -> bool {
        self.was_durable(group.group_seq) || group.incarnation == self.incarnation as u32
    }

    /// Whether a group found behind an invalid one says anything: not if it was given up by an opening. One of an incarnation
    /// that the superblock does not know of yet does: then the superblock is older than the log.
    fn may_prove(&self, group: &Group) -> bool {
        let is_later = (group.incarnation.wrapping_sub(self.incarnation as u32) as i32) > 0;
        self.admits_group(group) || is_later
    }

    /// Whether the group of this number was durable when the stage was opened last, whatever is found in its place now:
    /// opening syncs the log before the superblock tells where the incarnation begins.
    #[must_use]
    pub fn was_durable(&self, group_seq: u64) -> bool {
        group_seq < self.incarnation_group_seq
    }

    /// Whether a record of this LSN may have been claimed by the incarnation it names.
    #[must_use]
    pub fn admits(&self, record: &Record) -> bool {
        record.lsn < self.incarnation_lsn || record.incarnation == self.incarnation as u16
    }
}

/// What the next group must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The region walked.
    pub region: RegionSeq,
    /// Sequence number of the next group.
    pub group_seq: u64,
    /// LSN of its first record.
    pub first_lsn: Lsn,
}

/// Decodes the group header at `at` if it is the expected group and its extent fits `image`.
#[must_use]
pub fn group_header(image: &[u8], at: u32, expected: Expected, rules: &Rules) -> Option<Group> {
    let group = Group::decode(image.get(at as usize..)?, rules.salt)?;
    let fits = group.group_bytes >= GROUP_HEADER_BYTES
        && group.group_bytes.is_multiple_of(rules.block_bytes)
        && (at as usize).checked_add(group.group_bytes as usize).is_some_and(|end| end <= image.len());
    let matches = group.region == expected.region
        && group.group_seq == expected.group_seq
        && group.first_lsn == expected.first_lsn
        && group.record_count > 0;
    (rules.admits_group(&group) && fits && matches).then_some(group)
}

/// Checks the whole group at `at` and appends its records to `records`. `None`, and nothing appended, if it is invalid.
pub fn whole_group(
    image: &[u8],
    at: u32,
    expected: Expected,
    rules: &Rules,
    records: &mut Vec<Placed>,
) -> Option<Group> {
    let group = group_header(image, at, expected, rules)?;
    let before = records.len();
    let end = at + group.group_bytes;
    let mut offset = at + GROUP_HEADER_BYTES;
    let mut digest = RecordsDigest::default();
    for i in 0..u64::from(group.record_count) {
        let record = record_at(&image[..end as usize], offset, expected.region, rules)
            .filter(|r| r.lsn == group.first_lsn.plus(i));
        let Some(record) = record else {
            records.truncate(before);
            return None;
        };
        let next = offset + record_bytes(record.payload_bytes);
        records.push((offset, record));
        digest = digest.with(&image[offset as usize..]);
        offset = next;
    }
    let ends = align_up(u64::from(offset), u64::from(rules.block_bytes)) == u64::from(end);
    if ends && digest == group.records_digest {
        return Some(group);
    }
    records.truncate(before);
    None
}

/// The record at `offset`, header and payload checked.
#[must_use]
pub fn record_at(image: &[u8], offset: u32, region: RegionSeq, rules: &Rules) -> Option<Record> {
    let record =
        Record::decode(image.get(offset as usize..)?, rules.salt, region).filter(|r| rules.admits(r))?;
    let from = offset as usize + RECORD_HEADER_BYTES as usize;
    let to = from.checked_add(record.payload_bytes as usize)?;
    let payload = image.get(from..to)?;
    let padded = offset as usize + record_bytes(record.payload_bytes) as usize;
    (padded <= image.len()
        && (crc64(payload) == record.payload_checksum || is(Mutation::PayloadIsNotChecked)))
    .then_some(record)
}

/// Digest of the `count` records that start at the beginning of `bytes`, which this server has filled itself.
#[must_use]
pub fn digest_of(bytes: &[u8], count: u32) -> RecordsDigest {
    let mut offset = 0;
    let mut digest = RecordsDigest::default();
    for _ in 0..count {
        let record = &bytes[offset..];
        let (header, _) = RecordHeader::ref_from_prefix(record).expect("a record lies within its group");
        digest = digest.with(record);
        offset += record_bytes(header.payload_bytes.get()) as usize;
    }
    assert_eq!(offset, bytes.len(), "a group ends where its records do");
    digest
}

/// Looks from block `from` on for a group of this region that proves that the group `group_seq` was durable.
#[must_use]
pub fn later_group(
    image: &[u8],
    from: u32,
    region: RegionSeq,
    group_seq: u64,
    rules: &Rules,
) -> Option<(u32, Group)> {
    find_group(image, from, region, rules, |group| group.proves(group_seq))
}

/// Looks from block `from` on for the first group of this region above `group_seq` and not above `last_seq`, whatever it
/// proves.
#[must_use]
pub fn next_group(
    image: &[u8],
    from: u32,
    region: RegionSeq,
    (group_seq, last_seq): (u64, u64),
    rules: &Rules,
) -> Option<(u32, Group)> {
    find_group(image, from, region, rules, |group| group.group_seq > group_seq && group.group_seq <= last_seq)
}

fn find_group(
    image: &[u8],
    from: u32,
    region: RegionSeq,
    rules: &Rules,
    is_wanted: impl Fn(&Group) -> bool,
) -> Option<(u32, Group)> {
    (from..image.len() as u32).step_by(rules.block_bytes as usize).find_map(|at| {
        Group::decode(&image[at as usize..], rules.salt)
            .filter(|group| group.region == region && rules.may_prove(group) && is_wanted(group))
            .map(|group| (at, group))
    })
}

/// A run of records found in the arena behind the end of the log: one group as the previous server had laid it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaGroup {
    /// Offset of the group header's place.
    pub header_offset: u32,
    /// End of the last record.
    pub records_end: u32,
    /// LSN of the first record.
    pub first_lsn: Lsn,
    /// Number of records.
    pub record_count: u32,
}

/// Walks the records of an arena region from block boundary `from`, where the next group starts, as long as each is
/// valid and has the next LSN. Group headers may be missing: a group that was never written has none, so group ends
/// are recognised by where the next record lies. Appends to `records` and returns the groups.
pub fn arena_groups(
    image: &[u8],
    from: u32,
    region: RegionSeq,
    mut next_lsn: Lsn,
    rules: &Rules,
    records: &mut Vec<Placed>,
) -> Vec<ArenaGroup> {
    let mut groups: Vec<ArenaGroup> = Vec::new();
    let mut boundary = from;
    loop {
        let mut group = ArenaGroup {
            header_offset: boundary,
            records_end: boundary + GROUP_HEADER_BYTES,
            first_lsn: next_lsn,
            record_count: 0,
        };
        while let Some(record) =
            record_at(image, group.records_end, region, rules).filter(|r| r.lsn == next_lsn)
        {
            records.push((group.records_end, record));
            group.records_end += record_bytes(record.payload_bytes);
            group.record_count += 1;
            next_lsn = next_lsn.next();
        }
        if group.record_count == 0 {
            return groups;
        }
        boundary = align_up(u64::from(group.records_end), u64::from(rules.block_bytes)) as u32;
        groups.push(group);
    }
}

/// Visits the headers of the records of a resident region, group by group, to the end of `image`, which is the region
/// up to the end of its last durable group. Returns `false` if the bytes are not what was written there: memory was
/// damaged.
pub fn visit_headers(
    image: &[u8],
    mut expected: Expected,
    rules: &Rules,
    mut visit: impl FnMut(u32, &Record),
) -> bool {
    let any_incarnation = Rules { incarnation_group_seq: u64::MAX, ..*rules };
    let mut at = rules.block_bytes;
    while (at as usize) < image.len() {
        let Some(group) = group_header(image, at, expected, &any_incarnation) else { return false };
        let mut offset = at + GROUP_HEADER_BYTES;
        for i in 0..u64::from(group.record_count) {
            let record = image
                .get(offset as usize..)
                .and_then(|bytes| Record::decode(bytes, rules.salt, expected.region))
                .filter(|r| r.lsn == group.first_lsn.plus(i));
            let Some(record) = record else { return false };
            visit(offset, &record);
            offset += record_bytes(record.payload_bytes);
        }
        at += group.group_bytes;
        expected.group_seq += 1;
        expected.first_lsn = group.first_lsn.plus(u64::from(group.record_count));
    }
    true
}

/// How many bytes from `from` on are recognisable as written by the current incarnation for what should come next.
#[must_use]
pub fn remains(image: &[u8], from: u32, expected: Expected, rules: &Rules) -> u32 {
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
