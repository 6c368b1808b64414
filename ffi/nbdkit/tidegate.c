/*
 * nbdkit plugin: a volume of Tidegate as an NBD export, through the byte door.
 *
 * Every connection has a session of its own; flush and FUA are about the whole stage, so connections agree about what is
 * durable, and multi-conn is safe. When the server goes away, the connection opens a new session and repeats what was not
 * answered. For blocks that is allowed, as it is for a disk that was reset: a request without an answer may be carried out once,
 * twice or not at all. Of requests that overlap while one of them has no answer any may be the last; file systems and databases
 * do not ask for such.
 */

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <tidegate.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define NSEC 1000000000ull
/* Between attempts to open a session. */
#define RETRY_NSEC (NSEC / 10)
/* Room for the payloads of all threads that nbdkit has unless told otherwise. */
#define ARENA_BYTES (32u << 20)
#define BLOCK 4096u

static char *target;
static unsigned patience = 30;

struct connection {
	pthread_mutex_t lock;
	/* NULL after an attempt that failed. */
	tg_device *device;
	/* Counts sessions. */
	uint64_t session;
	/* When waiting for a server was given up; 0: never. */
	uint64_t gave_up;
	/* Of the first session; later ones must be to the same. */
	struct tg_info info;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * NSEC + (uint64_t)t.tv_nsec;
}

static void pause_for(uint64_t nsec)
{
	struct timespec t = { (time_t)(nsec / NSEC), (long)(nsec % NSEC) };

	nanosleep(&t, NULL);
}

/* ---- parameters */

static int set_target(const char *key, char *value)
{
	if (target) {
		nbdkit_error("%s: one volume only: give volume=NAME or socket=PATH once", key);
		free(value);
		return -1;
	}
	target = value;
	return value ? 0 : -1;
}

static int tidegate_config(const char *key, const char *value)
{
	if (strcmp(key, "volume") == 0) {
		if (*value == '\0' || strchr(value, '/')) {
			nbdkit_error("volume=%s: not the name of a volume; for the path of a socket say socket=PATH", value);
			return -1;
		}
		return set_target(key, strdup(value));
	}
	if (strcmp(key, "socket") == 0)
		return set_target(key, nbdkit_absolute_path(value));
	if (strcmp(key, "patience") == 0)
		return nbdkit_parse_unsigned("patience", value, &patience);
	nbdkit_error("%s: no such parameter; there are volume, socket and patience", key);
	return -1;
}

static int tidegate_config_complete(void)
{
	if (!target) {
		nbdkit_error("which volume? say volume=NAME or socket=PATH");
		return -1;
	}
	return 0;
}

#define CONFIG_HELP                                                                          \
	"volume=NAME       Volume that `tidegate attach NAME --bytes` attached.\n"           \
	"socket=PATH       The same, by the path of its socket.\n"                           \
	"patience=SECONDS  How long requests wait for a server that went away (default 30)."

static void tidegate_unload(void)
{
	free(target);
}

/* ---- sessions */

static int open_session(tg_device **device, struct tg_info *info)
{
	struct tg_options options = { .size = sizeof options, .arena_bytes = ARENA_BYTES };
	int result = tg_open(target, &options, device);

	if (result < 0)
		return result;
	memset(info, 0, sizeof *info);
	info->size = sizeof *info;
	result = tg_get_info(*device, info);
	if (result < 0)
		tg_close(*device);
	return result;
}

/* A wrong name is told when nbdkit starts, not when the first client comes. */
static int tidegate_get_ready(void)
{
	struct tg_info info;
	tg_device *device;

	if (open_session(&device, &info) < 0) {
		nbdkit_error("%s: %s", target, tg_error());
		return -1;
	}
	tg_close(device);
	return 0;
}

/* Whether a failed call may succeed with a new session. A handle that another thread replaced meanwhile is -EBADF. */
static bool is_gone(int result)
{
	return result == -ENOTCONN || result == -EBADF;
}

