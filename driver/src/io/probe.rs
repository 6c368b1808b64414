//! What a device or file holds already: nothing is formatted over something that this module recognises unless the
//! user insists.
//!
//! Recognition is by signature only, as other tools do it, and knows nothing of how whole the content is: a damaged file
//! system is still somebody's.

use serde::Serialize;

use super::disk::Disk;
use crate::base::{Error, ErrorKind, Result};
use crate::format::geometry::{SUPERBLOCK_COPIES, superblock_offset};
use crate::format::label::{LABEL_BYTES, LABEL_MAGIC, LABEL_SLOTS, label_offset, volume_bytes_for};
use crate::format::superblock::Superblock;

/// Bytes looked at from the start: the second ZFS label, the farthest signature there, ends at 512 KiB.
const HEAD_BYTES: u64 = 512 << 10;
/// Bytes looked at before the end: ZFS labels, our superblock copies, our labels.
const TAIL_BYTES: u64 = 640 << 10;

/// Kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// A stage of ours.
    Stage,
    /// A backing of ours.
    Backing,
    /// A file system.
    FileSystem,
    /// A partition table.
    PartitionTable,
    /// Part of a RAID, a volume group or another block layer.
    Member,
    /// Encrypted data.
    Encrypted,
    /// Swap space or a suspended system.
    Swap,
    /// The file of a virtual machine's disk in a format of its own: not raw data.
    Image,
    /// Data that nothing here recognises.
    Unknown,
}

/// Something recognised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing.
    pub content: Content,
    /// Its usual name.
    pub name: &'static str,
    /// Where the signature is.
    pub offset: u64,
}

/// Parts of a device: what [`identify`] looks at.
#[derive(Debug, Default)]
pub struct Windows {
    device_bytes: u64,
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Windows {
    /// Nothing yet of a device of `device_bytes`.
    #[must_use]
    pub fn new(device_bytes: u64) -> Windows {
        Windows { device_bytes, pieces: Vec::new() }
    }

    /// Adds `bytes` read at `offset`.
    pub fn add(&mut self, offset: u64, bytes: Vec<u8>) {
        self.pieces.push((offset, bytes));
    }

    /// The `len` bytes at `offset`, if one piece holds them all.
    fn at(&self, offset: u64, len: usize) -> Option<&[u8]> {
        self.pieces.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(offset.checked_sub(*start)?).ok()?;
            bytes.get(from..from.checked_add(len)?)
        })
    }

    fn has(&self, offset: u64, magic: &[u8]) -> bool {
        self.at(offset, magic.len()) == Some(magic)
    }

    /// Offset `back` bytes before the end.
    fn before_end(&self, back: u64) -> Option<u64> {
        self.device_bytes.checked_sub(back)
    }
}

/// A signature at a fixed offset.
struct Signature(Content, &'static str, u64, &'static [u8]);

use Content::{Encrypted, FileSystem, Image, Member, PartitionTable, Swap};

