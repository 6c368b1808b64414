//! The byte door's wire: the greeting on its socket, and the shared memory of a session.
//!
//! Greeting (client → server), 128 bytes, the first message on the socket:
//! ```text
//!   0  [8]   magic "TGHELLO\0"
//!   8  u32   version that the client speaks
//!  12  u32   requests it wants to have submitted at once: a power of two, 0 for the server's default
//!  16  u32   arena bytes it wants, 0 for the server's default
//!  20  u32   flags: 1 to be the sole writer
//!  24  [104] reserved
//! ```
//!
//! Welcome (server → client), 512 bytes; with it come the descriptors of the shared memory and of an eventfd, the bell, if
//! `errno` is 0:
//! ```text
//!   0  [8]   magic "TGWELCO\0"
//!   8  u32   version of the session: the client's, if the server knows it; the server's own otherwise
//!  12  i32   errno; the rest but the message is meaningless if it is not 0
//!  16  u32   session
//!  20  u32   depth of the submission ring; the completion ring has twice that
//!  24  u32   arena bytes
//!  28  u32   longest write in bytes
//!  32  u64   bytes of the shared memory
//!  40  u64   volume bytes
//!  48  u8    ack level
//!  49  [7]   reserved
//!  56  [16]  stage UUID
//!  72  [16]  volume UUID
//!  88  [64]  volume name, padded with zeroes
//! 152  [104] reserved
//! 256  [256] message for people, padded with zeroes
//! ```
//! After that the client wakes the server by writing to the bell, and sends nothing: the server does not read the socket any
//! more. The server wakes the client with a byte 1 on the socket; a second welcome with an errno says why it ends the session.
//!
//! Shared memory:
//! ```text
//!      0  4096   written by the client:  0 u64 submission tail;  64 u64 completion head; 128 u32 client waits
//!   4096  4096   written by the server:  0 u64 submission head;  64 u64 completion tail; 128 u64 accepted; 192 u64 durable;
//!                                      256 u32 server sleeps;   320 u64 volume bytes
//!   8192  64 × depth       submission ring
//!      …  32 × 2 × depth   completion ring
//!      …  arena, from the next multiple of 4096
//! ```
//! Heads and tails count from 0 and never wrap; entry `n` is in slot `n % size`. A submission is taken when the submission
//! head passes it: the server has copied the descriptor and, of a write that was not refused, the payload. `accepted` and
//! `durable` are sequence numbers: everything up to them is, except what was refused, of which a completion was there before.
//!
//! Submission, 64 bytes:
//! ```text
//!  0  u8      operation: 1 read, 2 write, 3 write-zeroes, 4 discard, 5 flush, 6 barrier
//!  1  u8      flags: 1 durable before completion, 2 no completion if it succeeds
//!  2  u16     reserved
//!  4  u32     first byte in the arena
//!  8  u64     first byte of the volume
//! 16  u64     length in bytes
//! 24  u64     cookie
//! 32  [4]u64  tickets that must have their place before; 0: none
//! ```
//!
//! Completion, 32 bytes:
//! ```text
//!  0  u64  cookie
//!  8  u64  ticket
//! 16  u64  LSN, 0 if it has none
//! 24  i32  0, or a negative errno value
//! 28  u32  flags: 1: of a change that asked for no completion, and failed
//! ```
//!
//! After a change that asked for no completion has failed, every later one that asks for none fails with `ECANCELED`: nobody
//! waits between such changes, and what stays of them is what came before the first that failed.
//!
//! A submission is valid if and only if operation and flags are known, reserved bytes are 0, its range lies in the volume, a
//! transfer lies in the arena and is no longer than the longest write, a flush or barrier has no range, and its tickets are
//! of earlier requests. Neither side believes what it reads from the other's page more than once.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the wire.
pub const WIRE_VERSION: u32 = 1;
/// "TGHELLO\0".
pub const HELLO_MAGIC: [u8; 8] = *b"TGHELLO\0";
/// Flag of a greeting: no other session of the volume that asks for this is let in while this one lasts.
pub const SOLE_WRITER: u32 = 1;
/// "TGWELCO\0".
pub const WELCOME_MAGIC: [u8; 8] = *b"TGWELCO\0";

