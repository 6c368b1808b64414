//! Label: what makes a backing recognisable. Two slots right after the last block of the volume.
//!
//! ```text
//!   0  u64   checksum of bytes 8..4096, not salted
//!   8  [8]   magic "TGLABEL\0"
//!  16  u32   version
//!  20  u32   slot
//!  24  u64   sequence number of this label; the slot is sequence % 2
//!  32  [16]  stage UUID
//!  48  [16]  volume UUID
//!  64  u64   volume size in bytes
//!  72  u64   flushed LSN: highest end of an epoch that came to the sync of this backing, with success or not
//!  80  [64]  volume name
//! 144  [3952] reserved
//! ```
//!
//! Valid if and only if checksum, magic and slot match and the name is that of a volume; the valid slot with the highest
//! sequence number counts.
//!
//! Every flush epoch that touches a backing writes the label with the epoch's end before it syncs the backing, and the
//! checkpoint follows the sync and repeats that LSN for the volume. Hence for devices that belong together:
//! `checkpoint's LSN for the volume <= flushed LSN <= newest LSN of the log`. A backing below the checkpoint is an old copy
//! of itself; a log that ends below the label is. Both are refused.

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::volume_entry::{NAME_BYTES_MAX, check_name};
use super::{Sealed, VERSION, may_grow, text_from, text_into};
use crate::base::units::align_up;
use crate::base::{Error, ErrorKind, Lsn, Result};

/// "TGLABEL\0".
pub const LABEL_MAGIC: [u8; 8] = *b"TGLABEL\0";
/// Size of a label slot.
pub const LABEL_BYTES: u64 = 4096;
/// Number of slots.
pub const LABEL_SLOTS: u32 = 2;
/// Space that a backing needs beyond the volume, rounded up to whole label blocks.
pub const BACKING_TAIL_BYTES: u64 = 64 << 10;

/// Offset of label slot `slot` on the backing of a volume of `volume_bytes`.
#[must_use]
pub fn label_offset(volume_bytes: u64, slot: u32) -> u64 {
    assert!(slot < LABEL_SLOTS);
    align_up(volume_bytes, LABEL_BYTES) + u64::from(slot) * LABEL_BYTES
}

/// Size a backing must have for a volume of `volume_bytes`.
#[must_use]
pub fn backing_bytes_for(volume_bytes: u64) -> u64 {
    align_up(volume_bytes, LABEL_BYTES) + BACKING_TAIL_BYTES
}

/// Largest volume that fits a backing of `backing_bytes`.
#[must_use]
pub fn volume_bytes_for(backing_bytes: u64) -> u64 {
    backing_bytes.saturating_sub(BACKING_TAIL_BYTES) / LABEL_BYTES * LABEL_BYTES
}

/// The label on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LabelImage {
    checksum: U64,
    magic: [u8; 8],
    version: U32,
    slot: U32,
    sequence: U64,
    stage_uuid: [u8; 16],
    volume_uuid: [u8; 16],
    volume_bytes: U64,
    flushed_lsn: U64,
    name: [u8; NAME_BYTES_MAX],
    reserved: [u8; 3952],
}

const _: () = assert!(size_of::<LabelImage>() == LABEL_BYTES as usize);

impl Sealed for LabelImage {}

/// A label's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Number of this label.
    pub sequence: u64,
    /// The stage the volume belongs to.
    pub stage_uuid: Uuid,
    /// The volume.
    pub volume_uuid: Uuid,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Highest end of an epoch that came to the sync of this backing, with success or not.
    pub flushed_lsn: Lsn,
    /// Name of the volume.
    pub name: String,
}

impl Label {
    /// The slot it belongs to.
    #[must_use]
    pub fn slot(&self) -> u32 {
        (self.sequence % u64::from(LABEL_SLOTS)) as u32
    }

    /// Encodes it; the name must be a valid one.
    #[must_use]
    pub fn encode(&self) -> LabelImage {
        let mut image = LabelImage {
            checksum: U64::ZERO,
            magic: LABEL_MAGIC,
            version: VERSION.into(),
            slot: self.slot().into(),
            sequence: self.sequence.into(),
            stage_uuid: *self.stage_uuid.as_bytes(),
            volume_uuid: *self.volume_uuid.as_bytes(),
            volume_bytes: self.volume_bytes.into(),
            flushed_lsn: self.flushed_lsn.0.into(),
            name: text_into(&self.name).expect("a validated name fits"),
            reserved: [0; 3952],
        };
        image.seal(0);
        image
    }

    /// Decodes the content of slot `slot`; `Ok(None)` if it is not valid.
    pub fn decode(bytes: &[u8], slot: u32) -> Result<Option<Label>> {
        let Some(image) = LabelImage::open(bytes, 0) else { return Ok(None) };
        if image.magic != LABEL_MAGIC || image.slot.get() != slot {
            return Ok(None);
        }
        if image.version.get() > VERSION {
            return Err(Error::new(
                ErrorKind::NewerFormat,
                format!(
                    "the backing's label has format version {}; this build knows {VERSION}: use a newer tidegate",
                    image.version.get()
                ),
            ));
        }
        let label = Label {
            sequence: image.sequence.get(),
            stage_uuid: Uuid::from_bytes(image.stage_uuid),
            volume_uuid: Uuid::from_bytes(image.volume_uuid),
            volume_bytes: image.volume_bytes.get(),
            flushed_lsn: Lsn(image.flushed_lsn.get()),
            name: text_from(&image.name),
        };
        let valid = label.slot() == slot
            && may_grow(&[label.sequence, label.flushed_lsn.0])
            && check_name(&label.name).is_ok();
        Ok(valid.then_some(label))
    }
}
