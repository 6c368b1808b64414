//! From an operation to an SQE, and from a CQE's result to a verdict. No ring in here.

use io_uring::{opcode, squeue, types};

use super::slab::InFlight;
use super::{RETRIES_MAX, TargetOptions};
use crate::io::op::{Errno, Memory, Op, OpKind};

/// Longest single transfer: the kernel's own limit is a page less than 2 GiB.
const TRANSFER_BYTES_MAX: u64 = 1 << 30;
/// Smallest block of any device: continued direct transfers start at a multiple.
const SECTOR_BYTES: u64 = 512;
/// `BLOCK_URING_CMD_DISCARD` of linux/blkdev.h: `BLKDISCARD` as an asynchronous ring command (Linux 6.12).
const BLOCK_URING_CMD_DISCARD: u32 = 0x12 << 8;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// Which of the ways to carry the operation out is being tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The only one, or the preferred one.
    First,
    /// Discard of a block device that cannot zero by unmapping: the plain discard, which leaves the content open.
    DiscardCommand,
}

/// What becomes of an operation after a completion.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Finished.
    Done(Result<(), Errno>),
    /// One more entry is needed; the progress is noted.
    Again,
}

/// Panics unless the memory is what the operation says: a wrong length here would let the kernel write past it.
pub(super) fn assert_memory_fits(op: &Op) {
    let transfer = matches!(op.kind, OpKind::Read | OpKind::Write | OpKind::WriteDurable);
    match &op.memory {
        Memory::None => assert!(!transfer || op.len == 0, "{:?} without memory", op.kind),
        Memory::Owned(buf) => assert!(
            !transfer || buf.len() as u64 == op.len,
            "{:?} of {} bytes with a buffer of {}",
            op.kind,
            op.len,
            buf.len()
        ),
        Memory::Client { len, .. } => {
            assert!(
                op.kind == OpKind::Read && *len as u64 == op.len,
                "a read of as much as the client wants"
            );
        }
        Memory::Shared { region, offset, len } => {
            let end = offset.checked_add(*len);
            assert!(
                end.is_some_and(|end| end <= region.len_bytes()),
                "{offset}+{len} lies outside of the region"
            );
            assert!(
                !transfer || *len as u64 == op.len,
                "{:?} of {} bytes with {len} bytes of memory",
                op.kind,
                op.len
            );
        }
    }
}

/// Address of byte `at` of the memory, which `assert_memory_fits` has checked.
fn address(memory: &mut Memory, at: u64) -> *mut u8 {
    let at = at as usize;
    match memory {
        Memory::None => std::ptr::null_mut(),
        // Offsets within the buffer that the table names.
        Memory::Client { .. } => std::ptr::without_provenance_mut(at),
        Memory::Owned(buf) => buf[at..].as_mut_ptr(),
        Memory::Shared { region, offset, .. } => region.base().wrapping_add(*offset + at),
    }
}

/// The entry for what is left of the operation.
pub(super) fn build(in_flight: &mut InFlight, file: types::Fixed, is_block_device: bool) -> squeue::Entry {
    let InFlight { op, transferred, retries, way } = in_flight;
    let at = op.offset + *transferred;
    let left = (op.len - *transferred).min(TRANSFER_BYTES_MAX) as u32;
    let entry = match op.kind {
        OpKind::Read if let Memory::Client { index, .. } = op.memory => {
            opcode::ReadFixed::new(file, address(&mut op.memory, *transferred), left, index)
                .offset(at)
                .build()
        }
        OpKind::Read => {
            opcode::Read::new(file, address(&mut op.memory, *transferred), left).offset(at).build()
        }
        OpKind::Write => {
            opcode::Write::new(file, address(&mut op.memory, *transferred), left).offset(at).build()
        }
        OpKind::WriteDurable => opcode::Write::new(file, address(&mut op.memory, *transferred), left)
            .offset(at)
            .rw_flags(libc::RWF_DSYNC)
            .build(),
        OpKind::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        OpKind::Discard if *way == Way::DiscardCommand => {
            debug_assert!(is_block_device, "files only punch holes");
            // The command's length travels in the entry's third address, the first eight bytes of `cmd`.
            let mut cmd = [0; 16];
            cmd[..8].copy_from_slice(&op.len.to_ne_bytes());
            opcode::UringCmd16::new(file, BLOCK_URING_CMD_DISCARD).addr(Some(op.offset)).cmd(cmd).build()
        }
        // On a block device punching a hole zeroes by unmapping or offloaded zeroing and never falls back to
        // transferring zeroes; ZERO_RANGE would, for as long as it takes.
        OpKind::Discard | OpKind::WriteZeroes => {
            opcode::Fallocate::new(file, op.len).offset(op.offset).mode(PUNCH).build()
        }
    };
    if *retries > 0 {
        // The attempt to do it without blocking did not work out: let a kernel worker do it.
        return entry.flags(squeue::Flags::ASYNC);
    }
    entry
}

/// Judges `result`, the outcome of the entry that [`build`] made last. `options` is `None` when the target is gone.
pub(super) fn judge(in_flight: &mut InFlight, result: i32, options: Option<TargetOptions>) -> Verdict {
    let InFlight { op, transferred, retries, way } = in_flight;
    if result < 0 {
        let errno = -result;
        if matches!(errno, libc::EINTR | libc::EAGAIN) && *retries < RETRIES_MAX {
            *retries += 1;
            return Verdict::Again;
        }
        if op.kind == OpKind::Discard {
            let is_block_device = options.is_some_and(|o| o.is_block_device);
            if *way == Way::First && errno == libc::EOPNOTSUPP && is_block_device {
                *way = Way::DiscardCommand;
                return Verdict::Again;
            }
            // EINVAL: the kernel has no such command (before 6.12) for an aligned range.
            if *way == Way::DiscardCommand && errno == libc::EINVAL {
                return Verdict::Done(Err(Errno::EOPNOTSUPP));
            }
        }
        return Verdict::Done(Err(Errno(errno)));
    }
    *retries = 0;
    if !matches!(op.kind, OpKind::Read | OpKind::Write | OpKind::WriteDurable) {
        return Verdict::Done(Ok(()));
    }
    let mut progress = (result as u64).min(op.len - *transferred);
    if *transferred + progress == op.len {
        *transferred = op.len;
        return Verdict::Done(Ok(()));
    }
    if options.is_none_or(|o| o.direct) {
        // The rest must start block aligned; a direct read only stops elsewhere at the end of a file.
        progress -= progress % SECTOR_BYTES;
    }
    if progress == 0 {
        // Nothing more comes: the end of the file or device. All or nothing was asked for.
        return Verdict::Done(Err(Errno::EIO));
    }
    *transferred += progress;
    Verdict::Again
}
