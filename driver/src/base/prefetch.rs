//! Hints to the processor about memory that will be read soon.

#![allow(unsafe_code)]

const LINE_BYTES: usize = 64;

/// Begins to bring the cache lines of `data` near, without waiting for them. Does nothing where it is not known how.
#[inline]
pub fn prefetch<T>(data: &[T]) {
    let start = data.as_ptr().cast::<i8>();
    for at in (0..size_of_val(data)).step_by(LINE_BYTES) {
        fetch(start.wrapping_add(at));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn fetch(line: *const i8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch is a hint. It faults at no address and changes nothing that a program can see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line) }
}

#[cfg(not(target_arch = "x86_64"))]
fn fetch(_: *const i8) {}
