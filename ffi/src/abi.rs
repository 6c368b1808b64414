//! What C sees: constants and structures. The comments of public items go into `tidegate.h`; they are written for readers of C.

use std::ffi::c_void;
use std::marker::PhantomData;

/// Version of the library that this header came with; see tg_version().
pub const TG_VERSION_MAJOR: u32 = 0;
/// See TG_VERSION_MAJOR. Until the major version is 1, programs are compiled anew when the minor version changes.
pub const TG_VERSION_MINOR: u32 = 1;

/// Most tickets that a submission can name.
pub const TG_AFTER_MAX: usize = 4;

/// A connection to a volume: a session. Made by tg_open(). A handle: it points to nothing, and is never reused.
pub struct tg_device(PhantomData<()>);

/// An append log in a part of a volume. Made by tg_log_open(). A handle: it points to nothing, and is never reused.
pub struct tg_log(PhantomData<()>);

/// Name of a request among all sessions of a stage. Tickets of one session are in the order of submission, by their value;
/// those of a batch follow one another by one. 0 is no request.
pub type tg_ticket = u64;

/// What a submission asks for.
#[repr(C)]
pub enum tg_operation {
    /// Fill `data` from the volume.
    TG_READ = 1,
    /// Write `data` to the volume: one atomic change.
    TG_WRITE = 2,
    /// Make a range zero: one atomic change. Has no `data`.
    TG_WRITE_ZEROES = 3,
    /// A range is no longer needed; what it reads as is undefined until it is written. Has no `data`.
    TG_DISCARD = 4,
    /// Completes when everything submitted before it is durable. Has no range.
    TG_FLUSH = 5,
    /// Completes when everything submitted before it has completed; what is submitted later begins then. Has no range.
    TG_BARRIER = 6,
}

/// Flags of a change, to be combined with `|`.
#[repr(C)]
pub enum tg_flag {
    /// It completes when it is durable, whatever the ack level of the volume.
    TG_DURABLE = 1,
    /// It has no completion if it succeeds. Not for calls that wait.
    TG_SILENT = 2,
}

/// When a change without TG_DURABLE completes; a property of the volume.
#[repr(C)]
pub enum tg_ack {
    /// When it is accepted.
    TG_ACK_MEMORY = 1,
    /// When it is durable.
    TG_ACK_LOG = 2,
}

/// Flags of tg_log_open(), to be combined with `|`.
#[repr(C)]
pub enum tg_log_flag {
    /// Make a log if the range has none and holds nothing but zeroes.
    TG_LOG_CREATE = 1,
    /// Make an empty log, whatever the range holds. What it held is lost.
    TG_LOG_FORMAT = 2,
}

/// A finished request.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct tg_completion {
    /// As submitted.
    pub cookie: u64,
    /// The request. 0 is no request: the server is gone, and `result` says so.
    pub ticket: tg_ticket,
    /// Its place in the order of the stage; 0 for requests that change nothing.
    pub lsn: u64,
    /// 0, or a negative errno value.
    pub result: i32,
    /// 0.
    pub reserved: u32,
}

/// Gets completions, one at a time, in the order in which they came, from one thread that the library has for the session.
/// It may make every call of this library, tg_close() of its own session included; while it waits in one (tg_flush() for
/// example) no other completion is handed over. The last call for a session whose server is gone has the ticket 0 and a
/// negative `result`. `completion` is valid during the call only.
pub type tg_callback = Option<extern "C" fn(context: *mut c_void, completion: *const tg_completion)>;

/// Flags of tg_open().
#[repr(C)]
#[derive(Clone, Copy)]
pub enum tg_open_flag {
    /// Only one session of a volume at a time is opened with this, by whatever program: tg_open() fails with -EBUSY while there
    /// is another. It ends when its program closes it or dies, and then with all that it had submitted. Sessions without this
    /// flag are not kept from writing: programs that may write to the same log, or whatever else must have one writer, all
    /// have to set it.
    TG_SOLE_WRITER = 1,
}

/// What tg_open() may be told. Set it to zero, then `size`, then what you want: later versions have more fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tg_options {
    /// sizeof(struct tg_options).
    pub size: u32,
    /// Requests that may be submitted and not yet taken by the server: a power of two from 8 to 4096; 0: 128.
    pub depth: u32,
    /// Bytes of the arena, a multiple of 4096 up to 256 MiB; 0: 8 MiB.
    pub arena_bytes: u32,
    /// 0, or of enum tg_open_flag.
    pub flags: u32,
    /// Gets the completions of tg_submit(), from a thread of the library; tg_reap() is refused then. NULL: you call tg_reap().
    pub callback: tg_callback,
    /// First argument of the callback.
    pub context: *mut c_void,
}

/// What a session is to. Set `size` before the call; it is then the number of bytes that this library knows of.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tg_info {
    /// sizeof(struct tg_info).
    pub size: u32,
    /// Requests that may be submitted and not yet taken by the server.
    pub depth: u32,
    /// Size of the volume in bytes, now.
    pub volume_bytes: u64,
    /// Longest write in bytes.
    pub write_bytes_max: u32,
    /// Size of the arena in bytes.
    pub arena_bytes: u32,
    /// Ack level of the volume: an enum tg_ack.
    pub ack: u32,
    /// 0.
    pub reserved: u32,
    /// Start of the arena in this process.
    pub arena: *mut c_void,
    /// UUID of the stage.
    pub stage_uuid: [u8; 16],
    /// UUID of the volume.
    pub volume_uuid: [u8; 16],
    /// Name of the volume, with a zero at its end.
    pub name: [std::ffi::c_char; 72],
}

/// One request. Set it to zero, then what you want.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tg_submission {
    /// An enum tg_operation.
    pub operation: u8,
    /// Of enum tg_flag.
    pub flags: u8,
    /// 0.
    pub reserved: u16,
    /// 0.
    pub reserved2: u32,
    /// First byte of the volume.
    pub offset: u64,
    /// Length in bytes: 1 to write_bytes_max for TG_READ and TG_WRITE; 0 for TG_FLUSH and TG_BARRIER.
    pub length: u64,
    /// The bytes to write, or where to put what is read: inside the arena of the session, all `length` of them. NULL for
    /// operations without data. Do not change them before the request has completed, nor free them.
    pub data: *mut c_void,
    /// Handed back with the completion: any number but UINT64_MAX.
    pub cookie: u64,
    /// Requests of any session of the stage that must have their place in the order before this one gets its own; 0 is
    /// ignored. Those of its own session that were submitted before need not be named.
    pub after: [tg_ticket; TG_AFTER_MAX],
}

const _: () = assert!(size_of::<*const c_void>() == 8, "the layouts are those of 64-bit machines");
const _: () = assert!(size_of::<tg_completion>() == 32);
const _: () = assert!(size_of::<tg_options>() == 32);
const _: () = assert!(size_of::<tg_info>() == 144);
const _: () = assert!(size_of::<tg_submission>() == 72);
