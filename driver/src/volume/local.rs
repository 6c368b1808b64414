//! A door for a program that has the engine in its own process: requests come from the calling thread, which also drives
//! their device operations. What measurements, tests and offline tools use.

use std::sync::Arc;
use std::time::Duration;

use super::door::VolumeDoor;
use super::engine::Engine;
use super::request::{Door, DoorIo, Request, RequestKind, Wake};
use crate::base::{Error, ErrorKind, Lsn, Result, VolumeId};
use crate::io::uring::{Event, Reactor};
use crate::io::{Errno, Op};

/// Entries of the client's ring.
const RING: u32 = 256;

/// Client memory of a request.
#[derive(Debug, Default)]
struct Slot {
    data: Vec<u8>,
    result: Option<std::result::Result<(), Errno>>,
    place: Option<Lsn>,
}

struct LocalIo {
    reactor: Reactor,
    slots: Vec<Slot>,
    completed: Vec<u32>,
}

impl DoorIo for LocalIo {
    fn submit(&mut self, op: Op) {
        self.reactor.push(op);
    }

    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> std::result::Result<(), Errno> {
        let from = offset as usize;
        into.copy_from_slice(&self.slots[tag as usize].data[from..from + into.len()]);
        Ok(())
    }

    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> std::result::Result<(), Errno> {
        let at = offset as usize;
        self.slots[tag as usize].data[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn placed(&mut self, tag: u32, lsn: Lsn) {
        self.slots[tag as usize].place = Some(lsn);
    }

    fn complete(&mut self, tag: u32, result: std::result::Result<(), Errno>) {
        self.slots[tag as usize].result = Some(result);
        self.completed.push(tag);
    }
}

/// The same while a request is handed over whose payload is lent for that time only.
struct Lending<'a> {
    io: &'a mut LocalIo,
    tag: u32,
    parts: &'a [&'a [u8]],
}

impl DoorIo for Lending<'_> {
    fn submit(&mut self, op: Op) {
        self.io.submit(op);
    }

    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> std::result::Result<(), Errno> {
        if tag != self.tag {
            return self.io.fetch(tag, offset, into);
        }
        assert!(offset == 0, "a payload is fetched whole");
        let mut rest = into;
        for part in self.parts {
            let (now, later) = rest.split_at_mut(part.len());
            now.copy_from_slice(part);
            rest = later;
        }
        Ok(())
    }

    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> std::result::Result<(), Errno> {
        self.io.deliver(tag, offset, from)
    }

    fn placed(&mut self, tag: u32, lsn: Lsn) {
        self.io.placed(tag, lsn);
    }

    fn complete(&mut self, tag: u32, result: std::result::Result<(), Errno>) {
        self.io.complete(tag, result);
    }
}

/// A completed request, with its memory.
#[derive(Debug)]
pub struct Completed {
    /// The request's tag.
    pub tag: u32,
    /// Its result.
    pub result: std::result::Result<(), Errno>,
    /// The memory it was submitted with; filled for reads.
    pub data: Vec<u8>,
    /// Its place in the order, if it is a change that got one.
    pub place: Option<Lsn>,
}

/// A client in the engine's process. Stays on the thread that made it, and should be its only one: a request may wait for
/// another client's, which goes on only when its thread drives it. Who has a request in flight drives its client.
pub struct LocalClient {
    // Declared first: the door is gone before the ring that its operations run on.
    door: VolumeDoor,
    io: LocalIo,
}

impl LocalClient {
    /// Client of `volume` with at most `depth` requests in flight.
    pub fn new(engine: &Engine, volume: VolumeId, depth: u32) -> Result<LocalClient> {
        let mut reactor = Reactor::new(RING)?;
        let wake: Arc<dyn Wake> = Arc::new(reactor.waker());
        let door = engine.door(volume, wake, &mut reactor)?;
        let slots = (0..depth).map(|_| Slot::default()).collect();
        Ok(LocalClient {
            door,
            io: LocalIo { reactor, slots, completed: Vec::with_capacity(depth as usize) },
        })
    }

    /// Starts a request; `data` is the payload of a write, or the memory that a read fills. `tag` must not be in flight.
    pub fn submit(&mut self, request: Request, data: Vec<u8>) {
        let transfers = matches!(request.kind, RequestKind::Read | RequestKind::Write);
        assert!(!transfers || data.len() as u64 == request.len, "memory of the request's length");
        self.io.slots[request.tag as usize] = Slot { data, result: None, place: None };
        self.door.request(request, &mut self.io);
    }

