//! Effects: the vocabulary of device operations, and the few modules that carry them out.
//!
//! The engine decides, this module does. Decisions produce [`Op`]s, whoever runs the engine (a ublk queue thread,
//! the background thread, the simulator) carries them out and hands back [`Done`]s.

pub mod buffer;
pub mod disk;
pub mod file;
#[cfg(any(test, feature = "samples"))]
pub mod memory_disk;
pub mod op;
pub mod peer;
pub mod probe;
pub mod shared_map;
pub mod uring;

pub use buffer::AlignedBuf;
pub use disk::Disk;
pub use file::FileDisk;
pub use op::{Done, Errno, Memory, Op, OpKind, Target, Token};
pub use shared_map::SharedMap;
