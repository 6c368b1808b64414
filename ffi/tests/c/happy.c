/* Every call, as it is meant to be used. Arguments: two volumes of one stage. */
#include <poll.h>

#include "check.h"

static struct tg_submission request(int operation, void *data, uint64_t offset, uint64_t length, uint64_t cookie) {
  struct tg_submission it;
  memset(&it, 0, sizeof it);
  it.operation = (uint8_t)operation;
  it.data = data;
  it.offset = offset;
  it.length = length;
  it.cookie = cookie;
  return it;
}

/* Completions of all `count` requests, by cookie from 0. */
static void finish(tg_device *device, struct tg_completion *all, size_t count) {
  size_t done = 0;
  while (done < count) {
    struct tg_completion some[3];
    ssize_t i, reaped = tg_reap(device, some, 3, 10 * SECOND);
    CHECK(reaped > 0);
    for (i = 0; i < reaped; i++) {
      CHECK(some[i].cookie < count && some[i].reserved == 0);
      all[some[i].cookie] = some[i];
    }
    done += (size_t)reaped;
  }
  CHECK(done == count);
}

static void information(tg_device *device, const char *name, struct tg_info *info) {
  struct {
    struct tg_info known;
    uint64_t later;
  } longer;
  uint64_t shorter[2];
  memset(info, 0xff, sizeof *info);
  info->size = sizeof *info;
  IS(tg_get_info(device, info), 0);
  IS(info->size, sizeof *info);
  CHECK(strcmp(info->name, name) == 0);
  IS(info->volume_bytes, 64 * MIB);
  CHECK(info->write_bytes_max >= 64 * KIB && info->depth == 128 && info->arena_bytes == 8 * MIB);
  CHECK(info->ack == TG_ACK_LOG && info->reserved == 0 && info->arena != NULL);
  memset(&longer, 0xff, sizeof longer);
  longer.known.size = sizeof longer;
  IS(tg_get_info(device, &longer.known), 0);
  CHECK(longer.known.size == sizeof(struct tg_info) && longer.later == 0);
  memset(shorter, 0xff, sizeof shorter);
  memset(shorter, 0, 4);
  *(unsigned char *)shorter = 8;
  IS(tg_get_info(device, (struct tg_info *)shorter), 0);
  CHECK(shorter[0] == (((uint64_t)128 << 32) | 8) && shorter[1] == UINT64_MAX);
}

static void plain(tg_device *device) {
  static unsigned char data[200 * KIB], back[200 * KIB];
  struct iovec parts[3];
  tg_ticket first, second;
  size_t i;
  for (i = 0; i < sizeof data; i++) data[i] = (unsigned char)(i * 7 + i / 256);
  IS(tg_pwrite(device, data, 33, 12345, 0, &first), 0);
  IS(tg_pread(device, back, 33, 12345), 0);
  CHECK(memcmp(data, back, 33) == 0);
  CHECK(first != 0 && tg_accepted(device) >= first && tg_durable(device) >= first);
  parts[0].iov_base = data;
  parts[0].iov_len = 5;
  parts[1].iov_base = NULL;
  parts[1].iov_len = 0;
  parts[2].iov_base = data + 5;
  parts[2].iov_len = 50000;
  IS(tg_pwritev(device, parts, 3, 1000001, TG_DURABLE, &second), 0);
  CHECK(second > first && tg_durable(device) >= second);
  IS(tg_pread(device, back, 50005, 1000001), 0);
  CHECK(memcmp(data, back, 50005) == 0);
  IS(tg_pwrite_async(device, data, 100, 2000000, 0, &first), 0);
  IS(tg_pwrite_async(device, data + 100, 100, 2000100, 0, NULL), 0);
  IS(tg_pread(device, back, 200, 2000000), 0);
  CHECK(memcmp(data, back, 200) == 0 && first > second);
  IS(tg_persist(device, first, -1), 0);
  CHECK(tg_durable(device) >= first);
  IS(tg_persist(device, first, 0), 0);
  IS(tg_write_zeroes(device, 2000050, 100, 0, &second), 0);
  memset(data + 50, 0, 100);
  IS(tg_pread(device, back, 200, 2000000), 0);
  CHECK(memcmp(data, back, 200) == 0 && second > first);
  IS(tg_discard(device, 3 * MIB, MIB, &first), 0);
  CHECK(first > second);
  IS(tg_write_zeroes(device, 3 * MIB, MIB, TG_DURABLE, NULL), 0);
  IS(tg_discard(device, 3 * MIB, MIB, NULL), 0);
  IS(tg_flush(device), 0);
  /* Longer than fits anywhere at once. */
  IS(tg_pwrite(device, data, sizeof data, 5 * MIB + 1, 0, NULL), 0);
  IS(tg_pread(device, back, sizeof back, 5 * MIB + 1), 0);
  CHECK(memcmp(data, back, sizeof back) == 0);
}

