//! What the fuzz targets share: edits of structures, with valid checksums, as input bytes describe them. Random bytes alone
//! would hardly ever get past a checksum.

use tidegate_driver::base::checksum::crc64_salted;

/// One change: 12 bytes of input.
///
/// ```text
///  0  u8   which structure, modulo their number
///  1  u8   bit 0: leave the checksum as it is; bits 1..: how to change
///  2  u16  where in the structure, modulo its length
///  4  u64  value
/// ```
struct Edit {
    /// Which structure.
    structure: usize,
    /// Whether the checksum is made valid again.
    seal: bool,
    how: u8,
    at: usize,
    value: u64,
}

/// A structure: its place, and the salt of its checksum if it has one.
pub type Structure = (std::ops::Range<usize>, Option<u64>);

/// Makes the edits that `data` describes in `bytes`, which hold `structures`.
pub fn edit(bytes: &mut [u8], structures: &[Structure], data: &[u8]) {
    for edit in edits(data) {
        let (range, salt) = &structures[edit.structure % structures.len()];
        edit.apply(&mut bytes[range.clone()], *salt);
    }
}

fn edits(data: &[u8]) -> impl Iterator<Item = Edit> {
    data.chunks_exact(12).take(16).map(|bytes| Edit {
        structure: usize::from(bytes[0]),
        seal: bytes[1] & 1 == 0,
        how: bytes[1] >> 1,
        at: usize::from(u16::from_le_bytes([bytes[2], bytes[3]])),
        value: u64::from_le_bytes(bytes[4..12].try_into().expect("eight bytes")),
    })
}

impl Edit {
    /// Changes `structure`, which starts with its checksum if it has one.
    fn apply(&self, structure: &mut [u8], salt: Option<u64>) {
        if structure.is_empty() {
            return;
        }
        let at = self.at % structure.len();
        let len = (structure.len() - at).min(8);
        let field = &mut structure[at..at + len];
        let value = self.value.to_le_bytes();
        match self.how % 4 {
            0 => field.copy_from_slice(&value[..len]),
            1 => field.iter_mut().zip(value).for_each(|(byte, v)| *byte ^= v),
            2 => field[0] = value[0],
            _ => field.fill(value[0]),
        }
        if let Some(salt) = salt.filter(|_| self.seal) {
            let checksum = crc64_salted(salt, &structure[8..]);
            structure[..8].copy_from_slice(&checksum.to_le_bytes());
        }
    }
}

/// The salt with which the structure's checksum is valid, if it starts with one.
pub fn salt_of(structure: &[u8], stage_salt: u64) -> Option<u64> {
    if structure.len() < 16 {
        return None;
    }
    [0, stage_salt]
        .into_iter()
        .find(|salt| structure[..8] == crc64_salted(*salt, &structure[8..]).to_le_bytes())
}
