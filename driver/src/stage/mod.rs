//! The stage: arena, claims, publishing, commit, index, reclaim.

pub mod arena;
pub mod commit;
pub mod core;
mod early;
pub mod index;
mod outcome;
mod pacing;
pub mod ring;
pub mod serve;
pub mod volume_index;
pub mod walk;
pub mod window;

#[cfg(test)]
mod tests;

pub use index::{Extent, Index, Lookup, Piece, Source};
