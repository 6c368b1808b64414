/* The server goes away. Argument: a volume. Says "ready" and waits for a line, before which the server is killed. */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "check.h"

static tg_device *device, *called;
static atomic_int last_call;

static void on_completion(void *context, const struct tg_completion *completion) {
  CHECK(context == &last_call && completion->ticket == 0 && completion->result == -ENOTCONN);
  CHECK(atomic_load(&last_call) == 0);
  atomic_store(&last_call, 1);
}

static void *wait_for_ever(void *argument) {
  struct tg_completion done;
  (void)argument;
  FAILS(tg_reap(device, &done, 1, -1), ENOTCONN);
  return NULL;
}

int main(int argc, char **argv) {
  struct tg_options options;
  struct tg_submission it;
  struct tg_completion done;
  struct pollfd poller;
  struct tg_info info;
  pthread_t waits;
  tg_log *log;
  tg_ticket ticket;
  char data[8], *mine;
  uint64_t at;
  int i;
  CHECK(argc >= 2);
  memset(&options, 0, sizeof options);
  options.size = sizeof options;
  options.callback = on_completion;
  options.context = &last_call;
  IS(tg_open(argv[1], NULL, &device), 0);
  IS(tg_open(argv[1], &options, &called), 0);
  IS(tg_pwrite(device, "before", 6, 0, TG_DURABLE, &ticket), 0);
  IS(tg_log_open(device, MIB, MIB, TG_LOG_FORMAT, &log), 0);
  IS(tg_log_append(log, "entry", 5, &at, NULL), 0);
  IS(tg_log_persist(log, at, -1), 0);
  CHECK((mine = tg_alloc(device, 64)) != NULL);
  memset(mine, 0, 64);
  CHECK(pthread_create(&waits, NULL, wait_for_ever, NULL) == 0);
  printf("ready\n");
  fflush(stdout);
  CHECK(fgets(data, sizeof data, stdin) != NULL);
  CHECK(pthread_join(waits, NULL) == 0);
  memset(&it, 0, sizeof it);
  it.operation = TG_WRITE;
  it.data = mine;
  it.length = 64;
  FAILS(tg_submit(device, &it, 1, NULL), ENOTCONN);
  FAILS(tg_reap(device, &done, 1, 0), ENOTCONN);
  FAILS(tg_pwrite(device, "x", 1, 0, 0, NULL), ENOTCONN);
  FAILS(tg_pwrite_async(device, "x", 1, 0, 0, NULL), ENOTCONN);
  FAILS(tg_pread(device, data, 1, 0), ENOTCONN);
  FAILS(tg_write_zeroes(device, 0, 1, 0, NULL), ENOTCONN);
  FAILS(tg_discard(device, 0, 1, NULL), ENOTCONN);
  FAILS(tg_flush(device), ENOTCONN);
  FAILS(tg_log_append(log, "x", 1, NULL, NULL), ENOTCONN);
  FAILS(tg_log_read(log, &at, data, sizeof data), ENOTCONN);
  CHECK(strlen(tg_error()) > 20);
  /* What was said before holds. */
  CHECK(tg_durable(device) >= ticket && tg_accepted(device) >= ticket);
  IS(tg_persist(device, ticket, 0), 0);
  poller.fd = tg_event_fd(device);
  poller.events = POLLIN;
  IS(poll(&poller, 1, 0), 1);
  memset(&info, 0, sizeof info);
  info.size = sizeof info;
  IS(tg_get_info(device, &info), 0);
  IS(tg_free(device, mine), 0);
  for (i = 0; i < 5000 && !atomic_load(&last_call); i++) usleep(1000);
  IS(atomic_load(&last_call), 1);
  tg_log_close(log);
  IS(tg_close(called), 0);
  IS(tg_close(device), 0);
  /* A new session, once somebody serves again. */
  for (i = 0; i < 600 && tg_open(argv[1], NULL, &device) != 0; i++) usleep(100000);
  IS(tg_pread(device, data, 6, 0), 0);
  CHECK(memcmp(data, "before", 6) == 0);
  IS(tg_close(device), 0);
  return 0;
}
