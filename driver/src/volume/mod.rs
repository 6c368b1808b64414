//! Volumes and the doors to them.

pub mod request;
pub mod status;

pub use request::{Door, DoorIo, Request, RequestKind, Wake};
