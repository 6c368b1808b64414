//! Many schedules of many threads, with time that passes, servers that end, and calls that are interrupted.

super::model!(shuttle::sync, shuttle::thread);

use shuttle::rand::Rng;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use std::sync::Arc;

const CLIENTS: u64 = 3;
const WRITES: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(1);

fn by_chance() -> bool {
    shuttle::rand::thread_rng().gen_bool(0.3)
}

/// Random schedules, and such with few but well-placed changes of threads.
fn check(model: impl Fn() + Copy + Send + Sync + 'static) {
    let config = shuttle::Config::new;
    shuttle::Runner::new(RandomScheduler::new(1500), config()).run(model);
    shuttle::Runner::new(PctScheduler::new(3, 1500), config()).run(model);
}

/// The client's side, as `client.rs` has it.
struct Client {
    layout: RingLayout,
    memory: Arc<Memory>,
    bell: Arc<Bell>,
    waiting: Arc<Waiting<Arc<Model>>>,
    submitter: Mutex<Submitter>,
    reaper: Mutex<(Reaper, u64)>,
}

impl Client {
    fn new(both: &Both) -> Arc<Client> {
        Arc::new(Client {
            layout: both.layout,
            memory: both.memory.clone(),
            bell: both.bell.clone(),
            waiting: both.waiting.clone(),
            submitter: Mutex::new(submitter()),
            reaper: Mutex::default(),
        })
    }

    /// How many completions were taken.
    fn collect(&self) -> u64 {
        let mut reaper = self.reaper.lock().unwrap();
        let (reaper, count) = &mut *reaper;
        *count += collect(reaper, &self.memory, self.layout, &self.bell).len() as u64;
        *count
    }

    fn submit(&self) -> Option<u64> {
        let mut submitter = self.submitter.lock().unwrap();
        if !submitter.has_room(&*self.memory, &self.layout, 1) {
            drop(submitter);
            self.collect();
            return None;
        }
        let submission = write(&submitter);
        submitter.put(&*self.memory, &self.layout, &submission);
        if submitter.publish(&*self.memory) {
            self.waiting.ring();
        }
        Some(submission.cookie)
    }

    fn is_durable(&self, sequence: u64) -> Option<()> {
        (Word::load(self.memory.word(DURABLE_UP_TO), Ordering::Acquire) >= sequence).then_some(())
    }

    /// A write, and the wait for it: for ever, or in pieces until it is there.
    fn write(&self, in_pieces: bool) {
        let limit = self.waiting.limit(None);
        let sequence = self.waiting.until(&*self.memory, limit, || self.submit()).unwrap().unwrap();
        loop {
            let deadline = in_pieces.then(|| self.waiting.ground().now() + PATIENCE);
            let limit = self.waiting.limit(deadline);
            let done = || {
                // Some look for completions as well, as calls of programs do.
                if sequence.is_multiple_of(2) {
                    self.collect();
                }
                self.is_durable(sequence)
            };
            if self.waiting.until(&*self.memory, limit, done).unwrap().is_some() {
                return;
            }
        }
    }
}

/// Threads that submit when there is room and wait for what they have submitted, some of them in short pieces, with rings of
/// two entries.
#[test]
fn nobody_waits_in_vain() {
    check(|| {
        let mut both = both(2, by_chance);
        let client = Client::new(&both);
        let threads: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let client = client.clone();
                thread::spawn(move || (0..WRITES).for_each(|_| client.write(number == 1)))
            })
            .collect();
        // Room for completions is made by those who look for it, whatever they wait for.
        let taking = thread::spawn({
            let client = client.clone();
            move || {
                let all = || (client.collect() >= CLIENTS * WRITES).then_some(());
                client.waiting.until(&*client.memory, client.waiting.limit(None), all).unwrap().unwrap();
            }
        });
        let looking = thread::spawn({
            let client = client.clone();
            move || (0..3).for_each(|_| client.waiting.look())
        });
        let line = both.line.clone();
        serve(&mut both.session, &both.bell, (0, CLIENTS * WRITES), || line.wake_client());
        threads.into_iter().chain([taking, looking]).for_each(|thread| thread.join().unwrap());
    });
}

/// The server ends at any moment, with a last word that comes in pieces.
#[test]
fn all_hear_that_the_server_is_gone() {
    check(|| {
        let both = both(2, by_chance);
        let threads: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (waiting, memory) = (both.waiting.clone(), both.memory.clone());
                thread::spawn(move || {
                    if number == 1 {
                        waiting.look();
                    }
                    let outcome = waiting.until(&*memory, waiting.limit(None), || None::<()>);
                    assert_eq!(outcome.unwrap_err().errno.0, libc::ENOTCONN);
                    assert!(waiting.gone().unwrap().what.contains("over: bye"));
                })
            })
            .collect();
        let image = crate::format::byte_ring::WelcomeImage::refusal(libc::ESHUTDOWN, "bye");
        both.line.wake_client();
        both.line.send(|line| line.bytes.extend(&image.as_bytes()[..100]));
        both.line.send(|line| line.bytes.extend(&image.as_bytes()[100..]));
        both.line.send(|line| line.is_gone = true);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// Calls that have begun are interrupted, all of them, every time, though nothing else happens that could wake them.
#[test]
fn calls_that_have_begun_are_interrupted() {
    check(|| {
        let both = both(2, by_chance);
        for _ in 0..2 {
            let threads: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    let (waiting, memory) = (both.waiting.clone(), both.memory.clone());
                    let limit = waiting.limit(None);
                    thread::spawn(move || {
                        let outcome = waiting.until(&*memory, limit, || None::<()>);
                        assert_eq!(outcome.unwrap_err().errno.0, libc::EINTR);
                    })
                })
                .collect();
            both.waiting.interrupt();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        }
    });
}

/// Calls that have begun are interrupted, all of them and once; one that begins later waits on.
#[test]
fn interrupted_calls_return_and_later_ones_wait_on() {
    check(|| {
        let mut both = both(2, by_chance);
        let client = Client::new(&both);
        let begun: Vec<_> = (0..2).map(|_| client.waiting.limit(None)).collect();
        let threads: Vec<_> = begun
            .into_iter()
            .map(|limit| {
                let client = client.clone();
                thread::spawn(move || {
                    let outcome = client.waiting.until(&*client.memory, limit, || None::<()>);
                    assert_eq!(outcome.unwrap_err().errno.0, libc::EINTR);
                })
            })
            .collect();
        let interrupting = thread::spawn({
            let client = client.clone();
            move || {
                client.waiting.interrupt();
                client.write(false);
            }
        });
        let line = both.line.clone();
        serve(&mut both.session, &both.bell, (0, 1), || line.wake_client());
        threads.into_iter().chain([interrupting]).for_each(|thread| thread.join().unwrap());
    });
}
