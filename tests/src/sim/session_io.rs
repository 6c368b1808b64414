//! The thread of a session in the simulator: what its door is given to work with, what reaches it, a round, and what is
//! demanded of each.

use std::sync::Arc;

use tidegate_driver::base::Lsn;
use tidegate_driver::bytes::Operation;
use tidegate_driver::bytes::round::{End, SessionIo, Then};
use tidegate_driver::bytes::session::Session;
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::{Done, Errno, Op};
use tidegate_driver::stage::core::Marks;
use tidegate_driver::volume::{Door, DoorIo, Request, RequestKind};

use super::byte_client::{ByteClient, Gone};
use super::checkers::answers::judge;
use super::checkers::sessions::Order;
use super::disk::lock;
use super::door_io::Asked;
use super::flight::Owner;
use super::model::{Change, Effect, Model};
use super::running::{Running, SimDoor};
use super::sessions::{Seat, Sessions};
use super::site::{Site, Stop};

const ECANCELED: i32 = -125;

/// What reaches the thread of a session.
pub(super) enum Step {
    Woken,
    Done(Done),
    Round,
}

/// What a session's door is given to work with.
struct Io<'a> {
    client: &'a mut ByteClient,
    volume: usize,
    model: &'a mut Model,
    order: &'a mut Order,
    marks: Arc<Marks>,
    /// Operations in flight before.
    flights: usize,
    submitted: Vec<Op>,
    /// Requests completed, each with the newest published change by then.
    completed: Vec<(u64, Lsn)>,
    wrong: Option<String>,
}

impl Io<'_> {
    fn sequence(&self, tag: u32) -> u64 {
        self.client.session.ticket(tag).sequence()
    }

    fn demand(&mut self, told: Result<(), String>) {
        if let Err(what) = told {
            self.wrong.get_or_insert(what);
        }
    }
}

impl SessionIo for Io<'_> {
    fn session(&mut self) -> &mut Session {
        &mut self.client.session
    }

    fn ops_in_flight(&self) -> usize {
        self.flights + self.submitted.len()
    }

    fn ring(&mut self) {
        self.client.rung = true;
    }

    fn begins(&mut self, tag: u32) {
        let sequence = self.sequence(tag);
        let told = self.client.rules.begins(sequence, self.marks.published(), self.order);
        self.demand(told);
    }
}

impl DoorIo for Io<'_> {
    fn submit(&mut self, op: Op) {
        self.submitted.push(op);
    }

    fn placed(&mut self, tag: u32, lsn: Lsn) {
        let sequence = self.sequence(tag);
        let told = self.client.rules.placed(sequence, lsn, self.order);
        self.demand(told);
        let request = &self.client.rules.made[&sequence];
        let effect = match request.operation {
            Operation::Write => Effect::Bytes(request.content.clone().expect("a write has content")),
            Operation::WriteZeroes => Effect::Zero,
            _ => Effect::Discard,
        };
        self.model.placed(lsn.0, Change { volume: self.volume, range: request.range.clone(), effect });
        self.client.session.placed(tag, lsn);
    }

    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> Result<(), Errno> {
        let sequence = self.sequence(tag);
        self.client.session.fetch(tag, offset, into);
        self.client.rules.made.get_mut(&sequence).expect("it was placed").fetched = true;
        Ok(())
    }

    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> Result<(), Errno> {
        self.client.session.deliver(tag, offset, from);
        Ok(())
    }

    fn complete(&mut self, tag: u32, result: Result<(), Errno>) {
        let sequence = self.sequence(tag);
        self.client.session.complete(tag, result);
        let told = self.client.rules.ended(sequence, result);
        self.demand(told);
        self.completed.push((sequence, self.marks.published()));
    }
}

/// Time between two looks of a thread that does not sleep, in nanoseconds: long, so that few steps go by.
const LOOK_NS: u64 = 7000;

impl Running {
    /// Something reaches the thread of a session; a round is due then.
    pub(super) fn step(
        &mut self,
        i: usize,
        step: Step,
        now: u64,
        site: &Site<'_>,
        model: &mut Model,
    ) -> Result<(), Stop> {
        let flights = self.flights.iter().filter(|f| f.owner == Owner::Door(i)).count();
        let SimDoor { door, seat, gathered, look_ns, volume, .. } = &mut self.doors[i];
        *look_ns = None;
        let Some((client, rounds)) = seat.as_mut().and_then(|seat| seat.0.as_mut()) else {
            *gathered = false;
            return Ok(());
        };
        let order = &mut self.sessions.order;
        let mut io = Io {
            client,
            volume: *volume,
            model,
            order,
            marks: self.shared.marks.clone(),
            flights,
            submitted: Vec::new(),
            completed: Vec::new(),
            wrong: None,
        };
        *gathered = true;
        let mut then = None;
        match step {
            Step::Woken => {
                io.client.session.awake();
                door.woken(&mut io);
            }
            Step::Done(done) => {
                io.client.session.awake();
                door.op_done(done, &mut io);
            }
            Step::Round => {
                match io.client.gone {
                    Some(Gone::Died) => {
                        rounds.client_is_gone(&mut io.client.session);
                        io.client.gone = Some(Gone::Known);
                        io.client.rules.is_gone = true;
                        // Somebody else has the memory, and does not count.
                        let lies = lock(site.ctl).rng.draw();
                        io.client.scribble(lies % 200, lies >> 32 & 0xff);
                    }
                    Some(Gone::Told) => rounds.told_to_end(),
                    Some(Gone::Known | Gone::Broke) | None => {}
                }
                let what = rounds.round(door, &mut io);
                *gathered = what == Then::Again;
                *look_ns = (what == Then::Look).then_some(now + LOOK_NS);
                then = Some(what);
            }
        }
        let Io { submitted, completed, wrong, .. } = io;
        let name = format!("door {i} session {}", client.session.number());
        if let Some(wrong) = wrong {
            return Err(Stop::Fail(format!("{name}: {wrong}")));
        }
        submitted.into_iter().for_each(|op| self.submit(Owner::Door(i), op, now, site));
        self.judge_session(i, &completed, then, site, model)
            .map_err(|what| Stop::Fail(format!("{name}: {what}")))
    }

