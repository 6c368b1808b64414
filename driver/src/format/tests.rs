//! Every structure: round trip, golden bytes, and refusal of every flipped bit.

use proptest::prelude::*;
use uuid::Uuid;
use zerocopy::IntoBytes;

use super::append_log::{Entry, EntryKind, LogHeader};
use super::arena::ArenaIdentity;
use super::byte_ring::{CompletionImage, HelloImage, SubmissionImage, WelcomeImage};
use super::checkpoint::Checkpoint;
use super::geometry::Geometry;
use super::group::{Group, RecordsDigest};
use super::label::Label;
use super::patch::{PatchImage, decode_patches, encode_patches, patch_images_max};
use super::record::{Record, RecordKind, record_bytes};
use super::region::{Footer, RegionStart, TableEntry, TableInfo};
use super::superblock::{StageState, Superblock};
use super::volume_entry::{AckLevel, OnLogError, VolumeInfo};
use super::{Sealed, text_into};
use crate::base::checksum::crc64;
use crate::base::limits::NUMBER_MAX;
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};

const SALT: u64 = 0x0123_4567_89ab_cdef;
const REGION_COUNT: u32 = 61;

fn geometry() -> Geometry {
    Geometry {
        device_bytes: 256 << 20,
        block_bytes: 4096,
        region_bytes: 4 << 20,
        region_count: REGION_COUNT,
        patch_bytes: 2 << 20,
    }
}

fn start() -> RegionStart {
    RegionStart { seq: RegionSeq(9), first_lsn: Lsn(1000), first_group_seq: 77 }
}

fn record() -> Record {
    Record {
        lsn: Lsn(1001),
        volume: VolumeId(3),
        kind: RecordKind::Write,
        range: ByteRange { start: 8192, end: 8192 + 4096 },
        payload_bytes: 4096,
        payload_checksum: 0xfeed,
        timestamp_ns: 1_700_000_000_000_000_000,
        incarnation: 4,
    }
}

fn group() -> Group {
    Group {
        record_count: 5,
        group_seq: 78,
        region: RegionSeq(9),
        first_lsn: Lsn(1001),
        group_bytes: 24576,
        records_digest: RecordsDigest::default().with(record().encode(SALT, RegionSeq(7)).as_bytes()),
        incarnation: 4,
        undurable_before: 1,
        checkpoint_lsn: Lsn(900),
    }
}

fn table() -> TableInfo {
    TableInfo { start: start(), entry_count: 800, group_count: 12, data_end: 3 << 20, table_checksum: 42 }
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        sequence: 35,
        lsn: Lsn(900),
        head: start(),
        time_ns: 5,
        flushed: [(VolumeId(3), Lsn(880))].into(),
    }
}

fn volume() -> VolumeInfo {
    VolumeInfo {
        uuid: Uuid::from_u128(0xabc),
        name: "db".into(),
        id: VolumeId(3),
        size_bytes: 1 << 46,
        block_bytes: 512,
        ack: AckLevel::Memory,
        on_log_error: OnLogError::Fail,
        created_ns: 7,
        backing: "/dev/vdb".into(),
    }
}

fn superblock() -> Superblock {
    Superblock {
        sequence: 12,
        stage_uuid: Uuid::from_u128(0x1234),
        salt: SALT,
        geometry: geometry(),
        incarnation: 4,
        incarnation_group_seq: 70,
        incarnation_lsn: Lsn(810),
        arena_id: 99,
        boot_id: Uuid::from_u128(0x77),
        state: StageState::InUse,
        next_volume_id: 4,
        created_ns: 6,
        closed_lsn: Lsn(800),
        volumes: vec![volume()],
    }
}

fn label() -> Label {
    Label {
        sequence: 5,
        stage_uuid: Uuid::from_u128(0x1234),
        volume_uuid: Uuid::from_u128(0xabc),
        volume_bytes: 1 << 46,
        flushed_lsn: Lsn(950),
        name: "db".into(),
    }
}

fn arena() -> ArenaIdentity {
    ArenaIdentity::new(Uuid::from_u128(0x1234), 99, &geometry())
}

