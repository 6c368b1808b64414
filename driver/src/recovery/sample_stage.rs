//! Small stages built by hand with the encoders, for tests. Remembers which bytes belong to live structures.

use std::ops::Range;

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::base::checksum::crc64;
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::{Geometry, PATCH_OFFSET, SUPERBLOCK_COPIES, checkpoint_offset};
use crate::format::group::{GROUP_HEADER_BYTES, Group, RecordsDigest};
use crate::format::label::{LABEL_BYTES, Label, backing_bytes_for, label_offset};
use crate::format::patch::{PatchImage, encode_patches};
use crate::format::record::{RECORD_HEADER_BYTES, Record, RecordKind, record_bytes};
use crate::format::region::{
    FOOTER_BYTES, RegionStart, TABLE_ENTRY_BYTES, TableEntry, TableInfo, table_bytes,
};
use crate::format::superblock::{SUPERBLOCK_BYTES, StageState, Superblock};
use crate::format::volume_entry::{AckLevel, OnLogError, VolumeInfo};
use crate::io::memory_disk::MemDisk;

const REGION_BYTES: u32 = 32 << 10;
const BLOCK_BYTES: u32 = 512;
const PATCH_BYTES: u32 = 32 << 10;
/// Regions of the stage.
pub const REGION_COUNT: u32 = 6;
const INCARNATION: u64 = 3;
/// Size of each volume.
pub const VOLUME_BYTES: u64 = 1 << 20;

/// A group that was put on the device.
#[derive(Clone, Debug)]
pub struct PutGroup {
    /// Where its header is on the device.
    pub offset: u64,
    /// Its length.
    pub bytes: u32,
    /// Offsets on the device of its record headers.
    pub records: Vec<u64>,
}

/// A region that was put on the device.
#[derive(Clone, Debug)]
pub struct PutRegion {
    /// Where it starts in the three orders.
    pub start: RegionStart,
    /// Its groups.
    pub groups: Vec<PutGroup>,
    data_end: u32,
    table: Vec<TableEntry>,
}

/// A stage under construction.
#[derive(Debug)]
pub struct SampleStage {
    /// The device.
    pub disk: MemDisk,
    /// Its superblock; put in place by [`SampleStage::put_superblock`].
    pub superblock: Superblock,
    /// Its regions.
    pub regions: Vec<PutRegion>,
    /// Byte ranges of live structures.
    pub live: Vec<Range<u64>>,
    /// LSN of the next record.
    pub next_lsn: Lsn,
    /// Number of the next group.
    pub next_group: u64,
    /// Checkpoint that the next groups speak of.
    pub spoken: Lsn,
    /// How many groups before it a group says were in flight.
    pub undurable_before: u32,
}

fn volume(id: u16, name: &str) -> VolumeInfo {
    VolumeInfo {
        uuid: Uuid::from_u128(0x100 + u128::from(id)),
        name: name.into(),
        id: VolumeId(id),
        size_bytes: VOLUME_BYTES,
        block_bytes: 512,
        ack: AckLevel::Log,
        on_log_error: OnLogError::Stall,
        created_ns: 1,
        backing: format!("/backings/{name}"),
    }
}

impl Default for SampleStage {
    fn default() -> SampleStage {
        SampleStage::new()
    }
}

impl SampleStage {
    /// Superblock, first checkpoint, no regions.
    pub fn new() -> SampleStage {
        let device_bytes =
            Geometry::device_bytes_min(REGION_BYTES, PATCH_BYTES) + u64::from(2 * REGION_BYTES);
        let whole = Geometry::for_device(device_bytes, BLOCK_BYTES, REGION_BYTES, PATCH_BYTES).unwrap();
        let geometry = Geometry { region_count: REGION_COUNT, ..whole };
        geometry.validate().unwrap();
        let superblock = Superblock {
            sequence: 9,
            stage_uuid: Uuid::from_u128(0x5746),
            salt: 0x0dd5_a175,
            geometry,
            incarnation: INCARNATION,
            incarnation_group_seq: 1,
            incarnation_lsn: Lsn(1),
            arena_id: 7,
            boot_id: Uuid::from_u128(0xb007),
            state: StageState::InUse,
            next_volume_id: 3,
            created_ns: 1,
            closed_lsn: Lsn(0),
            volumes: vec![volume(1, "one"), volume(2, "two")],
        };
        let mut stage = SampleStage {
            disk: MemDisk::new("stage", device_bytes),
            superblock,
            regions: Vec::new(),
            live: Vec::new(),
            next_lsn: Lsn(1),
            next_group: 1,
            spoken: Lsn(0),
            undurable_before: 0,
        };
        stage.put_superblock();
        let head = RegionStart { seq: RegionSeq(1), first_lsn: Lsn(1), first_group_seq: 1 };
        stage.put_checkpoint(1, Lsn(0), head);
        stage
    }

