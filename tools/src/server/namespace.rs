//! The server's view of the file system.
//!
//! A server has mounts of its own, for one that shares them with a mount of its device may never end. But a copy of a
//! mount keeps what is mounted there busy, long after it was unmounted everywhere else: a server that starts while its
//! device is mounted could never let go of it. So it drops every mount that it does not need. What it opens later, stages
//! and backings, it reaches through the root directory that it had before, where all mounts are.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::mount::{MntFlags, umount2};
use tidegate_driver::base::{Error, Result};
use tidegate_driver::io::FileDisk;
use tidegate_driver::io::file::look_below;
use tidegate_ublk::process::harden;

/// The root directory as it was before, if there is an own namespace.
static OUTSIDE: OnceLock<File> = OnceLock::new();

/// Makes the process one that may serve a device. `needed`: paths that it goes on using as they are.
pub fn prepare(needed: &[&Path]) {
    let outside = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open("/");
    let hardened = harden();
    for warning in &hardened.warnings {
        tracing::warn!("{warning}");
    }
    if !hardened.own_mounts {
        // Dropping mounts would drop everybody's.
        return;
    }
    // Mounts are compared by name: the links, and where they lead.
    let needed: Vec<PathBuf> = needed.iter().flat_map(|path| [path.to_path_buf(), resolved(path)]).collect();
    match outside {
        Ok(root) => {
            // The kernel names the files of loop devices by their paths there.
            look_below(below(&root, Path::new("/")));
            // Set once: a process prepares itself once.
            let _ = OUTSIDE.set(root);
            drop_mounts(&needed);
        }
        Err(e) => tracing::warn!("cannot keep the root directory: {e}; mounts made before stay busy"),
    }
}

/// The path without links; of one that does not exist yet, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for prefix in whole.ancestors() {
        if let (Ok(real), Ok(rest)) = (fs::canonicalize(prefix), whole.strip_prefix(prefix)) {
            return if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        }
    }
    whole
}

fn drop_mounts(needed: &[PathBuf]) {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    // The last mounted first: those below others before them.
    for point in mount_points(&table).iter().rev() {
        if is_needed(point, needed) {
            continue;
        }
        if let Err(e) = umount2(point, MntFlags::MNT_DETACH) {
            tracing::debug!("the mount on {} stays: {e}", point.display());
        }
    }
}

/// Whether a path that is needed leads through the mount on `point`.
fn is_needed(point: &Path, needed: &[PathBuf]) -> bool {
    let always = ["/proc", "/sys", "/dev", "/dev/shm"].map(Path::new);
    always.into_iter().chain(needed.iter().map(PathBuf::as_path)).any(|path| path.starts_with(point))
}

/// Mount points in the text of a `mountinfo` file, in its order.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    table
        .split(|&b| b == b'\n')
        .filter_map(|line| line.split(|&b| b == b' ').nth(4))
        .map(|field| PathBuf::from(OsStr::from_bytes(&unescape(field))))
        .collect()
}

/// Undoes the octal escapes of `/proc` files (`\040` for a space).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).filter(|_| *first == b'\\').and_then(|c| std::str::from_utf8(c).ok());
        match code.and_then(|c| u8::from_str_radix(c, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// Opens a device or file for this server alone, wherever it is mounted.
pub fn open_exclusive(path: &Path) -> Result<FileDisk> {
    let Some(root) = OUTSIDE.get() else { return FileDisk::open_exclusive(path) };
    // Links with absolute targets would lead into this namespace: followed by their text, one after the other.
    let mut target = path.to_owned();
    for _ in 0..40 {
        let outside = below(root, &target);
        match fs::read_link(&outside) {
            Ok(link) => target = target.parent().unwrap_or(Path::new("/")).join(link),
            Err(_) => {
                let opened = FileDisk::open_exclusive(&outside);
                return opened.map(|disk| disk.called(path)).map_err(|e| rename(&e, &outside, path));
            }
        }
    }
    Err(Error::io(format!("cannot open {}", path.display()), std::io::Error::from_raw_os_error(libc::ELOOP)))
}

fn below(root: &File, path: &Path) -> PathBuf {
    let mut outside = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    outside.push(path.strip_prefix("/").unwrap_or(path));
    outside
}

/// The error with the path that people know.
fn rename(e: &Error, from: &Path, to: &Path) -> Error {
    Error::new(e.kind(), e.report().replace(&from.display().to_string(), &to.display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_needed_paths_lead_through_are_kept() {
        let table = b"1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /var rw - xfs b rw\n3 1 9:1 / /mnt/my\\040disk rw - xfs c rw\n\
                      4 1 0:5 / /dev rw - devtmpfs d rw\n5 4 0:6 / /dev/pts rw - devpts e rw\n";
        let points = mount_points(table);
        assert_eq!(points[2], Path::new("/mnt/my disk"));
        let state = [PathBuf::from("/var/lib/tidegate")];
        let kept: Vec<_> = points.iter().filter(|p| is_needed(p, &state)).collect();
        assert_eq!(kept, [Path::new("/"), Path::new("/var"), Path::new("/dev")]);
        assert!(!is_needed(Path::new("/va"), &state), "whole names only");
    }

    #[test]
    fn links_in_needed_paths_are_followed_as_far_as_they_exist() {
        let dir = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(real.join("far")).unwrap();
        std::os::unix::fs::symlink("far", real.join("near")).unwrap();
        assert_eq!(resolved(&real.join("near/a/b")), real.join("far/a/b"));
        assert_eq!(resolved(&real.join("near")), real.join("far"));
    }

    #[test]
    fn without_a_namespace_paths_are_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, vec![0; 8192]).unwrap();
        assert_eq!(open_exclusive(&path).unwrap().path(), path);
    }

    #[test]
    fn files_are_reached_through_a_kept_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk"), b"x").unwrap();
        let root = File::open("/").unwrap();
        assert_eq!(fs::read(below(&root, &dir.path().join("disk"))).unwrap(), b"x");
    }
}