fn log_header() -> LogHeader {
    LogHeader { capacity: 1 << 20, generation: SALT, opening: 0xface, head: 4 << 20, hint: (4 << 20) + 512 }
}

fn log_entry() -> Entry {
    Entry { position: 4 << 20, opening: 0xface, kind: EntryKind::Data(5) }
}

fn log_entry_bytes() -> Vec<u8> {
    let mut bytes = log_entry().encode(SALT, &[b"he", b"llo"]).as_bytes().to_vec();
    bytes.extend_from_slice(b"hello");
    bytes
}

fn opens_log_entry(bytes: &[u8]) -> bool {
    Entry::decode(bytes, 1 << 20, 4 << 20)
        .is_some_and(|(entry, image)| entry == log_entry() && image.matches(SALT, &bytes[32..]))
}

fn patches() -> Vec<PatchImage> {
    (0..3).map(|i| PatchImage { volume: VolumeId(i), offset: 4096, bytes: vec![i as u8; 512] }).collect()
}

/// Bytes of one valid instance of every structure, by name, with its decoder as a predicate.
type Decoder = Box<dyn Fn(&[u8]) -> bool>;
fn instances() -> Vec<(&'static str, Vec<u8>, Decoder)> {
    let slot = start().seq.slot(REGION_COUNT);
    vec![
        (
            "record",
            record().encode(SALT, RegionSeq(9)).as_bytes().to_vec(),
            Box::new(|b| Record::decode(b, SALT, RegionSeq(9)) == Some(record())),
        ),
        (
            "group",
            group().encode(SALT).as_bytes().to_vec(),
            Box::new(|b| Group::decode(b, SALT) == Some(group())),
        ),
        (
            "region",
            start().encode(SALT, slot).as_bytes().to_vec(),
            Box::new(move |b| RegionStart::decode(b, SALT, slot, REGION_COUNT) == Some(start())),
        ),
        (
            "footer",
            table().encode(SALT).as_bytes().to_vec(),
            Box::new(|b| TableInfo::decode(b, SALT, start(), 4 << 20, 4096) == Some(table())),
        ),
        (
            "checkpoint",
            checkpoint().encode(SALT).as_bytes().to_vec(),
            Box::new(|b| Checkpoint::decode(b, SALT, 3) == Some(checkpoint())),
        ),
        (
            "superblock",
            superblock().encode(2).as_bytes().to_vec(),
            Box::new(|b| Superblock::decode(b, 2).ok().flatten() == Some(superblock())),
        ),
        (
            "label",
            label().encode().as_bytes().to_vec(),
            Box::new(|b| Label::decode(b, 1).ok().flatten() == Some(label())),
        ),
        (
            "arena",
            arena().encode(SALT).as_bytes().to_vec(),
            Box::new(|b| ArenaIdentity::decode(b, SALT) == Some(arena())),
        ),
        (
            "patch",
            encode_patches(&patches(), Lsn(1200), SALT).to_vec(),
            Box::new(|b| decode_patches(b, SALT) == Some((Lsn(1200), patches()))),
        ),
        (
            "log_header",
            log_header().encode().as_bytes().to_vec(),
            Box::new(|b| LogHeader::decode(b).ok().flatten() == Some(log_header())),
        ),
        ("log_entry", log_entry_bytes(), Box::new(opens_log_entry)),
    ]
}

#[test]
fn structures_survive_a_round_trip() {
    for (name, bytes, decodes) in instances() {
        assert!(decodes(&bytes), "{name} does not decode to what was encoded");
    }
}

/// The checksum of the bytes of fixed instances: a change here is a change of the format and needs a new version.
#[test]
fn structures_match_their_golden_files() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/format/golden");
    let sealed = instances().into_iter().map(|(name, bytes, _)| (name, bytes));
    // The entry has no checksum of its own: the footer's covers it. What is on a wire or in shared memory has none at all.
    let entry = ("table_entry", TableEntry::new(&record(), 4160).as_bytes().to_vec());
    for (name, bytes) in sealed.chain([entry]).chain(byte_door()) {
        let path = dir.join(format!("{name}.hex"));
        let text = hex(&bytes);
        if std::env::var_os("TIDEGATE_UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(golden == text, "{name} differs from {}", path.display());
    }
}

