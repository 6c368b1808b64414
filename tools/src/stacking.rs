//! What lies on what: a stage or a backing that leads to a volume of the same stage would wait for itself.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::io::file::major_minor;
use uuid::Uuid;

use crate::engine::identity_of;

/// Layers that are followed down: deeper stacks are not made by anybody.
const DEPTH_MAX: u32 = 16;

/// Refuses paths that lie on the device of one of `volumes` (names and UUIDs). What does not exist lies on nothing.
pub fn refuse(volumes: &[(String, Uuid)], paths: &[&Path]) -> Result<()> {
    for path in paths {
        for device_id in devices_below(path) {
            let identity = match tidegate_ublk::state(device_id) {
                Ok(device) => device.identity,
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            if let Some((name, _)) = volumes.iter().find(|(_, uuid)| identity_of(*uuid) == identity) {
                let what = format!(
                    "{} lies on /dev/ublkb{device_id}, the device of volume '{name}' of the same stage, which would wait for \
                     itself: use a device or file below it",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Invalid, what));
            }
        }
    }
    Ok(())
}

/// Numbers of the ublk devices that `path` lies on, or is.
fn devices_below(path: &Path) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    if let Some(dir) = block_dir(Path::new("/sys"), path) {
        walk(Path::new("/sys"), &dir, DEPTH_MAX, &mut found);
    }
    found
}

/// Folder below `sys` of the block device at `path`, or of the one that the file system of `path` is on.
fn block_dir(sys: &Path, path: &Path) -> Option<PathBuf> {
    let metadata = fs::metadata(path).ok()?;
    let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    let (major, minor) = major_minor(device);
    fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()
}

fn walk(sys: &Path, dir: &Path, depth: u32, found: &mut BTreeSet<u32>) {
    if depth == 0 {
        return;
    }
    if dir.join("partition").exists() {
        // The disk holds the links to what is below.
        return dir.parent().map_or((), |disk| walk(sys, disk, depth - 1, found));
    }
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    found.extend(name.strip_prefix("ublkb").and_then(|n| n.parse::<u32>().ok()));
    let slaves = fs::read_dir(dir.join("slaves")).into_iter().flatten().flatten();
    let mut below: Vec<PathBuf> = slaves.filter_map(|e| fs::canonicalize(e.path()).ok()).collect();
    if let Ok(file) = fs::read_to_string(dir.join("loop/backing_file")) {
        below.extend(block_dir(sys, Path::new(file.trim_end_matches('\n'))));
    }
    for dir in below {
        walk(sys, &dir, depth - 1, found);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn partitions_mappings_and_loops_are_followed_down() {
        let temporary = tempfile::tempdir().unwrap();
        let sys = fs::canonicalize(temporary.path()).unwrap();
        let dir = |name: &str| {
            let dir = sys.join(name);
            fs::create_dir_all(&dir).unwrap();
            dir
        };
        fs::write(dir("block/ublkb3/ublkb3p1").join("partition"), "1").unwrap();
        symlink(sys.join("block/ublkb3/ublkb3p1"), dir("block/dm-0/slaves").join("ublkb3p1")).unwrap();
        symlink(sys.join("block/dm-0"), dir("block/dm-1/slaves").join("dm-0")).unwrap();
        // A loop device over a file on the mapping.
        let file = sys.join("file");
        fs::write(&file, "").unwrap();
        let (major, minor) = major_minor(fs::metadata(&file).unwrap().dev());
        symlink(sys.join("block/dm-1"), dir("dev/block").join(format!("{major}:{minor}"))).unwrap();
        fs::write(dir("block/loop0/loop").join("backing_file"), format!("{}\n", file.display())).unwrap();
        for (start, expected) in
            [("block/loop0", vec![3]), ("block/dm-0", vec![3]), ("block/ublkb3", vec![3]), ("block", vec![])]
        {
            let mut found = BTreeSet::new();
            walk(&sys, &sys.join(start), DEPTH_MAX, &mut found);
            assert_eq!(found.into_iter().collect::<Vec<_>>(), expected, "{start}");
        }
    }
}
