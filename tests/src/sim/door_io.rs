//! A client's side of a door: the requests it has asked, their content, and what it got.

use std::collections::BTreeMap;
use std::sync::Arc;

use tidegate_driver::base::Lsn;
use tidegate_driver::io::{Errno, Memory, Op};
use tidegate_driver::stage::core::Marks;
use tidegate_driver::volume::{DoorIo, Request, RequestKind};

use super::model::{Change, Effect, Model};

/// A request that is not complete.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The request.
    pub request: Request,
    /// Its content, for a write.
    pub content: Option<Arc<[u8]>>,
    /// Its volume, by position.
    pub volume: usize,
    /// Newest acknowledged change when it began.
    pub acknowledged: u64,
    /// Its place in the log.
    pub lsn: Option<u64>,
    /// Its content could not be fetched.
    pub voided: bool,
    /// What a read delivered.
    pub got: Vec<u8>,
    /// Newest published change when it ended.
    pub published: u64,
    /// Its answer.
    pub done: Option<Result<(), Errno>>,
}

impl Asked {
    /// A request that begins when `acknowledged` is the newest acknowledged change.
    #[must_use]
    pub fn new(request: Request, content: Option<Arc<[u8]>>, volume: usize, acknowledged: u64) -> Asked {
        Asked {
            request,
            content,
            volume,
            acknowledged,
            lsn: None,
            voided: false,
            got: Vec::new(),
            published: 0,
            done: None,
        }
    }
}

/// What a door is given to work with.
pub struct Io<'a> {
    /// Requests in flight.
    pub asked: &'a mut BTreeMap<u32, Asked>,
    /// The checker.
    pub model: &'a mut Model,
    /// How far the stage is.
    pub marks: Arc<Marks>,
    /// Operations submitted.
    pub submitted: Vec<Op>,
    /// Requests completed.
    pub completed: Vec<u32>,
    /// What must not happen and did.
    pub wrong: Option<String>,
    /// Whether content cannot be fetched.
    pub fetch_fails: bool,
}

impl DoorIo for Io<'_> {
    fn submit(&mut self, op: Op) {
        self.submitted.push(op);
    }

    fn placed(&mut self, tag: u32, lsn: Lsn) {
        let asked = self.asked.get_mut(&tag).expect("a request in flight");
        let request = asked.request;
        let effect = match request.kind {
            RequestKind::Write => Effect::Bytes(asked.content.clone().expect("a write has content")),
            RequestKind::WriteZeroes => Effect::Zero,
            _ => Effect::Discard,
        };
        assert!(asked.lsn.is_none(), "request {tag} is placed twice");
        asked.lsn = Some(lsn.0);
        let range = request.offset..request.offset + request.len;
        self.model.placed(lsn.0, Change { volume: asked.volume, range, effect });
    }

    fn fetch(&mut self, tag: u32, offset: u32, into: &mut [u8]) -> Result<(), Errno> {
        let asked = self.asked.get_mut(&tag).expect("a request in flight");
        if self.fetch_fails {
            asked.voided = true;
            self.model.voided(asked.lsn.expect("placed before it is fetched"));
            into.fill(0xee);
            return Err(Errno(libc_efault()));
        }
        let content = asked.content.as_ref().expect("a write has content");
        into.copy_from_slice(&content[offset as usize..offset as usize + into.len()]);
        Ok(())
    }

    fn client_memory(&self, tag: u32) -> Option<Memory> {
        let len = self.asked[&tag].request.len as usize;
        tag.is_multiple_of(2).then_some(Memory::Client { index: tag as u16, len })
    }

    fn deliver(&mut self, tag: u32, offset: u32, from: &[u8]) -> Result<(), Errno> {
        let asked = self.asked.get_mut(&tag).expect("a request in flight");
        asked.got.resize(asked.request.len as usize, 0);
        asked.got[offset as usize..offset as usize + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn complete(&mut self, tag: u32, result: Result<(), Errno>) {
        match self.asked.get_mut(&tag) {
            Some(asked) if asked.done.is_none() => {
                asked.done = Some(result);
                asked.published = self.marks.published().0;
                self.completed.push(tag);
            }
            _ => self.wrong = Some(format!("request {tag} is completed twice")),
        }
    }
}

fn libc_efault() -> i32 {
    14
}