/// Labels are not salted, so anybody who can write to a backing can make one. A name that is not UTF-8 would be longer once it
/// is read, and too long to be written again.
#[test]
fn a_label_with_a_name_that_no_volume_has_is_none() {
    let mut bytes = label().encode().as_bytes().to_vec();
    let slot = label().slot();
    assert_eq!(Label::decode(&bytes, slot).unwrap(), Some(label()));
    for name in [[0xf4; 64], [0; 64], *b"a/b\x00456789012345678901234567890123456789012345678901234567890123"]
    {
        bytes[80..144].copy_from_slice(&name);
        bytes[..8].copy_from_slice(&0u64.to_le_bytes());
        let checksum = crc64(&bytes);
        bytes[..8].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(Label::decode(&bytes, slot).unwrap(), None, "{name:?}");
    }
}

/// The structures of the byte door.
fn byte_door() -> Vec<(&'static str, Vec<u8>)> {
    let welcome = WelcomeImage {
        session: 7.into(),
        depth: 128.into(),
        arena_bytes: (8 << 20).into(),
        write_bytes_max: (1 << 20).into(),
        memory_bytes: 0x0080_6000.into(),
        volume_bytes: (1 << 46).into(),
        ack: AckLevel::Memory.code(),
        stage_uuid: *Uuid::from_u128(0x1234).as_bytes(),
        volume_uuid: *Uuid::from_u128(0xabc).as_bytes(),
        name: text_into("db").unwrap(),
        ..WelcomeImage::refusal(-1, "why")
    };
    let submission = SubmissionImage {
        operation: 2,
        flags: 1,
        arena_offset: 4096.into(),
        offset: (1 << 40).into(),
        len: 513.into(),
        cookie: 0xfeed.into(),
        after: [1, 2, 3, 4].map(Into::into),
        ..SubmissionImage::default()
    };
    let completion = CompletionImage {
        cookie: 0xfeed.into(),
        ticket: (7 << 48 | 9).into(),
        lsn: 1001.into(),
        result: (-5).into(),
        ..CompletionImage::default()
    };
    vec![
        ("byte_hello", HelloImage::new(128, 8 << 20).as_bytes().to_vec()),
        ("byte_welcome", welcome.as_bytes().to_vec()),
        ("byte_submission", submission.as_bytes().to_vec()),
        ("byte_completion", completion.as_bytes().to_vec()),
    ]
}

/// Hex lines of 32 bytes with their offset; lines of zeroes are left out.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = format!("length {}\n", bytes.len());
    for (i, line) in bytes.chunks(32).enumerate() {
        if line.iter().any(|&b| b != 0) {
            write!(text, "{:08x}", i * 32).unwrap();
            line.iter().for_each(|b| write!(text, " {b:02x}").unwrap());
            text.push('\n');
        }
    }
    text
}

#[test]
fn every_flipped_bit_is_refused() {
    for (name, bytes, decodes) in instances() {
        // Image padding of the patch zone belongs to nothing; every other byte is covered.
        let covered: Vec<usize> = (0..bytes.len())
            .filter(|&at| name != "patch" || at < 64 + 3 * 32 || (at >= 4096 && at % 4096 < 512))
            .collect();
        let step = if covered.len() > 8192 { 37 } else { 1 };
        for &at in covered.iter().step_by(step) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(!decodes(&damaged), "{name}: flipped bit in byte {at} was not noticed");
        }
    }
}

#[test]
fn structures_bind_to_stage_slot_and_region() {
    let slot = start().seq.slot(REGION_COUNT);
    assert!(Group::decode(group().encode(SALT).as_bytes(), SALT + 1).is_none());
    assert!(Record::decode(record().encode(SALT, RegionSeq(9)).as_bytes(), SALT, RegionSeq(8)).is_none());
    assert!(
        RegionStart::decode(start().encode(SALT, slot).as_bytes(), SALT, slot + 1, REGION_COUNT).is_none()
    );
    assert!(Checkpoint::decode(checkpoint().encode(SALT).as_bytes(), SALT, 4).is_none());
    assert!(Superblock::decode(superblock().encode(2).as_bytes(), 1).unwrap().is_none());
    assert!(Label::decode(label().encode().as_bytes(), 0).unwrap().is_none());
    let moved = RegionStart { seq: RegionSeq(10), ..start() };
    assert!(TableInfo::decode(table().encode(SALT).as_bytes(), SALT, moved, 4 << 20, 4096).is_none());
}

