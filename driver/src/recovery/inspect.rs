//! Decodes every structure found on a device or file: a stage, a backing, an arena file. Shows what is there, valid or
//! not, and judges nothing beyond each structure's own rule of validity; [`super::check()`] does that.
//!
//! Log structures are sealed with the stage's salt. On a stage it is taken from the superblock, if need be from a
//! damaged one; an arena file does not hold it, so without its stage's superblock nothing in it can be verified.
//!
//! Reserved bytes that are not zero are shown: they may be damage, or a later version's.

mod fields;
#[cfg(test)]
mod tests;

use serde::Serialize;
use zerocopy::FromBytes;

use crate::base::checksum::crc64;
use crate::base::units::{align_down, align_up};
use crate::base::{RegionSeq, Result};
use crate::format::Sealed;
use crate::format::arena::{ARENA_HEADER_BYTES, ARENA_MAGIC, ArenaIdentity};
use crate::format::checkpoint::{CHECKPOINT_MAGIC, Checkpoint};
use crate::format::geometry::{
    CHECKPOINT_SLOT_BYTES, CHECKPOINT_SLOTS, Geometry, PATCH_OFFSET, SUPERBLOCK_COPIES, checkpoint_offset,
    superblock_offset,
};
use crate::format::group::{GROUP_HEADER_BYTES, GROUP_MAGIC, Group};
use crate::format::label::{LABEL_BYTES, LABEL_MAGIC, LABEL_SLOTS, Label};
use crate::format::patch::{PATCH_IMAGE_STRIDE, PATCH_MAGIC, decode_patches, patch_images_max};
use crate::format::record::{RECORD_ALIGN, RECORD_HEADER_BYTES, Record};
use crate::format::region::{
    FOOTER_BYTES, FOOTER_MAGIC, Footer, REGION_MAGIC, RegionStart, TableInfo, table_bytes,
};
use crate::format::superblock::{SUPERBLOCK_BYTES, SUPERBLOCK_MAGIC, Superblock};
use crate::format::volume_entry::VolumeEntry;
use crate::io::Disk;
use fields::{Layout, number_at};

/// How much of a device's end is searched for labels.
const LABEL_SEARCH_BYTES: u64 = 1 << 20;
/// Arena files and damaged stages may claim sizes that no region has.
const REGION_BYTES_SANE: u64 = crate::base::limits::REGION_BYTES_MAX as u64;

/// A structure that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Structure {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// What it is.
    pub kind: &'static str,
    /// Whether it is valid by its own rule: checksum, magic, place. `false` also if that could not be verified; then
    /// a field says so.
    pub valid: bool,
    /// Its fields, by name.
    pub fields: Vec<(String, String)>,
}

impl Structure {
    /// The value of the first field of this name.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// Decodes what is on `disk`, in the order of offsets: all structures, of groups and of records the first `limit` each.
///
/// Errors: the device cannot be read at all. Places that cannot be read are among the structures.
pub fn inspect(disk: &dyn Disk, limit: usize) -> Result<Vec<Structure>> {
    inspect_with(disk, None, limit)
}

/// Like [`inspect`], with the superblock of the stage that an arena file belongs to.
pub fn inspect_with(
    disk: &dyn Disk,
    superblock: Option<&Superblock>,
    limit: usize,
) -> Result<Vec<Structure>> {
    if disk.len_bytes() > 0 {
        disk.read(0, &mut vec![0; disk.len_bytes().min(4096) as usize])?;
    }
    let mut inspector = Inspector { disk, limit, groups: 0, records: 0, found: Vec::new() };
    if let Some(map) = inspector.superblocks() {
        inspector.checkpoints(&map);
        inspector.patches(&map);
        inspector.regions(&map);
    }
    inspector.arena(superblock);
    if inspector.found.is_empty() {
        // What looks like a label on a stage or in an arena is a client's data.
        inspector.labels();
    }
    inspector.found.sort_by_key(|structure| structure.offset);
    Ok(inspector.found)
}

/// What is needed to find and verify log structures.
#[derive(Clone, Copy, Debug)]
struct Map {
    salt: Option<u64>,
    /// Offset of region slot 0.
    regions_offset: u64,
    block_bytes: u32,
    region_bytes: u32,
    region_count: u32,
    patch_bytes: u32,
    /// Whether `block_bytes` is known, and with it where tables are.
    block_is_known: bool,
}

impl Map {
    fn of(geometry: &Geometry, salt: u64) -> Map {
        Map {
            salt: Some(salt),
            regions_offset: geometry.regions_offset(),
            block_bytes: geometry.block_bytes,
            region_bytes: geometry.region_bytes,
            region_count: geometry.region_count,
            patch_bytes: geometry.patch_bytes,
            block_is_known: true,
        }
    }
}

struct Inspector<'a> {
    disk: &'a dyn Disk,
    limit: usize,
    groups: usize,
    records: usize,
    found: Vec<Structure>,
}

