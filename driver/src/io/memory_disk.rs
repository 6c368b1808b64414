//! A disk in memory for tests: can be damaged, made unreadable in places, and counts what is written to it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::disk::Disk;
use crate::base::{Error, ErrorKind, Result};

/// A disk in memory.
#[derive(Debug)]
pub struct MemDisk {
    name: String,
    bytes: Mutex<Vec<u8>>,
    unreadable: Mutex<Vec<Range<u64>>>,
    writes: AtomicU64,
}

impl MemDisk {
    /// Disk of `len` zeroes that calls itself `name`.
    #[must_use]
    pub fn new(name: &str, len: u64) -> MemDisk {
        MemDisk::from_bytes(name, vec![0; len as usize])
    }

    /// Disk that holds `bytes`.
    #[must_use]
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> MemDisk {
        MemDisk {
            name: name.to_owned(),
            bytes: Mutex::new(bytes),
            unreadable: Mutex::new(Vec::new()),
            writes: AtomicU64::new(0),
        }
    }

    /// What it holds now.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }

    /// Puts `data` in place without counting it as a write.
    pub fn put(&self, offset: u64, data: &[u8]) {
        self.bytes.lock()[offset as usize..][..data.len()].copy_from_slice(data);
    }

    /// Zeroes a range without counting it as a write.
    pub fn zero(&self, range: Range<u64>) {
        self.bytes.lock()[range.start as usize..range.end as usize].fill(0);
    }

    /// Inverts the bits of `mask` in the byte at `offset`.
    pub fn flip(&self, offset: u64, mask: u8) {
        self.bytes.lock()[offset as usize] ^= mask;
    }

    /// Reads that touch `range` fail from now on.
    pub fn fail_reads(&self, range: Range<u64>) {
        self.unreadable.lock().push(range);
    }

    /// Number of writes and syncs so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    fn outside(&self, offset: u64, len: usize) -> Error {
        Error::new(ErrorKind::Invalid, format!("{}: {len} bytes at {offset} are outside", self.name))
    }
}

impl Disk for MemDisk {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if self.unreadable.lock().iter().any(|bad| bad.start < end && offset < bad.end) {
            return Err(Error::io(
                format!("{}: cannot read {} bytes at {offset}", self.name, buf.len()),
                std::io::Error::from_raw_os_error(libc::EIO),
            ));
        }
        let bytes = self.bytes.lock();
        let from = bytes.get(offset as usize..end as usize).ok_or_else(|| self.outside(offset, buf.len()))?;
        buf.copy_from_slice(from);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        let end = offset.saturating_add(data.len() as u64);
        let mut bytes = self.bytes.lock();
        let into =
            bytes.get_mut(offset as usize..end as usize).ok_or_else(|| self.outside(offset, data.len()))?;
        into.copy_from_slice(data);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn block_bytes(&self) -> u32 {
        512
    }

    fn preferred_block_bytes(&self) -> u32 {
        4096
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
