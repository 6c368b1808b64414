//! Several reads at once, handed on in order.

use std::collections::VecDeque;
use std::time::Duration;

use super::FileDisk;
use crate::base::Result;
use crate::io::uring::{Event, Reactor, TargetOptions};
use crate::io::{AlignedBuf, Disk, Done, Memory, Op, OpKind, Target, Token};

/// Most reads that are begun and not handed on, and their bytes; one is begun in any case.
const READS_MAX: usize = 32;
const BYTES_MAX: usize = 12 << 20;

/// See [`Disk::read_each`].
pub(super) fn read_each(
    disk: &FileDisk,
    places: &[(u64, usize)],
    take: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    for &(offset, len) in places {
        disk.check_range("read", offset, len)?;
    }
    if let Some(ring) = ring_of(disk, places) {
        return at_once(disk, ring, places, take);
    }
    let mut buffer = AlignedBuf::zeroed(0);
    for (i, &(offset, len)) in places.iter().enumerate() {
        buffer.set_len(len);
        disk.read(offset, &mut buffer)?;
        take(i, &buffer)?;
    }
    Ok(())
}

/// A ring for `disk`; `None` where there is none to be had, or where it would not pay.
fn ring_of(disk: &FileDisk, places: &[(u64, usize)]) -> Option<Reactor> {
    let block = u64::from(disk.block_bytes());
    let is_aligned = |&(offset, len): &(u64, usize)| {
        len > 0 && offset.is_multiple_of(block) && (len as u64).is_multiple_of(block)
    };
    if !disk.is_direct() || places.len() < 2 || !places.iter().all(is_aligned) {
        return None;
    }
    let options = TargetOptions { direct: true, is_block_device: disk.is_block_device() };
    let mut reactor = Reactor::new(READS_MAX as u32).ok()?;
    reactor.register(Target::Stage, disk.file().clone(), options).ok()?;
    Some(reactor)
}

fn at_once(
    disk: &FileDisk,
    mut reactor: Reactor,
    places: &[(u64, usize)],
    take: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    // Those that are begun, from the next one to be handed on.
    let mut begun: VecDeque<Option<Done>> = VecDeque::with_capacity(READS_MAX);
    let mut bytes_begun = 0;
    let mut spare: Vec<AlignedBuf> = Vec::new();
    for (i, &(offset, len)) in places.iter().enumerate() {
        let has_room = |begun: usize, bytes: usize| begun < READS_MAX && bytes < BYTES_MAX;
        if begun.len() <= READS_MAX / 2 {
            let before = begun.len();
            while let Some(&(offset, len)) = places.get(i + begun.len())
                && (begun.is_empty() || has_room(begun.len(), bytes_begun + len))
            {
                let mut buffer = spare.pop().unwrap_or_else(|| AlignedBuf::zeroed(len));
                buffer.set_len(len);
                reactor.push(Op {
                    token: Token((i + begun.len()) as u64),
                    target: Target::Stage,
                    kind: OpKind::Read,
                    offset,
                    len: len as u64,
                    memory: Memory::Owned(buffer),
                });
                begun.push_back(None);
                bytes_begun += len;
            }
            if begun.len() > before {
                reactor.submit_and_wait(Some(Duration::ZERO))?;
            }
        }
        while begun[0].is_none() {
            reactor.submit_and_wait(None)?;
            while let Some(event) = reactor.next_event() {
                if let Event::Op(done) = event {
                    let at = done.token.0 as usize - i;
                    begun[at] = Some(done);
                }
            }
        }
        let done = begun.pop_front().flatten().expect("waited for");
        bytes_begun -= len;
        let Memory::Owned(mut buffer) = done.memory else { unreachable!("reads own their buffers") };
        if done.result.is_err() {
            // Once more, for the words that go with an error.
            disk.read(offset, &mut buffer)?;
        }
        take(i, &buffer)?;
        spare.push(buffer);
    }
    Ok(())
}