    /// Three regions of three groups, the first two with tables; the checkpoint within the first; a patch zone.
    pub fn filled() -> SampleStage {
        let mut stage = SampleStage::new();
        for region in 0..3 {
            stage.begin_region();
            stage.spoken = if region == 2 { Lsn(4) } else { Lsn(0) };
            for group in 0..3u64 {
                let at = (region * 3 + group) * 8192;
                stage.put_group(&[
                    (RecordKind::Write, 1, at, 1000),
                    (RecordKind::Discard, 2, at, 4096),
                    (RecordKind::Write, 2, at + 512, 3000),
                    (RecordKind::WriteZeroes, 1, at, 512),
                ]);
            }
            if region < 2 {
                stage.seal();
            }
        }
        let head = stage.regions[0].start;
        stage.put_checkpoint(2, Lsn(4), head);
        stage.put_patches(Lsn(8));
        stage
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.disk.put(offset, bytes);
        self.live.push(offset..offset + bytes.len() as u64);
    }

    /// Writes all copies of the superblock.
    pub fn put_superblock(&mut self) {
        for copy in 0..SUPERBLOCK_COPIES {
            let offset = self.superblock.geometry.superblock_offset(copy);
            let image = self.superblock.encode(copy);
            assert_eq!(image.as_bytes().len(), SUPERBLOCK_BYTES);
            self.put(offset, image.as_bytes());
        }
    }

    /// Writes a checkpoint. Earlier ones live no longer.
    pub fn put_checkpoint(&mut self, sequence: u64, lsn: Lsn, head: RegionStart) {
        let flushed = if lsn > Lsn(0) { [(VolumeId(1), lsn)].into() } else { [].into() };
        let checkpoint = Checkpoint { sequence, lsn, head, time_ns: 1, flushed };
        let image = checkpoint.encode(self.superblock.salt);
        self.live.retain(|range| !(checkpoint_offset(0)..PATCH_OFFSET).contains(&range.start));
        self.put(checkpoint_offset(checkpoint.slot()), image.as_bytes());
    }

    /// Writes two images for volume 1 to the patch zone.
    pub fn put_patches(&mut self, epoch_end: Lsn) {
        let image = |offset| PatchImage { volume: VolumeId(1), offset, bytes: vec![0xa5; 512] };
        let zone = encode_patches(&[image(0), image(8192)], epoch_end, self.superblock.salt);
        self.disk.put(PATCH_OFFSET, &zone);
        self.live.push(PATCH_OFFSET..PATCH_OFFSET + 64 + 2 * 32);
        self.live.push(PATCH_OFFSET + 4096..PATCH_OFFSET + 4096 + 512);
        self.live.push(PATCH_OFFSET + 8192..PATCH_OFFSET + 8192 + 512);
    }

    /// Offset on the device of byte `offset` of a region.
    pub fn place(&self, seq: RegionSeq, offset: u32) -> u64 {
        self.superblock.geometry.region_offset(seq) + u64::from(offset)
    }

    /// Begins the next region; its header is written with its first group.
    pub fn begin_region(&mut self) {
        let seq = self.regions.last().map_or(RegionSeq(1), |region| region.start.seq.next());
        self.regions.push(PutRegion {
            start: RegionStart { seq, first_lsn: self.next_lsn, first_group_seq: self.next_group },
            groups: Vec::new(),
            data_end: BLOCK_BYTES,
            table: Vec::new(),
        });
    }

