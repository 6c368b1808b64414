use std::os::unix::fs::symlink;

use tempfile::{TempDir, tempdir};

use super::*;

fn dir() -> TempDir {
    tempdir().expect("a temporary directory")
}

fn no_progress() -> impl FnMut(u64) -> bool {
    |_| true
}

fn file_of(dir: &TempDir, name: &str, bytes: u64) -> PathBuf {
    let path = dir.path().join(name);
    create_file(&path, bytes, Fill::Sparse, &mut no_progress()).unwrap();
    path
}

/// Every odd range gives what a plain vector gives, on direct and on buffered files alike.
fn any_alignment_matches_a_vector(path: &Path) {
    const LEN: usize = 3 << 20;
    let disk = FileDisk::open_exclusive(path).unwrap();
    eprintln!("{}: direct {}, block {}", disk.name(), disk.is_direct(), disk.block_bytes());
    let mut model = vec![0u8; LEN];
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    for round in 0..200 {
        let offset = next(LEN);
        let most = [1, 511, 513, 4096, 5000, 70_000, LEN][round % 7];
        let len = next(most) + 1;
        let len = len.min(LEN - offset);
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + round) as u8).collect();
        disk.write(offset as u64, &data).unwrap();
        model[offset..offset + len].copy_from_slice(&data);
        let (from, many) = (next(LEN), next(most) + 1);
        let many = many.min(LEN - from);
        let mut got = vec![0; many];
        disk.read(from as u64, &mut got).unwrap();
        assert!(got == model[from..from + many], "round {round}: read {many} at {from}");
    }
    disk.sync().unwrap();
    reads_at_once_match_a_vector(&disk, &model);
    drop(disk);
    assert!(std::fs::read(path).unwrap() == model);
}

/// More places than are read at once, of all lengths, those that overlap and odd ones included.
fn reads_at_once_match_a_vector(disk: &FileDisk, model: &[u8]) {
    let block = 4096;
    let aligned: Vec<(u64, usize)> = (0..300)
        .map(|i| ((i * 37 % 700 * block) as u64, [1, 8, 64][i % 3] * block))
        .chain([(0, model.len()), (0, block)])
        .collect();
    let odd = aligned.iter().map(|&(offset, len)| (offset + 1, len - 7)).collect::<Vec<_>>();
    for places in [&aligned[..], &odd[..], &aligned[..1], &[]] {
        let places: Vec<(u64, usize)> =
            places.iter().copied().filter(|&(o, len)| o as usize + len <= model.len()).collect();
        let mut count = 0;
        let read = disk.read_each(&places, &mut |i, bytes| {
            assert_eq!(i, count, "in order");
            count += 1;
            let (offset, len) = (places[i].0 as usize, places[i].1);
            assert!(bytes == &model[offset..offset + len], "{len} bytes at {offset}");
            Ok(())
        });
        read.unwrap();
        assert_eq!(count, places.len());
    }
    let mut count = 0;
    let ends = disk.read_each(&aligned[..200], &mut |i, _| {
        count += 1;
        if i == 50 { Err(Error::new(ErrorKind::Invalid, "enough")) } else { Ok(()) }
    });
    assert!(ends.unwrap_err().report().contains("enough") && count == 51);
    let beyond = [(0, block), (model.len() as u64, block)];
    let error = disk.read_each(&beyond, &mut |_, _| Ok(())).unwrap_err();
    assert!(error.report().contains("it ends at"), "{}", error.report());
}

#[test]
fn a_file_that_became_shorter_is_told_of_by_reads_at_once() {
    let dir = dir();
    let path = file_of(&dir, "short", 1 << 20);
    let disk = FileDisk::open_exclusive(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(512 << 10).unwrap();
    let places: Vec<(u64, usize)> = (0..256).map(|i| (i * 4096, 4096)).collect();
    let mut count = 0;
    let error = disk.read_each(&places, &mut |i, _| {
        count = i + 1;
        Ok(())
    });
    assert!(error.unwrap_err().report().contains("has become shorter"));
    assert_eq!(count, 128, "what is there was handed on");
}

#[test]
fn any_alignment_on_a_file() {
    let dir = dir();
    any_alignment_matches_a_vector(&file_of(&dir, "odd", 3 << 20));
}

#[test]
fn any_alignment_on_tmpfs() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED: no /dev/shm");
        return;
    };
    any_alignment_matches_a_vector(&file_of(&dir, "odd", 3 << 20));
}

