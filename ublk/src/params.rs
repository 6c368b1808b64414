//! From a configuration to the kernel's flags and parameters.

use std::time::Duration;

use tidegate_driver::base::{Error, ErrorKind, Result};

use crate::sys::{self, DevInfo, Params, ParamsBasic, ParamsDiscard};

/// How a device is to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Size in bytes; a multiple of the logical block.
    pub size_bytes: u64,
    /// Smallest unit of a request: a power of two from 512 to 4096.
    pub logical_block_bytes: u32,
    /// Unit that is written without reading first: a power of two, at least the logical block.
    pub physical_block_bytes: u32,
    /// Queues, each with a thread; at most the number of processors.
    pub queues: u16,
    /// Requests in flight on each queue: 1 to 4096.
    pub depth: u16,
    /// Largest read or write: 1 page to 32 MiB.
    pub max_io_bytes: u32,
    /// Completed writes may be lost at a power failure until they are flushed: the kernel sends FLUSH and FUA. `false`
    /// means that a completed write is durable, and the kernel sends neither.
    pub volatile_cache: bool,
    /// Takes discards.
    pub discard: bool,
    /// Takes write-zeroes.
    pub write_zeroes: bool,
    /// Largest discard and write-zeroes request in bytes; the kernel splits larger ones.
    pub max_discard_bytes: u64,
    /// Longest time that a queue's thread looks for requests and completions before it sleeps.
    pub poll: Duration,
    /// Stands for what is behind the device. Recovery takes a device over only if this matches, and 0 matches nothing.
    pub identity: u64,
    /// Use plain copy even where the kernel has user copy (for tests).
    pub force_copy: bool,
    /// Number of the device; `None`: the first free one.
    pub device_id: Option<u32>,
}

impl Default for DeviceConfig {
    fn default() -> DeviceConfig {
        DeviceConfig {
            size_bytes: 0,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            queues: 1,
            depth: 128,
            max_io_bytes: 1 << 20,
            volatile_cache: false,
            discard: true,
            write_zeroes: true,
            max_discard_bytes: 1 << 30,
            poll: Duration::ZERO,
            identity: 0,
            force_copy: false,
            device_id: None,
        }
    }
}

/// Without these a client would see errors when the server dies.
const FLAGS_REQUIRED: u64 = sys::F_USER_RECOVERY | sys::F_USER_RECOVERY_REISSUE | sys::F_CMD_IOCTL_ENCODE;
/// Used where the kernel has them.
const FLAGS_OPTIONAL: u64 = sys::F_UPDATE_SIZE | sys::F_QUIESCE | sys::F_SAFE_STOP_DEV;
/// How payload moves, likewise.
const FLAGS_COPY: u64 = sys::F_USER_COPY | sys::F_AUTO_BUF_REG;

const SECTOR_BYTES: u64 = 512;

impl DeviceConfig {
    /// Refuses what no kernel would take, in words.
    pub fn validate(&self) -> Result<()> {
        let invalid = |what: String| Err(Error::new(ErrorKind::Invalid, what));
        let logical = self.logical_block_bytes;
        if !logical.is_power_of_two() || !(512..=4096).contains(&logical) {
            return invalid(format!("logical block of {logical} bytes: use 512, 1024, 2048 or 4096"));
        }
        let physical = self.physical_block_bytes;
        if !physical.is_power_of_two() || physical < logical {
            return invalid(format!(
                "physical block of {physical} bytes: use a power of two of at least the logical block ({logical})"
            ));
        }
        if self.size_bytes == 0 || !self.size_bytes.is_multiple_of(u64::from(logical)) {
            return invalid(format!(
                "size of {} bytes: use a multiple of the logical block ({logical})",
                self.size_bytes
            ));
        }
        if self.queues == 0 || !(1..=sys::QUEUE_DEPTH_MAX).contains(&self.depth) {
            return invalid(format!(
                "{} queues of depth {}: use at least 1 queue and a depth of 1 to {}",
                self.queues,
                self.depth,
                sys::QUEUE_DEPTH_MAX
            ));
        }
        if !(65536..=sys::IO_BYTES_MAX).contains(&self.max_io_bytes)
            || !self.max_io_bytes.is_multiple_of(65536)
        {
            return invalid(format!(
                "largest request of {} bytes: use a multiple of 64 KiB up to 32 MiB",
                self.max_io_bytes
            ));
        }
        if self.max_discard_bytes < u64::from(physical) {
            return invalid(format!(
                "largest discard of {} bytes: use at least {physical}",
                self.max_discard_bytes
            ));
        }
        Ok(())
    }

    /// Flags to ask ADD_DEV for.
    pub(crate) fn flags_wanted(&self) -> u64 {
        let copy = if self.force_copy { 0 } else { FLAGS_COPY };
        FLAGS_REQUIRED | FLAGS_OPTIONAL | copy
    }

    /// The information of ADD_DEV.
    pub(crate) fn dev_info(&self) -> DevInfo {
        DevInfo {
            nr_hw_queues: self.queues,
            queue_depth: self.depth,
            max_io_buf_bytes: self.max_io_bytes,
            dev_id: self.device_id.unwrap_or(u32::MAX),
            ublksrv_pid: std::process::id() as i32,
            flags: self.flags_wanted(),
            ublksrv_flags: self.identity,
            ..DevInfo::default()
        }
    }