/// Smallest and largest submission ring.
pub const DEPTH_MIN: u32 = 8;
/// See [`DEPTH_MIN`].
pub const DEPTH_MAX: u32 = 4096;
/// Smallest and largest arena.
pub const ARENA_BYTES_MIN: u32 = 4096;
/// See [`ARENA_BYTES_MIN`].
pub const ARENA_BYTES_MAX: u32 = 256 << 20;

/// Words of the client's page.
pub const SUBMISSION_TAIL: usize = 0;
/// Completions before this were taken by the client.
pub const COMPLETION_HEAD: usize = 64;
/// The client waits for a byte on the socket.
pub const CLIENT_WAITS: usize = 128;
/// Words of the server's page.
pub const SUBMISSION_HEAD: usize = 4096;
/// Completions before this are there.
pub const COMPLETION_TAIL: usize = 4096 + 64;
/// Sequence number.
pub const ACCEPTED: usize = 4096 + 128;
/// Sequence number.
pub const DURABLE_UP_TO: usize = 4096 + 192;
/// The server waits for a byte on the socket.
pub const SERVER_SLEEPS: usize = 4096 + 256;
/// Size of the volume.
pub const VOLUME_BYTES: usize = 4096 + 320;
/// The submission ring.
pub const SUBMISSIONS: usize = 8192;

/// Size of a submission.
pub const SUBMISSION_BYTES: usize = 64;
/// Flag of a completion: its change asked for none, and failed.
pub const FAILED_SILENTLY: u32 = 1;

/// Size of a completion.
pub const COMPLETION_BYTES: usize = 32;

/// Greeting of a client.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HelloImage {
    /// [`HELLO_MAGIC`].
    pub magic: [u8; 8],
    /// [`WIRE_VERSION`].
    pub version: U32,
    /// Wanted depth.
    pub depth: U32,
    /// Wanted arena.
    pub arena_bytes: U32,
    /// [`SOLE_WRITER`].
    pub flags: U32,
    /// Zero.
    pub reserved: [u8; 104],
}

const _: () = assert!(size_of::<HelloImage>() == 128);

/// The server's answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct WelcomeImage {
    /// [`WELCOME_MAGIC`].
    pub magic: [u8; 8],
    /// Version of the session.
    pub version: U32,
    /// 0, or why not.
    pub errno: I32,
    /// Number of the session.
    pub session: U32,
    /// Depth of the submission ring.
    pub depth: U32,
    /// Size of the arena.
    pub arena_bytes: U32,
    /// Longest write.
    pub write_bytes_max: U32,
    /// Size of the shared memory.
    pub memory_bytes: U64,
    /// Size of the volume.
    pub volume_bytes: U64,
    /// Code of the ack level.
    pub ack: u8,
    /// Zero.
    pub reserved0: [u8; 7],
    /// The stage.
    pub stage_uuid: [u8; 16],
    /// The volume.
    pub volume_uuid: [u8; 16],
    /// Its name.
    pub name: [u8; 64],
    /// Zero.
    pub reserved1: [u8; 104],
    /// For people.
    pub message: [u8; 256],
}

const _: () = assert!(size_of::<WelcomeImage>() == 512);

/// A request in the submission ring.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SubmissionImage {
    /// Code of the operation.
    pub operation: u8,
    /// Flags.
    pub flags: u8,
    /// Zero.
    pub reserved: U16,
    /// First byte in the arena.
    pub arena_offset: U32,
    /// First byte of the volume.
    pub offset: U64,
    /// Length.
    pub len: U64,
    /// The client's name for it.
    pub cookie: U64,
    /// Requests that go before.
    pub after: [U64; 4],
}

const _: () = assert!(size_of::<SubmissionImage>() == SUBMISSION_BYTES);

/// An entry of the completion ring.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CompletionImage {
    /// As submitted.
    pub cookie: U64,
    /// The request.
    pub ticket: U64,
    /// Its place.
    pub lsn: U64,
    /// 0, or a negative errno value.
    pub result: I32,
    /// [`FAILED_SILENTLY`].
    pub flags: U32,
}

