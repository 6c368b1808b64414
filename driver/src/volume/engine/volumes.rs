//! Changes to the set of volumes while the stage is in use: each is durable in the superblock when its call returns.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;

use super::thread::{Control, TargetChange};
use super::{Engine, SuperblockUpdate, Volume, no_volume};
use crate::base::{Error, ErrorKind, Result, VolumeId};
use crate::flush::FlushTarget;
use crate::format::label::{LABEL_BYTES, LABEL_SLOTS, Label, backing_bytes_for, label_offset};
use crate::format::volume_entry::VolumeInfo;
use crate::io::Disk;
use crate::io::file::FileDisk;
use crate::volume::admin::{self, NewVolume};

impl Engine {
    /// Adds a volume. Durable when it returns.
    pub fn add_volume(&self, backing: Arc<FileDisk>, new: NewVolume) -> Result<VolumeInfo> {
        let _one = self.changing.lock();
        let superblock = self.superblock.lock().clone();
        let info = admin::plan_volume(&superblock, &*backing, &new)?;
        let label = admin::first_label(&superblock, &info);
        admin::write_only_label(&*backing, &label)?;
        self.change_superblock(|next| {
            next.volumes.push(info.clone());
            next.next_volume_id += 1;
        })?;
        self.use_backing(&info, label, backing)?;
        Ok(info)
    }

    /// Brings in the backing of a volume that was opened without it.
    pub fn add_backing(&self, volume: VolumeId, backing: Arc<FileDisk>) -> Result<()> {
        let _one = self.changing.lock();
        let superblock = self.superblock.lock().clone();
        let info =
            superblock.volumes.iter().find(|v| v.id == volume).ok_or_else(|| no_volume(volume))?.clone();
        if self.volumes.read().contains_key(&volume) {
            return Err(Error::new(ErrorKind::Busy, format!("volume '{}' is already in use", info.name)));
        }
        let checkpoint = crate::recovery::scan::read_checkpoints(&*self.stage, &superblock)?
            .into_iter()
            .next()
            .ok_or_else(|| Error::new(ErrorKind::Damaged, "no checkpoint is valid"))?;
        let durable = self.shared.core.lock().durable();
        let label = crate::recovery::open::check_label(&superblock, &info, &*backing, &checkpoint, durable)?;
        // As in recovery: the label that was read must be durable before the other slot is written.
        backing.sync()?;
        self.use_backing(&info, label, backing)
    }

    /// A volume that is in use, and its backing.
    fn usable(&self, volume: VolumeId) -> Result<(VolumeInfo, Arc<FileDisk>)> {
        let volumes = self.volumes.read();
        let found = volumes.get(&volume).ok_or_else(|| no_volume(volume))?;
        Ok((found.info.clone(), found.backing.clone()))
    }

    fn use_backing(&self, info: &VolumeInfo, label: Label, backing: Arc<FileDisk>) -> Result<()> {
        let capabilities = backing.capabilities();
        let target = FlushTarget {
            attempted: label.flushed_lsn,
            label,
            block_bytes: backing.block_bytes(),
            zeroes: capabilities.write_zeroes,
            discards: capabilities.discard,
        };
        let (reply, answer) = channel();
        self.post(Control::AddTarget(info.id, target, backing.clone(), reply))?;
        answer.recv().map_err(|_| Error::new(ErrorKind::Io, "the engine is closed"))??;
        self.shared.core.lock().add_volume(info.id, info.size_bytes);
        self.volumes.write().insert(info.id, Volume::new(info.clone(), backing));
        Ok(())
    }

