//! A client of the byte door: its ends of the rings, its arena, and when it looks at them. It is what a program that uses
//! the wire itself would be; the library's own client is tested elsewhere.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tidegate_driver::bytes::session::Session;
use tidegate_driver::bytes::{Completion, Operation, Ticket};
use tidegate_driver::format::byte_ring::{
    ACCEPTED, CLIENT_WAITS, COMPLETION_HEAD, COMPLETION_TAIL, CompletionImage, DURABLE_UP_TO,
    FAILED_SILENTLY, RingLayout, SERVER_SLEEPS, SUBMISSION_HEAD, SUBMISSION_TAIL, SubmissionImage,
};
use tidegate_driver::io::SharedMap;

use super::checkers::sessions::{Rules, Submitted, Words, cookie};
use super::rng::Rng;

/// How a client uses its session.
#[derive(Clone, Copy, Debug)]
pub struct Manners {
    /// Changes that ask for no completion, in a thousand.
    pub silent: u64,
    /// Requests that name tickets, in a thousand.
    pub ties: u64,
    /// Barriers, in a thousand.
    pub barriers: u64,
    /// Whether it looks only when it is woken.
    pub waits: bool,
}

impl Manners {
    /// Manners by chance.
    pub fn draw(rng: &mut Rng) -> Manners {
        Manners {
            silent: rng.pick(&[0, 300, 900]),
            ties: rng.pick(&[0, 50, 400]),
            barriers: rng.pick(&[0, 20, 150]),
            waits: rng.chance(500),
        }
    }
}

/// Why a client uses its session no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It died; the server's thread has not been told yet.
    Died,
    /// The thread knows.
    Known,
    /// The volume is detached.
    Told,
    /// It has broken the rules.
    Broke,
}

/// A client with its session.
pub struct ByteClient {
    /// The server's side.
    pub session: Session,
    /// What is demanded of it.
    pub rules: Rules,
    /// How it uses it.
    pub manners: Manners,
    /// Why it does not any more.
    pub gone: Option<Gone>,
    /// It was woken.
    pub rung: bool,
    /// A request that waits for room.
    pub pending: Option<Submitted>,
    memory: Arc<SharedMap>,
    layout: RingLayout,
    /// What it has seen.
    seen: Words,
    /// Completions that were checked.
    checked: u64,
    /// Completions that it has taken.
    reaped: u64,
    /// Parts of the arena in use, and by what.
    used: Vec<(Range<u32>, u64)>,
    /// Submissions of which it does not know yet what became of them.
    unsettled: BTreeSet<u64>,
}

impl ByteClient {
    /// The client of `session`, which is over `memory`.
    #[must_use]
    pub fn new(
        session: Session,
        memory: Arc<SharedMap>,
        layout: RingLayout,
        write_max: u64,
        manners: Manners,
    ) -> ByteClient {
        memory.flag(CLIENT_WAITS).store(u32::from(manners.waits), Ordering::Relaxed);
        ByteClient {
            rules: Rules::new(session.number(), layout.arena_bytes, write_max),
            session,
            manners,
            gone: None,
            rung: false,
            pending: None,
            memory,
            layout,
            seen: Words::default(),
            checked: 0,
            reaped: 0,
            used: Vec::new(),
            unsettled: BTreeSet::new(),
        }
    }

    fn word(&self, at: usize) -> u64 {
        self.memory.word(at).load(Ordering::Acquire)
    }

    /// What the server says.
    #[must_use]
    pub fn words(&self) -> Words {
        Words {
            released: self.word(SUBMISSION_HEAD),
            completions: self.word(COMPLETION_TAIL),
            accepted: self.word(ACCEPTED),
            durable: self.word(DURABLE_UP_TO),
        }
    }

    /// Submissions made.
    #[must_use]
    pub fn submitted(&self) -> u64 {
        self.rules.made.len() as u64
    }

