//! Start, recover, resize and stop a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tidegate_driver::base::{Error, ErrorKind, Result};
use tidegate_driver::io::uring::Waker;
use tidegate_driver::volume::Wake;

use crate::ctrl::Control;
use crate::info::{block_path, char_path};
use crate::params::{DeviceConfig, check_granted};
use crate::queue::{self, DoorFactory, QueueSetup, Step};
use crate::sys::{self, DevInfo};

/// Where a device comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new one.
    New,
    /// One whose server died. Number, queues, depth and largest request stay what they are; the configuration's are
    /// not looked at. Requests that the dead server had are sent again.
    Recover {
        /// Its number.
        device_id: u32,
    },
}

/// How insistent [`Device::stop`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Fails with kind `Busy` while the block device is open or mounted.
    RefuseIfOpen,
    /// Stops under whoever uses it; their further requests fail.
    Force,
}

/// How long recovery waits for the kernel to notice that the old server is gone (it does within milliseconds after the
/// last thread of the process ended, but a process may take its time to end).
const RECOVERY_PATIENCE: Duration = Duration::from_secs(15);
/// How long the nodes in /dev may take to appear.
const NODE_PATIENCE: Duration = Duration::from_secs(5);

/// A device that this process serves.
///
/// Dropping it leaves the device and its threads as they are: the process goes on serving, and when it ends the device
/// waits for a server that recovers it. [`Device::stop`] is the way to end a device.
#[derive(Debug)]
pub struct Device {
    device_id: u32,
    flags: u64,
    threads: Vec<JoinHandle<()>>,
    /// `None` once stopped.
    cdev: Option<Arc<File>>,
}

