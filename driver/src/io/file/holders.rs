//! Who else uses a device or file: what the kernel tells under `/proc` and `/sys`, for messages and for refusing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::Identity;

/// Major and minor number of a device number.
#[must_use]
pub fn major_minor(rdev: u64) -> (u64, u64) {
    (libc::major(rdev).into(), libc::minor(rdev).into())
}

/// Folder of a block device under `/sys`.
fn sysfs(rdev: u64) -> PathBuf {
    let (major, minor) = major_minor(rdev);
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// File under the `queue` folder of a block device (of its disk, for a partition) as a number.
#[must_use]
pub fn queue_limit(rdev: u64, file: &str) -> Option<u64> {
    let dir = sysfs(rdev);
    let text = fs::read_to_string(dir.join("queue").join(file))
        .or_else(|_| fs::read_to_string(dir.join("../queue").join(file)))
        .ok()?;
    text.trim().parse().ok()
}

/// Whether a block device has a write cache that loses its content with the power.
#[must_use]
pub fn has_volatile_cache(rdev: u64) -> bool {
    let dir = sysfs(rdev);
    fs::read_to_string(dir.join("queue/write_cache"))
        .or_else(|_| fs::read_to_string(dir.join("../queue/write_cache")))
        .is_ok_and(|text| text.trim() == "write back")
}

/// Undoes the octal escapes of `/proc` files (`\040` for a space).
fn unescape(field: &str) -> String {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let code = bytes.get(i + 1..i + 4).filter(|_| bytes[i] == b'\\');
        match code.and_then(|c| std::str::from_utf8(c).ok()).and_then(|c| u8::from_str_radix(c, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Mount points in the text of a `mountinfo` file of the file systems whose device is `major:minor`.
fn mounts_in(mountinfo: &str, device: &str) -> Vec<String> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            (fields.next()? == device).then(|| fields.nth(1).map(unescape))?
        })
        .collect()
}

/// Where the file system on a block device is mounted, in any mount namespace that has a process we may look at.
#[must_use]
pub fn mount_points(rdev: u64) -> Vec<String> {
    let (major, minor) = major_minor(rdev);
    let device = format!("{major}:{minor}");
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points = mounts_in(&own, &device);
    if points.is_empty() {
        let init = fs::read_to_string("/proc/1/mountinfo").unwrap_or_default();
        points = mounts_in(&init, &device);
    }
    points.dedup();
    points
}

/// Whether a block device is in use as swap space.
#[must_use]
pub fn is_swap(rdev: u64) -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    swaps
        .lines()
        .skip(1)
        .filter_map(|l| l.split_whitespace().next())
        .any(|path| fs::metadata(unescape(path)).is_ok_and(|m| m.rdev() == rdev && rdev != 0))
}

/// Names of the block devices stacked on a block device or on one of its partitions (device mapper, md, bcache).
#[must_use]
pub fn stacked_on(rdev: u64) -> Vec<String> {
    let dir = sysfs(rdev);
    let mut dirs = vec![dir.join("holders")];
    if let Ok(entries) = fs::read_dir(&dir) {
        dirs.extend(
            entries
                .flatten()
                .filter(|e| e.path().join("partition").exists())
                .map(|e| e.path().join("holders")),
        );
    }
    let mut names: Vec<String> = dirs
        .iter()
        .filter_map(|d| fs::read_dir(d).ok())
        .flat_map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Where the root directory is that the paths in `/sys` start from, for a process that sees other mounts than it.
static ROOT: OnceLock<PathBuf> = OnceLock::new();

/// From now on files are looked for below `root` (a path that leads to another root directory). Once a process.
pub fn look_below(root: PathBuf) {
    let _ = ROOT.set(root);
}

/// A path that the kernel gave, which has no links in it, as this process can use it.
fn reachable(root: Option<&PathBuf>, path: &Path) -> PathBuf {
    root.map_or_else(|| path.to_owned(), |root| root.join(path.strip_prefix("/").unwrap_or(path)))
}

/// The loop devices there are, with their files.
fn loop_files() -> Vec<(String, Identity)> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let path = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            let path = reachable(ROOT.get(), Path::new(path.trim_end_matches('\n')));
            let identity = Identity::of_path(&path).ok()?;
            Some((entry.file_name().to_string_lossy().into_owned(), identity))
        })
        .collect()
}

