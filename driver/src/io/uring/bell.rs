//! The bell: a socket that the ring reads, whose bytes mean nothing but "look".
//!
//! It is read by the ring and not by a system call of the thread, so that whoever holds the other end, or the same socket,
//! cannot make the thread wait.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Bytes taken at once.
const BYTES: usize = 64;

/// The reactor's end of a bell.
#[derive(Debug)]
pub(super) struct Bell {
    socket: OwnedFd,
    /// Where the kernel puts the bytes; raw and on the heap, as the kernel writes to it behind the compiler's back.
    buffer: *mut [u8; BYTES],
    armed: bool,
}

impl Bell {
    pub fn new(socket: OwnedFd) -> Bell {
        Bell { socket, buffer: Box::into_raw(Box::new([0; BYTES])), armed: false }
    }

    /// Descriptor, destination and length of the read; counts as armed from here on.
    pub fn read_into(&mut self) -> (RawFd, *mut u8, u32) {
        self.armed = true;
        (self.socket.as_raw_fd(), self.buffer.cast(), BYTES as u32)
    }

    /// The read completed.
    pub fn taken(&mut self) {
        self.armed = false;
    }

    pub fn is_armed(&self) -> bool {
        self.armed
    }

    /// Gives the memory up for good: the kernel may still write to it.
    pub fn leak(&mut self) {
        self.buffer = std::ptr::null_mut();
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        if !self.buffer.is_null() {
            // SAFETY: from `Box::into_raw` in `new`, and no read is armed (the reactor calls `leak` otherwise).
            drop(unsafe { Box::from_raw(self.buffer) });
        }
    }
}
