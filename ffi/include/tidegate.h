/*
 * libtidegate: a volume of Tidegate as byte-addressable persistent memory.
 *
 * A server must have the volume attached (`tidegate attach NAME --bytes`). tg_open() makes a session: memory that this
 * process shares with the server, with rings of requests and completions and an arena for payloads. Every change (a write, a
 * range of zeroes, a discard) is atomic, of any length up to write_bytes_max, at any offset, and gets a place in ONE order
 * of all changes of all volumes and sessions of the stage: its LSN. Within a session that is the order of submission.
 *
 * What becomes of a change:
 *
 *                            submitted          accepted           durable
 *                                               (tg_accepted)      (tg_durable, tg_persist)
 *   this program dies        a prefix is kept   kept               kept
 *   the server dies          a prefix is kept   kept               kept
 *   the machine loses power  a prefix is kept   a prefix is kept   kept
 *
 * "A prefix": if a change is there after the crash, then so is every change before it in the order, whatever volume or
 * session it was made by; and no change is there in part. A change completes when it is accepted (volumes with ack level
 * `memory`) or when it is durable (ack level `log`, or TG_DURABLE).
 *
 * When the server ends, all calls of the session fail with -ENOTCONN. Tickets up to the last tg_accepted() and tg_durable()
 * hold; of later ones nothing is known. Open anew, and look at what is there.
 *
 * Calls return 0 or a count, or a negative errno value; those that return something else say how they fail, and set errno.
 * After a failure tg_error() has a message for people.
 *
 *   -EFAULT    a pointer is NULL that must not be (a handle, too)
 *   -EBADF     the handle was closed, is of another kind or of a parent process, or never was one
 *   -EINVAL    another argument is wrong, a pointer outside the arena for example
 *   -ERANGE    bytes beyond the end of the volume
 *   -EMSGSIZE  a write that is too long for one change
 *   -ENOTCONN  the server is gone
 *   -EINTR     tg_interrupt() was called
 *   -EBUSY     there is a sole writer already (tg_open())
 *   -ECANCELED a request named the ticket of a session that ended first (result of a completion)
 *   -ENOSPC    the stage has no room; a log is full
 *   -EIO       a device failed
 *
 * All calls may be made from many threads at once, with the same handle too. A session does not go through fork(): the child
 * opens its own. It can use nothing of its parent's: handles are invalid there, the socket and the descriptor of tg_event_fd()
 * are replaced by a closed one, so the session ends with its parent, and the arena is private memory, of zeroes. (Not so in a
 * child made by _Fork() or clone(): let that execute a program or end soon.) What executes a program (exec, posix_spawn,
 * system) keeps nothing. The library starts a thread only for a session with a callback. It leaves signals alone.
 *
 * Structures may grow at their end: those with a `size` say how much of them the program knows; a library that is older takes
 * a longer one if the rest is zero, a newer one takes fields that are missing as zero. Fields that are called reserved are 0.
 *
 * Link with `pkg-config --cflags --libs tidegate`. See tidegate(3).
 */

#ifndef TIDEGATE_H
#define TIDEGATE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/**
 * Version of the library that this header came with; see tg_version().
 */
#define TG_VERSION_MAJOR 0

/**
 * See TG_VERSION_MAJOR. Until the major version is 1, programs are compiled anew when the minor version changes.
 */
#define TG_VERSION_MINOR 1

/**
 * Most tickets that a submission can name.
 */
#define TG_AFTER_MAX 4

/**
 * What a submission asks for.
 */
typedef enum tg_operation {
  /**
   * Fill `data` from the volume.
   */
  TG_READ = 1,
  /**
   * Write `data` to the volume: one atomic change.
   */
  TG_WRITE = 2,
  /**
   * Make a range zero: one atomic change. Has no `data`.
   */
  TG_WRITE_ZEROES = 3,
  /**
   * A range is no longer needed; what it reads as is undefined until it is written. Has no `data`.
   */
  TG_DISCARD = 4,
  /**
   * Completes when everything submitted before it is durable. Has no range.
   */
  TG_FLUSH = 5,
  /**
   * Completes when everything submitted before it has completed; what is submitted later begins then. Has no range.
   */
  TG_BARRIER = 6,
} tg_operation;