impl Device {
    /// Starts a device. When this returns the block device is there and served.
    pub fn start<F: DoorFactory + 'static>(
        config: &DeviceConfig,
        start: Start,
        factory: Arc<F>,
    ) -> Result<Device> {
        config.validate()?;
        match start {
            Start::New => Device::start_new(config, factory),
            Start::Recover { device_id } => Device::recover(config, device_id, factory),
        }
    }

    fn start_new<F: DoorFactory + 'static>(config: &DeviceConfig, factory: Arc<F>) -> Result<Device> {
        let mut control = Control::open()?;
        let info = Control::add(config.dev_info())?;
        let started = check_granted(info.flags)
            .and_then(|()| control.set_params(info.dev_id, config.params(info.max_io_buf_bytes)))
            .and_then(|()| {
                Device::serve(config, &mut control, &info, factory, |_, _| Ok(()), Control::start)
            });
        if started.is_err() {
            // Nobody saw the device yet.
            if let Err(e) = Control::delete(info.dev_id) {
                tracing::warn!(
                    device = info.dev_id,
                    "a device that did not start stays behind: {}",
                    e.report()
                );
            }
        }
        started
    }

    fn recover<F: DoorFactory + 'static>(
        config: &DeviceConfig,
        device_id: u32,
        factory: Arc<F>,
    ) -> Result<Device> {
        let mut control = Control::open()?;
        let info = control.info(device_id)?;
        if info.ublksrv_flags != config.identity || config.identity == 0 {
            return Err(Error::new(
                ErrorKind::Foreign,
                format!(
                    "ublk device {device_id} belongs to something else (identity {:#x}, expected {:#x}): not taken over",
                    info.ublksrv_flags, config.identity
                ),
            ));
        }
        check_granted(info.flags)?;
        let params = control.params(device_id)?;
        let size_bytes = params.basic.dev_sectors * 512;
        let block = 1u64 << params.basic.logical_bs_shift.min(63);
        if block != u64::from(config.logical_block_bytes) || size_bytes > config.size_bytes {
            return Err(Error::new(
                ErrorKind::WrongDevice,
                format!(
                    "ublk device {device_id} has {size_bytes} bytes in blocks of {block}, expected {} in blocks of {}: not \
                     taken over",
                    config.size_bytes, config.logical_block_bytes
                ),
            ));
        }
        let mut begun_before = false;
        let begin = |control: &mut Control, info: &DevInfo| {
            begun_before = begin_recovery(control, info)?;
            Ok(())
        };
        let served = Device::serve(config, &mut control, &info, factory, begin, Control::end_recovery);
        let device = served.map_err(|e| if begun_before { half_recovered(device_id, e) } else { e })?;
        if size_bytes < config.size_bytes
            && let Err(e) = device.resize(config.size_bytes)
        {
            // Clients that have waited come first; they see what is new when the device is attached the next time.
            tracing::warn!(device = device_id, "recovered with its old size: {}", e.report());
        }
        Ok(device)
    }

    /// Prepares the queues, has `begin` ready the device for them, opens it, lets them fetch, and has `go` make the device
    /// live.
    fn serve<F: DoorFactory + 'static>(
        config: &DeviceConfig,
        control: &mut Control,
        info: &DevInfo,
        factory: Arc<F>,
        begin: impl FnOnce(&mut Control, &DevInfo) -> Result<()>,
        go: fn(&mut Control, u32) -> Result<()>,
    ) -> Result<Device> {
        let device_id = info.dev_id;
        let mut queues = Queues::default();
        let outcome = (|| {
            queues.prepare(config, control, info, &factory)?;
            begin(control, info)?;
            let cdev = Arc::new(open_char_device(device_id)?);
            queues.advance(&Step::Open(Arc::clone(&cdev)))?;
            queues.advance(&Step::Fetch)?;
            go(control, device_id)?;
            Ok(cdev)
        })();
        let cdev = match outcome {
            Ok(cdev) => cdev,
            Err(e) => {
                queues.give_up();
                return Err(e);
            }
        };
        if let Err(e) = wait_for_block_device(device_id) {
            tracing::warn!(device = device_id, "{}", e.report());
        }
        Ok(Device { device_id, flags: info.flags, threads: queues.threads, cdev: Some(cdev) })
    }

    /// Number of the device.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.device_id
    }

    /// Path of the block device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        block_path(self.device_id)
    }

    /// Granted `sys::F_*` flags.
    #[must_use]
    pub fn flags(&self) -> u64 {
        self.flags
    }

    /// Whether payload moves by user copy (rather than through the tags' buffers).
    #[must_use]
    pub fn user_copy(&self) -> bool {
        self.flags & sys::F_USER_COPY != 0
    }

    /// Whether every queue's thread has ended: the device was stopped, perhaps by somebody else.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Whether somebody else has stopped the device.
    #[must_use]
    pub fn ended_by_others(&self) -> bool {
        self.cdev.is_some() && self.ended()
    }

    /// Changes the size that clients see. Growing: first make what is behind the device larger. Shrinking is not
    /// refused here; clients lose what is beyond. Kind `Unsupported` before Linux 6.16.
    pub fn resize(&self, new_bytes: u64) -> Result<()> {
        if new_bytes == 0 || !new_bytes.is_multiple_of(512) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("size of {new_bytes} bytes: use a multiple of the block"),
            ));
        }
        if self.flags & sys::F_UPDATE_SIZE == 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "this kernel cannot resize a live ublk device ({}): detach and attach it, or use Linux 6.16 or newer",
                    self.path().display()
                ),
            ));
        }
        Control::open()?.update_size(self.device_id, new_bytes)
    }

    /// Who uses the block device, in words; `None` if nobody does as far as can be seen: exclusive users (mounts, swap,
    /// device mapper) always can, plain openers if their process can be looked into.
    pub fn in_use(&self) -> Result<Option<String>> {
        let path = self.path();
        let what = path.display();
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) if metadata.file_type().is_block_device() => metadata,
            _ => return Ok(None),
        };
        if let Some(name) = first_holder(self.device_id) {
            return Ok(Some(format!("{what} is used by block device {name}")));
        }
        match OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&path) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Ok(Some(match mount_point(metadata.rdev()) {
                    Some(at) => format!("{what} is mounted at {at}"),
                    None => format!("{what} is in exclusive use (mounted, swap, or part of another device)"),
                }));
            }
            Err(e) => return Err(Error::io(format!("cannot tell whether {what} is in use"), e)),
        }
        Ok(opener(metadata.rdev()).map(|pid| format!("{what} is open in process {pid}")))
    }

    /// Ends the device: requests in flight are finished, the block device disappears, the queue threads end, the device
    /// is deleted. On error with kind `Busy` nothing has changed. Stopping twice is fine.
    pub fn stop(&mut self, mode: StopMode) -> Result<()> {
        if self.cdev.is_none() {
            return Ok(());
        }
        let mut control = Control::open()?;
        let stopped = match mode {
            StopMode::Force => control.stop(self.device_id),
            StopMode::RefuseIfOpen => self.stop_unless_open(&mut control),
        };
        match stopped {
            // Somebody else has stopped or deleted it: the threads end, or have.
            Err(e) if e.kind() == ErrorKind::NotFound || (e.kind() != ErrorKind::Busy && self.ended()) => {}
            stopped => stopped?,
        }
        self.join();
        // Whoever still has the block device open (force) keeps its number taken, and must not keep us waiting.
        let deleted = match Control::delete_in_use(self.device_id) {
            Err(e) if e.kind() == ErrorKind::NotFound => true,
            deleted => deleted?,
        };
        if !deleted {
            tracing::warn!(
                device = self.device_id,
                "stopped while open: the number is free once it is closed"
            );
        }
        Ok(())
    }

    fn stop_unless_open(&self, control: &mut Control) -> Result<()> {
        let busy = |who: String| {
            Err(Error::new(ErrorKind::Busy, format!("{who}: close or unmount it first, or force the detach")))
        };
        if self.flags & sys::F_SAFE_STOP_DEV == 0 {
            // Somebody may open the device between the look and the stop; only newer kernels rule that out.
            return match self.in_use()? {
                Some(who) => busy(who),
                None => control.stop(self.device_id),
            };
        }
        match control.try_stop(self.device_id) {
            Err(e) if e.kind() == ErrorKind::Busy => {
                let who = self.in_use().ok().flatten();
                busy(who.unwrap_or_else(|| format!("{} is open", self.path().display())))
            }
            other => other,
        }
    }

    /// Hands the device over: requests in flight are finished, this process lets go of it, and clients wait until a
    /// server recovers it. Kind `Unsupported`, and nothing changed, before Linux 6.16 (there, end the process: the
    /// requests that it had are sent again).
    ///
    /// Kind `Busy` if requests do not finish within `patience`. The driver holds back new requests from the moment that
    /// it is asked, and does not take that back: they wait for another server. So after any error of this kind the
    /// process must end too, and what it still has in flight is sent again.
    pub fn quiesce(&mut self, patience: Duration) -> Result<()> {
        if self.cdev.is_none() {
            return Ok(());
        }
        if self.flags & sys::F_QUIESCE == 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("this kernel cannot hand over {}: needs Linux 6.16", self.path().display()),
            ));
        }
        Control::open()?.quiesce(self.device_id, patience)?;
        self.join();
        Ok(())
    }

    /// Waits for the queue threads, which end when the kernel has given every tag up, and lets go of the char device:
    /// their mappings and rings are gone with them.
    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A thread that panicked has taken the process with it.
            let _ = thread.join();
        }
        self.cdev = None;
    }
}

