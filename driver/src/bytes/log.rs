//! An append log in a byte range of a volume: what most programs want byte-addressable persistent memory for.
//!
//! Format: `format/append_log.rs`. The store gives two things, and everything here stands on them: a write is atomic, and
//! the writes that survive a crash are a prefix of the order in which they were made. So an append is one write, there is no
//! commit record, and the end of the log is where the chain of valid entries ends.
//!
//! One handle at a time changes a log: whoever is not sure of that opens the session as the volume's sole writer (B9), with
//! one handle of the log. All of a handle's writes are made under its lock, hence in the order of positions.
//! "Made" below means: in the order of writes of which the store's content is the effect. What a crash took away was
//! never made: it reached nothing, and nothing after it did.
//!
//! Invariants:
//! - L1 No position is written twice. Positions of a handle only grow, and they start where its scan ended: behind all
//!   entries that were ever made (L4). An entry of a lost future is no exception, as it was not made.
//! - L2 The bytes of the entries from `head` on are overwritten by nothing: room for an append is counted from the head.
//!   `truncate` writes the header first and frees the space after, so whoever keeps a write into freed space has kept the
//!   header that freed it.
//! - L3 Everything before the header's hint was made before the header. So it is there whenever the header is, the hint
//!   is never behind the tail's back, and opening may begin its scan there. Head and hint are one write: a truncation
//!   past the old hint takes the hint along.
//! - L4 The scan finds exactly the last entry made. It does not stop early: between hint and tail every entry is whole (L1,
//!   L2), and of the handle whose header is in force (L5). It does not go too far: what it would take for an entry at the
//!   tail must carry the tail as its position, and no such entry was made in this generation (L1): entries of earlier
//!   laps carry smaller positions, those of earlier formats have another salt. A payload that imitates an entry would have
//!   to know the generation, the opening and a position that the log has not come to.
//! - L5 The first change of a handle is a header with a new random opening and the tail it found as the hint; its entries
//!   carry the opening. Hence behind the hint only entries of the header's opening count. Order alone makes this
//!   unnecessary; it is there for the case that a writer which was thought dead still had writes on their way: what
//!   they leave behind the new tail does not continue the log.
//! - L6 A pad is a write of its own. After a crash between it and its entry the log ends with a pad, which holds nothing
//!   and is passed over; the next entry goes to the start of the lap, where it would have gone before.
//! - L7 After a failed write nothing more is written: a log never has a hole. The handle says so at every further change,
//!   and a new one finds what was made.
//!
//! What is found in the log after opening was made, but need not be durable yet: the handle that wrote it may have died
//! before it persisted it. [`AppendLog::persist`] makes such entries durable like its own.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;
use zerocopy::IntoBytes;

use self::place::{Bounds, Refusal, Shape};
use self::window::{Found, Window};
use super::{ByteStore, Failure, Result, Ticket};
use crate::base::ByteRange;
use crate::format::append_log::{CAPACITY_BYTES_MIN, Entry, EntryKind, LOG_HEADER_BYTES, LogHeader};

mod open;
mod place;
#[cfg(test)]
mod tests;
mod window;

/// The hint is written again after this many bytes of entries.
const HINT_BYTES: u64 = 1 << 20;
/// Read at once by a single read, by a scan or an iteration.
const AHEAD_ONE: u64 = 512;
const AHEAD_MANY: u64 = 256 << 10;
/// Positions whose tickets are remembered; of more, every other is forgotten.
const TICKETS_MAX: usize = 4096;

/// Place of an entry in the log: grows for ever, whatever is truncated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What to do about what is in the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// There is a log, or opening fails.
    MustExist,
    /// Makes a log if the range is blank.
    CreateIfMissing,
    /// Makes a new, empty log, whatever is there.
    Format,
}

/// An append log; see the module.
#[derive(Debug)]
pub struct AppendLog<S: ByteStore> {
    store: S,
    base: u64,
    shape: Shape,
    generation: u64,
    /// Of this handle.
    opening: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bounds: Bounds,
    /// The hint in the store; `None` until this handle has written a header.
    hint: Option<u64>,
    /// Ends of entries and the tickets that make everything before them durable, both growing.
    tickets: VecDeque<(u64, Ticket)>,
    /// Everything before this position is durable, and so is the header; `None`: nothing is known to be.
    durable: Option<u64>,
    /// Why nothing more is written.
    failed: Option<Failure>,
}

