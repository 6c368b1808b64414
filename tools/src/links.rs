//! Stable names of devices: `/dev/tidegate/NAME` leads to the device of volume NAME while there is one.
//!
//! The server makes and removes them, so that they are there on every machine, for every state directory. The udev rule
//! makes the same links for the volumes of the usual state directory, for systemd waits only for links that udev knows.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_ublk::info::block_path;

use crate::registry::Registry;
use crate::{engine, report};

const DIR: &str = "/dev/tidegate";

/// Path of the link of a volume.
pub fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

/// Where the link leads, in udev's words: relative.
fn target(device_id: u32) -> PathBuf {
    PathBuf::from(format!("../ublkb{device_id}"))
}

/// Makes the link. A device without one is served all the same.
pub fn make(name: &str, device_id: u32) {
    if let Err(e) = make_in(Path::new(DIR), name, device_id) {
        tracing::warn!("cannot make {}: {e}; use {}", path(name).display(), block_path(device_id).display());
    }
}

fn make_in(dir: &Path, name: &str, device_id: u32) -> io::Result<()> {
    let (link, target) = (dir.join(name), target(device_id));
    if fs::read_link(&link).is_ok_and(|there| there == target) {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    // Replaced in one step: a dead server's link, or one of a volume of this name under another state directory.
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    symlink(&target, &temporary)?;
    fs::rename(&temporary, &link)
}

/// Removes the link if it leads to this device.
pub fn remove(name: &str, device_id: u32) {
    remove_in(Path::new(DIR), name, device_id);
}

fn remove_in(dir: &Path, name: &str, device_id: u32) {
    let link = dir.join(name);
    if fs::read_link(&link).is_ok_and(|there| there == target(device_id)) {
        // Gone already: udev was faster.
        let _ = fs::remove_file(&link);
        let _ = fs::remove_dir(dir);
    }
}

/// The link of a volume, if it is there and leads to this device.
pub fn of(name: &str, device_id: u32) -> Option<PathBuf> {
    let rdev = |path: &Path| fs::metadata(path).ok().map(|m| m.rdev());
    let link = path(name);
    let found = rdev(&link)?;
    (rdev(&block_path(device_id)) == Some(found)).then_some(link)
}

/// `link-of`, for udev: the link of the block device that the kernel calls `kernel_name`, from `/dev`.
pub fn run(registry: &Registry, kernel_name: &str) -> Result<ExitCode> {
    let none =
        || Error::new(ErrorKind::NotFound, format!("{kernel_name} is no device of a volume known here"));
    let device_id = kernel_name.strip_prefix("ublkb").and_then(|n| n.parse().ok()).ok_or_else(none)?;
    // Asked while the kernel starts the device: this question waits for nothing.
    let identity = tidegate_ublk::state(device_id)?.identity;
    let entries = registry.entries()?;
    let entry = entries.iter().find(|e| engine::identity_of(e.volume_uuid) == identity).ok_or_else(none)?;
    report::line(format!("tidegate/{}", entry.name))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_made_replaced_and_only_the_own_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("tidegate");
        make_in(&dir, "db", 3).unwrap();
        make_in(&dir, "db", 3).unwrap();
        assert_eq!(fs::read_link(dir.join("db")).unwrap(), Path::new("../ublkb3"));
        make_in(&dir, "db", 4).unwrap();
        remove_in(&dir, "db", 3);
        assert_eq!(fs::read_link(dir.join("db")).unwrap(), Path::new("../ublkb4"));
        remove_in(&dir, "db", 4);
        assert!(!dir.exists(), "nothing is left");
    }
}
