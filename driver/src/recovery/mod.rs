//! Opening a stage after whatever happened: facts first (`superblocks`, `scan`), then judgement, then the arena, then the
//! engine's starting point (`open`). Nothing is written before everything was read and found in order.
//!
//! | what is found at the place of the next group | and behind it | judgement |
//! |---|---|---|
//! | a valid group | – | part of the log |
//! | no valid group | nothing that proves it | end of the log; groups that were in flight are given up |
//! | no valid group | a group that proves it | damage: the invalid one was durable once |
//! | – (a whole region is missing) | a newer region | damage, unless the region was flushed |
//!
//! | end of the log | superblock, checkpoint, labels | judgement |
//! |---|---|---|
//! | below the checkpoint | – | damage |
//! | below the group at which the superblock says that the incarnation began | – | damage |
//! | below the LSN of an orderly close | closed | damage |
//! | below a backing's label | – | the stage is an old copy |
//! | – | a label below the checkpoint's entry | the backing is an old copy |
//!
//! Known limit: of the last group since the stage was opened, and of the one that was in flight with it, damage cannot be told
//! from tearing by the log alone.

pub mod check;
pub mod inspect;
pub mod open;
mod patches;
#[cfg(any(test, feature = "samples"))]
pub mod sample_stage;
pub mod scan;
mod staged;
pub mod superblocks;

#[cfg(test)]
mod tests;

pub use check::{CheckReport, Problem, check};
pub use inspect::{Structure, inspect, inspect_with};
pub use open::{ArenaSource, Environment, Opened, OwnArenas, open};