impl<S: ByteStore> AppendLog<S> {
    /// Opens or makes a log in `range` of the store.
    pub fn open(store: S, range: ByteRange, mode: OpenMode) -> Result<AppendLog<S>> {
        let capacity = open::check_range(&store, range)?;
        let shape = Shape::new(capacity, store.write_bytes_max());
        let base = range.start;
        let found = open::find(&store, range, mode)?;
        let header = found.unwrap_or_else(|| LogHeader {
            capacity,
            generation: random(),
            opening: random(),
            head: 0,
            hint: 0,
        });
        let mut state = State {
            bounds: Bounds { head: header.head, tail: header.hint },
            hint: None,
            tickets: VecDeque::new(),
            durable: None,
            failed: None,
        };
        if found.is_some() {
            let window = Window::new(shape, base, header.generation, AHEAD_MANY);
            state.bounds.tail = open::find_tail(&store, &header, &shape, window)?;
        }
        let opening = if found.is_some() { random() } else { header.opening };
        let log = AppendLog {
            store,
            base,
            shape,
            generation: header.generation,
            opening,
            state: Mutex::new(state),
        };
        if found.is_none() {
            log.write_header(&mut log.state.lock(), 0)?;
        }
        Ok(log)
    }

    /// Appends an entry whose payload are these parts, one after the other. It is in the log now; it is durable when the
    /// ticket is.
    pub fn append(&self, parts: &[&[u8]]) -> Result<(Position, Ticket)> {
        let payload = parts.iter().map(|part| part.len() as u64).sum();
        let mut state = self.state_for_change()?;
        let place = self.shape.place(state.bounds, payload).map_err(|why| self.refusal(why, payload))?;
        if state.hint.is_none_or(|hint| state.bounds.tail - hint >= HINT_BYTES) {
            let head = state.bounds.head;
            self.write_header(&mut state, head)?;
        }
        if let Some(rest) = place.pad {
            let pad = Shape::pad(state.bounds.tail, self.opening, rest);
            self.write(&mut state, pad.position, &[pad.encode(self.generation, &[]).as_bytes()])?;
            state.bounds.tail = place.position;
        }
        let entry =
            Entry { position: place.position, opening: self.opening, kind: EntryKind::Data(payload as u32) };
        let header = entry.encode(self.generation, parts);
        let mut whole = Vec::with_capacity(1 + parts.len());
        whole.push(header.as_bytes());
        whole.extend(parts.iter().filter(|part| !part.is_empty()));
        let ticket = self.write(&mut state, place.position, &whole)?;
        state.bounds.tail = place.tail;
        state.remember(place.tail, ticket, self.store.durable());
        Ok((Position(place.position), ticket))
    }

    /// Waits until the entry at `position` and everything before it is durable; at the tail: everything in the log.
    /// `ETIMEDOUT`.
    pub fn persist(&self, position: Position, timeout: Option<Duration>) -> Result<()> {
        let ticket = {
            let mut state = self.state.lock();
            let bounds = state.bounds;
            if position.0 > bounds.tail {
                return Err(outside(position, bounds));
            }
            // The end of the entry is not known, but it is behind this.
            let end = if position.0 == bounds.tail { bounds.tail } else { position.0 + 1 };
            state.forget(self.store.durable());
            if state.durable.is_some_and(|durable| end <= durable) {
                return Ok(());
            }
            if let Some(failure) = &state.failed {
                return Err(failure.clone());
            }
            match state.tickets.iter().find(|(covers, _)| *covers >= end) {
                Some((_, ticket)) => *ticket,
                // An earlier handle wrote it. What this handle writes comes after it in the order.
                None => self.write_header(&mut state, bounds.head)?,
            }
        };
        self.store.persist(ticket, timeout).inspect_err(|failure| {
            if failure.errno.0 != libc::ETIMEDOUT {
                self.state.lock().fail_for_good(failure);
            }
        })
    }

    /// Puts the payload of the entry at `position` into `into`, which it replaces, and says where the next entry is;
    /// `None` at the tail.
    pub fn read(&self, position: Position, into: &mut Vec<u8>) -> Result<Option<Position>> {
        let mut window = Window::new(self.shape, self.base, self.generation, AHEAD_ONE);
        let read = self.next_data(&mut window, position, |payload| {
            into.clear();
            into.extend_from_slice(payload);
        })?;
        Ok(read.map(|(_, next)| next))
    }

