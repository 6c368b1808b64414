//! The sessions of the byte door in a server's life. Some volumes are byte devices: their doors are driven by the real
//! `Session` over shared memory, a round of its thread an event, and a client that submits, looks, dies, breaks the rules or
//! is detached.
//!
//! A session that is over is followed by another once none of the volume is left whose client is gone, as at the gate.
//! Requests of a session that ended with its server are not asked again.

use std::sync::Arc;

use tidegate_driver::bytes::round::{Rounds, progress};
use tidegate_driver::bytes::session::Session;
use tidegate_driver::bytes::ties::Ties;
use tidegate_driver::bytes::{DEPENDENCIES_MAX, DURABLE, Operation, SILENT, Ticket};
use tidegate_driver::format::byte_ring::RingLayout;
use tidegate_driver::io::{Done, SharedMap};
use tidegate_driver::volume::{Request, RequestKind};

use super::byte_client::{ByteClient, Gone, Manners};
use super::checkers::sessions::{Order, Submitted};
use super::client::Habits;
use super::disk::lock;
use super::model::Model;
use super::report::SessionsSeen;
use super::rng::Rng;
use super::running::{Event, Running};
use super::session_io::Step;
use super::setup::World;
use super::site::{Site, Stop};

/// Worlds with byte devices, and volumes that are such in a life of theirs, in a thousand.
const WORLDS: u64 = 500;
const VOLUMES: u64 = 667;
/// Times that a client dies, is detached, breaks the rules, in a thousand submissions.
const DEATHS: u64 = 6;
const DETACHES: u64 = 3;
const BREACHES: u64 = 1;

/// A door for sessions; `None`: nobody is there.
#[derive(Default)]
pub(super) struct Seat(pub(super) Option<(ByteClient, Rounds)>);

/// What the sessions of a server share.
pub(super) struct Sessions {
    ties: Arc<Ties>,
    pub(super) order: Order,
    /// Nobody is let in any more.
    closed: bool,
    pub(super) seen: SessionsSeen,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions {
            ties: Arc::new(Ties::numbered_after(u16::MAX - 3)),
            order: Order::default(),
            closed: false,
            seen: SessionsSeen::default(),
        }
    }
}

impl World {
    /// Has some volumes of the server that has begun served as byte devices. Volumes whose kernel clients still wait for
    /// answers are not among them, nor are those of a life that is led up to something.
    pub(super) fn attach_bytes(&mut self) {
        if !self.has_sessions || self.aim.is_some() || self.options.script[0].is_some() {
            return;
        }
        let running = self.running.as_mut().expect("open");
        for volume in 0..self.backings.len() {
            let is_waited_for = self.unanswered.iter().any(|asked| asked.volume == volume);
            if self.sessions.chance(VOLUMES) && !is_waited_for {
                running.seat(volume);
            }
        }
    }

    /// Whether the story of `seed` has byte devices, and their source of chance: stories without are as they would be.
    pub(super) fn sessions_of(seed: u64) -> (bool, Rng) {
        let mut rng = Rng::new(seed, 40);
        (rng.chance(WORLDS), rng)
    }
}

impl Running {
    /// The doors of `volume` are for sessions from now on.
    fn seat(&mut self, volume: usize) {
        self.doors.iter_mut().filter(|d| d.volume == volume).for_each(|d| d.seat = Some(Seat::default()));
    }

    /// Whether `volume` is a byte device.
    #[must_use]
    pub fn is_byte_device(&self, volume: usize) -> bool {
        self.doors.iter().any(|d| d.volume == volume && d.seat.is_some())
    }

    pub(super) fn client(&self, door: usize) -> Option<&ByteClient> {
        self.doors[door].seat.as_ref()?.0.as_ref().map(|(client, _)| client)
    }

    pub(super) fn client_mut(&mut self, door: usize) -> Option<&mut ByteClient> {
        self.doors[door].seat.as_mut()?.0.as_mut().map(|(client, _)| client)
    }

    /// Whether the client of a seat would find something if it looked.
    pub(super) fn looks(&self, door: usize) -> bool {
        self.client(door).is_some_and(ByteClient::may_look)
    }

