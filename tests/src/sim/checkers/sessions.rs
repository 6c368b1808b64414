//! The rules of a session (`driver/src/bytes/mod.rs`), from what its client submitted and what it is told.
//!
//! | rule | demanded when |
//! |---|---|
//! | B1 | a change gets its place: behind those submitted before it, before those behind it |
//! | B2 | a read or flush goes to the door, and ends: [`Rules::sees`] is what it must see |
//! | B3 | a change gets its place, and what it names does ([`Order`]); a completion says `ECANCELED` |
//! | B4 | a request goes to the door; a barrier has its completion |
//! | B5 | the client is told: completions, payloads given back, accepted, durable |
//! | B7 | the session is over: nothing of it is under way |
//! | B8 | a change that asked for no completion goes to the door, or fails |

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use tidegate_driver::base::Lsn;
use tidegate_driver::bytes::{Completion, DURABLE, Operation, SILENT, Ticket};
use tidegate_driver::io::Errno;

/// errno values that a session gives.
const EINVAL: i32 = 22;
const EFAULT: i32 = 14;
const ERANGE: i32 = 34;
const EMSGSIZE: i32 = 90;
const ECANCELED: i32 = 125;

/// A submission, as its client remembers it.
#[derive(Clone, Debug)]
pub struct Submitted {
    /// What is asked for.
    pub operation: Operation,
    /// How.
    pub flags: u8,
    /// Bytes of the volume; they may make no sense.
    pub range: Range<u64>,
    /// Content of a write.
    pub content: Option<Arc<[u8]>>,
    /// Where it is in the arena.
    pub arena_offset: u32,
    /// Tickets that it names.
    pub after: Vec<Ticket>,
    /// Newest acknowledged change of the stage then.
    pub acknowledged: u64,
    /// Size of the volume then.
    pub volume_bytes: u64,
    /// It went to the door.
    pub begun: bool,
    /// Its payload was copied.
    pub fetched: bool,
    /// Its place.
    pub lsn: Option<u64>,
    /// What the door said.
    pub ended: Option<Result<(), Errno>>,
    /// What the completion says.
    pub answer: Option<i32>,
}

impl Submitted {
    /// Whether it changes the volume.
    #[must_use]
    pub fn is_change(&self) -> bool {
        matches!(self.operation, Operation::Write | Operation::WriteZeroes | Operation::Discard)
    }

    /// Whether it asks for no completion.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.flags & SILENT != 0
    }

    /// Whether it asks to be durable before it completes.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.flags & DURABLE != 0
    }

    fn is_refused(&self) -> bool {
        self.lsn.is_none() && self.answer.is_some_and(|answer| answer < 0)
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// What a session's client is told by the words of the shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Submissions taken, of which slot and payload may be used again.
    pub released: u64,
    /// Completions made.
    pub completions: u64,
    /// Everything up to this one is accepted.
    pub accepted: u64,
    /// Everything up to this one is durable.
    pub durable: u64,
}

/// Places of the requests of all sessions of a server.
#[derive(Debug, Default)]
pub struct Order {
    places: BTreeMap<Ticket, u64>,
    /// Tickets that were named by changes, with the first place among these.
    named: BTreeMap<Ticket, u64>,
    /// Sessions, and how many requests those that are over had taken.
    pub sessions: BTreeMap<u16, Option<u64>>,
}

impl Order {
    /// Whether `ticket` can never have its place: its session was over before.
    #[must_use]
    pub fn is_over(&self, ticket: Ticket) -> bool {
        let session = self.sessions.get(&ticket.session()).copied().flatten();
        session.is_some_and(|taken| ticket.sequence() > taken)
    }

    fn placed(&mut self, ticket: Ticket, lsn: u64, after: &[Ticket]) -> Result<(), String> {
        for dependency in after.iter().filter(|t| t.session() != ticket.session()) {
            if self.is_over(*dependency) || !self.sessions.contains_key(&dependency.session()) {
                return Err(format!("B3: {ticket:?} has a place, but {dependency:?} never will"));
            }
            match self.places.get(dependency) {
                Some(place) if *place > lsn => {
                    return Err(format!("B3: {ticket:?} is at LSN {lsn}, {dependency:?} at {place}"));
                }
                Some(_) => {}
                None => {
                    let first = self.named.entry(*dependency).or_insert(lsn);
                    *first = lsn.min(*first);
                }
            }
        }
        if let Some(first) = self.named.get(&ticket).filter(|first| **first < lsn) {
            return Err(format!("B3: {ticket:?} is at LSN {lsn}, and one that names it at {first}"));
        }
        self.places.insert(ticket, lsn);
        Ok(())
    }
}