    /// The parameters of SET_PARAMS for a device that was granted requests of `max_io_bytes`.
    pub(crate) fn params(&self, max_io_bytes: u32) -> Params {
        let physical_bs_shift = self.physical_block_bytes.trailing_zeros() as u8;
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR_BYTES).unwrap_or(u32::MAX);
        let granule = u64::from(self.physical_block_bytes);
        let max_discard = sectors(self.max_discard_bytes.min(u64::from(u32::MAX)) / granule * granule);
        let mut params = Params {
            types: sys::PARAM_TYPE_BASIC,
            basic: ParamsBasic {
                attrs: if self.volatile_cache { sys::ATTR_VOLATILE_CACHE | sys::ATTR_FUA } else { 0 },
                logical_bs_shift: self.logical_block_bytes.trailing_zeros() as u8,
                physical_bs_shift,
                io_opt_shift: physical_bs_shift,
                io_min_shift: physical_bs_shift,
                max_sectors: sectors(u64::from(max_io_bytes)),
                dev_sectors: self.size_bytes / SECTOR_BYTES,
                ..ParamsBasic::default()
            },
            ..Params::default()
        };
        if self.discard || self.write_zeroes {
            params.types |= sys::PARAM_TYPE_DISCARD;
            params.discard = ParamsDiscard {
                discard_granularity: self.logical_block_bytes,
                max_discard_sectors: if self.discard { max_discard } else { 0 },
                max_write_zeroes_sectors: if self.write_zeroes { max_discard } else { 0 },
                max_discard_segments: 1,
                ..ParamsDiscard::default()
            };
        }
        params
    }
}

/// The kernel clears flags that it does not grant, without a word: says what is lacking.
pub(crate) fn check_granted(granted: u64) -> Result<()> {
    let lacking = FLAGS_REQUIRED & !granted;
    if lacking == 0 && granted & sys::F_UNPRIVILEGED_DEV == 0 {
        return Ok(());
    }
    let names: Vec<_> =
        (0..64).map(|bit| lacking & (1 << bit)).filter(|&f| f != 0).map(sys::flag_name).collect();
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "the kernel does not grant {} (granted: {granted:#x}); a device would not survive its server: use Linux 6.12 \
             or newer, as root",
            if names.is_empty() { "a privileged device".to_owned() } else { names.join(", ") }
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DeviceConfig {
        DeviceConfig { size_bytes: 1 << 30, identity: 7, ..DeviceConfig::default() }
    }

    #[test]
    fn parameters_follow_the_configuration() {
        let params = config().params(1 << 20);
        assert_eq!(params.types, sys::PARAM_TYPE_BASIC | sys::PARAM_TYPE_DISCARD);
        assert_eq!(params.basic.attrs, 0, "no volatile cache: the kernel sends no flush");
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (9, 12));
        assert_eq!((params.basic.max_sectors, params.basic.dev_sectors), (2048, 1 << 21));
        assert_eq!((params.discard.max_discard_sectors, params.discard.max_discard_segments), (1 << 21, 1));
        let volatile = DeviceConfig { volatile_cache: true, discard: false, write_zeroes: false, ..config() };
        let params = volatile.params(1 << 20);
        assert_eq!(params.types, sys::PARAM_TYPE_BASIC);
        assert_eq!(params.basic.attrs, sys::ATTR_VOLATILE_CACHE | sys::ATTR_FUA);
        let huge = DeviceConfig { max_discard_bytes: u64::MAX, ..config() }.params(1 << 20);
        assert_eq!(u64::from(huge.discard.max_discard_sectors) * 512 % 4096, 0);
    }

    #[test]
    fn user_copy_is_asked_for_unless_forced_off() {
        assert_ne!(config().flags_wanted() & sys::F_USER_COPY, 0);
        assert_eq!(DeviceConfig { force_copy: true, ..config() }.flags_wanted() & sys::F_USER_COPY, 0);
        assert_eq!(config().flags_wanted() & (1 << 2), 0, "NEED_GET_DATA costs a round trip");
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(config().validate().is_ok());
        for bad in [
            DeviceConfig { size_bytes: 0, ..config() },
            DeviceConfig { size_bytes: 1000, ..config() },
            DeviceConfig { logical_block_bytes: 256, ..config() },
            DeviceConfig { logical_block_bytes: 8192, physical_block_bytes: 8192, ..config() },
            DeviceConfig { physical_block_bytes: 256, ..config() },
            DeviceConfig { queues: 0, ..config() },
            DeviceConfig { depth: 0, ..config() },
            DeviceConfig { depth: 4097, ..config() },
            DeviceConfig { max_io_bytes: 64 << 20, ..config() },
            DeviceConfig { max_discard_bytes: 0, ..config() },
        ] {
            assert_eq!(bad.validate().unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
    }

    #[test]
    fn a_kernel_that_lacks_recovery_is_refused_by_name() {
        check_granted(0x1fe & !sys::F_UNPRIVILEGED_DEV).unwrap();
        let error = check_granted(sys::F_CMD_IOCTL_ENCODE | sys::F_USER_RECOVERY).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.report().contains("USER_RECOVERY_REISSUE"), "{}", error.report());
    }
}
