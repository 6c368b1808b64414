//! Memory that two processes share and neither trusts the other with: a sealed memfd and its mapping.
//!
//! Everything in it may change at any moment, so nothing of it is ever lent out as a Rust reference: words are read and
//! written atomically, longer parts are copied. The seals keep whoever has the descriptor from making the file shorter, so
//! no access can fault.

#![expect(unsafe_code, reason = "maps shared memory and copies from and to it")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::base::{Error, ErrorKind, Result};

/// A mapping of a memfd, shared with whoever else has its descriptor.
pub struct SharedMap {
    base: *mut u8,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping lives as long as the value and is only accessed by atomic words and by copying.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl fmt::Debug for SharedMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMap({} bytes)", self.len)
    }
}

impl SharedMap {
    /// New zeroed memory of `len` bytes whose size cannot change any more. Its pages are there when this returns.
    pub fn create(len: usize) -> Result<SharedMap> {
        let context = |what: &str| format!("cannot {what} {len} bytes of shared memory");
        // SAFETY: a C string and flags.
        let fd = unsafe {
            libc::memfd_create(c"tidegate-session".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if fd < 0 {
            return Err(Error::io(context("create"), io::Error::last_os_error()));
        }
        // SAFETY: just created, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: no pointers.
        let failed = unsafe {
            libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) != 0
                || libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) != 0
        };
        if failed {
            return Err(Error::io(context("size"), io::Error::last_os_error()));
        }
        SharedMap::map(fd, len, libc::MAP_POPULATE).map_err(|e| Error::io(context("map"), e))
    }

    /// Maps the first `len` bytes of memory that another process made with [`SharedMap::create`].
    pub fn open(fd: OwnedFd, len: usize) -> Result<SharedMap> {
        // SAFETY: no pointers.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        let file = std::fs::File::from(fd);
        let size = file.metadata().map_err(|e| Error::io("cannot look at shared memory", e))?.len();
        if seals & libc::F_SEAL_SHRINK == 0 || seals < 0 || size < len as u64 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("shared memory of {size} bytes where a sealed one of {len} was announced"),
            ));
        }
        SharedMap::map(file.into(), len, 0).map_err(|e| Error::io("cannot map shared memory", e))
    }

    fn map(fd: OwnedFd, len: usize, flags: libc::c_int) -> io::Result<SharedMap> {
        assert!(len > 0 && len.is_multiple_of(8));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED | flags, fd.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedMap { base: base.cast(), len, fd })
    }

    /// Size in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Address of the first byte, for programs in other languages. What is there may change at any time.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// The descriptor, to be handed to the other process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Gives the memory back to the machine, whoever else still has it mapped; it reads as zeroes from now on.
    pub fn give_back(&self) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no pointers. The mapping stays; its pages come anew, zeroed, when somebody touches them. That it may not
        // work is no harm: the memory is given back when the last mapping goes.
        let _ = unsafe { libc::fallocate(self.fd.as_raw_fd(), mode, 0, self.len as libc::off_t) };
    }

    /// The word of eight bytes at byte `at`, a multiple of 8.
    #[must_use]
    pub fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at <= self.len - 8);
        // SAFETY: in bounds and aligned (mappings begin at a page); atomics may be shared with other processes.
        unsafe { &*self.base.add(at).cast::<AtomicU64>() }
    }

    /// The word of four bytes at byte `at`, a multiple of 4.
    #[must_use]
    pub fn flag(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at <= self.len - 4);
        // SAFETY: as in `word`.
        unsafe { &*self.base.add(at).cast::<AtomicU32>() }
    }

    /// The structure at byte `at`, each of its words read once. Its size is a multiple of 8.
    #[must_use]
    pub fn image<T: FromBytes + IntoBytes>(&self, at: usize) -> T {
        let mut image = T::new_zeroed();
        for (i, bytes) in image.as_mut_bytes().chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&self.word(at + 8 * i).load(Ordering::Relaxed).to_ne_bytes());
        }
        image
    }

    /// Puts a structure at byte `at`, word by word. Its size is a multiple of 8.
    pub fn put_image<T: IntoBytes + Immutable>(&self, at: usize, image: &T) {
        for (i, bytes) in image.as_bytes().chunks_exact(8).enumerate() {
            let word = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
            self.word(at + 8 * i).store(word, Ordering::Relaxed);
        }
    }

    /// Copies out from byte `at`.
    pub fn copy_out(&self, at: usize, into: &mut [u8]) {
        assert!(at <= self.len && into.len() <= self.len - at);
        // SAFETY: in bounds; `into` is private memory. The other process may write meanwhile: then the bytes are any
        // mixture, which whoever uses them must take as they are.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), into.as_mut_ptr(), into.len()) };
    }

    /// Copies in to byte `at`.
    pub fn copy_in(&self, at: usize, from: &[u8]) {
        assert!(at <= self.len && from.len() <= self.len - at);
        // SAFETY: as in `copy_out`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.add(at), from.len()) };
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this address and length, and nothing borrows it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_see_one_memory_and_none_can_shrink_it() {
        let ours = SharedMap::create(8192).unwrap();
        let fd = ours.fd().try_clone_to_owned().unwrap();
        let file = std::fs::File::from(fd.try_clone().unwrap());
        assert!(file.set_len(4096).is_err() && file.set_len(1 << 20).is_err());
        let theirs = SharedMap::open(fd, 8192).unwrap();
        ours.copy_in(4000, &[7; 200]);
        let mut seen = [0; 200];
        theirs.copy_out(4000, &mut seen);
        assert_eq!(seen, [7; 200]);
        theirs.word(8).store(5, Ordering::Release);
        assert_eq!(ours.image::<[u64; 2]>(0), [0, 5]);
    }

    #[test]
    fn memory_that_can_shrink_or_is_too_small_is_refused() {
        let sealed = SharedMap::create(4096).unwrap();
        assert!(SharedMap::open(sealed.fd().try_clone_to_owned().unwrap(), 8192).is_err());
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(4096).unwrap();
        assert!(SharedMap::open(plain.into(), 4096).is_err());
    }
}
