//! One server's life: its doors with their clients' requests, its background, and the operations in flight. What happens
//! next is drawn from everything that could.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tidegate_driver::base::{Lsn, VolumeId};
use tidegate_driver::format::superblock::Superblock;
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::{Done, Errno, Op, OpKind, Target};
use tidegate_driver::recovery::Opened;
use tidegate_driver::stage::arena::Arena;
use tidegate_driver::stage::core::DoorId;
use tidegate_driver::volume::background::Background;
use tidegate_driver::volume::door::VolumeShared;
use tidegate_driver::volume::shared::{Clock, LOG_TOKEN, Shared};
use tidegate_driver::volume::{Door, DoorIo, Request, RequestKind, VolumeDoor, Wake};

use super::client::Habits;
use super::disk::{Ctl, Moment, SimDisk, SyncFailure, lock};
use super::model::{Change, Effect, Model};
use super::rng::Rng;

/// Why a life ends early.
#[derive(Debug)]
pub enum Stop {
    /// The step of the crash was reached.
    Crash,
    /// A promise was broken.
    Fail(String),
}

impl From<String> for Stop {
    fn from(what: String) -> Stop {
        Stop::Fail(what)
    }
}

/// Virtual time.
#[derive(Debug, Default)]
pub struct SimClock(pub AtomicU64);

impl Clock for SimClock {
    fn unix_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn monotonic_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A wake-up that the scheduler delivers when it likes.
#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Flag {
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A request that is not complete.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The request.
    pub request: Request,
    /// Its content, for a write.
    pub content: Option<Arc<[u8]>>,
    /// Its volume, by position.
    pub volume: usize,
    /// Newest acknowledged change when it began.
    acknowledged: u64,
    lsn: Option<u64>,
    voided: bool,
    got: Vec<u8>,
    done: Option<Result<(), Errno>>,
}

/// What does not change from one server to the next.
pub struct Site<'a> {
    /// Chance, steps, faults.
    pub ctl: &'a Ctl,
    /// The stage's disk.
    pub stage: &'a SimDisk,
    /// The backings, by position of their volume.
    pub backings: &'a [SimDisk],
    /// Time.
    pub clock: &'a Arc<SimClock>,
    /// Longest time an operation takes, in ns.
    pub latency_ns: u64,
}

/// Things that should happen in some world or other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sometimes {
    /// Requests completed.
    pub requests: u64,
    /// Claims that waited for space.
    pub space_waits: u64,
    /// Log writes that failed.
    pub log_errors: u64,
    /// Flush attempts that failed.
    pub backing_errors: u64,
    /// Epochs flushed.
    pub epochs: u64,
    /// Most regions opened in one life.
    pub regions: u64,
}

struct SimDoor {
    door: VolumeDoor,
    volume: usize,
    woken: Arc<Flag>,
    /// Whether `batch_end` is due.
    gathered: bool,
    asked: BTreeMap<u32, Asked>,
    next_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Door(usize),
    Background,
}

struct Flight {
    owner: Owner,
    op: Op,
    ready_ns: u64,
    /// What is being written, as it was when the operation began.
    data: Vec<u8>,
    /// The disk's moment when it began.
    moment: u64,
}

struct Io<'a> {
    asked: &'a mut BTreeMap<u32, Asked>,
    model: &'a mut Model,
    submitted: Vec<Op>,
    completed: Vec<u32>,
    wrong: Option<String>,
    fetch_fails: bool,
}

