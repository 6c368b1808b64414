/*
 * wal: a store of counters whose only form on disk is an append log.
 *
 *     wal TARGET run [COUNT]      commit COUNT transactions (0, the default: until killed)
 *     wal TARGET verify           rebuild the counters and prove that they are right
 *
 *     --acks FILE    run: note every acknowledged transaction there; verify: none of those may be missing
 *     --base N --length N         the log's bytes in the volume (0 and 1 MiB)
 *     --patience S   how long to wait for a server that went away (30)
 *
 * A transaction moves an amount between some counters, is one entry of the log, and is acknowledged when that is durable.
 * What it does follows from its number alone. So the counters after n transactions can be computed without the log, and
 * verify compares: with the log that is there, and with the acknowledgements. Half a transaction would leave a sum that is
 * not zero; a lost one would leave a gap in the numbers, or a last number below the last acknowledged one.
 *
 * When the log is half full a snapshot of all counters is appended and everything before it dropped. No wait is needed
 * between the two: what survives a crash is a prefix of what was written, so where the truncation is, the snapshot is.
 *
 * It may be killed, and so may the server: start it again, or let it wait. One at a time for one log.
 */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <tidegate.h>

#define COUNTERS 64
#define CHANGES_MAX 9
#define NOTE_MAX 700

enum kind { TRANSACTION = 1, SNAPSHOT = 2 };

/* An entry of the log: this, then the changes and a note of any length, or the counters. */
struct head {
	uint32_t kind;
	uint32_t count;
	uint64_t number;
};

struct change {
	uint32_t counter;
	int32_t amount;
};

struct transaction {
	struct head head;
	struct change changes[CHANGES_MAX];
	size_t note_bytes;
	uint8_t note[NOTE_MAX];
};

/* The store: everything in it is made from the log. */
struct store {
	tg_device *device;
	tg_log *log;
	/* Last transaction. */
	uint64_t number;
	int64_t counters[COUNTERS];
};

static const char *target, *acks_path;
static uint64_t base, length = 1 << 20;
static unsigned patience = 30;

static void die(const char *what)
{
	fprintf(stderr, "wal: %s: %s\n", target, what);
	exit(1);
}

/* ---- transactions */

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* What transaction `number` is. */
static void make(uint64_t number, struct transaction *t)
{
	uint64_t seed = mix(number + 0x9e3779b97f4a7c15u);
	int32_t sum = 0;
	size_t i;

	memset(t, 0, sizeof *t);
	t->head = (struct head){ TRANSACTION, 2 + (uint32_t)(seed % (CHANGES_MAX - 1)), number };
	for (i = 0; i < t->head.count; i++) {
		uint64_t random = mix(seed + i);
		int32_t amount = (int32_t)(random >> 40) - (1 << 23);

		/* The last one takes what the others gave. */
		if (i + 1 == t->head.count)
			amount = -sum;
		t->changes[i] = (struct change){ (uint32_t)(random % COUNTERS), amount };
		sum += amount;
	}
	t->note_bytes = mix(seed + 100) % NOTE_MAX;
	memset(t->note, (int)(seed & 0xff), t->note_bytes);
}

static void apply(struct store *s, const struct transaction *t)
{
	size_t i;

	for (i = 0; i < t->head.count; i++)
		s->counters[t->changes[i].counter] += t->changes[i].amount;
	s->number = t->head.number;
}

/* ---- the log */

