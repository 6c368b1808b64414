//! What is staged, as recovery finds it record by record: gathered, then put into the indexes in bulk.
//!
//! Where it is much a thread of its own does that, piece by piece while recovery reads on.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::scan::Found;
use crate::base::VolumeId;
use crate::base::mutation::carried;
use crate::stage::core::{payload_offset, source_of};
use crate::stage::index::{Bulk, Extent, Sorted};
use crate::stage::volume_index::VolumeIndex;

/// Extents that are gathered, of all volumes, before they are handed on: 1.3 MiB.
const PIECE: usize = 32 << 10;
/// Extents that the indexes in the making take together, of whatever volumes, before they forget those that are covered by
/// others: 20 MiB beside what stays visible, and a few times as much for a moment while they do.
const ADDED_MAX: usize = 512 << 10;

/// Pieces that wait for the thread, so that recovery does not get ahead of it for long.
const PIECES_MAX: usize = 8;

type Piece = (VolumeId, Vec<Extent>);
type AllSorted = BTreeMap<VolumeId, Sorted>;

/// Indexes in the making, one a volume.
#[derive(Debug)]
pub(super) struct Staged {
    volumes: BTreeMap<VolumeId, Gathered>,
    piece: usize,
    /// Extents gathered of all volumes.
    gathered: usize,
    /// The thread, once there is enough to do; inside, `None` where none could be had.
    thread: Option<Option<BuilderThread>>,
    /// What is done without it.
    builder: Builder,
}

type BuilderThread = (SyncSender<Piece>, JoinHandle<AllSorted>);

#[derive(Debug, Default)]
struct Gathered {
    volume_bytes: u64,
    extents: Vec<Extent>,
    is_staged: bool,
}

impl Staged {
    /// Nothing staged of these volumes, which have so many bytes.
    pub fn new(volumes: impl Iterator<Item = (VolumeId, u64)>) -> Staged {
        Staged::in_pieces(volumes, PIECE)
    }

    fn in_pieces(volumes: impl Iterator<Item = (VolumeId, u64)>, piece: usize) -> Staged {
        let nothing = |volume_bytes| Gathered { volume_bytes, ..Gathered::default() };
        let volumes = volumes.map(|(volume, volume_bytes)| (volume, nothing(volume_bytes))).collect();
        Staged { volumes, piece, gathered: 0, thread: None, builder: Builder::default() }
    }

    /// Whether `volume` is one of them. Records of one that was deleted since have no index and concern nobody.
    pub fn knows(&self, volume: VolumeId) -> bool {
        self.volumes.contains_key(&volume)
    }

    /// Whether a byte of `volume` is staged.
    pub fn has(&self, volume: VolumeId) -> bool {
        self.volumes.get(&volume).is_some_and(|gathered| gathered.is_staged)
    }

    /// Takes a record.
    pub fn add(&mut self, found: &Found) {
        let Some(source) = source_of(found.kind, found.region, payload_offset(found.record_offset)) else {
            return;
        };
        let Some(gathered) = self.volumes.get_mut(&found.volume).filter(|_| !found.range.is_empty()) else {
            return;
        };
        gathered.is_staged = true;
        gathered.extents.push(Extent { range: found.range, lsn: found.lsn, source });
        self.gathered += 1;
        if self.gathered >= self.piece {
            self.gathered = 0;
            for (volume, gathered) in &mut self.volumes {
                let extents = std::mem::take(&mut gathered.extents);
                if extents.is_empty() {
                    continue;
                }
                match self.thread.get_or_insert_with(Builder::start) {
                    Some((builder, _)) => builder.send((*volume, extents)).expect("it waits for more"),
                    None => self.builder.add((*volume, extents)),
                }
            }
        }
    }

    /// Goes on with the indexes of every record that was taken, which are there when they are asked for.
    pub fn finish(mut self) -> Building {
        let volumes =
            self.volumes.iter().map(|(volume, gathered)| (*volume, gathered.volume_bytes)).collect();
        let pieces = self.volumes.into_iter().map(|(volume, gathered)| (volume, gathered.extents));
        let Some((sender, thread)) = self.thread.flatten() else {
            pieces.for_each(|piece| self.builder.add(piece));
            return Building { volumes, sorted: self.builder.finish(), thread: None };
        };
        pieces.for_each(|piece| sender.send(piece).expect("it waits for more"));
        drop(sender);
        Building { volumes, sorted: AllSorted::new(), thread: Some(thread) }
    }
}

