/* Many threads, callbacks, full rings, closing at bad times. Arguments: two volumes of one stage. */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 8, ROUNDS = 200 };

static tg_device *device;

/* ---- one session, many threads */

static void *write_and_read(void *argument) {
  const uint64_t base = 4 * MIB + (uint64_t)(uintptr_t)argument * MIB;
  unsigned char out[700], in[700];
  tg_ticket ticket = 0, before = 0;
  int i;
  for (i = 0; i < ROUNDS; i++) {
    memset(out, i, sizeof out);
    if (i % 2 == 0) IS(tg_pwrite(device, out, sizeof out, base + (uint64_t)i * 701, 0, &ticket), 0);
    if (i % 2 == 1) IS(tg_pwrite_async(device, out, sizeof out, base + (uint64_t)i * 701, 0, &ticket), 0);
    CHECK(ticket > before);
    before = ticket;
    IS(tg_pread(device, in, sizeof in, base + (uint64_t)i * 701), 0);
    CHECK(memcmp(in, out, sizeof in) == 0);
    FAILS(tg_pread(device, in, 0, 0), EINVAL);
    if (i % 50 == 0) IS(tg_persist(device, ticket, 30 * SECOND), 0);
  }
  IS(tg_persist(device, ticket, 30 * SECOND), 0);
  return NULL;
}

/* Reads that need all of the room for copies, by several threads. */
static void *read_much(void *argument) {
  unsigned char *much = malloc(4 * MIB);
  int i;
  (void)argument;
  CHECK(much != NULL);
  for (i = 0; i < 10; i++) IS(tg_pread(device, much, 4 * MIB, 0), 0);
  free(much);
  return NULL;
}