/**
 * Flags of a change, to be combined with `|`.
 */
typedef enum tg_flag {
  /**
   * It completes when it is durable, whatever the ack level of the volume.
   */
  TG_DURABLE = 1,
  /**
   * It has no completion if it succeeds. Not for calls that wait.
   */
  TG_SILENT = 2,
} tg_flag;

/**
 * Flags of tg_open().
 */
typedef enum tg_open_flag {
  /**
   * Only one session of a volume at a time is opened with this, by whatever program: tg_open() fails with -EBUSY while there
   * is another. It ends when its program closes it or dies, and then with all that it had submitted. Sessions without this
   * flag are not kept from writing: programs that may write to the same log, or whatever else must have one writer, all
   * have to set it.
   */
  TG_SOLE_WRITER = 1,
} tg_open_flag;

/**
 * When a change without TG_DURABLE completes; a property of the volume.
 */
typedef enum tg_ack {
  /**
   * When it is accepted.
   */
  TG_ACK_MEMORY = 1,
  /**
   * When it is durable.
   */
  TG_ACK_LOG = 2,
} tg_ack;

/**
 * Flags of tg_log_open(), to be combined with `|`.
 */
typedef enum tg_log_flag {
  /**
   * Make a log if the range has none and holds nothing but zeroes.
   */
  TG_LOG_CREATE = 1,
  /**
   * Make an empty log, whatever the range holds. What it held is lost.
   */
  TG_LOG_FORMAT = 2,
} tg_log_flag;

/**
 * A connection to a volume: a session. Made by tg_open(). A handle: it points to nothing, and is never reused.
 */
typedef struct tg_device tg_device;

/**
 * An append log in a part of a volume. Made by tg_log_open(). A handle: it points to nothing, and is never reused.
 */
typedef struct tg_log tg_log;

/**
 * Name of a request among all sessions of a stage. Tickets of one session are in the order of submission, by their value;
 * those of a batch follow one another by one. 0 is no request.
 */
typedef uint64_t tg_ticket;

/**
 * A finished request.
 */
typedef struct tg_completion {
  /**
   * As submitted.
   */
  uint64_t cookie;
  /**
   * The request. 0 is no request: the server is gone, and `result` says so.
   */
  tg_ticket ticket;
  /**
   * Its place in the order of the stage; 0 for requests that change nothing.
   */
  uint64_t lsn;
  /**
   * 0, or a negative errno value.
   */
  int32_t result;
  /**
   * 0.
   */
  uint32_t reserved;
} tg_completion;

/**
 * Gets completions, one at a time, in the order in which they came, from one thread that the library has for the session.
 * It may make every call of this library, tg_close() of its own session included; while it waits in one (tg_flush() for
 * example) no other completion is handed over. The last call for a session whose server is gone has the ticket 0 and a
 * negative `result`. `completion` is valid during the call only.
 */
typedef void (*tg_callback)(void *context, const struct tg_completion *completion);

/**
 * What tg_open() may be told. Set it to zero, then `size`, then what you want: later versions have more fields.
 */
typedef struct tg_options {
  /**
   * sizeof(struct tg_options).
   */
  uint32_t size;
  /**
   * Requests that may be submitted and not yet taken by the server: a power of two from 8 to 4096; 0: 128.
   */
  uint32_t depth;
  /**
   * Bytes of the arena, a multiple of 4096 up to 256 MiB; 0: 8 MiB.
   */
  uint32_t arena_bytes;
  /**
   * 0, or of enum tg_open_flag.
   */
  uint32_t flags;
  /**
   * Gets the completions of tg_submit(), from a thread of the library; tg_reap() is refused then. NULL: you call tg_reap().
   */
  tg_callback callback;
  /**
   * First argument of the callback.
   */
  void *context;
} tg_options;

/**
 * What a session is to. Set `size` before the call; it is then the number of bytes that this library knows of.
 */
