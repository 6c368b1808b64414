/* Bad input to every call of an open session. Arguments: two volumes of one stage, and one of another stage. */
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static tg_device *device, *other, *foreign;
static struct tg_info info;

static struct tg_submission request(int operation, void *data, uint64_t offset, uint64_t length) {
  struct tg_submission it;
  memset(&it, 0, sizeof it);
  it.operation = (uint8_t)operation;
  it.data = data;
  it.offset = offset;
  it.length = length;
  return it;
}

/* A request that is refused at once, alone and behind a good one. */
static void refused(struct tg_submission it, int error) {
  struct tg_submission batch[2];
  tg_ticket ticket = 7;
  FAILS(tg_submit(device, &it, 1, &ticket), error);
  batch[0] = request(TG_FLUSH, NULL, 0, 0);
  batch[1] = it;
  FAILS(tg_submit(device, batch, 2, &ticket), error);
  CHECK(strstr(tg_error(), "submission 1 of 2") != NULL);
  CHECK(ticket == 7);
}

/* One that its completion refuses. */
static int completed(struct tg_submission it) {
  struct tg_completion done;
  tg_ticket ticket;
  it.cookie = 5;
  IS(tg_submit(device, &it, 1, &ticket), 0);
  IS(tg_reap(device, &done, 1, 10 * SECOND), 1);
  CHECK(done.ticket == ticket && done.cookie == 5 && (done.result == 0 || done.lsn == 0));
  return done.result;
}

static void arguments(void) {
  char data[64];
  struct iovec parts[2];
  tg_ticket ticket = 7;
  const uint64_t end = info.volume_bytes;
  memset(data, 0, sizeof data);
  FAILS(tg_pwrite(device, NULL, 1, 0, 0, &ticket), EFAULT);
  FAILS(tg_pwrite(device, data, 0, 0, 0, &ticket), EINVAL);
  FAILS(tg_pwrite(device, data, (size_t)1 << 63, 0, 0, &ticket), EINVAL);
  FAILS(tg_pwrite(device, data, SIZE_MAX, 0, 0, &ticket), EINVAL);
  FAILS(tg_pwrite(device, data, SIZE_MAX / 4, 0, 0, &ticket), EMSGSIZE);
  FAILS(tg_pwrite(device, data, (size_t)info.write_bytes_max + 1, 0, 0, &ticket), EMSGSIZE);
  FAILS(tg_pwrite(device, data, 1, end, 0, &ticket), ERANGE);
  FAILS(tg_pwrite(device, data, 2, end - 1, 0, &ticket), ERANGE);
  FAILS(tg_pwrite(device, data, 2, UINT64_MAX, 0, &ticket), ERANGE);
  FAILS(tg_pwrite(device, data, 1, 0, TG_SILENT, &ticket), EINVAL);
  FAILS(tg_pwrite(device, data, 1, 0, 4, &ticket), EINVAL);
  FAILS(tg_pwrite(device, data, 1, 0, 256, &ticket), EINVAL);
  FAILS(tg_pwrite(device, data, 1, 0, -1, &ticket), EINVAL);
  FAILS(tg_pwrite_async(device, NULL, 1, 0, 0, &ticket), EFAULT);
  FAILS(tg_pwrite_async(device, data, 0, 0, 0, &ticket), EINVAL);
  FAILS(tg_pwrite_async(device, data, SIZE_MAX / 2, 0, 0, &ticket), EMSGSIZE);
  FAILS(tg_pwrite_async(device, data, 1, 0, TG_SILENT, &ticket), EINVAL);
  CHECK(ticket == 7);
  parts[0].iov_base = parts[1].iov_base = data;
  parts[0].iov_len = parts[1].iov_len = 1;
  FAILS(tg_pwritev(device, NULL, 1, 0, 0, NULL), EFAULT);
  FAILS(tg_pwritev(device, parts, 0, 0, 0, NULL), EINVAL);
  FAILS(tg_pwritev(device, parts, -1, 0, 0, NULL), EINVAL);
  FAILS(tg_pwritev(device, parts, 1025, 0, 0, NULL), EINVAL);
  FAILS(tg_pwritev(device, parts, 2147483647, 0, 0, NULL), EINVAL);
  parts[1].iov_base = NULL;
  FAILS(tg_pwritev(device, parts, 2, 0, 0, NULL), EFAULT);
  parts[0].iov_len = parts[1].iov_len = 0;
  FAILS(tg_pwritev(device, parts, 2, 0, 0, NULL), EINVAL);
  parts[1].iov_base = data;
  parts[0].iov_len = parts[1].iov_len = SIZE_MAX / 2 - (size_t)(uintptr_t)data;
  FAILS(tg_pwritev(device, parts, 2, 0, 0, NULL), EMSGSIZE);
  parts[1].iov_len = SIZE_MAX;
  FAILS(tg_pwritev(device, parts, 2, 0, 0, NULL), EINVAL);
  FAILS(tg_pread(device, NULL, 1, 0), EFAULT);
  FAILS(tg_pread(device, data, 0, 0), EINVAL);
  FAILS(tg_pread(device, data, SIZE_MAX, 0), EINVAL);
  FAILS(tg_pread(device, data, 1, end), ERANGE);
  FAILS(tg_pread(device, data, sizeof data, end - 1), ERANGE);
  FAILS(tg_pread(device, data, sizeof data, UINT64_MAX - 1), ERANGE);
  FAILS(tg_write_zeroes(device, 0, 0, 0, NULL), EINVAL);
  FAILS(tg_write_zeroes(device, 0, end + 1, 0, NULL), ERANGE);
  FAILS(tg_write_zeroes(device, 1, UINT64_MAX, 0, NULL), ERANGE);
  FAILS(tg_write_zeroes(device, 0, 1, 8, NULL), EINVAL);
  FAILS(tg_discard(device, 0, 0, NULL), EINVAL);
  FAILS(tg_discard(device, end, 1, NULL), ERANGE);
  FAILS(tg_discard(device, UINT64_MAX, UINT64_MAX, NULL), ERANGE);
}

