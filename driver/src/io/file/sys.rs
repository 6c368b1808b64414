//! The system calls behind [`super::FileDisk`] that have no safe wrapper.

#![expect(unsafe_code, reason = "two ioctls and statx have no safe wrapper among the dependencies")]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Direct-I/O alignment of a file, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlign {
    pub(super) memory: u32,
    pub(super) offset: u32,
}

/// Logical and physical block size of a block device.
pub(super) fn block_sizes(file: &File) -> io::Result<(u32, u32)> {
    let mut logical: libc::c_int = 0;
    let mut physical: libc::c_uint = 0;
    // SAFETY: BLKSSZGET stores one int and BLKPBSZGET one unsigned int at the address given; both point to live
    // locals of that type, and the descriptor is open for as long as `file` is borrowed.
    let failed = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut logical) != 0
            || libc::ioctl(file.as_raw_fd(), libc::BLKPBSZGET, &raw mut physical) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    let logical = u32::try_from(logical).map_err(|_| io::Error::other("negative block size"))?;
    Ok((logical, physical.max(logical)))
}

/// Direct-I/O alignment of a regular file: `None` if the kernel does not say, `Some(None)` if it says that there is
/// no direct I/O.
pub(super) fn direct_align(file: &File) -> Option<Option<DirectAlign>> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, which AT_EMPTY_PATH makes mean the descriptor; the result goes to a live
    // buffer of the type the call fills, and all-zero bytes are a valid `statx`.
    let stat = unsafe {
        let rc = libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        );
        if rc != 0 {
            return None;
        }
        stat.assume_init()
    };
    if stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let align = DirectAlign { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align };
    Some((align.memory != 0 && align.offset != 0).then_some(align))
}
