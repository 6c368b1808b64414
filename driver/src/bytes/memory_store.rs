//! A byte store in memory that knows the order of its writes, for tests: a crash keeps any prefix of them that holds what
//! was persisted.

use std::time::Duration;

use parking_lot::Mutex;

use super::{ByteStore, Failure, Result, Ticket};

/// A byte store in memory.
#[derive(Debug)]
pub struct MemoryStore {
    write_bytes_max: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Content before the first write.
    before: Vec<u8>,
    now: Vec<u8>,
    writes: Vec<(usize, Vec<u8>)>,
    durable: usize,
    /// Writes that still succeed; none after that.
    writes_left: usize,
}

impl MemoryStore {
    /// A store with this content and bound.
    #[must_use]
    pub fn new(content: Vec<u8>, write_bytes_max: u32) -> MemoryStore {
        let state = State {
            now: content.clone(),
            before: content,
            writes: Vec::new(),
            durable: 0,
            writes_left: usize::MAX,
        };
        MemoryStore { write_bytes_max, state: Mutex::new(state) }
    }

    /// Number of writes so far.
    pub fn writes(&self) -> usize {
        self.state.lock().writes.len()
    }

    /// Number of writes that are durable.
    pub fn durable_writes(&self) -> usize {
        self.state.lock().durable
    }

    /// The content now.
    pub fn content(&self) -> Vec<u8> {
        self.state.lock().now.clone()
    }

    /// Loses all writes but the first `keep`, which are durable now.
    pub fn crash(&self, keep: usize) {
        let mut state = self.state.lock();
        assert!((state.durable..=state.writes.len()).contains(&keep), "a crash keeps what is durable");
        state.writes.truncate(keep);
        let mut now = state.before.clone();
        for (at, bytes) in &state.writes {
            now[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        (state.now, state.durable, state.writes_left) = (now, keep, usize::MAX);
    }

    /// Lets `look` see a store that has only the first `keep` writes.
    pub fn crash_once(&self, keep: usize, look: impl FnOnce(&MemoryStore)) {
        let state = self.state.lock();
        let copy = MemoryStore::new(state.before.clone(), self.write_bytes_max);
        *copy.state.lock() =
            State { now: Vec::new(), before: state.before.clone(), writes: state.writes.clone(), ..*state };
        copy.crash(keep);
        drop(state);
        look(&copy);
    }

    /// After `writes` more writes every write fails.
    pub fn fail_after(&self, writes: usize) {
        self.state.lock().writes_left = writes;
    }

    /// Changes bytes behind everybody's back.
    pub fn damage(&self, at: usize, with: &[u8]) {
        let mut state = self.state.lock();
        state.now[at..at + with.len()].copy_from_slice(with);
        state.before = state.now.clone();
        state.writes.iter_mut().for_each(|write| write.1.clear());
    }
}

impl ByteStore for &MemoryStore {
    fn volume_bytes(&self) -> u64 {
        self.state.lock().now.len() as u64
    }

    fn write_bytes_max(&self) -> u32 {
        self.write_bytes_max
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        into.copy_from_slice(&self.state.lock().now[offset as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, parts: &[&[u8]]) -> Result<Ticket> {
        let mut state = self.state.lock();
        if state.writes_left == 0 {
            return Err(Failure::new(libc::ENOTCONN, "the store is gone"));
        }
        let bytes = parts.concat();
        let at = offset as usize;
        assert!(!bytes.is_empty() && bytes.len() <= self.write_bytes_max as usize, "{} bytes", bytes.len());
        state.now[at..at + bytes.len()].copy_from_slice(&bytes);
        state.writes.push((at, bytes));
        state.writes_left -= 1;
        Ok(Ticket::new(1, state.writes.len() as u64))
    }

    fn durable(&self) -> Ticket {
        Ticket::new(1, self.state.lock().durable as u64)
    }

    fn persist(&self, ticket: Ticket, _: Option<Duration>) -> Result<()> {
        let mut state = self.state.lock();
        if state.writes_left == 0 {
            return Err(Failure::new(libc::ENOTCONN, "the store is gone"));
        }
        state.durable = state.durable.max(ticket.sequence() as usize);
        Ok(())
    }
}
