//! The contract between the engine and a door (a ublk queue thread, a byte-API ring, the simulator).
//!
//! A door thread owns one [`Door`] and one [`DoorIo`]. It feeds requests, completions of device operations and
//! wake-ups to the `Door`; the `Door` answers through the `DoorIo`. All calls of one door come from one thread; none of
//! them blocks.

use crate::base::Lsn;
use crate::io::{Done, Errno, Memory, Op};

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Read bytes.
    Read,
    /// Write bytes.
    Write,
    /// Zero bytes without transferring them.
    WriteZeroes,
    /// The client no longer needs the bytes.
    Discard,
    /// Make every completed write durable.
    Flush,
}

/// One client request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's name for it: unique among the requests in flight on this door, below the door's depth.
    pub tag: u32,
    /// What to do.
    pub kind: RequestKind,
    /// First byte of the volume.
    pub offset: u64,
    /// Length in bytes (0 for `Flush`).
    pub len: u64,
    /// Durable before completion, whatever the ack level.
    pub fua: bool,
}

/// What a door offers to the engine.
pub trait DoorIo {
    /// Starts a device operation. Its completion comes back through [`Door::op_done`], on this thread, later.
    fn submit(&mut self, op: Op);
    /// Copies `into.len()` bytes of the payload of write request `tag`, from byte `offset` of the request, into `into`.
    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> Result<(), Errno>;
    /// Copies `from` to byte `offset` of the client's memory of read request `tag`.
    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> Result<(), Errno>;
    /// The client's memory of read request `tag`, for an operation that fills it without a copy of ours; `None` where there
    /// is no such way.
    fn client_memory(&self, _tag: u32) -> Option<Memory> {
        None
    }
    /// Request `tag` is a change and has its place in the order of the log; its payload is fetched next. For doors that
    /// tell their clients the order, and for checkers.
    fn placed(&mut self, _tag: u32, _lsn: Lsn) {}
    /// Completes request `tag`. The tag may be used again at once.
    fn complete(&mut self, tag: u32, result: Result<(), Errno>);
}

/// The engine's side of a door.
pub trait Door<IO: DoorIo> {
    /// Takes a request. It is completed through `io.complete`, perhaps before this returns. A change may get its place, and
    /// its payload may be fetched, as late as at the end of the batch.
    fn request(&mut self, request: Request, io: &mut IO);
    /// Takes the completion of an operation started with `io.submit`.
    fn op_done(&mut self, done: Done, io: &mut IO);
    /// Handles what other threads left for this door; call after the door's [`Wake`] was triggered.
    fn woken(&mut self, io: &mut IO);
    /// The requests at hand have all been fed: whatever was gathered for one group can go. Call once per batch of
    /// events, before waiting.
    fn batch_end(&mut self, io: &mut IO);
    /// Nothing is at hand any more, and the batch would end: whether it is better to look for more requests first, without
    /// sleeping, and to ask again, because others that belong into the same group are about to come. It says so for a small
    /// part of the time that a write of the log takes at most.
    fn waits_for_more(&mut self, _io: &mut IO) -> bool {
        false
    }
    /// No more requests will come: the door takes on nothing more for others (a group of the log that is due), so that it
    /// has nothing in flight as soon as what it has begun is done.
    fn retire(&mut self) {}
}

/// Wakes the thread of a door (an eventfd in the ring, a flag in the simulator). May be called from any thread, any
/// number of times; wake-ups may be merged.
pub trait Wake: Send + Sync {
    /// Triggers [`Door::woken`] soon.
    fn wake(&self);
}
