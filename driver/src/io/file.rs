//! Blocking access to block devices and files: [`FileDisk`].
//!
//! - Direct I/O where the file system has it (`statx` tells, a trial read decides), else the page cache; durable after
//!   `sync` either way.
//! - Any offset and length: what is not aligned for direct I/O goes through a bounce buffer, partial blocks are read,
//!   changed and written back.
//! - One owner: an exclusive `flock`, and for block devices also `O_EXCL`, both held by the open file description for as
//!   long as the disk lives. Mounted devices are refused by the same means.
//! - Length: whole blocks. Bytes of a file beyond its last whole block do not exist here.

mod batch;
mod create;
mod holders;
mod sys;
#[cfg(test)]
mod tests;

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use create::{Fill, create_file, sync_dir_of};
pub use holders::{is_swap, look_below, loop_devices_of, major_minor, mount_points, overlap, stacked_on};

use super::buffer::{AlignedBuf, BUFFER_ALIGN};
use super::disk::Disk;
use crate::base::limits::BLOCK_BYTES_MAX;
use crate::base::units::{align_down, align_up};
use crate::base::{Error, ErrorKind, Result};

/// How long opening waits for a lock: a killed process's requests in flight hold its descriptors for a moment, and so
/// does `udev` while it looks at a device.
pub const LOCK_WAIT: Duration = Duration::from_secs(3);
/// Largest bounce buffer.
const BOUNCE_BYTES: usize = 1 << 20;
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// What may be done through a [`FileDisk`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read; writes fail.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Who else may have it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Anybody; for looking only.
    None,
    /// Other readers that lock it shared, nobody who locks it exclusively. Waits at most this long.
    Shared(Duration),
    /// Nobody else who locks, no mount. Waits at most this long.
    Exclusive(Duration),
}

/// What makes two paths the same thing, whatever links lead there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A block device.
    Device {
        /// Its device number.
        rdev: u64,
    },
    /// A regular file.
    File {
        /// Device number of its file system.
        dev: u64,
        /// Its inode number.
        ino: u64,
    },
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        if metadata.file_type().is_block_device() {
            Identity::Device { rdev: metadata.rdev() }
        } else {
            Identity::File { dev: metadata.dev(), ino: metadata.ino() }
        }
    }

    /// Identity of what `path` leads to, symbolic links followed.
    pub fn of_path(path: &Path) -> Result<Identity> {
        std::fs::metadata(path)
            .map(|m| Identity::of(&m))
            .map_err(|e| Error::io(format!("cannot look at {}", path.display()), e))
    }
}

/// What a device can do besides reading and writing. A file's file system may still refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// It can forget ranges.
    pub discard: bool,
    /// It can zero ranges without a transfer of zeroes.
    pub write_zeroes: bool,
    /// It has a volatile write cache, so that a sync costs something.
    pub volatile_cache: bool,
}

/// A block device or a regular file.
#[derive(Debug)]
pub struct FileDisk {
    file: Arc<File>,
    path: PathBuf,
    identity: Identity,
    direct: bool,
    len_bytes: AtomicU64,
    block_bytes: u32,
    preferred_block_bytes: u32,
}

impl FileDisk {
    /// Opens `path` for reading and writing, for ourselves alone.
    pub fn open_exclusive(path: &Path) -> Result<FileDisk> {
        FileDisk::open(path, Access::ReadWrite, Lock::Exclusive(LOCK_WAIT))
    }

    /// Opens `path` for reading without asking whether others write to it.
    pub fn open_to_look(path: &Path) -> Result<FileDisk> {
        FileDisk::open(path, Access::Read, Lock::None)
    }

