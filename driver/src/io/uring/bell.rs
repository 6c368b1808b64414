//! The bell of a client in another process: an eventfd that it writes to, and the socket whose end says that it is gone.
//!
//! Both are only polled. Reading the socket would make this thread put away whatever the client had sent with it, and a
//! descriptor sent that way can take as long to close as its owner likes; reading the eventfd could block once the client
//! has changed its flags. An eventfd wakes its pollers with every write, read or not.

use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, squeue, types};

/// What is polled.
#[derive(Debug)]
pub(super) struct Bell {
    bell: OwnedFd,
    line: OwnedFd,
    /// Polls that the kernel has.
    pub armed: u32,
}

impl Bell {
    pub fn new(bell: OwnedFd, line: OwnedFd) -> Bell {
        Bell { bell, line, armed: 0 }
    }

    /// Polls the eventfd until told otherwise.
    pub fn poll_bell(&mut self) -> squeue::Entry {
        self.armed += 1;
        let fd = types::Fd(self.bell.as_raw_fd());
        opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build()
    }

    /// Waits for the end of the socket.
    pub fn poll_line(&mut self) -> squeue::Entry {
        self.armed += 1;
        let fd = types::Fd(self.line.as_raw_fd());
        opcode::PollAdd::new(fd, (libc::POLLRDHUP | libc::POLLHUP) as u32).build()
    }
}