typedef struct tg_info {
  /**
   * sizeof(struct tg_info).
   */
  uint32_t size;
  /**
   * Requests that may be submitted and not yet taken by the server.
   */
  uint32_t depth;
  /**
   * Size of the volume in bytes, now.
   */
  uint64_t volume_bytes;
  /**
   * Longest write in bytes.
   */
  uint32_t write_bytes_max;
  /**
   * Size of the arena in bytes.
   */
  uint32_t arena_bytes;
  /**
   * Ack level of the volume: an enum tg_ack.
   */
  uint32_t ack;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Start of the arena in this process.
   */
  void *arena;
  /**
   * UUID of the stage.
   */
  uint8_t stage_uuid[16];
  /**
   * UUID of the volume.
   */
  uint8_t volume_uuid[16];
  /**
   * Name of the volume, with a zero at its end.
   */
  char name[72];
} tg_info;

/**
 * One request. Set it to zero, then what you want.
 */
typedef struct tg_submission {
  /**
   * An enum tg_operation.
   */
  uint8_t operation;
  /**
   * Of enum tg_flag.
   */
  uint8_t flags;
  /**
   * 0.
   */
  uint16_t reserved;
  /**
   * 0.
   */
  uint32_t reserved2;
  /**
   * First byte of the volume.
   */
  uint64_t offset;
  /**
   * Length in bytes: 1 to write_bytes_max for TG_READ and TG_WRITE; 0 for TG_FLUSH and TG_BARRIER.
   */
  uint64_t length;
  /**
   * The bytes to write, or where to put what is read: inside the arena of the session, all `length` of them. NULL for
   * operations without data. Do not change them before the request has completed, nor free them.
   */
  void *data;
  /**
   * Handed back with the completion: any number but UINT64_MAX.
   */
  uint64_t cookie;
  /**
   * Requests of any session of the stage that must have their place in the order before this one gets its own; 0 is
   * ignored. Those of its own session that were submitted before need not be named.
   */
  tg_ticket after[TG_AFTER_MAX];
} tg_submission;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Version of the library in use, "MAJOR.MINOR.PATCH".
 */
const char *tg_version(void);

/**
 * What went wrong in the last call of this thread that failed: what, where, what to do. "" if none has. It is valid until the
 * next call of this thread that fails, and is never NULL.
 */
const char *tg_error(void);

/**
 * Opens a session to a volume that `tidegate attach NAME --bytes` attached. `target` is the name of the volume, or the path
 * of its socket if it has a '/'. `options` may be NULL. A process may have many sessions, also to one volume.
 *
 * -ENOENT: there is no such socket; -ECONNREFUSED: nobody serves it; -EACCES: you are not allowed; -EPROTO: what answers
 * does not speak this version; -EINVAL: the options; -EBUSY: there is a sole writer already (see TG_SOLE_WRITER).
 */
int tg_open(const char *target, const struct tg_options *options, struct tg_device **device);

/**
 * Ends a session. The handle is invalid from now on. Calls of other threads that are under way finish; a tg_reap()
 * that waits stops waiting, with -EBADF. Does not wait for what was submitted: that is carried out or not, in order. Pointers
 * into the arena must not be used any more.
 *
 * After it, the callback of the session is not called, and does not run. It may be called from within the callback; then
 * that is the last run of it. Logs that were opened on the session go on until tg_log_close().
 */
int tg_close(struct tg_device *device);

/**
 * Has every call that waits on the session now, in whatever thread, fail with -EINTR: tg_persist(), tg_reap(), tg_flush(),
 * tg_pread(), those that write, those of its logs. What such a call had submitted is carried out all the same, a write
 * too; nothing else changes, and the same call may be made again (a write that is made again is a second change). Calls that
 * begin later are not concerned. So to have a thread stop: tell it so, then call this until it has, since the thread may have
 * been just about to call. The callback of a session goes on. Not for signal handlers: it takes locks.
 */
int tg_interrupt(struct tg_device *device);

/**
 * What the session is to. Set `info->size` before.
 */
int tg_get_info(struct tg_device *device, struct tg_info *info);

