//! The Tidegate engine.

pub mod base;
pub mod format;
pub mod io;
pub mod volume;
