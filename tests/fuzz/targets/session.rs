//! A session of the byte door over shared memory in which the client writes whatever it likes, whenever it likes.

#![no_main]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use libfuzzer_sys::fuzz_target;
use tidegate_driver::base::Lsn;
use tidegate_driver::bytes::session::{Next, Progress, Session};
use tidegate_driver::bytes::ties::Ties;
use tidegate_driver::format::byte_ring::RingLayout;
use tidegate_driver::io::SharedMap;
use tidegate_driver::volume::{RequestKind, Wake};

const VOLUME_BYTES: u64 = 1 << 20;
const WRITE_BYTES_MAX: u32 = 3000;

struct Quiet;

impl Wake for Quiet {
    fn wake(&self) {}
}

// Each 11 bytes: where to write a word, the word, and what happens then.
fuzz_target!(|data: &[u8]| {
    let layout = RingLayout::new(8, 4096).unwrap();
    let memory = Arc::new(SharedMap::create(layout.memory_bytes()).unwrap());
    let ties = Arc::new(Ties::default());
    let number = ties.begin(Arc::new(Quiet)).unwrap();
    let at = |lsn: u64| Progress { published: Lsn(lsn), durable: Lsn(lsn / 2), volume_bytes: VOLUME_BYTES };
    let mut session = Session::new(number, memory.clone(), layout, WRITE_BYTES_MAX, ties, at(0));
    let (mut lsn, mut open) = (0, Vec::new());
    for step in data.chunks_exact(11) {
        let place = u16::from_le_bytes([step[0], step[1]]);
        let word = u64::from_le_bytes(step[2..10].try_into().unwrap());
        // The words that matter are near the beginning of each page and in the ring.
        let place = match place >> 14 {
            0 => usize::from(place & 0x1f) * 64,
            1 => 8192 + usize::from(place & 0x3f) * 8,
            _ => usize::from(place & 0x3fff) % (memory.len_bytes() / 8) * 8,
        };
        memory.word(place).store(word, Ordering::Relaxed);
        match session.take() {
            Next::Broken(_) => return,
            Next::Request(request) => {
                assert!(request.offset.checked_add(request.len).is_some_and(|end| end <= VOLUME_BYTES));
                if matches!(request.kind, RequestKind::Read | RequestKind::Write) {
                    assert!(request.len <= u64::from(WRITE_BYTES_MAX));
                    let mut bytes = vec![0; request.len as usize];
                    match request.kind {
                        RequestKind::Write => session.fetch(request.tag, 0, &mut bytes),
                        _ => session.deliver(request.tag, 0, &bytes),
                    }
                }
                if !matches!(request.kind, RequestKind::Read | RequestKind::Flush) {
                    lsn += 1;
                    session.placed(request.tag, Lsn(lsn));
                }
                open.push(request.tag);
            }
            Next::Nothing | Next::Full | Next::Again | Next::Held => {}
        }
        if step[10] & 1 == 1
            && let Some(tag) = open.pop()
        {
            session.complete(tag, Ok(()));
        }
        if step[10] & 2 == 2 {
            session.tell(at(lsn));
        }
    }
});
