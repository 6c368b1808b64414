/* Bad input that needs no server. Argument: an empty directory. */
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"

static void every_device_call(tg_device *bad, int error) {
  char data[64];
  struct iovec part;
  struct tg_submission submission;
  struct tg_completion completion;
  struct tg_info info;
  tg_ticket ticket;
  tg_log *log;
  memset(&submission, 0, sizeof submission);
  memset(&info, 0, sizeof info);
  info.size = sizeof info;
  submission.operation = TG_FLUSH;
  part.iov_base = data;
  part.iov_len = sizeof data;
  memset(data, 0, sizeof data);
  FAILS(tg_close(bad), error);
  FAILS(tg_get_info(bad, &info), error);
  errno = 0;
  CHECK(tg_alloc(bad, 64) == NULL && errno == error);
  FAILS(tg_free(bad, data), error);
  FAILS(tg_event_fd(bad), error);
  FAILS(tg_submit(bad, &submission, 1, &ticket), error);
  FAILS(tg_reap(bad, &completion, 1, 0), error);
  FAILS(tg_reap(bad, &completion, 1, -1), error);
  errno = 0;
  CHECK(tg_accepted(bad) == 0 && errno == error);
  errno = 0;
  CHECK(tg_durable(bad) == 0 && errno == error);
  FAILS(tg_persist(bad, 1, 0), error);
  FAILS(tg_pwrite(bad, data, sizeof data, 0, 0, &ticket), error);
  FAILS(tg_pwritev(bad, &part, 1, 0, 0, &ticket), error);
  FAILS(tg_pwrite_async(bad, data, sizeof data, 0, 0, &ticket), error);
  FAILS(tg_pread(bad, data, sizeof data, 0), error);
  FAILS(tg_write_zeroes(bad, 0, 64, 0, &ticket), error);
  FAILS(tg_discard(bad, 0, 64, &ticket), error);
  FAILS(tg_flush(bad), error);
  FAILS(tg_log_open(bad, 0, MIB, TG_LOG_CREATE, &log), error);
  CHECK(log == NULL);
}

static void every_log_call(tg_log *bad, int error) {
  char data[64];
  struct iovec part;
  uint64_t position = 0, tail;
  tg_ticket ticket;
  memset(data, 0, sizeof data);
  part.iov_base = data;
  part.iov_len = sizeof data;
  FAILS(tg_log_append(bad, data, sizeof data, &position, &ticket), error);
  FAILS(tg_log_appendv(bad, &part, 1, &position, &ticket), error);
  FAILS(tg_log_persist(bad, 0, 0), error);
  FAILS(tg_log_read(bad, &position, data, sizeof data), error);
  FAILS(tg_log_entry_bytes(bad, 0), error);
  FAILS(tg_log_entry_bytes_max(bad), error);
  FAILS(tg_log_truncate(bad, 0), error);
  FAILS(tg_log_bounds(bad, &position, &tail), error);
  FAILS(tg_log_close(bad), error);
}

static void options(const char *dir) {
  struct {
    struct tg_options known;
    uint64_t later[4];
  } longer;
  struct tg_options options;
  tg_device *device = (tg_device *)&options;
  char path[256];
  int i;
  const uint32_t bad_sizes[] = {0, 1, 4, 7, 9, 12, 4104, 0xffffffff};
  snprintf(path, sizeof path, "%s/nobody.sock", dir);
  memset(&options, 0, sizeof options);
  for (i = 0; i < 8; i++) {
    options.size = bad_sizes[i];
    FAILS(tg_open(path, &options, &device), EINVAL);
    CHECK(device == NULL);
  }
  for (options.size = 8; options.size <= sizeof options; options.size += 8) {
    FAILS(tg_open(path, &options, &device), ENOENT);
  }
  options.size = sizeof options;
  options.flags = 2;
  FAILS(tg_open(path, &options, &device), EINVAL);
  /* A field that is not within the size is not looked at. */
  options.size = 8;
  FAILS(tg_open(path, &options, &device), ENOENT);
  memset(&longer, 0, sizeof longer);
  longer.known.size = sizeof longer;
  FAILS(tg_open(path, &longer.known, &device), ENOENT);
  longer.later[3] = 1;
  FAILS(tg_open(path, &longer.known, &device), EINVAL);
}

static void targets(const char *dir) {
  tg_device *device = NULL;
  char path[256], *longest;
  FILE *file;
  FAILS(tg_open(NULL, NULL, &device), EFAULT);
  FAILS(tg_open("v", NULL, NULL), EFAULT);
  FAILS(tg_open("", NULL, &device), EINVAL);
  FAILS(tg_open("\xff\xfe", NULL, &device), EINVAL);
  FAILS(tg_open("no-volume-has-this-name", NULL, &device), ENOENT);
  CHECK(strstr(tg_error(), "no-volume-has-this-name") != NULL);
  snprintf(path, sizeof path, "%s/file.sock", dir);
  file = fopen(path, "w");
  CHECK(file != NULL && fclose(file) == 0);
  FAILS(tg_open(path, NULL, &device), ECONNREFUSED);
  FAILS(tg_open("/dev/null/x", NULL, &device), ENOTDIR);
  longest = malloc(1 << 20);
  CHECK(longest != NULL);
  memset(longest, 'a', 1 << 20);
  longest[(1 << 20) - 1] = 0;
  CHECK(tg_open(longest, NULL, &device) < 0 && device == NULL);
  CHECK(strlen(tg_error()) < 512);
  free(longest);
}

int main(int argc, char **argv) {
  char version[32];
  void *heap = malloc(64);
  int stack;
  CHECK(argc == 2);
  CHECK(strcmp(tg_error(), "") == 0);
  snprintf(version, sizeof version, "%d.%d.", TG_VERSION_MAJOR, TG_VERSION_MINOR);
  CHECK(strncmp(tg_version(), version, strlen(version)) == 0);
  every_device_call(NULL, EFAULT);
  every_log_call(NULL, EFAULT);
  every_device_call((tg_device *)1, EBADF);
  every_device_call((tg_device *)&stack, EBADF);
  every_device_call((tg_device *)heap, EBADF);
  every_device_call((tg_device *)(uintptr_t)0x7d00000000010000u, EBADF);
  every_device_call((tg_device *)UINTPTR_MAX, EBADF);
  every_log_call((tg_log *)1, EBADF);
  every_log_call((tg_log *)&stack, EBADF);
  every_log_call((tg_log *)heap, EBADF);
  every_log_call((tg_log *)(uintptr_t)0x7e00000000010000u, EBADF);
  options(argv[1]);
  targets(argv[1]);
  free(heap);
  return 0;
}
