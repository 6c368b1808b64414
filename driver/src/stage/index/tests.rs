use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::*;

/// Small enough that extents meet all the time.
const VOLUME_BYTES: u64 = 48;

fn data(region: u64, offset: u32) -> Source {
    Source::Data { region: RegionSeq(region), offset }
}

fn extent(start: u64, end: u64, lsn: u64, source: Source) -> Extent {
    Extent { range: ByteRange { start, end }, lsn: Lsn(lsn), source }
}

/// The slow and obvious index: what each byte of the volume holds, and nothing else.
struct Model {
    /// Volume offset of the first byte, to try the far end of the largest volume too.
    base: u64,
    bytes: Vec<Option<(Lsn, Source)>>,
}

impl Model {
    fn new(base: u64) -> Model {
        Model { base, bytes: vec![None; VOLUME_BYTES as usize] }
    }

    fn offsets(range: ByteRange) -> std::ops::Range<u64> {
        range.start..range.end
    }

    fn byte(&mut self, offset: u64) -> &mut Option<(Lsn, Source)> {
        &mut self.bytes[(offset - self.base) as usize]
    }

    fn insert(&mut self, extent: Extent) {
        for offset in Model::offsets(extent.range) {
            let byte = self.byte(offset);
            if byte.is_none_or(|(lsn, _)| lsn < extent.lsn) {
                *byte = Some((extent.lsn, extent.source.advanced(offset - extent.range.start)));
            }
        }
    }