    /// Appends a group to the newest region: kind, volume, offset and length of each record.
    pub fn put_group(&mut self, records: &[(RecordKind, u16, u64, u32)]) {
        let salt = self.superblock.salt;
        let mut region = self.regions.pop().expect("a region was begun");
        let seq = region.start.seq;
        if region.groups.is_empty() {
            let slot = seq.slot(REGION_COUNT);
            let header = region.start.encode(salt, slot);
            self.put(self.place(seq, 0), header.as_bytes());
        }
        let header_at = region.data_end;
        let mut at = header_at + GROUP_HEADER_BYTES;
        let first_lsn = self.next_lsn;
        let mut placed = Vec::new();
        let mut records_digest = RecordsDigest::default();
        for &(kind, volume, offset, len) in records {
            let payload_len = if kind == RecordKind::Write { len } else { 0 };
            let payload: Vec<u8> =
                (0..payload_len).map(|i| (i as u8) ^ (self.next_lsn.0 as u8) | 1).collect();
            let record = Record {
                lsn: self.next_lsn,
                volume: VolumeId(volume),
                kind,
                range: ByteRange::at(offset, u64::from(len)),
                payload_bytes: payload_len,
                payload_checksum: crc64(&payload),
                timestamp_ns: 1,
                incarnation: self.superblock.incarnation as u16,
            };
            let place = self.place(seq, at);
            let header = record.encode(salt, seq);
            records_digest = records_digest.with(header.as_bytes());
            self.put(place, header.as_bytes());
            self.put(place + u64::from(RECORD_HEADER_BYTES), &payload);
            region.table.push(TableEntry::new(&record, at));
            placed.push(place);
            at += record_bytes(payload_len);
            self.next_lsn = self.next_lsn.next();
        }
        let group_bytes = at.next_multiple_of(BLOCK_BYTES) - header_at;
        let group = Group {
            record_count: records.len() as u32,
            group_seq: self.next_group,
            region: seq,
            first_lsn,
            group_bytes,
            records_digest,
            incarnation: self.superblock.incarnation as u32,
            undurable_before: self.undurable_before,
            checkpoint_lsn: self.spoken,
        };
        self.put(self.place(seq, header_at), group.encode(salt).as_bytes());
        self.next_group += 1;
        region.data_end += group_bytes;
        let offset = self.place(seq, header_at);
        region.groups.push(PutGroup { offset, bytes: group_bytes, records: placed });
        self.regions.push(region);
    }

    /// Writes the table of the newest region.
    pub fn seal(&mut self) {
        let region = self.regions.last().expect("a region was begun").clone();
        let table: Vec<u8> = region.table.iter().flat_map(|entry| entry.as_bytes().to_vec()).collect();
        self.put_table(&region, &table);
    }

    /// Writes `table` as the table of `region`.
    pub fn put_table(&mut self, region: &PutRegion, table: &[u8]) {
        let info = TableInfo {
            start: region.start,
            entry_count: table.len() as u32 / TABLE_ENTRY_BYTES,
            group_count: region.groups.len() as u32,
            data_end: region.data_end,
            table_checksum: crc64(table),
        };
        let seq = region.start.seq;
        self.put(self.place(seq, REGION_BYTES - table_bytes(info.entry_count, BLOCK_BYTES)), table);
        self.put(self.place(seq, REGION_BYTES - FOOTER_BYTES), info.encode(self.superblock.salt).as_bytes());
    }

    /// The table of a region as it is encoded.
    pub fn table_of(region: &PutRegion) -> Vec<u8> {
        region.table.iter().flat_map(|entry| entry.as_bytes().to_vec()).collect()
    }

    /// Backing of volume `id` that was flushed up to `flushed`.
    pub fn backing(&self, id: u16, flushed: Lsn) -> MemDisk {
        let volume = self.superblock.volumes.iter().find(|v| v.id == VolumeId(id)).expect("a volume");
        let disk = MemDisk::new(&volume.backing, backing_bytes_for(volume.size_bytes));
        let label = Label {
            sequence: 4,
            stage_uuid: self.superblock.stage_uuid,
            volume_uuid: volume.uuid,
            volume_bytes: volume.size_bytes,
            flushed_lsn: flushed,
            name: volume.name.clone(),
        };
        let image = label.encode();
        assert_eq!(image.as_bytes().len() as u64, LABEL_BYTES);
        disk.put(label_offset(volume.size_bytes, label.slot()), image.as_bytes());
        disk
    }
}