/* Whether it is worth waiting for a server to come. */
static bool may_come(int result)
{
	return result == -ENOENT || result == -ECONNREFUSED || result == -ENOTCONN || result == -ECONNRESET ||
	       result == -EBUSY || result == -EAGAIN || result == -ETIMEDOUT || result == -ESHUTDOWN;
}

static bool same_volume(const struct tg_info *a, const struct tg_info *b)
{
	return memcmp(a->stage_uuid, b->stage_uuid, 16) == 0 && memcmp(a->volume_uuid, b->volume_uuid, 16) == 0 &&
	       a->volume_bytes <= b->volume_bytes;
}

/* Replaces session `failed`, unless another thread has done so. `since`: when the request first failed. Holds the lock. */
static int reopen(struct connection *c, uint64_t failed, uint64_t since)
{
	struct tg_info info;
	tg_device *device;
	uint64_t until = since + patience * NSEC;
	int result;

	if (c->session != failed)
		return 0;
	if (c->gave_up >= since)
		return -ENOTCONN;
	if (c->device) {
		nbdkit_debug("%s: %s; opening it anew", target, tg_error());
		tg_close(c->device);
		c->device = NULL;
	}
	while ((result = open_session(&device, &info)) < 0 && may_come(result) && now() < until)
		pause_for(RETRY_NSEC);
	if (result < 0) {
		nbdkit_error("%s: no server came back within %u s: %s", target, patience, tg_error());
		c->gave_up = now();
		return result;
	}
	if (!same_volume(&c->info, &info)) {
		nbdkit_error("%s: is another volume now, or smaller: this connection must not go on with it", target);
		tg_close(device);
		c->gave_up = now();
		return -EIO;
	}
	c->device = device;
	c->session++;
	return 0;
}

/* One request, or a part of one. */
struct request {
	enum tg_operation operation;
	int flags;
	void *buffer;
	uint64_t length;
	uint64_t offset;
};

static int attempt(tg_device *device, const struct request *r)
{
	tg_ticket ticket;
	int result;

	switch (r->operation) {
	case TG_READ:
		return tg_pread(device, r->buffer, r->length, r->offset);
	case TG_WRITE:
		return tg_pwrite(device, r->buffer, r->length, r->offset, r->flags, NULL);
	case TG_WRITE_ZEROES:
		return tg_write_zeroes(device, r->offset, r->length, r->flags, NULL);
	case TG_DISCARD:
		result = tg_discard(device, r->offset, r->length, &ticket);
		if (result == 0 && (r->flags & TG_DURABLE))
			result = tg_persist(device, ticket, -1);
		return result;
	case TG_FLUSH:
		return tg_flush(device);
	default:
		return -EINVAL;
	}
}

/* Carries out a request, with as many sessions as it takes. */
static int carry_out(struct connection *c, const struct request *r)
{
	uint64_t since = 0;
	uint64_t session = 0;
	int result = 0;

	for (;;) {
		tg_device *device;

		pthread_mutex_lock(&c->lock);
		if (since)
			result = reopen(c, session, since);
		device = c->device;
		session = c->session;
		pthread_mutex_unlock(&c->lock);
		if (result == 0)
			result = device ? attempt(device, r) : -ENOTCONN;
		else
			break;
		if (!is_gone(result))
			break;
		if (!since)
			since = now();
		else if (now() > since + patience * NSEC)
			break;
	}
	if (result < 0) {
		nbdkit_error("%s: %s", target, tg_error());
		nbdkit_set_error(is_gone(result) ? ESHUTDOWN : -result);
		return -1;
	}
	return 0;
}

static void *tidegate_open(int readonly)
{
	struct connection *c = calloc(1, sizeof *c);
	uint64_t until = now() + patience * NSEC;
	int result;

	(void)readonly;
	if (!c) {
		nbdkit_error("calloc: %m");
		return NULL;
	}
	pthread_mutex_init(&c->lock, NULL);
	while ((result = open_session(&c->device, &c->info)) < 0 && may_come(result) && now() < until)
		pause_for(RETRY_NSEC);
	if (result < 0) {
		nbdkit_error("%s: %s", target, tg_error());
		pthread_mutex_destroy(&c->lock);
		free(c);
		return NULL;
	}
	return c;
}

