//! Control commands: requests to the driver about whole devices, on `/dev/ublk-control`.
//!
//! They wait for the kernel, some of them for the queue threads (START, STOP), so they never run on a queue thread.

#![expect(unsafe_code, reason = "control commands name memory for the kernel to read and write")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use tidegate_driver::base::{Error, ErrorKind, Result};
use zerocopy::{FromBytes, IntoBytes};

use crate::sys::{self, CtrlCmd, DevInfo, Params};

const CONTROL: &str = "/dev/ublk-control";
const HOW_TO_LOAD: &str = "load it with `modprobe ublk_drv` and list `ublk_drv` in /etc/modules-load.d/ublk.conf so that \
                           it is there after a reboot; if there is no such module, use a kernel with \
                           CONFIG_BLK_DEV_UBLK (Debian 13, or Linux 6.12 from Debian 12's backports; \
                           linux-modules-extra on Ubuntu)";
/// ADD and DEL take milliseconds; kernels with a bug there take for ever, in a wait that no signal ends.
const PATIENCE: Duration = Duration::from_secs(30);
const QUEUE_NONE: u16 = u16::MAX;

/// The control device with a ring of its own.
pub struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
}

impl Control {
    /// Opens the control device, loading the driver if need be.
    pub fn open() -> Result<Control> {
        let file = open_control()?;
        let ring = IoUring::builder().dontfork().build(4).map_err(|e| {
            let hint = match e.raw_os_error() {
                Some(libc::EPERM) => {
                    "io_uring is disabled here: set the sysctl kernel.io_uring_disabled to 0"
                }
                Some(libc::ENOSYS) => "this kernel has no io_uring: use one built with CONFIG_IO_URING",
                _ => "see dmesg",
            };
            Error::io(format!("cannot set up an io_uring for ublk control commands; {hint}"), e)
        })?;
        Ok(Control { file, ring })
    }

    /// All `sys::F_*` flags that the kernel knows.
    pub fn features(&mut self) -> Result<u64> {
        let mut features = 0u64;
        self.command(sys::CMD_GET_FEATURES, "GET_FEATURES", u32::MAX, 0, features.as_mut_bytes())?;
        Ok(features)
    }

    /// Adds a device; returns what the kernel granted. Runs in a helper thread, because ADD_DEV of some kernels hangs
    /// in a wait that no signal ends.
    pub fn add(info: DevInfo) -> Result<DevInfo> {
        with_patience("ADD_DEV", move || {
            let mut info = info;
            let device_id = info.dev_id;
            match Control::open()?.issue(sys::CMD_ADD_DEV, device_id, QUEUE_NONE, 0, info.as_mut_bytes()) {
                Ok(_) => Ok(info),
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Err(Error::io(
                    format!("ublk device {device_id} exists already: choose another number or delete it"),
                    e,
                )),
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Err(Error::io(
                    format!(
                        "the kernel refuses a ublk device with {} queues of depth {}, flags {:#x}; there may be at most \
                         one queue per processor",
                        info.nr_hw_queues, info.queue_depth, info.flags
                    ),
                    e,
                )),
                Err(e) => Err(Error::io("cannot add a ublk device (ADD_DEV)", e)),
            }
        })
    }

    /// Removes a device that is stopped or was never started. Waits until nobody has `/dev/ublkcN` open or mapped, nor
    /// the block device open.
    pub fn delete(device_id: u32) -> Result<()> {
        with_patience("DEL_DEV", move || {
            Control::open()?.command(sys::CMD_DEL_DEV, "DEL_DEV", device_id, 0, &mut []).map(drop)
        })
    }