static void arena(void) {
  char outside[64], *data = tg_alloc(device, 100), *theirs = tg_alloc(other, 100);
  CHECK(data != NULL && theirs != NULL);
  errno = 0;
  CHECK(tg_alloc(device, 0) == NULL && errno == EINVAL);
  CHECK(tg_alloc(device, SIZE_MAX) == NULL && errno == EINVAL);
  CHECK(tg_alloc(device, info.arena_bytes + 1) == NULL && errno == EINVAL);
  FAILS(tg_free(device, NULL), EFAULT);
  FAILS(tg_free(device, outside), EINVAL);
  FAILS(tg_free(device, theirs), EINVAL);
  FAILS(tg_free(device, data + 64), EINVAL);
  FAILS(tg_free(device, data + 1), EINVAL);
  FAILS(tg_free(device, (char *)info.arena + info.arena_bytes), EINVAL);
  refused(request(TG_WRITE, NULL, 0, 64), EFAULT);
  refused(request(TG_READ, NULL, 0, 64), EFAULT);
  refused(request(TG_WRITE, outside, 0, 64), EINVAL);
  refused(request(TG_READ, theirs, 0, 64), EINVAL);
  refused(request(TG_READ, (char *)info.arena - 1, 0, 64), EINVAL);
  refused(request(TG_READ, (char *)info.arena + info.arena_bytes, 0, 1), EINVAL);
  refused(request(TG_READ, (char *)info.arena + info.arena_bytes - 63, 0, 64), EINVAL);
  refused(request(TG_WRITE, (void *)(UINTPTR_MAX - 3), 0, 64), EINVAL);
  IS(completed(request(TG_READ, (char *)info.arena + info.arena_bytes - 63, 0, 63)), 0);
  /* A payload need not be aligned. */
  IS(completed(request(TG_WRITE, data + 13, 1, 7)), 0);
  IS(tg_free(device, data), 0);
  FAILS(tg_free(device, data), EINVAL);
  IS(tg_free(other, theirs), 0);
}