/**
 * Takes `length` bytes of the session's arena: payload for tg_submit(), aligned to 64 bytes, not cleared. NULL if it fails,
 * and errno is set: ENOMEM: no such room is free; EINVAL: 0, or more than a quarter of the arena, which is what there is for
 * this; the rest serves calls that copy, as tg_pwrite().
 */
void *tg_alloc(struct tg_device *device, size_t length);

/**
 * Gives back what tg_alloc() gave, all of it. -EINVAL if `data` is not that, or was given back already. No request that was
 * submitted with it may be unfinished.
 */
int tg_free(struct tg_device *device, void *data);

/**
 * A file descriptor for poll() and the like, readable when there may be completions, or the server is gone; then call
 * tg_reap() until it gives 0. It belongs to the session: do not read from it, do not close it. -EINVAL with a callback.
 */
int tg_event_fd(struct tg_device *device);

/**
 * Submits `count` requests, all or none, and does not wait. The ticket of the first goes to `first`, which may be NULL; the
 * others follow by one each. Changes of a session get their place in the order of submission, without any TG_BARRIER.
 *
 * -EAGAIN: the rings have no room: reap, and try again. Another negative value: nothing was submitted; tg_error() says which
 * of the requests is wrong, and why. What only the server can tell is in the completion: -ERANGE, -ECANCELED, ...
 */
int tg_submit(struct tg_device *device, const struct tg_submission *submissions, size_t count, tg_ticket *first);

/**
 * Takes up to `max` completions, waiting until there is one, but not longer than `timeout_ns` nanoseconds; for ever if that
 * is negative. Returns how many; 0 after the time. -EINVAL with a callback.
 */
ssize_t tg_reap(struct tg_device *device, struct tg_completion *completions, size_t max, int64_t timeout_ns);

/**
 * Every change of the session up to this ticket is accepted: it survives the end of this program and of the server. Except
 * those that were refused: their completions, or tg_persist(), say so. 0: none is, or the handle is wrong (errno is set
 * then). Reads shared memory only, so it is cheap; never goes back.
 */
tg_ticket tg_accepted(struct tg_device *device);

/**
 * Every change of the session up to this ticket is durable: it survives the loss of power as well. Otherwise as tg_accepted().
 */
tg_ticket tg_durable(struct tg_device *device);

/**
 * Waits until every change of the session up to `ticket` is durable, but not longer than `timeout_ns` nanoseconds; for ever if
 * that is negative. -ETIMEDOUT: it is not yet. -EINVAL: the ticket is not one that this session gave out. Another negative
 * value: a change up to `ticket` that asked for no completion failed (TG_SILENT, tg_pwrite_async()), or the server is gone.
 * After such a failure no more changes of that kind are taken: what stays has no hole. A new session begins without.
 */
int tg_persist(struct tg_device *device, tg_ticket ticket, int64_t timeout_ns);

/**
 * Writes `length` bytes, 1 to write_bytes_max, as one atomic change, and waits until it has completed. `flags`: 0 or
 * TG_DURABLE. Its ticket goes to `ticket`, which may be NULL. `data` may be anywhere.
 */
int tg_pwrite(struct tg_device *device, const void *data, size_t length, uint64_t offset, int flags, tg_ticket *ticket);

/**
 * As tg_pwrite(), of `count` parts, 1 to 1024, one after the other: together they are one atomic change.
 */
int tg_pwritev(struct tg_device *device, const struct iovec *parts, int count, uint64_t offset, int flags, tg_ticket *ticket);

/**
 * As tg_pwrite(), but returns as soon as `data` was taken over. Whether it succeeded shows in tg_persist(). Writes of one
 * session stay in order, whether they are made with this or other calls.
 */
int tg_pwrite_async(struct tg_device *device, const void *data, size_t length, uint64_t offset, int flags, tg_ticket *ticket);

/**
 * Reads `length` bytes into `data`, which may be anywhere, and sees every change of the session that was submitted before.
 * Reads longer than write_bytes_max are made in parts, between which other sessions may write.
 */
int tg_pread(struct tg_device *device, void *data, size_t length, uint64_t offset);

