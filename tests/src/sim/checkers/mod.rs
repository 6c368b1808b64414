//! The checkers, one promise a file, each far simpler than what it checks. They share the list of changes
//! ([`super::model`]).
//!
//! | module | holds |
//! |---|---|
//! | `prefix` | P1: what comes back is a prefix, and all that was promised is in it; order between volumes follows |
//! | `reads` | read your writes: every byte read is one that the log held at some place the reader may see |
//! | `answers` | every request is answered once, with an answer it may get; what the answer promises |
//! | `devices` | P3, P7: damaged, old and wrong devices are refused, with nothing written, or harmless |
//! | `bounds` | P6: memory, space and operations in flight are bounded; cursors are in order |
//! | `status` | P7: what a server says of itself is what its disks did |
//! | `sessions` | B1–B5, B7, B8: what the sessions of the byte door promise |
//! | `liveness` | something can always happen while a request waits; nothing spins |

pub mod answers;
pub mod bounds;
pub mod devices;
pub mod liveness;
pub mod prefix;
pub mod reads;
pub mod sessions;
pub mod status;
