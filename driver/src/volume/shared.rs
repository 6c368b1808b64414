//! What the threads of an engine share: the core behind its lock, the arena, and the ways to reach each other.
//!
//! Ownership: the core's lock is held for decisions only, never across I/O, copying or checksums. Outcomes are taken out
//! under the lock and carried out after it by the thread that got them: completions of its own door directly, log writes on
//! its own ring. Those of other doors are put into their mailboxes under the lock, and wake-ups follow after it. Nothing
//! here blocks on the control plane.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use zerocopy::IntoBytes;

use super::request::Wake;
use crate::base::Lsn;
use crate::base::mutation::{Mutation, is};
use crate::format::geometry::Geometry;
use crate::format::group::{GROUP_HEADER_BYTES, Group};
use crate::format::region::RegionStart;
use crate::io::{Memory, Op, OpKind, Target, Token};
use crate::stage::arena::Arena;
use crate::stage::core::{Core, DoorId, Marks, Outcome};
use crate::stage::ring::ClosedGroup;
use crate::stage::walk::{Rules, digest_of};

/// Time, as the engine sees it. Nothing correct depends on it.
pub trait Clock: Send + Sync {
    /// Nanoseconds since the Unix epoch, for timestamps.
    fn unix_ns(&self) -> u64;
    /// Nanoseconds since some fixed instant, for intervals.
    fn monotonic_ns(&self) -> u64;
}

/// Bit of the tokens of log writes. Those of doors and of the background do not have it.
const LOG_TOKENS: u64 = 1 << 63;

fn log_token(group_seq: u64) -> Token {
    assert!(group_seq < LOG_TOKENS, "no log has that many groups");
    Token(LOG_TOKENS | group_seq)
}

/// Sequence number of the group whose log write carries this token; `None` for other operations.
#[must_use]
pub fn log_write_of(token: Token) -> Option<u64> {
    (token.0 & LOG_TOKENS != 0).then_some(token.0 & !LOG_TOKENS)
}

/// A door as other threads see it.
pub struct Mailbox {
    messages: Mutex<Vec<Outcome>>,
    wake: Arc<dyn Wake>,
}

impl Mailbox {
    /// Takes what was left, at the end of `into`.
    pub fn take(&self, into: &mut Vec<Outcome>) {
        into.append(&mut self.messages.lock());
    }

    /// Whether its thread has to be woken.
    pub(super) fn put(&self, outcome: Outcome) -> bool {
        let mut messages = self.messages.lock();
        messages.push(outcome);
        messages.len() == 1
    }
}

/// A group that is to be written, and what its headers say of the core at that time.
struct LogWrite {
    group: ClosedGroup,
    start: RegionStart,
    checkpoint_lsn: Lsn,
    undurable_before: u32,
}

impl LogWrite {
    fn of(group: ClosedGroup, core: &Core) -> LogWrite {
        let region = core.ring().region(group.region).expect("P1: a region lives until it is flushed");
        LogWrite {
            start: region.start,
            checkpoint_lsn: core.checkpoint(),
            undurable_before: core.undurable_before(group.group_seq),
            group,
        }
    }
}

/// What the threads of an engine share.
pub struct Shared {
    /// Decisions.
    pub core: Mutex<Core>,
    /// How far the core is.
    pub marks: Arc<Marks>,
    /// Regions in memory.
    pub arena: Arc<Arena>,
    /// Map of the stage device.
    pub geometry: Geometry,
    /// Validity of log structures.
    pub rules: Rules,
    /// Time.
    pub clock: Arc<dyn Clock>,
    doors: RwLock<BTreeMap<DoorId, Arc<Mailbox>>>,
    background: Arc<dyn Wake>,
    /// Wake-ups of the background, for status.
    pub kicks: AtomicU64,
}

impl Shared {
    /// Shared part of an engine whose background is woken by `background`.
    #[must_use]
    pub fn new(
        core: Core,
        arena: Arc<Arena>,
        rules: Rules,
        clock: Arc<dyn Clock>,
        background: Arc<dyn Wake>,
    ) -> Shared {
        Shared {
            geometry: *core.ring().geometry(),
            marks: core.marks(),
            core: Mutex::new(core),
            arena,
            rules,
            clock,
            doors: RwLock::new(BTreeMap::new()),
            background,
            kicks: AtomicU64::new(0),
        }
    }

    /// Makes a door reachable.
    pub fn add_door(&self, door: DoorId, wake: Arc<dyn Wake>) -> Arc<Mailbox> {
        let mailbox = Arc::new(Mailbox { messages: Mutex::new(Vec::new()), wake });
        let before = self.doors.write().insert(door, mailbox.clone());
        assert!(before.is_none(), "door ids are given out once");
        mailbox
    }