    /// Opens the block device or regular file at `path`.
    pub fn open(path: &Path, access: Access, lock: Lock) -> Result<FileDisk> {
        let metadata = std::fs::metadata(path).map_err(|e| open_error(path, access, e))?;
        let kind = metadata.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(not_a_disk(path, &metadata));
        }
        if matches!(lock, Lock::Exclusive(_)) {
            refuse_if_used(path, Identity::of(&metadata))?;
        }
        let deadline = match lock {
            Lock::None => Instant::now(),
            Lock::Shared(wait) | Lock::Exclusive(wait) => Instant::now() + wait,
        };
        let (file, direct) = open_until(path, access, lock, kind.is_block_device(), deadline)?;
        take_lock(&file, path, lock, deadline)?;
        FileDisk::from_file(file, path, direct)
    }

    fn from_file(file: File, path: &Path, direct: bool) -> Result<FileDisk> {
        let fail = |what: &str, e| Error::io(format!("cannot {what} of {}", path.display()), e);
        // Of what was opened, not of what the path leads to by now.
        let metadata = file.metadata().map_err(|e| fail("read the metadata", e))?;
        let identity = Identity::of(&metadata);
        let (direct, block_bytes, preferred_block_bytes) = match identity {
            Identity::Device { .. } => {
                let (logical, physical) =
                    sys::block_sizes(&file).map_err(|e| fail("read the block size", e))?;
                (direct, logical, physical.min(BLOCK_BYTES_MAX))
            }
            Identity::File { .. } => match direct_align_of(&file, direct) {
                Some(align) => (true, align, BLOCK_BYTES_MAX),
                None => {
                    leave_direct(&file, direct).map_err(|e| fail("change the mode", e))?;
                    (false, BLOCK_BYTES_MAX, BLOCK_BYTES_MAX)
                }
            },
        };
        if !block_bytes.is_power_of_two() || block_bytes > BLOCK_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{} has blocks of {block_bytes} bytes; {BLOCK_BYTES_MAX} is the largest that can be used: format \
                     the device with smaller blocks or use another",
                    path.display()
                ),
            ));
        }
        let disk = FileDisk {
            file: Arc::new(file),
            path: path.to_owned(),
            identity,
            direct,
            len_bytes: AtomicU64::new(0),
            block_bytes,
            preferred_block_bytes: preferred_block_bytes.max(block_bytes),
        };
        disk.refresh_len()?;
        Ok(disk)
    }

    /// Asks for the size again (it may have been changed by `resize2fs`-like means) and returns it.
    pub fn refresh_len(&self) -> Result<u64> {
        use std::io::Seek;
        let bytes = match self.identity {
            // The end of a block device is where seeking to it leads; nothing else here uses the position.
            Identity::Device { .. } => (&*self.file).seek(io::SeekFrom::End(0)),
            Identity::File { .. } => self.file.metadata().map(|m| m.len()),
        }
        .map_err(|e| self.error("find out the size of", 0, 0, e))?;
        let whole = align_down(bytes, u64::from(self.block_bytes));
        self.len_bytes.store(whole, Ordering::Release);
        Ok(whole)
    }

    /// Makes a regular file at least `bytes` long; the new part is a hole. Devices stay as they are.
    pub fn grow_file(&self, bytes: u64) -> Result<()> {
        if self.is_block_device() || self.refresh_len()? >= bytes {
            return Ok(());
        }
        self.file
            .set_len(bytes)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.error("enlarge", 0, 0, e))?;
        self.refresh_len().map(|_| ())
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same, called `path` in messages; for disks that were opened by a path that means nothing to people.
    #[must_use]
    pub fn called(mut self, path: &Path) -> FileDisk {
        path.clone_into(&mut self.path);
        self
    }

    /// The open file, for registration with a ring. Its lock lives as long as any copy of the description.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// What it is, whatever path leads there.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether memory, offsets and lengths must be aligned for requests through [`FileDisk::file`].
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        matches!(self.identity, Identity::Device { .. })
    }

    /// What it can do besides reading and writing.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        match self.identity {
            Identity::Device { rdev } => {
                let more_than_none = |file| holders::queue_limit(rdev, file).is_some_and(|v| v > 0);
                Capabilities {
                    discard: more_than_none("discard_max_bytes"),
                    write_zeroes: more_than_none("write_zeroes_max_bytes"),
                    volatile_cache: holders::has_volatile_cache(rdev),
                }
            }
            Identity::File { .. } => Capabilities { discard: true, write_zeroes: true, volatile_cache: true },
        }
    }

    fn error(&self, what: &str, offset: u64, len: usize, e: io::Error) -> Error {
        let at = if len > 0 { format!(" ({len} bytes at offset {offset})") } else { String::new() };
        Error::io(format!("cannot {what} {}{at}", self.path.display()), e)
    }

    fn check_range(&self, what: &str, offset: u64, len: usize) -> Result<()> {
        let end = offset.checked_add(len as u64);
        if end.is_some_and(|end| end <= self.len_bytes()) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "cannot {what} {} ({len} bytes at offset {offset}): it ends at {}",
                self.path.display(),
                self.len_bytes()
            ),
        ))
    }

    fn is_aligned(&self, offset: u64, buf: &[u8]) -> bool {
        let block = u64::from(self.block_bytes);
        !self.direct
            || (offset.is_multiple_of(block)
                && (buf.len() as u64).is_multiple_of(block)
                && buf.as_ptr().addr().is_multiple_of(BUFFER_ALIGN))
    }

    fn read_whole(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len();
        self.file.read_exact_at(buf, offset).map_err(|e| {
            if e.kind() == io::ErrorKind::UnexpectedEof {
                let message = format!(
                    "cannot read {} ({len} bytes at offset {offset}): it has become shorter than the {} bytes it had \
                     when it was opened",
                    self.path.display(),
                    self.len_bytes()
                );
                return Error::new(ErrorKind::WrongDevice, message);
            }
            self.error("read", offset, len, e)
        })
    }

    /// Runs `each` over the aligned pieces that cover `len` bytes at `offset`. It gets the start of the piece, a bounce
    /// buffer of its length, and which bytes of the buffer are which bytes of the caller's.
    fn pieces(
        &self,
        offset: u64,
        len: usize,
        mut each: impl FnMut(u64, &mut [u8], std::ops::Range<usize>, std::ops::Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let block = u64::from(self.block_bytes);
        let end = offset + len as u64;
        let mut at = align_down(offset, block);
        let stop = align_up(end, block);
        let mut bounce = AlignedBuf::zeroed(BOUNCE_BYTES.min((stop - at) as usize));
        while at < stop {
            let piece = (stop - at).min(bounce.len() as u64);
            let (from, to) = (offset.max(at), end.min(at + piece));
            let inside = (from - at) as usize..(to - at) as usize;
            let callers = (from - offset) as usize..(to - offset) as usize;
            each(at, &mut bounce[..piece as usize], inside, callers)?;
            at += piece;
        }
        Ok(())
    }
}

