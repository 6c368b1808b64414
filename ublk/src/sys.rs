//! The kernel's ublk ABI (linux/ublk_cmd.h), by hand: only what Tidegate uses, in the layout of Linux 7.2. Older
//! kernels know a prefix of it. Everything is in native byte order; it never leaves the machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

// Commands are ioctl-encoded (direction, size, type 'u', number); the plain numbers of before Linux 6.4 are not used.
const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}
const fn ior(number: u32) -> u32 {
    ioc(2, number, size_of::<CtrlCmd>())
}
const fn iowr(number: u32) -> u32 {
    ioc(3, number, size_of::<CtrlCmd>())
}
const fn io_iowr(number: u32) -> u32 {
    ioc(3, number, size_of::<IoCmd>())
}

/// CPUs of a queue.
pub const CMD_GET_QUEUE_AFFINITY: u32 = ior(0x01);
/// [`DevInfo`] of a device.
pub const CMD_GET_DEV_INFO: u32 = ior(0x02);
/// New device; the kernel hands the [`DevInfo`] back with what it granted.
pub const CMD_ADD_DEV: u32 = iowr(0x04);
/// Remove a device; waits for the last reference to `/dev/ublkcN`.
pub const CMD_DEL_DEV: u32 = iowr(0x05);
/// Make the block device appear; waits until every tag of every queue was fetched.
pub const CMD_START_DEV: u32 = iowr(0x06);
/// Make the block device disappear; waits for its requests.
pub const CMD_STOP_DEV: u32 = iowr(0x07);
/// Set [`Params`] before START.
pub const CMD_SET_PARAMS: u32 = iowr(0x08);
/// Read [`Params`].
pub const CMD_GET_PARAMS: u32 = ior(0x09);
/// Take a dead server's device over.
pub const CMD_START_USER_RECOVERY: u32 = iowr(0x10);
/// Live again; waits like START.
pub const CMD_END_USER_RECOVERY: u32 = iowr(0x11);
/// [`DevInfo`] of a device, with the permission check of its `/dev/ublkcN`.
pub const CMD_GET_DEV_INFO2: u32 = ior(0x12);
/// All `F_*` flags the kernel knows.
pub const CMD_GET_FEATURES: u32 = ior(0x13);
/// As DEL_DEV, without waiting for references (6.7).
pub const CMD_DEL_DEV_ASYNC: u32 = ior(0x14);
/// New size in sectors (6.16).
pub const CMD_UPDATE_SIZE: u32 = iowr(0x15);
/// Hand the device over to another server without losing it (6.16).
pub const CMD_QUIESCE_DEV: u32 = iowr(0x16);
/// STOP that is refused while the block device is open (7.0).
pub const CMD_TRY_STOP_DEV: u32 = iowr(0x17);

/// Ask for the first request of a tag.
pub const IO_FETCH_REQ: u32 = io_iowr(0x20);
/// Complete a request and ask for the tag's next one.
pub const IO_COMMIT_AND_FETCH_REQ: u32 = io_iowr(0x21);

/// A request is there.
pub const IO_RES_OK: i32 = 0;
/// The tag has no further requests; it must not be fetched again.
pub const IO_RES_ABORT: i32 = -libc::ENODEV;

/// Server may die and be replaced.
pub const F_USER_RECOVERY: u64 = 1 << 3;
/// Requests of a dead server are sent again to its successor.
pub const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// Not owned by root.
pub const F_UNPRIVILEGED_DEV: u64 = 1 << 5;
/// Commands are ioctl-encoded.
pub const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
/// Payload moves by pread and pwrite on `/dev/ublkcN`.
pub const F_USER_COPY: u64 = 1 << 7;
/// The client's memory of a read or write is put into the server's table of io_uring buffers.
pub const F_AUTO_BUF_REG: u64 = 1 << 11;
/// Knows [`CMD_UPDATE_SIZE`].
pub const F_UPDATE_SIZE: u64 = 1 << 10;
/// Knows [`CMD_QUIESCE_DEV`].
pub const F_QUIESCE: u64 = 1 << 12;
/// Knows [`CMD_TRY_STOP_DEV`].
pub const F_SAFE_STOP_DEV: u64 = 1 << 17;

/// Name of a feature flag, for messages.
#[must_use]
pub fn flag_name(flag: u64) -> &'static str {
    match flag {
        F_USER_RECOVERY => "USER_RECOVERY",
        F_USER_RECOVERY_REISSUE => "USER_RECOVERY_REISSUE",
        F_UNPRIVILEGED_DEV => "UNPRIVILEGED_DEV",
        F_CMD_IOCTL_ENCODE => "CMD_IOCTL_ENCODE",
        F_USER_COPY => "USER_COPY",
        F_AUTO_BUF_REG => "AUTO_BUF_REG",
        F_UPDATE_SIZE => "UPDATE_SIZE",
        F_QUIESCE => "QUIESCE",
        F_SAFE_STOP_DEV => "SAFE_STOP_DEV",
        _ => "unknown flag",
    }
}

