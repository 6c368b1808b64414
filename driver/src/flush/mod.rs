//! Flushing: the cursor that applies the log to the backings.

pub mod epoch;
pub mod plan;
mod pool;
pub mod target;

pub use plan::{Patch, Plan, PlanBytes, PlanParams, PlanPiece, Run, RunKind};
pub use target::FlushTarget;
