//! How the two sides wait for each other, tried under schedules (shuttle) and under every order that the memory model allows
//! (loom), within bounds: the code is that of the programs, the memory, the lock, the socket and the bell are the checker's.
//!
//! Whoever waits in vain is found as a deadlock: all threads wait.

mod orders;
mod schedules;

/// What the checkers have in common, made of the types of one of them.
macro_rules! model {
    ($sync:path, $thread:path) => {
        use std::collections::{BTreeMap, VecDeque};
        use std::time::{Duration, Instant};

        use nix::errno::Errno;
        use zerocopy::{FromBytes, Immutable, IntoBytes};
        use $sync as sync;
        #[allow(unused_imports, reason = "one checker needs it, the other does not")]
        use $thread as thread;

        use self::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
        use self::sync::{Condvar, Mutex, MutexGuard};
        use crate::bytes::Operation;
        use crate::bytes::client::ground::{Ground, Turn};
        use crate::bytes::client::rings::{Reaper, Submitter};
        use crate::bytes::client::space::Parts;
        use crate::bytes::client::wait::Waiting;
        use crate::bytes::session::{Next, Progress, Session};
        use crate::bytes::shared::{Shared, Word};
        use crate::bytes::ties::Ties;
        use crate::bytes::{Completion, Submission};
        use crate::format::byte_ring::{
            ACCEPTED, CLIENT_WAITS, COMPLETION_HEAD, COMPLETION_TAIL, DURABLE_UP_TO, RingLayout,
            SERVER_SLEEPS, SUBMISSION_HEAD, SUBMISSION_TAIL, VOLUME_BYTES,
        };
        use crate::volume::Wake;

        impl Word<u32> for AtomicU32 {
            fn load(&self, order: Ordering) -> u32 {
                AtomicU32::load(self, order)
            }

            fn store(&self, value: u32, order: Ordering) {
                // A swap, because loom lets a store come between a swap and what that has read, which no memory does.
                AtomicU32::swap(self, value, order);
            }

            fn swap(&self, value: u32, order: Ordering) -> u32 {
                AtomicU32::swap(self, value, order)
            }
        }

        impl Word<u64> for AtomicU64 {
            fn load(&self, order: Ordering) -> u64 {
                AtomicU64::load(self, order)
            }

            fn store(&self, value: u64, order: Ordering) {
                AtomicU64::store(self, value, order);
            }

            fn swap(&self, value: u64, order: Ordering) -> u64 {
                AtomicU64::swap(self, value, order)
            }
        }

        const VOLUME: u64 = 1 << 20;

        /// Both sides of a session.
        struct Both {
            layout: RingLayout,
            memory: std::sync::Arc<Memory>,
            session: Session<Memory>,
            bell: std::sync::Arc<Bell>,
            line: std::sync::Arc<Model>,
            waiting: std::sync::Arc<Waiting<std::sync::Arc<Model>>>,
        }

        /// A session with so many slots: fewer than programs have, so that every state of the rings comes soon.
        fn both(depth: u32, chance: fn() -> bool) -> Both {
            let layout = RingLayout { depth, arena_bytes: 4096 };
            let memory = std::sync::Arc::new(Memory::new(layout));
            let bell = std::sync::Arc::new(Bell::default());
            let line = Model::new(&bell, chance);
            let session = session(&memory, layout);
            let waiting = std::sync::Arc::new(Waiting::new(line.clone()));
            Both { layout, memory, session, bell, line, waiting }
        }

        /// A session's memory. A slot of a ring holds the number of what was put there, as one word that is as old as the
        /// memory model allows: what is read before it is there is seen.
        struct Memory {
            words: BTreeMap<usize, AtomicU64>,
            flags: BTreeMap<usize, AtomicU32>,
            puts: std::sync::Mutex<Vec<Vec<u8>>>,
        }

        impl Memory {
            fn new(layout: RingLayout) -> Memory {
                let slots = (0..u64::from(layout.depth)).map(|n| layout.submission(n));
                let slots =
                    slots.chain((0..u64::from(layout.completion_depth())).map(|n| layout.completion(n)));
                let words = [SUBMISSION_TAIL, SUBMISSION_HEAD, COMPLETION_TAIL, COMPLETION_HEAD, ACCEPTED];
                let words = words.into_iter().chain([DURABLE_UP_TO, VOLUME_BYTES]).chain(slots);
                Memory {
                    words: words.map(|at| (at, AtomicU64::new(0))).collect(),
                    flags: [CLIENT_WAITS, SERVER_SLEEPS].map(|at| (at, AtomicU32::new(0))).into(),
                    puts: std::sync::Mutex::default(),
                }
            }
        }

        impl Shared for Memory {
            type Word = AtomicU64;
            type Flag = AtomicU32;

            fn len_bytes(&self) -> usize {
                usize::MAX
            }

            fn word(&self, at: usize) -> &AtomicU64 {
                &self.words[&at]
            }

            fn flag(&self, at: usize) -> &AtomicU32 {
                &self.flags[&at]
            }

            fn fence() {
                fence(Ordering::SeqCst);
            }

            fn image<T: FromBytes + IntoBytes>(&self, at: usize) -> T {
                let number = Word::load(&self.words[&at], Ordering::Relaxed) as usize;
                assert!(number > 0, "a slot is read before something is put there");
                T::read_from_bytes(&self.puts.lock().unwrap()[number - 1]).ok().expect("of its size")
            }

            fn put_image<T: IntoBytes + Immutable>(&self, at: usize, image: &T) {
                let number = {
                    let mut puts = self.puts.lock().unwrap();
                    puts.push(image.as_bytes().to_vec());
                    puts.len() as u64
                };
                Word::store(&self.words[&at], number, Ordering::Relaxed);
            }

            fn copy_out(&self, _: usize, _: &mut [u8]) {}

            fn copy_in(&self, _: usize, _: &[u8]) {}

            fn give_back(&self) {}
        }

        /// The server's bell: whoever waits for it is woken once for all that rang.
        #[derive(Default)]
        struct Bell {
            rung: Mutex<bool>,
            changed: Condvar,
        }

        impl Bell {
            fn ring(&self) {
                *self.rung.lock().unwrap() = true;
                self.changed.notify_one();
            }

            fn wait(&self) {
                let mut rung = self.rung.lock().unwrap();
                while !*rung {
                    rung = self.changed.wait(rung).unwrap();
                }
                *rung = false;
            }
        }

        struct Quiet;

        impl Wake for Quiet {
            fn wake(&self) {}
        }

        /// Everything is durable as soon as it is placed.
        fn progress(placed: u64) -> Progress {
            let now = crate::base::Lsn(placed);
            Progress { published: now, durable: now, volume_bytes: VOLUME }
        }

        fn session(memory: &std::sync::Arc<Memory>, layout: RingLayout) -> Session<Memory> {
            let ties = std::sync::Arc::new(Ties::default());
            let number = ties.begin(std::sync::Arc::new(Quiet)).unwrap();
            Session::new(number, memory.clone(), layout, 4096, ties, progress(0))
        }

        /// The session's thread, as `serve.rs` has it, over a door that is done at once: serves requests behind those
        /// `before` until there were `count` of them.
        fn serve(
            session: &mut Session<Memory>,
            bell: &Bell,
            (before, count): (u64, u64),
            mut wake_client: impl FnMut(),
        ) {
            let mut placed = before;
            while placed < count {
                let next = session.take();
                match &next {
                    Next::Request(request) => {
                        placed += 1;
                        assert_eq!(request.offset, placed, "a request is taken before it is there");
                        session.placed(request.tag, crate::base::Lsn(placed));
                        session.complete(request.tag, Ok(()));
                    }
                    Next::Nothing | Next::Full => {}
                    other => panic!("{other:?}"),
                }
                if session.tell(progress(placed)) {
                    wake_client();
                }
                if matches!(next, Next::Nothing | Next::Full) && session.may_sleep(false) {
                    bell.wait();
                    session.awake();
                }
            }
        }

        fn submitter() -> Submitter {
            Submitter::new(&Parts::of(1 << 20))
        }

        /// A write whose place in the order can be told from it.
        fn write(submitter: &Submitter) -> Submission {
            let number = submitter.tail + 1;
            Submission {
                operation: Operation::Write as u8,
                offset: number,
                len: 1,
                cookie: number,
                ..Submission::default()
            }
        }

        /// Takes completions and rings if the server waits for that; those that the program has not got yet.
        fn collect(reaper: &mut Reaper, memory: &Memory, layout: RingLayout, bell: &Bell) -> Vec<Completion> {
            if reaper.collect(memory, &layout) {
                bell.ring();
            }
            reaper.ready.drain(..).collect()
        }

        /// What the client's threads wait on. `chance` says of a wait whether its time is over first; time is what was waited.
        struct Model {
            turn: Mutex<Turn>,
            changed: Condvar,
            line: Mutex<Line>,
            heard: Condvar,
            bell: std::sync::Arc<Bell>,
            start: Instant,
            waited: std::sync::Mutex<Duration>,
            chance: fn() -> bool,
        }

        #[derive(Default)]
        struct Line {
            bytes: VecDeque<u8>,
            is_nudged: bool,
            is_gone: bool,
        }

        impl Model {
            fn new(bell: &std::sync::Arc<Bell>, chance: fn() -> bool) -> std::sync::Arc<Model> {
                std::sync::Arc::new(Model {
                    turn: Mutex::default(),
                    changed: Condvar::new(),
                    line: Mutex::default(),
                    heard: Condvar::new(),
                    bell: bell.clone(),
                    start: Instant::now(),
                    waited: std::sync::Mutex::default(),
                    chance,
                })
            }

            /// The server's end of the socket.
            fn send(&self, change: impl FnOnce(&mut Line)) {
                change(&mut self.line.lock().unwrap());
                self.heard.notify_one();
            }

            fn wake_client(&self) {
                self.send(|line| line.bytes.push_back(1));
            }
        }

        impl Ground for std::sync::Arc<Model> {
            type Held<'a> = MutexGuard<'a, Turn>;

            fn turn(&self) -> MutexGuard<'_, Turn> {
                self.turn.lock().unwrap()
            }

            fn sit<'a>(
                &'a self,
                turn: MutexGuard<'a, Turn>,
                deadline: Option<Instant>,
            ) -> MutexGuard<'a, Turn> {
                match deadline {
                    Some(deadline) if (self.chance)() => {
                        let left = deadline.saturating_duration_since(self.now());
                        *self.waited.lock().unwrap() += left;
                        drop(turn);
                        thread::yield_now();
                        Ground::turn(self)
                    }
                    _ => self.changed.wait(turn).unwrap(),
                }
            }

            fn tell(&self) {
                self.changed.notify_all();
            }

            fn listen(&self, left: Option<Duration>) {
                if let Some(left) = left.filter(|_| (self.chance)()) {
                    *self.waited.lock().unwrap() += left;
                    return thread::yield_now();
                }
                let mut line = self.line.lock().unwrap();
                while line.bytes.is_empty() && !line.is_nudged && !line.is_gone {
                    line = self.heard.wait(line).unwrap();
                }
            }

            fn nudge(&self) {
                self.send(|line| line.is_nudged = true);
            }

            fn calm(&self) {
                self.line.lock().unwrap().is_nudged = false;
            }

            fn take(&self, into: &mut [u8]) -> Result<usize, Errno> {
                let mut line = self.line.lock().unwrap();
                let len = line.bytes.len().min(into.len());
                into.iter_mut().zip(line.bytes.drain(..len)).for_each(|(to, byte)| *to = byte);
                if len == 0 && !line.is_gone { Err(Errno::EAGAIN) } else { Ok(len) }
            }

            fn ring(&self) {
                self.bell.ring();
            }

            fn now(&self) -> Instant {
                self.start + *self.waited.lock().unwrap()
            }
        }
    };
}

use model;