/// Added, not started; or stopped.
pub const S_DEV_DEAD: u16 = 0;
/// Served.
pub const S_DEV_LIVE: u16 = 1;
/// Without a server; requests wait.
pub const S_DEV_QUIESCED: u16 = 2;
/// Without a server; requests fail.
pub const S_DEV_FAIL_IO: u16 = 3;

/// Largest queue depth.
pub const QUEUE_DEPTH_MAX: u16 = 4096;
/// Largest request.
pub const IO_BYTES_MAX: u32 = 32 << 20;

/// Read.
pub const IO_OP_READ: u8 = 0;
/// Write.
pub const IO_OP_WRITE: u8 = 1;
/// Flush.
pub const IO_OP_FLUSH: u8 = 2;
/// Discard.
pub const IO_OP_DISCARD: u8 = 3;
/// Write zeroes.
pub const IO_OP_WRITE_ZEROES: u8 = 5;
/// In [`IoDesc::op_flags`]: durable before completion.
pub const IO_F_FUA: u32 = 1 << 13;
/// The client's memory could not be put into the table of buffers.
pub const IO_F_NEED_REG_BUF: u32 = 1 << 17;

/// What a command for a tag carries as its address with [`F_AUTO_BUF_REG`]: the place in the table, and that a request comes
/// all the same where it cannot be put there.
#[must_use]
pub fn auto_buf_address(index: u16) -> u64 {
    const FALLBACK: u64 = 1;
    u64::from(index) | FALLBACK << 16
}

/// What every control command carries in its SQE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtrlCmd {
    /// Which device; all ones in ADD: any.
    pub dev_id: u32,
    /// Which queue; all ones: none.
    pub queue_id: u16,
    /// Bytes at `addr`.
    pub len: u16,
    /// The command's buffer.
    pub addr: u64,
    /// The command's number.
    pub data: u64,
    /// Bytes of the path at the beginning of the buffer, where a command takes one.
    pub dev_path_len: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub reserved: u32,
}

/// A device as the kernel describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DevInfo {
    /// Queues.
    pub nr_hw_queues: u16,
    /// Tags of each queue.
    pub queue_depth: u16,
    /// `S_DEV_*`.
    pub state: u16,
    /// Size of an [`IoDesc`] where the kernel lets the server choose it (7.3); zero: 24.
    pub io_desc_size: u16,
    /// Largest request in bytes.
    pub max_io_buf_bytes: u32,
    /// Number of the device.
    pub dev_id: u32,
    /// The server's process, or -1.
    pub ublksrv_pid: i32,
    /// Zero.
    pub pad1: u32,
    /// `F_*` granted.
    pub flags: u64,
    /// The server's own: Tidegate keeps the identity of what is behind the device here.
    pub ublksrv_flags: u64,
    /// Owner.
    pub owner_uid: u32,
    /// Owner.
    pub owner_gid: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

/// A request, in memory shared with the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoDesc {
    /// `IO_OP_*` in the low byte, `IO_F_*` above.
    pub op_flags: u32,
    /// Length in sectors.
    pub nr_sectors: u32,
    /// First sector.
    pub start_sector: u64,
    /// Address of the tag's buffer (plain copy).
    pub addr: u64,
}

impl IoDesc {
    /// `IO_OP_*`.
    #[must_use]
    pub fn op(&self) -> u8 {
        (self.op_flags & 0xff) as u8
    }
}

/// What FETCH and COMMIT_AND_FETCH carry in their SQE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoCmd {
    /// Queue.
    pub q_id: u16,
    /// Tag.
    pub tag: u16,
    /// COMMIT: bytes transferred, or minus an errno.
    pub result: i32,
    /// Address of the tag's buffer (plain copy; zero otherwise).
    pub addr: u64,
}

/// [`ParamsBasic`] is set.
pub const PARAM_TYPE_BASIC: u32 = 1 << 0;
/// [`ParamsDiscard`] is set.
pub const PARAM_TYPE_DISCARD: u32 = 1 << 1;

/// Has a volatile cache: the kernel sends flushes.
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// Takes writes with FUA.
pub const ATTR_FUA: u32 = 1 << 3;

/// Geometry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamsBasic {
    /// `ATTR_*`.
    pub attrs: u32,
    /// log2 of the logical block.
    pub logical_bs_shift: u8,
    /// log2 of the physical block.
    pub physical_bs_shift: u8,
    /// log2 of the optimal request.
    pub io_opt_shift: u8,
    /// log2 of the smallest request without read-modify-write.
    pub io_min_shift: u8,
    /// Largest request in sectors.
    pub max_sectors: u32,
    /// Boundary that requests must not cross; zero: none.
    pub chunk_sectors: u32,
    /// Size in sectors.
    pub dev_sectors: u64,
    /// Boundary mask of segments; zero: none.
    pub virt_boundary_mask: u64,
}

/// Discard and write-zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamsDiscard {
    /// Offset of the first granule.
    pub discard_alignment: u32,
    /// Granule in bytes.
    pub discard_granularity: u32,
    /// Largest discard; zero: none.
    pub max_discard_sectors: u32,
    /// Largest write-zeroes; zero: none.
    pub max_write_zeroes_sectors: u32,
    /// Ranges in one discard: 1.
    pub max_discard_segments: u16,
    /// Zero.
    pub reserved0: u16,
}

