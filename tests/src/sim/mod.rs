//! The simulator: the whole engine in one thread, on disks and clients that a seed drives, killed and cut from power at
//! any step, and compared with a model that is far simpler than the engine.
//!
//! | module | holds |
//! |---|---|
//! | `rng` | the one source of chance |
//! | `disk` | disks with a volatile cache, faults, and what a power cut makes of them |
//! | `client` | what the clients ask for |
//! | `model` | the checker: what promise P1 and a client's view of a disk demand |
//! | `running` | one server's life: doors, background, operations in flight |
//! | `world` | a seed's story: servers that die in turn, and the checks between them |
//!
//! The same seed gives the same story, step for step; a failure names the seed, the step and how to replay it.

pub mod client;
pub mod disk;
pub mod model;
pub mod rng;
pub mod running;
pub mod world;

pub use world::{CrashAt, CrashKind, Failure, Options, Report, run};
