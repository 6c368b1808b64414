//! The flush plan: what one epoch does to the backing of one volume.
//!
//! Records go in, device operations come out. Inside an epoch the last writer wins byte by byte, so bytes that were
//! overwritten within it never reach the backing. What is left is sorted by offset and cut at block boundaries:
//!
//! ```text
//!   records       |---data 1---|-----data 2-----|  |-zero-|-------discard--------|
//!   blocks    :         :         :         :         :         :         :         :
//!   plan      :  patch  :    run of data    :  patch  : zeroes  : discard :  patch  :
//! ```
//!
//! A block that the epoch covers completely with data, with zeroes or with discards belongs to a [`Run`], however
//! many records it took; zeroes and discards that share a block zero it. Any other block is a [`Patch`]: its new
//! content is put together in memory, around what the backing holds if some bytes are missing.
//!
//! A plan is idempotent: a crash in the middle of it is repaired by carrying out the same plan again. For patches this
//! rests on a torn write leaving each byte old or new: the bytes that a patch read, it writes back unchanged, and no
//! record holds them.

use std::iter;
use std::mem;
use std::ops::Range;

use crate::base::ByteRange;
use crate::base::limits::{BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, VOLUME_BYTES_MAX};
use crate::base::units::{align_down, align_up};
use crate::stage::{Extent, Index, Source};

#[cfg(test)]
mod tests;

/// What bounds the operations of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanParams {
    /// Block size of the backing: a power of two within the format's limits.
    pub block_bytes: u32,
    /// Longest run of data: a multiple of `block_bytes`.
    pub run_bytes_max: u32,
}

/// What a run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RunKind {
    /// Writes the bytes of its pieces.
    Data,
    /// Zeroes its range.
    Zero,
    /// Discards its range.
    Discard,
}

/// One operation over whole blocks. Runs of data are at most `run_bytes_max` long, the others unbounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Block-aligned range of the backing.
    pub range: ByteRange,
    /// What to do.
    pub kind: RunKind,
    pieces: Range<u32>,
}

/// One block that the epoch covers only in part or with data and zeroes: read if `needs_read`, apply the pieces, write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// First byte of the block.
    pub block_offset: u64,
    /// Whether some bytes of the block are not covered by the pieces and have to come from the backing.
    pub needs_read: bool,
    pieces: Range<u32>,
}

/// A part of a run or a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanPiece {
    /// Bytes of the volume.
    pub range: ByteRange,
    /// Source of the range's first byte.
    pub source: Source,
}

impl PlanPiece {
    /// The part of this piece within `range`, which it must contain.
    fn part(self, range: ByteRange) -> PlanPiece {
        assert!(
            self.range.start <= range.start && range.end <= self.range.end,
            "a part lies within its piece"
        );
        PlanPiece { range, source: self.source.advanced(range.start - self.range.start) }
    }

    /// Whether `next` goes on where this piece ends, in the volume and at the source.
    fn continues_with(self, next: PlanPiece) -> bool {
        let same_source = match (self.source, next.source) {
            (Source::Data { region, offset }, Source::Data { region: next_region, offset: next_offset }) => {
                region == next_region && u64::from(offset) + self.range.len() == u64::from(next_offset)
            }
            (a, b) => a == b,
        };
        same_source && self.range.end == next.range.start
    }

    fn is_data(&self) -> bool {
        matches!(self.source, Source::Data { .. })
    }
}

/// How much a plan takes in and puts out, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanBytes {
    /// Lengths of all records. Saturates, as a few discards of whole volumes exceed 64 bits.
    pub bytes_in: u64,
    /// Lengths of the records that carry data.
    pub bytes_in_data: u64,
    /// Written to the backing: runs of data and patches.
    pub bytes_out: u64,
    /// Read from the backing for patches.
    pub bytes_read: u64,
    /// Zeroed by runs.
    pub bytes_zeroed: u64,
    /// Discarded by runs.
    pub bytes_discarded: u64,
}

/// The operations of one epoch on one volume. They touch disjoint blocks, so they may be carried out in any order and
/// at the same time; a sync has to follow all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Operations over whole blocks, by offset.
    pub runs: Vec<Run>,
    /// Blocks to put together in memory, by offset.
    pub patches: Vec<Patch>,
    /// Totals.
    pub bytes: PlanBytes,
    pieces: Vec<PlanPiece>,
}

impl Plan {
    /// Plans the flush of `extents`, the records of the epoch on this volume. The order of the records is that of
    /// their LSNs; the iterator's order does not matter. Records without a byte are ignored.
    #[must_use]
    pub fn build(extents: impl Iterator<Item = Extent>, params: PlanParams) -> Plan {
        let mut builder = Builder::new(params);
        // Whatever need not reach the backing for a reason outside the epoch can be cut out between the two steps.
        let newest = builder.compose(extents);
        builder.lay_out(&newest)
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.patches.is_empty()
    }

