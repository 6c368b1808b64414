//! What the log device says: which regions are live, which records they hold, where the log ends. Reads only.

use crate::base::checksum::crc64;
use crate::base::mutation::{Mutation, is};
use crate::base::{ByteRange, Error, ErrorKind, Lsn, RegionSeq, Result, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::{CHECKPOINT_SLOT_BYTES, CHECKPOINT_SLOTS, Geometry, checkpoint_offset};
use crate::format::record::RecordKind;
use crate::format::region::{
    FOOTER_BYTES, RegionStart, TABLE_ENTRY_BYTES, TableEntry, TableInfo, table_bytes,
};
use crate::format::superblock::Superblock;
use crate::io::Disk;
use crate::stage::ring::{RegionState, TableState};
use crate::stage::walk::{Expected, Placed, Rules, later_group, remains, whole_group};
use zerocopy::FromBytes;

/// A record as recovery needs it: position, not payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Position in the order.
    pub lsn: Lsn,
    /// Volume.
    pub volume: VolumeId,
    /// Kind.
    pub kind: RecordKind,
    /// Bytes of the volume.
    pub range: ByteRange,
    /// Region that holds it.
    pub region: RegionSeq,
    /// Offset of its header in the region.
    pub record_offset: u32,
}

/// The log as found on its device.
#[derive(Debug)]
pub struct ScannedLog {
    /// Checkpoint to start from.
    pub checkpoint: Checkpoint,
    /// Live regions, oldest first. Only the last one is resident: its bytes are `tail_image`.
    pub regions: Vec<RegionState>,
    /// Bytes of the last region up to its `data_end`.
    pub tail_image: Vec<u8>,
    /// LSN after the last record.
    pub next_lsn: Lsn,
    /// Sequence number after the last group.
    pub next_group_seq: u64,
    /// Bytes of groups that were in flight when the log was cut short.
    pub torn_bytes: u64,
    /// Regions read by their table.
    pub by_table: u64,
    /// Regions read by scanning.
    pub by_scan: u64,
    /// Remarks for people.
    pub notes: Vec<String>,
}

/// The rules that a stage's log follows.
#[must_use]
pub fn rules_of(superblock: &Superblock) -> Rules {
    Rules {
        salt: superblock.salt,
        block_bytes: superblock.geometry.block_bytes,
        incarnation: superblock.incarnation,
        incarnation_group_seq: superblock.incarnation_group_seq,
        incarnation_lsn: superblock.incarnation_lsn,
    }
}

/// All valid checkpoints, newest first.
pub fn read_checkpoints(disk: &dyn Disk, superblock: &Superblock) -> Result<Vec<Checkpoint>> {
    let mut slots = vec![0; CHECKPOINT_SLOTS as usize * CHECKPOINT_SLOT_BYTES as usize];
    disk.read(checkpoint_offset(0), &mut slots)?;
    let mut found: Vec<Checkpoint> = slots
        .chunks(CHECKPOINT_SLOT_BYTES as usize)
        .zip(0..)
        .filter_map(|(bytes, slot)| Checkpoint::decode(bytes, superblock.salt, slot))
        .collect();
    found.sort_by_key(|c| std::cmp::Reverse(c.sequence));
    Ok(found)
}

/// Scans the log of a stage. `visit` is told every record above the checkpoint, in LSN order.
pub fn scan(disk: &dyn Disk, superblock: &Superblock, visit: &mut dyn FnMut(&Found)) -> Result<ScannedLog> {
    let checkpoint = read_checkpoints(disk, superblock)?.into_iter().next().ok_or_else(|| {
        Error::new(
            ErrorKind::Damaged,
            format!("{}: no checkpoint is valid, so it is not known where the log begins", disk.name()),
        )
    })?;
    let scanner = Scanner { disk, geometry: superblock.geometry, rules: rules_of(superblock) };
    scanner.scan(checkpoint, visit)
}

struct Scanner<'a> {
    disk: &'a dyn Disk,
    geometry: Geometry,
    rules: Rules,
}