impl Inspector<'_> {
    fn push(&mut self, offset: u64, layout: &Layout, valid: bool, bytes: &[u8]) -> &mut Structure {
        self.found.push(Structure { offset, kind: layout.kind, valid, fields: layout.show(bytes) });
        self.found.last_mut().expect("just pushed")
    }

    /// Like `push` for structures sealed with a salt.
    fn push_salted(
        &mut self,
        offset: u64,
        layout: &Layout,
        map: &Map,
        valid: bool,
        bytes: &[u8],
    ) -> &mut Structure {
        let structure = self.push(offset, layout, valid, bytes);
        if map.salt.is_none() {
            structure.note("verified", "no: the salt is in the superblock of the stage");
        }
        structure
    }

    /// The bytes at `offset`, `None` if they are outside; a place that cannot be read is noted.
    fn read(&mut self, offset: u64, len: usize) -> Option<Vec<u8>> {
        if offset.checked_add(len as u64)? > self.disk.len_bytes() {
            return None;
        }
        let mut bytes = vec![0; len];
        match self.disk.read(offset, &mut bytes) {
            Ok(()) => Some(bytes),
            Err(error) => {
                let fields =
                    vec![("bytes".to_owned(), len.to_string()), ("error".to_owned(), error.report())];
                self.found.push(Structure { offset, kind: "unreadable", valid: false, fields });
                None
            }
        }
    }

    /// Shows the copies and returns the map of the newest, or that of a damaged one which makes sense.
    fn superblocks(&mut self) -> Option<Map> {
        let mut newest: Option<Superblock> = None;
        let mut damaged: Option<Map> = None;
        let mut volumes: Option<(u64, Vec<u8>)> = None;
        let mut places: Vec<(u32, u64)> = Vec::new();
        for copy in 0..SUPERBLOCK_COPIES {
            let stored = newest.as_ref().map(|s| s.geometry.device_bytes);
            for device_bytes in stored.into_iter().chain([self.disk.len_bytes()]) {
                let place = (copy, superblock_offset(device_bytes, copy));
                if places.contains(&place) {
                    continue;
                }
                places.push(place);
                let Some(bytes) = self.read(place.1, SUPERBLOCK_BYTES) else { continue };
                let decoded = Superblock::decode(&bytes, copy);
                let valid = matches!(decoded, Ok(Some(_)));
                if !valid && !Superblock::resembles(&bytes) {
                    continue;
                }
                let structure = self.push(place.1, &fields::SUPERBLOCK, valid, &bytes);
                if let Err(error) = &decoded {
                    structure.note("refused", &error.report());
                }
                if let Ok(Some(superblock)) = decoded {
                    if newest.as_ref().is_none_or(|n| n.sequence < superblock.sequence) {
                        volumes = Some((place.1, bytes));
                        newest = Some(superblock);
                    }
                } else if damaged.is_none() {
                    damaged = raw_map(&bytes, self.disk.len_bytes());
                    volumes = volumes.or(Some((place.1, bytes)));
                }
            }
        }
        if let Some((offset, bytes)) = volumes {
            self.volumes(offset, &bytes, newest.is_some());
        }
        newest.map(|s| Map::of(&s.geometry, s.salt)).filter(|m| fits(m, self.disk.len_bytes())).or(damaged)
    }

    fn volumes(&mut self, offset: u64, bytes: &[u8], valid: bool) {
        let entry_bytes = fields::VOLUME.bytes;
        for (i, bytes) in bytes[4096..].chunks_exact(entry_bytes).enumerate() {
            let Ok(entry) = VolumeEntry::read_from_bytes(bytes) else { continue };
            if !entry.is_free() {
                let at = offset + 4096 + (i * entry_bytes) as u64;
                let decoded = entry.decode();
                let structure = self.push(at, &fields::VOLUME, valid && decoded.is_ok(), bytes);
                if let Err(error) = decoded {
                    structure.note("refused", &error.report());
                }
            }
        }
    }

    fn checkpoints(&mut self, map: &Map) {
        for slot in 0..CHECKPOINT_SLOTS {
            let offset = checkpoint_offset(slot);
            let Some(bytes) = self.read(offset, CHECKPOINT_SLOT_BYTES as usize) else { continue };
            let found = map.salt.and_then(|salt| Checkpoint::decode(&bytes, salt, slot));
            if found.is_none() && bytes[8..16] != CHECKPOINT_MAGIC {
                continue;
            }
            let structure = self.push_salted(offset, &fields::CHECKPOINT, map, found.is_some(), &bytes);
            for entry in bytes[96..2144].chunks_exact(16).filter(|entry| number_at(entry, 8, 8) > 0) {
                let name = format!("flushed_lsn of volume {}", number_at(entry, 0, 2));
                structure.note(&name, &number_at(entry, 8, 8).to_string());
            }
        }
    }

    fn patches(&mut self, map: &Map) {
        let Some(zone) = self.read(PATCH_OFFSET, map.patch_bytes as usize) else { return };
        let valid = map.salt.is_some_and(|salt| decode_patches(&zone, salt).is_some());
        if !valid && number_at(&zone, 8, 4) != u64::from(PATCH_MAGIC) {
            return;
        }
        self.push_salted(PATCH_OFFSET, &fields::PATCH, map, valid, &zone);
        let count = (number_at(&zone, 16, 4) as usize).min(patch_images_max(map.patch_bytes));
        let (head, entry_bytes) = (fields::PATCH.bytes, fields::PATCH_ENTRY.bytes);
        let images = align_up((head + count * entry_bytes) as u64, u64::from(PATCH_IMAGE_STRIDE)) as usize;
        for i in 0..count {
            let at = head + i * entry_bytes;
            let Some(entry) = zone.get(at..at + entry_bytes) else { return };
            let len = number_at(entry, 16, 4) as usize;
            let from = images + i * PATCH_IMAGE_STRIDE as usize;
            let image =
                zone.get(from..from.saturating_add(len)).filter(|_| len <= PATCH_IMAGE_STRIDE as usize);
            let whole = image.is_some_and(|image| crc64(image) == number_at(entry, 8, 8));
            let structure = self.push(PATCH_OFFSET + at as u64, &fields::PATCH_ENTRY, valid || whole, entry);
            structure.note("image_offset", &(PATCH_OFFSET + from as u64).to_string());
            structure.note("image", if whole { "whole" } else { "damaged" });
        }
    }

    fn regions(&mut self, map: &Map) {
        for slot in 0..map.region_count {
            let offset = map.regions_offset + u64::from(slot) * u64::from(map.region_bytes);
            let Some(image) = self.read(offset, map.region_bytes as usize) else { continue };
            let header = map.salt.and_then(|salt| RegionStart::decode(&image, salt, slot, map.region_count));
            let before = self.found.len();
            self.groups_of(&image, offset, map);
            let has_groups = self.found.len() > before;
            if header.is_some() || has_groups || number_at(&image, 8, 4) == u64::from(REGION_MAGIC) {
                self.push_salted(offset, &fields::REGION, map, header.is_some(), &image);
            }
            self.table(&image, offset, map, header);
        }
    }

    /// Looks for groups at every block: also those behind damage, and those of an earlier use of the slot.
    fn groups_of(&mut self, image: &[u8], offset: u64, map: &Map) {
        let mut at = map.block_bytes as usize;
        while at < image.len() {
            let bytes = &image[at..];
            let group = map.salt.and_then(|salt| Group::decode(bytes, salt));
            if group.is_none() && number_at(bytes, 8, 4) != u64::from(GROUP_MAGIC) {
                at += map.block_bytes as usize;
                continue;
            }
            if self.groups < self.limit {
                self.groups += 1;
                self.push_salted(offset + at as u64, &fields::GROUP, map, group.is_some(), bytes);
            }
            let len = number_at(bytes, 40, 4) as usize;
            let end = at.saturating_add(len).min(image.len());
            let whole = self.records_of(&image[..end], at, offset, map);
            let step = if whole && group.is_some() { len } else { 0 };
            at = at.saturating_add(step.max(map.block_bytes as usize));
        }
    }

    /// Shows the records of the group at `at`. Returns whether all of them are whole.
    fn records_of(&mut self, image: &[u8], at: usize, offset: u64, map: &Map) -> bool {
        let count = number_at(&image[at.min(image.len())..], 12, 4);
        let region = RegionSeq(number_at(&image[at.min(image.len())..], 24, 8));
        let mut place = at.saturating_add(GROUP_HEADER_BYTES as usize);
        for _ in 0..count {
            let Some(bytes) = image.get(place..).filter(|b| b.len() >= RECORD_HEADER_BYTES as usize) else {
                return false;
            };
            let record = map.salt.and_then(|salt| Record::decode(bytes, salt, region));
            let len = number_at(bytes, 48, 4) as usize;
            let from = RECORD_HEADER_BYTES as usize;
            let payload = bytes.get(from..from.saturating_add(len));
            let whole = payload.is_some_and(|payload| crc64(payload) == number_at(bytes, 8, 8));
            if self.records < self.limit {
                self.records += 1;
                let valid = record.is_some() && whole;
                let structure = self.push_salted(offset + place as u64, &fields::RECORD, map, valid, bytes);
                structure.note("payload", if whole { "whole" } else { "damaged" });
            }
            // The length of an invalid header leads nowhere; where there is no salt, the payload speaks for it.
            if !whole || (map.salt.is_some() && record.is_none()) {
                return false;
            }
            place = align_up((place + from + len) as u64, u64::from(RECORD_ALIGN)) as usize;
        }
        true
    }

    fn table(&mut self, image: &[u8], offset: u64, map: &Map, header: Option<RegionStart>) {
        let Some(at) = image.len().checked_sub(FOOTER_BYTES as usize) else { return };
        let bytes = &image[at..];
        let sealed = map.salt.is_some_and(|salt| Footer::open(bytes, salt).is_some());
        if !sealed && number_at(bytes, 16, 4) != u64::from(FOOTER_MAGIC) {
            return;
        }
        let info = map.salt.zip(header).and_then(|(salt, start)| {
            TableInfo::decode(bytes, salt, start, map.region_bytes, map.block_bytes)
        });
        let structure = self.push_salted(offset + at as u64, &fields::FOOTER, map, info.is_some(), bytes);
        if sealed && info.is_none() {
            structure.note("stale", "not of the region whose header is here");
        }
        let count = number_at(bytes, 20, 4) as u32;
        let from = map.region_bytes.checked_sub(table_bytes(count, map.block_bytes));
        let Some(from) = from.filter(|_| map.block_is_known) else { return };
        let entries = &image[from as usize..][..count as usize * 32];
        let fields = vec![
            ("entries".to_owned(), count.to_string()),
            ("checksum".to_owned(), format!("{:#x}", crc64(entries))),
        ];
        let valid = crc64(entries) == number_at(bytes, 8, 8) && info.is_some();
        self.found.push(Structure { offset: offset + u64::from(from), kind: "table", valid, fields });
    }

    fn arena(&mut self, superblock: Option<&Superblock>) {
        let Some(bytes) = self.read(0, ARENA_HEADER_BYTES) else { return };
        let salt = superblock.map(|s| s.salt);
        let identity = salt.and_then(|salt| ArenaIdentity::decode(&bytes, salt));
        if identity.is_none() && bytes[8..16] != ARENA_MAGIC {
            return;
        }
        let region_bytes = number_at(&bytes, 48, 4);
        let map = Map {
            salt,
            regions_offset: ARENA_HEADER_BYTES as u64,
            block_bytes: superblock.map_or(512, |s| s.geometry.block_bytes).max(64),
            region_bytes: region_bytes as u32,
            region_count: number_at(&bytes, 52, 4) as u32,
            patch_bytes: 0,
            block_is_known: superblock.is_some(),
        };
        let ours = superblock
            .is_some_and(|s| identity == Some(ArenaIdentity::new(s.stage_uuid, s.arena_id, &s.geometry)));
        let structure = self.push_salted(0, &fields::ARENA, &map, identity.is_some(), &bytes);
        if superblock.is_some() {
            structure.note("in_use", if ours { "yes" } else { "no: the superblock names another arena" });
        }
        if fits(&map, self.disk.len_bytes()) {
            self.regions(&map);
        }
    }

    fn labels(&mut self) {
        let len = self.disk.len_bytes();
        let first = align_down(len.saturating_sub(LABEL_SEARCH_BYTES), LABEL_BYTES);
        let mut offset = first;
        while offset.saturating_add(LABEL_BYTES) <= len {
            let bytes = self.read(offset, LABEL_BYTES as usize);
            if let Some(bytes) = bytes.filter(|bytes| bytes[8..16] == LABEL_MAGIC) {
                let slot = number_at(&bytes, 20, 4) as u32;
                let label = Label::decode(&bytes, slot);
                let valid = slot < LABEL_SLOTS && matches!(label, Ok(Some(_)));
                let structure = self.push(offset, &fields::LABEL, valid, &bytes);
                if let Err(error) = label {
                    structure.note("refused", &error.report());
                }
            }
            offset += LABEL_BYTES;
        }
    }
}