    fn clients(&self) -> impl Iterator<Item = (usize, &ByteClient)> {
        (0..self.doors.len()).filter_map(|door| Some((door, self.client(door)?)))
    }

    /// Whether a client does not know yet what becomes of a submission, or a session is to end.
    #[must_use]
    pub fn sessions_wait(&self) -> bool {
        self.clients().any(|(_, client)| client.is_waiting())
    }

    /// Whether there is a session.
    #[must_use]
    pub fn has_sessions(&self) -> bool {
        self.clients().next().is_some()
    }

    /// What the clients of sessions wait for, for people.
    pub(super) fn sessions_waiting(&self) -> impl Iterator<Item = String> {
        self.clients().filter(|(_, client)| client.is_waiting()).map(|(_, client)| client.describe())
    }

    /// What sessions met.
    pub(super) fn sessions_seen(&self) -> SessionsSeen {
        self.sessions.seen
    }

    /// Ends all sessions, as before the stage is closed.
    pub(super) fn close_gates(&mut self) {
        self.sessions.closed = true;
        (0..self.doors.len()).for_each(|door| self.end(door, Gone::Told));
    }

    /// The client of `door` uses its session no more.
    fn end(&mut self, door: usize, why: Gone) {
        let Some(client) = self.client_mut(door).filter(|client| client.gone.is_none()) else { return };
        client.gone = Some(why);
        client.pending = None;
        self.wake_thread(door);
    }

    /// The thread of a session goes a round again.
    fn wake_thread(&mut self, door: usize) {
        self.doors[door].gathered = true;
        if let Some(client) = self.client_mut(door) {
            client.session.awake();
        }
    }

    /// Whether the client of a seat has something to submit and room for it, or somebody has come to a free seat.
    pub(super) fn may_submit(&self, door: usize) -> bool {
        let volume = self.doors[door].volume;
        let asks = self.habits.is_some() && self.quota > 0;
        let again = self.again.iter().any(|asked| asked.volume == volume);
        let Some(client) = self.client(door) else {
            let leaves = |client: &ByteClient| matches!(client.gone, Some(Gone::Died | Gone::Known));
            let mut others = self.clients().filter(|(other, _)| self.doors[*other].volume == volume);
            return !self.sessions.closed && (again || asks) && !others.any(|(_, client)| leaves(client));
        };
        if client.gone.is_some() || !client.has_slot() {
            return false;
        }
        match &client.pending {
            Some(request) => client.has_room(request),
            None => again || (asks && client.unsettled() < 2 * self.habits.map_or(4, |h| h.depth) as usize),
        }
    }

    /// Takes an event of a session; `None`: it is none.
    pub(super) fn session_event(
        &mut self,
        event: Event,
        now: u64,
        site: &Site<'_>,
        model: &mut Model,
    ) -> Option<Result<(), Stop>> {
        let (Event::Wake(door) | Event::BatchEnd(door) | Event::Ask(door) | Event::Look(door)) = event else {
            return None;
        };
        self.doors[door].seat.as_ref()?;
        Some(match event {
            Event::Wake(_) => {
                self.doors[door].woken.take();
                self.step(door, Step::Woken, now, site, model)
            }
            Event::BatchEnd(_) => self.step(door, Step::Round, now, site, model),
            Event::Look(_) => self.look(door, site),
            _ if self.client(door).is_none() => self.arrive(door, site),
            _ => self.submit_some(door, now, site, model),
        })
    }

    /// An operation of a session's door has ended.
    pub(super) fn session_op(
        &mut self,
        door: usize,
        done: Done,
        now: u64,
        site: &Site<'_>,
        model: &mut Model,
    ) -> Result<(), Stop> {
        self.step(door, Step::Done(done), now, site, model)
    }

