//! How a server ends: killed, or with its power cut.

use std::collections::BTreeSet;

use tidegate_driver::base::VolumeId;
use tidegate_driver::io::{OpKind, Target};

use super::disk::lock;
use super::door_io::Asked;
use super::flight::execute;
use super::rng::Rng;
use super::running::Running;
use super::site::{Site, disk_of};

/// Kill or power cut, and what is left of what was going on.
pub struct Remains {
    /// Requests without an answer.
    pub unanswered: Vec<Asked>,
    /// Everything up to here was accepted.
    pub published: u64,
}

impl Running {
    /// The process is gone: the kernel completes what it likes of the operations in flight.
    pub fn kill(mut self, site: &Site<'_>) -> Remains {
        let mut rng = Rng::new(lock(site.ctl).rng.draw(), 3);
        while !self.flights.is_empty() {
            let mut flight = self.flights.swap_remove(rng.below(self.flights.len() as u64) as usize);
            let disk = disk_of(site, flight.op.target);
            match (rng.below(3), flight.op.kind) {
                (0, _) => {}
                (1, OpKind::WriteDurable) => disk.apply(flight.op.offset, &flight.data),
                _ => {
                    let _ = execute(&mut flight, site);
                }
            }
        }
        self.remains()
    }

    /// Power is cut.
    pub fn power_cut(mut self, site: &Site<'_>) -> Remains {
        let mut rng = Rng::new(lock(site.ctl).rng.draw(), 4);
        let flights = std::mem::take(&mut self.flights);
        let targets = std::iter::once(Target::Stage)
            .chain((0..site.backings.len()).map(|v| Target::Backing(VolumeId(v as u16 + 1))));
        for target in targets {
            let writes: Vec<(u64, Vec<u8>)> = flights
                .iter()
                .filter(|f| f.op.target == target && !f.data.is_empty())
                .map(|f| (f.op.offset, f.data.clone()))
                .collect();
            disk_of(site, target).power_cut(&writes, &mut rng);
        }
        self.remains()
    }

    fn remains(self) -> Remains {
        let published = self.shared.core.lock().published().0;
        // Sessions are over, and nothing is asked again for them.
        let bytes: BTreeSet<usize> =
            self.doors.iter().filter(|d| d.seat.is_some()).map(|d| d.volume).collect();
        let mut unanswered = self.again;
        unanswered.retain(|asked| !bytes.contains(&asked.volume));
        for door in self.doors {
            let asked = door.asked.into_values();
            unanswered.extend(asked.map(|a| Asked::new(a.request, a.content, a.volume, a.acknowledged)));
        }
        Remains { unanswered, published }
    }
}
