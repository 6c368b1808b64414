//! Operations in flight, and what becomes of them.

use tidegate_driver::io::{Errno, Memory, Op, OpKind, Target};

use super::aim::spring;
use super::disk::{SyncFailure, lock};
use super::memory;
use super::rng::Rng;
use super::site::{Site, disk_of};

/// Who submitted an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A door.
    Door(usize),
    /// The background.
    Background,
}

/// An operation in flight.
pub struct Flight {
    /// Who submitted it.
    pub owner: Owner,
    /// The operation.
    pub op: Op,
    /// When it may end.
    pub ready_ns: u64,
    /// What is being written, as it was when the operation began; or what was read for a client.
    pub data: Vec<u8>,
    /// The disk's moment when it began.
    pub moment: u64,
}
/// Carries out an operation, or fails it.
pub fn execute(flight: &mut Flight, site: &Site<'_>) -> Result<(), Errno> {
    let disk = disk_of(site, flight.op.target);
    let (kind, offset) = (flight.op.kind, flight.op.offset);
    let on_stage = flight.op.target == Target::Stage;
    match kind {
        OpKind::Discard if !disk.discards => return Err(Errno::EOPNOTSUPP),
        OpKind::WriteZeroes if !disk.zeroes => return Err(Errno::EOPNOTSUPP),
        _ => {}
    }
    if let Some(errno) = spring(flight, site) {
        return Err(errno);
    }
    let fault = {
        let mut ctl = lock(site.ctl);
        let faults = ctl.faults;
        let rate = match kind {
            OpKind::Read if on_stage => faults.stage_read,
            OpKind::Read => faults.read,
            OpKind::Sync => faults.sync,
            _ if on_stage => faults.stage_write,
            _ => faults.backing_write,
        };
        let fails = rate > 0 && ctl.rng.chance(rate);
        ctl.faults_injected += u64::from(fails);
        fails.then(|| Rng::new(ctl.rng.draw(), 5))
    };
    if let Some(mut rng) = fault {
        match kind {
            OpKind::Read => {}
            OpKind::Sync => {
                let how = rng.pick(&[SyncFailure::Kept, SyncFailure::Dropped, SyncFailure::Forgotten]);
                disk.sync_failed(flight.moment, how, &mut rng);
            }
            _ => disk.apply_failed(offset, &flight.data, &mut rng),
        }
        return Err(rng.pick(&[Errno::EIO, Errno::EIO, Errno::ENOSPC]));
    }
    match kind {
        // The client has it when the read ends.
        OpKind::Read if matches!(flight.op.memory, Memory::Client { .. }) => {
            flight.data = disk.visible(offset, flight.op.len as usize).to_vec();
        }
        OpKind::Read => memory::fill(&mut flight.op.memory, &disk.visible(offset, flight.op.len as usize)),
        OpKind::Write | OpKind::Discard | OpKind::WriteZeroes => disk.apply(offset, &flight.data),
        OpKind::WriteDurable => disk.apply_durable(offset, &flight.data),
        OpKind::Sync => disk.sync_from(flight.moment),
    }
    Ok(())
}
