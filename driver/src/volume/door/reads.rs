//! Reads: looked up, copied from the stage, read from the backing, or both.

use super::{Job, VolumeDoor};
use crate::base::ByteRange;
use crate::base::units::{align_down, align_up};
use crate::io::{AlignedBuf, Errno, Memory, Op, OpKind, Target, Token};
use crate::stage::serve::{Found, ReadPiece, ReadSource};
use crate::volume::request::{DoorIo, Request};

/// Most bytes of read buffers in flight on a door; further reads wait for one to finish.
pub(super) const READ_BYTES_MAX: u64 = 16 << 20;
/// Most buffers kept for reuse.
const SPARE_BUFFERS_MAX: usize = 128;
/// Most bytes of buffers kept for reuse.
const SPARE_BYTES_MAX: usize = 8 << 20;

impl VolumeDoor {
    pub(super) fn read<IO: DoorIo>(&mut self, request: Request, io: &mut IO) {
        self.jobs[request.tag as usize] = Job::ReadWaits(request);
        // Those that wait for a buffer are not overtaken: a large one would never find enough of them.
        if !self.reads_waiting.is_empty() || !self.has_buffer_for(&request) {
            let mut core = self.shared.core.lock();
            self.changes.publish(&mut core);
            core.read_parked(self.id, request.tag);
            self.unheard |= core.has_outcomes();
            self.reads_waiting.push_back(request.tag);
            return;
        }
        self.look_up(request, io);
    }

    /// Whether a read may have a buffer now: there is one in any case for a read alone.
    fn has_buffer_for(&self, request: &Request) -> bool {
        self.read_bytes == 0 || self.read_bytes + request.len <= READ_BYTES_MAX
    }

    fn look_up<IO: DoorIo>(&mut self, request: Request, io: &mut IO) {
        let range = ByteRange::at(request.offset, request.len);
        let mut pieces = std::mem::take(&mut self.pieces);
        let (found, unheard) = {
            let mut core = self.shared.core.lock();
            self.changes.publish(&mut core);
            let found = if core.is_damaged() && core.cold_regions() > 0 && core.is_staged(self.volume.id) {
                // Which bytes are behind the damage cannot be told, so none are given out.
                core.read_ended(self.id, request.tag);
                None
            } else {
                Some(core.read(
                    &self.shared.arena,
                    (self.id, request.tag),
                    self.volume.id,
                    range,
                    &mut pieces,
                ))
            };
            (found, core.has_outcomes())
        };
        // Claims may have waited for this read. They are carried out at the end of the batch at the latest.
        self.unheard |= unheard;
        match found {
            None => self.finish(request.tag, Err(Errno::EIO), io),
            Some(Found::Cold) => self.unheard = true,
            // Whoever publishes it says so.
            Some(Found::Early) => {}
            Some(Found::All) => self.read_pieces(request, &mut pieces, io),
        }
        self.pieces = pieces;
    }

    fn read_pieces<IO: DoorIo>(&mut self, request: Request, pieces: &mut [ReadPiece], io: &mut IO) {
        let range = ByteRange::at(request.offset, request.len);
        if let [ReadPiece { source: ReadSource::Backing, .. }] = pieces[..]
            && let Some(memory) = self.direct_memory(&request, io)
        {
            self.jobs[request.tag as usize] = Job::ReadDirect(request);
            return io.submit(self.read_of_backing(request.tag, range, memory));
        }
        if let [ReadPiece { source: ReadSource::Stage { region, offset }, .. }] = pieces[..] {
            let bytes = self.shared.arena.bytes(region, offset, offset + request.len as u32);
            let result = io.deliver(request.tag, 0, bytes);
            self.shared.arena.unpin(region);
            self.finish(request.tag, result, io);
            return;
        }
        self.read_backing(request, pieces, io);
    }

    /// The client's memory, if the backing can be read straight into it.
    fn direct_memory<IO: DoorIo>(&mut self, request: &Request, io: &IO) -> Option<Memory> {
        let block = u64::from(self.volume.backing_block_bytes);
        let aligned = request.offset.is_multiple_of(block) && request.len.is_multiple_of(block);
        if aligned && self.direct.attempts() { io.client_memory(request.tag) } else { None }
    }

    fn read_of_backing(&self, tag: u32, range: ByteRange, memory: Memory) -> Op {
        Op {
            token: Token(u64::from(tag)),
            target: Target::Backing(self.volume.id),
            kind: OpKind::Read,
            offset: range.start,
            len: range.len(),
            memory,
        }
    }

