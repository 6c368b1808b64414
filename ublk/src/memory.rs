//! Memory maps of a queue: the kernel's request descriptors, and the tags' buffers for plain copy.

#![expect(unsafe_code, reason = "mmap, and memory that the kernel writes to")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use tidegate_driver::base::{Error, Result};

use crate::sys::{IoDesc, io_desc_position};

fn page_bytes() -> usize {
    // SAFETY: no pointers.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[derive(Debug)]
struct Map {
    base: *mut u8,
    len: usize,
}

impl Map {
    fn new(len: usize, protection: i32, flags: i32, fd: i32, offset: u64) -> io::Result<Map> {
        let (anywhere, offset) = (std::ptr::null_mut(), offset as libc::off_t);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(anywhere, len, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Map { base: base.cast(), len })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; the owner hands out no reference that outlives it.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// The request descriptors of a queue. Holds a reference to the char device: DEL_DEV waits until this is dropped.
#[derive(Debug)]
pub(crate) struct IoDescs {
    map: Map,
    depth: u16,
}

impl IoDescs {
    pub fn map(cdev: &impl AsFd, queue: u16, depth: u16) -> Result<IoDescs> {
        let page = page_bytes();
        let len = (usize::from(depth) * size_of::<IoDesc>()).next_multiple_of(page);
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let position = io_desc_position(queue, page as u64);
        let map = Map::new(len, libc::PROT_READ, flags, cdev.as_fd().as_raw_fd(), position)
            .map_err(|e| Error::io(format!("cannot map the request descriptors of ublk queue {queue}"), e))?;
        Ok(IoDescs { map, depth })
    }

    /// The descriptor of `tag`. Meaningful between the completion that brought the request and its commit.
    pub fn get(&self, tag: u16) -> IoDesc {
        assert!(tag < self.depth);
        // SAFETY: within the mapping (checked above and in `map`), aligned (the mapping to a page, the structure's
        // size to its alignment). Volatile: the kernel writes it; it does so before the completion, and not again
        // until the tag is committed.
        unsafe { self.map.base.cast::<IoDesc>().add(usize::from(tag)).read_volatile() }
    }
}

/// Buffers of a queue's tags for plain copy: the kernel copies a write's payload in before it hands the request over,
/// and a read's out when it is committed. Memory is used only as far as requests were large.
#[derive(Debug)]
pub(crate) struct TagBuffers {
    map: Map,
    bytes_each: usize,
}

impl TagBuffers {
    pub fn new(depth: u16, bytes_each: u32) -> Result<TagBuffers> {
        let bytes_each = (bytes_each as usize).next_multiple_of(page_bytes());
        let len = bytes_each * usize::from(depth);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let map = Map::new(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).map_err(|e| {
            Error::io(format!("cannot get {len} bytes of address space for request buffers"), e)
        })?;
        Ok(TagBuffers { map, bytes_each })
    }

    /// Address for FETCH and COMMIT.
    pub fn address(&self, tag: u16) -> u64 {
        self.pointer(tag, 0, 0) as u64
    }

    /// Copies out of the tag's buffer. The caller owns the tag's request, so the kernel does not write to it.
    pub fn copy_from(&self, tag: u16, offset: usize, into: &mut [u8]) {
        let from = self.pointer(tag, offset, into.len());
        // SAFETY: `pointer` checked the bounds; `into` is a Rust reference and so not part of this mapping, to which
        // none is ever made.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies into the tag's buffer. The caller owns the tag's request, so the kernel does not read it yet.
    pub fn copy_to(&mut self, tag: u16, offset: usize, from: &[u8]) {
        let to = self.pointer(tag, offset, from.len());
        // SAFETY: as in `copy_from`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    fn pointer(&self, tag: u16, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.bytes_each, "{offset}+{len} exceeds a tag's buffer");
        let at = usize::from(tag) * self.bytes_each + offset;
        assert!(at + len <= self.map.len, "tag {tag} has no buffer");
        self.map.base.wrapping_add(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_do_not_overlap() {
        let mut buffers = TagBuffers::new(4, 5000).unwrap();
        for tag in 0..4 {
            buffers.copy_to(tag, 0, &[tag as u8 + 1; 5000]);
        }
        for tag in 0..4 {
            let mut bytes = [0; 5000];
            buffers.copy_from(tag, 0, &mut bytes);
            assert_eq!(bytes, [tag as u8 + 1; 5000]);
        }
        assert_eq!(buffers.address(1) - buffers.address(0), 8192);
    }

    #[test]
    #[should_panic(expected = "exceeds a tag's buffer")]
    fn a_copy_past_the_buffer_is_refused() {
        TagBuffers::new(2, 4096).unwrap().copy_to(0, 4095, &[0; 2]);
    }
}