impl Disk for FileDisk {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range("read", offset, buf.len())?;
        if buf.is_empty() {
            return Ok(());
        }
        if self.is_aligned(offset, buf) {
            return self.read_whole(offset, buf);
        }
        self.pieces(offset, buf.len(), |at, bounce, inside, callers| {
            self.read_whole(at, bounce)?;
            buf[callers].copy_from_slice(&bounce[inside]);
            Ok(())
        })
    }

    fn read_each(
        &self,
        places: &[(u64, usize)],
        take: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        batch::read_each(self, places, take)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_range("write", offset, data.len())?;
        let write = |at: u64, bytes: &[u8]| {
            self.file.write_all_at(bytes, at).map_err(|e| self.error("write", at, bytes.len(), e))
        };
        if data.is_empty() {
            return Ok(());
        }
        if self.is_aligned(offset, data) {
            return write(offset, data);
        }
        let block = self.block_bytes as usize;
        self.pieces(offset, data.len(), |at, bounce, inside, callers| {
            // Only blocks at the edges hold bytes of others.
            if !inside.start.is_multiple_of(block) {
                self.read_whole(at, &mut bounce[..block])?;
            }
            if !inside.end.is_multiple_of(block) {
                let last = bounce.len() - block;
                if last > 0 || inside.start.is_multiple_of(block) {
                    self.read_whole(at + last as u64, &mut bounce[last..])?;
                }
            }
            bounce[inside].copy_from_slice(&data[callers]);
            write(at, bounce)
        })
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.error("sync", 0, 0, e))
    }

    fn drop_cache(&self) -> Result<()> {
        if self.direct {
            return Ok(());
        }
        // A page whose write-back failed is clean and newer than the device. A file that cannot be synced was opened to look.
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        let _ = self.sync();
        nix::fcntl::posix_fadvise(&*self.file, 0, 0, advice)
            .map_err(|e| self.error("drop the cache of", 0, 0, e.into()))
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes.load(Ordering::Acquire)
    }

    fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    fn preferred_block_bytes(&self) -> u32 {
        self.preferred_block_bytes
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

impl AsFd for FileDisk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Message for a path that cannot be opened.
fn open_error(path: &Path, access: Access, e: io::Error) -> Error {
    let shown = path.display();
    match e.raw_os_error() {
        Some(libc::ENOENT) => Error::io(format!("{shown} does not exist: check the path"), e),
        Some(libc::EROFS) => Error::io(format!("{shown} cannot be written: make it writable"), e),
        Some(libc::EACCES | libc::EPERM) => {
            let what = if access == Access::Read { "read" } else { "read and written" };
            Error::io(format!("{shown} cannot be {what}: run as root or change its permissions"), e)
        }
        _ => Error::io(format!("cannot open {shown}"), e),
    }
}

fn not_a_disk(path: &Path, metadata: &Metadata) -> Error {
    let kind = metadata.file_type();
    let what = if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "a pipe or socket"
    };
    Error::new(
        ErrorKind::Invalid,
        format!("{} is {what}: name a block device or a regular file", path.display()),
    )
}

