//! Device operations as values.
//!
//! An operation owns its memory from the moment it is submitted until its completion hands it back, so no buffer can
//! be touched or freed while the kernel may still write to it.

use std::fmt;
use std::sync::Arc;

use super::buffer::AlignedBuf;
use crate::base::VolumeId;

/// Which device an operation goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// The stage's log device.
    Stage,
    /// The backing of a volume.
    Backing(VolumeId),
}

/// Ties a completion to what was submitted. Chosen by the submitter, opaque to the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// An errno value: what devices and clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// A device failed.
    pub const EIO: Errno = Errno(libc::EIO);
    /// No room on the device.
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    /// The device does not do that.
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    /// The request makes no sense.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> std::io::Error {
        std::io::Error::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

/// What to do. Transfers are all or nothing to the submitter: an executor continues short transfers itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Fill the memory from the device.
    Read,
    /// Write the memory to the device; durable only after a later `Sync`.
    Write,
    /// Write the memory to the device; durable when completed without error (FUA / `RWF_DSYNC`).
    WriteDurable,
    /// Make every completed write to the target durable.
    Sync,
    /// Tell the device that it may forget the range; what is read there afterwards is up to the device, except that
    /// executors use a zeroing way where the device has one.
    Discard,
    /// Zero the range without transferring zeroes; `EOPNOTSUPP` where the device cannot.
    WriteZeroes,
}

/// A shared memory region that operations may name parts of (the stage's arena). Implemented by types whose memory
/// stays mapped and in place as long as the value lives.
pub trait SharedMemory: Send + Sync + fmt::Debug {
    /// Address of the first byte.
    fn base(&self) -> *mut u8;
    /// Length in bytes.
    fn len_bytes(&self) -> usize;
}

/// The memory of an operation. Its length is the length of the transfer.
#[derive(Debug)]
pub enum Memory {
    /// No data (sync, discard, write-zeroes).
    None,
    /// A buffer moved into the operation.
    Owned(AlignedBuf),
    /// Part of a shared memory region. The submitter guarantees that nobody writes to the part during a write
    /// operation and nobody reads or writes it during a read operation.
    Shared {
        /// The region, kept alive by the operation.
        region: Arc<dyn SharedMemory>,
        /// First byte within the region.
        offset: usize,
        /// Length in bytes.
        len: usize,
    },
    /// A client's memory, which is in the buffer table of the ring that the operation goes to. Only for reads.
    Client {
        /// Place in the table.
        index: u16,
        /// Length in bytes.
        len: usize,
    },
}

/// One device operation.
#[derive(Debug)]
pub struct Op {
    /// Handed back with the completion.
    pub token: Token,
    /// The device.
    pub target: Target,
    /// What to do.
    pub kind: OpKind,
    /// First byte on the device.
    pub offset: u64,
    /// Length in bytes; equals the memory's length for transfers, 0 for `Sync`.
    pub len: u64,
    /// Source or destination.
    pub memory: Memory,
}

/// Completion of an operation.
#[derive(Debug)]
pub struct Done {
    /// The operation's token.
    pub token: Token,
    /// `Ok` only if the whole operation was carried out.
    pub result: Result<(), Errno>,
    /// The operation's memory, handed back.
    pub memory: Memory,
}
