//! Operations in flight, by key. One slot per operation; a key holds the slot's generation, so that a completion can
//! never be taken for that of a later operation in the same slot.

use super::entry::Way;
use crate::io::op::Op;

/// An operation with what is known of its progress.
#[derive(Debug)]
pub(super) struct InFlight {
    pub op: Op,
    /// Bytes that earlier steps transferred.
    pub transferred: u64,
    /// Steps that ended in EINTR or EAGAIN since the last progress.
    pub retries: u32,
    pub way: Way,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Free { next: Option<u32> },
    Busy(InFlight),
}

const GENERATION_MASK: u32 = (1 << 30) - 1;

#[derive(Debug)]
pub(super) struct Slab {
    slots: Vec<Slot>,
    free: Option<u32>,
    busy: usize,
}

impl Slab {
    pub fn with_capacity(capacity: usize) -> Slab {
        Slab { slots: Vec::with_capacity(capacity), free: None, busy: 0 }
    }

    pub fn len(&self) -> usize {
        self.busy
    }

    pub fn is_empty(&self) -> bool {
        self.busy == 0
    }

    /// Key of the slot that now holds `in_flight`.
    pub fn insert(&mut self, in_flight: InFlight) -> u64 {
        let index = match self.free {
            Some(index) => {
                let slot = &mut self.slots[index as usize];
                let State::Free { next } = slot.state else { unreachable!("the free list holds free slots") };
                self.free = next;
                slot.state = State::Busy(in_flight);
                index
            }
            None => {
                let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 operations in flight");
                self.slots.push(Slot { generation: 0, state: State::Busy(in_flight) });
                index
            }
        };
        self.busy += 1;
        u64::from(self.slots[index as usize].generation) << 32 | u64::from(index)
    }

    pub fn get(&self, key: u64) -> &InFlight {
        match &self.slots[self.index(key)].state {
            State::Busy(in_flight) => in_flight,
            State::Free { .. } => unreachable!("index() checked the generation"),
        }
    }

    pub fn get_mut(&mut self, key: u64) -> &mut InFlight {
        let index = self.index(key);
        match &mut self.slots[index].state {
            State::Busy(in_flight) => in_flight,
            State::Free { .. } => unreachable!("index() checked the generation"),
        }
    }

    pub fn remove(&mut self, key: u64) -> InFlight {
        let index = self.index(key);
        let slot = &mut self.slots[index];
        slot.generation = (slot.generation + 1) & GENERATION_MASK;
        let state = std::mem::replace(&mut slot.state, State::Free { next: self.free });
        self.free = Some(index as u32);
        self.busy -= 1;
        match state {
            State::Busy(in_flight) => in_flight,
            State::Free { .. } => unreachable!("index() checked the generation"),
        }
    }

    /// Gives the memory of everything in flight up for good.
    pub fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.slots));
        self.free = None;
        self.busy = 0;
    }

    /// Panics on a key that is not in flight: only the kernel's echo of our own `user_data` gets here, once each.
    fn index(&self, key: u64) -> usize {
        let index = (key & u64::from(u32::MAX)) as usize;
        let slot = &self.slots[index];
        assert!(
            u64::from(slot.generation) == key >> 32 && matches!(slot.state, State::Busy(_)),
            "completion {key:#x} belongs to no operation in flight"
        );
        index
    }
}
