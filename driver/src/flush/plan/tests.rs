use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::*;
use crate::base::{Lsn, RegionSeq};

/// Blocks of the modelled volume.
const BLOCK_COUNT: u64 = 12;

type Checked = Result<(), TestCaseError>;

fn data(region: u64, offset: u32) -> Source {
    Source::Data { region: RegionSeq(region), offset }
}

/// What the stage holds at a place: differs between neighbours and between regions, and is never 0.
fn staged_byte(source: Source, by: u64) -> u8 {
    match source.advanced(by) {
        Source::Data { region, offset } => {
            let mixed = (region.0 << 32 | u64::from(offset)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed >> 56) as u8 | 1
        }
        Source::Zero | Source::Discard => 0,
    }
}

/// What the backing holds before the flush: never 0 and never what a record holds.
fn backing_byte(offset: u64) -> u8 {
    ((offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 & 0xfe).max(2)
}

fn backing(params: PlanParams) -> Vec<u8> {
    (0..BLOCK_COUNT * u64::from(params.block_bytes)).map(backing_byte).collect()
}

fn indexes(range: ByteRange) -> Range<usize> {
    range.start as usize..range.end as usize
}

fn apply(content: &mut [u8], range: ByteRange, source: Source) {
    for (by, byte) in (0..).zip(&mut content[indexes(range)]) {
        *byte = staged_byte(source, by);
    }
}

/// Carries out `plan` with block-aligned transfers only. What a patch may not rely on is poisoned.
fn execute(plan: &Plan, params: PlanParams, content: &mut [u8]) -> Checked {
    let block_bytes = u64::from(params.block_bytes);
    for run in &plan.runs {
        if run.kind != RunKind::Data {
            content[indexes(run.range)].fill(0);
            continue;
        }
        let mut at = run.range.start;
        for piece in plan.run_pieces(run) {
            prop_assert_eq!(piece.range.start, at, "pieces cover a run in order and without holes");
            prop_assert!(piece.is_data());
            apply(content, piece.range, piece.source);
            at = piece.range.end;
        }
        prop_assert_eq!(at, run.range.end);
    }
    for patch in &plan.patches {
        let block = ByteRange::at(patch.block_offset, block_bytes);
        let mut buffer = vec![0xee; block_bytes as usize];
        if patch.needs_read {
            buffer.copy_from_slice(&content[indexes(block)]);
        }
        for piece in plan.patch_pieces(patch) {
            prop_assert!(block.start <= piece.range.start && piece.range.end <= block.end);
            prop_assert!(piece.source != Source::Discard);
            let within =
                ByteRange { start: piece.range.start - block.start, end: piece.range.end - block.start };
            apply(&mut buffer, within, piece.source);
        }
        content[indexes(block)].copy_from_slice(&buffer);
    }
    Ok(())
}

/// What has to happen to a block, told from its bytes alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Untouched,
    Run(RunKind),
    Patch { needs_read: bool },
}

/// The source of each byte after the records were applied one by one.
fn newest_bytes(records: &[Extent], params: PlanParams) -> Vec<Option<Source>> {
    let mut bytes = vec![None; (BLOCK_COUNT * u64::from(params.block_bytes)) as usize];
    for record in records {
        bytes[indexes(record.range)].fill(Some(record.source));
    }
    bytes
}

fn expected_fate(block: &[Option<Source>]) -> Fate {
    let count = |wanted: fn(Source) -> bool| block.iter().flatten().filter(|source| wanted(**source)).count();
    let data = count(|source| matches!(source, Source::Data { .. }));
    let zero = count(|source| source == Source::Zero);
    let discard = count(|source| source == Source::Discard);
    match (data, zero, discard) {
        (0, 0, 0) => Fate::Untouched,
        (data, 0, 0) if data == block.len() => Fate::Run(RunKind::Data),
        (0, 0, discard) if discard == block.len() => Fate::Run(RunKind::Discard),
        (0, zero, discard) if zero + discard == block.len() => Fate::Run(RunKind::Zero),
        _ => Fate::Patch { needs_read: data + zero + discard < block.len() },
    }
}