    /// A client comes in.
    fn arrive(&mut self, i: usize, site: &Site<'_>) -> Result<(), Stop> {
        let mut ctl = lock(site.ctl);
        let depth = ctl.rng.pick(&[8, 8, 16, 64]);
        let least = (self.payload_max as u32).next_multiple_of(4096);
        let arena_bytes = least * ctl.rng.pick(&[1, 1, 2, 4]);
        let manners = Manners::draw(&mut ctl.rng);
        let layout = RingLayout::new(depth, arena_bytes).expect("sizes within bounds");
        let memory = SharedMap::create(layout.memory_bytes()).map_err(|e| Stop::Fail(e.report()))?;
        let memory = Arc::new(memory);
        let ties = &self.sessions.ties;
        let door = &mut self.doors[i];
        let number = ties.begin(door.woken.clone()).expect("a free number");
        ctl.note("session", &[i as u64, u64::from(number), u64::from(depth), u64::from(arena_bytes)]);
        let write_max = door.door.request_bytes_max();
        let session =
            Session::new(number, memory.clone(), layout, write_max, ties.clone(), progress(&door.door));
        let client = ByteClient::new(session, memory, layout, u64::from(write_max), manners);
        door.seat = Some(Seat(Some((client, Rounds::default()))));
        door.gathered = true;
        self.sessions.order.sessions.insert(number, None);
        self.sessions.seen.begun += 1;
        Ok(())
    }

    /// A client looks at what it was told.
    fn look(&mut self, i: usize, site: &Site<'_>) -> Result<(), Stop> {
        let client = self.client_mut(i).expect("a session");
        let most = lock(site.ctl).rng.range(1, 8);
        let ring = client.look(most)?;
        lock(site.ctl).note("look", &[i as u64, u64::from(ring)]);
        if ring {
            self.wake_thread(i);
        }
        Ok(())
    }

    /// A client submits something, or comes to its end.
    fn submit_some(&mut self, i: usize, now: u64, site: &Site<'_>, model: &mut Model) -> Result<(), Stop> {
        let is_active = self.habits.is_some() && self.quota > 0;
        let fate = if is_active { lock(site.ctl).rng.below(1000) } else { 1000 };
        if fate < DEATHS + DETACHES + BREACHES {
            self.come_to_an_end(i, fate, site);
            return Ok(());
        }
        let most = lock(site.ctl).rng.pick(&[1, 1, 2, 8]);
        for _ in 0..most {
            if !self.may_submit(i) {
                break;
            }
            let request = match self.client_mut(i).and_then(|client| client.pending.take()) {
                Some(request) => request,
                None => self.draw(i, now, site, model),
            };
            let client = self.client_mut(i).expect("a session");
            if !client.has_room(&request) {
                client.pending = Some(request);
                break;
            }
            let values = [
                i as u64,
                request.range.start,
                request.range.end,
                u64::from(request.flags),
                request.after.len() as u64,
            ];
            lock(site.ctl).note(&format!("put {:?}", request.operation), &values);
            client.put(request);
        }
        if self.client(i).expect("a session").publish() {
            self.wake_thread(i);
        }
        Ok(())
    }

    fn come_to_an_end(&mut self, i: usize, fate: u64, site: &Site<'_>) {
        lock(site.ctl).note("client ends", &[i as u64, fate]);
        if fate < DEATHS {
            self.end(i, Gone::Died);
        } else if fate < DEATHS + DETACHES {
            let volume = self.doors[i].volume;
            let of_volume: Vec<usize> =
                (0..self.doors.len()).filter(|&door| self.doors[door].volume == volume).collect();
            of_volume.into_iter().for_each(|door| self.end(door, Gone::Told));
        } else {
            self.end(i, Gone::Broke);
            let client = self.client(i).expect("a session");
            client.scribble(client.submitted() + client.depth() + 1, 0);
        }
    }

    /// The next request of a client.
    fn draw(&mut self, i: usize, now: u64, site: &Site<'_>, model: &Model) -> Submitted {
        let volume = self.doors[i].volume;
        let again = self.again.iter().position(|asked| asked.volume == volume);
        let size = model.size(volume);
        if let Some(at) = again {
            let asked = self.again.swap_remove(at);
            return submitted(asked.request, asked.content, 0, Vec::new(), size, model);
        }
        let mut ctl = lock(site.ctl);
        let rng = &mut ctl.rng;
        let habits: Habits = self.habits.expect("clients are active");
        self.quota -= 1;
        self.doors[i].next_ns = now + habits.pause_ns(rng);
        let (request, content) = habits.next(rng, 0, size, self.payload_max);
        let manners = self.client(i).expect("a session").manners;
        let is_change = !matches!(request.kind, RequestKind::Read | RequestKind::Flush);
        let silent = if is_change && rng.chance(manners.silent) { SILENT } else { 0 };
        let count = if rng.chance(manners.ties) { rng.range(1, DEPENDENCIES_MAX as u64) } else { 0 };
        let after = (0..count).map(|_| self.ticket(i, rng)).collect();
        let mut next = submitted(request, content, silent, after, size, model);
        if rng.chance(manners.barriers) {
            (next.operation, next.flags, next.range, next.content) = (Operation::Barrier, 0, 0..0, None);
        }
        next
    }

