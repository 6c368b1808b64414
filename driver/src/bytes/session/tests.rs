use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::Index;
use zerocopy::FromZeros;

use super::*;
use crate::volume::Wake;

struct Quiet;

impl Wake for Quiet {
    fn wake(&self) {}
}

const VOLUME_BYTES_NOW: u64 = 1 << 20;
const WRITE_MAX: u32 = 3000;

fn session() -> (Session, Arc<SharedMap>, RingLayout, Arc<Ties>) {
    let layout = RingLayout::new(8, 4096).unwrap();
    let memory = Arc::new(SharedMap::create(layout.memory_bytes()).unwrap());
    let ties = Arc::new(Ties::default());
    let number = ties.begin(Arc::new(Quiet)).unwrap();
    let session =
        Session::new(number, memory.clone(), layout, WRITE_MAX, ties.clone(), progress_at(Lsn(0), Lsn(0)));
    (session, memory, layout, ties)
}

fn progress_at(published: Lsn, durable: Lsn) -> Progress {
    Progress { published, durable, volume_bytes: VOLUME_BYTES_NOW }
}

fn put(memory: &SharedMap, layout: &RingLayout, number: u64, image: &SubmissionImage) {
    memory.put_image(layout.submission(number), image);
    memory.word(SUBMISSION_TAIL).store(number + 1, Ordering::Release);
}

fn image(operation: Operation, cookie: u64) -> SubmissionImage {
    let mut image = SubmissionImage::new_zeroed();
    image.operation = operation as u8;
    image.cookie = cookie.into();
    if !matches!(operation, Operation::Flush | Operation::Barrier) {
        image.len = 100.into();
    }
    image
}

/// A stage that gives places in order, publishes and commits when it likes, and a client that behaves.
struct Model {
    session: Session,
    memory: Arc<SharedMap>,
    layout: RingLayout,
    submitted: u64,
    reaped: u64,
    /// Requests that the door has: tag, whether it is a change and its place.
    open: Vec<(u32, bool, Option<Lsn>)>,
    waiting: std::collections::VecDeque<u32>,
    /// Have their place, and the session was not told yet: the word comes by another thread.
    granted: std::collections::VecDeque<(u32, u64)>,
    next_lsn: u64,
    published: u64,
    durable: u64,
    /// What each submission is, from 1 on.
    kinds: BTreeMap<u64, (Operation, u8)>,
    places: BTreeMap<u64, u64>,
    completed: BTreeMap<u64, i32>,
    fed: u64,
}

impl Model {
    fn new() -> Model {
        let (session, memory, layout, _) = session();
        Model {
            session,
            memory,
            layout,
            submitted: 0,
            reaped: 0,
            open: Vec::new(),
            waiting: Default::default(),
            granted: Default::default(),
            next_lsn: 1,
            published: 0,
            durable: 0,
            kinds: BTreeMap::new(),
            places: BTreeMap::new(),
            completed: BTreeMap::new(),
            fed: 0,
        }
    }

    fn word(&self, at: usize) -> u64 {
        self.memory.word(at).load(Ordering::Acquire)
    }

    fn submit(&mut self, operation: Operation, silent: bool) {
        if self.submitted - self.word(SUBMISSION_HEAD) >= u64::from(self.layout.depth) {
            return;
        }
        let mut image = image(operation, self.submitted + 1);
        if silent && !matches!(operation, Operation::Read | Operation::Flush | Operation::Barrier) {
            image.flags = SILENT;
        }
        put(&self.memory, &self.layout, self.submitted, &image);
        self.submitted += 1;
        self.kinds.insert(self.submitted, (operation, image.flags));
    }

    fn step(&mut self, full: bool) {
        match self.session.take() {
            Next::Request(request) => {
                self.fed += 1;
                let is_change = !matches!(request.kind, RequestKind::Read | RequestKind::Flush);
                let sequence = self.session.request(request.tag).sequence;
                assert_eq!(is_change, !matches!(self.kinds[&sequence].0, Operation::Read | Operation::Flush));
                if !is_change {
                    // B2: every earlier change is accepted.
                    let before = self.places.range(..sequence).map(|(_, lsn)| *lsn).max().unwrap_or(0);
                    assert!(
                        before <= self.published && self.waiting.is_empty() && self.granted.is_empty(),
                        "B2"
                    );
                    self.open.push((request.tag, false, None));
                } else if full || !self.waiting.is_empty() {
                    self.waiting.push_back(request.tag);
                } else {
                    self.place(request.tag);
                }
            }
            Next::Nothing | Next::Full | Next::Held | Next::Again => {}
            Next::Broken(what) => panic!("{what}"),
        }
    }