/// The signatures that are long enough to stand for themselves.
const SIGNATURES: &[Signature] = &[
    Signature(FileSystem, "XFS", 0, b"XFSB"),
    Signature(FileSystem, "btrfs", 0x1_0040, b"_BHRfS_M"),
    Signature(FileSystem, "F2FS", 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    Signature(FileSystem, "EROFS", 0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
    Signature(FileSystem, "NTFS", 3, b"NTFS    "),
    Signature(FileSystem, "exFAT", 3, b"EXFAT   "),
    Signature(FileSystem, "FAT", 0x36, b"FAT12   "),
    Signature(FileSystem, "FAT", 0x36, b"FAT16   "),
    Signature(FileSystem, "FAT", 0x36, b"FAT     "),
    Signature(FileSystem, "FAT", 0x52, b"FAT32   "),
    Signature(FileSystem, "squashfs", 0, b"hsqs"),
    Signature(FileSystem, "ISO 9660", 0x8001, b"CD001"),
    Signature(FileSystem, "UDF", 0x8001, b"BEA01"),
    Signature(FileSystem, "ReiserFS", 0x1_0034, b"ReIsEr"),
    Signature(FileSystem, "JFS", 0x8000, b"JFS1"),
    Signature(FileSystem, "OCFS2", 0x1000, b"OCFSV2"),
    Signature(FileSystem, "bcachefs", 4096 + 24, BCACHEFS),
    Signature(Member, "bcache", 4096 + 24, BCACHE),
    Signature(Member, "Ceph BlueStore", 0, b"bluestore block device"),
    Signature(Member, "VDO", 0, b"dmvdo001"),
    Signature(Encrypted, "LUKS", 0, b"LUKS\xba\xbe"),
    Signature(Encrypted, "LUKS2 (second header)", 0x4000, b"SKUL\xba\xbe"),
    Signature(Member, "md RAID 1.1", 0, MD),
    Signature(Member, "md RAID 1.2", 4096, MD),
    Signature(PartitionTable, "GPT", 512, b"EFI PART"),
    Signature(PartitionTable, "GPT", 4096, b"EFI PART"),
    Signature(Image, "qcow2", 0, b"QFI\xfb"),
    Signature(Image, "VHDX", 0, b"vhdxfile"),
    Signature(Image, "VMDK", 0, b"KDMV"),
    Signature(Image, "VMDK", 0, b"# Disk DescriptorFile"),
];

const MD: &[u8] = &[0xfc, 0x4e, 0x2b, 0xa9];
const BCACHE: &[u8] =
    &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81];
const BCACHEFS: &[u8] =
    &[0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9, 0xd9, 0x6a, 0x60, 0xcf, 0x80, 0x3d, 0xf7, 0xef];
const ZFS_UBERBLOCK: u64 = 0x00ba_b10c;

/// What the windows show; one finding per name.
#[must_use]
pub fn identify(windows: &Windows) -> Vec<Finding> {
    let mut found = Vec::new();
    ours(windows, &mut found);
    for Signature(content, name, offset, magic) in SIGNATURES {
        if windows.has(*offset, magic) {
            found.push(Finding { content: *content, name, offset: *offset });
        }
    }
    at_start(windows, &mut found);
    at_end(windows, &mut found);
    zfs(windows, &mut found);
    let mut names = std::collections::HashSet::new();
    found.retain(|f| names.insert(f.name));
    found
}

fn ours(windows: &Windows, found: &mut Vec<Finding>) {
    let copies = (0..SUPERBLOCK_COPIES).map(|copy| superblock_offset(windows.device_bytes, copy));
    let stage = copies.into_iter().find(|&o| windows.at(o, 16).is_some_and(Superblock::resembles));
    if let Some(offset) = stage {
        found.push(Finding { content: Content::Stage, name: "Tidegate stage", offset });
    }
    // The label is where the volume ends: right for volumes that fill their backing. Others are found by `label_at`.
    found.extend(label_in(windows, volume_bytes_for(windows.device_bytes)));
}

fn label_in(windows: &Windows, volume_bytes: u64) -> Option<Finding> {
    (0..LABEL_SLOTS)
        .map(|slot| label_offset(volume_bytes, slot))
        .find(|&offset| windows.has(offset + 8, &LABEL_MAGIC))
        .map(|offset| Finding { content: Content::Backing, name: "Tidegate backing label", offset })
}

/// Signatures at the start that need a second look.
fn at_start(windows: &Windows, found: &mut Vec<Finding>) {
    let le32 = |offset| windows.at(offset, 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if windows.has(0x438, &[0x53, 0xef]) {
        // Revision 0 or 1 and a sane block size: two bytes alone turn up by chance.
        let sane = le32(0x44c).is_some_and(|rev| rev <= 1) && le32(0x418).is_some_and(|log| log <= 6);
        if sane {
            let journal = le32(0x45c).is_some_and(|compat| compat & 4 != 0);
            let extents = le32(0x460).is_some_and(|incompat| incompat & !0x3f != 0 || incompat & 0x40 != 0);
            let name = if extents {
                "ext4"
            } else if journal {
                "ext3"
            } else {
                "ext2"
            };
            found.push(Finding { content: FileSystem, name, offset: 0x438 });
        }
    }
    if windows.has(0x406, &[0x34, 0x34]) && le32(0x400).is_some_and(|rev| rev == 2) {
        found.push(Finding { content: FileSystem, name: "NILFS2", offset: 0x406 });
    }
    for page in [4096, 8192, 16384, 65536] {
        let offset = page - 10;
        let is = |magic: &[u8]| windows.has(offset, magic);
        if is(b"SWAPSPACE2") || is(b"SWAP-SPACE") {
            found.push(Finding { content: Swap, name: "swap", offset });
        } else if is(b"S1SUSPEND\0") || is(b"S2SUSPEND\0") || is(b"ULSUSPEND\0") || is(b"LINHIB0001") {
            found.push(Finding { content: Swap, name: "suspended system", offset });
        }
    }
    for sector in 0..4 {
        if windows.has(sector * 512, b"LABELONE") && windows.has(sector * 512 + 24, b"LVM2 001") {
            found.push(Finding { content: Member, name: "LVM2 physical volume", offset: sector * 512 });
        }
    }
    if windows.has(510, &[0x55, 0xaa]) && is_partition_table(windows) {
        found.push(Finding { content: PartitionTable, name: "MBR", offset: 510 });
    }
}

/// Boot sectors of file systems end like partition tables; a partition table has an entry that makes sense.
fn is_partition_table(windows: &Windows) -> bool {
    let Some(table) = windows.at(446, 64) else { return false };
    let mut used = 0;
    for entry in table.chunks_exact(16) {
        let sectors = u32::from_le_bytes([entry[12], entry[13], entry[14], entry[15]]);
        let start = u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]);
        if !matches!(entry[0], 0 | 0x80) {
            return false;
        }
        if entry[4] != 0 && sectors != 0 && start != 0 {
            used += 1;
        }
    }
    used > 0
}