/// Begins to take over a device. Until the queues have fetched every tag there is no way back on older kernels: another
/// attempt is refused (`EINVAL`), having happened already. Whether that was so.
fn begin_recovery(control: &mut Control, info: &DevInfo) -> Result<bool> {
    match control.start_recovery(info.dev_id, RECOVERY_PATIENCE) {
        Ok(()) => Ok(false),
        Err(e) if e.kind() == ErrorKind::Busy => Err(Error::new(
            ErrorKind::Busy,
            format!(
                "ublk device {} cannot be taken over: process {} still serves it or has not ended",
                info.dev_id, info.ublksrv_pid
            ),
        )),
        Err(e) if is_invalid(&e) && waits(control, info.dev_id) => {
            tracing::warn!(device = info.dev_id, "its recovery was begun before: going on with that");
            Ok(true)
        }
        Err(e) => Err(e),
    }
}

/// The error of a recovery that went on with one begun before. A server that was killed after it had mapped the queues
/// or fetched tags, and before the end of its recovery, stays their owner for older kernels: they refuse everybody else.
fn half_recovered(device_id: u32, e: Error) -> Error {
    if !matches!(errno_of(&e), Some(libc::EINVAL | libc::EBUSY)) {
        return e;
    }
    let what = format!(
        "ublk device {device_id} cannot be served any more: a server was killed in the middle of taking it over, and this \
         kernel does not let another one finish ({}); only a reboot removes the device, its clients wait until then. What was \
         accepted is in the stage and loses nothing by it; newer kernels (7.2) do not have this fault",
        e.report()
    );
    Error::new(ErrorKind::Unsupported, what)
}

fn errno_of(e: &Error) -> Option<i32> {
    let source = std::error::Error::source(e).and_then(|source| source.downcast_ref::<io::Error>());
    source.and_then(io::Error::raw_os_error)
}

fn is_invalid(e: &Error) -> bool {
    errno_of(e) == Some(libc::EINVAL)
}

fn waits(control: &mut Control, device_id: u32) -> bool {
    control.info(device_id).is_ok_and(|info| matches!(info.state, sys::S_DEV_QUIESCED | sys::S_DEV_FAIL_IO))
}

/// The queue threads of a device that is being started. They go step by step, all together.
#[derive(Default)]
struct Queues {
    threads: Vec<JoinHandle<()>>,
    steps: Vec<mpsc::Sender<Step>>,
    ready: Option<mpsc::Receiver<Result<Waker>>>,
    wakers: Vec<Waker>,
    give_up: Arc<AtomicBool>,
}

