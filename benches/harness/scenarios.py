"""What is measured: stands (one test machine each), and the scenarios of each, with who takes part. The first of those is
Tidegate, which is compared with each of the others."""

import fnmatch
from dataclasses import dataclass

from . import devices as d
from . import work as w
from .work import Fio


@dataclass(frozen=True)
class Scenario:
    """`wide`: measured only on demand."""

    name: str
    work: object
    who: tuple
    wide: bool = False


@dataclass(frozen=True)
class Stand:
    """`counted`: the test machine tells time in instructions."""

    name: str
    make: object
    scenarios: tuple
    memory_mib: int = 4096
    cpus: int = 2
    rounds_max: int = 99
    seconds_max: float = 3600
    counted: bool = False


NULLS = (d.OURS_MEMORY, d.NULL)
LOOPS = (d.OURS_MEMORY, d.LOOP_ZERO, d.LOOP_COPY)
DISKS = (d.OURS_MEMORY, d.LOOP_ZERO, d.RAW)
CACHES = (d.OURS_LOG, d.OURS_MEMORY, d.WRITECACHE, d.BCACHE)
SLOW = (*CACHES, d.BARE)
# What has no goal: the disks that stages and caches are on, with nothing before them.
APPLICATIONS = (*SLOW, d.CEILING)
QUEUES = (d.TWO_QUEUES, d.ONE_QUEUE)
ZIPF = ("--random_distribution=zipf:0.99",)

KERNEL = (
    Scenario("4K randread qd32, flushed", Fio("randread", depth=32), (d.OURS_MEMORY, d.LOOP_ZERO, d.LOOP_COPY, d.RAW)),
    Scenario("4K randwrite qd32", Fio("randwrite", depth=32), NULLS),
    Scenario("4K randwrite qd1", Fio("randwrite", tail=True), NULLS),
    Scenario("4K randwrite qd128", Fio("randwrite", depth=128), NULLS),
    Scenario("4K randread qd1, flushed", Fio("randread", tail=True), DISKS),
    Scenario("16K randwrite qd8", Fio("randwrite", "16k", 8), (d.OURS_MEMORY, d.NULL, d.LOOP_ZERO)),
    Scenario("4K mixed 70/30 qd32", Fio("randrw", depth=32, options=("--rwmixread=70",)), LOOPS),
    Scenario("4K Zipf 0.99 overwrites qd32", Fio("randwrite", depth=32, options=ZIPF), LOOPS),
    Scenario("1M sequential write qd8", Fio("write", "1M", 8, mb=True), (d.OURS_MEMORY, d.LOOP_ZERO, d.LOOP_COPY, d.RAW)),
    Scenario("1M sequential read qd8, flushed", Fio("read", "1M", 8, mb=True),
             (d.OURS_MEMORY, d.LOOP_ZERO, d.LOOP_COPY, d.RAW)),
    Scenario("checksum and copy of 4 KiB", w.costs, (d.OURS_MEMORY,)),
)

MATRIX = tuple(
    Scenario(f"{bs.upper()} {rw} qd{depth}", Fio(rw, bs, depth, mb=bs == "1M"), (d.OURS_MEMORY, d.LOOP_ZERO, d.NULL), True)
    for rw in ("randwrite", "randread", "write", "read")
    for bs in ("4k", "16k", "128k", "1M")
    for depth in (1, 8, 32, 128)
)

SYNC = ("--fsync=1",)

COUNTED = (
    Scenario("instructions: 4K randwrite qd32", w.Instructions(Fio("randwrite", depth=32)), NULLS),
    Scenario("instructions: 4K randwrite qd1", w.Instructions(Fio("randwrite")), NULLS),
    Scenario("instructions: 4K randread qd32, flushed", w.Instructions(Fio("randread", depth=32)), (d.OURS_MEMORY, d.LOOP_ZERO)),
    Scenario("instructions: 1M sequential write qd8", w.Instructions(Fio("write", "1M", 8)), (d.OURS_MEMORY, d.LOOP_ZERO)),
    Scenario("instructions: 4K write+fsync qd1", w.Instructions(Fio("randwrite", options=SYNC, calls=True)),
             (*CACHES, d.KERNEL_LOOP, d.RAW)),
    Scenario("instructions: 4K write+fsync, 8 jobs", w.Instructions(Fio("randwrite", jobs=8, options=SYNC, calls=True)),
             (*CACHES, d.KERNEL_LOOP, d.RAW)),
)

COUNTED_APPLICATIONS = (
    Scenario("instructions: SQLite, WAL, synchronous=FULL, ext4", w.Instructions(w.sqlite_rows), (*CACHES, d.CEILING)),
    Scenario("instructions: pgbench, 1 client, ext4", w.Instructions(w.Pgbench(1)), (*CACHES, d.CEILING)),
)

