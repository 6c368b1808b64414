"""What is done with a device, and what is noted of it: triples of measure, unit, value. A measure of which less is better
begins with a '-'."""

import json
import mmap
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from dataclasses import dataclass

from .devices import cpu_ns, run

# After a restart.
COLD_READS = 400

LATENCIES = (("p50", "50.000000"), ("p99", "99.000000"), ("p99.9", "99.900000"))


@dataclass(frozen=True)
class Fio:
    """A job of fio. `tail`: percentiles of latency too; `second_half`: what comes before is not measured; `cost`: processor
    time of the server for each; `calls`: by plain calls one after the other, as databases do it. An fsync through io_uring is
    carried out by a worker thread of the kernel, and waking that and being woken by it takes longer here than the fsync."""

    rw: str
    bs: str = "4k"
    depth: int = 1
    jobs: int = 1
    options: tuple = ()
    size: str = "200M"
    mb: bool = False
    tail: bool = False
    second_half: bool = False
    cost: bool = False
    longer: float = 1.0
    calls: bool = False

    def __call__(self, way, seconds):
        seconds *= self.longer
        command = ["fio", "--name=b", f"--filename={way.path}", f"--rw={self.rw}", f"--bs={self.bs}", "--direct=1",
                   f"--iodepth={self.depth}", f"--numjobs={self.jobs}", f"--size={self.size}",
                   f"--ioengine={'psync' if self.calls else 'io_uring'}",
                   "--randrepeat=0", "--norandommap", "--group_reporting", "--output-format=json", "--thread",
                   "--allow_mounted_write=0"]
        command += ["--time_based", f"--runtime={int(seconds * (500 if self.second_half else 1000))}ms"]
        if self.second_half:
            command.append(f"--ramp_time={int(seconds * 500)}ms")
        pid = way.pid() if self.cost else None
        before = cpu_ns(pid) if pid else 0
        out = run(*command, *self.options)
        took = (cpu_ns(pid) - before) if pid else 0
        job = json.loads(out[out.index("{"):])["jobs"][0]
        sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
        notes = [("throughput", "MB/s", sum(side["bw_bytes"] for side in sides) / 1e6) if self.mb else
                 ("rate", "IOPS", sum(side["iops"] for side in sides))]
        if self.tail:
            percentiles = sides[-1]["clat_ns"]["percentile"]
            notes += [(f"-{name}", "us", percentiles[key] / 1e3) for name, key in LATENCIES]
        if pid:
            notes.append(("-server's time for each", "us", took / 1e3 / sum(side["total_ios"] for side in sides)))
        return notes


class Instructions:
    """What the whole machine executes for one of what `work` counts, whoever does it: program, kernel, server. The test machine's
    time is told in instructions there, and has one processor, so what is not idle time is work."""

    def __init__(self, work):
        self.work = work

    def __call__(self, way, seconds):
        prepare = getattr(self.work, "prepare", None)
        if prepare:
            prepare(way)
        before, started = idle_ns(), time.monotonic_ns()
        (_, _, rate), *_ = self.work(way, seconds)
        idle = (idle_ns() - before) / (time.monotonic_ns() - started)
        return [("-instructions", "each", 1e9 / rate * (1 - idle))]


def idle_ns():
    """How long the one processor had nothing to do."""
    with open("/proc/uptime", encoding="ascii") as file:
        return int(float(file.read().split()[1]) * 1e9)


def costs(way, seconds):
    """What every byte costs here, to be compared with what it costs natively."""
    del way, seconds
    notes = [json.loads(line) for line in run(os.environ["NATIVE_BIN"], "costs").splitlines()]
    return [(f"-{note['measure']}", note["unit"], note["values"][0]) for note in notes]


def recovery(way, seconds):
    """Killed when its stage is as full as it gets within a time, and without its arena, as after a power cut."""
    del seconds
    stage = way.stage_status()["stage_bytes"]
    before = way.stage_status()["record_bytes"]
    job = subprocess.Popen(["fio", "--name=b", f"--filename={way.path}", "--rw=write", "--bs=1M", "--direct=1", "--iodepth=8",
                            "--ioengine=io_uring", "--size=100%", "--time_based", "--runtime=60", "--output=/dev/null"])
    end = time.monotonic() + 20
    while way.stage_status()["used_bytes"] < stage * 0.85 and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(2)
    job.wait()
    used = way.stage_status()["used_bytes"]
    written = way.stage_status()["record_bytes"] - before
    way.kill()
    shutil.rmtree("/dev/shm/tidegate", ignore_errors=True)
    started = time.monotonic()
    way.attach()
    attached = time.monotonic() - started
    file = os.open(way.path, os.O_RDONLY | os.O_DIRECT)
    os.preadv(file, [mmap.mmap(-1, 4096)], 0)
    first = time.monotonic() - started
    # What was written last is staged, and flushed last. At first most of it is not in memory again.
    page, blocks, size = mmap.mmap(-1, 4096), used // 4 // 4096, os.lseek(file, 0, os.SEEK_END)
    begun = time.monotonic()
    for i in range(1, COLD_READS + 1):
        os.preadv(file, [page], (written - 4096 * (1 + i * 7919 % blocks)) % size)
    cold = (time.monotonic() - begun) / COLD_READS
    os.close(file)
    opened = (way.status()["stages"][0].get("recovery") or {}).get("open_micros")
    notes = [("staged when it was killed", "MiB", used / (1 << 20)), ("-attach", "ms", attached * 1e3),
             ("-attach and first read", "ms", first * 1e3),
             (f"-each of {COLD_READS} reads at random, right behind it", "us", cold * 1e6)]
    if opened is not None:
        notes.append(("-of that, the stage opened", "ms", opened / 1e3))
    return notes