/// Watches one session.
#[derive(Debug)]
pub struct Rules {
    number: u16,
    arena_bytes: u32,
    write_bytes_max: u64,
    /// Everything that was submitted, by number.
    pub made: BTreeMap<u64, Submitted>,
    /// Places of its changes.
    places: BTreeMap<u64, u64>,
    /// With the door.
    open: BTreeSet<u64>,
    barriers: BTreeSet<u64>,
    /// Requests that began before one in front of a barrier had ended: that one, the barrier, the request. It may have been
    /// refused.
    passed: Vec<(u64, u64, u64)>,
    /// The first change that asked for no completion and failed.
    hole: Option<u64>,
    begun: u64,
    told: Words,
    /// The server knows that the client is gone.
    pub is_gone: bool,
}

impl Rules {
    /// Rules for session `number`.
    #[must_use]
    pub fn new(number: u16, arena_bytes: u32, write_bytes_max: u64) -> Rules {
        Rules {
            number,
            arena_bytes,
            write_bytes_max,
            made: BTreeMap::new(),
            places: BTreeMap::new(),
            open: BTreeSet::new(),
            barriers: BTreeSet::new(),
            passed: Vec::new(),
            hole: None,
            begun: 0,
            told: Words::default(),
            is_gone: false,
        }
    }

    /// The client submits something. Its number.
    pub fn submit(&mut self, submitted: Submitted) -> u64 {
        let sequence = self.made.len() as u64 + 1;
        if submitted.operation == Operation::Barrier {
            self.barriers.insert(sequence);
        }
        self.made.insert(sequence, submitted);
        sequence
    }

    /// A request goes to the door, everything up to `published` being accepted.
    pub fn begins(&mut self, sequence: u64, published: Lsn, order: &Order) -> Result<(), String> {
        let request = self.made.get_mut(&sequence).ok_or("a request that nobody submitted")?;
        if request.begun || sequence <= self.begun {
            return Err(format!("B1: request {sequence} begins behind {}", self.begun));
        }
        request.begun = true;
        self.begun = sequence;
        if let Some(&before) = self.open.first() {
            let between = self.barriers.range(before + 1..sequence);
            self.passed.extend(between.map(|&barrier| (before, barrier, sequence)));
        }
        if let Some(hole) = self.hole.filter(|_| request.is_silent()) {
            return Err(format!("B8: change {sequence} begins, {hole} has failed silently"));
        }
        self.open.insert(sequence);
        let looks_back = matches!(request.operation, Operation::Read | Operation::Flush);
        if looks_back && self.sees(sequence, order) > published.0 {
            return Err(format!("B2, B3: {sequence} begins at {published}: {:?}", self.made[&sequence]));
        }
        Ok(())
    }

    /// A change gets its place.
    pub fn placed(&mut self, sequence: u64, lsn: Lsn, order: &mut Order) -> Result<(), String> {
        let request = self.made.get_mut(&sequence).ok_or("a request that nobody submitted")?;
        request.lsn = Some(lsn.0);
        self.places.insert(sequence, lsn.0);
        let before = self.places.range(..sequence).next_back().is_none_or(|(_, place)| *place < lsn.0);
        let behind = self.places.range(sequence + 1..).next().is_none_or(|(_, place)| *place > lsn.0);
        if !before || !behind {
            return Err(format!("B1: change {sequence} is at {lsn}, others at {:?}", self.places));
        }
        order.placed(Ticket::new(self.number, sequence), lsn.0, &request.after)
    }

    /// The door is done with a request.
    pub fn ended(&mut self, sequence: u64, result: Result<(), Errno>) -> Result<(), String> {
        let request = self.made.get_mut(&sequence).ok_or("a request that nobody submitted")?;
        if request.ended.replace(result).is_some() {
            return Err(format!("request {sequence} ends twice"));
        }
        self.open.remove(&sequence);
        let failed = request.is_silent() && result.is_err();
        if failed { self.failed_silently(sequence) } else { Ok(()) }
    }

