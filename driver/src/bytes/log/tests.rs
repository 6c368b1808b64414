//! The log against a model: after every crash it holds a prefix of what was appended, with everything that was persisted.

use proptest::prelude::*;

use super::*;
use crate::bytes::memory_store::MemoryStore;

const BASE: u64 = 24;

type Log<'a> = AppendLog<&'a MemoryStore>;

fn range(capacity: u64) -> ByteRange {
    ByteRange::at(BASE, LOG_HEADER_BYTES + capacity)
}

fn blank(capacity: u64) -> MemoryStore {
    MemoryStore::new(vec![0; (BASE + LOG_HEADER_BYTES + capacity + 8) as usize], 1 << 20)
}

fn open(store: &MemoryStore, capacity: u64, mode: OpenMode) -> Result<Log<'_>> {
    AppendLog::open(store, range(capacity), mode)
}

fn errno<T>(result: Result<T>) -> i32 {
    result.err().expect("a failure").errno.0
}

fn content(log: &Log<'_>) -> Vec<(Position, Vec<u8>)> {
    log.iter().collect::<Result<_>>().unwrap()
}

// ---- the model

#[derive(Clone, Debug)]
enum Step {
    /// Length in percent of the longest, and what the payload is.
    Append(u8, Payload),
    /// Of the entries that are kept, the one at this percentage.
    Persist(u8),
    Truncate(u8),
    /// Closed and opened.
    Reopen,
    /// Opened without being closed.
    Abandon,
    /// Everything after this percentage of the writes that are not durable is lost.
    Crash(u8),
    Format,
}

#[derive(Clone, Copy, Debug)]
enum Payload {
    Filled(u8),
    /// Bytes of the store from this percentage on: entries, old and new.
    Copied(u8),
    /// An entry for this many bytes ahead, with generation and opening of the log, as nobody else could make it; but not
    /// where it would be looked for.
    Imitation(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let payload = prop_oneof![
        any::<u8>().prop_map(Payload::Filled),
        (0..100u8).prop_map(Payload::Copied),
        any::<u8>().prop_map(Payload::Imitation),
    ];
    prop_oneof![
        12 => (0..=100u8, payload).prop_map(|(len, payload)| Step::Append(len, payload)),
        2 => (0..=100u8).prop_map(Step::Persist),
        6 => (0..=100u8).prop_map(Step::Truncate),
        1 => Just(Step::Reopen),
        1 => Just(Step::Abandon),
        4 => (0..=100u8).prop_map(Step::Crash),
        1 => Just(Step::Format),
    ]
}

/// What was done, with the number of writes after which it is.
#[derive(Default)]
struct Model {
    /// Since the last format.
    entries: Vec<(usize, Position, Vec<u8>)>,
    truncations: Vec<(usize, Position)>,
    persisted: usize,
}

impl Model {
    fn head(&self) -> Position {
        self.truncations.last().map_or(Position(0), |t| t.1)
    }

    fn kept(&self) -> Vec<(Position, Vec<u8>)> {
        let head = self.head();
        self.entries.iter().filter(|e| e.1 >= head).map(|e| (e.1, e.2.clone())).collect()
    }

