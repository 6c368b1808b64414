//! The Tidegate engine.

pub mod base;
pub mod io;
pub mod volume;
