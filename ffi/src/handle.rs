//! Handles: numbers in the shape of pointers, which nobody follows. The upper byte is the kind, then a number that is given out
//! once, then the slot. So a handle that is closed, of another kind or made up is told apart and refused, and one that another
//! thread closes in the middle of a call keeps what it stands for until the call ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{self, Arc, MutexGuard, OnceLock, PoisonError};

use parking_lot::{Mutex, RwLock};
use tidegate_driver::bytes::{Failure, Result};

const CHUNKS: usize = 256;
const CHUNK_SLOTS: usize = 256;
const SLOT_BITS: u32 = 16;
const KIND_BITS: u32 = 56;

/// The last number that was given out.
static MADE: AtomicU64 = AtomicU64::new(0);
/// Numbers up to this one were given out by a parent process.
static INHERITED: AtomicU64 = AtomicU64::new(0);

/// Held while handles are given out and taken back, and across every fork: so no child finds a table in the middle of that. Not
/// the other kind of mutex, which may hand itself to a thread that waits for it and that the child does not have.
static CHANGES: sync::Mutex<()> = sync::Mutex::new(());

/// No handle is given out or taken back as long as this is held.
pub fn changes() -> MutexGuard<'static, ()> {
    CHANGES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This process is the child of a fork: no handle is its own.
pub fn forked() {
    INHERITED.store(MADE.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// What all handles of a kind stand for.
pub struct Table<T> {
    /// The upper byte. As an address it is one that no process has.
    kind: u8,
    name: &'static str,
    chunks: [OnceLock<Box<[Slot<T>]>>; CHUNKS],
    free: Mutex<Free>,
}

/// The handle that the slot has now, and what it stands for.
type Slot<T> = RwLock<Option<(usize, Arc<T>)>>;

struct Free {
    slots: Vec<usize>,
    /// Slots from this one on were never used.
    unused: usize,
}

impl<T> Table<T> {
    /// An empty table.
    pub const fn new(kind: u8, name: &'static str) -> Table<T> {
        Table {
            kind,
            name,
            chunks: [const { OnceLock::new() }; CHUNKS],
            free: Mutex::new(Free { slots: Vec::new(), unused: 0 }),
        }
    }

    /// Gives `it` a handle.
    pub fn insert(&self, it: Arc<T>) -> Result<usize> {
        let _changes = changes();
        let at = {
            let mut free = self.free.lock();
            match free.slots.pop() {
                Some(at) => at,
                None if free.unused < CHUNKS * CHUNK_SLOTS => {
                    free.unused += 1;
                    free.unused - 1
                }
                None => return Err(Failure::new(libc::EMFILE, format!("too many open {}s", self.name))),
            }
        };
        let made = MADE.fetch_add(1, Ordering::Relaxed) + 1;
        let handle = (u64::from(self.kind) << KIND_BITS | made << SLOT_BITS | at as u64) as usize;
        let chunk = self.chunks[at / CHUNK_SLOTS]
            .get_or_init(|| (0..CHUNK_SLOTS).map(|_| RwLock::new(None)).collect());
        *chunk[at % CHUNK_SLOTS].write() = Some((handle, it));
        Ok(handle)
    }

    /// What `handle` stands for.
    pub fn find(&self, handle: usize) -> Result<Arc<T>> {
        self.look(handle, Arc::clone)
    }

    /// A look at what `handle` stands for. It is short: closing the handle waits for it.
    pub fn look<R>(&self, handle: usize, look: impl FnOnce(&Arc<T>) -> R) -> Result<R> {
        let slot = self.slot(handle)?.read();
        match &*slot {
            Some((held, it)) if *held == handle => Ok(look(it)),
            _ => Err(self.closed()),
        }
    }

    /// Makes `handle` invalid.
    pub fn remove(&self, handle: usize) -> Result<Arc<T>> {
        let _changes = changes();
        let it = {
            let mut slot = self.slot(handle)?.write();
            match slot.take() {
                Some((held, it)) if held == handle => it,
                other => {
                    *slot = other;
                    return Err(self.closed());
                }
            }
        };
        self.free.lock().slots.push(handle & ((1 << SLOT_BITS) - 1));
        Ok(it)
    }

    /// The slot of a handle that this process may have been given.
    fn slot(&self, handle: usize) -> Result<&Slot<T>> {
        let number = handle as u64;
        let made = (number & ((1 << KIND_BITS) - 1)) >> SLOT_BITS;
        let at = handle & ((1 << SLOT_BITS) - 1);
        if handle == 0 {
            return Err(Failure::new(libc::EFAULT, format!("the {} is NULL", self.name)));
        }
        let ours = number >> KIND_BITS == u64::from(self.kind) && made != 0;
        let chunk = self.chunks[at / CHUNK_SLOTS].get().filter(|_| ours);
        let Some(chunk) = chunk.filter(|_| made <= MADE.load(Ordering::Relaxed)) else {
            let why = format!("{handle:#x} is not a {} that this process was given", self.name);
            return Err(Failure::new(libc::EBADF, why));
        };
        if made <= INHERITED.load(Ordering::Relaxed) {
            let why = format!("the {} belongs to the parent process: a child opens its own", self.name);
            return Err(Failure::new(libc::EBADF, why));
        }
        Ok(&chunk[at % CHUNK_SLOTS])
    }

    fn closed(&self) -> Failure {
        Failure::new(libc::EBADF, format!("the {} was closed", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_told_apart() {
        let (apples, pears) = (Table::new(0x7b, "apple"), Table::new(0x7c, "pear"));
        let first = apples.insert(Arc::new(1)).unwrap();
        let pear = pears.insert(Arc::new(2)).unwrap();
        let errno = |handle| apples.find(handle).map(|it| *it).map_err(|failure| failure.errno.0);
        assert_eq!((errno(first), errno(0)), (Ok(1), Err(libc::EFAULT)));
        for foreign in
            [pear, first ^ 1 << SLOT_BITS << 8, first ^ 1, first ^ 256, 1, usize::MAX, 0x7f12_3456_7890]
        {
            assert_eq!(errno(foreign), Err(libc::EBADF), "{foreign:#x}");
            assert!(apples.remove(foreign).is_err());
        }
        assert_eq!(*apples.remove(first).unwrap(), 1);
        let second = apples.insert(Arc::new(3)).unwrap();
        assert_eq!(second & 0xffff, first & 0xffff, "the slot is used again");
        assert_eq!((errno(first), errno(second)), (Err(libc::EBADF), Ok(3)));
        assert!(apples.find(first).unwrap_err().what.contains("closed"));
    }

    #[test]
    fn there_is_an_end_to_them() {
        let table = Table::new(0x7a, "plum");
        let plum = Arc::new(());
        let all: Vec<usize> =
            (0..CHUNKS * CHUNK_SLOTS).map(|_| table.insert(Arc::clone(&plum)).unwrap()).collect();
        assert_eq!(table.insert(Arc::clone(&plum)).unwrap_err().errno.0, libc::EMFILE);
        table.remove(all[77]).unwrap();
        assert!(table.insert(plum).is_ok());
    }
}
