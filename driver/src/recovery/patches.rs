//! The patch zone when a stage is opened: blocks that an unfinished epoch was about to change in part.

use std::collections::BTreeMap;

use crate::base::mutation::{Mutation, is};
use crate::base::{Error, ErrorKind, Lsn, Result, VolumeId};
use crate::format::checkpoint::Checkpoint;
use crate::format::geometry::PATCH_OFFSET;
use crate::format::label::label_offset;
use crate::format::patch::{PatchImage, decode_patches};
use crate::format::superblock::Superblock;
use crate::io::Disk;

/// What is wrong with the place of an image, if anything is. The label lies behind a volume, so an image that ends there would
/// change it.
pub(super) fn misplaced(image: &PatchImage, superblock: &Superblock) -> Option<String> {
    let volume = superblock.volumes.iter().find(|v| v.id == image.volume)?;
    let end = image.offset.saturating_add(image.bytes.len() as u64);
    (end > label_offset(volume.size_bytes, 0)).then(|| {
        format!(
            "the patch zone holds an image for bytes {}..{end}, behind the end of volume {}",
            image.offset, image.volume
        )
    })
}

/// What is wrong with an epoch that ends at `epoch_end`, if the log ends at `log_end`: what is flushed was durable before.
pub(super) fn beyond_the_log(epoch_end: Lsn, log_end: Lsn) -> Option<String> {
    (epoch_end > log_end).then(|| {
        format!(
            "the patch zone is of an epoch that ends at LSN {epoch_end}, behind the end of the log at LSN {log_end}"
        )
    })
}

/// The images of an epoch that is above `checkpoint`. Reads only.
///
/// An epoch beyond the log's end is refused, as the log has lost records then. Going on would give their LSNs to others, and
/// the next recovery would put the images over what was flushed since.
pub(super) fn pending(
    stage: &dyn Disk,
    superblock: &Superblock,
    checkpoint: &Checkpoint,
    log_end: Lsn,
) -> Result<Vec<PatchImage>> {
    let mut zone = vec![0; superblock.geometry.patch_bytes as usize];
    stage.read(PATCH_OFFSET, &mut zone)?;
    let Some((epoch_end, images)) = decode_patches(&zone, superblock.salt) else { return Ok(Vec::new()) };
    if epoch_end <= checkpoint.lsn || is(Mutation::PatchesAreNotRestored) {
        return Ok(Vec::new());
    }
    let misplaced = || images.iter().find_map(|image| misplaced(image, superblock));
    match beyond_the_log(epoch_end, log_end).or_else(misplaced) {
        None => Ok(images),
        Some(what) => Err(Error::new(
            ErrorKind::Damaged,
            format!("{}: {what}. Nothing was changed. Restore the device from a copy", stage.name()),
        )),
    }
}

/// Writes the images that belong to one of `backings`, durably, and returns their number. The others concern nobody.
pub(super) fn restore(images: &[PatchImage], backings: &BTreeMap<VolumeId, &dyn Disk>) -> Result<u64> {
    let mut restored = 0;
    for (id, backing) in backings {
        let mut images = images.iter().filter(|image| image.volume == *id).peekable();
        if images.peek().is_none() {
            continue;
        }
        for image in images {
            backing.write(image.offset, &image.bytes)?;
            restored += 1;
        }
        backing.sync()?;
    }
    Ok(restored)
}
