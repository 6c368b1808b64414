//! The simulator: the whole engine in one thread, on disks and clients that a seed drives, killed and cut from power at
//! any step, and compared with a model that is far simpler than the engine.
//!
//! | module | holds |
//! |---|---|
//! | `rng` | the one source of chance |
//! | `disk` | disks with a volatile cache, faults, and what a power cut makes of them |
//! | `client` | what the clients ask for |
//! | `byte_client`, `sessions`, `session_io` | clients of the byte door, the sessions that serve them, and their threads |
//! | `door_io`, `flight`, `memory`, `site` | a client's side of a door, operations in flight, their memory, disks and time |
//! | `model` | the list of accepted changes |
//! | `checkers` | what that list and the promises demand, one promise a file |
//! | `aim` | crashes led up to, for what chance seldom brings together |
//! | `ending` | how a server ends |
//! | `running` | one server's life: doors, background, operations in flight |
//! | `changes` | volumes that grow, doors that close and open |
//! | `probe` | damaged, old and wrong devices between two servers, tried on forks of the story |
//! | `setup` | a story's disks, stage and volumes |
//! | `script` | chosen requests, for stories that try everything within bounds |
//! | `runner` | many stories on several threads |
//! | `world` | a seed's story: servers that die in turn, and the checks between them |
//! | `report` | what a story tells: numbers, or what broke |
//!
//! The same seed gives the same story, step for step; a failure names the seed, the step and how to replay it.

pub mod aim;
pub mod byte_client;
pub mod changes;
pub mod checkers;
pub mod client;
pub mod disk;
pub mod door_io;
pub mod ending;
pub mod flight;
pub mod memory;
pub mod model;
pub mod probe;
pub mod report;
pub mod rng;
pub mod runner;
pub mod running;
pub mod script;
pub mod session_io;
pub mod sessions;
pub mod setup;
pub mod site;
pub mod world;

pub use report::{CrashAt, CrashKind, Failure, Options, Report, Sometimes};
pub use world::run;