/**
 * Makes a range zero, as one atomic change, and waits until that has completed. `flags` and `ticket` as for tg_pwrite().
 */
int tg_write_zeroes(struct tg_device *device, uint64_t offset, uint64_t length, int flags, tg_ticket *ticket);

/**
 * Says that a range is no longer needed, and waits until that has completed. What it reads as is undefined until it is
 * written.
 */
int tg_discard(struct tg_device *device, uint64_t offset, uint64_t length, tg_ticket *ticket);

/**
 * Waits until everything that the session submitted before, and everything accepted on the stage, is durable.
 */
int tg_flush(struct tg_device *device);

/**
 * Opens the append log in the `length` bytes of the volume from `base` on. `flags`: 0, or of enum tg_log_flag. Only one
 * handle, of all programs, may append to a log at a time. To have the server see to that, all of them open the session with
 * TG_SOLE_WRITER; that one such session has one handle of the log is for its program to see to.
 *
 * An append is one atomic write of header and payload at the tail, so what a crash leaves is a prefix of the entries. A
 * position is a number of bytes since the log was made; it grows for ever, and the log reuses the room of what was truncated.
 *
 * -ENOENT: there is no log, but zeroes (see TG_LOG_CREATE); -EEXIST: there is something else (see TG_LOG_FORMAT); -EINVAL: a
 * log of another length, or the range is wrong; -EPROTONOSUPPORT: a newer version made it; -EIO: it is damaged.
 */
int tg_log_open(struct tg_device *device, uint64_t base, uint64_t length, int flags, struct tg_log **log);

/**
 * Appends an entry of `length` bytes, at least 1. Its position goes to `position`, the ticket of its write to `ticket`; either
 * may be NULL. Returns when the payload was taken over; tg_log_persist() waits until it is durable.
 *
 * -ENOSPC: the log is full: truncate. -EMSGSIZE: an entry cannot be that long, see tg_log_entry_bytes_max(). After any other
 * failure the log takes no more changes until it is opened anew: it never has a hole.
 */
int tg_log_append(struct tg_log *log, const void *data, size_t length, uint64_t *position, tg_ticket *ticket);

/**
 * As tg_log_append(), of `count` parts, 1 to 1024, one after the other.
 */
int tg_log_appendv(struct tg_log *log, const struct iovec *parts, int count, uint64_t *position, tg_ticket *ticket);

/**
 * Waits until the entry at `position`, and all before it, are durable (at the tail: everything in the log), but not longer
 * than `timeout_ns` nanoseconds; for ever if that is negative. -ETIMEDOUT: they are not yet.
 */
int tg_log_persist(struct tg_log *log, uint64_t position, int64_t timeout_ns);

/**
 * Reads the entry at `*position`, returns its length, and sets `*position` to that of the next. 0: `*position` is the tail;
 * it is left as it is. -EMSGSIZE: the entry is longer than `size`; see tg_log_entry_bytes(). -EINVAL: no entry begins there.
 */
ssize_t tg_log_read(struct tg_log *log, uint64_t *position, void *data, size_t size);

/**
 * Length of the entry at `position`; 0 if that is the tail. -EINVAL: no entry begins there.
 */
ssize_t tg_log_entry_bytes(struct tg_log *log, uint64_t position);

/**
 * Longest entry that the log takes.
 */
ssize_t tg_log_entry_bytes_max(struct tg_log *log);

/**
 * Drops all entries before `position`, which is that of an entry, or the tail. It has its place in the order like any change:
 * once a later change is durable, it is as well.
 */
int tg_log_truncate(struct tg_log *log, uint64_t position);

/**
 * The position of the first entry goes to `head`, that of the next append to `tail`; either may be NULL.
 */
int tg_log_bounds(struct tg_log *log, uint64_t *head, uint64_t *tail);

/**
 * Closes a log. The handle is invalid from now on, whatever this returns. Does not wait for what was appended; see
 * tg_log_persist(). A log that is not closed loses nothing.
 */
int tg_log_close(struct tg_log *log);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TIDEGATE_H */