static void rings(tg_device *device, tg_device *other) {
  struct tg_submission batch[6];
  struct tg_completion done[6];
  struct pollfd poller;
  tg_ticket first, theirs;
  unsigned char *data = tg_alloc(device, 4096), *back = tg_alloc(device, 100), *elsewhere = tg_alloc(other, 64);
  size_t i;
  CHECK(data != NULL && back != NULL && elsewhere != NULL);
  CHECK((uintptr_t)data % 64 == 0 && (uintptr_t)back % 64 == 0);
  memset(data, 'd', 4096);
  memset(elsewhere, 'e', 64);
  IS(tg_reap(device, done, 6, 0), 0);
  IS(tg_reap(device, done, 6, SECOND / 100), 0);
  batch[0] = request(TG_WRITE, elsewhere, 0, 64, 0);
  IS(tg_submit(other, batch, 1, &theirs), 0);
  batch[0] = request(TG_WRITE, data, 7, 4000, 0);
  batch[0].after[2] = theirs;
  batch[1] = request(TG_WRITE_ZEROES, NULL, 17, 10, 1);
  batch[1].flags = TG_DURABLE;
  batch[2] = request(TG_READ, back, 7, 100, 2);
  batch[3] = request(TG_BARRIER, NULL, 0, 0, 3);
  batch[4] = request(TG_DISCARD, NULL, 8 * MIB, 4096, 4);
  batch[5] = request(TG_FLUSH, NULL, 0, 0, 5);
  IS(tg_submit(device, batch, 6, &first), 0);
  poller.fd = tg_event_fd(device);
  CHECK(poller.fd >= 0);
  finish(device, done, 6);
  for (i = 0; i < 6; i++) {
    IS(done[i].result, 0);
    CHECK(done[i].ticket == first + i);
  }
  CHECK(done[0].lsn != 0 && done[1].lsn > done[0].lsn && done[4].lsn > done[1].lsn);
  CHECK(done[2].lsn == 0 && done[3].lsn == 0 && done[5].lsn == 0);
  CHECK(memcmp(back, "dddddddddd\0\0\0\0\0\0\0\0\0\0dd", 22) == 0);
  CHECK(tg_durable(device) >= first + 4);
  finish(other, done, 1);
  CHECK(done[0].ticket == theirs && done[0].lsn < done[4].lsn);
  /* Without a completion; the read behind it has one. */
  batch[0] = request(TG_WRITE, data, 0, 5, 0);
  batch[0].flags = TG_SILENT;
  batch[1] = request(TG_READ, back, 0, 5, 0);
  IS(tg_submit(device, batch, 2, NULL), 0);
  finish(device, done, 1);
  IS(done[0].result, 0);
  CHECK(memcmp(back, "ddddd", 5) == 0);
  /* With poll(). */
  IS(tg_reap(device, done, 6, 0), 0);
  batch[0] = request(TG_FLUSH, NULL, 0, 0, 0);
  IS(tg_submit(device, batch, 1, NULL), 0);
  poller.events = POLLIN;
  IS(poll(&poller, 1, 10000), 1);
  finish(device, done, 1);
  IS(tg_free(device, data), 0);
  IS(tg_free(device, back), 0);
  IS(tg_free(other, elsewhere), 0);
}

