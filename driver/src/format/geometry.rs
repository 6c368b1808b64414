//! Map of the stage device.
//!
//! ```text
//! offset                  zone
//! 0                       superblock copy 0            128 KiB
//! 128 KiB                 superblock copy 1            128 KiB
//! 256 KiB                 checkpoint slots             16 × 4 KiB
//! 320 KiB                 patch zone                   patch_bytes
//! regions_offset          region slots                 region_count × region_bytes
//! …                       unused
//! end - 256 KiB           superblock copies 2 and 3    2 × 128 KiB   (end = device_bytes rounded down to 64 KiB)
//! ```
//!
//! Valid if and only if block_bytes is a power of two in 512..=4096, region_bytes is a multiple of 4096 within the
//! limits, there are at least `REGIONS_MIN` regions, patch_bytes is a multiple of 4096 and holds a header and an image,
//! and the zones do not overlap and end before copy 2.

use crate::base::limits::{
    BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, PAYLOAD_BYTES_MAX, REGION_BYTES_MAX, REGION_BYTES_MIN, REGIONS_MIN,
};
use crate::base::units::{align_down, align_up};
use crate::base::{Error, ErrorKind, RegionSeq, Result};

/// Space of one superblock copy.
pub const SUPERBLOCK_SLOT_BYTES: u64 = 128 << 10;
/// Number of superblock copies.
pub const SUPERBLOCK_COPIES: u32 = 4;
/// First checkpoint slot.
pub const CHECKPOINTS_OFFSET: u64 = 2 * SUPERBLOCK_SLOT_BYTES;
/// Number of checkpoint slots.
pub const CHECKPOINT_SLOTS: u32 = 16;
/// Space of one checkpoint slot.
pub const CHECKPOINT_SLOT_BYTES: u64 = 4096;
/// First byte of the patch zone.
pub const PATCH_OFFSET: u64 = CHECKPOINTS_OFFSET + CHECKPOINT_SLOTS as u64 * CHECKPOINT_SLOT_BYTES;
/// Patch zone of a stage of ordinary size.
pub const PATCH_BYTES_DEFAULT: u32 = 2 << 20;

/// Where the zones of a stage are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the stage device when it was created.
    pub device_bytes: u64,
    /// Unit of writes to the log.
    pub block_bytes: u32,
    /// Size of a region.
    pub region_bytes: u32,
    /// Number of region slots.
    pub region_count: u32,
    /// Size of the patch zone.
    pub patch_bytes: u32,
}