static void in_threads(void *(*body)(void *), size_t count) {
  pthread_t threads[THREADS];
  size_t i;
  for (i = 0; i < count; i++) CHECK(pthread_create(&threads[i], NULL, body, (void *)(uintptr_t)i) == 0);
  for (i = 0; i < count; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

/* ---- calls that wait are interrupted, later ones are not */

static atomic_int interrupted;

static void *wait_for_nothing(void *argument) {
  struct tg_completion done;
  (void)argument;
  CHECK(tg_reap(device, &done, 1, -1) == -EINTR);
  CHECK(strstr(tg_error(), "interrupted") != NULL);
  atomic_fetch_add(&interrupted, 1);
  return NULL;
}

static void interrupts(void) {
  struct tg_completion done;
  pthread_t threads[3];
  size_t i;
  for (i = 0; i < 3; i++) CHECK(pthread_create(&threads[i], NULL, wait_for_nothing, NULL) == 0);
  while (atomic_load(&interrupted) < 3) {
    IS(tg_interrupt(device), 0);
    usleep(1000);
  }
  for (i = 0; i < 3; i++) CHECK(pthread_join(threads[i], NULL) == 0);
  IS(tg_reap(device, &done, 1, SECOND / 50), 0);
  IS(tg_flush(device), 0);
  FAILS(tg_interrupt(NULL), EFAULT);
}

/* ---- the rings by many threads: some submit, one reaps */

static atomic_int to_reap;

static void *submit_some(void *argument) {
  struct tg_submission batch[5];
  unsigned char *data = tg_alloc(device, 512);
  int i, result;
  CHECK(data != NULL);
  memset(data, 1, 512);
  for (i = 0; i < ROUNDS; i++) {
    int at;
    memset(batch, 0, sizeof batch);
    for (at = 0; at < 5; at++) {
      batch[at].operation = TG_WRITE;
      batch[at].data = data;
      batch[at].length = 512;
      batch[at].offset = 20 * MIB + 1000 * (uint64_t)at + MIB * (uint64_t)(uintptr_t)argument;
    }
    while ((result = tg_submit(device, batch, 5, NULL)) == -EAGAIN) usleep(100);
    IS(result, 0);
    atomic_fetch_add(&to_reap, 5);
  }
  return NULL;
}

static void *reap_all(void *argument) {
  struct tg_completion done[40];
  int left = 4 * 5 * ROUNDS;
  (void)argument;
  while (left > 0) {
    ssize_t i, count = tg_reap(device, done, 40, 30 * SECOND);
    CHECK(count > 0);
    for (i = 0; i < count; i++) IS(done[i].result, 0);
    left -= (int)count;
  }
  IS(left, 0);
  return NULL;
}

static void rings(void) {
  pthread_t reaper;
  CHECK(pthread_create(&reaper, NULL, reap_all, NULL) == 0);
  in_threads(submit_some, 4);
  CHECK(pthread_join(reaper, NULL) == 0);
}

/* ---- a ring that nobody empties */

static void full(const char *name) {
  struct tg_options options;
  struct tg_submission it;
  struct tg_completion done[64];
  tg_device *small;
  int i, submitted = 0, result = 0, left;
  memset(&options, 0, sizeof options);
  options.size = sizeof options;
  options.depth = 8;
  IS(tg_open(name, &options, &small), 0);
  memset(&it, 0, sizeof it);
  it.operation = TG_READ;
  it.length = 64;
  CHECK((it.data = tg_alloc(small, 64)) != NULL);
  for (i = 0; i < 2000 && result == 0; i++) {
    result = tg_submit(small, &it, 1, NULL);
    submitted += result == 0;
    if (result == -EAGAIN && submitted < 24) {
      usleep(1000);
      result = 0;
    }
  }
  IS(result, -EAGAIN);
  CHECK(submitted >= 8 && *tg_error() != 0);
  for (left = submitted; left > 0;) {
    ssize_t count = tg_reap(small, done, 64, 10 * SECOND);
    CHECK(count > 0);
    left -= (int)count;
  }
  IS(tg_submit(small, &it, 1, NULL), 0);
  IS(tg_reap(small, done, 64, 10 * SECOND), 1);
  IS(tg_close(small), 0);
}

/* ---- poll() in one thread while another makes calls that wait themselves, and hear what the server says */

static atomic_int stop;

static void *write_on(void *argument) {
  (void)argument;
  while (!atomic_load(&stop)) IS(tg_pwrite(device, "abc", 3, 100, 0, NULL), 0);
  return NULL;
}

static void poll_rounds(int rounds, int writes) {
  struct tg_submission it;
  struct tg_completion done[8];
  struct pollfd poller;
  int i;
  memset(&it, 0, sizeof it);
  it.operation = TG_WRITE_ZEROES;
  it.length = 64;
  poller.fd = tg_event_fd(device);
  poller.events = POLLIN;
  CHECK(poller.fd >= 0);
  for (i = 0; i < rounds; i++) {
    ssize_t reaped = 0;
    it.cookie = (uint64_t)i;
    IS(tg_reap(device, done, 8, 0), 0);
    IS(tg_submit(device, &it, 1, NULL), 0);
    if (writes) IS(tg_pwrite(device, "abc", 3, 100, 0, NULL), 0);
    while (reaped == 0) {
      IS(poll(&poller, 1, 10000), 1);
      reaped = tg_reap(device, done, 8, 0);
    }
    CHECK(reaped == 1 && done[0].cookie == (uint64_t)i);
  }
}

static void polling(const char *name) {
  tg_device *before = device;
  pthread_t writer;
  IS(tg_open(name, NULL, &device), 0);
  poll_rounds(ROUNDS, 1);
  CHECK(pthread_create(&writer, NULL, write_on, NULL) == 0);
  poll_rounds(ROUNDS, 0);
  atomic_store(&stop, 1);
  CHECK(pthread_join(writer, NULL) == 0);
  IS(tg_close(device), 0);
  device = before;
}

/* ---- closing while another thread waits */

static void *wait_for_ever(void *argument) {
  struct tg_completion done;
  FAILS(tg_reap(argument, &done, 1, -1), EBADF);
  return NULL;
}

static void *use_until_closed(void *argument) {
  int result;
  while ((result = tg_pwrite_async(argument, "x", 1, 0, 0, NULL)) == 0 && (result = tg_flush(argument)) == 0) continue;
  IS(result, -EBADF);
  return NULL;
}

static void closing(const char *name) {
  int i;
  for (i = 0; i < 10; i++) {
    pthread_t waits, uses;
    tg_device *it;
    IS(tg_open(name, NULL, &it), 0);
    CHECK(pthread_create(&waits, NULL, wait_for_ever, it) == 0);
    CHECK(pthread_create(&uses, NULL, use_until_closed, it) == 0);
    usleep((useconds_t)i * 3000);
    IS(tg_close(it), 0);
    CHECK(pthread_join(waits, NULL) == 0 && pthread_join(uses, NULL) == 0);
  }
}

/* ---- callbacks */

struct called {
  tg_device *device;
  atomic_int count, closed;
  int close_at;
  uint64_t last;
};

static void on_completion(void *context, const struct tg_completion *completion) {
  struct called *called = context;
  struct tg_completion none;
  CHECK(!atomic_load(&called->closed));
  IS(completion->result, 0);
  CHECK(completion->cookie == called->last + 1);
  called->last = completion->cookie;
  FAILS(tg_reap(called->device, &none, 1, -1), EINVAL);
  if (atomic_load(&called->count) % 16 == 0) IS(tg_flush(called->device), 0);
  if (atomic_fetch_add(&called->count, 1) + 1 == called->close_at) {
    atomic_store(&called->closed, 1);
    IS(tg_close(called->device), 0);
    FAILS(tg_close(called->device), EBADF);
  }
}

static void callbacks(const char *name, int close_at) {
  struct tg_options options;
  struct called called;
  struct tg_submission it;
  int i, result = 0;
  memset(&options, 0, sizeof options);
  memset(&called, 0, sizeof called);
  options.size = sizeof options;
  options.callback = on_completion;
  options.context = &called;
  called.close_at = close_at;
  IS(tg_open(name, &options, &called.device), 0);
  FAILS(tg_event_fd(called.device), EINVAL);
  memset(&it, 0, sizeof it);
  it.operation = TG_WRITE_ZEROES;
  it.length = 4096;
  for (i = 1; i <= 100 && result == 0; i++) {
    it.cookie = (uint64_t)i;
    while ((result = tg_submit(called.device, &it, 1, NULL)) == -EAGAIN) usleep(100);
    CHECK(result == 0 || (result == -EBADF && close_at < 100));
  }
  for (i = 0; i < 10000 && atomic_load(&called.count) < (close_at < 100 ? close_at : 100); i++) usleep(1000);
  IS(atomic_load(&called.count), close_at < 100 ? close_at : 100);
  if (close_at >= 100) {
    IS(tg_close(called.device), 0);
    atomic_store(&called.closed, 1);
  }
  usleep(20000);
  FAILS(tg_close(called.device), EBADF);
}

/* Closed from outside while it runs: no call comes after that. */
static void on_slow(void *context, const struct tg_completion *completion) {
  struct called *called = context;
  (void)completion;
  CHECK(!atomic_load(&called->closed));
  usleep(2000);
  CHECK(!atomic_load(&called->closed));
  atomic_fetch_add(&called->count, 1);
}

static void closed_outside(const char *name) {
  struct tg_options options;
  struct called called;
  struct tg_submission it;
  int i;
  memset(&options, 0, sizeof options);
  memset(&called, 0, sizeof called);
  options.size = sizeof options;
  options.callback = on_slow;
  options.context = &called;
  IS(tg_open(name, &options, &called.device), 0);
  memset(&it, 0, sizeof it);
  it.operation = TG_FLUSH;
  for (i = 0; i < 50; i++) IS(tg_submit(called.device, &it, 1, NULL), 0);
  while (atomic_load(&called.count) == 0) usleep(100);
  IS(tg_close(called.device), 0);
  atomic_store(&called.closed, 1);
  usleep(10000);
}

/* ---- opening and closing by many */

static const char *volume;

static void *open_and_close(void *argument) {
  int i;
  for (i = 0; i < 20; i++) {
    tg_device *it;
    tg_ticket ticket;
    (void)argument;
    IS(tg_open(volume, NULL, &it), 0);
    IS(tg_pwrite(it, "abc", 3, 100, TG_DURABLE, &ticket), 0);
    CHECK(tg_durable(it) >= ticket);
    IS(tg_close(it), 0);
  }
  return NULL;
}

/* ---- a log by many */

static tg_log *journal;

static void *append(void *argument) {
  uint64_t before = 0, at;
  int i;
  (void)argument;
  for (i = 0; i < ROUNDS; i++) {
    IS(tg_log_append(journal, &i, sizeof i, &at, NULL), 0);
    CHECK(at > before || i == 0);
    before = at;
  }
  IS(tg_log_persist(journal, before, -1), 0);
  return NULL;
}

static void logs(void) {
  uint64_t at, tail;
  int value, count = 0;
  IS(tg_log_open(device, 48 * MIB, MIB, TG_LOG_FORMAT, &journal), 0);
  in_threads(append, 4);
  IS(tg_log_bounds(journal, &at, &tail), 0);
  while (tg_log_read(journal, &at, &value, sizeof value) == sizeof value) count++;
  IS(count, 4 * ROUNDS);
  CHECK(at == tail);
  IS(tg_log_close(journal), 0);
}

int main(int argc, char **argv) {
  CHECK(argc >= 3);
  volume = argv[1];
  IS(tg_open(argv[1], NULL, &device), 0);
  in_threads(write_and_read, THREADS);
  rings();
  full(argv[1]);
  polling(argv[1]);
  closing(argv[2]);
  callbacks(argv[1], 1000);
  callbacks(argv[1], 1);
  callbacks(argv[1], 37);
  closed_outside(argv[2]);
  in_threads(open_and_close, THREADS);
  logs();
  in_threads(read_much, 4);
  interrupts();
  IS(tg_close(device), 0);
  return 0;
}
