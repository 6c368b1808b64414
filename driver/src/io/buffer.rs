//! Aligned buffers for direct I/O.

use std::fmt;

use aligned_vec::{AVec, ConstAlign};

/// Alignment of every buffer: enough for direct I/O on any Linux block device.
pub const BUFFER_ALIGN: usize = 4096;

/// A zero-initialised byte buffer at an address that direct I/O accepts.
pub struct AlignedBuf {
    bytes: AVec<u8, ConstAlign<BUFFER_ALIGN>>,
}

impl AlignedBuf {
    /// Buffer of `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> AlignedBuf {
        let mut bytes = AVec::with_capacity(BUFFER_ALIGN, len);
        bytes.resize(len, 0);
        AlignedBuf { bytes }
    }

    /// Buffer that holds a copy of `data`.
    #[must_use]
    pub fn from_slice(data: &[u8]) -> AlignedBuf {
        AlignedBuf { bytes: AVec::from_slice(BUFFER_ALIGN, data) }
    }

    /// Changes the length in place; new bytes are zero, capacity is kept.
    pub fn set_len(&mut self, len: usize) {
        self.bytes.resize(len, 0);
    }

    /// Bytes that fit without a new allocation.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.bytes.len())
    }
}