    fn failed_silently(&mut self, sequence: u64) -> Result<(), String> {
        self.hole = Some(self.hole.map_or(sequence, |hole| hole.min(sequence)));
        if self.made[&sequence].lsn.is_some() {
            return Ok(());
        }
        let mut later = self.made.range(sequence + 1..);
        match later.find(|(_, request)| request.is_silent() && request.begun) {
            Some((later, _)) => Err(format!("B8: {sequence} failed silently, and {later} was begun")),
            None => Ok(()),
        }
    }

    /// The newest change that a read or flush must see: B2, and B3 for what it names.
    #[must_use]
    pub fn sees(&self, sequence: u64, order: &Order) -> u64 {
        let request = &self.made[&sequence];
        let own = self.places.range(..sequence).next_back().map_or(0, |(_, lsn)| *lsn);
        let named = request.after.iter().filter_map(|ticket| order.places.get(ticket)).max();
        request.acknowledged.max(own).max(named.copied().unwrap_or(0))
    }

    /// The client is told `now`, with these completions among it, while the stage has published and made durable so much. The
    /// newest changes that are accepted and durable for the client from now on.
    pub fn told(
        &mut self,
        now: Words,
        fresh: &[(Completion, bool)],
        published: Lsn,
        durable: Lsn,
        order: &Order,
    ) -> Result<(u64, u64), String> {
        let before = std::mem::replace(&mut self.told, now);
        let goes_back =
            now.released < before.released || now.accepted < before.accepted || now.durable < before.durable;
        if goes_back || now.durable > now.accepted || now.accepted.max(now.released) > self.made.len() as u64
        {
            return Err(format!("B5: {before:?}, now {now:?} of {} submissions", self.made.len()));
        }
        for (completion, silent) in fresh {
            self.completed(completion, *silent, order)?;
        }
        if self.is_gone {
            self.conclude(before.released + 1..now.released + 1, order)?;
        }
        for (before, barrier, request) in std::mem::take(&mut self.passed) {
            match self.made[&barrier].answer {
                None if self.is_gone => self.passed.push((before, barrier, request)),
                Some(answer) if answer < 0 => {}
                _ => {
                    return Err(format!(
                        "B4: {request} began behind barrier {barrier}, {before} had not ended"
                    ));
                }
            }
        }
        let of = |from: u64, to: u64| self.made.range(from + 1..to + 1);
        for (sequence, request) in of(before.released, now.released) {
            let is_done = request.fetched || request.answer.is_some() || request.ended.is_some();
            if request.operation == Operation::Write && !is_done {
                return Err(format!("the payload of {sequence} is given back and was not fetched"));
            }
        }
        let mut newest = [0, 0];
        let words = [
            ("accepted", before.accepted, now.accepted, published),
            ("durable", before.durable, now.durable, durable),
        ];
        for (i, (what, from, to, reached)) in words.into_iter().enumerate() {
            for (sequence, request) in of(from, to).filter(|(_, request)| request.is_change()) {
                if !request.is_refused() && request.lsn.is_none_or(|lsn| lsn > reached.0) {
                    return Err(format!(
                        "B5: {to} are said to be {what}, but {sequence} is at {:?} of {reached}",
                        request.lsn
                    ));
                }
                newest[i] = newest[i].max(request.lsn.unwrap_or(0));
            }
        }
        Ok((newest[0], newest[1]))
    }

    /// A client that is gone is told of no completions: what they would have been.
    fn conclude(&mut self, taken: Range<u64>, order: &Order) -> Result<(), String> {
        for sequence in taken {
            let request = &self.made[&sequence];
            let reasons = [EINVAL, ERANGE, EFAULT, EMSGSIZE, ECANCELED];
            let answer = match (request.answer, request.ended) {
                (Some(answer), _) => Some(answer),
                (None, Some(ended)) => Some(ended.map_or_else(|errno| -errno.0, |()| 0)),
                (None, None) if request.begun => None,
                (None, None) => {
                    let reason = reasons.into_iter().find(|errno| self.is_right(sequence, *errno, order));
                    match reason {
                        Some(errno) => Some(-errno),
                        None if request.operation == Operation::Barrier => Some(0),
                        None => {
                            return Err(format!("{sequence} of a client that is gone was not carried out"));
                        }
                    }
                }
            };
            let is_new = answer != request.answer && !request.begun;
            let failed = is_new && request.is_silent() && answer.is_some_and(|answer| answer < 0);
            self.made.get_mut(&sequence).expect("it was looked at").answer = answer;
            if failed {
                self.failed_silently(sequence)?;
            }
        }
        Ok(())
    }

