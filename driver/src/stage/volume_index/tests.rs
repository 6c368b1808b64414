//! The shards together against one index.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use proptest::prelude::*;

use super::{AT_ONCE, EXTENTS_A_RECORD_MAX, SHARD_BYTES_MIN, SHARDS, VolumeIndex};
use crate::base::{ByteRange, Lsn, RegionSeq, VolumeId};
use crate::stage::index::{Bulk, Extent, Index, Source};

const VOLUME: VolumeId = VolumeId(3);
const VOLUME_BYTES: u64 = SHARD_BYTES_MIN * SHARDS as u64;

/// A record around the border between two shards, over several, or behind the end that the volume had at first.
fn ranges() -> impl Strategy<Value = ByteRange> {
    let near = |border: u64, from: u64, len: u64| {
        ByteRange::at((border * SHARD_BYTES_MIN + from * 512).saturating_sub(8 * 512), len * 512)
    };
    prop_oneof![
        8 => (0..4u64, 0..16u64, 1..12u64).prop_map(move |(border, from, len)| near(border, from, len)),
        2 => (14..20u64, 0..16u64, 1..12u64).prop_map(move |(border, from, len)| near(border, from, len)),
        1 => (0..3u64, 0..20 * SHARD_BYTES_MIN)
            .prop_map(|(from, len)| ByteRange::at(from * 512, len / 512 * 512)),
    ]
}

fn extent(lsn: u64, range: ByteRange) -> Extent {
    let source = if lsn.is_multiple_of(5) || range.len() > 1 << 20 {
        Source::Discard
    } else {
        Source::Data { region: RegionSeq(lsn), offset: 4096 }
    };
    Extent { range, lsn: Lsn(lsn), source }
}

/// What is visible, as a list that does not depend on where extents are cut.
fn visible(extents: impl Iterator<Item = Extent>) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for extent in extents {
        match joined.last_mut() {
            Some(last)
                if last.lsn == extent.lsn
                    && last.range.end == extent.range.start
                    && last.source.advanced(last.range.len()) == extent.source =>
            {
                last.range.end = extent.range.end;
            }
            _ => joined.push(extent),
        }
    }
    joined
}

fn looked_up(index: &VolumeIndex, range: ByteRange) -> Vec<Extent> {
    let mut found = Vec::new();
    let mut at = range.start;
    let end = index.lookup(range, |piece| {
        assert_eq!(piece.range.start, at, "pieces cover the range in order");
        at = piece.range.end;
        found.extend(piece.hit.map(|(lsn, source)| Extent { range: piece.range, lsn, source }));
        ControlFlow::<()>::Continue(())
    });
    assert!(end.is_continue() && at == range.end);
    found
}

proptest! {
    #[test]
    fn shards_show_what_one_index_shows(
        records in proptest::collection::vec((ranges(), any::<prop::sample::Index>()), 1..60),
        flushed in proptest::collection::vec((ranges(), any::<prop::sample::Index>()), 0..6),
        looks in proptest::collection::vec(ranges(), 1..6),
    ) {
        let mut order: Vec<Extent> = (1..).zip(&records).map(|(lsn, (range, _))| extent(lsn, *range)).collect();
        let (index, mut one) = (VolumeIndex::new(VOLUME, VOLUME_BYTES), Index::new());
        let mut bulk = Bulk::default();
        bulk.add(order.clone());
        let mut grown = 0;
        for (n, (_, pick)) in records.iter().enumerate() {
            // Doors fill in any order.
            let extent = order.swap_remove(pick.index(order.len()));
            grown += index.insert(extent);
            one.insert(extent);
            prop_assert!(index.extent_count() <= EXTENTS_A_RECORD_MAX * (n + 1));
        }
        let built = VolumeIndex::of(VOLUME, VOLUME_BYTES, bulk.sort());
        prop_assert_eq!(visible(built.extents().into_iter()), visible(one.iter()));
        prop_assert_eq!(built.extent_count(), built.extents().len());
        for (range, pick) in flushed {
            let up_to = Lsn(pick.index(records.len()) as u64 + 1);
            grown += index.remove_flushed(range, up_to);
            one.remove_flushed(range, up_to);
        }
        prop_assert_eq!(visible(index.extents().into_iter()), visible(one.iter()));
        prop_assert_eq!(grown, index.extent_count() as isize, "X4");
        prop_assert_eq!(index.is_empty(), one.is_empty());
        for range in looks {
            let in_one = one.lookup(range).filter_map(|piece| {
                piece.hit.map(|(lsn, source)| Extent { range: piece.range, lsn, source })
            });
            prop_assert_eq!(visible(looked_up(&index, range).into_iter()), visible(in_one));
        }
    }
}

