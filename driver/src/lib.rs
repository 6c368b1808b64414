//! The Tidegate engine.

pub mod base;
pub mod flush;
pub mod format;
pub mod io;
pub mod stage;
pub mod volume;
