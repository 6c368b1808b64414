//! The C ABI of the byte door: `libtidegate.so`, `libtidegate.a`, `tidegate.h`.
//!
//! | module | holds |
//! |---|---|
//! | `abi` | constants and structures, as C sees them |
//! | `device`, `transfer`, `log` | the exported functions: check the pointers, then call what is below |
//! | `session`, `journal` | what the handles stand for |
//! | `reaper` | the thread of a session with a callback |
//! | `handle` | the table of handles |
//! | `memory` | raw pointers of the caller |
//! | `error` | errno values and the message of the thread |
//!
//! `include/tidegate.h` is made from the comments and signatures here by `tests/header.rs`.
#![allow(non_camel_case_types, reason = "names of C")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the comments are C's; every pointer must be NULL or be what it says"
)]

pub mod abi;
pub mod device;
mod error;
mod handle;
mod journal;
pub mod log;
mod memory;
mod reaper;
mod session;
pub mod transfer;
