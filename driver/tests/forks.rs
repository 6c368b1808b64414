//! Clients of the byte door that fork. Every child checks what it has and ends with a status; one that hangs is killed.

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
use parking_lot::Mutex;
use support::child::status_of;
use support::{Place, V1};
use tidegate_driver::bytes::client::{Device, Options};
use tidegate_driver::bytes::gate::{Access, Gate};
use tidegate_driver::bytes::ties::Ties;
use tidegate_driver::bytes::{Completion, Failure, Operation, Submission};
use tidegate_driver::format::volume_entry::AckLevel;

const PATIENCE: Duration = Duration::from_secs(20);

/// Sockets of other tests would be taken for the client's.
static ALONE: Mutex<()> = Mutex::new(());

/// Waits until a thread of this process sleeps: here, in a call that waits for a server that has nothing to say.
fn until_it_sleeps(thread: Pid) {
    let sleeps = || {
        let line = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
        line.rsplit_once(") ").unwrap().1.starts_with('S')
    };
    while !sleeps() {
        thread::yield_now();
    }
}

fn served(place: &Place) -> (Gate, String) {
    let path = place.path("v0.sock");
    let engine = place.open().unwrap();
    let gate = Gate::open(engine, Arc::new(Ties::default()), V1, &path, Access::default()).unwrap();
    (gate, path.to_str().unwrap().to_owned())
}

#[test]
fn a_child_keeps_files_that_have_numbers_of_sockets_that_were_closed() {
    let _alone = ALONE.lock();
    let nobody = std::env::temp_dir().join(format!("tidegate-forks-{}.sock", std::process::id()));
    let (over, file) = (AtomicBool::new(false), AtomicI32::new(-1));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let failure = Device::open(nobody.to_str().unwrap(), &Options::default()).unwrap_err();
                assert_eq!(failure.errno.0, libc::ENOENT);
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let it = File::open("/dev/null").unwrap();
                file.store(it.as_raw_fd(), Ordering::SeqCst);
                thread::yield_now();
                file.store(-1, Ordering::SeqCst);
            }
        });
        let statuses = (0..2000).map(|_| {
            status_of(PATIENCE, || match file.load(Ordering::SeqCst) {
                -1 => 0,
                #[expect(unsafe_code, reason = "a descriptor of a thread that is not here")]
                fd => {
                    // SAFETY: nobody closes it in this process.
                    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
                    // It may have been opened too late for this process, which then has none.
                    i32::from(fstat(fd).is_ok_and(|it| {
                        SFlag::from_bits_truncate(it.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK
                    }))
                }
            })
        });
        let damaged = statuses.filter(|status| *status != 0).count();
        over.store(true, Ordering::Relaxed);
        assert_eq!(damaged, 0, "children that have a socket for a file");
    });
}

#[test]
fn a_child_can_do_nothing_with_a_session_and_its_parent_does_not_notice() {
    let _alone = ALONE.lock();
    let place = Place::new(64 << 20, &[AckLevel::Log]);
    let (_gate, path) = served(&place);
    let device = Device::open(&path, &Options::default()).unwrap();
    device.write(0, &[b"before"], 0).unwrap();
    let ticket = device.durable();
    let polled = device.event_fd().as_raw_fd();
    let refused =
        |result: Result<(), Failure>| result.is_err_and(|failure| failure.errno.0 == libc::ENOTCONN);
    let (tell, number) = mpsc::channel();
    thread::scope(|scope| {
        let leader = scope.spawn(|| {
            tell.send(nix::unistd::gettid()).unwrap();
            let used = || {
                let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
                (usage.user_time() + usage.system_time()).num_milliseconds()
            };
            let before = used();
            let count = device.reap(&mut [Completion::default()], Some(Duration::from_millis(1500))).unwrap();
            (count, used() - before)
        });
        until_it_sleeps(number.recv().unwrap());
        let status = status_of(PATIENCE, || {
            let nothing = Submission { operation: Operation::Flush as u8, ..Submission::default() };
            let some = &mut [Completion::default()];
            device.interrupt();
            let calls = [
                refused(device.submit(&[nothing]).map(drop)),
                refused(device.reap(some, None).map(drop)),
                refused(device.reap(some, Some(Duration::ZERO)).map(drop)),
                refused(device.persist(ticket, None)),
                refused(device.wait_for_room(1, None).map(drop)),
                refused(device.write(0, &[b"child"], 0).map(drop)),
                refused(device.write_async(0, &[b"child"], 0).map(drop)),
                refused(device.read(0, &mut [0; 5])),
                refused(device.write_zeroes(0, 5, 0).map(drop)),
                refused(device.flush()),
                refused(device.alloc(64).map(drop)),
                refused(device.free(0)),
            ];
            if let Some(at) = calls.iter().position(|refused| !refused) {
                return 10 + at as i32;
            }
            let mut polled = libc::pollfd { fd: polled, events: libc::POLLIN, revents: 0 };
            #[expect(unsafe_code, reason = "the descriptor as C has it")]
            // SAFETY: one structure.
            let ready = unsafe { libc::poll(&raw mut polled, 1, 0) };
            i32::from(ready != 1 || device.event_fd().as_raw_fd() != polled.fd)
        });
        let (count, milliseconds) = leader.join().unwrap();
        assert!(milliseconds < 200, "waiting took {milliseconds} ms of a processor");
        assert_eq!((count, status), (0, 0));
    });
    let mut back = [0; 6];
    device.read(0, &mut back).unwrap();
    assert_eq!(&back, b"before");
}