    /// The pieces of a run of this plan. They cover a run of data exactly and in order; other runs have none.
    #[must_use]
    pub fn run_pieces(&self, run: &Run) -> &[PlanPiece] {
        self.slice(&run.pieces)
    }

    /// The pieces of a patch of this plan: disjoint, by offset, data or zeroes (the edge of a discard acts as zeroes).
    #[must_use]
    pub fn patch_pieces(&self, patch: &Patch) -> &[PlanPiece] {
        self.slice(&patch.pieces)
    }

    /// Exactly the bytes that the epoch's records cover, by offset, neighbours joined: what the index may forget, up
    /// to the last LSN of the epoch, once the plan has been carried out and synced.
    pub fn written_ranges(&self) -> impl Iterator<Item = ByteRange> {
        let mut runs = self.runs.iter().map(|run| run.range).peekable();
        let patched = self.patches.iter().flat_map(|patch| self.patch_pieces(patch));
        let mut patched = patched.map(|piece| piece.range).peekable();
        let mut next = move || match (runs.peek(), patched.peek()) {
            (Some(run), Some(piece)) if piece.start < run.start => patched.next(),
            (Some(_), _) => runs.next(),
            (None, _) => patched.next(),
        };
        let mut ahead = next();
        iter::from_fn(move || {
            let mut joined = ahead?;
            loop {
                ahead = next();
                match ahead {
                    Some(range) if range.start == joined.end => joined.end = range.end,
                    _ => return Some(joined),
                }
            }
        })
    }

    fn slice(&self, range: &Range<u32>) -> &[PlanPiece] {
        &self.pieces[range.start as usize..range.end as usize]
    }
}

/// A plan in the making. Pieces arrive by offset; those that do not fill a block wait in `open` until their block is
/// complete.
struct Builder {
    block_bytes: u64,
    run_bytes_max: u64,
    /// Pieces of one block, by offset.
    open: Vec<PlanPiece>,
    plan: Plan,
}

impl Builder {
    fn new(params: PlanParams) -> Builder {
        let PlanParams { block_bytes, run_bytes_max } = params;
        assert!(block_bytes.is_power_of_two(), "block size {block_bytes} is not a power of two");
        assert!((BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_bytes), "block size {block_bytes}");
        assert!(run_bytes_max > 0 && run_bytes_max % block_bytes == 0, "run of {run_bytes_max} bytes");
        Builder {
            block_bytes: block_bytes.into(),
            run_bytes_max: run_bytes_max.into(),
            open: Vec::new(),
            plan: Plan::default(),
        }
    }

    /// The newest bytes of the epoch.
    fn compose(&mut self, extents: impl Iterator<Item = Extent>) -> Index {
        let bytes = &mut self.plan.bytes;
        let count = |extent: &Extent| {
            assert!(extent.range.end <= VOLUME_BYTES_MAX, "record at {} is beyond any volume", extent.range);
            let len = extent.range.len();
            bytes.bytes_in = bytes.bytes_in.saturating_add(len);
            if matches!(extent.source, Source::Data { .. }) {
                bytes.bytes_in_data += len;
            }
        };
        Index::of(extents.inspect(count).collect())
    }

    /// Turns the epoch's newest bytes into operations.
    fn lay_out(mut self, newest: &Index) -> Plan {
        let mut covered = 0;
        for Extent { range, source, .. } in newest.iter() {
            covered += range.len();
            self.add(PlanPiece { range, source });
        }
        self.close_block();
        self.count();
        let planned: u64 = self.plan.written_ranges().map(ByteRange::len).sum();
        assert_eq!(planned, covered, "a plan writes every byte of its epoch once");
        self.plan
    }

    /// Takes the next piece by offset: whole blocks go to runs, the edges wait for the rest of their blocks.
    fn add(&mut self, piece: PlanPiece) {
        let PlanPiece { range, .. } = piece;
        let whole = ByteRange {
            start: align_up(range.start, self.block_bytes),
            end: align_down(range.end, self.block_bytes),
        };
        // A piece within one block is all head; one across a boundary that fills neither block is head and tail.
        let head = ByteRange { start: range.start, end: whole.start.min(range.end) };
        let tail = ByteRange { start: whole.end.max(head.end), end: range.end };
        self.add_edge(piece, head);
        if !whole.is_empty() {
            self.close_block();
            match piece.source {
                Source::Data { .. } => self.push_data(piece.part(whole)),
                Source::Zero => self.push_plain(whole, RunKind::Zero),
                Source::Discard => self.push_plain(whole, RunKind::Discard),
            }
        }
        self.add_edge(piece, tail);
    }

    /// Puts the part `edge` of `piece`, which lies within one block, with the other pieces of its block.
    fn add_edge(&mut self, piece: PlanPiece, edge: ByteRange) {
        if edge.is_empty() {
            return;
        }
        let block_offset = align_down(edge.start, self.block_bytes);
        assert!(edge.end <= block_offset + self.block_bytes, "edge {edge} crosses a block boundary");
        if self.open.last().is_some_and(|last| last.range.end <= block_offset) {
            self.close_block();
        }
        self.open.push(piece.part(edge));
    }