    /// Removes a volume that has no open door, after flushing it. Its backing keeps its data and loses its label.
    /// Durable when it returns.
    pub fn remove_volume(&self, volume: VolumeId) -> Result<()> {
        self.drain()?;
        let _one = self.changing.lock();
        let (info, backing) = self.usable(volume)?;
        {
            let mut volumes = self.volumes.write();
            let doors = volumes.get(&volume).map_or(0, |v| v.shared.doors.load(Ordering::Acquire));
            if doors > 0 || self.shared.core.lock().is_staged(volume) {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("volume '{}' is attached: detach it first", info.name),
                ));
            }
            volumes.remove(&volume);
        }
        if let Err(error) = self.change_superblock(|next| next.volumes.retain(|v| v.id != volume)) {
            self.volumes.write().insert(volume, Volume::new(info, backing));
            return Err(error);
        }
        self.shared.core.lock().remove_volume(volume);
        let (reply, answer) = channel();
        self.post(Control::RemoveTarget(volume, reply))?;
        let _ = answer.recv();
        admin::wipe_labels(&*backing, info.size_bytes)
    }

    /// Grows a volume to `size_bytes`; its backing must have the room (a file gets it). Durable when it returns.
    pub fn resize_volume(&self, volume: VolumeId, size_bytes: u64) -> Result<()> {
        let _one = self.changing.lock();
        let (old, backing) = self.usable(volume)?;
        if size_bytes == old.size_bytes {
            return Ok(());
        }
        let info = VolumeInfo { size_bytes, ..old.clone() };
        info.validate()?;
        check_size(&old, size_bytes)?;
        let update = self.superblock_update(|next| {
            next.volumes.iter_mut().filter(|v| v.id == volume).for_each(|v| v.size_bytes = size_bytes);
        });
        let next = update.next.clone();
        self.while_not_flushing(volume, move |target| grow(target, &old, size_bytes, &backing, &update))?;
        *self.superblock.lock() = next;
        if let Some(found) = self.volumes.write().get_mut(&volume) {
            found.info = info;
            found.shared.size_bytes.store(size_bytes, Ordering::Release);
        }
        Ok(())
    }

    /// Carries out a change of what the flusher knows of a volume while no epoch is under way, on the flusher's thread.
    fn while_not_flushing(
        &self,
        volume: VolumeId,
        change: impl FnOnce(&mut FlushTarget) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (reply, answer) = channel();
        let change: TargetChange = Box::new(move |target| {
            let _ = reply.send(change(target));
        });
        self.post(Control::ChangeTarget(volume, change))?;
        answer.recv().map_err(|_| Error::new(ErrorKind::Io, "the engine is closed"))?
    }

    /// Notes where the backing of a volume is now. Durable when it returns.
    pub fn set_backing_path(&self, volume: VolumeId, path: &str) -> Result<()> {
        let _one = self.changing.lock();
        let mut volumes = self.superblock.lock().volumes.clone();
        let Some(info) = volumes.iter_mut().find(|v| v.id == volume && v.backing != path) else {
            return Ok(());
        };
        path.clone_into(&mut info.backing);
        info.validate()?;
        self.change_superblock(|next| next.volumes = volumes)
    }
}

/// Grows the backing, writes the label behind the new end, then the superblock. Until the superblock knows the new size the
/// old labels are valid; then they are part of the volume. A crash before they are zeroed leaves old label bytes in the
/// space that was added. No epoch may be under way: its label and checkpoint must not come between the two, and a sync
/// here would take the errors of its writes.
fn grow(
    target: &mut FlushTarget,
    old: &VolumeInfo,
    size_bytes: u64,
    backing: &FileDisk,
    update: &SuperblockUpdate,
) -> Result<()> {
    make_room(backing, backing_bytes_for(size_bytes))?;
    let label = target.resized(size_bytes);
    admin::write_only_label(backing, &label)?;
    update.write()?;
    target.label = label;
    if let Err(error) = wipe_old_tail(backing, old.size_bytes, size_bytes) {
        // The volume has grown all the same.
        tracing::warn!(
            "volume '{}': the space that was added begins with old bytes: {}",
            old.name,
            error.report()
        );
    }
    Ok(())
}

/// Checks that a volume can grow to `size_bytes`.
fn check_size(old: &VolumeInfo, size_bytes: u64) -> Result<()> {
    if size_bytes < old.size_bytes {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("volume '{}' has {} bytes and cannot shrink to {size_bytes}", old.name, old.size_bytes),
        ));
    }
    let old_labels_end = label_offset(old.size_bytes, 0) + LABEL_BYTES * u64::from(LABEL_SLOTS);
    if label_offset(size_bytes, 0) < old_labels_end {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("volume '{}' can grow to {old_labels_end} bytes or more, not to {size_bytes}", old.name),
        ));
    }
    Ok(())
}

/// Makes a file large enough; a device has to be.
fn make_room(backing: &FileDisk, needed: u64) -> Result<()> {
    backing.grow_file(needed)?;
    let available = backing.refresh_len()?;
    if available < needed {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "{} has {available} bytes, {needed} are needed: enlarge the device first",
                backing.name()
            ),
        ));
    }
    Ok(())
}

/// Zeroes what used to be the labels of a backing and is volume now. Whole blocks, so that no byte of the volume beside
/// them is read and written back while the flusher changes it.
fn wipe_old_tail(backing: &dyn Disk, old_bytes: u64, new_bytes: u64) -> Result<()> {
    let start = label_offset(old_bytes, 0);
    let end = backing_bytes_for(old_bytes).min(label_offset(new_bytes, 0));
    backing.write(start, &vec![0; (end - start) as usize])?;
    backing.sync()
}