static void requests(void) {
  struct tg_submission it;
  struct tg_completion done[4];
  char *data = tg_alloc(device, 4096);
  tg_ticket ticket, theirs;
  size_t i;
  CHECK(data != NULL);
  memset(data, 0, 4096);
  FAILS(tg_submit(device, NULL, 1, NULL), EFAULT);
  it = request(TG_FLUSH, NULL, 0, 0);
  FAILS(tg_submit(device, &it, 0, NULL), EINVAL);
  FAILS(tg_submit(device, &it, info.depth + 1, NULL), EINVAL);
  FAILS(tg_submit(device, &it, SIZE_MAX, NULL), EINVAL);
  for (i = 0; i < 256; i++) {
    if (i < TG_READ || i > TG_BARRIER) refused(request((int)i, data, 0, 64), EINVAL);
  }
  for (i = 1; i < 256; i++) {
    it = request(TG_READ, data, 0, 64);
    it.flags = (uint8_t)i;
    refused(it, EINVAL);
    it.operation = TG_WRITE;
    if (i > 3) refused(it, EINVAL);
  }
  it = request(TG_WRITE, data, 0, 64);
  it.reserved = 1;
  refused(it, EINVAL);
  it = request(TG_WRITE, data, 0, 64);
  it.reserved2 = 0x80000000u;
  refused(it, EINVAL);
  refused(request(TG_WRITE, data, 0, 0), EINVAL);
  refused(request(TG_WRITE, info.arena, 0, (uint64_t)info.write_bytes_max + 1), EMSGSIZE);
  refused(request(TG_READ, data, 0, UINT64_MAX), EMSGSIZE);
  refused(request(TG_WRITE_ZEROES, data, 0, 64), EINVAL);
  refused(request(TG_WRITE_ZEROES, NULL, 0, 0), EINVAL);
  refused(request(TG_DISCARD, NULL, 0, 0), EINVAL);
  refused(request(TG_FLUSH, NULL, 0, 1), EINVAL);
  refused(request(TG_FLUSH, NULL, 1, 0), EINVAL);
  refused(request(TG_BARRIER, data, 0, 0), EINVAL);
  it = request(TG_FLUSH, NULL, 0, 0);
  it.cookie = UINT64_MAX;
  FAILS(tg_submit(device, &it, 1, NULL), EINVAL);
  IS(completed(request(TG_WRITE, data, info.volume_bytes, 1)), -ERANGE);
  IS(completed(request(TG_READ, data, UINT64_MAX, 2)), -ERANGE);
  IS(completed(request(TG_WRITE_ZEROES, NULL, 1, info.volume_bytes)), -ERANGE);
  IS(completed(request(TG_DISCARD, NULL, 1, UINT64_MAX)), -ERANGE);
  /* Tickets: of a session that is over, of no session, of another stage, of its own future. */
  it = request(TG_WRITE, data, 0, 64);
  IS(tg_pwrite(other, data, 64, 0, 0, &theirs), 0);
  IS(tg_pwrite(device, data, 64, 0, 0, &ticket), 0);
  it.after[0] = ticket;
  it.after[3] = theirs;
  IS(completed(it), 0);
  it.after[1] = ticket + 1000;
  IS(completed(it), -EINVAL);
  it.after[1] = (tg_ticket)0xffff << 48 | 1;
  CHECK(completed(it) < 0);
  it.after[1] = UINT64_MAX;
  CHECK(completed(it) < 0);
  FAILS(tg_persist(device, 0, 0), EINVAL);
  FAILS(tg_persist(device, theirs, 0), EINVAL);
  FAILS(tg_persist(device, ticket + 1000, -1), EINVAL);
  FAILS(tg_persist(device, UINT64_MAX, -1), EINVAL);
  IS(tg_pwrite(foreign, data, 64, 0, 0, &theirs), 0);
  it.after[1] = 0;
  FAILS(tg_reap(device, NULL, 4, 0), EFAULT);
  FAILS(tg_reap(device, done, 0, 0), EINVAL);
  FAILS(tg_reap(device, done, SIZE_MAX, 0), EINVAL);
  IS(tg_reap(device, done, 4, INT64_MIN + 1 < 0 ? 0 : 0), 0);
  FAILS(tg_get_info(device, NULL), EFAULT);
  for (i = 0; i < 8; i++) {
    struct tg_info bad;
    bad.size = (uint32_t)i;
    FAILS(tg_get_info(device, &bad), EINVAL);
    bad.size = 0xfffffff8u - (uint32_t)i;
    FAILS(tg_get_info(device, &bad), EINVAL);
  }
  IS(tg_free(device, data), 0);
}

/* A session that waits for a request of another, which ends without it. */
static void in_vain(const char *name) {
  struct tg_submission it = request(TG_WRITE_ZEROES, NULL, 0, 64);
  struct tg_completion done;
  tg_device *ends;
  tg_ticket ticket;
  IS(tg_open(name, NULL, &ends), 0);
  IS(tg_pwrite(ends, "x", 1, 0, 0, &ticket), 0);
  it.after[0] = ticket + 1;
  it.cookie = 77;
  IS(tg_submit(device, &it, 1, NULL), 0);
  IS(tg_reap(device, &done, 1, SECOND / 20), 0);
  IS(tg_close(ends), 0);
  IS(tg_reap(device, &done, 1, 10 * SECOND), 1);
  CHECK(done.cookie == 77 && done.result == -ECANCELED && done.lsn == 0);
  /* What it did submit has its place, although it is gone. */
  it.after[0] = ticket;
  IS(completed(it), 0);
}