#[test]
fn newer_versions_are_refused_by_name() {
    let mut image = superblock().encode(0);
    image.as_mut_bytes()[16] = 2;
    image.seal(0);
    let error = Superblock::decode(image.as_bytes(), 0).unwrap_err();
    assert_eq!(error.kind(), crate::base::ErrorKind::NewerFormat);
    let mut image = label().encode();
    image.as_mut_bytes()[16] = 2;
    image.seal(0);
    assert_eq!(Label::decode(image.as_bytes(), 1).unwrap_err().kind(), crate::base::ErrorKind::NewerFormat);
}

#[test]
fn numbers_that_have_no_next_one_are_refused() {
    let large = NUMBER_MAX;
    for change in [
        |s: &mut Superblock| s.sequence = NUMBER_MAX,
        |s: &mut Superblock| s.incarnation = NUMBER_MAX,
        |s: &mut Superblock| s.incarnation_group_seq = NUMBER_MAX,
        |s: &mut Superblock| s.incarnation_lsn = Lsn(NUMBER_MAX),
        |s: &mut Superblock| s.closed_lsn = Lsn(NUMBER_MAX),
    ] {
        let mut image = superblock();
        change(&mut image);
        assert!(Superblock::decode(image.encode(0).as_bytes(), 0).unwrap().is_none());
    }
    let mut image = label();
    image.flushed_lsn = Lsn(large);
    assert!(Label::decode(image.encode().as_bytes(), 1).unwrap().is_none());
    let mut image = label();
    image.sequence |= large;
    assert!(Label::decode(image.encode().as_bytes(), 1).unwrap().is_none());
    let mut image = checkpoint();
    image.lsn = Lsn(large);
    assert!(Checkpoint::decode(image.encode(SALT).as_bytes(), SALT, image.slot()).is_none());
    let last = RegionStart { first_group_seq: large, ..start() };
    let slot = last.seq.slot(8);
    assert!(RegionStart::decode(last.encode(SALT, slot).as_bytes(), SALT, slot, 8).is_none());
    let last = Group { group_seq: large, ..group() };
    assert!(Group::decode(last.encode(SALT).as_bytes(), SALT).is_none());
    assert!(decode_patches(&encode_patches(&[], Lsn(large), SALT), SALT).is_none());
    assert!(decode_patches(&encode_patches(&[], Lsn(large - 1), SALT), SALT).is_some());
}

#[test]
fn a_footer_whose_table_does_not_fit_is_refused() {
    let info = TableInfo { data_end: 4 << 20, ..table() };
    let footer: Footer = info.encode(SALT);
    assert!(TableInfo::decode(footer.as_bytes(), SALT, start(), 4 << 20, 4096).is_none());
    let info = TableInfo { entry_count: u32::MAX, ..table() };
    assert!(TableInfo::decode(info.encode(SALT).as_bytes(), SALT, start(), 4 << 20, 4096).is_none());
}

