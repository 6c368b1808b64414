//! Volumes and the doors to them.

pub mod door;
pub mod request;
pub mod shared;
pub mod status;

pub use request::{Door, DoorIo, Request, RequestKind, Wake};