impl Geometry {
    /// Geometry that fills a device of `device_bytes`.
    pub fn for_device(
        device_bytes: u64,
        block_bytes: u32,
        region_bytes: u32,
        patch_bytes: u32,
    ) -> Result<Geometry> {
        let mut geometry = Geometry { device_bytes, block_bytes, region_bytes, region_count: 0, patch_bytes };
        let room = geometry.end_copies_offset().saturating_sub(geometry.regions_offset());
        let count = room / u64::from(region_bytes.max(1));
        geometry.region_count = u32::try_from(count).unwrap_or(u32::MAX);
        if geometry.region_count < REGIONS_MIN {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "a stage of {device_bytes} bytes is too small: it holds {} regions of {region_bytes} bytes, \
                     {REGIONS_MIN} are needed; make it at least {} bytes",
                    geometry.region_count,
                    Geometry::device_bytes_min(region_bytes, patch_bytes),
                ),
            ));
        }
        geometry.validate()?;
        Ok(geometry)
    }

    /// Smallest device for these sizes.
    #[must_use]
    pub fn device_bytes_min(region_bytes: u32, patch_bytes: u32) -> u64 {
        align_up(
            align_up(PATCH_OFFSET + u64::from(patch_bytes), 4096)
                + u64::from(REGIONS_MIN) * u64::from(region_bytes)
                + 2 * SUPERBLOCK_SLOT_BYTES,
            64 << 10,
        )
    }

    /// Checks the rule in the module's header; for values that come from a disk.
    pub fn validate(&self) -> Result<()> {
        let ok = self.block_bytes.is_power_of_two()
            && (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&self.block_bytes)
            && (REGION_BYTES_MIN..=REGION_BYTES_MAX).contains(&self.region_bytes)
            && self.region_bytes.is_multiple_of(BLOCK_BYTES_MAX)
            && self.region_count >= REGIONS_MIN
            && self.patch_bytes.is_multiple_of(4096)
            && self.patch_bytes >= 8192
            && self.patch_bytes <= 1 << 30
            && self
                .regions_offset()
                .checked_add(u64::from(self.region_count) * u64::from(self.region_bytes))
                .is_some_and(|end| end <= self.end_copies_offset());
        if ok {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Damaged, format!("the stage's geometry makes no sense: {self:?}")))
        }
    }

    /// First byte of the region zone.
    #[must_use]
    pub fn regions_offset(&self) -> u64 {
        align_up(PATCH_OFFSET + u64::from(self.patch_bytes), 4096)
    }

    /// First byte of superblock copy 2.
    #[must_use]
    pub fn end_copies_offset(&self) -> u64 {
        end_copies_offset(self.device_bytes)
    }

    /// Offset of superblock copy `copy`.
    #[must_use]
    pub fn superblock_offset(&self, copy: u32) -> u64 {
        superblock_offset(self.device_bytes, copy)
    }

    /// Offset on the device of the slot of region `seq`.
    #[must_use]
    pub fn region_offset(&self, seq: RegionSeq) -> u64 {
        self.regions_offset() + u64::from(seq.slot(self.region_count)) * u64::from(self.region_bytes)
    }

    /// Largest payload of one record: a quarter of a region at most.
    #[must_use]
    pub fn payload_bytes_max(&self) -> u32 {
        PAYLOAD_BYTES_MAX.min(self.region_bytes / 4)
    }

    /// Bytes of all regions together.
    #[must_use]
    pub fn regions_bytes(&self) -> u64 {
        u64::from(self.region_count) * u64::from(self.region_bytes)
    }
}

/// Offset of checkpoint slot `slot`.
#[must_use]
pub fn checkpoint_offset(slot: u32) -> u64 {
    assert!(slot < CHECKPOINT_SLOTS);
    CHECKPOINTS_OFFSET + u64::from(slot) * CHECKPOINT_SLOT_BYTES
}

/// Offset of superblock copy `copy` on a device of `device_bytes`.
#[must_use]
pub fn superblock_offset(device_bytes: u64, copy: u32) -> u64 {
    assert!(copy < SUPERBLOCK_COPIES);
    match copy {
        0 | 1 => u64::from(copy) * SUPERBLOCK_SLOT_BYTES,
        _ => end_copies_offset(device_bytes) + u64::from(copy - 2) * SUPERBLOCK_SLOT_BYTES,
    }
}

fn end_copies_offset(device_bytes: u64) -> u64 {
    align_down(device_bytes, 64 << 10).saturating_sub(2 * SUPERBLOCK_SLOT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_device_fits_exactly() {
        let min = Geometry::device_bytes_min(64 << 10, 64 << 10);
        assert_eq!(Geometry::for_device(min, 512, 64 << 10, 64 << 10).unwrap().region_count, REGIONS_MIN);
        let error = Geometry::for_device(min - 1, 512, 64 << 10, 64 << 10).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.report().contains(&min.to_string()), "{}", error.report());
    }

    #[test]
    fn zones_do_not_overlap() {
        let g = Geometry::for_device((1 << 30) + 12345, 4096, 4 << 20, PATCH_BYTES_DEFAULT).unwrap();
        assert!(checkpoint_offset(CHECKPOINT_SLOTS - 1) + CHECKPOINT_SLOT_BYTES <= PATCH_OFFSET);
        assert!(PATCH_OFFSET + u64::from(g.patch_bytes) <= g.regions_offset());
        let last = g.region_offset(RegionSeq(u64::from(g.region_count)));
        assert!(last + u64::from(g.region_bytes) <= g.superblock_offset(2));
        assert!(g.superblock_offset(3) + SUPERBLOCK_SLOT_BYTES <= g.device_bytes);
        assert_eq!(g.region_offset(RegionSeq(1)), g.region_offset(RegionSeq(1 + u64::from(g.region_count))));
    }
}
