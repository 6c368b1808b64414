//! The Tidegate engine.

pub mod base;
pub mod bytes;
pub mod flush;
pub mod format;
pub mod io;
pub mod recovery;
pub mod stage;
pub mod volume;