proptest! {
    #[test]
    fn records_survive_a_round_trip(
        lsn in 1..NUMBER_MAX, volume: u16, code in 1u8..=5, start in 0u64..1 << 61, len in 0u32..1 << 21, seq in 1u64..,
        crc: u64, ts: u64,
    ) {
        let kind = RecordKind::from_code(code).unwrap();
        let payload_bytes = if matches!(kind, RecordKind::WriteZeroes | RecordKind::Discard) { 0 } else { len };
        let record = Record {
            lsn: Lsn(lsn), volume: VolumeId(volume), kind, range: ByteRange::at(start, u64::from(len)),
            payload_bytes, payload_checksum: crc, timestamp_ns: ts, incarnation: ts as u16,
        };
        let header = record.encode(SALT, RegionSeq(seq));
        prop_assert_eq!(Record::decode(header.as_bytes(), SALT, RegionSeq(seq)), Some(record));
        prop_assert!(record_bytes(payload_bytes) >= 64 + payload_bytes && record_bytes(payload_bytes).is_multiple_of(64));
    }

    #[test]
    fn decoders_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000), seal: bool) {
        let mut bytes = bytes;
        if seal && bytes.len() >= 64 {
            let crc = crate::base::checksum::crc64_salted(SALT, &bytes[8..64]);
            bytes[..8].copy_from_slice(&crc.to_le_bytes());
        }
        let _ = Record::decode(&bytes, SALT, RegionSeq(1));
        let _ = Group::decode(&bytes, SALT);
        let _ = RegionStart::decode(&bytes, SALT, 0, REGION_COUNT);
        let _ = TableInfo::decode(&bytes, SALT, start(), 4 << 20, 4096);
        let _ = Checkpoint::decode(&bytes, SALT, 0);
        let _ = Superblock::decode(&bytes, 0);
        let _ = Label::decode(&bytes, 0);
        let _ = ArenaIdentity::decode(&bytes, SALT);
        let _ = decode_patches(&bytes, SALT);
        let _ = LogHeader::decode(&bytes);
        let _ = Entry::decode(&bytes, 4096, 8);
    }

    #[test]
    fn log_entries_survive_a_round_trip(at in 0u64..1 << 40, opening: u64, len in 1u32..=480) {
        let position = at * 8;
        let left = 1024 - position % 1024;
        let data = Entry { position, opening, kind: EntryKind::Data(len) };
        let payload = vec![7; len as usize];
        let image = data.encode(SALT, &[&payload]);
        let found = Entry::decode(image.as_bytes(), 1024, position);
        prop_assert_eq!(found.map(|(entry, _)| entry), (data.bytes() <= left).then_some(data));
        prop_assert!(image.matches(SALT, &payload) && !image.matches(SALT + 1, &payload));
        if let Some(rest) = left.checked_sub(32) {
            let pad = Entry { position, opening, kind: EntryKind::Pad(rest as u32) };
            let image = pad.encode(SALT, &[]);
            prop_assert_eq!(Entry::decode(image.as_bytes(), 1024, position).map(|(entry, _)| entry), Some(pad));
            prop_assert!(Entry::decode(image.as_bytes(), 1024, position + 1024).is_none());
            prop_assert!(image.matches(SALT, &[]));
        }
    }

    #[test]
    fn as_many_patches_fit_as_promised(zone_blocks in 2u32..2000) {
        let zone = zone_blocks * 4096;
        let count = patch_images_max(zone);
        prop_assert!(count > 0);
        let size = |n: usize| encode_patches(
            &vec![PatchImage { volume: VolumeId(1), offset: 0, bytes: vec![] }; n], Lsn(1), 0).len();
        if zone_blocks < 40 {
            prop_assert!(size(count) <= zone as usize && size(count + 1) > zone as usize);
        }
    }
}

#[test]
fn impossible_log_headers_are_refused() {
    let decode = |header: LogHeader| LogHeader::decode(header.encode().as_bytes());
    let sound = log_header();
    assert_eq!(decode(sound).unwrap(), Some(sound));
    for header in [
        LogHeader { capacity: 120, head: 0, hint: 0, ..sound },
        LogHeader { capacity: (1 << 20) + 4, ..sound },
        LogHeader { generation: 0, ..sound },
        LogHeader { hint: sound.head - 8, ..sound },
        LogHeader { hint: sound.head + 4, ..sound },
        LogHeader { hint: sound.head + (1 << 20) + 8, ..sound },
        LogHeader { hint: (5 << 20) - 24, ..sound },
        LogHeader { head: u64::MAX - 7, hint: u64::MAX - 7, ..sound },
    ] {
        assert!(decode(header).is_err(), "{header:?}");
    }
    assert_eq!(LogHeader::decode(&[0; 64]).unwrap(), None);
    assert_eq!(LogHeader::decode(b"TG").unwrap(), None);
}

#[test]
fn checksum_of_an_empty_payload_is_zero() {
    assert_eq!(crc64(&[]), 0);
}
