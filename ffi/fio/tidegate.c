/*
 * fio engine: a volume of Tidegate through the byte door. Asynchronous; every job has a session, its buffers are in the
 * session's arena, so that no byte is copied on the way to the server.
 */

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include "fio.h"
#include "optgroup.h"

#include <tidegate.h>

struct options {
	void *pad; /* fio takes an offset of 0 for no option */
	char *volume;
	char *socket;
	unsigned int durable;
};

static struct fio_option options[] = {
	{
		.name = "volume",
		.lname = "Tidegate volume",
		.type = FIO_OPT_STR_STORE,
		.off1 = offsetof(struct options, volume),
		.help = "Name of a volume that is attached with --bytes",
		.category = FIO_OPT_C_ENGINE,
		.group = FIO_OPT_G_INVALID,
	},
	{
		.name = "socket",
		.lname = "Tidegate socket",
		.type = FIO_OPT_STR_STORE,
		.off1 = offsetof(struct options, socket),
		.help = "Path of the volume's socket",
		.category = FIO_OPT_C_ENGINE,
		.group = FIO_OPT_G_INVALID,
	},
	{
		.name = "durable",
		.lname = "Tidegate durable writes",
		.type = FIO_OPT_BOOL,
		.off1 = offsetof(struct options, durable),
		.def = "0",
		.help = "Writes complete when they are durable, whatever the volume's ack level",
		.category = FIO_OPT_C_ENGINE,
		.group = FIO_OPT_G_INVALID,
	},
	{ .name = NULL },
};

struct session {
	tg_device *device;
	unsigned int slots;
	/* Queued, not submitted yet. */
	struct tg_submission *queued;
	struct io_u **queued_units;
	unsigned int queued_count;
	struct tg_completion *completions;
};

static const char *target_of(struct thread_data *td)
{
	const struct options *o = td->eo;

	if (o->socket)
		return o->socket;
	return o->volume;
}

static int fail(struct thread_data *td, int result, const char *what)
{
	log_err("fio: tidegate: %s: %s\n", what, tg_error());
	td_verror(td, -result, what);
	return 1;
}

/* In fio's parent process: the size only. A session does not go through fork. */
static int tidegate_setup(struct thread_data *td)
{
	struct tg_info info = { .size = sizeof info };
	const char *target = target_of(td);
	tg_device *device;
	int result;

	if (!target) {
		log_err("fio: tidegate: say volume=NAME or socket=PATH\n");
		return 1;
	}
	if (td->files_index == 0) {
		add_file(td, "tidegate", 0, 0);
		td->o.nr_files = td->o.nr_files ?: 1;
		td->o.open_files++;
	}
	result = tg_open(target, NULL, &device);
	if (result < 0)
		return fail(td, result, target);
	result = tg_get_info(device, &info);
	tg_close(device);
	if (result < 0)
		return fail(td, result, target);
	if (td_max_bs(td) > info.write_bytes_max) {
		log_err("fio: tidegate: blocks of %llu bytes; %s takes at most %u\n", (unsigned long long)td_max_bs(td), target,
			info.write_bytes_max);
		return 1;
	}
	td->files[0]->real_file_size = info.volume_bytes;
	return 0;
}

static void tidegate_cleanup(struct thread_data *td)
{
	struct session *s = td->io_ops_data;

	if (!s)
		return;
	if (s->device)
		tg_close(s->device);
	free(s->queued);
	free(s->queued_units);
	free(s->completions);
	free(s);
	td->io_ops_data = NULL;
}

static uint32_t power_of_two(uint32_t n, uint32_t least)
{
	while (least < n)
		least *= 2;
	return least;
}

static int tidegate_init(struct thread_data *td)
{
	/* fio asks for its buffers in one piece, with some room for alignment; a quarter of an arena is for such pieces. */
	uint64_t arena = 4 * ((uint64_t)td->o.iodepth * td_max_bs(td) + (64 << 10));
	struct tg_options o = { .size = sizeof o };
	struct session *s = calloc(1, sizeof *s);
	int result;

	if (!s)
		return 1;
	td->io_ops_data = s;
	s->slots = td->o.iodepth;
	s->queued = calloc(s->slots, sizeof *s->queued);
	s->queued_units = calloc(s->slots, sizeof *s->queued_units);
	s->completions = calloc(s->slots, sizeof *s->completions);
	if (!s->queued || !s->queued_units || !s->completions)
		return 1;
	if (arena > UINT32_MAX) {
		log_err("fio: tidegate: iodepth times block size is too much\n");
		return 1;
	}
	o.depth = power_of_two(td->o.iodepth, 8);
	o.arena_bytes = (uint32_t)((arena + 4095) / 4096 * 4096);
	result = tg_open(target_of(td), &o, &s->device);
	return result < 0 ? fail(td, result, target_of(td)) : 0;
}