STANDS = (
    Stand("fast", d.fast, KERNEL),
    Stand("queues", d.queued, (
        Scenario("4K randwrite qd1, by queues", Fio("randwrite", tail=True), QUEUES),
        Scenario("4K randwrite, 2 jobs of qd16, by queues", Fio("randwrite", depth=16, jobs=2), QUEUES),
        Scenario("4K randread, 2 jobs of qd16, by queues", Fio("randread", depth=16, jobs=2), QUEUES),
    )),
    Stand("wide", d.fast, MATRIX, rounds_max=5, seconds_max=0.4),
    Stand("staged", d.staged, (
        Scenario("4K randread qd32, staged", Fio("randread", depth=32), (d.OURS_MEMORY, d.NULL, d.RAW)),
        Scenario("4K randread qd1, staged", Fio("randread"), (d.OURS_MEMORY, d.NULL, d.RAW)),
    )),
    Stand("synced", d.synced, (
        Scenario("4K write+fsync qd1", Fio("randwrite", options=SYNC, calls=True), (*CACHES, d.KERNEL_LOOP, d.RAW)),
        Scenario("4K write+fsync qd1, through io_uring", Fio("randwrite", options=SYNC), (*CACHES, d.KERNEL_LOOP, d.RAW)),
        Scenario("4K write+fsync, 8 jobs", Fio("randwrite", jobs=8, options=SYNC, calls=True), (*CACHES, d.KERNEL_LOOP, d.RAW)),
    )),
    Stand("slow", d.slowed, (
        Scenario("4K write+fsync qd1, slow backing", Fio("randwrite", options=SYNC, calls=True), (*SLOW, d.RAW)),
        Scenario("4K write+fsync, 8 jobs, slow backing", Fio("randwrite", jobs=8, options=SYNC, calls=True), (*SLOW, d.RAW)),
    )),
    Stand("full", d.filled, (
        Scenario("4K randwrite qd32, stage full",
                 Fio("randwrite", depth=32, size="280M", tail=True, second_half=True, longer=4),
                 SLOW),
        Scenario("1M sequential write qd8, stage full",
                 Fio("write", "1M", 8, size="280M", mb=True, tail=True, second_half=True, longer=4), SLOW),
    )),
    Stand("restart", d.restarted, (
        Scenario("killed, arena lost, small stage", w.recovery, ("tidegate, stage of 64 MiB",)),
        Scenario("killed, arena lost, large stage", w.recovery, ("tidegate, stage of 512 MiB",)),
    ), rounds_max=5),
    Stand("idle", d.idle, (Scenario("attached and idle", w.quiet, (d.OURS_LOG,)),), rounds_max=1),
    Stand("sizes", d.sized, (
        Scenario("4K randwrite qd8 all over the volume", Fio("randwrite", depth=8, size="100%", cost=True),
                 (d.LARGE, d.SMALL)),
        Scenario("4K randread qd8 all over the volume", Fio("randread", depth=8, size="100%", cost=True),
                 (d.LARGE, d.SMALL)),
    )),
    Stand("volumes", d.shared, (
        Scenario("4K randwrite qd8 on a stage with others", Fio("randwrite", depth=8, size="128M", cost=True), (d.MANY, d.ONE)),
    )),
    Stand("instructions", d.counted, COUNTED, cpus=1, rounds_max=3, seconds_max=0.5, counted=True),
    Stand("instructions of applications", d.counted_files, COUNTED_APPLICATIONS, cpus=1, rounds_max=3, seconds_max=0.5,
          counted=True),
    *(
        Stand(make.__name__, make, (
            Scenario(f"SQLite, WAL, synchronous=FULL, {make.__name__}, slow backing", w.sqlite_rows, APPLICATIONS),
            Scenario(f"create and fsync of files, {make.__name__}, slow backing", w.storm, APPLICATIONS),
            Scenario(f"pgbench, 1 client, {make.__name__}, slow backing", w.Pgbench(1), APPLICATIONS),
            Scenario(f"pgbench, 4 clients, {make.__name__}, slow backing", w.Pgbench(4), APPLICATIONS),
        ))
        for make in (d.ext4, d.xfs)
    ),
)


def chosen(pattern, wide):
    """Stands with those of their scenarios that are asked for: a pattern of the shell on either name, or a part of it."""
    for stand in STANDS:
        def fits(scenario, stand=stand):
            names = (stand.name, scenario.name)
            return any(not pattern or pattern in name or fnmatch.fnmatch(name, pattern) for name in names)

        scenarios = [s for s in stand.scenarios if fits(s) and (wide or not s.wide)]
        if scenarios:
            yield stand, scenarios
