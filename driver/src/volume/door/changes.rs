//! Changes: gathered as they arrive, given their places together, filled, published together.
//! ```text
//!  arrived ──take_in──▶ placed ────fill───▶ filled ──index_filled──▶ indexed ──publish──▶ the core's
//!            core locked,     copy, checksum,        a shard of the            core locked
//!     in order of arrival     nothing locked         index locked
//! ```
//! A batch is bounded in number and bytes, since a place that is not published holds up those behind it, other doors' too. What
//! must see the changes before it (a read, a flush) and the end of a batch take in what has arrived. Places are filled and
//! published before anything else is done, so nobody waits for a place whose holder is at something else.

use zerocopy::IntoBytes;

use super::{Ask, VolumeDoor};
use crate::base::ByteRange;
use crate::base::checksum::crc64;
use crate::base::mutation::{Mutation, is};
use crate::format::record::{RECORD_HEADER_BYTES, Record, RecordKind};
use crate::io::Errno;
use crate::stage::core::{Ack, Claim, Core};
use crate::stage::ring::Slot;
use crate::stage::volume_index::Indexed;
use crate::volume::request::{DoorIo, Request, RequestKind};

/// Most changes that get their places together.
const BATCH_CHANGES: usize = 8;
/// A batch ends when it has this much payload.
const BATCH_BYTES: u64 = 64 << 10;

/// A filled place, to be indexed and published.
#[derive(Debug)]
struct Filled {
    slot: Slot,
    record: Record,
    ack: Option<Ack>,
}

/// Changes on their way into the log. The lists are empty between batches and keep their memory.
#[derive(Debug, Default)]
pub(super) struct Changes {
    arrived: Vec<Request>,
    arrived_bytes: u64,
    claims: Vec<Claim>,
    filled: Vec<Filled>,
    /// Places to be published.
    pub(super) indexed: Vec<(Indexed, Option<Ack>)>,
    /// Changes whose payload could not be had. They are answered once their places are published.
    failed: Vec<(u32, Errno)>,
}

impl Changes {
    /// Whether changes have arrived that have no place yet.
    pub(super) fn have_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// Whether nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.arrived.is_empty() && self.filled.is_empty() && self.indexed.is_empty() && self.failed.is_empty()
    }

    /// Hands what is filled and indexed over to the core.
    pub(super) fn publish(&mut self, core: &mut Core) {
        assert!(self.filled.is_empty(), "X1: what is filled is indexed before it is published");
        for (indexed, ack) in self.indexed.drain(..) {
            core.publish(indexed, ack);
        }
    }
}

impl VolumeDoor {
    /// Takes a change. It gets its place with those that come with it.
    pub(super) fn change<IO: DoorIo>(&mut self, request: Request, io: &mut IO) {
        let changes = &mut self.changes;
        changes.arrived.push(request);
        changes.arrived_bytes += payload_bytes(&request);
        if changes.arrived.len() >= BATCH_CHANGES || changes.arrived_bytes >= BATCH_BYTES {
            // Acknowledgements are taken out as often, so that clients go on while the rest of a round is served.
            self.take_in(io);
            self.run(io, Ask::Nothing);
        }
    }

    /// Gives what has arrived its places, fills and indexes them. They are to be published next.
    pub(super) fn take_in<IO: DoorIo>(&mut self, io: &mut IO) {
        if self.changes.arrived.is_empty() {
            return;
        }
        let mut arrived = std::mem::take(&mut self.changes.arrived);
        let mut claims = std::mem::take(&mut self.changes.claims);
        self.changes.arrived_bytes = 0;
        self.unheard = true;
        {
            let mut core = self.shared.core.lock();
            let claim =
                |r: &Request| core.claim(self.id, r.tag, payload_bytes(r) as u32, self.volume.on_log_error);
            claims.extend(arrived.iter().map(claim));
        }
        arrived.iter().for_each(|r| self.index.expect(ByteRange::at(r.offset, r.len)));
        for (request, claim) in arrived.drain(..).zip(claims.drain(..)) {
            match claim {
                Claim::Slot(slot) => self.fill(slot, &request, io),
                Claim::Wait => {}
                Claim::Refused(errno) => self.finish(request.tag, Err(errno), io),
            }
        }
        self.changes.arrived = arrived;
        self.changes.claims = claims;
        self.index_filled();
    }

    /// Puts what was filled into the volume's index: right before it is published, as reads wait for that from now on.
    pub(super) fn index_filled(&mut self) {
        let indexed = |filled: Filled| (self.index.index(filled.slot, &filled.record), filled.ack);
        self.changes.indexed.extend(self.changes.filled.drain(..).map(indexed));
    }

    /// Fills the place of a change, which is to be indexed and published next.
    pub(super) fn fill<IO: DoorIo>(&mut self, mut slot: Slot, request: &Request, io: &mut IO) {
        let region = slot.region();
        let lsn = slot.lsn();
        io.placed(request.tag, lsn);
        let payload_bytes = slot.payload_bytes();
        let timestamp_ns = *self.batch_ns.get_or_insert_with(|| self.shared.clock.unix_ns());
        let bytes = self.shared.arena.slot_bytes(&mut slot);
        let (header, rest) = bytes.split_at_mut(RECORD_HEADER_BYTES as usize);
        let (payload, padding) = rest.split_at_mut(payload_bytes as usize);
        padding.fill(0);
        let mut kind = match request.kind {
            RequestKind::Write => RecordKind::Write,
            RequestKind::WriteZeroes => RecordKind::WriteZeroes,
            _ => RecordKind::Discard,
        };
        let mut failed = None;
        if kind == RecordKind::Write
            && let Err(errno) = io.fetch(request.tag, 0, payload)
        {
            // The place is claimed, so the log must hold something there: a record without effect.
            payload.fill(0);
            if !is(Mutation::UnfetchedWriteCounts) {
                kind = RecordKind::Void;
            }
            failed = Some(errno);
        }
        let record = Record {
            lsn,
            volume: self.volume.id,
            kind,
            range: ByteRange::at(request.offset, request.len),
            payload_bytes,
            payload_checksum: crc64(payload),
            timestamp_ns,
            incarnation: self.shared.rules.incarnation as u16,
        };
        header.copy_from_slice(record.encode(self.shared.rules.salt, region).as_bytes());
        let ack = failed.is_none().then(|| self.ack(request));
        self.changes.filled.push(Filled { slot, record, ack });
        if let Some(errno) = failed {
            self.changes.failed.push((request.tag, errno));
        }
    }

    /// Answers changes whose payload could not be had, now that their places are published.
    pub(super) fn answer_failed<IO: DoorIo>(&mut self, io: &mut IO) {
        while let Some((tag, errno)) = self.changes.failed.pop() {
            self.finish(tag, Err(errno), io);
        }
    }
}

fn payload_bytes(request: &Request) -> u64 {
    if request.kind == RequestKind::Write { request.len } else { 0 }
}
