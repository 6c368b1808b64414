//! One server's life: its doors with their clients' requests, its background, and the operations in flight. What happens
//! next is drawn from everything that could.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tidegate_driver::base::VolumeId;
use tidegate_driver::flush::FlushTarget;
use tidegate_driver::format::superblock::Superblock;
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::{Done, Memory, Op, OpKind};
use tidegate_driver::recovery::Opened;
use tidegate_driver::stage::arena::Arena;
use tidegate_driver::stage::core::DoorId;
use tidegate_driver::volume::background::Background;
use tidegate_driver::volume::door::VolumeShared;
use tidegate_driver::volume::shared::{Clock, Shared, log_write_of};
use tidegate_driver::volume::{Door, Request, RequestKind, VolumeDoor, Wake};

use super::checkers::answers::judge;
use super::checkers::bounds::Bounds;
use super::checkers::liveness::Liveness;
use super::checkers::status::Status;
use super::client::Habits;
use super::disk::lock;
use super::door_io::{Asked, Io};
use super::flight::{Flight, Owner, execute};
use super::memory;
use super::model::Model;
use super::report::Sometimes;
use super::script::{self, Do};
use super::sessions::{Seat, Sessions};
use super::site::{Flag, Site, Stop, disk_of};

/// A door and its client.
pub(super) struct SimDoor {
    pub(super) door: VolumeDoor,
    pub(super) volume: usize,
    pub(super) woken: Arc<Flag>,
    /// Whether `batch_end` is due, or a round of the session's thread.
    pub(super) gathered: bool,
    /// When the session's thread looks at its rings again without being woken.
    pub(super) look_ns: Option<u64>,
    pub(super) asked: BTreeMap<u32, Asked>,
    pub(super) next_ns: u64,
    /// It is for sessions.
    pub(super) seat: Option<Seat>,
}

