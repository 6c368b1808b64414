//! Making files: whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::linkat;

use super::super::buffer::AlignedBuf;
use crate::base::{Error, ErrorKind, Result};

/// What a new file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Holes: space is taken as it is written. For backings.
    Sparse,
    /// Zeroes in space that is allocated and was written once, so that no later write in place needs a change of
    /// the file system's metadata, which would cost a journal commit per sync. For stages.
    Zeroes,
}

const CHUNK_BYTES: usize = 1 << 20;

/// Creates the file `path` with `bytes` zero bytes; it must not exist. `progress` is told the bytes done and may stop
/// the work by returning false. The name appears only when everything is in place and durable, so neither an error nor a
/// kill leaves half a file behind.
pub fn create_file(path: &Path, bytes: u64, fill: Fill, progress: &mut dyn FnMut(u64) -> bool) -> Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        return Err(exists(path));
    }
    let fail = |what: &str, e: io::Error| {
        let hint = if e.raw_os_error() == Some(libc::ENOENT) { ": make the directory first" } else { "" };
        Error::io(format!("cannot {what} {} ({bytes} bytes){hint}", path.display()), e)
    };
    let dir = dir_of(path);
    let unnamed =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir);
    match unnamed {
        Ok(file) => {
            fill_file(&file, path, bytes, fill, progress)?;
            name_file(&file, path).map_err(|e| fail("name", e))?;
        }
        // The file system, or the kernel below 3.11, has no unnamed files.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
                .map_err(|e| fail("create", e))?;
            fill_file(&file, path, bytes, fill, progress).inspect_err(|_| remove_quietly(path))?;
        }
        Err(e) => return Err(fail("create", e)),
    }
    sync_dir_of(path)
}

/// Makes the directory entry of `path` durable.
pub fn sync_dir_of(path: &Path) -> Result<()> {
    let dir = dir_of(path);
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io(format!("cannot sync the directory {}", dir.display()), e))
}

fn dir_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn exists(path: &Path) -> Error {
    Error::new(ErrorKind::Exists, format!("{} exists already: use another path or remove it", path.display()))
}

fn remove_quietly(path: &Path) {
    if let Err(e) = fs::remove_file(path) {
        tracing::warn!("cannot remove the unfinished {}: {e}", path.display());
    }
}

fn name_file(file: &File, path: &Path) -> io::Result<()> {
    let by_descriptor = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    linkat(AT_FDCWD, &by_descriptor, AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)?;
    Ok(())
}

fn fill_file(
    file: &File,
    path: &Path,
    bytes: u64,
    fill: Fill,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<()> {
    let fail = |what: &str, e: io::Error| {
        let hint =
            if e.raw_os_error() == Some(libc::EFBIG) { ": larger than a file may be here" } else { "" };
        Error::io(format!("cannot {what} {} ({bytes} bytes){hint}", path.display()), e)
    };
    match fill {
        Fill::Sparse => file.set_len(bytes).map_err(|e| fail("set the size of", e))?,
        Fill::Zeroes => {
            refuse_if_no_room(file, path, bytes)?;
            let len = i64::try_from(bytes)
                .map_err(|_| fail("allocate", io::Error::from_raw_os_error(libc::EFBIG)))?;
            match fallocate(file, FallocateFlags::empty(), 0, len) {
                Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => {}
                Err(e) => return Err(fail("allocate", e.into())),
            }
            let zeroes = AlignedBuf::zeroed(CHUNK_BYTES);
            let mut at = 0;
            while at < bytes {
                let len = (bytes - at).min(CHUNK_BYTES as u64) as usize;
                file.write_all_at(&zeroes[..len], at).map_err(|e| fail("fill", e))?;
                at += len as u64;
                if !progress(at) {
                    return Err(fail("fill", io::Error::from_raw_os_error(libc::EINTR)));
                }
            }
        }
    }
    file.sync_all().map_err(|e| fail("sync", e))
}

/// Says no before a large file system is filled up to the last byte for nothing.
fn refuse_if_no_room(file: &File, path: &Path, bytes: u64) -> Result<()> {
    let Ok(stat) = fstatvfs(file) else { return Ok(()) };
    let free = stat.blocks_available() * stat.fragment_size();
    if free >= bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::NoSpace,
        format!(
            "no room for {} ({bytes} bytes): its file system has {free} bytes free; make it smaller or free some space",
            path.display()
        ),
    ))
}
