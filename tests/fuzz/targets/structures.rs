//! Every decoder on its own: what it accepts is what its encoder writes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_driver::base::RegionSeq;
use tidegate_driver::base::checksum::crc64_salted;
use tidegate_driver::format::arena::ArenaIdentity;
use tidegate_driver::format::checkpoint::Checkpoint;
use tidegate_driver::format::group::Group;
use tidegate_driver::format::label::Label;
use tidegate_driver::format::patch::decode_patches;
use tidegate_driver::format::record::Record;
use tidegate_driver::format::region::{RegionStart, TableEntry, TableInfo};
use tidegate_driver::format::superblock::Superblock;
use zerocopy::{FromBytes, IntoBytes};

const SALT: u64 = 0x5eed;

/// `data` as a structure of `len` bytes with a valid checksum.
fn sealed(data: &[u8], len: usize, salt: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let n = data.len().min(len - 8);
    bytes[8..8 + n].copy_from_slice(&data[..n]);
    let checksum = crc64_salted(salt, &bytes[8..]);
    bytes[..8].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let Some((&which, data)) = data.split_first() else { return };
    match which % 9 {
        0 => {
            let bytes = sealed(data, 128 << 10, 0);
            if let Ok(Some(found)) = Superblock::decode(&bytes, 1) {
                assert_eq!(Superblock::decode(found.encode(1).as_bytes(), 1).unwrap(), Some(found));
            }
        }
        1 => {
            let bytes = sealed(data, 4096, SALT);
            if let Some(found) = Checkpoint::decode(&bytes, SALT, 3) {
                assert_eq!(Checkpoint::decode(found.encode(SALT).as_bytes(), SALT, 3), Some(found));
            }
        }
        2 => {
            let bytes = sealed(data, 64, SALT);
            if let Some(found) = Group::decode(&bytes, SALT) {
                assert_eq!(Group::decode(found.encode(SALT).as_bytes(), SALT), Some(found));
            }
        }
        3 => {
            let bytes = sealed(data, 64, SALT);
            if let Some(found) = Record::decode(&bytes, SALT, RegionSeq(7)) {
                let again = found.encode(SALT, RegionSeq(7));
                assert_eq!(Record::decode(again.as_bytes(), SALT, RegionSeq(7)), Some(found));
            }
        }
        4 => {
            let bytes = sealed(data, 64, SALT);
            if let Some(found) = RegionStart::decode(&bytes, SALT, 2, 6) {
                assert_eq!(RegionStart::decode(found.encode(SALT, 2).as_bytes(), SALT, 2, 6), Some(found));
                let footer = sealed(data, 64, SALT);
                if let Some(info) = TableInfo::decode(&footer, SALT, found, 32 << 10, 512) {
                    assert!(info.table_offset(32 << 10, 512) < 32 << 10);
                }
            }
        }
        5 => {
            if let Ok((entry, _)) = TableEntry::read_from_prefix(data) {
                let _ = entry.parts();
            }
        }
        6 => {
            for slot in 0..2 {
                let bytes = sealed(data, 4096, 0);
                if let Ok(Some(found)) = Label::decode(&bytes, slot) {
                    assert_eq!(Label::decode(found.encode().as_bytes(), found.slot()).unwrap(), Some(found));
                }
            }
        }
        7 => {
            let mut zone = vec![0; 64 << 10];
            let n = data.len().min(zone.len() - 8);
            zone[8..8 + n].copy_from_slice(&data[..n]);
            let checksum = crc64_salted(SALT, &zone[8..4096]);
            zone[..8].copy_from_slice(&checksum.to_le_bytes());
            let _ = decode_patches(&zone, SALT);
        }
        _ => {
            let bytes = sealed(data, 4096, SALT);
            let _ = ArenaIdentity::decode(&bytes, SALT);
        }
    }
});