impl SimDoor {
    pub(super) fn new(shared: &Arc<Shared>, of: &Arc<VolumeShared>, volume: usize, id: u32) -> SimDoor {
        let id = DoorId(id);
        let woken = Arc::new(Flag::default());
        let mailbox = shared.add_door(id, woken.clone());
        SimDoor {
            door: VolumeDoor::new(shared.clone(), of.clone(), id, mailbox),
            volume,
            woken,
            gathered: false,
            look_ns: None,
            asked: BTreeMap::new(),
            next_ns: 0,
            seat: None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Finish(usize),
    Wake(usize),
    BatchEnd(usize),
    Background,
    Ask(usize),
    Look(usize),
}

/// A server.
pub struct Running {
    pub(super) shared: Arc<Shared>,
    background: Background,
    background_woken: Arc<Flag>,
    deadline_ns: Option<u64>,
    pub(super) doors: Vec<SimDoor>,
    pub(super) flights: Vec<Flight>,
    /// The superblock as it is on the stage.
    pub superblock: Superblock,
    pub(super) acks: Vec<(AckLevel, OnLogError)>,
    pub(super) volumes: Vec<Arc<VolumeShared>>,
    pub(super) next_door: u32,
    pub(super) sessions: Sessions,
    /// How clients behave; `None`: they ask nothing new.
    pub habits: Option<Habits>,
    /// Requests that are to be asked again, per volume.
    pub again: Vec<Asked>,
    /// Whether the devices are damaged, so that the server may find that.
    pub damage_is_expected: bool,
    /// Requests to be asked instead of those by habit.
    pub script: VecDeque<Do>,
    /// Requests still to be asked by the clients.
    pub quota: u64,
    first_region: u64,
    liveness: Liveness,
    bounds: Bounds,
    says: Status,
    pub(super) payload_max: u64,
    pub(super) had_faults: bool,
    pub(super) requests: u64,
}

impl Running {
    /// Starts a server with `doors_per_volume` doors each.
    pub fn start(opened: Opened, site: &Site<'_>, doors: &[usize]) -> Running {
        let background_woken = Arc::new(Flag::default());
        background_woken.wake();
        let first_region = opened.core.ring().open_seq().0;
        let shared = Arc::new(Shared::new(
            opened.core,
            Arc::new(opened.arena),
            opened.rules,
            site.clock.clone(),
            background_woken.clone(),
        ));
        let background = Background::with_pool(
            shared.clone(),
            opened.targets,
            opened.checkpoint,
            opened.report.arena_used,
            Vec::new(),
        );
        let mut all: Vec<SimDoor> = Vec::new();
        let mut acks = Vec::new();
        let mut volumes = Vec::new();
        let mut next_door = 1;
        for (volume, info) in opened.superblock.volumes.iter().enumerate() {
            acks.push((info.ack, info.on_log_error));
            let volume_shared = Arc::new(VolumeShared {
                id: info.id,
                size_bytes: AtomicU64::new(info.size_bytes),
                ack: info.ack,
                on_log_error: info.on_log_error,
                backing_block_bytes: tidegate_driver::io::Disk::block_bytes(&site.backings[volume]),
                doors: Default::default(),
                counters: Default::default(),
            });
            volumes.push(volume_shared.clone());
            for _ in 0..doors[volume] {
                all.push(SimDoor::new(&shared, &volume_shared, volume, next_door));
                next_door += 1;
            }
        }
        Running {
            payload_max: u64::from(shared.geometry.payload_bytes_max()),
            shared,
            background,
            background_woken,
            deadline_ns: None,
            doors: all,
            flights: Vec::new(),
            superblock: opened.superblock,
            acks,
            habits: None,
            again: Vec::new(),
            quota: 0,
            script: VecDeque::new(),
            damage_is_expected: false,
            volumes,
            next_door,
            first_region,
            liveness: Liveness::default(),
            bounds: Bounds::default(),
            says: Status::default(),
            had_faults: false,
            sessions: Sessions::default(),
            requests: 0,
        }
    }

    /// Largest transfer.
    #[must_use]
    pub fn payload_max(&self) -> u64 {
        self.payload_max
    }

    /// Whether a request has no answer yet, or is still to be asked.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.again.is_empty() || self.doors.iter().any(|d| !d.asked.is_empty()) || self.sessions_wait()
    }

    /// Lets one thing happen. `Ok(false)`: nothing can happen any more.
    pub fn tick(&mut self, site: &Site<'_>, model: &mut Model) -> Result<bool, Stop> {
        {
            let mut ctl = lock(site.ctl);
            ctl.step += 1;
            let due = ctl.step >= ctl.crash_at && ctl.trap.is_none() && self.is_moment(ctl.crash_while);
            if due || ctl.step >= ctl.crash_at.saturating_add(ctl.patience) {
                return Err(Stop::Crash);
            }
            self.had_faults |= ctl.faults.stage_write > 0;
        }
        loop {
            let now = site.clock.monotonic_ns();
            let events = self.events(now);
            if !events.is_empty() {
                let event = events[lock(site.ctl).rng.below(events.len() as u64) as usize];
                self.handle(event, now, site, model)?;
                let of_background = self.flights.iter().filter(|f| f.owner == Owner::Background).count();
                self.bounds.check(&self.shared.core.lock(), of_background, self.log_writes())?;
                return Ok(true);
            }
            if self.sessions_rest(site)? {
                continue;
            }
            let Some(next) = self.next_ns() else {
                if self.is_waiting() {
                    return Err(Stop::Fail(Liveness::stalled(&self.waiting(), &self.shared.core.lock())));
                }
                return Ok(false);
            };
            self.liveness.waits(now, next)?;
            site.clock.0.store(next.max(now), Ordering::Relaxed);
        }
    }

    /// The requests without an answer, for people.
    fn waiting(&self) -> Vec<String> {
        let of = |(i, door): (usize, &SimDoor)| -> Vec<String> {
            door.asked.values().map(|a| format!("door {i} {:?} lsn {:?}", a.request, a.lsn)).collect()
        };
        self.doors.iter().enumerate().flat_map(of).chain(self.sessions_waiting()).collect()
    }

    /// What still goes on in a life that should have ended, for people.
    #[must_use]
    pub fn unfinished(&self) -> String {
        format!(
            "requests do not come to an end: {} to be asked, {} again, in flight {:?}; background {:?}, next call {:?}, {} \
             operations",
            self.quota,
            self.again.len(),
            self.waiting(),
            self.background.status,
            self.deadline_ns,
            self.flights.len()
        )
    }

    fn events(&self, now: u64) -> Vec<Event> {
        let mut events = Vec::new();
        for (i, flight) in self.flights.iter().enumerate() {
            if flight.ready_ns <= now {
                events.push(Event::Finish(i));
            }
        }
        for (i, door) in self.doors.iter().enumerate() {
            if door.woken.is_set() {
                events.push(Event::Wake(i));
            }
            if door.gathered || door.look_ns.is_some_and(|at| at <= now) {
                events.push(Event::BatchEnd(i));
            }
            if self.may_ask(i) && door.next_ns <= now {
                events.push(Event::Ask(i));
            }
            events.extend(self.looks(i).then_some(Event::Look(i)));
        }
        if self.background_woken.is_set() || self.deadline_ns.is_some_and(|at| at <= now) {
            events.push(Event::Background);
        }
        events
    }

    fn may_ask(&self, i: usize) -> bool {
        let door = &self.doors[i];
        if door.seat.is_some() {
            return self.may_submit(i);
        }
        let depth = self.habits.map_or(4, |h| h.depth) as usize;
        let again = self.again.iter().any(|a| a.volume == door.volume);
        (again && door.asked.len() < 64)
            || (self.habits.is_some() && self.quota > 0 && door.asked.len() < depth)
    }

    pub(super) fn next_ns(&self) -> Option<u64> {
        let flights = self.flights.iter().map(|f| f.ready_ns);
        let asks = (0..self.doors.len()).filter(|&i| self.may_ask(i)).map(|i| self.doors[i].next_ns);
        let looks = self.doors.iter().filter_map(|door| door.look_ns);
        flights.chain(asks).chain(looks).chain(self.deadline_ns).min()
    }

    fn handle(&mut self, event: Event, now: u64, site: &Site<'_>, model: &mut Model) -> Result<(), Stop> {
        if let Some(told) = self.session_event(event, now, site, model) {
            return told;
        }
        match event {
            Event::Finish(i) => self.finish(i, now, site, model),
            Event::Wake(i) => {
                self.doors[i].woken.take();
                self.with_door(i, now, site, model, |door, io| door.woken(io))
            }
            Event::BatchEnd(i) => {
                self.doors[i].gathered = false;
                self.with_door(i, now, site, model, |door, io| door.batch_end(io))
            }
            Event::Background => {
                self.background_woken.take();
                self.step_background(now, site)
            }
            Event::Ask(i) | Event::Look(i) => self.ask(i, now, site, model),
        }
    }

    fn step_background(&mut self, now: u64, site: &Site<'_>) -> Result<(), Stop> {
        lock(site.ctl).note("background", &[now]);
        let mut submitted = Vec::new();
        self.deadline_ns = self.background.step(now, &mut |op| submitted.push(op));
        for op in submitted {
            self.submit(Owner::Background, op, now, site);
        }
        if let Some(damage) = &self.background.status.damage
            && !self.damage_is_expected
        {
            return Err(Stop::Fail(format!("damage reported where there is none: {damage}")));
        }
        let (is_flushing, log_in_flight) = (self.background.is_flushing(), self.log_writes() > 0);
        let core = self.shared.core.lock();
        self.says.check(&self.background.status, &core, is_flushing, log_in_flight)?;
        Ok(())
    }

    fn ask(&mut self, i: usize, now: u64, site: &Site<'_>, model: &mut Model) -> Result<(), Stop> {
        let volume = self.doors[i].volume;
        let tag = (0..).find(|tag| !self.doors[i].asked.contains_key(tag)).expect("a free tag");
        let again: Vec<usize> = (0..self.again.len()).filter(|&a| self.again[a].volume == volume).collect();
        let (request, content) = if again.is_empty() {
            let mut ctl = lock(site.ctl);
            let habits = self.habits.expect("clients are active");
            self.quota -= 1;
            self.doors[i].next_ns = now + habits.pause_ns(&mut ctl.rng);
            match self.script.pop_front() {
                Some(op) => script::request(op, tag, model.size(volume), &mut ctl.rng),
                None => habits.next(&mut ctl.rng, tag, model.size(volume), self.payload_max),
            }
        } else {
            let asked = self.again.swap_remove(lock(site.ctl).rng.pick(&again));
            (Request { tag, ..asked.request }, asked.content)
        };
        self.put(i, request, content, now, site, model)
    }

    /// Asks the first door of `volume` to read a range, once it has room.
    pub fn read(&mut self, volume: usize, offset: u64, len: u64) {
        let request = Request { tag: 0, kind: RequestKind::Read, offset, len, fua: false };
        self.again.push(Asked::new(request, None, volume, 0));
    }

    fn put(
        &mut self,
        i: usize,
        request: Request,
        content: Option<Arc<[u8]>>,
        now: u64,
        site: &Site<'_>,
        model: &mut Model,
    ) -> Result<(), Stop> {
        lock(site.ctl).note(
            &format!("ask {:?}", request.kind),
            &[i as u64, u64::from(request.tag), request.offset, request.len, u64::from(request.fua)],
        );
        self.requests += 1;
        let door = &mut self.doors[i];
        let asked = Asked::new(request, content, door.volume, model.acknowledged());
        door.asked.insert(request.tag, asked);
        door.gathered = true;
        self.with_door(i, now, site, model, |door, io| door.request(request, io))
    }

    fn with_door(
        &mut self,
        i: usize,
        now: u64,
        site: &Site<'_>,
        model: &mut Model,
        call: impl FnOnce(&mut VolumeDoor, &mut Io<'_>),
    ) -> Result<(), Stop> {
        let fetch_fails = {
            let rate = self.habits.map_or(0, |h| h.fetch_fails);
            rate > 0 && lock(site.ctl).rng.chance(rate)
        };
        let door = &mut self.doors[i];
        let mut io = Io {
            asked: &mut door.asked,
            model,
            marks: self.shared.marks.clone(),
            submitted: Vec::new(),
            completed: Vec::new(),
            wrong: None,
            fetch_fails,
        };
        call(&mut door.door, &mut io);
        let Io { submitted, completed, wrong, .. } = io;
        if let Some(wrong) = wrong {
            return Err(Stop::Fail(wrong));
        }
        for tag in completed {
            let asked = door.asked.remove(&tag).expect("completed once");
            let result = asked.done.expect("it is complete");
            lock(site.ctl).note(
                "complete",
                &[i as u64, u64::from(tag), asked.lsn.unwrap_or(0), result.err().map_or(0, |e| e.0 as u64)],
            );
            let (ack, policy) = self.acks[asked.volume];
            let may_fail = self.had_faults && policy == OnLogError::Fail;
            judge(&asked, result, ack, may_fail, self.payload_max, model, site)
                .map_err(|what| Stop::Fail(format!("door {i} {:?}: {what}", asked.request)))?;
        }
        for op in submitted {
            self.submit(Owner::Door(i), op, now, site);
        }
        Ok(())
    }

    pub(super) fn submit(&mut self, owner: Owner, op: Op, now: u64, site: &Site<'_>) {
        let disk = disk_of(site, op.target);
        if op.kind != OpKind::Sync {
            disk.check_aligned(op.offset, op.len);
        }
        let data = match op.kind {
            OpKind::Write | OpKind::WriteDurable => memory::bytes(&op.memory),
            OpKind::WriteZeroes | OpKind::Discard => vec![0; op.len as usize],
            OpKind::Read | OpKind::Sync => Vec::new(),
        };
        assert!(data.is_empty() || data.len() as u64 == op.len, "an operation's memory has its length");
        let mut ctl = lock(site.ctl);
        ctl.note(&format!("submit {:?} {:?}", op.target, op.kind), &[op.offset, op.len]);
        let latency = ctl.rng.below(site.latency_ns + 1);
        drop(ctl);
        self.flights.push(Flight { owner, op, ready_ns: now + latency, data, moment: disk.now() });
    }

    fn finish(&mut self, i: usize, now: u64, site: &Site<'_>, model: &mut Model) -> Result<(), Stop> {
        let mut flight = self.flights.swap_remove(i);
        if matches!(flight.op.kind, OpKind::Write | OpKind::WriteDurable)
            && memory::bytes(&flight.op.memory) != flight.data
        {
            return Err(Stop::Fail(format!("memory of an operation in flight was changed: {:?}", flight.op)));
        }
        let result = execute(&mut flight, site);
        self.says.ended(&flight, result);
        lock(site.ctl).note(
            &format!("done {:?} {:?}", flight.op.target, flight.op.kind),
            &[flight.op.offset, flight.op.len, result.err().map_or(0, |e| e.0 as u64)],
        );
        let done = Done { token: flight.op.token, result, memory: flight.op.memory };
        match flight.owner {
            Owner::Door(d) if self.doors[d].seat.is_some() => self.session_op(d, done, now, site, model),
            Owner::Door(d) => {
                if let (Memory::Client { index, .. }, Ok(())) = (&done.memory, result) {
                    let tag = u32::from(*index);
                    self.doors[d].asked.get_mut(&tag).expect("a read in flight").got = flight.data;
                }
                self.doors[d].gathered = true;
                self.with_door(d, now, site, model, |door, io| door.op_done(done, io))
            }
            Owner::Background => {
                self.background.op_done(done);
                self.background_woken.wake();
                Ok(())
            }
        }
    }

    /// Closes a door of `volume` that has nothing to do, and opens another. Returns whether there was one.
    pub fn reattach(&mut self, volume: usize) -> bool {
        let idle = |d: &SimDoor| {
            d.volume == volume && d.seat.is_none() && d.asked.is_empty() && !d.gathered && !d.door.is_busy()
        };
        let Some(at) = self.doors.iter().position(idle) else { return false };
        if self.doors[at].woken.is_set() {
            return false;
        }
        let next_ns = self.doors[at].next_ns;
        self.doors[at] = SimDoor::new(&self.shared, &self.volumes[volume], volume, self.next_door);
        self.doors[at].next_ns = next_ns;
        self.next_door += 1;
        true
    }

    /// Begins no new epoch while `held`.
    pub fn hold(&mut self, held: bool) {
        self.background.hold(held);
        self.background_woken.wake();
    }

    /// Whether an epoch is being flushed.
    #[must_use]
    pub fn is_flushing(&self) -> bool {
        self.background.is_flushing()
    }

    /// Whether the server has found damage.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.background.status.damage.is_some()
    }

    /// What the flusher knows of a volume's backing.
    pub fn target(&mut self, volume: VolumeId) -> &mut FlushTarget {
        self.background.target_mut(volume).expect("a volume in use")
    }

    /// A volume has grown.
    pub fn set_size(&mut self, volume: usize, size_bytes: u64) {
        self.volumes[volume].size_bytes.store(size_bytes, Ordering::Release);
        self.doors.iter().filter(|d| d.volume == volume && d.seat.is_some()).for_each(|d| d.woken.wake());
    }

    /// Begins to flush everything; `Running::checkpoint` tells when it is done.
    pub fn drain(&mut self) -> u64 {
        self.background_woken.wake();
        self.background.drain().0
    }

    /// Asks for everything to become durable on the log.
    pub fn make_durable(&mut self) -> u64 {
        let mut core = self.shared.core.lock();
        core.request_commit();
        self.background_woken.wake();
        core.published().0
    }

    /// Everything up to here is on the backings.
    #[must_use]
    pub fn checkpoint(&self) -> u64 {
        self.shared.core.lock().checkpoint().0
    }

    fn log_writes(&self) -> usize {
        self.flights.iter().filter(|f| log_write_of(f.op.token).is_some()).count()
    }

    /// Everything up to here was accepted.
    #[must_use]
    pub fn published(&self) -> u64 {
        self.shared.core.lock().published().0
    }

    /// Everything up to here is on the log.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.shared.core.lock().durable().0
    }

    /// Whether anything of the background is in flight.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.background.is_busy() || !self.flights.is_empty()
    }

    /// What happened.
    #[must_use]
    pub fn sometimes(&self) -> Sometimes {
        let core = self.shared.core.lock();
        Sometimes {
            requests: self.requests,
            space_waits: core.counters.space_waits,
            log_errors: core.counters.log_errors,
            backing_errors: self.background.status.backing_errors,
            load_errors: self.says.load_errors,
            epochs: self.background.status.epochs,
            regions: core.ring().open_seq().0 - self.first_region,
            sessions: self.sessions_seen(),
        }
    }

    /// The arena in use.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.shared.arena
    }
}
