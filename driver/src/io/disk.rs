//! Blocking access to a device: what recovery and administration use, where simplicity counts and nothing is in
//! flight. The running engine submits [`super::Op`]s instead.

use crate::base::Result;

/// A device or file addressed by byte, any alignment. Errors name the device and the position.
pub trait Disk: Send + Sync {
    /// Fills `buf` from `offset`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// Reads `places`, each an offset and a length, and hands their bytes to `take`, in order, with the place's number. Devices
    /// that like to do several things at once are asked for several at once. Ends with the first error.
    fn read_each(
        &self,
        places: &[(u64, usize)],
        take: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = Vec::new();
        for (i, &(offset, len)) in places.iter().enumerate() {
            bytes.resize(len, 0);
            self.read(offset, &mut bytes)?;
            take(i, &bytes)?;
        }
        Ok(())
    }
    /// Writes `data` at `offset`; durable after the next successful [`Disk::sync`].
    fn write(&self, offset: u64, data: &[u8]) -> Result<()>;
    /// Makes every completed write durable.
    fn sync(&self) -> Result<()>;
    /// Forgets what is cached of the device's content without being on it, so that what is read afterwards is there.
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }
    /// Size in bytes.
    fn len_bytes(&self) -> u64;
    /// Smallest unit of direct access in bytes: what a partial write may tear.
    fn block_bytes(&self) -> u32;
    /// Unit the device prefers (its physical block).
    fn preferred_block_bytes(&self) -> u32;
    /// How messages call it: its path.
    fn name(&self) -> String;
}
