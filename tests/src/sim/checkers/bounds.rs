//! P6: what a server holds is bounded, and its cursors are in order and never go back.

use tidegate_driver::base::Lsn;
use tidegate_driver::base::limits::{GROUPS_IN_FLIGHT_MAX, INDEX_EXTENTS_MAX};
use tidegate_driver::stage::core::Core;

/// Most operations of the background in flight: an epoch's, a table, a region, groups.
const BACKGROUND_OPS_MAX: usize = 32 + 2 + GROUPS_IN_FLIGHT_MAX;

/// Watches one server.
#[derive(Debug, Default)]
pub struct Bounds {
    checkpoint: Lsn,
    durable: Lsn,
    published: Lsn,
}

impl Bounds {
    /// Looks at it.
    pub fn check(&mut self, core: &Core, background_ops: usize, log_writes: usize) -> Result<(), String> {
        let cursors = [core.checkpoint(), core.durable(), core.published(), core.claimed()];
        if !cursors.is_sorted() {
            return Err(format!("C2: checkpoint, durable, published, claimed are {cursors:?}"));
        }
        let before = [self.checkpoint, self.durable, self.published];
        if before.iter().zip(&cursors).any(|(before, now)| now < before) {
            return Err(format!("a cursor went back: {before:?}, now {cursors:?}"));
        }
        [self.checkpoint, self.durable, self.published] = [cursors[0], cursors[1], cursors[2]];
        let geometry = core.ring().geometry();
        let regions = core.ring().regions().len();
        if regions > geometry.region_count as usize || core.used_bytes() > geometry.regions_bytes() {
            return Err(format!("P6: {regions} regions are in use, the stage has {}", geometry.region_count));
        }
        if core.extent_count() > INDEX_EXTENTS_MAX {
            return Err(format!("P6: the index has {} extents", core.extent_count()));
        }
        // Between two events no door has anything indexed that it has not handed to the core.
        let volumes = core.volumes();
        let extents =
            volumes.iter().filter_map(|v| core.index(*v)).map(|index| index.extent_count()).sum::<usize>();
        if core.extent_count() != extents {
            return Err(format!(
                "X4: the indexes have {extents} extents, the core was told of {}",
                core.extent_count()
            ));
        }
        if background_ops > BACKGROUND_OPS_MAX || log_writes > GROUPS_IN_FLIGHT_MAX {
            return Err(format!(
                "P6: {background_ops} operations of the background, {log_writes} log writes"
            ));
        }
        Ok(())
    }
}