/* Takes one entry of the log into the store. */
static void replay(struct store *s, const uint8_t *entry, size_t bytes, bool first)
{
	struct transaction expected;
	struct head head;
	size_t changes, at = sizeof head;

	if (bytes < sizeof head)
		die("an entry is too short");
	memcpy(&head, entry, sizeof head);
	if (head.kind == SNAPSHOT) {
		if (bytes != sizeof head + sizeof s->counters)
			die("a snapshot is not whole");
		if (!first && (head.number != s->number || memcmp(entry + at, s->counters, sizeof s->counters) != 0))
			die("a snapshot differs from the transactions before it");
		memcpy(s->counters, entry + at, sizeof s->counters);
		s->number = head.number;
		return;
	}
	if (head.kind != TRANSACTION || head.number != s->number + 1)
		die("a transaction is missing, or twice there");
	make(head.number, &expected);
	changes = sizeof(struct change) * expected.head.count;
	if (bytes != at + changes + expected.note_bytes || memcmp(&head, &expected.head, at) != 0 ||
	    memcmp(entry + at, expected.changes, changes) != 0 ||
	    memcmp(entry + at + changes, expected.note, expected.note_bytes) != 0)
		die("a transaction is not what was written");
	apply(s, &expected);
}

static int rebuild(struct store *s)
{
	uint8_t entry[sizeof(struct transaction) + sizeof s->counters];
	uint64_t at, head;
	ssize_t bytes;
	int result = tg_log_bounds(s->log, &head, NULL);

	memset(s->counters, 0, sizeof s->counters);
	s->number = 0;
	if (result < 0)
		return result;
	at = head;
	for (;;) {
		uint64_t here = at;

		bytes = tg_log_read(s->log, &at, entry, sizeof entry);
		if (bytes <= 0)
			return (int)bytes;
		replay(s, entry, (size_t)bytes, here == head);
	}
}

static void close_store(struct store *s)
{
	if (s->log)
		tg_log_close(s->log);
	if (s->device)
		tg_close(s->device);
	s->log = NULL;
	s->device = NULL;
}

/* One attempt to open the store and to rebuild the counters. */
static int open_once(struct store *s, int flags)
{
	int result = tg_open(target, NULL, &s->device);

	if (result == 0)
		result = tg_log_open(s->device, base, length, flags, &s->log);
	if (result == 0)
		result = rebuild(s);
	if (result < 0)
		close_store(s);
	return result;
}

static bool may_come(int result)
{
	return result == -ENOTCONN || result == -ECONNREFUSED || result == -ECONNRESET || result == -EBUSY ||
	       result == -EAGAIN || result == -ETIMEDOUT || result == -ESHUTDOWN;
}

/* Opens the store; `waiting`: a server that is not there may come back, with its socket. */
static void open_store(struct store *s, int flags, bool waiting)
{
	time_t until = time(NULL) + (time_t)patience;
	int result;

	memset(s, 0, sizeof *s);
	while ((result = open_once(s, flags)) < 0) {
		bool worth = may_come(result) || (waiting && result == -ENOENT);

		if (!worth || time(NULL) > until)
			die(tg_error());
		usleep(50000);
	}
}

/* Writes a snapshot and drops everything before it when the log is half full. */
static int tidy(struct store *s)
{
	struct head head = { SNAPSHOT, COUNTERS, s->number };
	struct iovec parts[] = { { &head, sizeof head }, { s->counters, sizeof s->counters } };
	uint64_t first, tail, position;
	int result = tg_log_bounds(s->log, &first, &tail);

	if (result < 0 || tail - first < length / 2)
		return result;
	result = tg_log_appendv(s->log, parts, 2, &position, NULL);
	return result < 0 ? result : tg_log_truncate(s->log, position);
}

/* One transaction, durable when this returns 0. */
static int commit(struct store *s, const struct transaction *t)
{
	struct iovec parts[] = {
		{ (void *)&t->head, sizeof t->head },
		{ (void *)t->changes, sizeof(struct change) * t->head.count },
		{ (void *)t->note, t->note_bytes },
	};
	uint64_t position;
	int result = tidy(s);

	if (result == 0)
		result = tg_log_appendv(s->log, parts, t->note_bytes ? 3 : 2, &position, NULL);
	if (result == 0)
		result = tg_log_persist(s->log, position, -1);
	if (result == 0)
		apply(s, t);
	return result;
}

/* ---- acknowledgements: lines with a number, in a plain file, which is as safe as this program's death needs */

