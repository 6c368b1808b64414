//! What the kernel knows about a device, without serving it.

use std::path::PathBuf;

use tidegate_driver::base::{Error, ErrorKind, Result};

use crate::ctrl::Control;
use crate::sys;

/// Who serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not started, or stopped: there is no block device.
    Dead,
    /// Served by the process `server_pid`.
    Live,
    /// The server is gone; requests wait for a new one.
    Quiesced,
    /// The server is gone; requests fail.
    FailIo,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Its number.
    pub device_id: u32,
    /// Who serves it.
    pub status: Status,
    /// [`crate::DeviceConfig::identity`] of whoever made it; other software may have its own meaning here.
    pub identity: u64,
    /// Process that serves or served it.
    pub server_pid: Option<u32>,
    /// Granted `sys::F_*` flags.
    pub flags: u64,
    /// Queues.
    pub queues: u16,
    /// Requests in flight on each queue.
    pub depth: u16,
}

/// Path of the block device.
#[must_use]
pub fn block_path(device_id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{device_id}"))
}

/// Path of the char device.
#[must_use]
pub fn char_path(device_id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{device_id}"))
}

/// State of a device; kind `NotFound` if there is none of that number.
///
/// Asks with GET_DEV_INFO2 alone, which takes no lock: other commands wait, uninterruptibly, for a device whose server
/// or driver is stuck, and whoever looks for a device of ours must not wait for somebody else's.
pub fn state(device_id: u32) -> Result<DeviceState> {
    let info = Control::open()?.info(device_id)?;
    let status = match info.state {
        sys::S_DEV_DEAD => Status::Dead,
        sys::S_DEV_LIVE => Status::Live,
        sys::S_DEV_QUIESCED => Status::Quiesced,
        sys::S_DEV_FAIL_IO => Status::FailIo,
        other => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("ublk device {device_id} is in state {other}, which this version does not know"),
            ));
        }
    };
    Ok(DeviceState {
        device_id,
        status,
        identity: info.ublksrv_flags,
        server_pid: u32::try_from(info.ublksrv_pid).ok().filter(|&pid| pid > 0),
        flags: info.flags,
        queues: info.nr_hw_queues,
        depth: info.queue_depth,
    })
}

/// Size of a device in bytes. Waits for whatever else is done to the device: only for one that is known to be ours.
pub fn size_bytes(device_id: u32) -> Result<u64> {
    Control::open()?.params(device_id).map(|p| p.basic.dev_sectors * 512)
}

/// Numbers of all devices there are.
pub fn list() -> Result<Vec<u32>> {
    let entries = std::fs::read_dir("/dev").map_err(|e| Error::io("cannot list /dev", e))?;
    let mut ids: Vec<u32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Removes a device without a server: stops it if need be (waiting requests fail) and deletes it. If somebody still has
/// the block device open, its number stays taken until they close it.
///
/// Kind `Busy` if it is served; its server stops it.
pub fn delete(device_id: u32) -> Result<()> {
    let found = state(device_id)?;
    if found.status == Status::Live {
        let pid = found.server_pid.unwrap_or_default();
        return Err(Error::new(
            ErrorKind::Busy,
            format!("ublk device {device_id} is served by process {pid}: detach it there"),
        ));
    }
    if found.status != Status::Dead {
        Control::open()?.stop(device_id)?;
    }
    Control::delete_in_use(device_id).map(drop)
}