    fn place(&mut self, tag: u32) {
        let lsn = self.next_lsn;
        self.next_lsn += 1;
        self.told(tag, lsn);
    }

    /// The next that waits has its place; word of it is under way.
    fn grant(&mut self) {
        if let Some(tag) = self.waiting.pop_front() {
            self.granted.push_back((tag, self.next_lsn));
            self.next_lsn += 1;
        }
    }

    fn told(&mut self, tag: u32, lsn: u64) {
        let sequence = self.session.request(tag).sequence;
        let silent = |s: &u64| self.kinds[s].1 & SILENT != 0;
        let is_change =
            |s: &u64| !matches!(self.kinds[s].0, Operation::Read | Operation::Flush | Operation::Barrier);
        let refused =
            |s: &u64| is_change(s) && silent(s) && !self.places.contains_key(s) && self.is_refused(*s);
        let before: Vec<u64> = (1..sequence).filter(|s| refused(s)).collect();
        assert!(!silent(&sequence) || before.is_empty(), "B8: {sequence} behind {before:?}");
        self.places.insert(sequence, lsn);
        let places: Vec<u64> = self.places.values().copied().collect();
        assert!(places.is_sorted(), "B1");
        self.session.placed(tag, Lsn(lsn));
        self.open.push((tag, true, Some(Lsn(lsn))));
    }

    fn word_comes(&mut self) {
        if let Some((tag, lsn)) = self.granted.pop_front() {
            self.told(tag, lsn);
        }
    }

    /// Nothing is published past a place that was not filled.
    fn publishable(&self) -> u64 {
        self.granted.front().map_or(self.next_lsn, |(_, lsn)| *lsn) - 1
    }

    fn complete(&mut self, which: usize, fail: bool) {
        if self.open.is_empty() {
            return;
        }
        let (tag, _, lsn) = self.open[which % self.open.len()];
        if lsn.is_none_or(|lsn| lsn.0 <= self.published) {
            self.open.swap_remove(which % self.open.len());
            self.session.complete(tag, if fail { Err(Errno::EIO) } else { Ok(()) });
        }
    }

    fn tell(&mut self) {
        let before = (self.word(ACCEPTED), self.word(DURABLE_UP_TO));
        self.session.tell(progress_at(Lsn(self.published), Lsn(self.durable)));
        let (accepted, durable) = (self.word(ACCEPTED), self.word(DURABLE_UP_TO));
        assert!(before.0 <= accepted && before.1 <= durable && durable <= accepted, "B5");
        let unfetched = self.waiting.iter().chain(self.granted.iter().map(|(tag, _)| tag));
        for tag in unfetched {
            let sequence = self.session.request(*tag).sequence;
            assert!(self.word(SUBMISSION_HEAD) < sequence, "the payload of {sequence} was not fetched yet");
        }
        for (what, up_to, top) in [("accepted", accepted, self.published), ("durable", durable, self.durable)]
        {
            for (sequence, (operation, _)) in self.kinds.range(..=up_to) {
                let is_change = !matches!(operation, Operation::Read | Operation::Flush | Operation::Barrier);
                let place = self.places.get(sequence);
                let refused =
                    self.completed.contains_key(sequence) || place.is_none() && self.is_refused(*sequence);
                assert!(!is_change || place.map_or(refused, |lsn| *lsn <= top), "B5 {what}: {sequence}");
            }
        }
        self.reap();
    }

    fn is_refused(&self, sequence: u64) -> bool {
        // Refused while it waited for its place: it is not with the door any more.
        let mut waiting = self.waiting.iter().chain(self.granted.iter().map(|(tag, _)| tag));
        !waiting.any(|tag| self.session.request(*tag).sequence == sequence)
    }

    fn reap(&mut self) {
        let tail = self.word(COMPLETION_TAIL);
        while self.reaped < tail {
            let [_, ticket, _, last] = self.memory.image::<[u64; 4]>(self.layout.completion(self.reaped));
            let sequence = Ticket(ticket).sequence();
            assert!(self.completed.insert(sequence, last as u32 as i32).is_none(), "completed once");
            self.reaped += 1;
        }
        self.memory.word(COMPLETION_HEAD).store(self.reaped, Ordering::Release);
    }