static void logs(tg_device *device) {
  const uint64_t base = 16 * MIB + 64, length = MIB;
  tg_log *log;
  char text[64];
  uint64_t head, tail, position, at, first;
  tg_ticket ticket;
  struct iovec parts[2];
  int i;
  IS(tg_write_zeroes(device, base, length, 0, NULL), 0);
  FAILS(tg_log_open(device, base, length, 0, &log), ENOENT);
  IS(tg_log_open(device, base, length, TG_LOG_CREATE, &log), 0);
  IS(tg_log_bounds(log, &head, &tail), 0);
  CHECK(head == tail);
  CHECK(tg_log_entry_bytes_max(log) > 1000);
  IS(tg_log_append(log, "one", 3, &first, &ticket), 0);
  CHECK(first == head && ticket != 0);
  parts[0].iov_base = "tw";
  parts[0].iov_len = 2;
  parts[1].iov_base = "o!";
  parts[1].iov_len = 2;
  IS(tg_log_appendv(log, parts, 2, &position, NULL), 0);
  IS(tg_log_append(log, "three", 5, NULL, NULL), 0);
  IS(tg_log_persist(log, position, -1), 0);
  CHECK(tg_durable(device) >= ticket);
  at = first;
  IS(tg_log_entry_bytes(log, at), 3);
  FAILS(tg_log_read(log, &at, text, 2), EMSGSIZE);
  CHECK(at == first);
  IS(tg_log_read(log, &at, text, sizeof text), 3);
  CHECK(memcmp(text, "one", 3) == 0 && at == position);
  IS(tg_log_read(log, &at, text, 4), 4);
  CHECK(memcmp(text, "two!", 4) == 0);
  IS(tg_log_truncate(log, position), 0);
  FAILS(tg_log_entry_bytes(log, first), EINVAL);
  IS(tg_log_bounds(log, &head, NULL), 0);
  CHECK(head == position);
  IS(tg_log_close(log), 0);
  /* Again: it is as it was. */
  IS(tg_log_open(device, base, length, 0, &log), 0);
  at = position;
  IS(tg_log_read(log, &at, text, sizeof text), 4);
  IS(tg_log_read(log, &at, text, sizeof text), 5);
  CHECK(memcmp(text, "three", 5) == 0);
  IS(tg_log_read(log, &at, text, sizeof text), 0);
  IS(tg_log_bounds(log, NULL, &tail), 0);
  CHECK(at == tail);
  IS(tg_log_entry_bytes(log, tail), 0);
  IS(tg_log_persist(log, tail, 10 * SECOND), 0);
  /* Until it is full, then after a truncation around its end. */
  for (i = 0; (i < 200) & (tg_log_append(log, text, sizeof text, &at, NULL) == 0); i++) CHECK(at >= tail);
  IS(tg_log_truncate(log, at), 0);
  for (i = 0; i < 20000; i++) {
    IS(tg_log_append(log, &i, sizeof i, &at, NULL), 0);
    if (i % 100 == 0) IS(tg_log_truncate(log, at), 0);
  }
  IS(tg_log_close(log), 0);
  IS(tg_log_open(device, base, length, TG_LOG_FORMAT | TG_LOG_CREATE, &log), 0);
  IS(tg_log_bounds(log, &head, &tail), 0);
  CHECK(head == tail);
  IS(tg_log_close(log), 0);
}

int main(int argc, char **argv) {
  struct tg_options options;
  struct tg_info info, others;
  tg_device *device, *other;
  tg_log *log;
  char text[8];
  uint64_t at;
  CHECK(argc >= 3);
  memset(&options, 0, sizeof options);
  options.size = sizeof options;
  options.depth = 128;
  options.arena_bytes = 8 * MIB;
  IS(tg_open(argv[1], NULL, &device), 0);
  IS(tg_open(argv[2], &options, &other), 0);
  CHECK(device != other);
  information(device, argv[1], &info);
  information(other, argv[2], &others);
  CHECK(memcmp(info.stage_uuid, others.stage_uuid, 16) == 0 && memcmp(info.volume_uuid, others.volume_uuid, 16) != 0);
  CHECK(info.arena != others.arena);
  plain(device);
  rings(device, other);
  logs(device);
  /* A log keeps its session. */
  IS(tg_log_open(other, 32 * MIB, MIB, TG_LOG_FORMAT, &log), 0);
  IS(tg_close(other), 0);
  IS(tg_log_append(log, "kept", 4, &at, NULL), 0);
  IS(tg_log_persist(log, at, -1), 0);
  IS(tg_log_read(log, &at, text, 8), 4);
  IS(tg_log_close(log), 0);
  IS(tg_close(device), 0);
  return 0;
}