    /// Checks what a step of a session has brought.
    fn judge_session(
        &mut self,
        i: usize,
        completed: &[(u64, Lsn)],
        then: Option<Then>,
        site: &Site<'_>,
        model: &mut Model,
    ) -> Result<(), String> {
        let volume = self.doors[i].volume;
        let (ack, policy) = self.acks[volume];
        let may_fail = self.had_faults && policy == OnLogError::Fail;
        for &ended in completed {
            self.requests += 1;
            self.judge_answer(i, ended, ack, may_fail, site, model)?;
        }
        let Some(then) = then else { return Ok(()) };
        let (published, durable) = {
            let core = self.shared.core.lock();
            (core.published(), core.durable())
        };
        let Sessions { order, seen, .. } = &mut self.sessions;
        let (client, _) = self.doors[i].seat.as_mut().and_then(|seat| seat.0.as_mut()).expect("a session");
        let fresh = client.fresh()?;
        let words = client.words();
        let (accepted, certain) = client.rules.told(words, &fresh, published, durable, order)?;
        model.acknowledge(accepted, false);
        model.acknowledge(certain, true);
        lock(site.ctl).note(
            "round",
            &[
                i as u64,
                words.released,
                words.completions,
                words.accepted,
                words.durable,
                u64::from(client.rung),
            ],
        );
        seen.held += u64::from(client.is_tied());
        seen.full += u64::from(client.is_full());
        for (completion, silent) in fresh {
            let request = &client.rules.made[&completion.ticket.sequence()];
            seen.completions += 1;
            seen.silent_failures += u64::from(silent);
            let is_tied = request.after.iter().any(|ticket| order.is_over(*ticket));
            seen.cancelled += u64::from(is_tied && completion.result == ECANCELED);
            seen.barriers += u64::from(request.operation == Operation::Barrier);
        }
        if let Then::Over(end) = then { self.session_is_over(i, end, published, site) } else { Ok(()) }
    }

    /// Whether the door's answer to a request of a session is one that its client may get.
    fn judge_answer(
        &mut self,
        i: usize,
        (sequence, published): (u64, Lsn),
        ack: AckLevel,
        may_fail: bool,
        site: &Site<'_>,
        model: &mut Model,
    ) -> Result<(), String> {
        let volume = self.doors[i].volume;
        let client = self.client(i).expect("a session");
        let request = &client.rules.made[&sequence];
        let result = request.ended.expect("it has ended");
        lock(site.ctl).note(
            "ended",
            &[i as u64, sequence, request.lsn.unwrap_or(0), result.err().map_or(0, |e| e.0 as u64)],
        );
        let kind = match request.operation {
            Operation::Read => RequestKind::Read,
            Operation::Write => RequestKind::Write,
            Operation::WriteZeroes => RequestKind::WriteZeroes,
            Operation::Discard => RequestKind::Discard,
            Operation::Flush => RequestKind::Flush,
            Operation::Barrier => return Err("a barrier came to the door".into()),
        };
        let (offset, len) = (request.range.start, request.range.end - request.range.start);
        let as_asked = Request { tag: 0, kind, offset, len, fua: request.is_durable() };
        let must_see = client.rules.sees(sequence, &self.sessions.order);
        let mut asked = Asked::new(as_asked, None, volume, must_see);
        asked.lsn = request.lsn;
        asked.published = published.0;
        if kind == RequestKind::Read && result.is_ok() {
            asked.got = client.got(sequence);
        }
        judge(&asked, result, ack, may_fail, self.payload_max, model, site)
            .map_err(|what| format!("request {sequence} {as_asked:?}: {what}"))
    }

    fn session_is_over(&mut self, i: usize, end: End, published: Lsn, site: &Site<'_>) -> Result<(), String> {
        let client = self.client(i).expect("a session");
        let taken = client.words().released;
        let last = (end == End::ClientGone).then(|| client.submitted());
        let is_right = match (end, client.gone) {
            (End::ClientGone, gone) => gone == Some(Gone::Known),
            (End::Told, gone) => gone == Some(Gone::Told),
            (End::Broken(_), gone) => gone == Some(Gone::Broke),
        };
        if !is_right {
            return Err(format!("it ended: {end:?}, but {:?}", client.gone));
        }
        client.rules.over(last, taken, published)?;
        let number = client.session.number();
        let kind = match end {
            End::ClientGone => 0,
            End::Told => 1,
            End::Broken(_) => 2,
        };
        lock(site.ctl).note("over", &[i as u64, kind, taken]);
        self.sessions.seen.ends[kind as usize] += 1;
        self.sessions.seen.cut_short += u64::from(last.is_some_and(|last| taken < last));
        self.sessions.order.sessions.insert(number, Some(taken));
        let volume = self.doors[i].volume;
        let mut next = SimDoor::new(&self.shared, &self.volumes[volume], volume, self.next_door);
        self.next_door += 1;
        next.next_ns = self.doors[i].next_ns;
        next.seat = Some(Seat::default());
        self.doors[i] = next;
        Ok(())
    }
}
