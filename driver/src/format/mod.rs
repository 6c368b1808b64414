//! Every byte that reaches a disk, a wire or the shared arena. One file per structure; each starts with its byte
//! table and the rule by which it is valid.
//!
//! Rules common to all:
//! - little-endian, fixed layout, no padding; reserved bytes are zero and checked to be zero by `inspect` only, so that
//!   a later version may use them behind a compatible flag;
//! - the checksum comes first and covers every byte after itself: nothing else is believed before it matches;
//! - log structures are seeded with the stage's salt ([`crate::base::checksum`]), so they bind to their stage;
//! - numbers that only grow (LSNs, sequence numbers, incarnations) stay below 2^62 in a valid structure, so that the next one
//!   is a number too;
//! - a structure that lives in several slots carries its slot number: a misdirected write does not pass.
//!
//! | structure | file | size | where |
//! |---|---|---|---|
//! | superblock | `superblock.rs` | 69632 | stage: 4 copies, 2 at either end |
//! | volume entry | `volume_entry.rs` | 512 | inside the superblock |
//! | checkpoint | `checkpoint.rs` | 4096 | stage: 16 rotating slots |
//! | patch header and entry | `patch.rs` | 64, 32 | stage: patch zone |
//! | region header, footer, table entry | `region.rs` | 64, 64, 32 | first and last bytes of each region |
//! | group header | `group.rs` | 64 | first bytes of each group |
//! | record header | `record.rs` | 64 | before each payload |
//! | label | `label.rs` | 4096 | backing: 2 slots right after the volume's last block |
//! | arena header | `arena.rs` | 4096 | first bytes of the arena file |
//! | greeting, welcome, submission, completion | `byte_ring.rs` | 128, 512, 64, 32 | the byte door's socket and shared memory |
//! | log header, log entry | `append_log.rs` | 64, 32 | a byte range of a volume |
//!
//! The map of the stage device is in `geometry.rs`.

pub mod append_log;
pub mod arena;
pub mod byte_ring;
pub mod checkpoint;
pub mod geometry;
pub mod group;
pub mod label;
pub mod patch;
pub mod record;
pub mod region;
pub mod superblock;
pub mod volume_entry;

#[cfg(test)]
mod tests;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::base::checksum::{crc64, crc64_salted};
use crate::base::limits::NUMBER_MAX;

/// The format version this build writes, and the newest it reads.
pub const VERSION: u32 = 1;

/// Whether these are numbers that may be counted on from.
fn may_grow(numbers: &[u64]) -> bool {
    numbers.iter().all(|number| *number < NUMBER_MAX)
}

/// A structure whose first eight bytes are the checksum of the rest.
pub trait Sealed: FromBytes + IntoBytes + Immutable + KnownLayout + Sized {
    /// Computes and stores the checksum, with the salt in the checksum's place meanwhile: one part takes a fraction of the
    /// time of two for structures as small as these.
    fn seal(&mut self, salt: u64) {
        let bytes = self.as_mut_bytes();
        bytes[..8].copy_from_slice(&salt.to_le_bytes());
        let crc = crc64(bytes);
        bytes[..8].copy_from_slice(&crc.to_le_bytes());
    }

    /// Whether the stored checksum is that of the rest.
    fn is_sealed(&self, salt: u64) -> bool {
        let bytes = self.as_bytes();
        bytes[..8] == crc64_salted(salt, &bytes[8..]).to_le_bytes()
    }

    /// The structure at the start of `bytes` if it is long enough and its checksum matches.
    fn open(bytes: &[u8], salt: u64) -> Option<Self> {
        let (mut value, _) = Self::read_from_prefix(bytes).ok()?;
        value.seal(salt);
        (value.as_bytes()[..8] == bytes[..8]).then_some(value)
    }
}

/// Text in a fixed field: UTF-8, padded with zeroes.
#[must_use]
pub fn text_from(field: &[u8]) -> String {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// Puts `text` into a fixed field, zero-padded; `None` if it does not fit.
pub fn text_into<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut field = [0; N];
    if text.len() > N || text.as_bytes().contains(&0) {
        return None;
    }
    field[..text.len()].copy_from_slice(text.as_bytes());
    Some(field)
}