    /// As [`Self::delete`], but where somebody still has the (dead) block device open it only waits for a moment: the
    /// kernel frees the number when they close it. `Ok(false)` if it had to leave it at that.
    pub fn delete_in_use(device_id: u32) -> Result<bool> {
        with_patience("DEL_DEV_ASYNC", move || {
            let mut control = Control::open()?;
            control.command(sys::CMD_DEL_DEV_ASYNC, "DEL_DEV_ASYNC", device_id, 0, &mut [])?;
            let deadline = Instant::now() + Duration::from_secs(1);
            while Instant::now() < deadline {
                if control
                    .command(
                        sys::CMD_GET_DEV_INFO,
                        "GET_DEV_INFO",
                        device_id,
                        0,
                        DevInfo::default().as_mut_bytes(),
                    )
                    .is_err()
                {
                    return Ok(true);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(false)
        })
    }

    /// Sets the parameters of a device that was not started yet.
    pub fn set_params(&mut self, device_id: u32, mut params: Params) -> Result<()> {
        params.len = size_of::<Params>() as u32;
        self.command(sys::CMD_SET_PARAMS, "SET_PARAMS", device_id, 0, params.as_mut_bytes()).map(drop)
    }

    /// Reads the parameters; what an older kernel does not know is zero.
    pub fn params(&mut self, device_id: u32) -> Result<Params> {
        let mut params = Params::default();
        self.command(sys::CMD_GET_PARAMS, "GET_PARAMS", device_id, 0, params.as_mut_bytes())?;
        Ok(params)
    }

    /// What the kernel knows about a device.
    pub fn info(&mut self, device_id: u32) -> Result<DevInfo> {
        // With the path of the char device in front, so that this works for an unprivileged user's device too and we
        // can tell that it is not ours.
        let path = format!("/dev/ublkc{device_id}\0");
        let mut buffer = path.clone().into_bytes();
        buffer.resize(path.len() + size_of::<DevInfo>(), 0);
        let command = CtrlCmd { dev_path_len: path.len() as u16, ..CtrlCmd::default() };
        let result = self.issue_with(sys::CMD_GET_DEV_INFO2, device_id, QUEUE_NONE, command, &mut buffer);
        match result {
            Ok(_) => Ok(DevInfo::read_from_suffix(&buffer).expect("the buffer has the size").1),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) => {
                Err(Error::new(ErrorKind::NotFound, format!("there is no ublk device {device_id}")))
            }
            Err(e) => Err(Error::io(format!("cannot ask about ublk device {device_id} (GET_DEV_INFO2)"), e)),
        }
    }

    /// Processors that the block layer assigns to a queue.
    pub fn queue_affinity(&mut self, device_id: u32, queue: u16) -> Result<[u64; 16]> {
        let mut cpus = [0u64; 16];
        self.issue(sys::CMD_GET_QUEUE_AFFINITY, device_id, queue, u64::from(queue), cpus.as_mut_bytes())
            .map_err(|e| {
                Error::io(
                    format!("cannot ask for the processors of queue {queue} of ublk device {device_id}"),
                    e,
                )
            })?;
        Ok(cpus)
    }

    /// Makes the block device appear. Every tag of every queue must have been fetched, else this waits for it.
    pub fn start(&mut self, device_id: u32) -> Result<()> {
        let pid = u64::from(std::process::id());
        self.command(sys::CMD_START_DEV, "START_DEV", device_id, pid, &mut []).map(drop)
    }

    /// Makes the block device disappear, whoever has it open. Waits for requests in flight.
    pub fn stop(&mut self, device_id: u32) -> Result<()> {
        self.command(sys::CMD_STOP_DEV, "STOP_DEV", device_id, 0, &mut []).map(drop)
    }

    /// As [`Self::stop`], but fails with kind `Busy` while anybody has the block device open.
    pub fn try_stop(&mut self, device_id: u32) -> Result<()> {
        self.command(sys::CMD_TRY_STOP_DEV, "TRY_STOP_DEV", device_id, 0, &mut []).map(drop)
    }

    /// Begins to take a dead server's device over, waiting up to `patience` for the kernel to notice the death.
    pub fn start_recovery(&mut self, device_id: u32, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            match self.command(sys::CMD_START_USER_RECOVERY, "START_USER_RECOVERY", device_id, 0, &mut []) {
                Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => return other.map(drop),
            }
        }
    }

    /// Ends recovery: the device is live again. Waits like [`Self::start`].
    pub fn end_recovery(&mut self, device_id: u32) -> Result<()> {
        let pid = u64::from(std::process::id());
        self.command(sys::CMD_END_USER_RECOVERY, "END_USER_RECOVERY", device_id, pid, &mut []).map(drop)
    }

    /// Changes the size of a live device.
    pub fn update_size(&mut self, device_id: u32, size_bytes: u64) -> Result<()> {
        self.command(sys::CMD_UPDATE_SIZE, "UPDATE_SIZE", device_id, size_bytes / 512, &mut []).map(drop)
    }