#[test]
fn nothing_beyond_the_end() {
    let dir = dir();
    let disk = FileDisk::open_exclusive(&file_of(&dir, "end", 8192 + 100)).unwrap();
    assert_eq!(disk.len_bytes(), 8192, "whole blocks only");
    let error = disk.write(8191, &[1, 2]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{}", error.report());
    assert!(disk.read(u64::MAX, &mut [0; 2]).is_err());
    assert_eq!(std::fs::metadata(disk.path()).unwrap().len(), 8192 + 100);
}

#[test]
fn a_shrunk_file_is_the_wrong_device() {
    let dir = dir();
    let path = file_of(&dir, "shrunk", 64 << 10);
    let disk = FileDisk::open_exclusive(&path).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let error = disk.read(32 << 10, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongDevice, "{}", error.report());
    assert_eq!(disk.refresh_len().unwrap(), 4096);
}

#[test]
fn one_owner_at_a_time() {
    let dir = dir();
    let path = file_of(&dir, "lock", 1 << 20);
    let first = FileDisk::open_exclusive(&path).unwrap();
    let soon = Duration::from_millis(60);
    for lock in [Lock::Exclusive(soon), Lock::Shared(soon)] {
        let error = FileDisk::open(&path, Access::Read, lock).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let own = format!("process {}", std::process::id());
        assert!(error.report().contains(&own), "{}", error.report());
    }
    FileDisk::open_to_look(&path).unwrap();
    drop(first);
    let reader = FileDisk::open(&path, Access::Read, Lock::Shared(soon)).unwrap();
    FileDisk::open(&path, Access::Read, Lock::Shared(soon)).unwrap();
    assert_eq!(
        FileDisk::open(&path, Access::ReadWrite, Lock::Exclusive(soon)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    drop(reader);
}

#[test]
fn waits_for_a_lock_that_is_about_to_go() {
    let dir = dir();
    let path = file_of(&dir, "wait", 1 << 20);
    let first = FileDisk::open_exclusive(&path).unwrap();
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        drop(first);
    });
    FileDisk::open(&path, Access::ReadWrite, Lock::Exclusive(Duration::from_secs(20))).unwrap();
    holder.join().unwrap();
}

#[test]
fn the_same_thing_by_any_path() {
    let dir = dir();
    let path = file_of(&dir, "one", 4096);
    let other = file_of(&dir, "other", 4096);
    let (soft, hard) = (dir.path().join("soft"), dir.path().join("hard"));
    symlink(&path, &soft).unwrap();
    std::fs::hard_link(&path, &hard).unwrap();
    let id = |p: &Path| FileDisk::open_to_look(p).unwrap().identity();
    assert_eq!(id(&path), id(&soft));
    assert_eq!(id(&path), id(&hard));
    assert_ne!(id(&path), id(&other));
    assert!(overlap(id(&soft), id(&hard)) && !overlap(id(&path), id(&other)));
}

#[test]
fn refuses_what_is_no_disk() {
    let dir = dir();
    for (path, word) in [
        (dir.path().to_owned(), "directory"),
        (PathBuf::from("/dev/null"), "character device"),
        (dir.path().join("missing"), "does not exist"),
    ] {
        let error = FileDisk::open_exclusive(&path).unwrap_err();
        assert!(error.report().contains(word), "{}", error.report());
        assert!(error.report().contains(&path.display().to_string()));
    }
}

#[test]
fn stage_files_are_allocated_and_backing_files_are_not() {
    let dir = dir();
    let (stage, backing) = (dir.path().join("stage"), dir.path().join("backing"));
    let mut told = Vec::new();
    create_file(&stage, 3 << 20, Fill::Zeroes, &mut |done| {
        told.push(done);
        true
    })
    .unwrap();
    assert_eq!(told, [1 << 20, 2 << 20, 3 << 20]);
    create_file(&backing, 3 << 20, Fill::Sparse, &mut no_progress()).unwrap();
    let blocks = |p: &Path| std::fs::metadata(p).unwrap().blocks() * 512;
    assert!(blocks(&stage) >= 3 << 20);
    assert!(blocks(&backing) < 1 << 20);
    assert_eq!(std::fs::metadata(&stage).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn failed_creation_leaves_nothing() {
    let dir = dir();
    let path = dir.path().join("stopped");
    assert!(create_file(&path, 4 << 20, Fill::Zeroes, &mut |done| done < 2 << 20).is_err());
    assert!(!path.exists());

    let error = create_file(&path, 1 << 60, Fill::Zeroes, &mut no_progress()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.report());
    assert!(create_file(&path, 1 << 63, Fill::Sparse, &mut no_progress()).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    std::fs::write(&path, b"precious").unwrap();
    let error = create_file(&path, 4096, Fill::Zeroes, &mut no_progress()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let error = create_file(&dir.path().join("no/dir"), 4096, Fill::Sparse, &mut no_progress()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{}", error.report());
}

#[test]
fn read_only_disks_do_not_write() {
    let dir = dir();
    let disk = FileDisk::open_to_look(&file_of(&dir, "ro", 8192)).unwrap();
    assert!(disk.write(0, &[0; 4096]).is_err());
}