    fn completed(&mut self, completion: &Completion, silent: bool, order: &Order) -> Result<(), String> {
        let (sequence, result) = (completion.ticket.sequence(), completion.result);
        let wrong = |what: &str| Err(format!("{what}: {completion:?}"));
        let Some(request) = self.made.get_mut(&sequence) else { return wrong("a completion of nothing") };
        if request.answer.replace(result).is_some() {
            return wrong("a second completion");
        }
        if completion.ticket.session() != self.number
            || completion.cookie != cookie(sequence)
            || completion.lsn != request.lsn.unwrap_or(0)
            || silent != (request.is_silent() && result != 0)
            || (request.is_silent() && result == 0)
        {
            return wrong("not the completion of its request");
        }
        let request = &self.made[&sequence];
        if request.operation == Operation::Barrier && result != 0 {
            self.barriers.remove(&sequence);
        } else if request.operation == Operation::Barrier {
            let open = self.open.range(..sequence).next();
            let mut earlier = self.made.range(..sequence);
            let unanswered =
                earlier.find(|(_, r)| r.answer.is_none() && !(r.is_silent() && r.ended.is_some()));
            return match open.or(unanswered.map(|(sequence, _)| sequence)) {
                Some(before) => Err(format!("B4: barrier {sequence} completes, {before} has not")),
                None => Ok(()),
            };
        }
        if request.operation == Operation::Flush && result == 0 && self.told.durable + 1 < sequence {
            return wrong("B5: a flush has succeeded, and the durable word stays below it");
        }
        if request.begun {
            let said = request.ended.map(|ended| ended.map_or_else(|errno| -errno.0, |()| 0));
            return if said == Some(result) { Ok(()) } else { wrong("not what the door said") };
        }
        if !self.is_right(sequence, -result, order) {
            return Err(format!("refused without a reason: {completion:?}: {request:?}"));
        }
        if silent { self.failed_silently(sequence) } else { Ok(()) }
    }

    /// Whether a request that did not come to the door may be refused with `errno`.
    fn is_right(&self, sequence: u64, errno: i32, order: &Order) -> bool {
        let request = &self.made[&sequence];
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        let of_nothing = |ticket: &Ticket| {
            if ticket.session() == self.number {
                !(1..sequence).contains(&ticket.sequence())
            } else {
                ticket.sequence() == 0 || !order.sessions.contains_key(&ticket.session())
            }
        };
        match errno {
            EINVAL => request.len() == 0 || request.after.iter().any(of_nothing),
            ERANGE => request.range.end > request.volume_bytes,
            EFAULT => {
                transfers && u64::from(request.arena_offset) + request.len() > u64::from(self.arena_bytes)
            }
            EMSGSIZE => transfers && request.len() > self.write_bytes_max,
            ECANCELED => {
                let behind_hole = request.is_silent() && self.hole.is_some_and(|hole| hole < sequence);
                behind_hole || request.after.iter().any(|ticket| order.is_over(*ticket))
            }
            _ => false,
        }
    }

    /// The session is over, because its client is gone after so many submissions, or for another reason.
    pub fn over(&self, last: Option<u64>, taken: u64, published: Lsn) -> Result<(), String> {
        if let Some(open) = self.open.first() {
            return Err(format!("B7: the session is over, request {open} is not"));
        }
        if let Some((sequence, lsn)) = self.places.iter().find(|(_, lsn)| **lsn > published.0) {
            return Err(format!("B7: the session is over, change {sequence} at LSN {lsn} is not accepted"));
        }
        let Some(last) = last else { return Ok(()) };
        if taken > last {
            return Err(format!("{taken} submissions of a client were taken that was gone after {last}"));
        }
        let is_held = |request: &Submitted| request.after.iter().any(|t| t.session() != self.number);
        if taken < last && !is_held(&self.made[&(taken + 1)]) {
            return Err(format!(
                "a client was gone after {last} submissions, {taken} of them were carried out"
            ));
        }
        Ok(())
    }
}

/// The client's name for a request.
#[must_use]
pub fn cookie(sequence: u64) -> u64 {
    sequence ^ 0x5a5a_0000
}
