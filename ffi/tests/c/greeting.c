/* Servers that do not do what they should: of another version, of another kind, silent at the wrong time. Argument: a directory. */
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"

enum { HELLO = 128, WELCOME = 512 };

struct server {
  int listener;
  const unsigned char *answer;
  size_t length;
};

/* Takes one client, hears its greeting, answers, hangs up. */
static void *serve(void *argument) {
  struct server *server = argument;
  unsigned char hello[HELLO];
  size_t heard = 0;
  int client = accept(server->listener, NULL, NULL);
  CHECK(client >= 0);
  while (heard < HELLO) {
    ssize_t some = read(client, hello + heard, HELLO - heard);
    CHECK(some > 0);
    heard += (size_t)some;
  }
  CHECK(memcmp(hello, "TGHELLO", 8) == 0 && hello[8] == 1);
  CHECK(send(client, server->answer, server->length, MSG_NOSIGNAL) == (ssize_t)server->length);
  close(client);
  return NULL;
}

static int open_with(const char *dir, const unsigned char *answer, size_t length) {
  struct sockaddr_un address;
  struct server server;
  pthread_t thread;
  tg_device *device = (tg_device *)&server;
  int result;
  memset(&address, 0, sizeof address);
  address.sun_family = AF_UNIX;
  snprintf(address.sun_path, sizeof address.sun_path, "%s/fake.sock", dir);
  unlink(address.sun_path);
  server.listener = socket(AF_UNIX, SOCK_STREAM, 0);
  server.answer = answer;
  server.length = length;
  CHECK(server.listener >= 0);
  CHECK(bind(server.listener, (struct sockaddr *)&address, sizeof address) == 0);
  CHECK(listen(server.listener, 1) == 0);
  CHECK(pthread_create(&thread, NULL, serve, &server) == 0);
  result = tg_open(address.sun_path, NULL, &device);
  CHECK(pthread_join(thread, NULL) == 0);
  close(server.listener);
  CHECK(result < 0 && device == NULL && *tg_error() != 0);
  printf("%s\n", tg_error());
  return result;
}

static void put32(unsigned char *at, uint32_t value) {
  int i;
  for (i = 0; i < 4; i++) at[i] = (unsigned char)(value >> (8 * i));
}

int main(int argc, char **argv) {
  unsigned char answer[WELCOME];
  int result;
  CHECK(argc == 2);
  /* A newer server refuses: with the errno value and the words it has chosen. */
  memset(answer, 0, sizeof answer);
  memcpy(answer, "TGWELCO", 8);
  put32(answer + 8, 9);
  put32(answer + 12, EPROTONOSUPPORT);
  strcpy((char *)answer + 256, "speak version 9");
  IS(open_with(argv[1], answer, sizeof answer), -EPROTONOSUPPORT);
  CHECK(strstr(tg_error(), "speak version 9") != NULL);
  /* A message that fills its field has no zero at its end. */
  memset(answer + 256, 'x', 256);
  IS(open_with(argv[1], answer, sizeof answer), -EPROTONOSUPPORT);
  /* A newer server that goes on as if nothing were. */
  put32(answer + 12, 0);
  put32(answer + 16, 1);
  put32(answer + 20, 128);
  put32(answer + 24, 8 * MIB);
  result = open_with(argv[1], answer, sizeof answer);
  CHECK(result == -EPROTO || result == -EPROTONOSUPPORT);
  /* The right version, and no memory with it. */
  put32(answer + 8, 1);
  IS(open_with(argv[1], answer, sizeof answer), -EPROTO);
  /* An errno value that is none. */
  put32(answer + 12, 0x80000000u);
  CHECK(open_with(argv[1], answer, sizeof answer) < 0);
  /* Something else. */
  memset(answer, 'H', sizeof answer);
  IS(open_with(argv[1], answer, sizeof answer), -EPROTO);
  /* It hangs up in the middle, or says nothing. */
  IS(open_with(argv[1], answer, 100), -ECONNRESET);
  IS(open_with(argv[1], answer, 0), -ECONNRESET);
  return 0;
}