/// Names of the loop devices that present the file `identity`.
#[must_use]
pub fn loop_devices_of(identity: Identity) -> Vec<String> {
    loop_files().into_iter().filter(|(_, file)| *file == identity).map(|(name, _)| name).collect()
}

/// Name of the whole disk that `rdev` is a partition of, or its own name.
fn disk_name(rdev: u64) -> Option<String> {
    let dir = fs::canonicalize(sysfs(rdev)).ok()?;
    let disk = if dir.join("partition").exists() { dir.parent()?.to_path_buf() } else { dir };
    Some(disk.file_name()?.to_string_lossy().into_owned())
}

/// Whether writes to one can change the other although they are not the same: a disk and its partition, a loop device
/// and its file.
#[must_use]
pub fn overlap(a: Identity, b: Identity) -> bool {
    if a == b {
        return true;
    }
    let through_loop = |device: Identity, file: Identity| match device {
        Identity::Device { rdev } => disk_name(rdev)
            .is_some_and(|disk| loop_files().iter().any(|(name, f)| *name == disk && *f == file)),
        Identity::File { .. } => false,
    };
    if through_loop(a, b) || through_loop(b, a) {
        return true;
    }
    match (a, b) {
        (Identity::Device { rdev: a }, Identity::Device { rdev: b }) => {
            let whole = |rdev| !sysfs(rdev).join("partition").exists();
            (whole(a) || whole(b))
                && disk_name(a).is_some_and(|disk| disk_name(b).is_some_and(|other| disk == other))
        }
        _ => false,
    }
}

/// The process that holds a `flock` on the file with this device and inode number, from the text of `/proc/locks`.
fn lock_holder_in(locks: &str, dev: u64, ino: u64) -> Option<u32> {
    let (major, minor) = major_minor(dev);
    let file = format!("{major:02x}:{minor:02x}:{ino}");
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let held = fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&file.as_str());
        held.then(|| fields.get(4).and_then(|pid| pid.parse().ok()))?
    })
}

/// The process that holds a `flock` on the file behind `metadata`, with its name.
#[must_use]
pub fn lock_holder(metadata: &fs::Metadata) -> Option<(u32, String)> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let pid = lock_holder_in(&locks, metadata.dev(), metadata.ino())?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_else(|_| "gone".into());
    Some((pid, name.trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_mount_points_and_unescapes_them() {
        let text = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                    40 22 259:3 / /mnt/my\\040disk rw shared:1 - xfs /dev/nvme0n1p3 rw\n\
                    41 22 259:3 /sub /srv rw - xfs /dev/nvme0n1p3 rw\n";
        assert_eq!(mounts_in(text, "259:3"), ["/mnt/my disk", "/srv"]);
        assert!(mounts_in(text, "8:2").is_empty());
    }

    #[test]
    fn paths_of_the_kernel_are_looked_for_below_the_root_that_was_named() {
        let root = PathBuf::from("/proc/self/fd/3/");
        assert_eq!(reachable(Some(&root), Path::new("/srv/disk")), Path::new("/proc/self/fd/3/srv/disk"));
        assert_eq!(reachable(None, Path::new("/srv/disk")), Path::new("/srv/disk"));
    }

    #[test]
    fn finds_the_holder_of_a_lock() {
        let text =
            "1: POSIX  ADVISORY  WRITE 99 fe:00:77 0 EOF\n2: FLOCK  ADVISORY  WRITE 1234 fe:00:77 0 EOF\n";
        assert_eq!(lock_holder_in(text, libc::makedev(0xfe, 0), 77), Some(1234));
        assert_eq!(lock_holder_in(text, libc::makedev(0xfe, 0), 78), None);
    }

    #[test]
    fn the_root_file_system_is_mounted() {
        let root = fs::metadata("/").unwrap();
        if fs::metadata("/proc/self/mountinfo").is_err() {
            eprintln!("SKIPPED: no /proc");
            return;
        }
        // Not every root file system has a device number that mountinfo repeats (btrfs does not).
        let points = mount_points(root.dev());
        assert!(points.is_empty() || points.contains(&"/".to_owned()), "{points:?}");
    }
}
