use std::path::Path;
use std::process::Command;

use super::*;
use crate::io::file::{FileDisk, Fill, create_file};

const DEVICE: u64 = 64 << 20;

/// Names found on an otherwise empty device with `bytes` at `offset`.
fn names(parts: &[(u64, &[u8])]) -> Vec<&'static str> {
    names_on(DEVICE, parts)
}

fn names_on(device: u64, parts: &[(u64, &[u8])]) -> Vec<&'static str> {
    let mut image = vec![0; device as usize];
    for (offset, bytes) in parts {
        image[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    let mut windows = Windows::new(device);
    windows.add(0, image[..(HEAD_BYTES.min(device)) as usize].to_vec());
    let tail = device.saturating_sub(TAIL_BYTES);
    windows.add(tail, image[tail as usize..].to_vec());
    identify(&windows).iter().map(|f| f.name).collect()
}

#[test]
fn every_signature_of_the_table_is_found() {
    for Signature(_, name, offset, magic) in SIGNATURES {
        assert_eq!(names(&[(*offset, magic)]), [*name], "{name} at {offset}");
        let mut flipped = magic.to_vec();
        flipped[1] ^= 0x40;
        assert!(names(&[(*offset, &flipped)]).is_empty(), "{name} with a flipped bit");
    }
}

#[test]
fn an_empty_device_holds_nothing() {
    assert!(names(&[]).is_empty());
    for tiny in [0, 1, 511, 512, 4096, 5000, 70_000] {
        assert!(names_on(tiny, &[]).is_empty());
    }
}

#[test]
fn ext_versions_are_told_apart() {
    let ext = |compat: u8, incompat: u16| {
        names(&[
            (0x438, &[0x53, 0xef]),
            (0x44c, &[1, 0, 0, 0]),
            (0x45c, &[compat, 0, 0, 0]),
            (0x460, &incompat.to_le_bytes()),
        ])
    };
    assert_eq!(ext(0, 2), ["ext2"]);
    assert_eq!(ext(4, 2), ["ext3"]);
    assert_eq!(ext(4, 0x42), ["ext4"]);
    assert!(names(&[(0x438, &[0x53, 0xef]), (0x44c, &[9, 9, 9, 9])]).is_empty(), "two bytes by chance");
}

#[test]
fn signatures_at_the_end() {
    for odd in [0, 512, 4096, 3 * 4096 + 512] {
        let device = DEVICE + odd;
        let at = |name: &str, offset: u64, magic: &[u8]| {
            assert_eq!(names_on(device, &[(offset, magic)]), [name], "device of {device}");
        };
        at("md RAID 1.0", ((device / 512 - 16) & !7) * 512, MD);
        at("md RAID 0.90", (device & !0xffff) - 0x1_0000, MD);
        at("GPT (second header)", device - 512, b"EFI PART");
        at("DRBD metadata", (device & !0xfff) - 4096 + 60, &[0x83, 0x74, 0x02, 0x6d]);
        at("VHD", device - 512, b"conectix");
        at(
            "ZFS pool member",
            (device / 262_144 - 1) * 262_144 + 131_072 + 5120,
            &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0],
        );
        let label = label_offset(volume_bytes_for(device), 1);
        at("Tidegate backing label", label + 8, &LABEL_MAGIC);
        for copy in 0..SUPERBLOCK_COPIES {
            at("Tidegate stage", superblock_offset(device, copy) + 8, b"TIDEGATE");
        }
    }
}

#[test]
fn swap_of_every_page_size_and_lvm_in_every_sector() {
    for page in [4096, 8192, 16384, 65536] {
        assert_eq!(names(&[(page - 10, b"SWAPSPACE2")]), ["swap"]);
    }
    for sector in 0..4 {
        let label = [(sector * 512, &b"LABELONE"[..]), (sector * 512 + 24, b"LVM2 001")];
        assert_eq!(names(&label), ["LVM2 physical volume"]);
    }
}

#[test]
fn a_partition_table_is_not_a_boot_sector() {
    let mut entry = [0u8; 16];
    entry[4] = 0x83;
    entry[8] = 1;
    entry[12] = 9;
    assert_eq!(names(&[(510, &[0x55, 0xaa]), (446, &entry)]), ["MBR"]);
    assert!(names(&[(510, &[0x55, 0xaa])]).is_empty());
    assert!(names(&[(510, &[0x55, 0xaa]), (446, b"Non-System disk")]).is_empty());
}

#[test]
fn probe_reports_unknown_data_and_a_label_inside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create_file(&path, 8 << 20, Fill::Sparse, &mut |_| true).unwrap();
    let disk = FileDisk::open_exclusive(&path).unwrap();
    assert!(probe(&disk).unwrap().is_empty());
    disk.write(1000, b"something").unwrap();
    let found = probe(&disk).unwrap();
    assert_eq!((found[0].content, found[0].offset), (Content::Unknown, 1000));
    let error = refuse_content(&disk, &found, "stage", "overwrites it").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Foreign);
    assert!(error.report().contains("unknown data"), "{}", error.report());

    assert!(label_at(&disk, 1 << 20).unwrap().is_none());
    disk.write((1 << 20) + 8, &LABEL_MAGIC).unwrap();
    assert!(label_at(&disk, 1 << 20).unwrap().is_some());
    assert!(label_at(&disk, 8 << 20).unwrap().is_none(), "would end beyond the device");
    assert!(label_at(&disk, u64::MAX - 8192).unwrap().is_none());
}

/// The real tools agree with the tables.
#[test]
fn real_file_systems() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str], &str); 8] = [
        ("mkfs.ext4", &["-q", "-F"], "ext4"),
        ("mkfs.ext3", &["-q", "-F"], "ext3"),
        ("mkfs.ext2", &["-q", "-F"], "ext2"),
        ("mkfs.xfs", &["-q", "-f"], "XFS"),
        ("mkfs.btrfs", &["-q", "-f"], "btrfs"),
        ("mkfs.vfat", &[], "FAT"),
        ("mkswap", &[], "swap"),
        ("mkfs.f2fs", &["-q"], "F2FS"),
    ];
    for (tool, args, name) in cases {
        let path = dir.path().join(tool);
        create_file(&path, 320 << 20, Fill::Sparse, &mut |_| true).unwrap();
        match make(tool, args, &path) {
            Some(()) => {
                let found = probe(&FileDisk::open_to_look(&path).unwrap()).unwrap();
                assert_eq!(found.iter().map(|f| f.name).collect::<Vec<_>>(), [name], "{tool}");
            }
            None => eprintln!("SKIPPED: {tool} is not here or does not work"),
        }
        std::fs::remove_file(&path).unwrap();
    }
}

fn make(tool: &str, args: &[&str], path: &Path) -> Option<()> {
    let full = ["/usr/sbin", "/sbin", "/usr/bin"]
        .map(|d| Path::new(d).join(tool))
        .into_iter()
        .find(|p| p.exists())?;
    let output = Command::new(full).args(args).arg(path).output().ok()?;
    output.status.success().then_some(())
}