static void logs(void) {
  tg_log *log = (tg_log *)&info, *closed;
  char data[64];
  uint64_t at, head, tail;
  struct iovec part;
  memset(data, 'x', sizeof data);
  part.iov_base = NULL;
  part.iov_len = 1;
  FAILS(tg_log_open(device, 0, MIB, 0, NULL), EFAULT);
  FAILS(tg_log_open(device, 0, MIB, 4, &log), EINVAL);
  CHECK(log == NULL);
  FAILS(tg_log_open(device, 0, MIB, -1, &log), EINVAL);
  FAILS(tg_log_open(device, 0, 0, TG_LOG_FORMAT, &log), EINVAL);
  FAILS(tg_log_open(device, 0, 100, TG_LOG_FORMAT, &log), EINVAL);
  FAILS(tg_log_open(device, 1, info.volume_bytes, TG_LOG_FORMAT, &log), EINVAL);
  FAILS(tg_log_open(device, UINT64_MAX, UINT64_MAX, TG_LOG_FORMAT, &log), EINVAL);
  IS(tg_write_zeroes(device, MIB, MIB, 0, NULL), 0);
  FAILS(tg_log_open(device, MIB, MIB, 0, &log), ENOENT);
  IS(tg_pwrite(device, "foreign", 7, MIB + 100, 0, NULL), 0);
  FAILS(tg_log_open(device, MIB, MIB, TG_LOG_CREATE, &log), EEXIST);
  IS(tg_log_open(device, MIB, MIB, TG_LOG_FORMAT, &log), 0);
  IS(tg_log_close(log), 0);
  FAILS(tg_log_open(device, MIB, MIB / 2, 0, &log), EINVAL);
  IS(tg_log_open(device, MIB, MIB, 0, &log), 0);
  FAILS(tg_log_append(log, NULL, 1, NULL, NULL), EFAULT);
  FAILS(tg_log_append(log, data, 0, NULL, NULL), EINVAL);
  FAILS(tg_log_append(log, data, SIZE_MAX, NULL, NULL), EINVAL);
  FAILS(tg_log_append(log, data, SIZE_MAX / 4, NULL, NULL), EMSGSIZE);
  FAILS(tg_log_append(log, data, (size_t)tg_log_entry_bytes_max(log) + 1, NULL, NULL), EMSGSIZE);
  FAILS(tg_log_appendv(log, NULL, 1, NULL, NULL), EFAULT);
  FAILS(tg_log_appendv(log, &part, 1, NULL, NULL), EFAULT);
  FAILS(tg_log_appendv(log, &part, 0, NULL, NULL), EINVAL);
  IS(tg_log_append(log, data, 40, &at, NULL), 0);
  IS(tg_log_bounds(log, NULL, NULL), 0);
  IS(tg_log_bounds(log, &head, &tail), 0);
  FAILS(tg_log_persist(log, tail + 1, 0), EINVAL);
  FAILS(tg_log_persist(log, UINT64_MAX, -1), EINVAL);
  FAILS(tg_log_read(log, NULL, data, 64), EFAULT);
  FAILS(tg_log_read(log, &at, NULL, 64), EFAULT);
  FAILS(tg_log_read(log, &at, data, 0), EINVAL);
  FAILS(tg_log_read(log, &at, data, SIZE_MAX), EINVAL);
  at += 8;
  FAILS(tg_log_read(log, &at, data, 64), EINVAL);
  at = tail + 8;
  FAILS(tg_log_read(log, &at, data, 64), EINVAL);
  at = UINT64_MAX;
  FAILS(tg_log_read(log, &at, data, 64), EINVAL);
  CHECK(at == UINT64_MAX);
  FAILS(tg_log_entry_bytes(log, UINT64_MAX), EINVAL);
  FAILS(tg_log_truncate(log, head + 8), EINVAL);
  FAILS(tg_log_truncate(log, tail + 8), EINVAL);
  /* Handles of the other kind. */
  FAILS(tg_flush((tg_device *)log), EBADF);
  FAILS(tg_close((tg_device *)log), EBADF);
  FAILS(tg_log_truncate((tg_log *)device, head), EBADF);
  FAILS(tg_log_close((tg_log *)device), EBADF);
  closed = log;
  IS(tg_log_close(log), 0);
  FAILS(tg_log_close(closed), EBADF);
  FAILS(tg_log_append(closed, data, 40, NULL, NULL), EBADF);
  IS(tg_log_open(device, MIB, MIB, 0, &log), 0);
  FAILS(tg_log_append(closed, data, 40, NULL, NULL), EBADF);
  IS(tg_log_close(log), 0);
}

