//! Reading, choosing, repairing and updating the superblock copies.

use zerocopy::IntoBytes;

use crate::base::mutation::{Mutation, is};
use crate::base::{Error, ErrorKind, Result};
use crate::format::geometry::{SUPERBLOCK_COPIES, superblock_offset};
use crate::format::superblock::{SUPERBLOCK_BYTES, Superblock};
use crate::io::Disk;

/// The superblock of a stage and the state of its copies.
#[derive(Clone, Debug)]
pub struct SuperblockRead {
    /// The newest valid copy.
    pub superblock: Superblock,
    /// Copies that are invalid or older.
    pub bad_copies: Vec<u32>,
}

/// Reads all copies and chooses. Writes nothing.
///
/// Errors: `NotFound` if the device is not a stage, `Damaged` if it was one but no copy is valid, `NewerFormat`,
/// `WrongDevice` if the device is smaller than the stage was.
pub fn read(disk: &dyn Disk) -> Result<SuperblockRead> {
    let mut copies: [Option<Superblock>; SUPERBLOCK_COPIES as usize] = Default::default();
    let mut resembles = false;
    let mut unreadable = None;
    let mut device_bytes = disk.len_bytes();
    let mut bytes = vec![0; SUPERBLOCK_BYTES];
    for copy in 0..SUPERBLOCK_COPIES {
        if let (2, Some(first)) = (copy, copies.iter().flatten().next()) {
            // A device that has grown since has its last copies where the end was.
            device_bytes = first.geometry.device_bytes;
        }
        let offset = superblock_offset(device_bytes, copy);
        if offset + SUPERBLOCK_BYTES as u64 > disk.len_bytes() {
            continue;
        }
        if let Err(error) = disk.read(offset, &mut bytes) {
            unreadable = Some(error);
            continue;
        }
        resembles |= Superblock::resembles(&bytes);
        copies[copy as usize] = Superblock::decode(&bytes, copy).map_err(|e| e.within(disk.name()))?;
    }
    let Some(newest) = copies.iter().flatten().max_by_key(|s| s.sequence).cloned() else {
        // What cannot be read may well be a stage.
        if let Some(error) = unreadable {
            return Err(error);
        }
        return Err(if resembles {
            Error::new(
                ErrorKind::Damaged,
                format!(
                    "{}: all superblock copies of this stage are damaged; restore the device from a copy, or create a new \
                     stage with --force if its content is not needed",
                    disk.name()
                ),
            )
        } else {
            Error::new(ErrorKind::NotFound, format!("{} is not a Tidegate stage", disk.name()))
        });
    };
    if newest.geometry.device_bytes > disk.len_bytes() {
        return Err(Error::new(
            ErrorKind::WrongDevice,
            format!(
                "{} has {} bytes, the stage on it had {}: the device has shrunk; give it its size back",
                disk.name(),
                disk.len_bytes(),
                newest.geometry.device_bytes
            ),
        ));
    }
    let bad_copies =
        (0..SUPERBLOCK_COPIES).filter(|&c| copies[c as usize].as_ref() != Some(&newest)).collect();
    Ok(SuperblockRead { superblock: newest, bad_copies })
}

/// Writes copy after copy, each durable before the next is touched. A copy that cannot be written is passed over: it is
/// what the others are for. Fails if none could be written or a sync fails; then no update may use the same sequence number again.
pub fn write(disk: &dyn Disk, superblock: &Superblock) -> Result<()> {
    let copies: Vec<u32> = (0..SUPERBLOCK_COPIES).collect();
    write_copies(disk, superblock, &copies).map(|_| ())
}

fn write_copies(disk: &dyn Disk, superblock: &Superblock, copies: &[u32]) -> Result<u32> {
    let mut written = 0;
    let mut failed = None;
    for &copy in copies {
        let image = superblock.encode(copy);
        let offset = superblock.geometry.superblock_offset(copy);
        match disk.write(offset, image.as_bytes()) {
            Ok(()) => written += 1,
            Err(error) => {
                tracing::warn!("superblock copy {copy} of {}: {}", disk.name(), error.report());
                failed = Some(error);
            }
        }
        // Whatever became of this copy must be settled before the next is touched: with a failing sync a power cut could
        // tear all of them.
        if !is(Mutation::SuperblockCopiesAtOnce) || copy + 1 == SUPERBLOCK_COPIES {
            disk.sync()?;
        }
    }
    match failed {
        Some(error) if written == 0 => Err(error),
        _ => Ok(written),
    }
}

/// Rewrites the bad copies so that all say the same again. Returns how many.
pub fn repair(disk: &dyn Disk, read: &SuperblockRead) -> Result<u32> {
    // The copy that was read is good, so a bad one that cannot be written does not keep the stage from being used.
    Ok(write_copies(disk, &read.superblock, &read.bad_copies).unwrap_or(0))
}
