//! Paths of devices as they are kept: absolute, and stable where the user gave a stable one.

use std::fs;
use std::path::{Component, Path, PathBuf};

use tidegate_driver::base::{Error, ErrorKind, Result};

/// Absolute form of `path`: its directory resolved, its last part kept. So `/dev/disk/by-id/…` stays what it is,
/// whatever it leads to today.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    let name = match path.components().next_back() {
        Some(Component::Normal(name)) => name,
        _ => {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("'{}' is not the path of a device or file", path.display()),
            ));
        }
    };
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = fs::canonicalize(dir).map_err(|e| {
        Error::io(format!("the directory {} of {} cannot be used", dir.display(), path.display()), e)
    })?;
    let whole = dir.join(name);
    if whole.to_str().is_none_or(|text| text.contains('\n')) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("'{}' is not UTF-8 on one line: use a link with a plainer name", path.display()),
        ));
    }
    Ok(whole)
}

/// Whether something is at `path` (a dangling link is an error: a file made there would be elsewhere).
pub fn exists(path: &Path) -> Result<bool> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            if fs::symlink_metadata(path).is_ok() {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("{} is a link that leads nowhere: correct it or remove it", path.display()),
                ));
            }
            if path.starts_with("/dev") && !path.starts_with("/dev/shm") {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!(
                        "there is no device {}: check the name (files are not made in /dev)",
                        path.display()
                    ),
                ));
            }
            Ok(false)
        }
        Err(e) => Err(Error::io(format!("cannot look at {}", path.display()), e)),
    }
}

/// The program that runs: what is at its path now, so that a restarted server is the upgraded one, or else itself.
pub fn own_executable() -> PathBuf {
    std::env::current_exe().ok().filter(|path| path.exists()).unwrap_or_else(|| "/proc/self/exe".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_keep_their_name_and_directories_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(dir.path()).unwrap();
        fs::write(real.join("disk"), b"").unwrap();
        std::os::unix::fs::symlink("disk", real.join("by-id")).unwrap();
        let through = real.join("../").join(real.file_name().unwrap()).join("by-id");
        assert_eq!(absolute(&through).unwrap(), real.join("by-id"));
        for bad in ["", "/", "..", "x/.."] {
            assert_eq!(absolute(Path::new(bad)).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
        assert_eq!(absolute(&real.join("no/such")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn missing_devices_and_dangling_links_are_no_files_to_make() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        assert!(exists(&dir.path().join("link")).is_err());
        assert!(exists(Path::new("/dev/no-such-disk")).is_err());
        assert!(!exists(&dir.path().join("new")).unwrap());
    }
}
