//! The engine on real files: io_uring, threads and all, without a kernel block device.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use support::{Place, V1, V2, VOLUME_BYTES, new_volume, pattern};
use tidegate_driver::base::ErrorKind;
use tidegate_driver::format::volume_entry::AckLevel;
use tidegate_driver::io::file::FileDisk;
use tidegate_driver::volume::{LocalClient, RequestKind};

#[test]
fn what_is_written_is_read_before_and_after_the_flush() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    client.write(4096, &pattern(1, 10_000)).unwrap();
    client.write(5000, &pattern(2, 77)).unwrap();
    let mut expected = pattern(1, 10_000);
    expected[904..981].copy_from_slice(&pattern(2, 77));
    assert_eq!(client.read(4096, 10_000).unwrap(), expected);
    assert_eq!(client.read(0, 4096).unwrap(), vec![0; 4096]);
    engine.drain().unwrap();
    assert_eq!(client.read(4096, 10_000).unwrap(), expected);
    drop(client);
    engine.close(true).unwrap();
    assert_eq!(place.backing_bytes(0, 4096, 10_000), expected);
    assert_eq!(
        std::fs::read_dir(place.path("arena")).unwrap().count(),
        0,
        "an orderly close leaves no arena"
    );
}

#[test]
fn a_stage_smaller_than_the_data_slows_writers_and_loses_nothing() {
    let place = Place::new(24 << 20, &[AckLevel::Memory]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    for round in 0..2u64 {
        for i in 0..60u64 {
            client.write(i << 20, &pattern(round * 100 + i, 1 << 20)).unwrap();
        }
    }
    for i in 0..60u64 {
        assert!(client.read(i << 20, 1 << 20).unwrap() == pattern(100 + i, 1 << 20), "MiB {i}");
    }
    drop(client);
    assert!(engine.status().epochs > 1);
    engine.close(true).unwrap();
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Doors that index, readers and a flusher that forgets, each on its own thread and none holding up the others: a read shows at
/// least what was acknowledged before it began and what a read before it showed, on both sides of a border of the index.
#[test]
fn reads_go_forward_while_others_write_and_flush() {
    const BYTES: usize = 8192;
    const VERSIONS: u64 = 3000;
    let place = Place::new(24 << 20, &[AckLevel::Memory]);
    let engine = place.open().unwrap();
    let (acknowledged, begun) = (AtomicU64::new(0), AtomicU64::new(0));
    let at = VOLUME_BYTES / 2 - BYTES as u64 / 2;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The others end with this thread, however it ends.
            let _over = OnDrop(|| _ = acknowledged.fetch_max(VERSIONS, Ordering::SeqCst));
            let mut client = LocalClient::new(&engine, V1, 8).unwrap();
            for version in 1..=VERSIONS {
                begun.store(version, Ordering::SeqCst);
                client.write(at, &version.to_le_bytes().repeat(BYTES / 8)).unwrap();
                acknowledged.store(version, Ordering::SeqCst);
            }
        });
        // What makes the flusher come by again and again.
        scope.spawn(|| {
            let mut client = LocalClient::new(&engine, V1, 8).unwrap();
            for i in (0..).take_while(|_| acknowledged.load(Ordering::SeqCst) < VERSIONS) {
                client.write((i % 16) << 18, &pattern(i, 1 << 18)).unwrap();
            }
        });
        let mut client = LocalClient::new(&engine, V1, 8).unwrap();
        let mut seen = vec![0; BYTES / 8];
        while acknowledged.load(Ordering::SeqCst) < VERSIONS {
            let least = acknowledged.load(Ordering::SeqCst);
            let read = client.read(at, BYTES).unwrap();
            let most = begun.load(Ordering::SeqCst);
            for (seen, word) in seen.iter_mut().zip(read.chunks_exact(8)) {
                let version = u64::from_le_bytes(word.try_into().unwrap());
                assert!((least.max(*seen)..=most).contains(&version), "{version}: {least}, {seen}, {most}");
                *seen = version;
            }
        }
    });
    assert!(engine.status().epochs > 1);
    engine.close(true).unwrap();
}