/// Refuses what is in use in a way that waiting does not end.
fn refuse_if_used(path: &Path, identity: Identity) -> Result<()> {
    let busy = |by: String, what_to_do: &str| {
        Err(Error::new(ErrorKind::Busy, format!("{} is in use: {by}; {what_to_do}", path.display())))
    };
    match identity {
        Identity::Device { rdev } => {
            let mounts = mount_points(rdev);
            if !mounts.is_empty() {
                return busy(format!("mounted on {}", mounts.join(", ")), "unmount it or use another device");
            }
            if is_swap(rdev) {
                return busy("it is swap space".into(), "switch it off with swapoff or use another device");
            }
            let stacked = stacked_on(rdev);
            if !stacked.is_empty() {
                return busy(
                    format!("/dev/{} is made of it", stacked.join(", /dev/")),
                    "use that, or take it apart",
                );
            }
        }
        Identity::File { .. } => {
            let loops = loop_devices_of(identity);
            if !loops.is_empty() {
                return busy(
                    format!("it is the file of /dev/{}", loops.join(", /dev/")),
                    "detach that with losetup -d or use another file",
                );
            }
        }
    }
    Ok(())
}

fn options(access: Access, flags: i32) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::ReadWrite).custom_flags(flags | libc::O_CLOEXEC);
    options
}

/// Opens it, direct if possible; while somebody else has a block device for himself, tries again until `deadline`.
fn open_until(
    path: &Path,
    access: Access,
    lock: Lock,
    is_block_device: bool,
    deadline: Instant,
) -> Result<(File, bool)> {
    let exclusive = is_block_device && matches!(lock, Lock::Exclusive(_));
    let flags = if exclusive { libc::O_EXCL } else { 0 };
    let mut direct = libc::O_DIRECT;
    loop {
        match options(access, flags | direct).open(path) {
            Ok(file) => return Ok((file, direct != 0)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && direct != 0 => direct = 0,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Err(locked(path, None)),
            Err(e) => return Err(open_error(path, access, e)),
        }
    }
}

fn locked(path: &Path, file: Option<&File>) -> Error {
    let holder = file.and_then(|f| f.metadata().ok()).and_then(|m| holders::lock_holder(&m));
    let by = match holder {
        Some((pid, name)) => format!("process {pid} ({name})"),
        None => "another process, or a partition of it is mounted".into(),
    };
    Error::new(
        ErrorKind::Busy,
        format!(
            "{} is in use by {by}: only one server may use it; stop the other or use another device",
            path.display()
        ),
    )
}

fn take_lock(file: &File, path: &Path, lock: Lock, deadline: Instant) -> Result<()> {
    loop {
        let taken = match lock {
            Lock::None => return Ok(()),
            Lock::Shared(_) => file.try_lock_shared(),
            Lock::Exclusive(_) => file.try_lock(),
        };
        match taken {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
            Err(TryLockError::WouldBlock) => return Err(locked(path, Some(file))),
            Err(TryLockError::Error(e)) => {
                return Err(Error::io(format!("cannot lock {}", path.display()), e));
            }
        }
    }
}

/// Alignment for direct I/O on a regular file opened with `O_DIRECT`, or `None` if there is no use in it.
fn direct_align_of(file: &File, opened_direct: bool) -> Option<u32> {
    if !opened_direct {
        return None;
    }
    let align = match sys::direct_align(file) {
        Some(None) => return None,
        Some(Some(align)) if align.memory as usize > BUFFER_ALIGN => return None,
        Some(Some(align)) => align.offset.max(512),
        None => BLOCK_BYTES_MAX,
    };
    if !align.is_power_of_two() || align > BLOCK_BYTES_MAX {
        return None;
    }
    // Some file systems take the flag and then fail the transfers.
    let mut trial = AlignedBuf::zeroed(align as usize);
    file.read_at(&mut trial, 0).ok().map(|_| align)
}

/// Switches an open file to the page cache.
fn leave_direct(file: &File, opened_direct: bool) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    if opened_direct {
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
        fcntl(file, FcntlArg::F_SETFL(flags & !OFlag::O_DIRECT))?;
    }
    Ok(())
}
