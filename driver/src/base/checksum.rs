//! The one checksum: CRC64-NVMe, chosen because it is as fast as any natively, the kernel's own integrity guard,
//! and strong enough for records of a mebibyte.
//!
//! Every structure of a stage is seeded with the stage's secret salt, which no client ever sees, so that a client
//! cannot craft payload that passes for a structure, and a structure of another stage never passes for ours.

use crc_fast::{CrcAlgorithm, Digest, checksum};

/// Checksum of `data` alone (payloads).
#[must_use]
pub fn crc64(data: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, data)
}

/// Checksum of `data` bound to a stage by its `salt`.
#[must_use]
pub fn crc64_salted(salt: u64, data: &[u8]) -> u64 {
    crc64_salted_parts(salt, [data])
}

/// Checksum of `parts`, one after the other, bound by `salt`.
#[must_use]
pub fn crc64_salted_parts<'a>(salt: u64, parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&salt.to_le_bytes());
    parts.into_iter().for_each(|part| digest.update(part));
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_crc64_nvme() {
        assert_eq!(crc64(b"123456789"), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn salt_binds() {
        assert_ne!(crc64_salted(1, b"abc"), crc64_salted(2, b"abc"));
        let mut joined = 7u64.to_le_bytes().to_vec();
        joined.extend_from_slice(b"abc");
        assert_eq!(crc64_salted(7, b"abc"), crc64(&joined));
        assert_eq!(crc64_salted_parts(7, [&b"a"[..], b"", b"bc"]), crc64(&joined));
    }
}