    /// Everything comes to an end.
    fn finish(&mut self) {
        for _ in 0..1000 {
            while !self.granted.is_empty() || !self.waiting.is_empty() {
                self.grant();
                self.word_comes();
            }
            self.published = self.next_lsn - 1;
            self.durable = self.published;
            while !self.open.is_empty() {
                self.complete(0, false);
            }
            self.tell();
            if self.word(SUBMISSION_HEAD) == self.submitted && self.session.in_flight() == 0 {
                break;
            }
            self.step(false);
        }
        self.tell();
        assert_eq!(self.word(DURABLE_UP_TO), self.submitted, "all is durable in the end");
        for (sequence, (_, flags)) in &self.kinds {
            let silent = flags & SILENT != 0;
            assert!(silent || self.completed.contains_key(sequence), "{sequence} has its completion");
        }
    }
}

#[derive(Clone, Debug)]
enum Move {
    Submit(Operation, bool),
    Step { full: bool },
    Grant(usize),
    Word,
    Refuse,
    Publish(usize),
    Commit(usize),
    Complete(usize, bool),
    Tell,
}

fn moves() -> impl Strategy<Value = Move> {
    use Operation::{Barrier, Discard, Flush, Read, Write, WriteZeroes};
    let operation =
        prop::sample::select(vec![Write, Write, Write, Read, WriteZeroes, Discard, Flush, Barrier]);
    prop_oneof![
        4 => (operation, any::<bool>()).prop_map(|(op, silent)| Move::Submit(op, silent)),
        4 => prop::bool::weighted(0.2).prop_map(|full| Move::Step { full }),
        1 => (1usize..4).prop_map(Move::Grant),
        1 => Just(Move::Word),
        1 => Just(Move::Refuse),
        2 => (1usize..4).prop_map(Move::Publish),
        2 => (1usize..4).prop_map(Move::Commit),
        3 => (0usize..8, prop::bool::weighted(0.1)).prop_map(|(i, fail)| Move::Complete(i, fail)),
        2 => Just(Move::Tell),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_rules_of_a_session_hold(moves in prop::collection::vec(moves(), 1..150)) {
        let mut model = Model::new();
        for step in moves {
            match step {
                Move::Submit(operation, silent) => model.submit(operation, silent),
                Move::Step { full } => model.step(full),
                Move::Grant(count) => (0..count).for_each(|_| model.grant()),
                Move::Word => model.word_comes(),
                Move::Refuse => {
                    if let Some(tag) = model.waiting.pop_front() {
                        model.session.complete(tag, Err(Errno::EIO));
                    }
                }
                Move::Publish(count) => model.published = (model.published + count as u64).min(model.publishable()),
                Move::Commit(count) => model.durable = (model.durable + count as u64).min(model.published),
                Move::Complete(which, fail) => model.complete(which, fail),
                Move::Tell => model.tell(),
            }
        }
        model.finish();
    }

    #[test]
    fn whatever_a_client_writes_a_request_is_within_bounds(
        steps in prop::collection::vec((any::<Index>(), any::<u64>(), 0u8..4, any::<u8>()), 1..200)
    ) {
        let (mut session, memory, layout, _ties) = session();
        let mut lsn = 0;
        let mut held = Vec::new();
        for (at, value, how, small) in steps {
            // Anywhere; or where it matters, with values that are nearly right.
            match how {
                0 => memory.word(at.index(memory.len_bytes() / 8) * 8).store(value, Ordering::Relaxed),
                1 => drop(memory.word(SUBMISSION_TAIL).fetch_add(u64::from(small % 3), Ordering::Relaxed)),
                2 => drop(memory.word(COMPLETION_HEAD).fetch_add(u64::from(small % 2), Ordering::Relaxed)),
                _ => {
                    let mut image = image(Operation::from_code(small % 7).unwrap_or(Operation::Write), value);
                    image.offset = (value % (VOLUME_BYTES_NOW + 200)).into();
                    image.len = (u64::from(small) * 20).into();
                    image.arena_offset = ((value >> 32) as u32 % 5000).into();
                    memory.put_image(layout.submission(at.index(8) as u64), &image);
                }
            }
            match session.take() {
                Next::Broken(_) => return Ok(()),
                Next::Request(request) => {
                    prop_assert!(request.offset + request.len <= VOLUME_BYTES_NOW);
                    prop_assert!(request.fua || request.len < u64::MAX);
                    match request.kind {
                        RequestKind::Write => {
                            let mut bytes = vec![0; request.len as usize];
                            prop_assert!(request.len <= u64::from(WRITE_MAX));
                            session.fetch(request.tag, 0, &mut bytes);
                        }
                        RequestKind::Read => session.deliver(request.tag, 0, &vec![1; request.len as usize]),
                        _ => {}
                    }
                    if !matches!(request.kind, RequestKind::Read | RequestKind::Flush) {
                        lsn += 1;
                        session.placed(request.tag, Lsn(lsn));
                    }
                    held.push(request.tag);
                }
                _ => {}
            }
            if small % 3 == 0 && let Some(tag) = held.pop() {
                session.complete(tag, Ok(()));
            }
            session.tell(progress_at(Lsn(lsn), Lsn(lsn / 2)));
        }
    }
}

#[test]
fn what_is_remembered_of_changes_is_bounded_and_nothing_is_claimed_too_early() {
    let (mut session, memory, layout, _) = session();
    let mut lsn = 0;
    for number in 0..40_000u64 {
        let mut image = image(Operation::Write, number);
        image.flags = SILENT;
        put(&memory, &layout, number, &image);
        let Next::Request(request) = session.take() else { panic!("its turn") };
        lsn += 1;
        session.placed(request.tag, Lsn(lsn));
        session.complete(request.tag, Ok(()));
        session.tell(progress_at(Lsn(lsn), Lsn(lsn / 3)));
        let durable = memory.word(DURABLE_UP_TO).load(Ordering::Acquire);
        assert!(durable <= lsn / 3 && session.undurable.len() <= UNDURABLE_MAX, "{number}: {durable}");
    }
    session.tell(progress_at(Lsn(lsn), Lsn(lsn)));
    assert_eq!(memory.word(DURABLE_UP_TO).load(Ordering::Acquire), 40_000);
}

#[test]
fn changes_that_nobody_waits_for_leave_no_hole() {
    let (mut session, memory, layout, _) = session();
    let silent = |cookie| SubmissionImage { flags: SILENT, ..image(Operation::Write, cookie) };
    for number in 0..4 {
        put(&memory, &layout, number, &silent(number));
    }
    put(&memory, &layout, 4, &image(Operation::Write, 4));
    let Next::Request(first) = session.take() else { panic!("its turn") };
    assert_eq!(session.take(), Next::Held, "what becomes of the one before is not known yet");
    session.placed(first.tag, Lsn(1));
    session.complete(first.tag, Ok(()));
    let Next::Request(second) = session.take() else { panic!("its turn") };
    session.complete(second.tag, Err(Errno::EIO));
    assert_eq!((session.take(), session.take()), (Next::Again, Next::Again), "refused");
    let Next::Request(other) = session.take() else { panic!("somebody waits for this one") };
    session.placed(other.tag, Lsn(2));
    session.complete(other.tag, Ok(()));
    session.tell(progress_at(Lsn(2), Lsn(2)));
    let results: Vec<(i32, u32)> = (0..4)
        .map(|n| memory.image::<[u64; 4]>(layout.completion(n))[3])
        .map(|word| (word as u32 as i32, (word >> 32) as u32))
        .collect();
    assert_eq!(results, [(-libc::EIO, 1), (-libc::ECANCELED, 1), (-libc::ECANCELED, 1), (0, 0)]);
}

#[test]
fn what_is_written_to_the_memory_of_a_client_that_is_gone_does_not_count() {
    let (mut session, memory, layout, _) = session();
    put(&memory, &layout, 0, &image(Operation::Write, 0));
    session.client_is_gone();
    put(&memory, &layout, 1, &image(Operation::Write, 1));
    let Next::Request(request) = session.take() else { panic!("it was submitted before") };
    session.placed(request.tag, Lsn(1));
    session.complete(request.tag, Ok(()));
    assert_eq!(session.take(), Next::Nothing);
    memory.word(SUBMISSION_TAIL).store(u64::MAX, Ordering::Release);
    assert_eq!(session.take(), Next::Nothing);
    assert!(session.may_sleep(false), "there is nothing in the ring that counts");
}

#[test]
fn a_client_that_is_gone_does_not_end_its_session_with_completions_that_it_did_not_take() {
    let (mut session, memory, layout, _) = session();
    for number in 0..8 {
        put(&memory, &layout, number, &image(Operation::Write, number));
    }
    for lsn in 1..=8 {
        let Next::Request(request) = session.take() else { panic!("its turn") };
        session.placed(request.tag, Lsn(lsn));
    }
    session.tell(progress_at(Lsn(8), Lsn(0)));
    put(&memory, &layout, 8, &image(Operation::Write, 8));
    session.client_is_gone();
    memory.word(COMPLETION_HEAD).store(u64::MAX, Ordering::Release);
    assert_eq!(session.take(), Next::Full, "the door has as much as it may have");
    assert!(session.may_sleep(false));
    session.complete(0, Ok(()));
    assert!(matches!(session.take(), Next::Request(_)), "it was submitted before");
}