/// SET_PARAMS, GET_PARAMS: all of Linux 7.2. The kernel takes and gives as much of it as it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Params {
    /// Bytes of this structure that count.
    pub len: u32,
    /// `PARAM_TYPE_*`.
    pub types: u32,
    /// Geometry.
    pub basic: ParamsBasic,
    /// Discard and write-zeroes.
    pub discard: ParamsDiscard,
    /// Device numbers, read-only: char major, minor, block major, minor.
    pub devt: [u32; 4],
    /// Zoned devices: not used.
    pub zoned: [u32; 8],
    /// Alignment of memory: not used.
    pub dma: [u32; 2],
    /// Zero.
    pub pad: u32,
    /// Segment limits: not used.
    pub segment: [u64; 2],
    /// Integrity: not used.
    pub integrity: [u64; 2],
}

impl Default for Params {
    fn default() -> Params {
        let mut params: Params = zerocopy::FromZeros::new_zeroed();
        params.len = size_of::<Params>() as u32;
        params
    }
}

const _: () = assert!(size_of::<CtrlCmd>() == 32);
const _: () = assert!(size_of::<DevInfo>() == 64);
const _: () = assert!(size_of::<IoDesc>() == 24);
const _: () = assert!(size_of::<IoCmd>() == 16);
const _: () = assert!(size_of::<ParamsBasic>() == 32);
const _: () = assert!(size_of::<ParamsDiscard>() == 20);
const _: () = assert!(size_of::<Params>() == 152);
const _: () = assert!(std::mem::offset_of!(Params, segment) == 120);

/// Where the payload of a request begins on `/dev/ublkcN` (user copy); byte `offset` of it is that much further on.
#[must_use]
pub fn user_copy_position(queue: u16, tag: u16, offset: u32) -> u64 {
    debug_assert!(offset < IO_BYTES_MAX);
    0x8000_0000 + (u64::from(queue) << 41 | u64::from(tag) << 25 | u64::from(offset))
}

/// Where the descriptors of a queue begin on `/dev/ublkcN` (mmap).
#[must_use]
pub fn io_desc_position(queue: u16, page_bytes: u64) -> u64 {
    let bytes = u64::from(QUEUE_DEPTH_MAX) * size_of::<IoDesc>() as u64;
    u64::from(queue) * bytes.next_multiple_of(page_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_kernels_numbers() {
        assert_eq!(CMD_GET_QUEUE_AFFINITY, 0x8020_7501);
        assert_eq!(CMD_GET_DEV_INFO, 0x8020_7502);
        assert_eq!(CMD_ADD_DEV, 0xC020_7504);
        assert_eq!(CMD_DEL_DEV, 0xC020_7505);
        assert_eq!(CMD_START_DEV, 0xC020_7506);
        assert_eq!(CMD_STOP_DEV, 0xC020_7507);
        assert_eq!(CMD_SET_PARAMS, 0xC020_7508);
        assert_eq!(CMD_GET_PARAMS, 0x8020_7509);
        assert_eq!(CMD_START_USER_RECOVERY, 0xC020_7510);
        assert_eq!(CMD_END_USER_RECOVERY, 0xC020_7511);
        assert_eq!(CMD_GET_DEV_INFO2, 0x8020_7512);
        assert_eq!(CMD_GET_FEATURES, 0x8020_7513);
        assert_eq!(CMD_DEL_DEV_ASYNC, 0x8020_7514);
        assert_eq!(CMD_UPDATE_SIZE, 0xC020_7515);
        assert_eq!(CMD_QUIESCE_DEV, 0xC020_7516);
        assert_eq!(CMD_TRY_STOP_DEV, 0xC020_7517);
        assert_eq!(IO_FETCH_REQ, 0xC010_7520);
        assert_eq!(IO_COMMIT_AND_FETCH_REQ, 0xC010_7521);
    }

    #[test]
    fn positions_on_the_char_device() {
        assert_eq!(user_copy_position(0, 0, 0), 0x8000_0000);
        assert_eq!(user_copy_position(0, 1, 0), 0x8000_0000 + (32 << 20));
        assert_eq!(user_copy_position(1, 0, 7), 0x8000_0000 + (1 << 41) + 7);
        assert_eq!(user_copy_position(3, 4095, 5), 0x8000_0000 + ((3 << 41) | (4095 << 25) | 5));
        assert_eq!(io_desc_position(0, 4096), 0);
        assert_eq!(io_desc_position(2, 4096), 2 * 98304);
        assert_eq!(io_desc_position(1, 65536), 131_072);
    }

    #[test]
    fn an_operation_is_the_low_byte() {
        let desc = IoDesc { op_flags: u32::from(IO_OP_WRITE) | IO_F_FUA, ..IoDesc::default() };
        assert_eq!(desc.op(), IO_OP_WRITE);
        assert_ne!(desc.op_flags & IO_F_FUA, 0);
    }
}