static void acknowledge(int file, uint64_t number)
{
	char line[32];
	int bytes = snprintf(line, sizeof line, "%" PRIu64 "\n", number);

	if (file >= 0 && write(file, line, (size_t)bytes) != bytes)
		die("cannot write the acknowledgements");
}

static uint64_t last_acknowledged(void)
{
	uint64_t number, last = 0;
	FILE *file;

	if (!acks_path)
		return 0;
	file = fopen(acks_path, "r");
	if (!file)
		return 0;
	while (fscanf(file, "%" SCNu64, &number) == 1)
		last = number;
	fclose(file);
	return last;
}

/* ---- commands */

static void check_acknowledged(const struct store *s, uint64_t acknowledged)
{
	if (s->number < acknowledged) {
		fprintf(stderr, "wal: transaction %" PRIu64 " was acknowledged; the log ends with %" PRIu64 "\n", acknowledged,
			s->number);
		exit(1);
	}
}

static int run(uint64_t count)
{
	struct transaction t;
	struct store s;
	uint64_t acknowledged, done = 0;
	int result, file = -1;

	acknowledged = last_acknowledged();
	open_store(&s, TG_LOG_CREATE, false);
	check_acknowledged(&s, acknowledged);
	if (acks_path) {
		file = open(acks_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
		if (file < 0)
			die(strerror(errno));
	}
	while (count == 0 || done < count) {
		make(s.number + 1, &t);
		result = commit(&s, &t);
		if (result == 0) {
			acknowledged = s.number;
			acknowledge(file, acknowledged);
			done++;
			continue;
		}
		if (!may_come(result))
			die(tg_error());
		/* The transaction may be there or not: the log says. */
		fprintf(stderr, "wal: %s; opening it anew\n", tg_error());
		close_store(&s);
		open_store(&s, 0, true);
		check_acknowledged(&s, acknowledged);
	}
	printf("%" PRIu64 " transactions, the last is %" PRIu64 "\n", done, s.number);
	close_store(&s);
	return 0;
}

static int verify(void)
{
	struct store s, computed = { 0 };
	struct transaction t;
	uint64_t number;
	int64_t sum = 0;
	size_t i;

	open_store(&s, 0, false);
	check_acknowledged(&s, last_acknowledged());
	for (number = 1; number <= s.number; number++) {
		make(number, &t);
		apply(&computed, &t);
	}
	if (memcmp(computed.counters, s.counters, sizeof s.counters) != 0)
		die("the counters are not the sum of the transactions");
	for (i = 0; i < COUNTERS; i++)
		sum += s.counters[i];
	if (sum != 0)
		die("half a transaction is there");
	printf("%" PRIu64 " transactions, %" PRIu64 " of them acknowledged: none is missing, none is there in part\n", s.number,
	       last_acknowledged());
	close_store(&s);
	return 0;
}

static void usage(void)
{
	fputs("usage: wal TARGET run [COUNT] | verify  [--acks FILE] [--base N] [--length N] [--patience S]\n", stderr);
	exit(2);
}

int main(int argc, char **argv)
{
	const char *command;
	uint64_t count = 0;
	int at = 3;

	if (argc < 3)
		usage();
	target = argv[1];
	command = argv[2];
	if (at < argc && argv[at][0] != '-')
		count = strtoull(argv[at++], NULL, 0);
	for (; at + 1 < argc; at += 2) {
		if (strcmp(argv[at], "--acks") == 0)
			acks_path = argv[at + 1];
		else if (strcmp(argv[at], "--base") == 0)
			base = strtoull(argv[at + 1], NULL, 0);
		else if (strcmp(argv[at], "--length") == 0)
			length = strtoull(argv[at + 1], NULL, 0);
		else if (strcmp(argv[at], "--patience") == 0)
			patience = (unsigned)strtoul(argv[at + 1], NULL, 0);
		else
			usage();
	}
	if (at != argc)
		usage();
	if (strcmp(command, "run") == 0)
		return run(count);
	if (strcmp(command, "verify") == 0)
		return verify();
	usage();
}
