//! What an administrator does to volumes while the stage is in use, as `Engine` does it: growing them, and closing and
//! opening their doors.

use tidegate_driver::base::VolumeId;
use tidegate_driver::format::label::{LABEL_BYTES, LABEL_SLOTS, backing_bytes_for, label_offset};
use tidegate_driver::io::Disk;
use tidegate_driver::recovery::superblocks;
use tidegate_driver::volume::admin;

use super::disk::{Faults, lock};
use super::setup::World;
use super::site::Stop;

impl World {
    /// One change by chance.
    pub(super) fn change_volumes(&mut self) -> Result<(), Stop> {
        let volume = self.rng.below(self.backings.len() as u64) as usize;
        if self.rng.chance(700) {
            let reattached = self.running.as_mut().expect("open").reattach(volume);
            self.report.reattaches += u64::from(reattached);
            return Ok(());
        }
        let old = self.model.size(volume);
        let backing = &self.backings[volume];
        let least = label_offset(old, 0) + LABEL_BYTES * u64::from(LABEL_SLOTS);
        let most = (least..=least + (64 << 10))
            .step_by(512)
            .take_while(|&size| backing_bytes_for(size) <= backing.len_bytes())
            .last();
        let Some(most) = most else { return Ok(()) };
        let size = least + self.rng.below((most - least) / 512 + 1) * 512;
        lock(&self.ctl).faults = Faults::default();
        self.running.as_mut().expect("open").hold(true);
        self.until("no epoch is under way", |r| !r.is_flushing())?;
        let told = self.grow(volume, old, size);
        match told {
            Err(_) if lock(&self.ctl).crashed => Err(Stop::Crash),
            Err(error) => Err(Stop::Fail(format!("growing failed: {}", error.report()))),
            Ok(()) => {
                self.running.as_mut().expect("open").hold(false);
                self.report.resizes += 1;
                Ok(())
            }
        }
    }

    /// The steps of `Engine::resize_volume`.
    fn grow(&mut self, volume: usize, old: u64, size: u64) -> tidegate_driver::base::Result<()> {
        lock(&self.ctl).note("grow", &[volume as u64, old, size]);
        let backing = &self.backings[volume];
        let running = self.running.as_mut().expect("open");
        let id = VolumeId(volume as u16 + 1);
        let mut next = running.superblock.clone();
        next.sequence += 1;
        next.volumes.iter_mut().filter(|v| v.id == id).for_each(|v| v.size_bytes = size);
        let label = running.target(id).resized(size);
        admin::write_only_label(backing, &label)?;
        superblocks::write(&self.stage, &next)?;
        running.target(id).label = label;
        running.superblock = next;
        let start = label_offset(old, 0);
        let end = backing_bytes_for(old).min(label_offset(size, 0));
        backing.write(start, &vec![0; (end - start) as usize])?;
        backing.sync()?;
        running.set_size(volume, size);
        self.model.grow(volume, size);
        Ok(())
    }
}