impl Scanner<'_> {
    fn damaged(&self, seq: RegionSeq, offset: u32, what: &str) -> Error {
        let position = self.geometry.region_offset(seq) + u64::from(offset);
        Error::new(
            ErrorKind::Damaged,
            format!(
                "{}: damage in the log at byte {position} (region {seq}, offset {offset}): {what}. Nothing was changed. \
                 Restore the device from a copy; `tidegate inspect` shows what is there",
                self.disk.name()
            ),
        )
    }

    fn region_starts(&self) -> Result<Vec<Option<RegionStart>>> {
        let count = self.geometry.region_count;
        let place = |slot: u32| {
            (self.geometry.region_offset(RegionSeq(u64::from(slot) + 1)), self.geometry.block_bytes as usize)
        };
        let places: Vec<(u64, usize)> = (0..count).map(place).collect();
        let mut starts = Vec::with_capacity(places.len());
        self.disk.read_each(&places, &mut |slot, bytes| {
            starts.push(RegionStart::decode(bytes, self.rules.salt, slot as u32, count));
            Ok(())
        })?;
        Ok(starts)
    }

    /// The regions that make up the log, oldest first, the checkpoint to use with them, and whether the first of them, which
    /// is the only one then, has no header on the device.
    fn chain(
        &self,
        mut checkpoint: Checkpoint,
        notes: &mut Vec<String>,
    ) -> Result<(Checkpoint, Vec<RegionStart>, bool)> {
        let starts = self.region_starts()?;
        let at = |seq: RegionSeq| {
            starts[seq.slot(self.geometry.region_count) as usize].filter(|start| start.seq == seq)
        };
        let newest = starts.iter().flatten().map(|s| s.seq).max().unwrap_or(RegionSeq(0));
        let head = checkpoint.head;
        let mut first = head.seq;
        if at(first).is_none() {
            if newest < first {
                return Ok((checkpoint, vec![head], true));
            }
            let slot = starts[first.slot(self.geometry.region_count) as usize];
            if slot.is_none_or(|start| start.seq < first) {
                return Err(self.damaged(
                    first,
                    0,
                    "the first region of the log is missing, newer ones exist",
                ));
            }
            // The slot was given to a newer region, which happens only after a newer checkpoint, whose slot must have been
            // damaged since. Everything before the oldest whole region was flushed then, and applying more of the
            // log than needed, to its end, leads to the same state.
            first = newest;
            while first.0 > 1 && at(RegionSeq(first.0 - 1)).is_some() {
                first = RegionSeq(first.0 - 1);
            }
            let start = at(first).expect("the oldest whole region");
            let known = self.checkpoint_in(&starts, first, newest)?;
            if known.next() < start.first_lsn {
                let what = format!(
                    "the newest checkpoint is damaged, and the regions before this one are missing although only LSN {known} \
                     is known to be flushed"
                );
                return Err(self.damaged(first, 0, &what));
            }
            notes.push(format!(
                "checkpoint {} is older than the log; the log is used from its oldest region {first} on",
                checkpoint.sequence
            ));
            checkpoint.lsn = checkpoint.lsn.max(Lsn(start.first_lsn.0 - 1));
            checkpoint.head = start;
        } else if at(first) != Some(head) {
            return Err(self.damaged(first, 0, "the region does not start where the checkpoint says"));
        }
        let mut chain = Vec::new();
        while let Some(start) = at(first) {
            chain.push(start);
            first = first.next();
        }
        if newest >= first {
            let what = format!("the region is missing, but region {newest} exists");
            return Err(self.damaged(first, 0, &what));
        }
        Ok((checkpoint, chain, false))
    }

    fn scan(&self, checkpoint: Checkpoint, visit: &mut dyn FnMut(&Found)) -> Result<ScannedLog> {
        let mut notes = Vec::new();
        let (checkpoint, chain, headless) = self.chain(checkpoint, &mut notes)?;
        let flushed = checkpoint.lsn;
        let visit: &mut dyn FnMut(&Found) = &mut |found| {
            if found.lsn > flushed {
                visit(found);
            }
        };
        let mut log = ScannedLog {
            checkpoint,
            regions: Vec::with_capacity(chain.len()),
            tail_image: Vec::new(),
            next_lsn: chain[0].first_lsn,
            next_group_seq: chain[0].first_group_seq,
            torn_bytes: 0,
            by_table: 0,
            by_scan: 0,
            notes,
        };
        self.read_regions(&chain, headless, &mut log, visit)?;
        if self.rules.was_durable(log.next_group_seq)
            && !is(Mutation::DamageTakenForTheEnd)
            && !is(Mutation::LastGroupIsDropped)
        {
            let last = log.regions.last().expect("a log has a region");
            let what = format!(
                "group {} is invalid, but it was durable when the stage was opened last",
                log.next_group_seq
            );
            return Err(self.damaged(last.start.seq, last.data_end, &what));
        }
        if log.next_lsn <= log.checkpoint.lsn {
            let last = chain.last().expect("a log has a region").seq;
            let what = format!(
                "the log ends at LSN {}, but everything up to LSN {} was flushed from it",
                log.next_lsn.0 - 1,
                log.checkpoint.lsn
            );
            return Err(self.damaged(last, log.regions.last().expect("a region").data_end, &what));
        }
        Ok(log)
    }

    /// Reads the regions of the log: tables, the whole last region, and the slot behind it.
    fn read_regions(
        &self,
        chain: &[RegionStart],
        headless: bool,
        log: &mut ScannedLog,
        visit: &mut dyn FnMut(&Found),
    ) -> Result<()> {
        let whole = |seq: RegionSeq| (self.geometry.region_offset(seq), self.geometry.region_bytes as usize);
        let last = chain.last().expect("a log has a region").seq;
        let mut places: Vec<(u64, usize)> =
            chain.windows(2).map(|pair| self.table_place(&pair[0], &pair[1])).collect();
        places.push(whole(last));
        if chain.len() < self.geometry.region_count as usize {
            places.push(whole(last.next()));
        }
        self.disk.read_each(&places, &mut |i, bytes| {
            let Some(&start) = chain.get(i) else {
                return self.check_nothing_follows(last.next(), bytes, log.next_group_seq);
            };
            if start.first_lsn != log.next_lsn || start.first_group_seq != log.next_group_seq {
                let what =
                    format!("the region starts at LSN {}, expected was {}", start.first_lsn, log.next_lsn);
                return Err(self.damaged(start.seq, 0, &what));
            }
            if headless {
                let region = self.read_headless(start, bytes, log)?;
                log.regions.push(region);
                return Ok(());
            }
            let region = match chain.get(i + 1) {
                None => self.read_groups(start, None, bytes, log, visit)?,
                Some(next) => match self.read_table(start, next, bytes, visit) {
                    Some(region) => region,
                    None => {
                        let mut image = vec![0; self.geometry.region_bytes as usize];
                        self.disk.read(self.geometry.region_offset(start.seq), &mut image)?;
                        self.read_groups(start, Some(next), &image, log, visit)?
                    }
                },
            };
            match region.table {
                TableState::Written => log.by_table += 1,
                _ => log.by_scan += 1,
            }
            log.next_lsn = region.last_lsn().next();
            log.next_group_seq = start.first_group_seq + u64::from(region.group_count);
            log.regions.push(region);
            Ok(())
        })
    }

    /// Where the table of a region that `next` follows is, if it is there: at the region's end, and `next` tells how long
    /// it is.
    fn table_place(&self, start: &RegionStart, next: &RegionStart) -> (u64, usize) {
        let Geometry { region_bytes, block_bytes, .. } = self.geometry;
        let count = next.first_lsn.0.saturating_sub(start.first_lsn.0);
        let len = u32::try_from(count)
            .map(|count| table_bytes(count, block_bytes))
            .ok()
            .filter(|len| *len < region_bytes)
            .unwrap_or(block_bytes);
        (self.geometry.region_offset(start.seq) + u64::from(region_bytes - len), len as usize)
    }

    /// Looks into `image`, the slot behind the last region: if that region's header was damaged, its groups would be missed. A
    /// first group that was torn has the next number; a higher one proves that it had been durable.
    fn check_nothing_follows(&self, seq: RegionSeq, image: &[u8], group_seq: u64) -> Result<()> {
        match later_group(image, self.geometry.block_bytes, seq, group_seq, &self.rules) {
            None => Ok(()),
            Some((at, group)) => {
                let what = format!(
                    "the region's header is invalid, but group {} at offset {at} exists",
                    group.group_seq
                );
                Err(self.damaged(seq, 0, &what))
            }
        }
    }

    /// The newest checkpoint that the groups of regions `first..=newest` speak of. Of the newest region the first group may
    /// be torn.
    fn checkpoint_in(
        &self,
        starts: &[Option<RegionStart>],
        first: RegionSeq,
        newest: RegionSeq,
    ) -> Result<Lsn> {
        let mut image = vec![0; self.geometry.region_bytes as usize];
        for seq in (first.0..=newest.0).rev().map(RegionSeq) {
            let slot = seq.slot(self.geometry.region_count) as usize;
            let Some(start) = starts[slot].filter(|start| start.seq == seq) else { break };
            self.disk.read(self.geometry.region_offset(seq), &mut image)?;
            let walked = walk_region(&image, start, &self.rules);
            if walked.group_count > 0 {
                return Ok(walked.checkpoint_lsn);
            }
        }
        Ok(Lsn::ZERO)
    }

    /// Reads a region whose header is not there. The header is written together with the first group, so that write was never
    /// whole, and the group was never acknowledged: it is given up even if it is whole itself, or the region would go on
    /// without a header.
    fn read_headless(&self, start: RegionStart, image: &[u8], log: &mut ScannedLog) -> Result<RegionState> {
        let from = self.geometry.block_bytes;
        let first = start.first_group_seq;
        if let Some((at, group)) = later_group(image, from, start.seq, first, &self.rules) {
            let what = format!(
                "the region's header is invalid, but group {} at offset {at} exists",
                group.group_seq
            );
            return Err(self.damaged(start.seq, 0, &what));
        }
        log.by_scan += 1;
        let expected = Expected { region: start.seq, group_seq: first, first_lsn: start.first_lsn };
        log.torn_bytes = u64::from(remains(image, from, expected, &self.rules));
        log.tail_image = image[..from as usize].to_vec();
        Ok(RegionState {
            start,
            record_count: 0,
            group_count: 0,
            data_end: from,
            durable_end: from,
            resident: true,
            table: TableState::Missing,
        })
    }

    /// Takes a full region by its table, which is `bytes` ([`Scanner::table_place`]). `None` if the table is not valid or does
    /// not lead to `next`.
    fn read_table(
        &self,
        start: RegionStart,
        next: &RegionStart,
        bytes: &[u8],
        visit: &mut dyn FnMut(&Found),
    ) -> Option<RegionState> {
        let (region_bytes, block_bytes) = (self.geometry.region_bytes, self.geometry.block_bytes);
        let footer = &bytes[bytes.len() - FOOTER_BYTES as usize..];
        let info = TableInfo::decode(footer, self.rules.salt, start, region_bytes, block_bytes)?;
        let complete = start.first_lsn.plus(u64::from(info.entry_count)) == next.first_lsn
            && start.first_group_seq + u64::from(info.group_count) == next.first_group_seq;
        if !complete || table_bytes(info.entry_count, block_bytes) as usize != bytes.len() {
            return None;
        }
        let table = &bytes[..(info.entry_count * TABLE_ENTRY_BYTES) as usize];
        if crc64(table) != info.table_checksum {
            return None;
        }
        let mut found = Vec::with_capacity(info.entry_count as usize);
        for (i, entry) in table.chunks_exact(TABLE_ENTRY_BYTES as usize).enumerate() {
            let entry = TableEntry::read_from_bytes(entry).expect("a chunk has the size of an entry");
            let end = u64::from(entry.record_offset.get()) + 64 + u64::from(entry.payload_bytes.get());
            let (kind, range) = entry.parts().filter(|_| end <= u64::from(info.data_end))?;
            let lsn = start.first_lsn.plus(i as u64);
            let record_offset = entry.record_offset.get();
            found.push(Found { lsn, volume: entry.volume(), kind, range, region: start.seq, record_offset });
        }
        found.iter().for_each(visit);
        Some(RegionState {
            start,
            record_count: info.entry_count,
            group_count: info.group_count,
            data_end: info.data_end,
            durable_end: info.data_end,
            resident: false,
            table: TableState::Written,
        })
    }

    /// Reads a region group by group, checking everything. The last region may end anywhere; another must lead to `next`.
    fn read_groups(
        &self,
        start: RegionStart,
        next: Option<&RegionStart>,
        image: &[u8],
        log: &mut ScannedLog,
        visit: &mut dyn FnMut(&Found),
    ) -> Result<RegionState> {
        let mut walked = walk_region(image, start, &self.rules);
        if is(Mutation::LastGroupIsDropped) && next.is_none() && walked.group_count > 1 {
            walked = walk_region(&image[..walked.data_end as usize - 1], start, &self.rules);
        }
        let expected_end = next.is_none_or(|next| {
            walked.next.first_lsn == next.first_lsn && walked.next.group_seq == next.first_group_seq
        });
        if !expected_end {
            let what = format!("group {} is invalid, but newer ones exist", walked.next.group_seq);
            return Err(self.damaged(start.seq, walked.data_end, &what));
        }
        if next.is_none() {
            let seq = walked.next.group_seq;
            let footer = &image[image.len() - FOOTER_BYTES as usize..];
            let (region_bytes, block_bytes) = (self.geometry.region_bytes, self.geometry.block_bytes);
            // A table is written when all groups of its region are durable.
            if TableInfo::decode(footer, self.rules.salt, start, region_bytes, block_bytes)
                .is_some_and(|info| info.group_count > walked.group_count)
            {
                let what = format!(
                    "group {seq} is invalid, but the region's table counts it among the durable ones"
                );
                return Err(self.damaged(start.seq, walked.data_end, &what));
            }
            if let Some((at, group)) = later_group(image, walked.data_end, start.seq, seq, &self.rules)
                .filter(|_| !is(Mutation::DamageTakenForTheEnd) && !is(Mutation::LastGroupIsDropped))
            {
                let what =
                    format!("group {seq} is invalid, but group {} at offset {at} exists", group.group_seq);
                return Err(self.damaged(start.seq, walked.data_end, &what));
            }
            log.torn_bytes = u64::from(remains(image, walked.data_end, walked.next, &self.rules));
            log.tail_image = image[..walked.data_end as usize].to_vec();
        }
        for (record_offset, record) in &walked.records {
            visit(&Found {
                lsn: record.lsn,
                volume: record.volume,
                kind: record.kind,
                range: record.range,
                region: start.seq,
                record_offset: *record_offset,
            });
        }
        Ok(RegionState {
            start,
            record_count: walked.records.len() as u32,
            group_count: walked.group_count,
            data_end: walked.data_end,
            durable_end: walked.data_end,
            resident: next.is_none(),
            table: TableState::Missing,
        })
    }
}