static void sizes(const char *name) {
  const uint32_t bad[][2] = {{4, 0}, {9, 0}, {8192, 0}, {0, 100}, {0, 4095}, {0, 0xfffff000u}, {0x80000000u, 0}};
  struct tg_options options;
  tg_device *it;
  size_t i;
  for (i = 0; i < sizeof bad / sizeof *bad; i++) {
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.depth = bad[i][0];
    options.arena_bytes = bad[i][1];
    FAILS(tg_open(name, &options, &it), EINVAL);
  }
  options.depth = 8;
  options.arena_bytes = 4096;
  IS(tg_open(name, &options, &it), 0);
  IS(tg_pwrite(it, name, 1, 0, 0, NULL), 0);
  IS(tg_close(it), 0);
}

/* A child does not use the sessions of its parent. */
static void forks(const char *name) {
  int status;
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    tg_device *own;
    if (tg_flush(device) != -EBADF || strstr(tg_error(), "parent") == NULL || tg_close(device) != -EBADF) _exit(1);
    if (tg_open(name, NULL, &own) != 0 || tg_flush(own) != 0 || tg_close(own) != 0) _exit(2);
    _exit(0);
  }
  IS(waitpid(child, &status, 0), child);
  IS(status, 0);
  IS(tg_flush(device), 0);
}

/* The server learns of the death of a program that has a child, and the child cannot write to what its parent shares. */
static void orphans(const char *name) {
  struct tg_options options;
  tg_device *own, *second;
  unsigned char *data;
  int status, ready[2], hold[2];
  pid_t parent;
  char byte = 0;
  memset(&options, 0, sizeof options);
  options.size = sizeof options;
  options.flags = 2;
  FAILS(tg_open(name, &options, &own), EINVAL);
  options.flags = TG_SOLE_WRITER;
  CHECK(pipe(ready) == 0 && pipe(hold) == 0);
  parent = fork();
  CHECK(parent >= 0);
  if (parent == 0) {
    pid_t child;
    close(hold[1]);
    if (tg_open(name, &options, &own) != 0 || (data = tg_alloc(own, 4096)) == NULL) _exit(1);
    memset(data, 1, 4096);
    child = fork();
    if (child == 0) {
      memset(data, 2, 4096);
      if (write(ready[1], "x", 1) != 1 || read(hold[0], &byte, 1) != 0) _exit(2);
      _exit(0);
    }
    if (child < 0 || read(ready[0], &byte, 1) != 1 || data[0] != 1 || data[4095] != 1) _exit(3);
    if (tg_open(name, &options, &second) != -EBUSY || strstr(tg_error(), "sole writer") == NULL) _exit(4);
    _exit(0);
  }
  IS(waitpid(parent, &status, 0), parent);
  IS(status, 0);
  /* The child lives. */
  IS(tg_open(name, &options, &own), 0);
  FAILS(tg_open(name, &options, &second), EBUSY);
  IS(tg_close(own), 0);
  IS(tg_open(name, &options, &own), 0);
  IS(tg_close(own), 0);
  CHECK(close(hold[0]) == 0 && close(hold[1]) == 0 && close(ready[0]) == 0 && close(ready[1]) == 0);
}

int main(int argc, char **argv) {
  tg_device *closed;
  tg_ticket ticket;
  CHECK(argc == 4);
  IS(tg_open(argv[1], NULL, &device), 0);
  IS(tg_open(argv[2], NULL, &other), 0);
  IS(tg_open(argv[3], NULL, &foreign), 0);
  info.size = sizeof info;
  IS(tg_get_info(device, &info), 0);
  arguments();
  arena();
  requests();
  in_vain(argv[2]);
  logs();
  sizes(argv[1]);
  forks(argv[1]);
  orphans(argv[1]);
  /* Closed, and its place taken by another. */
  closed = other;
  IS(tg_close(other), 0);
  FAILS(tg_close(closed), EBADF);
  IS(tg_open(argv[2], NULL, &other), 0);
  CHECK(closed != other);
  FAILS(tg_flush(closed), EBADF);
  FAILS(tg_pwrite(closed, "x", 1, 0, 0, &ticket), EBADF);
  IS(tg_flush(other), 0);
  IS(tg_close(foreign), 0);
  IS(tg_close(other), 0);
  IS(tg_close(device), 0);
  return 0;
}