    fn crash(&mut self, keep: usize) {
        assert!(self.entries[..self.persisted].iter().all(|e| e.0 <= keep), "what was persisted is durable");
        self.entries.retain(|e| e.0 <= keep);
        self.truncations.retain(|t| t.0 <= keep);
    }
}

fn payload(log: &Log<'_>, store: &MemoryStore, percent: u8, kind: Payload) -> Vec<u8> {
    let len = (log.payload_bytes_max() * u64::from(percent) / 100).max(1) as usize;
    match kind {
        Payload::Filled(byte) => vec![byte; len],
        Payload::Copied(from) => {
            let content = store.content();
            let from = content.len() * usize::from(from) / 100;
            content.iter().copied().cycle().skip(from).take(len).collect()
        }
        Payload::Imitation(ahead) => {
            let (_, tail) = log.bounds();
            let position = log.shape.settle(tail.0 + u64::from(ahead) * 8);
            let left = log.shape.left(position);
            let kind = EntryKind::Pad((left - 32) as u32);
            let image = Entry { position, opening: log.opening, kind }.encode(log.generation, &[]);
            let mut bytes = vec![0; len];
            // Shifted by 4, so that it is at no multiple of 8.
            let end = len.min(36);
            if end > 4 {
                bytes[4..end].copy_from_slice(&image.as_bytes()[..end - 4]);
            }
            bytes
        }
    }
}

/// The position at `percent` of the entries that are kept, or the tail.
fn pick(model: &Model, log: &Log<'_>, percent: u8) -> Position {
    let kept = model.kept();
    let at = (kept.len() + 1) * usize::from(percent) / 101;
    kept.get(at).map_or(log.bounds().1, |entry| entry.0)
}

fn check(model: &Model, log: &Log<'_>) {
    assert_eq!(content(log), model.kept(), "the log holds what it must");
    let (head, tail) = log.bounds();
    assert_eq!(head, model.head());
    assert!(model.entries.last().is_none_or(|last| last.1 < tail) || head == tail);
    let mut at = head;
    let mut buffer = Vec::new();
    for (_, expected) in model.kept() {
        assert_eq!(log.payload_bytes(at), Ok(Some(expected.len() as u64)));
        at = log.read(at, &mut buffer).unwrap().expect("as many by reading as by iterating");
        assert_eq!(buffer, expected);
    }
    assert_eq!(log.read(at, &mut buffer), Ok(None), "and no more");
    assert_eq!(log.payload_bytes(at), Ok(None));
}

/// One step; the handle after it.
fn run<'a>(model: &mut Model, store: &'a MemoryStore, log: Log<'a>, capacity: u64, step: &Step) -> Log<'a> {
    match *step {
        Step::Append(percent, kind) => {
            let bytes = payload(&log, store, percent, kind);
            let (before, writes) = (log.bounds(), store.writes());
            let middle = bytes.len() / 2;
            match log.append(&[&bytes[..middle], &[], &bytes[middle..]]) {
                Ok((position, ticket)) => {
                    assert_eq!(ticket.sequence() as usize, store.writes());
                    model.entries.push((store.writes(), position, bytes));
                }
                Err(failure) => {
                    assert_eq!(failure.errno.0, libc::ENOSPC, "{failure}");
                    assert!(before.0 < before.1, "an empty log takes everything");
                    assert_eq!((log.bounds(), store.writes()), (before, writes), "a refusal changes nothing");
                }
            }
        }
        Step::Persist(percent) => {
            let position = pick(model, &log, percent);
            log.persist(position, None).unwrap();
            model.persisted = model.entries.iter().filter(|e| e.1 <= position).count().max(model.persisted);
            assert!(model.entries[..model.persisted].iter().all(|e| e.0 <= store.durable_writes()));
        }
        Step::Truncate(percent) => {
            let position = pick(model, &log, percent);
            log.truncate(position).unwrap();
            model.truncations.push((store.writes(), position));
        }
        Step::Reopen => {
            log.close().unwrap();
            return open(store, capacity, OpenMode::MustExist).unwrap();
        }
        Step::Abandon => return open(store, capacity, OpenMode::CreateIfMissing).unwrap(),
        Step::Crash(percent) => {
            let (durable, writes) = (store.durable_writes(), store.writes());
            let keep = durable + (writes - durable) * usize::from(percent) / 100;
            store.crash(keep);
            model.crash(keep);
            return open(store, capacity, OpenMode::MustExist).unwrap();
        }
        Step::Format => {
            *model = Model::default();
            let log = open(store, capacity, OpenMode::Format).unwrap();
            // A crash before the format is another test.
            (&store).persist(Ticket::new(1, store.writes() as u64), None).unwrap();
            return log;
        }
    }
    log
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn every_crash_leaves_a_prefix(
        capacity in 16u64..80, steps in proptest::collection::vec(step(), 1..60),
    ) {
        let capacity = capacity * 8;
        let store = blank(capacity);
        let mut log = open(&store, capacity, OpenMode::CreateIfMissing).unwrap();
        (&store).persist(Ticket::new(1, 1), None).unwrap();
        let mut model = Model::default();
        for step in &steps {
            log = run(&mut model, &store, log, capacity, step);
            check(&model, &log);
        }
    }

    /// The same appends and truncations, and then every prefix of the writes.
    #[test]
    fn every_prefix_opens(
        capacity in 16u64..40, steps in proptest::collection::vec(step(), 1..20),
    ) {
        let capacity = capacity * 8;
        let store = blank(capacity);
        let mut log = open(&store, capacity, OpenMode::CreateIfMissing).unwrap();
        let mut model = Model::default();
        for step in steps.iter().filter(|s| matches!(s, Step::Append(..) | Step::Truncate(_) | Step::Abandon)) {
            log = run(&mut model, &store, log, capacity, step);
        }
        drop(log);
        for keep in (1..=store.writes()).rev() {
            store.crash_once(keep, |store| {
                let mut rest = Model { entries: model.entries.clone(), ..Model::default() };
                rest.truncations = model.truncations.clone();
                rest.crash(keep);
                let log = open(store, capacity, OpenMode::MustExist).unwrap();
                check(&rest, &log);
                let bytes = vec![keep as u8; 9];
                if log.append(&[&bytes]).is_ok() {
                    let again = open(store, capacity, OpenMode::MustExist).unwrap();
                    assert_eq!(content(&again).last().map(|e| e.1.clone()), Some(bytes));
                }
            });
        }
    }

    #[test]
    fn opening_anything_neither_panics_nor_hangs(
        mut bytes in proptest::collection::vec(any::<u8>(), 256..600), head in 0u64..100, hint in 0u64..100,
    ) {
        let capacity = (bytes.len() as u64 - 64) / 8 * 8;
        let header = LogHeader { capacity, generation: 1, opening: 1, head: head * 8, hint: hint * 8 };
        bytes[..64].copy_from_slice(header.encode().as_bytes());
        let store = MemoryStore::new(bytes, 4096);
        if let Ok(log) = AppendLog::open(&store, ByteRange::at(0, 64 + capacity), OpenMode::MustExist) {
            let _ = log.iter().collect::<Vec<_>>();
        }
    }
}

// ---- single cases

#[test]
fn what_is_in_the_range_decides() {
    let store = blank(256);
    assert_eq!(errno(open(&store, 256, OpenMode::MustExist)), libc::ENOENT);
    assert_eq!(store.writes(), 0);
    let log = open(&store, 256, OpenMode::CreateIfMissing).unwrap();
    log.append(&[b"a"]).unwrap();
    let log = open(&store, 256, OpenMode::MustExist).unwrap();
    assert_eq!(content(&log), [(Position(0), b"a".to_vec())]);
    assert_eq!(store.writes(), 2, "opening writes nothing");
    assert_eq!(errno(open(&store, 248, OpenMode::CreateIfMissing)), libc::EINVAL, "another capacity");
    assert_eq!(content(&open(&store, 256, OpenMode::Format).unwrap()), []);

    let mut foreign = vec![0; 4096];
    foreign[1080] = 0x53;
    let store = MemoryStore::new(foreign, 4096);
    for mode in [OpenMode::MustExist, OpenMode::CreateIfMissing] {
        assert_eq!(errno(AppendLog::open(&store, ByteRange::at(0, 4096), mode)), libc::EEXIST);
    }
    assert_eq!(store.writes(), 0);
    assert!(AppendLog::open(&store, ByteRange::at(0, 4096), OpenMode::Format).is_ok());
}

#[test]
fn bad_ranges_are_refused() {
    let store = MemoryStore::new(vec![0; 4096], 4096);
    for (start, end) in [(0, 4097), (4096, 4096), (10, 5), (0, 191), (u64::MAX - 8, u64::MAX)] {
        let range = ByteRange { start, end };
        assert_eq!(errno(AppendLog::open(&store, range, OpenMode::Format)), libc::EINVAL, "{range}");
    }
    assert!(AppendLog::open(&store, ByteRange { start: 3, end: 3 + 192 }, OpenMode::Format).is_ok());
}

#[test]
fn positions_that_are_no_entries_are_refused() {
    let store = blank(512);
    let log = open(&store, 512, OpenMode::CreateIfMissing).unwrap();
    let (first, _) = log.append(&[&[7; 100]]).unwrap();
    let (second, _) = log.append(&[b"b"]).unwrap();
    let (_, tail) = log.bounds();
    let mut buffer = Vec::new();
    for wrong in [Position(8), Position(1), Position(tail.0 + 8)] {
        assert_eq!(errno(log.read(wrong, &mut buffer)), libc::EINVAL, "{wrong}");
        assert_eq!(errno(log.truncate(wrong)), libc::EINVAL, "{wrong}");
    }
    assert_eq!(errno(log.persist(Position(tail.0 + 1), None)), libc::EINVAL);
    log.truncate(second).unwrap();
    assert_eq!(errno(log.read(first, &mut buffer)), libc::EINVAL);
    assert_eq!(errno(log.truncate(first)), libc::EINVAL);
    assert_eq!(log.read(second, &mut buffer), Ok(Some(tail)));
    assert_eq!(errno(log.append(&[])), libc::EINVAL);
    assert_eq!(errno(log.append(&[&[0; 225]])), libc::EMSGSIZE);
    assert!(log.append(&[&[0; 224]]).is_ok());
}

#[test]
fn what_an_earlier_handle_wrote_can_be_persisted() {
    let store = blank(512);
    let log = open(&store, 512, OpenMode::CreateIfMissing).unwrap();
    let (position, _) = log.append(&[b"a"]).unwrap();
    assert_eq!(store.durable_writes(), 0);
    let log = open(&store, 512, OpenMode::MustExist).unwrap();
    log.persist(position, None).unwrap();
    assert!(store.durable_writes() >= 2);
    store.crash(store.durable_writes());
    assert_eq!(content(&open(&store, 512, OpenMode::MustExist).unwrap()), [(position, b"a".to_vec())]);
}

#[test]
fn after_a_failure_nothing_more_is_written() {
    let store = blank(512);
    let log = open(&store, 512, OpenMode::CreateIfMissing).unwrap();
    let (kept, _) = log.append(&[&[1; 100]]).unwrap();
    log.persist(kept, None).unwrap();
    store.fail_after(0);
    assert_eq!(errno(log.append(&[&[2; 100]])), libc::ENOTCONN);
    store.fail_after(9);
    let failure = log.append(&[b"c"]).unwrap_err();
    assert!(failure.what.contains("opened anew"), "{failure}");
    assert_eq!(errno(log.truncate(kept)), libc::ENOTCONN);
    log.persist(kept, None).unwrap();
    assert_eq!(content(&log).len(), 1);
    assert_eq!(errno(log.close()), libc::ENOTCONN);
    let log = open(&store, 512, OpenMode::MustExist).unwrap();
    assert_eq!(content(&log).len(), 1);
}

/// A writer that was thought dead writes on: what it leaves behind the new tail is not taken for entries.
#[test]
fn late_writes_of_another_handle_do_not_continue_the_log() {
    let store = blank(1024);
    let old = open(&store, 1024, OpenMode::CreateIfMissing).unwrap();
    old.append(&[&[1; 40]]).unwrap();
    let new = open(&store, 1024, OpenMode::MustExist).unwrap();
    old.append(&[&[2; 40]]).unwrap();
    old.append(&[&[3; 40]]).unwrap();
    new.append(&[&[4; 40]]).unwrap();
    let found = content(&open(&store, 1024, OpenMode::MustExist).unwrap());
    let payloads: Vec<u8> = found.iter().map(|e| e.1[0]).collect();
    assert_eq!(payloads, [1, 4]);
}

#[test]
fn damage_is_not_taken_for_the_end() {
    let store = blank(1024);
    let log = open(&store, 1024, OpenMode::CreateIfMissing).unwrap();
    let (first, _) = log.append(&[&[1; 40]]).unwrap();
    let (second, _) = log.append(&[&[2; 40]]).unwrap();
    let at = |position: Position| (BASE + log.shape.offset(position.0)) as usize;
    let payload = at(second) + 40;
    store.damage(payload, &[9]);
    assert_eq!(errno(open(&store, 1024, OpenMode::MustExist)), libc::EIO);
    let results: Vec<_> = log.iter().collect();
    assert!(results.len() == 2 && errno(results[1].clone()) == libc::EIO);
    store.damage(payload, &[2]);
    log.close().unwrap();
    assert!(open(&store, 1024, OpenMode::MustExist).is_ok());
    store.damage(BASE as usize + 64 + first.0 as usize, &[0; 32]);
    assert_eq!(errno(open(&store, 1024, OpenMode::MustExist)), libc::EIO, "the first entry is missing");
    store.damage(BASE as usize + 30, &[9]);
    for mode in [OpenMode::MustExist, OpenMode::CreateIfMissing] {
        assert_eq!(errno(open(&store, 1024, mode)), libc::EIO, "the header");
    }
    assert!(open(&store, 1024, OpenMode::Format).is_ok());
}

#[test]
fn the_hint_follows_the_tail() {
    let store = MemoryStore::new(vec![0; 8 << 20], 1 << 20);
    let log = AppendLog::open(&store, ByteRange::at(0, 8 << 20), OpenMode::CreateIfMissing).unwrap();
    for i in 0..5000u32 {
        log.append(&[&i.to_le_bytes(), &[0; 1000]]).unwrap();
    }
    let header = LogHeader::decode(&store.content()).unwrap().unwrap();
    let (_, tail) = log.bounds();
    assert!(tail.0 - header.hint <= HINT_BYTES + 2048, "{} {}", header.hint, tail.0);
    // More tickets than are remembered.
    log.persist(Position(0), None).unwrap();
    assert!(store.durable_writes() > 0);
    log.persist(tail, None).unwrap();
    assert_eq!(store.durable_writes(), store.writes());
    log.close().unwrap();
    let header = LogHeader::decode(&store.content()).unwrap().unwrap();
    assert_eq!(header.hint, tail.0);
}

/// Many threads append; every entry is there once and whole.
#[test]
fn threads_share_a_log() {
    let store = MemoryStore::new(vec![0; 1 << 20], 1 << 20);
    let log = AppendLog::open(&store, ByteRange::at(0, 1 << 20), OpenMode::CreateIfMissing).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let log = &log;
            scope.spawn(move || {
                for i in 0..500u64 {
                    let (position, _) = log.append(&[&thread.to_le_bytes(), &i.to_le_bytes()]).unwrap();
                    let mut buffer = Vec::new();
                    log.read(position, &mut buffer).unwrap();
                    assert_eq!(buffer[..8], thread.to_le_bytes());
                }
            });
        }
    });
    let mut found = content(&log).into_iter().map(|e| e.1).collect::<Vec<_>>();
    found.sort();
    found.dedup();
    assert_eq!(found.len(), 2000);
}