/// What the plan does to each block. Fails if a block is touched twice or out of alignment.
fn planned_fates(plan: &Plan, params: PlanParams) -> Result<Vec<Fate>, TestCaseError> {
    let block_bytes = u64::from(params.block_bytes);
    let mut fates = vec![Fate::Untouched; BLOCK_COUNT as usize];
    let mut set = |offset: u64, fate| {
        prop_assert_eq!(offset % block_bytes, 0);
        let slot = &mut fates[(offset / block_bytes) as usize];
        prop_assert_eq!(*slot, Fate::Untouched, "block at {} is touched twice", offset);
        *slot = fate;
        Ok(())
    };
    for run in &plan.runs {
        prop_assert!(!run.range.is_empty() && run.range.end % block_bytes == 0);
        for offset in (run.range.start..run.range.end).step_by(block_bytes as usize) {
            set(offset, Fate::Run(run.kind))?;
        }
    }
    for patch in &plan.patches {
        set(patch.block_offset, Fate::Patch { needs_read: patch.needs_read })?;
    }
    Ok(fates)
}

/// Sorted, bounded, and as few operations and pieces as possible.
fn check_shape(plan: &Plan, params: PlanParams) -> Checked {
    let run_bytes_max = u64::from(params.run_bytes_max);
    for run in &plan.runs {
        match run.kind {
            RunKind::Data => prop_assert!(run.range.len() <= run_bytes_max),
            _ => prop_assert!(plan.run_pieces(run).is_empty()),
        }
    }
    for pair in plan.runs.windows(2) {
        prop_assert!(pair[0].range.end <= pair[1].range.start, "runs are sorted");
        if pair[0].range.end == pair[1].range.start && pair[0].kind == pair[1].kind {
            prop_assert!(pair[0].kind == RunKind::Data && pair[0].range.len() == run_bytes_max);
        }
    }
    prop_assert!(plan.patches.is_sorted_by(|a, b| a.block_offset < b.block_offset));
    let runs = plan.runs.iter().map(|run| plan.run_pieces(run));
    for pieces in runs.chain(plan.patches.iter().map(|patch| plan.patch_pieces(patch))) {
        prop_assert!(pieces.iter().all(|piece| !piece.range.is_empty()));
        prop_assert!(pieces.is_sorted_by(|a, b| a.range.end <= b.range.start));
        prop_assert!(!pieces.windows(2).any(|pair| pair[0].continues_with(pair[1])), "needless split");
    }
    Ok(())
}

fn check_bytes(plan: &Plan, records: &[Extent], params: PlanParams, fates: &[Fate]) -> Checked {
    let block_bytes = u64::from(params.block_bytes);
    let blocks =
        |wanted: fn(Fate) -> bool| fates.iter().filter(|fate| wanted(**fate)).count() as u64 * block_bytes;
    let is_data = |record: &&Extent| matches!(record.source, Source::Data { .. });
    let expected = PlanBytes {
        bytes_in: records.iter().map(|record| record.range.len()).sum(),
        bytes_in_data: records.iter().filter(is_data).map(|record| record.range.len()).sum(),
        bytes_out: blocks(|fate| matches!(fate, Fate::Run(RunKind::Data) | Fate::Patch { .. })),
        bytes_read: blocks(|fate| fate == Fate::Patch { needs_read: true }),
        bytes_zeroed: blocks(|fate| fate == Fate::Run(RunKind::Zero)),
        bytes_discarded: blocks(|fate| fate == Fate::Run(RunKind::Discard)),
    };
    prop_assert_eq!(plan.bytes, expected);
    Ok(())
}

/// The written ranges are exactly the bytes of the records, joined as far as possible.
fn check_written(plan: &Plan, newest: &[Option<Source>]) -> Checked {
    let mut written = vec![false; newest.len()];
    let mut previous_end = None;
    for range in plan.written_ranges() {
        prop_assert!(!range.is_empty() && previous_end.is_none_or(|end| end < range.start));
        written[indexes(range)].fill(true);
        previous_end = Some(range.end);
    }
    prop_assert!(written.iter().zip(newest).all(|(written, source)| *written == source.is_some()));
    Ok(())
}

/// A place in the volume: often on a block boundary or beside one.
fn any_cut(block_bytes: u64) -> impl Strategy<Value = u64> {
    let last = BLOCK_COUNT * block_bytes;
    let boundary = (0..=BLOCK_COUNT).prop_map(move |n| n * block_bytes);
    let beside = (0..=BLOCK_COUNT, -3..=3i64)
        .prop_map(move |(n, by)| (n * block_bytes).saturating_add_signed(by).min(last));
    prop_oneof![3 => boundary, 2 => beside, 1 => 0..=last]
}

