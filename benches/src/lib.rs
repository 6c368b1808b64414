//! What the programs that measure Tidegate have in common.

pub mod effort;
pub mod note;
pub mod page;
pub mod place;
pub mod plot;
pub mod row;

pub use effort::Effort;
pub use place::{Place, Served, VOLUME};