    /// A ticket to name: mostly one that some session has submitted, or soon will.
    fn ticket(&self, i: usize, rng: &mut Rng) -> Ticket {
        let own = self.client(i).expect("a session");
        if rng.chance(10) {
            return Ticket(rng.draw() >> rng.range(0, 20));
        }
        if rng.chance(30) {
            return Ticket::new(own.session.number(), rng.range(1, own.submitted() + 1));
        }
        let known: Vec<(u16, Option<u64>)> =
            self.sessions.order.sessions.iter().map(|(number, taken)| (*number, *taken)).collect();
        let (number, taken) = rng.pick(&known);
        let other = self.clients().find(|(_, client)| client.session.number() == number);
        let newest = other.map_or(taken.unwrap_or(0), |(_, client)| client.submitted());
        let ahead = if rng.chance(100) { rng.range(1, 3) } else { 0 };
        let back = rng.below(6).min(newest.saturating_sub(1));
        Ticket::new(number, (newest - back.min(newest) + ahead).max(1))
    }

    /// Nothing can happen now: every thread that sleeps has told its client what it knows. Whether somebody gave up, so that
    /// something can.
    pub(super) fn sessions_rest(&mut self, site: &Site<'_>) -> Result<bool, String> {
        let published = self.shared.core.lock().published();
        let is_late = |client: &ByteClient| client.session.waits_for().is_some_and(|lsn| lsn <= published);
        let sleeps = |i: usize| self.doors[i].look_ns.is_none();
        if let Some((_, client)) = self.clients().find(|(i, client)| sleeps(*i) && is_late(client)) {
            return Err(format!(
                "a client is not told what is accepted up to {published}: {}",
                client.describe()
            ));
        }
        Ok(self.next_ns().is_none() && self.someone_gives_up(site))
    }

    /// Nothing can happen any more. If that is so because clients wait for each other, or for what none will submit, one of
    /// them gives up: programs' mistakes. Whether one did.
    fn someone_gives_up(&mut self, site: &Site<'_>) -> bool {
        let of = |number: u16| self.clients().find(|(_, client)| client.session.number() == number);
        let mut blocking = self.clients().filter_map(|(_, client)| {
            let taken = client.words().released;
            let next = client.rules.made.get(&(taken + 1))?;
            next.after.iter().find_map(|ticket| {
                let (door, other) = of(ticket.session())?;
                let is_other = ticket.session() != client.session.number();
                let is_late = other.words().released < ticket.sequence();
                (is_other && is_late && other.gone.is_none()).then_some(door)
            })
        });
        let Some(door) = blocking.next() else { return false };
        drop(blocking);
        lock(site.ctl).note("gives up", &[door as u64]);
        self.sessions.seen.gave_up += 1;
        self.end(door, Gone::Died);
        true
    }
}

/// A kernel client's request as a submission.
fn submitted(
    request: Request,
    content: Option<Arc<[u8]>>,
    silent: u8,
    after: Vec<Ticket>,
    volume_bytes: u64,
    model: &Model,
) -> Submitted {
    let operation = match request.kind {
        RequestKind::Read => Operation::Read,
        RequestKind::Write => Operation::Write,
        RequestKind::WriteZeroes => Operation::WriteZeroes,
        RequestKind::Discard => Operation::Discard,
        RequestKind::Flush => Operation::Flush,
    };
    Submitted {
        operation,
        flags: silent | if request.fua { DURABLE } else { 0 },
        range: request.offset..request.offset + request.len,
        content,
        arena_offset: 0,
        after,
        acknowledged: model.acknowledged(),
        volume_bytes,
        begun: false,
        fetched: false,
        lsn: None,
        ended: None,
        answer: None,
    }
}