    /// Takes the device away from this server and keeps it for a successor. Fails with kind `Busy` if requests do not
    /// finish within `patience`.
    pub fn quiesce(&mut self, device_id: u32, patience: Duration) -> Result<()> {
        let milliseconds = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX).max(1);
        self.command(sys::CMD_QUIESCE_DEV, "QUIESCE_DEV", device_id, milliseconds, &mut []).map(drop)
    }

    fn command(&mut self, op: u32, name: &str, device_id: u32, data: u64, buffer: &mut [u8]) -> Result<i32> {
        self.issue(op, device_id, QUEUE_NONE, data, buffer).map_err(|e| match e.raw_os_error() {
            Some(libc::ENODEV) => {
                Error::new(ErrorKind::NotFound, format!("there is no ublk device {device_id}"))
            }
            Some(libc::EOPNOTSUPP) => {
                Error::new(ErrorKind::Unsupported, format!("this kernel's ublk driver has no command {name}"))
            }
            _ => Error::io(format!("{name} failed for ublk device {device_id}"), e),
        })
    }

    fn issue(
        &mut self,
        op: u32,
        device_id: u32,
        queue_id: u16,
        data: u64,
        buffer: &mut [u8],
    ) -> io::Result<i32> {
        self.issue_with(op, device_id, queue_id, CtrlCmd { data, ..CtrlCmd::default() }, buffer)
    }

    /// Carries one command out and waits for its end. `buffer` is given to the kernel and holds its answer afterwards.
    fn issue_with(
        &mut self,
        op: u32,
        device_id: u32,
        queue_id: u16,
        command: CtrlCmd,
        buffer: &mut [u8],
    ) -> io::Result<i32> {
        // A copy on the heap, which can be left behind should the wait for the command fail.
        let mut memory = buffer.to_vec();
        let command = CtrlCmd {
            dev_id: device_id,
            queue_id,
            len: u16::try_from(memory.len()).expect("control buffers are small"),
            addr: if memory.is_empty() { 0 } else { memory.as_mut_ptr() as u64 },
            ..command
        };
        let mut bytes = [0; 80];
        bytes[..size_of::<CtrlCmd>()].copy_from_slice(command.as_bytes());
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), op).cmd(bytes).build();
        // SAFETY: `memory` stays in place until the completion, or for ever.
        unsafe { self.ring.submission().push(&entry) }.expect("the ring is empty between commands");
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => {
                    std::mem::forget(memory);
                    return Err(e);
                }
            }
            if let Some(cqe) = self.ring.completion().next() {
                buffer.copy_from_slice(&memory);
                let result = cqe.result();
                return if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) };
            }
        }
    }
}

fn open_control() -> Result<File> {
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(CONTROL)
    };
    match open() {
        Ok(file) => return Ok(file),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)) => {}
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {
            return Err(Error::io(format!("cannot open {CONTROL}: ublk devices are served by root"), e));
        }
        Err(e) => return Err(Error::io(format!("cannot open {CONTROL}"), e)),
    }
    // The driver has no alias by which the kernel could load it when the node is opened.
    let attempt = match Command::new("modprobe").arg("ublk_drv").output() {
        Ok(output) if output.status.success() => {
            "`modprobe ublk_drv` succeeded, but the device did not appear".to_owned()
        }
        Ok(output) => {
            format!("`modprobe ublk_drv` failed: {}", String::from_utf8_lossy(&output.stderr).trim())
        }
        Err(e) => format!("`modprobe` cannot be run: {e}"),
    };
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match open() {
            Ok(file) => return Ok(file),
            Err(_) if Instant::now() < deadline && attempt.contains("succeeded") => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(_) => break,
        }
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("there is no {CONTROL}: the kernel's ublk driver is not loaded ({attempt}); {HOW_TO_LOAD}"),
    ))
}

/// Runs `command` in a thread of its own and gives up on it after a while.
fn with_patience<T: Send + 'static>(
    name: &'static str,
    command: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name(format!("ublk-{name}"))
        .spawn(move || {
            // The receiver is gone when the patience was over: then nobody is interested.
            let _ = sender.send(command());
        })
        .map_err(|e| Error::io("cannot start a thread", e))?;
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Io,
            format!(
                "{name} did not return within {} s: the kernel's ublk driver hangs, see dmesg; the machine may need a \
                 reboot, or another kernel (6.17 and early 6.18 are known for it)",
                PATIENCE.as_secs()
            ),
        ))
    })
}
