//! What is staged, as recovery finds it record by record: gathered, then put into the indexes in bulk.

use std::collections::BTreeMap;

use super::scan::Found;
use crate::base::VolumeId;
use crate::stage::core::{payload_offset, source_of};
use crate::stage::index::{Extent, Index};

/// Extents gathered before they go into the indexes: 20 MiB, and for a moment up to five times as much while they do.
const GATHERED_MAX: usize = 512 << 10;

/// Indexes in the making, one a volume.
#[derive(Debug)]
pub(super) struct Staged {
    indexes: BTreeMap<VolumeId, Index>,
    gathered: BTreeMap<VolumeId, Vec<Extent>>,
    count: usize,
}

impl Staged {
    /// Nothing staged of these volumes.
    pub fn new(volumes: impl Iterator<Item = VolumeId>) -> Staged {
        let indexes = volumes.map(|volume| (volume, Index::new())).collect();
        Staged { indexes, gathered: BTreeMap::new(), count: 0 }
    }

    /// Whether `volume` is one of them. Records of one that was deleted since have no index and concern nobody.
    pub fn knows(&self, volume: VolumeId) -> bool {
        self.indexes.contains_key(&volume)
    }

    /// Takes a record.
    pub fn add(&mut self, found: &Found) {
        let source = source_of(found.kind, found.region, payload_offset(found.record_offset));
        if let Some(source) = source.filter(|_| self.knows(found.volume)) {
            let extent = Extent { range: found.range, lsn: found.lsn, source };
            self.gathered.entry(found.volume).or_default().push(extent);
            self.count += 1;
            if self.count >= GATHERED_MAX {
                self.put_in();
            }
        }
    }

    fn put_in(&mut self) {
        for (volume, extents) in std::mem::take(&mut self.gathered) {
            self.indexes.get_mut(&volume).expect("known when it was gathered").insert_all(extents);
        }
        self.count = 0;
    }

    /// The indexes with every record that was taken.
    pub fn finish(mut self) -> BTreeMap<VolumeId, Index> {
        self.put_in();
        self.indexes
    }
}
