//! The stage: the log in memory and on its device, and what is needed to read from it.

pub mod index;

pub use index::{Extent, Index, Lookup, Piece, Source};
