//! Opening an append log over arbitrary bytes: a log with edits under valid checksums, or the input itself behind a header.
//! Opening and reading end, do not panic, and write nothing; what was opened can be appended to.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tidegate_driver::base::ByteRange;
use tidegate_driver::bytes::log::{AppendLog, OpenMode};
use tidegate_driver::bytes::memory_store::MemoryStore;
use tidegate_driver::format::append_log::{LOG_HEADER_BYTES, LogHeader};
use tidegate_fuzz::{Structure, edit};
use zerocopy::IntoBytes;

const BYTES: u64 = 1024;
const RANGE: ByteRange = ByteRange { start: 0, end: BYTES };
const PAYLOADS: [usize; 6] = [8, 100, 40, 7, 200, 64];

struct Sample {
    bytes: Vec<u8>,
    structures: Vec<Structure>,
}

/// A log in its second lap, with its last entries behind the hint.
static SAMPLE: LazyLock<Sample> = LazyLock::new(|| {
    let store = MemoryStore::new(vec![0; BYTES as usize], 4096);
    let log = AppendLog::open(&store, RANGE, OpenMode::Format).expect("a blank range");
    let capacity = log.capacity();
    for round in 0..3 {
        for len in PAYLOADS {
            let payload = vec![round; len];
            while log.append(&[&payload]).is_err() {
                let (position, _) = log.iter().nth(1).expect("a full log").expect("a sound log");
                log.truncate(position).expect("an entry");
            }
        }
    }
    let bytes = store.content();
    let header = LogHeader::decode(&bytes).ok().flatten().expect("a header");
    let mut structures: Vec<Structure> = vec![(0..LOG_HEADER_BYTES as usize, Some(0))];
    for (position, payload) in log.iter().map(|entry| entry.expect("a sound log")) {
        let at = (LOG_HEADER_BYTES + position.0 % capacity) as usize;
        structures.push((at..at + 32 + payload.len(), Some(header.generation)));
    }
    Sample { bytes, structures }
});

fuzz_target!(|data: &[u8]| {
    let Some((&which, data)) = data.split_first() else { return };
    let mut bytes = SAMPLE.bytes.clone();
    if which & 1 == 0 {
        edit(&mut bytes, &SAMPLE.structures, data);
    } else {
        let number = |at: usize| data.get(at).map_or(0, |byte| u64::from(*byte) * 8);
        let capacity = BYTES - LOG_HEADER_BYTES;
        let header =
            LogHeader { capacity, generation: 1, opening: 1, head: number(0), hint: number(0) + number(1) };
        bytes.fill(0);
        bytes[..LOG_HEADER_BYTES as usize].copy_from_slice(header.encode().as_bytes());
        let rest = data.get(2..).unwrap_or_default();
        let n = rest.len().min(capacity as usize);
        bytes[LOG_HEADER_BYTES as usize..][..n].copy_from_slice(&rest[..n]);
    }
    let store = MemoryStore::new(bytes, 4096);
    let Ok(log) = AppendLog::open(&store, RANGE, OpenMode::MustExist) else { return };
    let sound = log.iter().all(|entry| entry.is_ok());
    assert_eq!(store.writes(), 0, "looking changes nothing");
    if log.append(&[b"new"]).is_ok() && sound {
        let again = AppendLog::open(&store, RANGE, OpenMode::MustExist).expect("what was opened opens again");
        let last = again.iter().last().expect("an entry").expect("a sound log");
        assert_eq!(last.1, b"new");
    }
});