/// Signatures whose place depends on where the device ends.
fn at_end(windows: &Windows, found: &mut Vec<Finding>) {
    let sectors = windows.device_bytes / 512;
    let mut look = |content, name, offset: Option<u64>, magic: &[u8]| {
        if let Some(offset) = offset.filter(|&o| windows.has(o, magic)) {
            found.push(Finding { content, name, offset });
        }
    };
    look(Member, "md RAID 1.0", sectors.checked_sub(16).map(|s| (s & !7) * 512), MD);
    look(Member, "md RAID 0.90", (windows.device_bytes & !0xffff).checked_sub(0x1_0000), MD);
    look(PartitionTable, "GPT (second header)", windows.before_end(512), b"EFI PART");
    look(PartitionTable, "GPT (second header)", windows.before_end(4096), b"EFI PART");
    let drbd = (windows.device_bytes & !0xfff).checked_sub(4096);
    for magic in [0x8374_026b_u32, 0x8374_026c, 0x8374_026d] {
        look(Member, "DRBD metadata", drbd.map(|o| o + 60), &magic.to_be_bytes());
    }
    look(Image, "VHD", windows.before_end(512), b"conectix");
}

/// ZFS: uberblocks in the second half of each of the four labels, in either byte order.
fn zfs(windows: &Windows, found: &mut Vec<Finding>) {
    const LABEL: u64 = 256 << 10;
    let end = windows.device_bytes / LABEL * LABEL;
    let labels = [Some(0), Some(LABEL), end.checked_sub(2 * LABEL), end.checked_sub(LABEL)];
    for label in labels.into_iter().flatten() {
        let slots = (0..128).map(|slot| label + (128 << 10) + slot * 1024);
        let hit = slots.into_iter().find(|&o| {
            windows.has(o, &ZFS_UBERBLOCK.to_le_bytes()) || windows.has(o, &ZFS_UBERBLOCK.to_be_bytes())
        });
        if let Some(offset) = hit {
            found.push(Finding { content: Member, name: "ZFS pool member", offset });
            return;
        }
    }
}

/// What `disk` holds. Empty if the places where something could be recognised are all zero; a [`Content::Unknown`]
/// finding if they hold data that nothing here recognises.
pub fn probe(disk: &dyn Disk) -> Result<Vec<Finding>> {
    let len = disk.len_bytes();
    let mut windows = Windows::new(len);
    let head = read(disk, 0, HEAD_BYTES.min(len))?;
    let tail_at = len.saturating_sub(TAIL_BYTES);
    let tail = read(disk, tail_at, len - tail_at)?;
    let first_data = |at: u64, bytes: &[u8]| bytes.iter().position(|&b| b != 0).map(|p| at + p as u64);
    let data = first_data(0, &head).or_else(|| first_data(tail_at, &tail));
    windows.add(0, head);
    windows.add(tail_at, tail);
    let mut found = identify(&windows);
    if let (true, Some(offset)) = (found.is_empty(), data) {
        found.push(Finding { content: Content::Unknown, name: "unknown data", offset });
    }
    Ok(found)
}

/// The label of a volume of `volume_bytes` on `disk`, which [`probe`] only finds if the volume fills the backing.
pub fn label_at(disk: &dyn Disk, volume_bytes: u64) -> Result<Option<Finding>> {
    let at = label_offset(volume_bytes, 0);
    let len = LABEL_BYTES * u64::from(LABEL_SLOTS);
    if at.checked_add(len).is_none_or(|end| end > disk.len_bytes()) {
        return Ok(None);
    }
    let mut windows = Windows::new(disk.len_bytes());
    windows.add(at, read(disk, at, len)?);
    Ok(label_in(&windows, volume_bytes))
}

fn read(disk: &dyn Disk, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).expect("windows are small")];
    disk.read(offset, &mut bytes)?;
    Ok(bytes)
}

/// Refuses `disk` if it holds anything: `what` names its part ("stage", "backing"), `consequence` says what `--force`
/// would do to the content.
pub fn refuse_content(disk: &dyn Disk, findings: &[Finding], what: &str, consequence: &str) -> Result<()> {
    if findings.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = findings.iter().map(|f| format!("{} (at byte {})", f.name, f.offset)).collect();
    Err(Error::new(
        ErrorKind::Foreign,
        format!(
            "{what} {} holds data: {}; check that it is the right one, then use another or --force, which {consequence}",
            disk.name(),
            list.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests;