    fn remove_flushed(&mut self, range: ByteRange, up_to: Lsn) {
        for offset in Model::offsets(range) {
            let byte = self.byte(offset);
            if byte.is_some_and(|(lsn, _)| lsn <= up_to) {
                *byte = None;
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(Extent),
    RemoveFlushed(ByteRange, Lsn),
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Ascending,
    Descending,
    Any,
}

fn any_range(base: u64) -> impl Strategy<Value = ByteRange> {
    // Multiples of 8 are frequent, so that ranges also coincide and touch.
    let cut = prop_oneof![0..=VOLUME_BYTES, (0..=VOLUME_BYTES / 8).prop_map(|n| n * 8)];
    (cut.clone(), cut).prop_map(move |(a, b)| ByteRange { start: base + a.min(b), end: base + a.max(b) })
}

fn any_source() -> impl Strategy<Value = Source> {
    let far = u32::MAX - VOLUME_BYTES as u32;
    prop_oneof![
        4 => (1..4u64, prop_oneof![0..200u32, Just(far)]).prop_map(|(region, offset)| data(region, offset)),
        1 => Just(Source::Zero),
        1 => Just(Source::Discard),
    ]
}

/// Base offset and steps. Each insert has an LSN of its own; in which order they come is part of the case.
fn any_history() -> impl Strategy<Value = (u64, Vec<Step>)> {
    let order = prop_oneof![Just(Order::Ascending), Just(Order::Descending), Just(Order::Any)];
    let base = prop_oneof![Just(0), Just((1 << 62) - VOLUME_BYTES)];
    (order, base).prop_flat_map(|(order, base)| {
        let step = (any_range(base), any_source(), 0..5u32, any::<u16>());
        prop::collection::vec(step, 1..40).prop_map(move |steps| {
            let count = steps.len() as u64;
            let numbered = steps.into_iter().zip(1..).map(|((range, source, kind, pick), nth)| {
                let lsn = Lsn(match order {
                    Order::Ascending => nth,
                    Order::Descending => count + 1 - nth,
                    Order::Any => u64::from(pick % 64) * 64 + nth,
                });
                let any_lsn = Lsn(u64::from(pick) % (if matches!(order, Order::Any) { 4096 } else { count }));
                match kind {
                    0 => Step::RemoveFlushed(range, any_lsn),
                    _ => Step::Insert(Extent { range, lsn, source }),
                }
            });
            (base, numbered.collect())
        })
    })
}

/// The lookup of `range` covers it exactly, in order, and says for each byte what the model says.
fn check_lookup(index: &Index, model: &mut Model, range: ByteRange) -> Result<(), TestCaseError> {
    let mut at = range.start;
    let mut previous_missed = false;
    for piece in index.lookup(range) {
        prop_assert_eq!(piece.range.start, at);
        prop_assert!(!piece.range.is_empty());
        prop_assert!(!(previous_missed && piece.hit.is_none()), "two holes in a row at {}", at);
        for offset in Model::offsets(piece.range) {
            let hit = piece.hit.map(|(lsn, source)| (lsn, source.advanced(offset - piece.range.start)));
            prop_assert_eq!(hit, *model.byte(offset), "byte {}", offset);
        }
        previous_missed = piece.hit.is_none();
        at = piece.range.end;
    }
    prop_assert_eq!(at, range.end);
    Ok(())
}

/// Extents are disjoint, sorted, not empty, and there are as many as the documentation allows.
fn check_extents(index: &Index, step_count: usize) -> Result<(), TestCaseError> {
    let extents: Vec<Extent> = index.iter().collect();
    prop_assert!(extents.iter().all(|extent| !extent.range.is_empty()));
    prop_assert!(extents.is_sorted_by(|a, b| a.range.end <= b.range.start));
    prop_assert_eq!(index.extent_count(), extents.len());
    prop_assert_eq!(index.is_empty(), extents.is_empty());
    prop_assert!(extents.len() < 2 * step_count);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn holds_what_a_byte_array_would((base, steps) in any_history(), probe in any_range(0)) {
        let whole = ByteRange::at(base, VOLUME_BYTES);
        let probe = ByteRange { start: base + probe.start, end: base + probe.end };
        let (mut index, mut model) = (Index::new(), Model::new(base));
        for (step, step_count) in steps.into_iter().zip(1..) {
            let before = index.extent_count();
            match step {
                Step::Insert(extent) => {
                    let met = index.lookup(extent.range).filter_map(|piece| piece.hit);
                    let newer_count = met.filter(|(lsn, _)| *lsn > extent.lsn).count();
                    index.insert(extent);
                    model.insert(extent);
                    prop_assert!(index.extent_count() <= before + 2 + newer_count);
                }
                Step::RemoveFlushed(range, up_to) => {
                    index.remove_flushed(range, up_to);
                    model.remove_flushed(range, up_to);
                    prop_assert!(index.extent_count() <= before + 1);
                }
            }
            check_extents(&index, step_count)?;
            check_lookup(&index, &mut model, whole)?;
            check_lookup(&index, &mut model, probe)?;
        }
        index.clear();
        check_lookup(&index, &mut Model::new(base), whole)?;
    }

    #[test]
    fn ends_the_same_in_any_order_of_arrival(
        (arrived, sorted) in prop::collection::vec((any_range(0), any_source()), 1..24).prop_flat_map(|records| {
            let sorted: Vec<Extent> = records
                .into_iter()
                .zip(1..)
                .map(|((range, source), lsn)| Extent { range, lsn: Lsn(lsn), source })
                .collect();
            (Just(sorted.clone()).prop_shuffle(), Just(sorted))
        })
    ) {
        let (mut index, mut expected) = (Index::new(), Model::new(0));
        let (first, second) = arrived.split_at(arrived.len() / 2);
        let mut in_two_parts = Bulk::default();
        in_two_parts.add(first.to_vec());
        let mut compacted = in_two_parts.clone();
        compacted.compact();
        for parts in [&mut in_two_parts, &mut compacted] {
            parts.add(second.to_vec());
        }
        let at_once = Index::of(arrived.clone());
        arrived.into_iter().for_each(|extent| index.insert(extent));
        sorted.into_iter().for_each(|extent| expected.insert(extent));
        check_lookup(&index, &mut expected, ByteRange::at(0, VOLUME_BYTES))?;
        for other in [at_once, in_two_parts.finish(), compacted.finish()] {
            prop_assert!(other.iter().eq(index.iter()), "{:?} is not {:?}", other, index);
        }
    }
}

/// Old discards that end one behind the other, under newer writes: one by one from the newest to the oldest discard this would
/// take hours.
#[test]
fn many_that_overlap_are_put_together_quickly() {
    let count = 50_000;
    let discards = (1..=count).map(|n| extent(4096, (1 << 40) - 4096 * n, n, Source::Discard));
    let writes = (0..count).map(|n| extent(8192 * n, 8192 * n + 4096, count + 1 + n, data(1, 0)));
    let extents: Vec<Extent> =
        discards.chain(writes).chain([extent(0, 8192, 3 * count, data(2, 0))]).collect();
    let mut expected = Index::new();
    extents.iter().for_each(|extent| expected.insert(*extent));
    assert!(Index::of(extents).iter().eq(expected.iter()));
}

#[test]
fn overwriting_an_identical_range_replaces_it() {
    let mut index = Index::new();
    index.insert(extent(4096, 8192, 2, data(1, 0)));
    index.insert(extent(4096, 8192, 3, data(1, 4096)));
    index.insert(extent(4096, 8192, 1, Source::Zero));
    assert_eq!(index.iter().collect::<Vec<_>>(), [extent(4096, 8192, 3, data(1, 4096))]);
}

#[test]
fn a_write_into_the_middle_splits_at_both_ends() {
    let mut index = Index::new();
    index.insert(extent(0, 100, 1, data(7, 1000)));
    index.insert(extent(40, 60, 2, data(8, 0)));
    let expected =
        [extent(0, 40, 1, data(7, 1000)), extent(40, 60, 2, data(8, 0)), extent(60, 100, 1, data(7, 1060))];
    assert_eq!(index.iter().collect::<Vec<_>>(), expected);
    // The late record shows through on neither side of a newer one that covers it.
    index.insert(extent(0, 100, 3, Source::Discard));
    assert_eq!(index.iter().collect::<Vec<_>>(), [extent(0, 100, 3, Source::Discard)]);
}

#[test]
fn a_late_record_fills_only_the_holes() {
    let mut index = Index::new();
    index.insert(extent(10, 20, 5, data(1, 0)));
    index.insert(extent(30, 40, 6, data(1, 10)));
    index.insert(extent(0, 50, 4, data(2, 100)));
    let expected = [
        extent(0, 10, 4, data(2, 100)),
        extent(10, 20, 5, data(1, 0)),
        extent(20, 30, 4, data(2, 120)),
        extent(30, 40, 6, data(1, 10)),
        extent(40, 50, 4, data(2, 140)),
    ];
    assert_eq!(index.iter().collect::<Vec<_>>(), expected);
}

#[test]
fn neighbours_of_different_records_stay_apart() {
    let mut index = Index::new();
    index.insert(extent(0, 10, 1, data(1, 0)));
    index.insert(extent(10, 20, 2, data(1, 10)));
    assert_eq!(index.extent_count(), 2);
    index.remove_flushed(ByteRange { start: 0, end: u64::MAX }, Lsn(1));
    assert_eq!(index.iter().collect::<Vec<_>>(), [extent(10, 20, 2, data(1, 10))]);
}

#[test]
fn the_flusher_forgets_by_lsn_inclusive() {
    let mut index = Index::new();
    index.insert(extent(0, 10, 3, Source::Zero));
    index.remove_flushed(ByteRange::at(0, 10), Lsn(2));
    assert_eq!(index.extent_count(), 1);
    index.remove_flushed(ByteRange::at(2, 0), Lsn(u64::MAX));
    assert_eq!(index.extent_count(), 1);
    index.remove_flushed(ByteRange::at(2, 3), Lsn(3));
    assert_eq!(
        index.iter().collect::<Vec<_>>(),
        [extent(0, 2, 3, Source::Zero), extent(5, 10, 3, Source::Zero)]
    );
}

#[test]
fn an_empty_extent_changes_nothing() {
    let mut index = Index::new();
    index.insert(extent(0, 10, 1, Source::Zero));
    index.insert(extent(5, 5, 2, data(1, 0)));
    assert_eq!(index.iter().collect::<Vec<_>>(), [extent(0, 10, 1, Source::Zero)]);
    assert_eq!(index.lookup(ByteRange::at(5, 0)).next(), None);
}

#[test]
#[should_panic(expected = "covers 0..10 twice")]
fn one_lsn_cannot_hold_the_same_range_twice() {
    let mut index = Index::new();
    index.insert(extent(0, 10, 1, Source::Zero));
    index.insert(extent(0, 10, 1, Source::Discard));
}

#[test]
#[should_panic(expected = "covers a byte of 5..15 twice")]
fn one_lsn_cannot_overlap_an_extent_that_begins_before() {
    let mut index = Index::new();
    index.insert(extent(0, 10, 1, Source::Zero));
    index.insert(extent(5, 15, 1, Source::Zero));
}

#[test]
#[should_panic(expected = "covers a byte of 0..10 twice")]
fn one_lsn_cannot_overlap_an_extent_that_begins_inside() {
    let mut index = Index::new();
    index.insert(extent(5, 15, 1, Source::Zero));
    index.insert(extent(0, 10, 1, Source::Zero));
}

#[test]
#[should_panic(expected = "leaves its region")]
fn a_payload_cannot_leave_its_region() {
    Index::new().insert(extent(0, 2, 1, data(1, u32::MAX)));
}