impl Structure {
    fn note(&mut self, name: &str, value: &str) {
        self.fields.push((name.to_owned(), value.to_owned()));
    }
}

/// Whether the regions lie within a device of `len` bytes and have a size that a region can have.
fn fits(map: &Map, len: u64) -> bool {
    let bytes = u64::from(map.region_bytes) * u64::from(map.region_count);
    let sane = u64::from(map.region_bytes) >= 4096 && u64::from(map.region_bytes) <= REGION_BYTES_SANE;
    sane && map.regions_offset.checked_add(bytes).is_some_and(|end| end <= len)
}

/// The map that a damaged superblock speaks of, if that makes sense.
fn raw_map(bytes: &[u8], device_bytes: u64) -> Option<Map> {
    if bytes.get(8..16) != Some(&SUPERBLOCK_MAGIC[..]) {
        return None;
    }
    let geometry = Geometry {
        device_bytes: number_at(bytes, 64, 8),
        block_bytes: number_at(bytes, 72, 4) as u32,
        region_bytes: number_at(bytes, 76, 4) as u32,
        region_count: number_at(bytes, 80, 4) as u32,
        patch_bytes: number_at(bytes, 84, 4) as u32,
    };
    let map = Map::of(&geometry, number_at(bytes, 56, 8));
    (geometry.validate().is_ok() && fits(&map, device_bytes)).then_some(map)
}