    /// Submissions whose outcome the client does not know, or a session that is to end and has not.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.gone.is_some() || self.pending.is_some() || !self.unsettled.is_empty()
    }

    /// Submissions whose outcome the client does not know.
    #[must_use]
    pub fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    /// Whether a submission has room in the ring.
    #[must_use]
    pub fn has_slot(&self) -> bool {
        self.submitted() - self.seen.released < u64::from(self.layout.depth)
    }

    /// Whether `request` has room in the arena.
    #[must_use]
    pub fn has_room(&self, request: &Submitted) -> bool {
        self.place_for(request).is_some()
    }

    /// Where its data go: the first gap. What can fit nowhere goes to the start, and is refused.
    fn place_for(&self, request: &Submitted) -> Option<u32> {
        let len = request.range.end - request.range.start;
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        if !transfers || len > u64::from(self.layout.arena_bytes) {
            return Some(0);
        }
        let mut at = 0;
        for (part, _) in &self.used {
            if u64::from(part.start) >= u64::from(at) + len {
                return Some(at);
            }
            at = part.end;
        }
        (u64::from(at) + len <= u64::from(self.layout.arena_bytes)).then_some(at)
    }

    /// Puts `request` behind the last submission; the server sees it after [`ByteClient::publish`].
    pub fn put(&mut self, mut request: Submitted) -> u64 {
        let at = self.place_for(&request).expect("it was looked for room");
        request.arena_offset = at;
        let sequence = self.submitted() + 1;
        let len = request.range.end - request.range.start;
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        if transfers && len > 0 && len <= u64::from(self.layout.arena_bytes) {
            let filler = vec![0x77; len as usize];
            let content = request.content.as_deref().unwrap_or(&filler);
            self.memory.copy_in(self.layout.arena() + at as usize, content);
            self.used.push((at..at + len as u32, sequence));
            self.used.sort_unstable_by_key(|(part, _)| part.start);
        }
        let mut image = SubmissionImage {
            operation: request.operation as u8,
            flags: request.flags,
            arena_offset: at.into(),
            offset: request.range.start.into(),
            len: len.into(),
            cookie: cookie(sequence).into(),
            ..SubmissionImage::default()
        };
        for (place, ticket) in image.after.iter_mut().zip(&request.after) {
            *place = ticket.0.into();
        }
        self.memory.put_image(self.layout.submission(sequence - 1), &image);
        self.unsettled.insert(sequence);
        self.rules.submit(request)
    }

    /// Shows the server what was put. Whether it has to be woken.
    pub fn publish(&self) -> bool {
        self.memory.word(SUBMISSION_TAIL).store(self.submitted(), Ordering::Release);
        self.server_sleeps()
    }

    /// Says that so much was submitted and taken: lies.
    pub fn scribble(&self, tail: u64, head: u64) {
        self.memory.word(SUBMISSION_TAIL).store(tail, Ordering::Release);
        self.memory.word(COMPLETION_HEAD).store(head, Ordering::Release);
    }

    /// Entries of the ring.
    #[must_use]
    pub fn depth(&self) -> u64 {
        u64::from(self.layout.depth)
    }

    fn server_sleeps(&self) -> bool {
        self.memory.flag(SERVER_SLEEPS).swap(0, Ordering::SeqCst) != 0
    }

    /// What a read has put into the arena.
    #[must_use]
    pub fn got(&self, sequence: u64) -> Vec<u8> {
        let request = &self.rules.made[&sequence];
        let mut bytes = vec![0; (request.range.end - request.range.start) as usize];
        self.memory.copy_out(self.layout.arena() + request.arena_offset as usize, &mut bytes);
        bytes
    }

    /// Completions since the last call, and whether each is said to have failed silently.
    pub fn fresh(&mut self) -> Result<Vec<(Completion, bool)>, String> {
        let tail = self.word(COMPLETION_TAIL);
        if tail < self.checked || tail - self.reaped > u64::from(self.layout.completion_depth()) {
            return Err(format!("{tail} completions, {} were taken", self.reaped));
        }
        let fresh = (self.checked..tail).map(|number| self.completion(number)).collect();
        self.checked = tail;
        Ok(fresh)
    }

    fn completion(&self, number: u64) -> (Completion, bool) {
        let image: CompletionImage = self.memory.image(self.layout.completion(number));
        let completion = Completion {
            cookie: image.cookie.get(),
            ticket: Ticket(image.ticket.get()),
            lsn: image.lsn.get(),
            result: image.result.get(),
        };
        (completion, image.flags.get() & FAILED_SILENTLY != 0)
    }

    /// Whether it would look at what the server says now, and find something.
    #[must_use]
    pub fn may_look(&self) -> bool {
        self.gone.is_none() && (self.rung || !self.manners.waits) && self.words() != self.seen
    }

    /// Looks at what the server says; takes up to `most` completions. Whether the server has to be woken.
    pub fn look(&mut self, most: u64) -> Result<bool, String> {
        self.rung = false;
        self.memory.flag(CLIENT_WAITS).store(u32::from(self.manners.waits), Ordering::SeqCst);
        let now = self.words();
        let end = if self.manners.waits { now.completions } else { now.completions.min(self.reaped + most) };
        let taken = self.reaped..end;
        for number in taken.clone() {
            let (completion, _) = self.completion(number);
            let sequence = completion.ticket.sequence();
            if self.rules.made.get(&sequence).is_none_or(|request| request.answer != Some(completion.result))
            {
                return Err(format!("a completion was changed before it was taken: {completion:?}"));
            }
            self.unsettled.remove(&sequence);
            let is_read = self.rules.made[&sequence].operation == Operation::Read;
            self.used.retain(|(_, of)| !is_read || *of != sequence);
        }
        self.reaped = end;
        self.memory.word(COMPLETION_HEAD).store(end, Ordering::Release);
        for (part, of) in self.used.extract_if(.., |(_, of)| {
            *of <= now.released && self.rules.made[of].operation == Operation::Write
        }) {
            // Whoever fetches it from now on gets something else.
            let len = part.len() as u64;
            let filler = vec![of as u8 ^ 0xdd; len as usize];
            self.memory.copy_in(self.layout.arena() + part.start as usize, &filler);
        }
        let is_known = |sequence: &u64| {
            let request = &self.rules.made[sequence];
            request.is_silent() && request.answer.is_none() && *sequence <= now.accepted
        };
        self.unsettled.retain(|sequence| !is_known(sequence));
        self.seen = Words { completions: end, ..now };
        let takes_room = !taken.is_empty() && now.released != self.word(SUBMISSION_TAIL);
        Ok(takes_room && self.server_sleeps())
    }

    /// Whether the submission that is to be taken next names another session.
    #[must_use]
    pub fn is_tied(&self) -> bool {
        let next = self.rules.made.get(&(self.word(SUBMISSION_HEAD) + 1));
        next.is_some_and(|next| next.after.iter().any(|t| t.session() != self.session.number()))
    }

    /// Whether the completion ring has no room beside what is with the door.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let used = self.word(COMPLETION_TAIL) - self.reaped + self.session.in_flight() as u64;
        used >= u64::from(self.layout.completion_depth())
    }

    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        let of =
            |sequence: &u64| (*sequence, self.rules.made[sequence].operation, self.rules.made[sequence].lsn);
        let unsettled: Vec<_> = self.unsettled.iter().map(of).collect();
        format!(
            "session {} {:?} {:?} waits for {unsettled:?}",
            self.session.number(),
            self.gone,
            self.words()
        )
    }
}