/// Doors that take LSNs in order and index in whatever order they get to it, as real threads do.
#[test]
fn the_newest_record_wins_whichever_thread_is_faster() {
    const THREADS: u64 = 4;
    const RECORDS: u64 = 2000;
    let index = VolumeIndex::new(VOLUME, VOLUME_BYTES);
    let (next, grown) = (AtomicU64::new(1), AtomicI64::new(0));
    let range = |lsn: u64| {
        let border = lsn * 7919 % 3 * SHARD_BYTES_MIN;
        ByteRange::at((border + lsn * 104_729 % 64 * 512).saturating_sub(32 * 512), (lsn % 9 + 1) * 512)
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..RECORDS {
                    let lsn = next.fetch_add(1, Ordering::Relaxed);
                    grown.fetch_add(index.insert(extent(lsn, range(lsn))) as i64, Ordering::Relaxed);
                }
            });
        }
    });
    let mut one = Index::new();
    (1..=THREADS * RECORDS).for_each(|lsn| one.insert(extent(lsn, range(lsn))));
    assert_eq!(visible(index.extents().into_iter()), visible(one.iter()));
    assert_eq!(grown.into_inner(), index.extent_count() as i64, "X4");
}

#[test]
fn every_byte_has_a_shard_however_large_the_volume() {
    for volume_bytes in [512, VOLUME_BYTES, VOLUME_BYTES + 512, 1 << 46, 1 << 62] {
        let index = VolumeIndex::new(VOLUME, volume_bytes);
        let last = index.shard_of(volume_bytes - 1);
        assert!(last < SHARDS && (last >= SHARDS / 2 || volume_bytes < VOLUME_BYTES), "{volume_bytes}");
        // It may grow.
        assert_eq!(index.shard_of(u64::MAX), SHARDS - 1);
        let whole = ByteRange { start: 0, end: volume_bytes };
        assert_eq!(index.insert(extent(5, whole)), last as isize + 1);
        assert_eq!(visible(looked_up(&index, whole).into_iter()), [extent(5, whole)]);
        index.expect(whole);
        assert_eq!(index.remove_flushed(whole, Lsn(5)), -(last as isize + 1));
        assert!(index.is_empty());
    }
}

/// What is too much to be forgotten at once is forgotten all the same, and nothing beside it.
#[test]
fn a_large_range_is_forgotten_bit_by_bit() {
    let index = VolumeIndex::new(VOLUME, 1 << 30);
    let count = 3 * AT_ONCE as u64 + 5;
    let range = |n: u64| ByteRange::at(n * 512, 512);
    (0..count).for_each(|n| assert_eq!(index.insert(extent(n + 1, range(n))), 1));
    let all_but_ends = ByteRange { start: 512, end: (count - 1) * 512 };
    let newest = Lsn(count - 2);
    assert_eq!(index.remove_flushed(all_but_ends, newest), 3 - count as isize);
    let left: Vec<Extent> = [0, count - 2, count - 1].map(|n| extent(n + 1, range(n))).to_vec();
    assert_eq!(index.extents(), left, "the ends, and what is newer");
}

#[test]
fn what_is_removed_at_once_is_bounded() {
    let mut index = Index::new();
    // The first begins before the range.
    (0..100).for_each(|n| index.insert(extent(n + 1, ByteRange::at(n * 1000, 1000))));
    let range = ByteRange { start: 500, end: 99_500 };
    assert_eq!(index.reach(range, 10), 11_000);
    assert_eq!(index.reach(ByteRange { start: 1000, ..range }, 10), 11_000);
    assert_eq!(index.reach(range, 98), 99_000);
    assert_eq!(index.reach(range, 99), 99_500);
    assert_eq!(Index::new().reach(range, 1), 99_500);
}