/// The valid groups of a region.
#[derive(Debug)]
pub struct WalkedRegion {
    /// Their records.
    pub records: Vec<Placed>,
    /// Their number.
    pub group_count: u32,
    /// End of the last one.
    pub data_end: u32,
    /// What should have followed.
    pub next: Expected,
    /// The newest checkpoint that a group header speaks of.
    pub checkpoint_lsn: Lsn,
}

/// Walks the valid groups of a region's bytes, checking everything.
#[must_use]
pub fn walk_region(image: &[u8], start: RegionStart, rules: &Rules) -> WalkedRegion {
    let mut walked = WalkedRegion {
        records: Vec::new(),
        group_count: 0,
        data_end: rules.block_bytes,
        next: Expected { region: start.seq, group_seq: start.first_group_seq, first_lsn: start.first_lsn },
        checkpoint_lsn: Lsn::ZERO,
    };
    while let Some(group) = whole_group(image, walked.data_end, walked.next, rules, &mut walked.records) {
        walked.group_count += 1;
        walked.data_end += group.group_bytes;
        walked.next.group_seq += 1;
        walked.next.first_lsn = group.first_lsn.plus(u64::from(group.record_count));
        walked.checkpoint_lsn = walked.checkpoint_lsn.max(group.checkpoint_lsn);
    }
    walked
}