    /// Starts a change with the payload `parts`, one after the other; `spare` is memory for them if they have to wait. The
    /// place that it got, if it got one at once.
    pub fn submit_parts(&mut self, request: Request, parts: &[&[u8]], spare: Vec<u8>) -> Option<Lsn> {
        let tag = request.tag;
        self.io.slots[tag as usize] = Slot { data: spare, result: None, place: None };
        let mut lending = Lending { io: &mut self.io, tag, parts };
        self.door.request(request, &mut lending);
        self.door.settle(&mut lending);
        let slot = &mut self.io.slots[tag as usize];
        if slot.place.is_none() {
            slot.data.clear();
            parts.iter().for_each(|part| slot.data.extend_from_slice(part));
        }
        slot.place
    }

    /// The place of a change in flight.
    #[must_use]
    pub fn place_of(&self, tag: u32) -> Option<Lsn> {
        self.io.slots[tag as usize].place
    }

    /// Everything up to the first is accepted, up to the second durable.
    #[must_use]
    pub fn progress(&self) -> (Lsn, Lsn) {
        self.door.progress()
    }

    /// Size of the volume now.
    #[must_use]
    pub fn volume_bytes(&self) -> u64 {
        self.door.volume_bytes()
    }

    /// Longest request in bytes.
    #[must_use]
    pub fn write_bytes_max(&self) -> u32 {
        self.door.request_bytes_max()
    }

    /// Ends the batch of requests submitted so far, without waiting.
    pub fn batch_end(&mut self) {
        self.door.batch_end(&mut self.io);
    }

    /// Next completed request, if there is one; does not wait.
    pub fn completed(&mut self) -> Option<Completed> {
        let tag = self.io.completed.pop()?;
        let slot = std::mem::take(&mut self.io.slots[tag as usize]);
        Some(Completed {
            tag,
            result: slot.result.expect("a completed request has a result"),
            data: slot.data,
            place: slot.place,
        })
    }

    /// Waits until something happens, or for `timeout`; not at all if requests have completed. What the device does for this
    /// client and for others gets its turn in any case.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<()> {
        self.door.batch_end(&mut self.io);
        let has_completed = !self.io.completed.is_empty();
        if has_completed && self.io.reactor.ops_in_flight() == 0 {
            return Ok(());
        }
        self.io.reactor.submit_and_wait(if has_completed { Some(Duration::ZERO) } else { timeout })?;
        while let Some(event) = self.io.reactor.next_event() {
            match event {
                Event::Op(done) => self.door.op_done(done, &mut self.io),
                Event::Wake => self.door.woken(&mut self.io),
                Event::Raw { .. } | Event::Bell { .. } => {}
            }
        }
        self.door.batch_end(&mut self.io);
        Ok(())
    }

    /// Carries out one request and waits for it. Nothing else may be in flight.
    pub fn call(&mut self, kind: RequestKind, offset: u64, len: u64, data: Vec<u8>) -> Result<Vec<u8>> {
        self.submit(Request { tag: 0, kind, offset, len, fua: false }, data);
        loop {
            self.wait(None)?;
            if let Some(done) = self.completed() {
                return done.result.map(|()| done.data).map_err(|errno| {
                    Error::new(ErrorKind::Io, format!("{kind:?} of {len} bytes at {offset}: {errno}"))
                });
            }
        }
    }

    /// Writes `data` at `offset`; acknowledged as the volume's ack level says.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.call(RequestKind::Write, offset, data.len() as u64, data.to_vec()).map(|_| ())
    }

    /// Reads `len` bytes at `offset`.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.call(RequestKind::Read, offset, len as u64, vec![0; len])
    }

    /// Makes every completed write durable.
    pub fn flush(&mut self) -> Result<()> {
        self.call(RequestKind::Flush, 0, 0, Vec::new()).map(|_| ())
    }
}

impl Drop for LocalClient {
    fn drop(&mut self) {
        // The engine waits for what this thread has started: a log write on this ring is everybody's.
        while self.door.is_busy() {
            // Nobody takes them any more, and with some at hand there would be no waiting.
            self.io.completed.clear();
            if let Err(e) = self.wait(None) {
                // As a queue or a session: others wait for what was begun here, for ever.
                tracing::error!("a client's ring has failed: {}; aborting, to be recovered", e.report());
                std::process::abort();
            }
        }
    }
}
