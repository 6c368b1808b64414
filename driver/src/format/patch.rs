//! Patch zone: whole-block images of the blocks that a flush epoch changes only in part.
//!
//! A block that is covered only in part by records is read from the backing, changed and written in place. If power fails
//! during that write, the block may be torn and the bytes that no record holds would be gone. So the finished images are
//! first written here, durably, and then in place (a double-write buffer, as InnoDB has one). Recovery writes the
//! images of an unfinished epoch to the backing again, which is idempotent.
//!
//! ```text
//! offset 0 of the zone: header
//!  0  u64  checksum of bytes 8..64 and of all entries, salted
//!  8  u32  magic "TGPA"
//! 12  u32  version
//! 16  u32  number of images
//! 20  u32  reserved
//! 24  u64  end of the epoch: the LSN of its last record
//! 32  [32] reserved
//!
//! then one entry per image
//!  0  u64  offset on the backing
//!  8  u64  checksum of the image
//! 16  u32  length of the image in bytes
//! 20  u16  volume id
//! 22  u16  reserved
//! 24  u64  reserved
//!
//! then, from the next multiple of 4096, the images, 4096 bytes apart
//! ```
//!
//! Valid if and only if checksum and magic match, the entries fit the zone and every image's checksum matches. A zone that
//! is not valid was torn while it was written: then nothing was written in place yet and there is nothing to restore.
//! It concerns an unfinished epoch if and only if the epoch's end is above the checkpoint.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{VERSION, may_grow};
use crate::base::checksum::{crc64, crc64_salted};
use crate::base::units::align_up;
use crate::base::{Lsn, VolumeId};
use crate::io::AlignedBuf;

/// "TGPA".
pub const PATCH_MAGIC: u32 = u32::from_le_bytes(*b"TGPA");
/// Distance of images.
pub const PATCH_IMAGE_STRIDE: u32 = 4096;
const HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 32;

/// The header on disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PatchHeader {
    checksum: U64,
    magic: U32,
    version: U32,
    image_count: U32,
    reserved0: U32,
    epoch_end: U64,
    reserved1: [u8; 32],
}

const _: () = assert!(size_of::<PatchHeader>() == HEADER_BYTES);

/// An entry on disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PatchEntry {
    offset: U64,
    checksum: U64,
    len: U32,
    volume: U16,
    reserved0: U16,
    reserved1: U64,
}

const _: () = assert!(size_of::<PatchEntry>() == ENTRY_BYTES);

/// One block image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchImage {
    /// Volume whose backing it belongs to.
    pub volume: VolumeId,
    /// Offset on the backing.
    pub offset: u64,
    /// Content of the block.
    pub bytes: Vec<u8>,
}

fn images_offset(count: usize) -> usize {
    align_up((HEADER_BYTES + count * ENTRY_BYTES) as u64, u64::from(PATCH_IMAGE_STRIDE)) as usize
}

/// Number of images that fit a zone of `zone_bytes`.
#[must_use]
pub fn patch_images_max(zone_bytes: u32) -> usize {
    let zone = zone_bytes as usize;
    let mut count = zone / (PATCH_IMAGE_STRIDE as usize + ENTRY_BYTES);
    while count > 0 && images_offset(count) + count * PATCH_IMAGE_STRIDE as usize > zone {
        count -= 1;
    }
    count
}

/// Encodes a zone's content, to be written at the start of the zone in one durable write.
#[must_use]
pub fn encode_patches(images: &[PatchImage], epoch_end: Lsn, salt: u64) -> AlignedBuf {
    let first = images_offset(images.len());
    let mut zone = AlignedBuf::zeroed(first + images.len() * PATCH_IMAGE_STRIDE as usize);
    for (i, image) in images.iter().enumerate() {
        assert!(image.bytes.len() <= PATCH_IMAGE_STRIDE as usize);
        let entry = PatchEntry {
            offset: image.offset.into(),
            checksum: crc64(&image.bytes).into(),
            len: (image.bytes.len() as u32).into(),
            volume: image.volume.0.into(),
            reserved0: U16::ZERO,
            reserved1: U64::ZERO,
        };
        let at = HEADER_BYTES + i * ENTRY_BYTES;
        zone[at..at + ENTRY_BYTES].copy_from_slice(entry.as_bytes());
        let at = first + i * PATCH_IMAGE_STRIDE as usize;
        zone[at..at + image.bytes.len()].copy_from_slice(&image.bytes);
    }
    let mut header = PatchHeader {
        checksum: U64::ZERO,
        magic: PATCH_MAGIC.into(),
        version: VERSION.into(),
        image_count: (images.len() as u32).into(),
        reserved0: U32::ZERO,
        epoch_end: epoch_end.0.into(),
        reserved1: [0; 32],
    };
    zone[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    let end = HEADER_BYTES + images.len() * ENTRY_BYTES;
    header.checksum = crc64_salted(salt, &zone[8..end]).into();
    zone[..8].copy_from_slice(header.checksum.as_bytes());
    zone
}

/// Decodes a zone: the epoch's end and its images, or `None` if it is not valid.
#[must_use]
pub fn decode_patches(zone: &[u8], salt: u64) -> Option<(Lsn, Vec<PatchImage>)> {
    let (header, _) = PatchHeader::read_from_prefix(zone).ok()?;
    if header.magic.get() != PATCH_MAGIC || !may_grow(&[header.epoch_end.get()]) {
        return None;
    }
    let count = header.image_count.get() as usize;
    let end = count.checked_mul(ENTRY_BYTES)?.checked_add(HEADER_BYTES)?;
    let table = zone.get(8..end)?;
    if header.checksum.get() != crc64_salted(salt, table) {
        return None;
    }
    let first = images_offset(count);
    let mut images = Vec::with_capacity(count);
    for i in 0..count {
        let at = HEADER_BYTES + i * ENTRY_BYTES;
        let (entry, _) = PatchEntry::read_from_prefix(zone.get(at..)?).ok()?;
        let len = entry.len.get();
        if len > PATCH_IMAGE_STRIDE {
            return None;
        }
        let at = first + i * PATCH_IMAGE_STRIDE as usize;
        let bytes = zone.get(at..at + len as usize)?;
        if crc64(bytes) != entry.checksum.get() {
            return None;
        }
        images.push(PatchImage {
            volume: VolumeId(entry.volume.get()),
            offset: entry.offset.get(),
            bytes: bytes.to_vec(),
        });
    }
    Some((Lsn(header.epoch_end.get()), images))
}