/// Indexes that are being finished.
#[derive(Debug)]
pub(super) struct Building {
    volumes: Vec<(VolumeId, u64)>,
    sorted: AllSorted,
    thread: Option<JoinHandle<AllSorted>>,
}

impl Building {
    /// The indexes, one a volume.
    pub fn wait(self) -> BTreeMap<VolumeId, VolumeIndex> {
        let mut sorted = match self.thread {
            Some(thread) => thread.join().expect("the builder's thread"),
            None => self.sorted,
        };
        let mut index = |(volume, volume_bytes)| {
            let staged = sorted.remove(&volume).unwrap_or_default();
            (volume, VolumeIndex::of(volume, volume_bytes, staged))
        };
        self.volumes.into_iter().map(&mut index).collect()
    }
}

#[derive(Debug, Default)]
struct Builder {
    volumes: BTreeMap<VolumeId, Bulk>,
    /// Extents added to any of them since it forgot.
    added: usize,
}

impl Builder {
    fn start() -> Option<BuilderThread> {
        let (sender, pieces) = sync_channel(PIECES_MAX);
        let thread = std::thread::Builder::new().name("tidegate-index".into());
        thread.spawn(carried(move || Builder::run(&pieces))).ok().map(|thread| (sender, thread))
    }

    fn run(pieces: &Receiver<Piece>) -> AllSorted {
        let mut builder = Builder::default();
        pieces.iter().for_each(|piece| builder.add(piece));
        builder.finish()
    }

    fn add(&mut self, (volume, extents): Piece) {
        self.added += extents.len();
        self.volumes.entry(volume).or_default().add(extents);
        if self.added > ADDED_MAX {
            self.volumes.values_mut().for_each(Bulk::compact);
            self.added = 0;
        }
    }

    fn finish(self) -> AllSorted {
        self.volumes.into_iter().map(|(volume, bulk)| (volume, bulk.sort())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{ByteRange, Lsn, RegionSeq};
    use crate::format::record::RecordKind;
    use crate::stage::index::Index;

    /// Records that overwrite each other, of two volumes and one that is not known.
    fn found() -> impl Iterator<Item = Found> {
        (1..=5000u64).map(|n| Found {
            lsn: Lsn(n),
            volume: VolumeId((n % 3 + 1) as u16),
            kind: if n % 7 == 0 { RecordKind::Discard } else { RecordKind::Write },
            range: ByteRange::at(n * 7919 % 400 * 512, (n % 5) * 512),
            region: RegionSeq(n / 100 + 1),
            record_offset: (n % 100) as u32 * 4096,
        })
    }

    #[test]
    fn a_thread_builds_what_is_built_without_it() {
        let volumes = || [1, 2].map(|id| (VolumeId(id), 1 << 30)).into_iter();
        let build = |piece: usize| {
            let mut staged = Staged::in_pieces(volumes(), piece);
            assert!(!staged.has(VolumeId(1)));
            found().for_each(|found| staged.add(&found));
            assert_eq!(staged.thread.is_some(), piece < 5000);
            assert!(staged.has(VolumeId(1)) && staged.has(VolumeId(2)) && !staged.has(VolumeId(3)));
            staged.finish().wait()
        };
        let mut expected: BTreeMap<VolumeId, Index> =
            volumes().map(|(volume, _)| (volume, Index::new())).collect();
        for found in found() {
            let source = source_of(found.kind, found.region, payload_offset(found.record_offset));
            if let (Some(index), Some(source)) = (expected.get_mut(&found.volume), source) {
                index.insert(Extent { range: found.range, lsn: found.lsn, source });
            }
        }
        for piece in [7, 100, 1 << 20] {
            let built = build(piece);
            assert!(built.keys().eq(expected.keys()));
            for (volume, index) in built {
                assert!(
                    index.extents().into_iter().eq(expected[&volume].iter()),
                    "volume {volume}, pieces of {piece}"
                );
            }
        }
    }
}