    /// Forgets a door that has no request in flight.
    pub fn remove_door(&self, door: DoorId) {
        let is_unheard = {
            let mut core = self.core.lock();
            core.forget_door(door);
            core.has_outcomes()
        };
        if is_unheard {
            self.kick_background();
        }
        self.doors.write().remove(&door);
    }

    /// Wakes the background.
    pub fn kick_background(&self) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
        self.background.wake();
    }

    /// Lets `decide` at the core, then takes what the core has decided and carries it out: what concerns the door `own` is
    /// appended to `outcomes`, what other threads left for it first; what concerns other doors goes to their mailboxes; log
    /// writes are submitted through `submit`, and their tokens tell the group (see [`log_write_of`]). Returns the number of log
    /// writes.
    ///
    /// The outcomes of a door reach it in the order of the decisions, whatever threads they pass through: they change hands
    /// with the core locked.
    pub fn carry_out(
        &self,
        own: Option<(DoorId, &Mailbox)>,
        outcomes: &mut Vec<Outcome>,
        decide: &mut dyn FnMut(&mut Core),
        submit: &mut dyn FnMut(Op),
    ) -> u32 {
        let (mut log_writes, mut kicks, mut awaken) = (Vec::new(), false, Vec::new());
        {
            let mut core = self.core.lock();
            decide(&mut core);
            if let Some((_, mailbox)) = own {
                mailbox.take(outcomes);
            }
            // The background has no door; what it has itself is carried out, too.
            let from = if own.is_some() { outcomes.len() } else { 0 };
            core.take_outcomes(outcomes);
            let id = own.map(|(id, _)| id);
            for outcome in outcomes.extract_if(from.., |outcome| outcome.door().is_none_or(|d| Some(d) != id))
            {
                match (outcome.door(), outcome) {
                    (Some(door), outcome) => awaken.extend(self.leave(door, outcome)),
                    (None, Outcome::WriteLog(group)) => log_writes.push(LogWrite::of(group, &core)),
                    (None, _) => kicks = true,
                }
            }
        }
        for mailbox in awaken {
            mailbox.wake.wake();
        }
        for write in &log_writes {
            submit(self.log_write(write));
        }
        if kicks {
            self.kick_background();
        }
        log_writes.len() as u32
    }

    /// Leaves an outcome for another door; its mailbox, if its thread has to be woken.
    fn leave(&self, door: DoorId, outcome: Outcome) -> Option<Arc<Mailbox>> {
        let Some(mailbox) = self.doors.read().get(&door).cloned() else {
            // It asked to be told, and is gone.
            assert!(matches!(outcome, Outcome::Published { .. }), "a door outlives its requests");
            return None;
        };
        mailbox.put(outcome).then_some(mailbox)
    }

    /// Finishes a group's bytes in the arena and makes the operation that writes it.
    fn log_write(&self, write: &LogWrite) -> Op {
        let LogWrite { group, start, checkpoint_lsn, undurable_before } = write;
        let records_at = group.header_offset + GROUP_HEADER_BYTES;
        let records = self.arena.bytes(group.region, records_at, group.records_end);
        let header = Group {
            record_count: group.record_count,
            group_seq: group.group_seq,
            region: group.region,
            first_lsn: group.first_lsn,
            group_bytes: group.end - group.header_offset,
            records_digest: digest_of(records, group.record_count),
            incarnation: self.rules.incarnation as u32,
            undurable_before: *undurable_before,
            checkpoint_lsn: *checkpoint_lsn,
        }
        .encode(self.rules.salt);
        let slot = group.region.slot(self.geometry.region_count);
        let region_header = group.begins_region().then(|| start.encode(self.rules.salt, slot));
        self.arena.write_group_headers(
            group,
            region_header.as_ref().map(IntoBytes::as_bytes),
            header.as_bytes(),
        );
        let len = group.end - group.write_from;
        Op {
            token: log_token(group.group_seq),
            target: Target::Stage,
            kind: if is(Mutation::LogWriteIsNotDurable) { OpKind::Write } else { OpKind::WriteDurable },
            offset: self.geometry.region_offset(group.region) + u64::from(group.write_from),
            len: u64::from(len),
            memory: Memory::Shared {
                region: self.arena.clone(),
                offset: self.arena.position(group.region, group.write_from),
                len: len as usize,
            },
        }
    }

    /// Everything up to here is on the backings.
    #[must_use]
    pub fn checkpoint(&self) -> Lsn {
        self.core.lock().checkpoint()
    }
}