/// The log is written by the clients' threads, so a client that always finds its writes accepted must write it, too.
#[test]
fn a_client_that_never_waits_becomes_durable_all_the_same() {
    let place = Place::new(64 << 20, &[AckLevel::Memory]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    for i in 0..64 {
        client.write(i * 8192, &pattern(i, 8192)).unwrap();
    }
    for i in 0..100_000 {
        if client.progress().1.0 > 0 {
            break;
        }
        client.write(i % 1000 * 64, &[1; 64]).unwrap();
    }
    assert!(client.progress().1.0 > 0, "nothing is durable");
    drop(client);
    engine.close(true).unwrap();
}

#[test]
fn zeroes_and_discards_hide_older_data() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    client.write(0, &pattern(3, 64 << 10)).unwrap();
    engine.drain().unwrap();
    client.call(RequestKind::WriteZeroes, 1000, 30_000, Vec::new()).unwrap();
    client.call(RequestKind::Discard, 40_960, 8192, Vec::new()).unwrap();
    let mut expected = pattern(3, 64 << 10);
    expected[1000..31_000].fill(0);
    expected[40_960..49_152].fill(0);
    assert!(client.read(0, 64 << 10).unwrap() == expected, "staged");
    engine.drain().unwrap();
    assert!(client.read(0, 64 << 10).unwrap() == expected, "flushed");
    drop(client);
    engine.close(true).unwrap();
}

/// Copies of the files taken while the engine runs: with the arena they are what a killed server leaves.
#[test]
fn a_killed_server_loses_nothing_and_a_lost_arena_is_an_alarm() {
    let place = Place::new(64 << 20, &[AckLevel::Log, AckLevel::Memory]);
    let engine = place.open().unwrap();
    let mut durable = LocalClient::new(&engine, V1, 8).unwrap();
    let mut quick = LocalClient::new(&engine, V2, 8).unwrap();
    quick.write(0, &pattern(9, 5000)).unwrap();
    durable.write(123, &pattern(10, 5000)).unwrap();
    quick.write(8192, &pattern(11, 5000)).unwrap();

    // A copy takes its time, in which the flusher may begin: then it is of no one instant, and made again.
    let copy = |with_arena| loop {
        let now = || (engine.status().epochs, engine.status().durable_lsn);
        let before = now();
        let copy = place.copy(with_arena);
        if now() == before {
            break copy;
        }
    };
    let killed = copy(true);
    let cut = copy(false);
    drop((durable, quick));
    engine.close(true).unwrap();

    let engine = killed.open().unwrap();
    assert!(engine.recovery().arena_used);
    let mut client = LocalClient::new(&engine, V2, 8).unwrap();
    assert!(client.read(8192, 5000).unwrap() == pattern(11, 5000), "acknowledged in memory, arena kept");
    drop(client);
    engine.close(true).unwrap();

    let error = cut.open().err().expect("an arena that is gone in the same boot is an alarm");
    assert_eq!(error.kind(), ErrorKind::Lost, "{}", error.report());
}

#[test]
fn volumes_come_grow_and_go_while_the_stage_is_in_use() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let path = place.path("extra");
    std::fs::File::create(&path).unwrap().set_len(VOLUME_BYTES + (64 << 10)).unwrap();
    let backing = Arc::new(FileDisk::open_exclusive(&path).unwrap());
    let info = engine.add_volume(backing, new_volume("extra", AckLevel::Log, &path)).unwrap();
    let mut client = LocalClient::new(&engine, info.id, 8).unwrap();
    client.write(VOLUME_BYTES - 100, &pattern(5, 100)).unwrap();
    assert!(client.write(VOLUME_BYTES - 50, &pattern(5, 100)).is_err(), "past the end");
    engine.resize_volume(info.id, VOLUME_BYTES * 2).unwrap();
    client.write(VOLUME_BYTES - 50, &pattern(6, 100)).unwrap();
    engine.drain().unwrap();
    let mut expected = pattern(5, 50);
    expected.extend(pattern(6, 100));
    expected.extend([0; 70_000]);
    assert_eq!(client.read(VOLUME_BYTES - 100, 70_150).unwrap(), expected, "old labels do not show");
    assert_eq!(engine.remove_volume(info.id).unwrap_err().kind(), ErrorKind::Busy);
    drop(client);
    engine.remove_volume(info.id).unwrap();
    engine.close(true).unwrap();
    drop(engine);
    let engine = place.open().unwrap();
    assert_eq!(engine.volumes().len(), 1);
    engine.close(true).unwrap();
}

/// The change waits for the epoch's end; nothing else happens that could wake the thread that carries it out.
#[test]
fn a_volume_grows_in_the_middle_of_a_flush() {
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let engine = place.open().unwrap();
    let mut client = LocalClient::new(&engine, V1, 8).unwrap();
    for round in 1..=20 {
        for block in 0..64 {
            client.write((block * 128) << 10, &pattern(round, 4096)).unwrap();
        }
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| engine.drain());
            let status = scope.spawn(|| engine.status().volumes.len());
            engine.resize_volume(V1, VOLUME_BYTES + (round << 20)).unwrap();
            flush.join().unwrap().unwrap();
            assert_eq!(status.join().unwrap(), 1);
        });
    }
    drop(client);
    engine.close(true).unwrap();
}