    /// Decides what becomes of the open block: its pieces are all there.
    fn close_block(&mut self) {
        let Some(first) = self.open.first() else { return };
        let block = ByteRange::at(align_down(first.range.start, self.block_bytes), self.block_bytes);
        let mut pieces = mem::take(&mut self.open);
        let covered: u64 = pieces.iter().map(|piece| piece.range.len()).sum();
        assert!(covered <= self.block_bytes, "block {block} is covered more than once");
        let kind = if covered == self.block_bytes { run_kind(&pieces) } else { None };
        match kind {
            Some(RunKind::Data) => pieces.iter().for_each(|piece| self.push_data(*piece)),
            Some(kind) => self.push_plain(block, kind),
            None => self.push_patch(block, covered < self.block_bytes, &pieces),
        }
        // Keep the allocation for the next block.
        pieces.clear();
        self.open = pieces;
    }

    /// Appends data to the last run if it goes on there, else to new ones. Whoever pushes parts of a block pushes all
    /// of them, so that runs end on block boundaries.
    fn push_data(&mut self, piece: PlanPiece) {
        assert!(piece.is_data(), "only data goes to runs of data");
        let mut at = piece.range.start;
        while at < piece.range.end {
            let room = self.plan.runs.last().map_or(0, |run| {
                let goes_on = run.kind == RunKind::Data && run.range.end == at;
                if goes_on { self.run_bytes_max - run.range.len() } else { 0 }
            });
            if room == 0 {
                let count = self.piece_count();
                let range = ByteRange { start: at, end: at };
                self.plan.runs.push(Run { range, kind: RunKind::Data, pieces: count..count });
                continue;
            }
            let end = piece.range.end.min(at + room);
            let mut pieces = self.plan.runs.last().map(|run| run.pieces.clone()).expect("there is a run");
            self.push_piece(&mut pieces, piece.part(ByteRange { start: at, end }));
            let run = self.plan.runs.last_mut().expect("there is a run");
            run.pieces = pieces;
            run.range.end = end;
            at = end;
        }
    }

    /// Appends a run without data, or lengthens the last one.
    fn push_plain(&mut self, range: ByteRange, kind: RunKind) {
        match self.plan.runs.last_mut() {
            Some(run) if run.kind == kind && run.range.end == range.start => run.range.end = range.end,
            _ => {
                let count = self.piece_count();
                self.plan.runs.push(Run { range, kind, pieces: count..count });
            }
        }
    }

    fn push_patch(&mut self, block: ByteRange, needs_read: bool, from: &[PlanPiece]) {
        let count = self.piece_count();
        let mut pieces = count..count;
        for &PlanPiece { range, source } in from {
            let source = if source == Source::Discard { Source::Zero } else { source };
            self.push_piece(&mut pieces, PlanPiece { range, source });
        }
        self.plan.patches.push(Patch { block_offset: block.start, needs_read, pieces });
    }

    /// Appends a piece to its owner's `pieces`, the last ones of the plan, and joins what a split had separated.
    fn push_piece(&mut self, pieces: &mut Range<u32>, piece: PlanPiece) {
        assert_eq!(pieces.end, self.piece_count(), "only the last run or patch takes pieces");
        if pieces.start < pieces.end
            && let Some(last) = self.plan.pieces.last_mut()
            && last.continues_with(piece)
        {
            last.range.end = piece.range.end;
            return;
        }
        self.plan.pieces.push(piece);
        pieces.end += 1;
    }

    fn piece_count(&self) -> u32 {
        u32::try_from(self.plan.pieces.len()).expect("the index bounds the pieces of an epoch")
    }

    /// Adds up what the operations transfer.
    fn count(&mut self) {
        let Plan { runs, patches, bytes, .. } = &mut self.plan;
        for run in runs {
            match run.kind {
                RunKind::Data => bytes.bytes_out += run.range.len(),
                RunKind::Zero => bytes.bytes_zeroed += run.range.len(),
                RunKind::Discard => bytes.bytes_discarded += run.range.len(),
            }
        }
        for patch in patches {
            bytes.bytes_out += self.block_bytes;
            bytes.bytes_read += if patch.needs_read { self.block_bytes } else { 0 };
        }
    }
}

/// The kind of run that a block fully covered by `pieces` belongs to; none if data and zeroes share it. Zeroes and
/// discards together are zeroes: that satisfies both.
fn run_kind(pieces: &[PlanPiece]) -> Option<RunKind> {
    let data_count = pieces.iter().filter(|piece| piece.is_data()).count();
    if data_count == pieces.len() {
        Some(RunKind::Data)
    } else if data_count > 0 {
        None
    } else if pieces.iter().all(|piece| piece.source == Source::Discard) {
        Some(RunKind::Discard)
    } else {
        Some(RunKind::Zero)
    }
}