static void tidegate_close(void *handle)
{
	struct connection *c = handle;

	if (c->device)
		tg_close(c->device);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

/* ---- properties */

static int64_t tidegate_get_size(void *handle)
{
	return (int64_t)((struct connection *)handle)->info.volume_bytes;
}

/* Any byte can be addressed; whole blocks are faster where the data is on disk. Requests up to the longest write are atomic. */
static int tidegate_block_size(void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
	uint32_t most = ((struct connection *)handle)->info.write_bytes_max;

	*minimum = *preferred = *maximum = 0;
	if (most >= BLOCK) {
		*minimum = 1;
		*preferred = BLOCK;
		*maximum = most / BLOCK * BLOCK;
	}
	return 0;
}

static int yes(void *handle)
{
	(void)handle;
	return 1;
}

static int no(void *handle)
{
	(void)handle;
	return 0;
}

static int native_fua(void *handle)
{
	(void)handle;
	return NBDKIT_FUA_NATIVE;
}

static int no_cache(void *handle)
{
	(void)handle;
	return NBDKIT_CACHE_NONE;
}

/* ---- requests */

static int durable(uint32_t flags)
{
	return flags & NBDKIT_FLAG_FUA ? TG_DURABLE : 0;
}

/* Clients may send more at once than the server takes. */
static int in_parts(struct connection *c, struct request r, uint32_t count)
{
	uint32_t most = c->info.write_bytes_max;

	while (count > 0) {
		r.length = count < most ? count : most;
		if (carry_out(c, &r) < 0)
			return -1;
		r.buffer = (char *)r.buffer + r.length;
		r.offset += r.length;
		count -= (uint32_t)r.length;
	}
	return 0;
}

static int tidegate_pread(void *handle, void *buffer, uint32_t count, uint64_t offset, uint32_t flags)
{
	(void)flags;
	return in_parts(handle, (struct request){ TG_READ, 0, buffer, 0, offset }, count);
}

static int tidegate_pwrite(void *handle, const void *buffer, uint32_t count, uint64_t offset, uint32_t flags)
{
	return in_parts(handle, (struct request){ TG_WRITE, durable(flags), (void *)buffer, 0, offset }, count);
}

static int tidegate_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	return carry_out(handle, &(struct request){ TG_WRITE_ZEROES, durable(flags), NULL, count, offset });
}

static int tidegate_trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	return carry_out(handle, &(struct request){ TG_DISCARD, durable(flags), NULL, count, offset });
}

static int tidegate_flush(void *handle, uint32_t flags)
{
	(void)flags;
	return carry_out(handle, &(struct request){ TG_FLUSH, 0, NULL, 0, 0 });
}

static struct nbdkit_plugin plugin = {
	.name = "tidegate",
	.longname = "Tidegate volume",
	.description = "A volume of Tidegate through the byte door",
	.unload = tidegate_unload,
	.config = tidegate_config,
	.config_complete = tidegate_config_complete,
	.config_help = CONFIG_HELP,
	.magic_config_key = "volume",
	.get_ready = tidegate_get_ready,
	.open = tidegate_open,
	.close = tidegate_close,
	.get_size = tidegate_get_size,
	.block_size = tidegate_block_size,
	.can_write = yes,
	.can_flush = yes,
	.can_trim = yes,
	.can_zero = yes,
	.can_fast_zero = yes,
	.can_fua = native_fua,
	.can_multi_conn = yes,
	.can_cache = no_cache,
	.is_rotational = no,
	.pread = tidegate_pread,
	.pwrite = tidegate_pwrite,
	.zero = tidegate_zero,
	.trim = tidegate_trim,
	.flush = tidegate_flush,
};

NBDKIT_REGISTER_PLUGIN(plugin)
