//! ublk front end: presents a Tidegate volume as `/dev/ublkbN`.
//!
//! | module | holds |
//! |---|---|
//! | [`sys`] | the kernel's ABI: numbers, structures, positions |
//! | [`ctrl`] | control commands on `/dev/ublk-control` |
//! | `params` | from a [`DeviceConfig`] to the kernel's flags and parameters |
//! | `tag` | state of one request slot |
//! | [`queue`] | a queue's thread: requests in, completions out |
//! | [`device`] | start, recover, resize, stop a device |
//! | [`info`] | what the kernel knows about a device, without serving it |
//! | [`process`] | what a process does before it may serve a device |
//!
//! # Life of a device
//!
//! ```text
//! ADD ─> SET_PARAMS ─> queue threads FETCH every tag ─> START ─> live ─> STOP ─> threads end ─> DEL
//!                                                        ^  │
//!          START_USER_RECOVERY ─> FETCH ─> END_ ─────────┘  └─> server dies: requests wait, device quiesced
//! ```
//!
//! A device survives its server: requests that were with a dead server are sent again to the one that recovers the
//! device, later ones wait. Clients see a pause. So the same write may arrive twice; doors must be idempotent.

pub mod ctrl;
pub mod device;
pub mod info;
mod memory;
mod params;
pub mod process;
pub mod queue;
pub mod sys;
mod tag;

pub use device::{Device, Start, StopMode};
pub use info::{DeviceState, Status, delete, list, size_bytes, state};
pub use params::DeviceConfig;
pub use queue::{DoorFactory, QueueIo};
