/* What every test program uses. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tidegate.h"

/* A condition. */
#define CHECK(what)                                                                            \
  do {                                                                                         \
    if (!(what)) {                                                                             \
      fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #what, tg_error()); \
      exit(1);                                                                                 \
    }                                                                                          \
  } while (0)

/* A call and what it returns. */
#define IS(call, expected)                                                                     \
  do {                                                                                         \
    long long got_ = (long long)(call), wanted_ = (long long)(expected);                       \
    if (got_ != wanted_) {                                                                     \
      fprintf(stderr, "%s:%d: %s gives %lld, not %lld (last error: %s)\n", __FILE__, __LINE__, #call, got_, wanted_, \
              tg_error());                                                                     \
      exit(1);                                                                                 \
    }                                                                                          \
  } while (0)

/* A call that fails, and says why. */
#define FAILS(call, error)  \
  do {                      \
    IS(call, -(error));     \
    CHECK(*tg_error() != 0); \
  } while (0)

#define SECOND 1000000000LL
#define KIB 1024
#define MIB (1024 * 1024)

#endif