def quiet(way, seconds):
    """What an idle server does."""
    seconds = max(seconds, 10)
    pid = way.pid()

    def switches():
        total = 0
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/status", encoding="ascii") as file:
                total += sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
        return total

    before, cpu = switches(), cpu_ns(pid)
    time.sleep(seconds)
    woken, took = switches() - before, cpu_ns(pid) - cpu
    notes = [("-wake-ups", "1/s", woken / seconds), ("-processor time", "us/s", took / 1e3 / seconds)]
    if shutil.which("strace"):
        # Attaching to a thread that sleeps interrupts its call; those are seen once and are not the server's.
        out = subprocess.run(["timeout", "-s", "INT", str(seconds), "strace", "-f", "-p", str(pid), "-o", "/tmp/calls"],
                             capture_output=True, text=True, check=False)
        del out
        with open("/tmp/calls", encoding="ascii", errors="replace") as file:
            calls = [line for line in file if "(" in line and "resumed" not in line and "unfinished" not in line]
        notes.append(("-system calls", "1/s", len(calls) / seconds))
        print("".join(calls[:20]), flush=True)
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    return notes + [("-memory besides the arena", "KiB", kib)]


def sqlite_rows(way, seconds):
    """Rows, each a transaction."""
    path = tempfile.mkdtemp(dir=way.folder)
    database = sqlite3.connect(os.path.join(path, "db"), isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, entry BLOB)")
    count, row, started = 0, os.urandom(200), time.monotonic()
    while time.monotonic() - started < seconds:
        database.execute("INSERT INTO log (entry) VALUES (?)", (row,))
        count += 1
    took = time.monotonic() - started
    database.close()
    shutil.rmtree(path)
    return [("rate", "transactions/s", count / took)]


def storm(way, seconds):
    """Files of 4 KiB made one after the other, each synced."""
    path = tempfile.mkdtemp(dir=way.folder)
    count, data, started = 0, os.urandom(4096), time.monotonic()
    while time.monotonic() - started < seconds:
        file = os.open(f"{path}/{count}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(file, data)
        os.fsync(file)
        os.close(file)
        count += 1
    took = time.monotonic() - started
    shutil.rmtree(path)
    return [("rate", "files/s", count / took)]


class Pgbench:
    """PostgreSQL with its data on the device; one server a device, all of them running, one of them used."""

    model = None

    def __init__(self, clients):
        self.clients = clients

    def __call__(self, way, seconds):
        self.prepare(way)
        seconds = max(1, round(seconds))
        out = as_postgres("pgbench", "-h", "/tmp", "-p", str(way.port), "-n", "-c", str(self.clients), "-j", "1",
                          "-T", str(seconds), "bench")
        rate = next(float(line.split()[2]) for line in out.splitlines() if line.startswith("tps ="))
        return [("rate", "transactions/s", rate)]

    def prepare(self, way):
        if hasattr(way, "port"):
            return
        if Pgbench.model is None:
            Pgbench.model = new_database()
        place = f"{way.folder}/pg"
        run("cp", "-a", Pgbench.model, place)
        run("sync", "-f", place)
        way.port = 6000 + int(way.folder.rsplit("-", 1)[1])
        as_postgres("pg_ctl", "-D", place, "-w", "-l", f"/tmp/pg-{way.port}.log", "-o", f"-p {way.port}", "start")
        as_postgres("psql", "-h", "/tmp", "-p", str(way.port), "-c", "CHECKPOINT", "bench")
        way.settle()


def as_postgres(program, *arguments):
    found = sorted(os.listdir("/usr/lib/postgresql"))[-1]
    return run("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups",
               f"/usr/lib/postgresql/{found}/bin/{program}", *arguments, cwd="/tmp", timeout=180)


def new_database():
    """Made once, in memory, and copied."""
    place = "/tmp/pg-model"
    os.mkdir(place)
    shutil.chown(place, "postgres", "postgres")
    as_postgres("initdb", "-D", place, "--no-sync", "-A", "trust", "--no-locale", "-E", "UTF8")
    with open(f"{place}/postgresql.conf", "a", encoding="ascii") as file:
        file.write("listen_addresses = ''\nunix_socket_directories = '/tmp'\nshared_buffers = 32MB\nautovacuum = off\n"
                   "checkpoint_timeout = 1h\nmax_wal_size = 96MB\nmin_wal_size = 32MB\nbgwriter_delay = 10s\n"
                   "wal_writer_delay = 10s\nlogging_collector = off\nmax_connections = 10\n")
    as_postgres("pg_ctl", "-D", place, "-w", "-l", "/tmp/pg-model.log", "-o", "-p 5999 -F", "start")
    as_postgres("createdb", "-h", "/tmp", "-p", "5999", "bench")
    as_postgres("pgbench", "-h", "/tmp", "-p", "5999", "-i", "-q", "-s", "1", "bench")
    as_postgres("pg_ctl", "-D", place, "-w", "stop")
    return place
