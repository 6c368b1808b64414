//! Units, limits, errors, checksum: what every other module may use and what uses nothing.

pub mod abort;
pub mod checksum;
pub mod error;
pub mod limits;
pub mod mutation;
pub mod patience;
pub mod prefetch;
pub(crate) mod schedule;
pub mod units;

pub use error::{Error, ErrorKind, Result};
pub use units::{ByteRange, Lsn, RegionSeq, VolumeId};