static int tidegate_iomem_alloc(struct thread_data *td, size_t bytes)
{
	struct session *s = td->io_ops_data;

	td->orig_buffer = tg_alloc(s->device, bytes);
	return td->orig_buffer ? 0 : fail(td, -errno, "buffers");
}

static void tidegate_iomem_free(struct thread_data *td)
{
	struct session *s = td->io_ops_data;

	if (s && s->device && td->orig_buffer)
		tg_free(s->device, td->orig_buffer);
}

static int operation_of(const struct io_u *unit)
{
	switch (unit->ddir) {
	case DDIR_READ:
		return TG_READ;
	case DDIR_WRITE:
		return TG_WRITE;
	case DDIR_TRIM:
		return TG_DISCARD;
	case DDIR_SYNC:
	case DDIR_DATASYNC:
	case DDIR_SYNC_FILE_RANGE:
		return TG_FLUSH;
	default:
		return 0;
	}
}

static enum fio_q_status tidegate_queue(struct thread_data *td, struct io_u *unit)
{
	const struct options *o = td->eo;
	struct session *s = td->io_ops_data;
	struct tg_submission *submission = &s->queued[s->queued_count];
	int operation = operation_of(unit);

	fio_ro_check(td, unit);
	if (s->queued_count == s->slots)
		return FIO_Q_BUSY;
	if (!operation) {
		unit->error = EINVAL;
		return FIO_Q_COMPLETED;
	}
	memset(submission, 0, sizeof *submission);
	submission->operation = (uint8_t)operation;
	submission->cookie = (uintptr_t)unit;
	if (operation != TG_FLUSH) {
		submission->offset = unit->offset;
		submission->length = unit->xfer_buflen;
	}
	if (operation == TG_READ || operation == TG_WRITE)
		submission->data = unit->xfer_buf;
	if (operation == TG_WRITE && (o->durable || td->o.sync_io))
		submission->flags = TG_DURABLE;
	s->queued_units[s->queued_count++] = unit;
	return FIO_Q_QUEUED;
}

static int tidegate_commit(struct thread_data *td)
{
	struct session *s = td->io_ops_data;
	unsigned int i, done;
	struct timespec now;
	int result;

	/* The ring has room for iodepth requests. If the server has not taken the last ones yet, it will in a moment. */
	while (s->queued_count) {
		result = tg_submit(s->device, s->queued, s->queued_count, NULL);
		if (result == -EAGAIN) {
			usleep(1);
			continue;
		}
		if (result < 0) {
			fail(td, result, "submit");
			return result;
		}
		fio_gettime(&now, NULL);
		done = s->queued_count;
		for (i = 0; i < done; i++) {
			memcpy(&s->queued_units[i]->issue_time, &now, sizeof now);
			io_u_queued(td, s->queued_units[i]);
		}
		io_u_mark_submit(td, done);
		s->queued_count = 0;
	}
	return 0;
}

static int tidegate_getevents(struct thread_data *td, unsigned int min, unsigned int max, const struct timespec *t)
{
	struct session *s = td->io_ops_data;
	int64_t timeout = t ? (int64_t)t->tv_sec * 1000000000 + t->tv_nsec : -1;
	unsigned int count = 0;

	do {
		ssize_t n = tg_reap(s->device, s->completions + count, max - count, min > count ? timeout : 0);

		if (n < 0) {
			fail(td, (int)n, "reap");
			return (int)n;
		}
		if (n == 0)
			break;
		count += (unsigned int)n;
	} while (count < min);
	return (int)count;
}

static struct io_u *tidegate_event(struct thread_data *td, int event)
{
	struct session *s = td->io_ops_data;
	const struct tg_completion *completion = &s->completions[event];
	struct io_u *unit = (struct io_u *)(uintptr_t)completion->cookie;

	unit->error = completion->result < 0 ? (unsigned int)-completion->result : 0;
	return unit;
}

/* There is no file. */
static int tidegate_open_file(struct thread_data *td, struct fio_file *f)
{
	return 0;
}

static int tidegate_close_file(struct thread_data *td, struct fio_file *f)
{
	return 0;
}

static int tidegate_invalidate(struct thread_data *td, struct fio_file *f)
{
	return 0;
}

struct ioengine_ops ioengine = {
	.name = "tidegate",
	.version = FIO_IOOPS_VERSION,
	.flags = FIO_DISKLESSIO | FIO_NOEXTEND | FIO_NODISKUTIL | FIO_MEMALIGN | FIO_ASYNCIO_SETS_ISSUE_TIME,
	.setup = tidegate_setup,
	.init = tidegate_init,
	.cleanup = tidegate_cleanup,
	.iomem_alloc = tidegate_iomem_alloc,
	.iomem_free = tidegate_iomem_free,
	.queue = tidegate_queue,
	.commit = tidegate_commit,
	.getevents = tidegate_getevents,
	.event = tidegate_event,
	.open_file = tidegate_open_file,
	.close_file = tidegate_close_file,
	.invalidate = tidegate_invalidate,
	.options = options,
	.option_struct_size = sizeof(struct options),
};