    /// Length of the payload that [`AppendLog::read`] would give; `None` at the tail.
    pub fn payload_bytes(&self, position: Position) -> Result<Option<u64>> {
        let mut window = Window::new(self.shape, self.base, self.generation, AHEAD_ONE);
        let mut len = 0;
        let read = self.next_data(&mut window, position, |payload| len = payload.len() as u64)?;
        Ok(read.map(|_| len))
    }

    /// The entries from `position` on, up to the tail at the time.
    pub fn iter_from(&self, position: Position) -> Entries<'_, S> {
        let window = Window::new(self.shape, self.base, self.generation, AHEAD_MANY);
        Entries { log: self, at: position, window, failed: false }
    }

    /// All entries that are kept.
    pub fn iter(&self) -> Entries<'_, S> {
        self.iter_from(self.bounds().0)
    }

    /// Gives up everything before `position`, which is that of an entry or the tail. It is durable when the ticket is; what
    /// was written before it to anywhere on the stage is in place whenever the truncation is.
    pub fn truncate(&self, position: Position) -> Result<Ticket> {
        let mut state = self.state_for_change()?;
        let bounds = state.bounds;
        if !(bounds.head..=bounds.tail).contains(&position.0) {
            return Err(outside(position, bounds));
        }
        if position.0 < bounds.tail {
            let mut window = Window::new(self.shape, self.base, self.generation, AHEAD_ONE);
            match window.look(&self.store, position.0, bounds.tail)? {
                Found::Whole(..) => {}
                found => return Err(no_entry(position, &found)),
            }
        }
        let ticket = self.write_header(&mut state, position.0)?;
        state.bounds.head = position.0;
        Ok(ticket)
    }

    /// Position of the first entry, and where the next one goes.
    pub fn bounds(&self) -> (Position, Position) {
        let bounds = self.state.lock().bounds;
        (Position(bounds.head), Position(bounds.tail))
    }

    /// Longest payload of an entry.
    pub fn payload_bytes_max(&self) -> u64 {
        self.shape.payload_max
    }

    /// Bytes for entries and their headers.
    pub fn capacity(&self) -> u64 {
        self.shape.capacity
    }

    /// Writes the hint, so that the next opening has nothing to look for. Makes nothing durable. A log that was not closed
    /// loses nothing.
    pub fn close(self) -> Result<()> {
        let mut state = self.state_for_change()?;
        let bounds = state.bounds;
        if state.hint.is_some_and(|hint| hint != bounds.tail) {
            self.write_header(&mut state, bounds.head)?;
        }
        Ok(())
    }

    /// The first data entry at or after `position`, handed to `take`; its position and that of the next entry.
    fn next_data(
        &self,
        window: &mut Window,
        position: Position,
        mut take: impl FnMut(&[u8]),
    ) -> Result<Option<(Position, Position)>> {
        let mut at = position;
        loop {
            let bounds = self.state.lock().bounds;
            if at.0 == bounds.tail {
                return Ok(None);
            }
            if !(bounds.head..bounds.tail).contains(&at.0) {
                return Err(outside(at, bounds));
            }
            match window.look(&self.store, at.0, bounds.tail)? {
                Found::Whole(entry, payload) => {
                    let next = Position(self.shape.after(&entry));
                    if matches!(entry.kind, EntryKind::Data(_)) {
                        take(payload);
                        return Ok(Some((at, next)));
                    }
                    at = next;
                }
                found => {
                    // It may have been truncated and overwritten since the bounds were taken.
                    let now = self.state.lock().bounds;
                    let gone = at.0 < now.head;
                    return Err(if gone { outside(at, now) } else { no_entry(at, &found) });
                }
            }
        }
    }

    /// The state, if it may be changed.
    fn state_for_change(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.state.lock();
        match &state.failed {
            None => Ok(state),
            Some(failure) => Err(failure.clone()),
        }
    }

    /// Writes the header with this head, and the tail as the hint.
    fn write_header(&self, state: &mut State, head: u64) -> Result<Ticket> {
        let hint = state.bounds.tail;
        let header = LogHeader {
            capacity: self.shape.capacity,
            generation: self.generation,
            opening: self.opening,
            head,
            hint,
        };
        let written = self.store.write(self.base, &[header.encode().as_bytes()]);
        let ticket = written.inspect_err(|failure| state.fail_for_good(failure))?;
        state.hint = Some(hint);
        state.remember(hint, ticket, self.store.durable());
        Ok(ticket)
    }

    /// Writes at a position.
    fn write(&self, state: &mut State, position: u64, parts: &[&[u8]]) -> Result<Ticket> {
        let written = self.store.write(self.base + self.shape.offset(position), parts);
        written.inspect_err(|failure| state.fail_for_good(failure))
    }

    fn refusal(&self, why: Refusal, payload: u64) -> Failure {
        let most = self.shape.payload_max;
        match why {
            Refusal::Empty => Failure::new(libc::EINVAL, "an entry of the log has at least one byte"),
            Refusal::TooLong => Failure::new(
                libc::EMSGSIZE,
                format!("an entry of {payload} bytes is too long: this log takes at most {most}; split it"),
            ),
            Refusal::Full { room, need } => Failure::new(
                libc::ENOSPC,
                format!("the log is full: {room} bytes are free and {need} are needed; truncate it first"),
            ),
            Refusal::Worn => Failure::new(libc::EOVERFLOW, "the log has no positions left: format it"),
        }
    }
}