    /// Reads what is not staged from the backing, and lays what is over it.
    fn read_backing<IO: DoorIo>(&mut self, request: Request, pieces: &mut [ReadPiece], io: &mut IO) {
        let range = ByteRange::at(request.offset, request.len);
        let mut gaps = pieces.iter().filter(|p| p.source == ReadSource::Backing);
        let Some(first) = gaps.next() else {
            let mut buf = self.take_buffer(range.len() as usize);
            self.lay_over(pieces, range, &mut buf);
            let result = io.deliver(request.tag, 0, &buf);
            self.give_buffer(buf);
            self.finish(request.tag, result, io);
            return;
        };
        let block = u64::from(self.volume.backing_block_bytes);
        let end = gaps.next_back().unwrap_or(first).range.end;
        let whole = ByteRange { start: align_down(range.start, block), end: align_up(range.end, block) };
        let hull = ByteRange { start: align_down(first.range.start, block), end: align_up(end, block) };
        // One buffer serves the read and the result, so it spans the request even where only its middle is read.
        let hull = if pieces.len() == 1 { hull } else { whole };
        let buf = self.take_buffer(hull.len() as usize);
        self.read_bytes += hull.len();
        let mut kept = self.spare_pieces.pop().unwrap_or_default();
        kept.clear();
        kept.extend_from_slice(pieces);
        self.jobs[request.tag as usize] = Job::ReadBacking { request, hull, pieces: kept };
        io.submit(self.read_of_backing(request.tag, hull, Memory::Owned(buf)));
    }

    pub(super) fn read_done<IO: DoorIo>(
        &mut self,
        tag: u32,
        result: Result<(), Errno>,
        memory: Memory,
        io: &mut IO,
    ) {
        if let Job::ReadDirect(request) = self.jobs[tag as usize] {
            if result.is_ok() {
                self.direct.paid();
                return self.finish(tag, result, io);
            }
            // The device may not like the client's memory; what else is wrong shows again. At least the next read is not
            // direct, which is this one unless it has to wait for a buffer.
            self.direct.in_vain();
            return self.read(request, io);
        }
        let Job::ReadBacking { request, hull, pieces } = &mut self.jobs[tag as usize] else {
            panic!("no read of the backing is in flight for request {tag}")
        };
        let (request, hull, mut pieces) = (*request, *hull, std::mem::take(pieces));
        let Memory::Owned(mut buf) = memory else { panic!("reads of the backing own their buffer") };
        self.read_bytes -= hull.len();
        self.lay_over(&pieces, hull, &mut buf);
        let from = (request.offset - hull.start) as usize;
        let result = result.and_then(|()| io.deliver(tag, 0, &buf[from..from + request.len as usize]));
        pieces.clear();
        self.spare_pieces.push(pieces);
        self.give_buffer(buf);
        self.finish(tag, result, io);
        while let Some(&waiting) = self.reads_waiting.front() {
            let Job::ReadWaits(request) = self.jobs[waiting as usize] else { panic!("a read that waits") };
            if !self.has_buffer_for(&request) {
                break;
            }
            self.reads_waiting.pop_front();
            self.look_up(request, io);
        }
        if self.retired && std::mem::take(&mut self.unheard) {
            self.shared.kick_background();
        }
    }

    pub(super) fn retry_read<IO: DoorIo>(&mut self, tag: u32, io: &mut IO) {
        let Job::ReadWaits(request) = self.jobs[tag as usize] else { panic!("a read that waits") };
        self.read(request, io);
    }

    /// Copies staged pieces and zeroes to their place in `buf`, which holds the bytes of `range`, and unpins them.
    fn lay_over(&self, pieces: &[ReadPiece], range: ByteRange, buf: &mut [u8]) {
        for piece in pieces {
            let from = (piece.range.start - range.start) as usize;
            let into = || from..from + piece.range.len() as usize;
            match piece.source {
                ReadSource::Backing => {}
                ReadSource::Zero => buf[into()].fill(0),
                ReadSource::Stage { region, offset } => {
                    let bytes = self.shared.arena.bytes(region, offset, offset + piece.range.len() as u32);
                    buf[into()].copy_from_slice(bytes);
                    self.shared.arena.unpin(region);
                }
            }
        }
    }

    fn take_buffer(&mut self, len: usize) -> AlignedBuf {
        // A buffer of the same length costs nothing; another would be zeroed where it grows.
        match self.spare_buffers.iter().rposition(|buf| buf.len() == len) {
            Some(at) => {
                self.spare_bytes -= len;
                self.spare_buffers.swap_remove(at)
            }
            None => AlignedBuf::zeroed(len),
        }
    }

    fn give_buffer(&mut self, buf: AlignedBuf) {
        while !self.spare_buffers.is_empty()
            && (self.spare_buffers.len() >= SPARE_BUFFERS_MAX
                || self.spare_bytes + buf.len() > SPARE_BYTES_MAX)
        {
            self.spare_bytes -= self.spare_buffers.swap_remove(0).len();
        }
        self.spare_bytes += buf.len();
        self.spare_buffers.push(buf);
    }
}