const _: () = assert!(size_of::<CompletionImage>() == COMPLETION_BYTES);

/// Where the parts of a session's shared memory are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Entries of the submission ring; a power of two.
    pub depth: u32,
    /// Size of the arena.
    pub arena_bytes: u32,
}

impl RingLayout {
    /// The layout for these sizes if they are within bounds.
    #[must_use]
    pub fn new(depth: u32, arena_bytes: u32) -> Option<RingLayout> {
        let fits = depth.is_power_of_two()
            && (DEPTH_MIN..=DEPTH_MAX).contains(&depth)
            && (ARENA_BYTES_MIN..=ARENA_BYTES_MAX).contains(&arena_bytes)
            && arena_bytes.is_multiple_of(4096);
        fits.then_some(RingLayout { depth, arena_bytes })
    }

    /// Entries of the completion ring.
    #[must_use]
    pub fn completion_depth(&self) -> u32 {
        self.depth * 2
    }

    /// Position of the submission `sequence`, counted from 0.
    #[must_use]
    pub fn submission(&self, number: u64) -> usize {
        SUBMISSIONS + (number % u64::from(self.depth)) as usize * SUBMISSION_BYTES
    }

    /// Position of the completion `number`, counted from 0.
    #[must_use]
    pub fn completion(&self, number: u64) -> usize {
        let slot = (number % u64::from(self.completion_depth())) as usize;
        SUBMISSIONS + self.depth as usize * SUBMISSION_BYTES + slot * COMPLETION_BYTES
    }

    /// Position of the arena.
    #[must_use]
    pub fn arena(&self) -> usize {
        let rings = SUBMISSIONS + self.depth as usize * (SUBMISSION_BYTES + 2 * COMPLETION_BYTES);
        rings.next_multiple_of(4096)
    }

    /// Size of the whole.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.arena() + self.arena_bytes as usize
    }
}

impl HelloImage {
    /// Greeting of a client that wants these sizes; 0 leaves one to the server.
    #[must_use]
    pub fn new(depth: u32, arena_bytes: u32) -> HelloImage {
        HelloImage {
            magic: HELLO_MAGIC,
            version: WIRE_VERSION.into(),
            depth: depth.into(),
            arena_bytes: arena_bytes.into(),
            flags: U32::ZERO,
            reserved: [0; 104],
        }
    }
}

impl WelcomeImage {
    /// The server says why there is no session, or no longer.
    #[must_use]
    pub fn refusal(errno: i32, why: &str) -> WelcomeImage {
        let mut image = <WelcomeImage as FromZeros>::new_zeroed();
        image.magic = WELCOME_MAGIC;
        image.version = WIRE_VERSION.into();
        image.errno = errno.into();
        put_text(&mut image.message, why);
        image
    }
}

/// Puts as much of `text` as fits into `into`, whole characters, padded with zeroes.
pub fn put_text(into: &mut [u8], text: &str) {
    let end = (0..=text.len().min(into.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    into.fill(0);
    into[..end].copy_from_slice(&text.as_bytes()[..end]);
}

/// The text in a field padded with zeroes.
#[must_use]
pub fn text_of(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap() {
        for depth in [8, 64, 4096] {
            let layout = RingLayout::new(depth, 1 << 20).unwrap();
            assert_eq!(layout.submission(u64::from(depth)), SUBMISSIONS);
            assert_eq!(layout.completion(0), layout.submission(u64::from(depth) - 1) + SUBMISSION_BYTES);
            assert!(layout.completion(2 * u64::from(depth) - 1) + COMPLETION_BYTES <= layout.arena());
            assert_eq!(layout.memory_bytes(), layout.arena() + (1 << 20));
        }
        for (depth, arena) in
            [(0, 4096), (4, 4096), (48, 4096), (8192, 4096), (8, 0), (8, 5000), (8, u32::MAX)]
        {
            assert_eq!(RingLayout::new(depth, arena), None, "{depth} {arena}");
        }
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let mut field = [1; 4];
        put_text(&mut field, "aä€");
        assert_eq!((text_of(&field).as_str(), field[3]), ("aä", 0));
        put_text(&mut field, "abcd");
        assert_eq!(text_of(&field), "abcd");
    }
}