fn any_params() -> impl Strategy<Value = PlanParams> {
    let block_bytes = prop_oneof![4 => Just(512u32), 1 => Just(1024), 1 => Just(4096)];
    (block_bytes, prop_oneof![1..4u32, Just(64)])
        .prop_map(|(block_bytes, n)| PlanParams { block_bytes, run_bytes_max: n * block_bytes })
}

/// An epoch in LSN order, with gaps in the LSNs (other volumes' records) and records without a byte. Payloads follow
/// each other in the region, with or without a gap, as they do in the stage.
fn any_epoch() -> impl Strategy<Value = (PlanParams, Vec<Extent>)> {
    any_params().prop_flat_map(|params| {
        let cut = any_cut(params.block_bytes.into()).boxed();
        let short = (cut.clone(), 0..40u64).prop_map(|(start, len)| (start, start + len));
        let cuts = prop_oneof![3 => (cut.clone(), cut), 2 => short];
        let record = (cuts, 0..6u32, 1..3u64, prop_oneof![Just(0), 1..9u32]);
        prop::collection::vec(record, 0..28).prop_map(move |records| {
            let last = BLOCK_COUNT * u64::from(params.block_bytes);
            let (mut lsn, mut offset) = (0, 64);
            let mut epoch = Vec::new();
            for ((a, b), kind, step, gap) in records {
                let range = ByteRange { start: a.min(b).min(last), end: a.max(b).min(last) };
                lsn += step;
                let source = match kind {
                    0 => Source::Zero,
                    1 => Source::Discard,
                    _ => data(9, offset),
                };
                offset += range.len() as u32 + gap;
                epoch.push(Extent { range, lsn: Lsn(lsn), source });
            }
            (params, epoch)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn does_what_the_records_do_one_by_one((params, records) in any_epoch()) {
        let plan = Plan::build(records.iter().copied(), params);

        let mut expected = backing(params);
        records.iter().for_each(|record| apply(&mut expected, record.range, record.source));
        let mut content = backing(params);
        execute(&plan, params, &mut content)?;
        prop_assert_eq!(content.iter().zip(&expected).position(|(a, b)| a != b), None);
        // Again after a crash: nothing changes.
        execute(&plan, params, &mut content)?;
        prop_assert_eq!(content.iter().zip(&expected).position(|(a, b)| a != b), None);

        let newest = newest_bytes(&records, params);
        let fates = planned_fates(&plan, params)?;
        let expected_fates: Vec<Fate> =
            newest.chunks(params.block_bytes as usize).map(expected_fate).collect();
        prop_assert_eq!(&fates, &expected_fates);
        prop_assert_eq!(plan.is_empty(), fates.iter().all(|fate| *fate == Fate::Untouched));
        check_shape(&plan, params)?;
        check_bytes(&plan, &records, params, &fates)?;
        check_written(&plan, &newest)?;
    }

    #[test]
    fn is_the_same_in_any_order_of_arrival((params, records) in any_epoch(), turn in any::<prop::sample::Index>()) {
        let plan = Plan::build(records.iter().copied(), params);
        let mut turned = records.clone();
        turned.rotate_left(turn.index(records.len() + 1));
        prop_assert_eq!(Plan::build(turned.into_iter().rev(), params), plan);
    }

    #[test]
    fn written_ranges_are_what_the_index_forgets((params, records) in any_epoch()) {
        let mut index = Index::new();
        records.iter().for_each(|record| index.insert(*record));
        let last = records.last().map_or(Lsn::ZERO, |record| record.lsn);
        // A record that arrived after the epoch's end stays.
        let later = Extent { range: ByteRange::at(100, 1000), lsn: last.next(), source: Source::Zero };
        index.insert(later);
        let plan = Plan::build(records.into_iter(), params);
        plan.written_ranges().for_each(|range| index.remove_flushed(range, last));
        prop_assert_eq!(index.iter().collect::<Vec<_>>(), [later]);
    }
}

const PARAMS: PlanParams = PlanParams { block_bytes: 512, run_bytes_max: 2048 };

fn build(records: &[(u64, u64, Source)]) -> Plan {
    let extents = records.iter().zip(1..).map(|(&(start, end, source), lsn)| Extent {
        range: ByteRange { start, end },
        lsn: Lsn(lsn),
        source,
    });
    Plan::build(extents, PARAMS)
}

fn runs(plan: &Plan) -> Vec<(u64, u64, RunKind)> {
    plan.runs.iter().map(|run| (run.range.start, run.range.end, run.kind)).collect()
}

fn patches(plan: &Plan) -> Vec<(u64, bool)> {
    plan.patches.iter().map(|patch| (patch.block_offset, patch.needs_read)).collect()
}

#[test]
fn small_records_that_fill_a_block_make_a_run() {
    let plan = build(&[(300, 512, data(1, 0)), (0, 300, data(2, 0)), (512, 1024, data(3, 0))]);
    assert_eq!(runs(&plan), [(0, 1024, RunKind::Data)]);
    assert_eq!(plan.run_pieces(&plan.runs[0]).len(), 3);
    assert_eq!(patches(&plan), []);
}

#[test]
fn small_records_in_one_block_make_one_patch() {
    let plan = build(&[(10, 20, data(1, 0)), (500, 510, data(1, 50)), (15, 18, Source::Discard)]);
    assert_eq!(runs(&plan), []);
    assert_eq!(patches(&plan), [(0, true)]);
    let expected = [
        PlanPiece { range: ByteRange { start: 10, end: 15 }, source: data(1, 0) },
        PlanPiece { range: ByteRange { start: 15, end: 18 }, source: Source::Zero },
        PlanPiece { range: ByteRange { start: 18, end: 20 }, source: data(1, 8) },
        PlanPiece { range: ByteRange { start: 500, end: 510 }, source: data(1, 50) },
    ];
    assert_eq!(plan.patch_pieces(&plan.patches[0]), expected);
}

#[test]
fn a_block_of_data_and_zeroes_is_a_patch_without_read() {
    let plan = build(&[(0, 512, Source::Zero), (100, 200, data(1, 0))]);
    assert_eq!((runs(&plan), patches(&plan)), (vec![], vec![(0, false)]));
}

#[test]
fn zeroes_and_discards_that_share_a_block_zero_it() {
    let plan = build(&[(0, 1000, Source::Discard), (1000, 1536, Source::Zero)]);
    assert_eq!(runs(&plan), [(0, 512, RunKind::Discard), (512, 1536, RunKind::Zero)]);
    assert_eq!(patches(&plan), []);
}

#[test]
fn a_long_record_is_cut_into_bounded_runs() {
    let plan = build(&[(100, 5632, data(1, 0))]);
    assert_eq!(patches(&plan), [(0, true)]);
    let expected = [(512, 2560, RunKind::Data), (2560, 4608, RunKind::Data), (4608, 5632, RunKind::Data)];
    assert_eq!(runs(&plan), expected);
    let second = PlanPiece { range: ByteRange { start: 2560, end: 4608 }, source: data(1, 2460) };
    assert_eq!(plan.run_pieces(&plan.runs[1]), [second]);
}

#[test]
fn the_largest_volume_costs_no_more_than_a_small_one() {
    let plan = build(&[
        (0, VOLUME_BYTES_MAX, Source::Discard),
        (1 << 40, (1 << 40) + 1, data(1, 0)),
        (0, VOLUME_BYTES_MAX, Source::Zero),
        (0, VOLUME_BYTES_MAX, Source::Discard),
        (VOLUME_BYTES_MAX - 1, VOLUME_BYTES_MAX, data(1, 1)),
        (0, VOLUME_BYTES_MAX, Source::Zero),
        (1, VOLUME_BYTES_MAX - 1, Source::Discard),
        (7, 7, data(1, 2)),
    ]);
    let last = VOLUME_BYTES_MAX - 512;
    let expected =
        [(0, 512, RunKind::Zero), (512, last, RunKind::Discard), (last, VOLUME_BYTES_MAX, RunKind::Zero)];
    assert_eq!((runs(&plan), patches(&plan)), (expected.to_vec(), vec![]));
    assert_eq!(plan.bytes.bytes_in, u64::MAX);
}

#[test]
fn an_epoch_without_bytes_is_an_empty_plan() {
    assert!(build(&[]).is_empty());
    let plan = build(&[(5, 5, data(1, 0)), (512, 512, Source::Discard)]);
    assert!(plan.is_empty());
    assert_eq!(plan.written_ranges().next(), None);
}

#[test]
#[should_panic(expected = "beyond any volume")]
fn a_record_beyond_the_largest_volume_is_refused() {
    let _ = build(&[(VOLUME_BYTES_MAX, VOLUME_BYTES_MAX + 1, Source::Zero)]);
}