impl State {
    /// Everything before `end` is durable once `ticket` is.
    fn remember(&mut self, end: u64, ticket: Ticket, durable: Ticket) {
        self.tickets.push_back((end, ticket));
        if self.tickets.len() >= TICKETS_MAX {
            self.forget(durable);
        }
        if self.tickets.len() >= TICKETS_MAX {
            // Waiting for a later ticket than needed is always right; so the last one stays.
            let mut keep = self.tickets.len().is_multiple_of(2);
            self.tickets.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }

    /// Everything up to `durable` is durable.
    fn forget(&mut self, durable: Ticket) {
        while let Some((end, _)) = self.tickets.front().copied().filter(|(_, ticket)| *ticket <= durable) {
            self.durable = self.durable.max(Some(end));
            self.tickets.pop_front();
        }
    }

    /// Nothing more is written; unless the call was interrupted, which is before it writes or while it only waits.
    fn fail_for_good(&mut self, failure: &Failure) {
        let errno = failure.errno.0;
        if errno == libc::EINTR {
            return;
        }
        self.failed.get_or_insert_with(|| {
            Failure::new(errno, format!("the log takes no more changes until it is opened anew: {failure}"))
        });
    }
}

/// Entries of a log in order: position and payload.
pub struct Entries<'a, S: ByteStore> {
    log: &'a AppendLog<S>,
    at: Position,
    window: Window,
    failed: bool,
}

impl<S: ByteStore> Entries<'_, S> {
    /// Where the iteration is: [`AppendLog::iter_from`] goes on there.
    #[must_use]
    pub fn position(&self) -> Position {
        self.at
    }
}

impl<S: ByteStore> Iterator for Entries<'_, S> {
    type Item = Result<(Position, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let mut payload = Vec::new();
        match self.log.next_data(&mut self.window, self.at, |bytes| payload.extend_from_slice(bytes)) {
            Ok(None) => None,
            Ok(Some((position, next))) => {
                self.at = next;
                Some(Ok((position, payload)))
            }
            Err(failure) => {
                self.failed = true;
                Some(Err(failure))
            }
        }
    }
}

fn outside(position: Position, bounds: Bounds) -> Failure {
    Failure::new(
        libc::EINVAL,
        format!("position {position} is not in the log, which holds {}..{}", bounds.head, bounds.tail),
    )
}

/// Why there is no entry at a position between head and tail.
fn no_entry(position: Position, found: &Found<'_>) -> Failure {
    match found {
        Found::Broken(_) => Failure::new(
            libc::EIO,
            format!("the log is damaged: the entry at position {position} fails its checksum"),
        ),
        _ => Failure::new(
            libc::EINVAL,
            format!(
                "no entry begins at position {position}: it is not one that the log gave, or something else wrote into the log"
            ),
        ),
    }
}

/// A random number, not 0.
fn random() -> u64 {
    // Both halves, because some bits of either are fixed.
    let (high, low) = Uuid::new_v4().as_u64_pair();
    (high ^ low.rotate_left(32)).max(1)
}
