//! Volumes and the doors to them.

pub mod admin;
pub mod background;
pub mod door;
pub mod engine;
mod gather;
pub mod local;
pub mod request;
pub mod shared;
pub mod status;
#[cfg(test)]
mod still;

pub use door::VolumeDoor;
pub use engine::{Engine, EngineConfig};
pub use local::LocalClient;
pub use request::{Door, DoorIo, Request, RequestKind, Wake};