impl Queues {
    /// Starts the threads, which make all that they need but the device itself.
    fn prepare<F: DoorFactory + 'static>(
        &mut self,
        config: &DeviceConfig,
        control: &mut Control,
        info: &DevInfo,
        factory: &Arc<F>,
    ) -> Result<()> {
        let (ready, readiness) = mpsc::sync_channel(usize::from(info.nr_hw_queues));
        self.ready = Some(readiness);
        for queue in 0..info.nr_hw_queues {
            let setup = QueueSetup {
                device_id: info.dev_id,
                queue,
                depth: info.queue_depth,
                max_io_bytes: info.max_io_buf_bytes,
                user_copy: info.flags & sys::F_USER_COPY != 0,
                client_memory: info.flags & sys::F_AUTO_BUF_REG != 0,
                poll: config.poll,
                cpus: control.queue_affinity(info.dev_id, queue).unwrap_or_default(),
                give_up: Arc::clone(&self.give_up),
            };
            let (step, steps) = mpsc::channel();
            let (factory, ready) = (Arc::clone(factory), ready.clone());
            let thread = std::thread::Builder::new()
                .name(format!("ublk{}-q{queue}", info.dev_id))
                .spawn(move || queue::run(setup, &*factory, &steps, &ready))
                .map_err(|e| Error::io("cannot start a queue thread", e))?;
            self.threads.push(thread);
            self.steps.push(step);
        }
        self.wait()
    }

    /// Has all threads take a step.
    fn advance(&mut self, step: &Step) -> Result<()> {
        for thread in &self.steps {
            // One that has ended has said why.
            let _ = thread.send(step.clone());
        }
        self.wait()
    }

    /// Waits for one answer of each thread.
    fn wait(&mut self) -> Result<()> {
        let mut failure = None;
        self.wakers.clear();
        for outcome in self.ready.iter().flatten().take(self.threads.len()) {
            match outcome {
                Ok(waker) => self.wakers.push(waker),
                Err(e) => failure = Some(e),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Ends the threads of a device that does not start. Their fetches are cancelled with their rings.
    fn give_up(self) {
        self.give_up.store(true, Ordering::Release);
        drop(self.steps);
        for waker in &self.wakers {
            waker.wake();
        }
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn open_char_device(device_id: u32) -> Result<File> {
    let path = char_path(device_id);
    let deadline = Instant::now() + NODE_PATIENCE;
    loop {
        // Not blocking: user copy through io_uring would go to a worker thread otherwise. Close-on-exec: a child that
        // inherits it keeps the device from ever being recovered.
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(&path);
        match opened {
            Ok(file) => return Ok(file),
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EBUSY | libc::ENXIO))
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                let what = format!("{} is open in another process: end that one first", path.display());
                return Err(Error::new(ErrorKind::Busy, what));
            }
            Err(e) => return Err(Error::io(format!("cannot open {}", path.display()), e)),
        }
    }
}

fn wait_for_block_device(device_id: u32) -> Result<()> {
    let path = block_path(device_id);
    let deadline = Instant::now() + NODE_PATIENCE;
    while !path.exists() {
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{} has not appeared: is devtmpfs mounted on /dev, or udev running?", path.display()),
            ));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn first_holder(device_id: u32) -> Option<String> {
    let entry = std::fs::read_dir(format!("/sys/block/ublkb{device_id}/holders")).ok()?.next()?.ok()?;
    Some(entry.file_name().to_string_lossy().into_owned())
}

/// Where the device is mounted, as process 1 sees it (this process may have mounts of its own).
fn mount_point(rdev: u64) -> Option<String> {
    let device = format!("{}:{}", libc::major(rdev), libc::minor(rdev));
    ["/proc/1/mountinfo", "/proc/self/mountinfo"].iter().find_map(|table| {
        let table = std::fs::read_to_string(table).ok()?;
        table.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(2);
            (fields.next()? == device).then(|| fields.nth(1).unwrap_or("?").to_owned())
        })
    })
}

/// A process that has the block device `rdev` open.
fn opener(rdev: u64) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").ok()?;
    processes.filter_map(|process| process.ok()?.file_name().to_str()?.parse::<u32>().ok()).find(|pid| {
        let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        fds.filter_map(io::Result::ok).any(|fd| {
            // Only links that look like devices are followed: asking others (network mounts) may block.
            std::fs::read_link(fd.path()).is_ok_and(|target| target.starts_with("/dev"))
                && std::fs::metadata(fd.path())
                    .is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == rdev)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_that_cannot_be_finished_says_what_helps() {
        for errno in [libc::EINVAL, libc::EBUSY] {
            let e = half_recovered(3, Error::io("cannot map", io::Error::from_raw_os_error(errno)));
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(e.report().contains("only a reboot removes the device"), "{}", e.report());
        }
        let other = half_recovered(3, Error::io("cannot map", io::Error::from_raw_os_error(libc::ENOMEM)));
        assert_eq!(other.report(), "cannot map: Cannot allocate memory (os error 12)");
    }
}
