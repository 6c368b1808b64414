//! What the two sides of a session share, as the protocol between them sees it. Programs have [`SharedMap`]; tests have the
//! memory of a checker, which tries what schedules and orders of memory there are on the code that runs.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::io::SharedMap;

/// A word that both sides use at any time.
pub trait Word<T> {
    /// As of the standard library.
    fn load(&self, order: Ordering) -> T;
    /// As of the standard library.
    fn store(&self, value: T, order: Ordering);
    /// As of the standard library.
    fn swap(&self, value: T, order: Ordering) -> T;
}

macro_rules! word {
    ($atomic:ty, $value:ty) => {
        impl Word<$value> for $atomic {
            #[inline]
            fn load(&self, order: Ordering) -> $value {
                <$atomic>::load(self, order)
            }

            #[inline]
            fn store(&self, value: $value, order: Ordering) {
                <$atomic>::store(self, value, order);
            }

            #[inline]
            fn swap(&self, value: $value, order: Ordering) -> $value {
                <$atomic>::swap(self, value, order)
            }
        }
    };
}

word!(AtomicU32, u32);
word!(AtomicU64, u64);

/// The memory of a session; see [`SharedMap`] for what its parts do.
pub trait Shared {
    /// Heads, tails, and how far things are.
    type Word: Word<u64>;
    /// Who sleeps.
    type Flag: Word<u32>;

    /// Size in bytes.
    fn len_bytes(&self) -> usize;
    /// The word at byte `at`.
    fn word(&self, at: usize) -> &Self::Word;
    /// The flag at byte `at`.
    fn flag(&self, at: usize) -> &Self::Flag;
    /// Everything before it comes before everything behind every later fence, of either side.
    fn fence();
    /// The structure at byte `at`.
    fn image<T: FromBytes + IntoBytes>(&self, at: usize) -> T;
    /// Puts a structure at byte `at`.
    fn put_image<T: IntoBytes + Immutable>(&self, at: usize, image: &T);
    /// Copies out from byte `at`.
    fn copy_out(&self, at: usize, into: &mut [u8]);
    /// Copies in to byte `at`.
    fn copy_in(&self, at: usize, from: &[u8]);
    /// Nobody needs it any more.
    fn give_back(&self);
}

impl Shared for SharedMap {
    type Word = AtomicU64;
    type Flag = AtomicU32;

    #[inline]
    fn len_bytes(&self) -> usize {
        SharedMap::len_bytes(self)
    }

    #[inline]
    fn word(&self, at: usize) -> &AtomicU64 {
        SharedMap::word(self, at)
    }

    #[inline]
    fn flag(&self, at: usize) -> &AtomicU32 {
        SharedMap::flag(self, at)
    }

    #[inline]
    fn fence() {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn image<T: FromBytes + IntoBytes>(&self, at: usize) -> T {
        SharedMap::image(self, at)
    }

    #[inline]
    fn put_image<T: IntoBytes + Immutable>(&self, at: usize, image: &T) {
        SharedMap::put_image(self, at, image);
    }

    #[inline]
    fn copy_out(&self, at: usize, into: &mut [u8]) {
        SharedMap::copy_out(self, at, into);
    }

    #[inline]
    fn copy_in(&self, at: usize, from: &[u8]) {
        SharedMap::copy_in(self, at, from);
    }

    fn give_back(&self) {
        SharedMap::give_back(self);
    }
}