impl DoorIo for Io<'_> {
    fn submit(&mut self, op: Op) {
        self.submitted.push(op);
    }

    fn placed(&mut self, tag: u32, lsn: Lsn) {
        let asked = self.asked.get_mut(&tag).expect("a request in flight");
        let request = asked.request;
        let effect = match request.kind {
            RequestKind::Write => Effect::Bytes(asked.content.clone().expect("a write has content")),
            RequestKind::WriteZeroes => Effect::Zero,
            _ => Effect::Discard,
        };
        assert!(asked.lsn.is_none(), "request {tag} is placed twice");
        asked.lsn = Some(lsn.0);
        let range = request.offset..request.offset + request.len;
        self.model.placed(lsn.0, Change { volume: asked.volume, range, effect });
    }

    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> Result<(), Errno> {
        let asked = self.asked.get_mut(&tag).expect("a request in flight");
        if self.fetch_fails {
            asked.voided = true;
            self.model.voided(asked.lsn.expect("placed before it is fetched"));
            into.fill(0xee);
            return Err(Errno(libc_efault()));
        }
        let content = asked.content.as_ref().expect("a write has content");
        into.copy_from_slice(&content[offset as usize..offset as usize + into.len()]);
        Ok(())
    }

    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> Result<(), Errno> {
        let asked = self.asked.get_mut(&tag).expect("a request in flight");
        asked.got.resize(asked.request.len as usize, 0);
        asked.got[offset as usize..offset as usize + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn complete(&mut self, tag: u32, result: Result<(), Errno>) {
        match self.asked.get_mut(&tag) {
            Some(asked) if asked.done.is_none() => {
                asked.done = Some(result);
                self.completed.push(tag);
            }
            _ => self.wrong = Some(format!("request {tag} is completed twice")),
        }
    }
}

fn libc_efault() -> i32 {
    14
}

/// Copies between an operation's memory and a buffer.
#[expect(unsafe_code, reason = "operations name parts of the arena's mapping")]
mod memory {
    use tidegate_driver::io::Memory;

    /// The bytes of a write.
    pub fn bytes(memory: &Memory) -> Vec<u8> {
        match memory {
            Memory::None => Vec::new(),
            Memory::Owned(buf) => buf.to_vec(),
            Memory::Shared { region, offset, len } => {
                assert!(offset + len <= region.len_bytes());
                // SAFETY: in bounds; the submitter guarantees that nobody writes there, and there is one thread.
                unsafe { std::slice::from_raw_parts(region.base().add(*offset), *len) }.to_vec()
            }
        }
    }

    /// Fills the memory of a read.
    pub fn fill(memory: &mut Memory, data: &[u8]) {
        match memory {
            Memory::None => assert!(data.is_empty()),
            Memory::Owned(buf) => buf.copy_from_slice(data),
            Memory::Shared { region, offset, len } => {
                assert!(*offset + *len <= region.len_bytes() && *len == data.len());
                // SAFETY: in bounds; the submitter guarantees that nobody uses the part, and there is one thread.
                unsafe {
                    std::ptr::copy_nonoverlapping(data.as_ptr(), region.base().add(*offset), data.len());
                }
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Finish(usize),
    Wake(usize),
    BatchEnd(usize),
    Background,
    Ask(usize),
}

/// A server.
pub struct Running {
    shared: Arc<Shared>,
    background: Background,
    background_woken: Arc<Flag>,
    deadline_ns: Option<u64>,
    doors: Vec<SimDoor>,
    flights: Vec<Flight>,
    /// The superblock as it is on the stage.
    pub superblock: Superblock,
    acks: Vec<(AckLevel, OnLogError)>,
    /// How clients behave; `None`: they ask nothing new.
    pub habits: Option<Habits>,
    /// Requests that are to be asked again, per volume.
    pub again: Vec<Asked>,
    /// Requests still to be asked by the clients.
    pub quota: u64,
    first_region: u64,
    spins: u32,
    payload_max: u64,
    had_faults: bool,
    requests: u64,
}

/// Kill or power cut, and what is left of what was going on.
pub struct Remains {
    /// Requests without an answer.
    pub unanswered: Vec<Asked>,
    /// Everything up to here was accepted.
    pub published: u64,
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
        let background =
            Background::new(shared.clone(), opened.targets, opened.checkpoint, opened.report.arena_used);
        let mut all = Vec::new();
        let mut acks = Vec::new();
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
            for _ in 0..doors[volume] {
                let id = DoorId(all.len() as u32 + 1);
                let woken = Arc::new(Flag::default());
                let mailbox = shared.add_door(id, woken.clone());
                all.push(SimDoor {
                    door: VolumeDoor::new(shared.clone(), volume_shared.clone(), id, mailbox),
                    volume,
                    woken,
                    gathered: false,
                    asked: BTreeMap::new(),
                    next_ns: 0,
                });
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
            first_region,
            spins: 0,
            had_faults: false,
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
        !self.again.is_empty() || self.doors.iter().any(|d| !d.asked.is_empty())
    }

    /// Lets one thing happen. `Ok(false)`: nothing can happen any more.
    pub fn tick(&mut self, site: &Site<'_>, model: &mut Model) -> Result<bool, Stop> {
        {
            let mut ctl = lock(site.ctl);
            ctl.step += 1;
            if ctl.step >= ctl.crash_at + 300 || (ctl.step >= ctl.crash_at && self.is_moment(ctl.crash_while))
            {
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
                return Ok(true);
            }
            let Some(next) = self.next_ns() else {
                if self.is_waiting() {
                    return Err(Stop::Fail(self.describe_stall()));
                }
                return Ok(false);
            };
            self.spins = if next <= now + 1000 { self.spins + 1 } else { 0 };
            if self.spins > 5000 {
                return Err(Stop::Fail(
                    "the background spins: it asks to be called at once, again and again".into(),
                ));
            }
            site.clock.0.store(next.max(now), Ordering::Relaxed);
        }
    }

    /// Whether what a crash is to interrupt is going on.
    fn is_moment(&self, moment: Moment) -> bool {
        let on_stage = |f: &Flight| f.op.target == Target::Stage;
        self.flights.iter().any(|f| match moment {
            Moment::Any => true,
            Moment::LogWrite => on_stage(f) && f.op.token == LOG_TOKEN,
            Moment::StageWrite => on_stage(f) && f.op.token != LOG_TOKEN,
            Moment::BackingWrite => !on_stage(f) && !f.data.is_empty(),
            Moment::Sync => f.op.kind == OpKind::Sync,
        }) || moment == Moment::Any
    }

    fn describe_stall(&self) -> String {
        let core = self.shared.core.lock();
        let asked: Vec<String> = self
            .doors
            .iter()
            .enumerate()
            .flat_map(|(i, d)| {
                d.asked.values().map(move |a| format!("door {i} {:?} lsn {:?}", a.request, a.lsn))
            })
            .collect();
        format!(
            "nothing can happen any more, but requests wait: {asked:?}; claimed {} published {} durable {} checkpoint {} \
             waiting {} regions {}",
            core.claimed(),
            core.published(),
            core.durable(),
            core.checkpoint(),
            core.waiting(),
            core.ring().regions().len()
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
            if door.gathered {
                events.push(Event::BatchEnd(i));
            }
            if self.may_ask(i) && door.next_ns <= now {
                events.push(Event::Ask(i));
            }
        }
        if self.background_woken.is_set() || self.deadline_ns.is_some_and(|at| at <= now) {
            events.push(Event::Background);
        }
        events
    }

    fn may_ask(&self, door: usize) -> bool {
        let door = &self.doors[door];
        let depth = self.habits.map_or(4, |h| h.depth) as usize;
        let again = self.again.iter().any(|a| a.volume == door.volume);
        (again && door.asked.len() < 64)
            || (self.habits.is_some() && self.quota > 0 && door.asked.len() < depth)
    }

    fn next_ns(&self) -> Option<u64> {
        let flights = self.flights.iter().map(|f| f.ready_ns);
        let asks = (0..self.doors.len()).filter(|&i| self.may_ask(i)).map(|i| self.doors[i].next_ns);
        flights.chain(asks).chain(self.deadline_ns).min()
    }

    fn handle(&mut self, event: Event, now: u64, site: &Site<'_>, model: &mut Model) -> Result<(), Stop> {
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
            Event::Ask(i) => self.ask(i, now, site, model),
        }
    }

    fn step_background(&mut self, now: u64, site: &Site<'_>) -> Result<(), Stop> {
        lock(site.ctl).note("background", &[now]);
        let mut submitted = Vec::new();
        self.deadline_ns = self.background.step(now, &mut |op| submitted.push(op));
        for op in submitted {
            self.submit(Owner::Background, op, now, site);
        }
        if let Some(damage) = &self.background.status.damage {
            return Err(Stop::Fail(format!("damage reported where there is none: {damage}")));
        }
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
            habits.next(&mut ctl.rng, tag, model.size(volume), self.payload_max)
        } else {
            let asked = self.again.swap_remove(lock(site.ctl).rng.pick(&again));
            (Request { tag, ..asked.request }, asked.content)
        };
        self.put(i, request, content, now, site, model)
    }

    /// Asks the first door of `volume` to read a range, once it has room.
    pub fn read(&mut self, volume: usize, offset: u64, len: u64) {
        let request = Request { tag: 0, kind: RequestKind::Read, offset, len, fua: false };
        self.again.push(Asked {
            request,
            content: None,
            volume,
            acknowledged: 0,
            lsn: None,
            voided: false,
            got: Vec::new(),
            done: None,
        });
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
        let asked = Asked {
            request,
            content,
            volume: door.volume,
            acknowledged: model.acknowledged(),
            lsn: None,
            voided: false,
            got: Vec::new(),
            done: None,
        };
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

    fn submit(&mut self, owner: Owner, op: Op, now: u64, site: &Site<'_>) {
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
        lock(site.ctl).note(
            &format!("done {:?} {:?}", flight.op.target, flight.op.kind),
            &[flight.op.offset, flight.op.len, result.err().map_or(0, |e| e.0 as u64)],
        );
        let done = Done { token: flight.op.token, result, memory: flight.op.memory };
        match flight.owner {
            Owner::Door(d) => {
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
            epochs: self.background.status.epochs,
            regions: core.ring().open_seq().0 - self.first_region,
        }
    }

    /// The process is gone: the kernel completes what it likes of the operations in flight.
    pub fn kill(mut self, site: &Site<'_>) -> Remains {
        let mut rng = Rng::new(lock(site.ctl).rng.draw(), 3);
        while !self.flights.is_empty() {
            let mut flight = self.flights.swap_remove(rng.below(self.flights.len() as u64) as usize);
            let disk = disk_of(site, flight.op.target);
            match (rng.below(3), flight.op.kind) {
                (0, _) => {}
                (1, OpKind::WriteDurable) => disk.apply(flight.op.offset, &flight.data),
                _ => {
                    let _ = execute(&mut flight, site);
                }
            }
        }
        self.remains()
    }

    /// Power is cut.
    pub fn power_cut(mut self, site: &Site<'_>) -> Remains {
        let mut rng = Rng::new(lock(site.ctl).rng.draw(), 4);
        let flights = std::mem::take(&mut self.flights);
        let targets = std::iter::once(Target::Stage)
            .chain((0..site.backings.len()).map(|v| Target::Backing(VolumeId(v as u16 + 1))));
        for target in targets {
            let writes: Vec<(u64, Vec<u8>)> = flights
                .iter()
                .filter(|f| f.op.target == target && !f.data.is_empty())
                .map(|f| (f.op.offset, f.data.clone()))
                .collect();
            disk_of(site, target).power_cut(&writes, &mut rng);
        }
        self.remains()
    }

    fn remains(self) -> Remains {
        let published = self.shared.core.lock().published().0;
        let mut unanswered = self.again;
        for door in self.doors {
            unanswered.extend(door.asked.into_values().map(|a| Asked {
                lsn: None,
                voided: false,
                got: Vec::new(),
                done: None,
                ..a
            }));
        }
        Remains { unanswered, published }
    }

    /// The arena in use.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.shared.arena
    }
}

fn disk_of<'a>(site: &Site<'a>, target: Target) -> &'a SimDisk {
    match target {
        Target::Stage => site.stage,
        Target::Backing(volume) => &site.backings[usize::from(volume.0) - 1],
    }
}

/// Carries out an operation, or fails it.
fn execute(flight: &mut Flight, site: &Site<'_>) -> Result<(), Errno> {
    let disk = disk_of(site, flight.op.target);
    let (kind, offset) = (flight.op.kind, flight.op.offset);
    let on_stage = flight.op.target == Target::Stage;
    match kind {
        OpKind::Discard if !disk.discards => return Err(Errno::EOPNOTSUPP),
        OpKind::WriteZeroes if !disk.zeroes => return Err(Errno::EOPNOTSUPP),
        _ => {}
    }
    let fault = {
        let mut ctl = lock(site.ctl);
        let faults = ctl.faults;
        let rate = match kind {
            // A region that cannot be read ends the server's service; the world does not try that.
            OpKind::Read if on_stage => 0,
            OpKind::Read => faults.read,
            OpKind::Sync => faults.sync,
            _ if on_stage => faults.stage_write,
            _ => faults.backing_write,
        };
        let fails = rate > 0 && ctl.rng.chance(rate);
        ctl.faults_injected += u64::from(fails);
        fails.then(|| Rng::new(ctl.rng.draw(), 5))
    };
    if let Some(mut rng) = fault {
        match kind {
            OpKind::Read => {}
            OpKind::Sync => {
                let how = rng.pick(&[SyncFailure::Kept, SyncFailure::Dropped, SyncFailure::Forgotten]);
                disk.sync_failed(flight.moment, how, &mut rng);
            }
            _ => disk.apply_failed(offset, &flight.data, &mut rng),
        }
        return Err(rng.pick(&[Errno::EIO, Errno::EIO, Errno::ENOSPC]));
    }
    match kind {
        OpKind::Read => memory::fill(&mut flight.op.memory, &disk.visible(offset, flight.op.len as usize)),
        OpKind::Write | OpKind::Discard | OpKind::WriteZeroes => disk.apply(offset, &flight.data),
        OpKind::WriteDurable => disk.apply_durable(offset, &flight.data),
        OpKind::Sync => disk.sync_from(flight.moment),
    }
    Ok(())
}

/// Whether the answer to a request is one that a client may get.
fn judge(
    asked: &Asked,
    result: Result<(), Errno>,
    ack: AckLevel,
    may_fail: bool,
    payload_max: u64,
    model: &mut Model,
    site: &Site<'_>,
) -> Result<(), String> {
    let request = &asked.request;
    let transfers = matches!(request.kind, RequestKind::Read | RequestKind::Write);
    let wrong =
        request.offset + request.len > model.size(asked.volume) || (transfers && request.len > payload_max);
    if wrong {
        return match result {
            Err(Errno::EINVAL) => Ok(()),
            other => Err(format!("a request that makes no sense ended with {other:?}")),
        };
    }
    match (request.kind, result) {
        (RequestKind::Read, Ok(())) => {
            if asked.got.len() as u64 != request.len {
                return Err("a read delivered nothing".into());
            }
            model.check(asked.volume, request.offset, &asked.got, asked.acknowledged, model.newest())
        }
        (RequestKind::Read, Err(_)) if lock(site.ctl).faults_injected > 0 => Ok(()),
        (RequestKind::Flush, Ok(())) => {
            model.flushed(asked.acknowledged);
            Ok(())
        }
        (_, Ok(())) if request.len == 0 => Ok(()),
        (_, Ok(())) if asked.voided => Err("acknowledged although its content was not fetched".into()),
        (_, Ok(())) => match asked.lsn {
            Some(lsn) => {
                model.acknowledge(lsn, ack == AckLevel::Log || request.fua);
                Ok(())
            }
            None => Err("acknowledged without a place in the log".into()),
        },
        (RequestKind::Write, Err(_)) if asked.voided => Ok(()),
        (_, Err(_)) if may_fail => Ok(()),
        (_, Err(errno)) => Err(format!("failed with {errno}, but nothing excuses that")),
    }
}
