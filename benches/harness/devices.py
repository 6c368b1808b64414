"""What is measured: devices of the test machine, made by each way that is compared. Nothing is taken down again: a test
machine serves one stand and is thrown away."""

import glob
import json
import os
import re
import subprocess
import time

TIDEGATE = os.environ.get("TIDEGATE_BIN", "tidegate")
RUBLK = os.environ.get("RUBLK", "rublk")

OURS_MEMORY = "tidegate, ack memory"
OURS_LOG = "tidegate, ack log"
NULL = "rublk null"
LOOP_COPY = "rublk loop on brd"
LOOP_ZERO = "rublk loop on brd, zero copy"
KERNEL_LOOP = "kernel loop on brd"
RAW = "brd itself"
WRITECACHE = "dm-writecache"
BCACHE = "bcache, writeback"
BARE = "the slow disk itself"
CEILING = "a RAM disk itself"


def run(*command, check=True, **more):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def put(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(str(text))


def sectors(device):
    return int(run("blockdev", "--getsz", device))


def until(seconds, what, test):
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


# ---- disks


class Rams:
    """RAM disks, given out one by one."""

    def __init__(self, mib, count=12):
        run("modprobe", "brd", f"rd_nr={count}", f"rd_size={mib * 1024}", "max_part=1")
        self.next = 0

    def take(self, filled_mib=None):
        """One of them; its pages are made when they are first written, which is not what is measured."""
        device = f"/dev/ram{self.next}"
        self.next += 1
        count = [] if filled_mib is None else [f"count={filled_mib // 4}"]
        run("dd", "if=/dev/zero", f"of={device}", "bs=4M", "oflag=direct", *count, check=False)
        return device


def dm(name, table):
    run("dmsetup", "create", name, "--table", table)
    run("dmsetup", "mknodes")
    return f"/dev/mapper/{name}"


def part(name, device, mib):
    """The first `mib` of a device, as a device."""
    return dm(name, f"0 {mib * 2048} linear {device} 0")


def slow(name, device):
    """1 ms a write, 4 ms a flush, however many are in flight."""
    return dm(name, f"0 {sectors(device)} delay {device} 0 0 {device} 0 1 {device} 0 4")


def narrow(name, mib, mb_a_second, depth=4):
    """A disk with a limit: `depth` requests at a time of 1 ms each, and so many MB a second. It remembers what is written."""
    root = "/sys/kernel/config"
    run("modprobe", "null_blk", "nr_devices=0")
    if not os.path.isdir(f"{root}/nullb"):
        run("mount", "-t", "configfs", "configfs", root)
    place = f"{root}/nullb/{name}"
    os.mkdir(place)
    # It has a budget fifty times a second, and waits for ever with a request that is larger than one.
    budget_sectors = (1 << 20) // 50 * mb_a_second // 512
    longest = min(2048, 1 << (budget_sectors.bit_length() - 1))
    settings = {
        "size": mib, "memory_backed": 1, "irqmode": 2, "completion_nsec": 1000000, "submit_queues": 1,
        "hw_queue_depth": depth, "blocksize": 4096, "max_sectors": longest, "mbps": mb_a_second, "power": 1,
    }
    for key, value in settings.items():
        put(f"{place}/{key}", value)
    device = f"/dev/{name}"
    until(5, device, lambda: os.path.exists(device))
    return device


# ---- ways


class Way:
    """A block device that is measured."""

    def __init__(self, path):
        self.path = path

    def settle(self):
        """Waits until what was written is where it stays, so that it does not take part in what is measured next."""

    def pid(self):
        return None


class Tidegate(Way):
    made = 0

    def __init__(self, stage, backing, size, ack, attach=()):
        Tidegate.made += 1
        self.name = f"v{Tidegate.made}"
        command = [TIDEGATE, "create", self.name, "--stage", stage, "--backing", backing, "--ack", ack, "--force"]
        run(*command, *(["--size", size] if size else []))
        super().__init__(run(TIDEGATE, "attach", self.name, *attach))

    def status(self):
        return json.loads(run(TIDEGATE, "status", self.name, "--json"))

    def stage_status(self):
        return self.status()["stages"][0]["status"]

    def pid(self):
        return self.status()["stages"][0]["pid"]

    def settle(self):
        run(TIDEGATE, "flush", self.name)
        pid, before, end = self.pid(), None, time.monotonic() + 60
        while (now := own_threads_ns(pid)) != before:
            if time.monotonic() > end:
                busy = sorted(name for (task, name), ns in now.items() if before.get((task, name)) != ns)
                raise RuntimeError(f"the server does not come to rest: {', '.join(busy)}")
            before = now
            time.sleep(0.3)

    def kill(self):
        """As a crash of the server and of the supervisor that would start another."""
        pid = self.pid()
        supervisors = run("pgrep", "-f", "[ ]supervise ", check=False).split()
        for victim in [*supervisors, pid]:
            os.kill(int(victim), 9)
        until(30, "the server's end", lambda: not os.path.exists(f"/proc/{pid}/fd/0"))

    def attach(self):
        self.path = run(TIDEGATE, "attach", self.name)


def threads_ns(pid):
    """Processor time of each thread of a process, by number and name."""
    times = {}
    for task in glob.glob(f"/proc/{pid}/task/*"):
        try:
            with open(f"{task}/schedstat", encoding="ascii") as schedstat, open(f"{task}/comm", encoding="ascii") as comm:
                times[os.path.basename(task), comm.read().strip()] = int(schedstat.read().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            # It has ended meanwhile, as the kernel's workers do.
            pass
    return times


def own_threads_ns(pid):
    """Those that the server started. A ring that once had to wait for a file keeps a thread of the kernel's, which looks every
    five seconds whether there is more to do: with many volumes there is always one that does."""
    return {thread: ns for thread, ns in threads_ns(pid).items() if not thread[1].startswith("iou-wrk")}


def cpu_ns(pid):
    """Processor time of all threads of a process."""
    return sum(threads_ns(pid).values())


class Writecache(Way):
    """Waits are for the cache to be on its disk, as with ours."""

    def __init__(self, name, cache, backing):
        self.name = name
        super().__init__(dm(name, f"0 {sectors(backing)} writecache s {backing} {cache} 4096 0"))

    def settle(self):
        run("dmsetup", "message", self.name, "0", "flush")


class Bcache(Way):
    """With its defaults, in mode writeback."""

    def __init__(self, cache, backing):
        run("modprobe", "bcache")
        before = set(glob.glob("/sys/block/bcache*"))
        options = ["--writeback", "--block", "4k", "--bucket", "64k", "--wipe-bcache"]
        for device in (backing, cache):
            run("wipefs", "-aq", device, check=False)
        run("make-bcache", *options, "-B", backing, "-C", cache)
        for device in (cache, backing):
            put("/sys/fs/bcache/register", device)
        until(10, "a bcache device", lambda: set(glob.glob("/sys/block/bcache*")) - before)
        self.place = (set(glob.glob("/sys/block/bcache*")) - before).pop()
        until(10, "its cache", lambda: "[writeback]" in self.read("cache_mode") and self.read("state") != "no cache")
        super().__init__("/dev/" + os.path.basename(self.place))

    def read(self, what):
        with open(f"{self.place}/bcache/{what}", encoding="ascii") as file:
            return file.read().strip()

    def settle(self):
        """It would wait half a minute before it writes the last tenth back. At most so long is waited for it here."""
        put(f"{self.place}/bcache/writeback_percent", 0)
        end = time.monotonic() + 5
        while self.read("state") == "dirty" and time.monotonic() < end:
            time.sleep(0.1)
        put(f"{self.place}/bcache/writeback_percent", 10)


def rublk(*arguments):
    out = run(RUBLK, "add", *arguments)
    found = re.search(r"dev id (\d+)", out)
    if not found:
        raise RuntimeError(f"rublk said: {out}")
    path = f"/dev/ublkb{found.group(1)}"
    until(10, path, lambda: os.path.exists(path))
    return Way(path)


def kernel_loop(device):
    return Way(run("losetup", "--find", "--show", "--direct-io=on", device))


def fill(way, mib):
    run("fio", "--name=fill", f"--filename={way.path}", "--rw=write", "--bs=1M", f"--size={mib}M", "--direct=1",
        "--ioengine=io_uring")
    way.settle()


# ---- stands: what one test machine has. Each gives a device by name.


def fast():
    """RAM disks, and servers that do next to nothing."""
    run("modprobe", "ublk_drv")
    rams = Rams(512)
    ways = {
        OURS_MEMORY: Tidegate(rams.take(), rams.take(), "384M", "memory"),
        NULL: rublk("null"),
        LOOP_COPY: rublk("loop", "-f", rams.take()),
        RAW: Way(rams.take()),
    }
    try:
        ways[LOOP_ZERO] = rublk("loop", "-z", "-f", rams.take())
    except RuntimeError as refused:
        print(f"SKIPPED: no zero copy here: {refused}", flush=True)
    for name, way in ways.items():
        if name != NULL:
            fill(way, 200)
    return ways


ONE_QUEUE, TWO_QUEUES = "tidegate, 1 queue", "tidegate, 2 queues"


def queued():
    """The same volume with one queue and with two."""
    run("modprobe", "ublk_drv")
    rams = Rams(512)
    ways = {}
    for name, queues in ((ONE_QUEUE, "1"), (TWO_QUEUES, "2")):
        ways[name] = Tidegate(rams.take(), rams.take(), "384M", "memory", ("--queues", queues))
        fill(ways[name], 200)
        found = len(os.listdir(f"/sys/block/{os.path.basename(ways[name].path)}/mq"))
        if found != int(queues):
            raise RuntimeError(f"{found} queues, not {queues}")
    return ways


def caches(backing_of, mib=320, cache_mib=128, attach=()):
    """Ours and the caches of the kernel, before backings of one kind."""
    for module in ("ublk_drv", "dm-delay", "dm-writecache", "loop"):
        run("modprobe", module)
    rams = Rams(mib)

    def cache():
        device = rams.take(cache_mib)
        return part(f"cache{rams.next}", device, cache_mib)

    size = f"{mib - 4}M"
    return rams, {
        OURS_LOG: Tidegate(cache(), backing_of("log", rams), size, "log", attach),
        OURS_MEMORY: Tidegate(cache(), backing_of("memory", rams), size, "memory", attach),
        WRITECACHE: Writecache("wc", cache(), backing_of("writecache", rams)),
        BCACHE: Bcache(cache(), backing_of("bcache", rams)),
    }


def synced():
    """All on RAM disks."""
    rams, ways = caches(lambda name, rams: rams.take())
    return ways | {KERNEL_LOOP: kernel_loop(rams.take()), RAW: Way(rams.take())}


def slowed():
    """Backings of 1 ms a write and 4 ms a flush, stage and caches on RAM disks."""
    rams, ways = caches(lambda name, rams: slow(f"slow-{name}", rams.take()))
    return ways | {BARE: Way(slow("slow-bare", rams.take())), RAW: Way(rams.take())}


def filled():
    """Stage and caches of 64 MiB before backings of 50 MB/s and 4,000 requests a second."""
    _, ways = caches(lambda name, rams: narrow(f"nullb-{name}", 320, 50), 320, 64)
    return ways | {BARE: Way(narrow("nullb-bare", 320, 50))}


def staged():
    """Ours before a backing so slow that what is written stays staged, and what it is compared with."""
    run("modprobe", "ublk_drv")
    rams = Rams(768)
    ours = Tidegate(rams.take(), narrow("nullb-held", 640, 1, 1), "512M", "memory")
    fill_only(ours, 200)
    # What is staged is to stay so.
    ours.settle = lambda: None
    return {OURS_MEMORY: ours, NULL: rublk("null"), RAW: Way(rams.take())}


def fill_only(way, mib):
    """Written and left where it is."""
    way.settle, kept = (lambda: None), way.settle
    fill(way, mib)
    way.settle = kept


def restarted():
    """A small stage and a large one before a slow disk, to be killed."""
    run("modprobe", "ublk_drv")
    rams = Rams(512)
    small = part("small", rams.take(64), 64)
    ways = {
        "tidegate, stage of 64 MiB": Tidegate(small, narrow("nullb-a", 512, 20), "384M", "log"),
        "tidegate, stage of 512 MiB": Tidegate(rams.take(), narrow("nullb-b", 1024, 20), "960M", "log"),
    }
    return ways


def idle():
    """One attached volume that nobody uses."""
    run("modprobe", "ublk_drv")
    rams = Rams(256)
    ours = Tidegate(rams.take(), rams.take(), "128M", "log")
    ours.settle()
    time.sleep(3)
    return {OURS_LOG: ours}


# Where the server's time is told it is to be that of its work, not of looking for some.
WORK_ONLY = ("--poll", "0")
SMALL, LARGE = "tidegate, volume of 1 GiB", "tidegate, volume of 64 TiB"
ONE, MANY = "tidegate, 1 volume on the stage", "tidegate, 64 volumes on the stage"


def bottomless(name, size, end):
    """A disk that forgets what is written, of any size; what lies behind it (the volume's label) is kept on another disk."""
    run("modprobe", "dm-zero")
    return dm(name, f"0 {size >> 9} zero\n{size >> 9} 2048 linear {end} 0")


def sized():
    """A small volume and a huge one, before disks that do nothing: what is measured is ours."""
    run("modprobe", "ublk_drv")
    rams = Rams(256)
    ways = {}
    for name, size in ((SMALL, 1 << 30), (LARGE, 64 << 40)):
        disk = bottomless(f"disk-{size}", size, rams.take(4))
        ways[name] = Tidegate(rams.take(), disk, str(size), "memory", WORK_ONLY)
        fill(ways[name], 256)
    return ways


def shared():
    """One volume on a stage, and 64 of which one is used."""
    run("modprobe", "ublk_drv", "ublks_max=128")
    run("mount", "-o", "remount,size=90%", "/dev/shm", check=False)
    rams = Rams(256, 16)
    ways = {ONE: Tidegate(rams.take(), rams.take(), "192M", "memory", WORK_ONLY)}
    stage = rams.take()
    ways[MANY] = Tidegate(stage, rams.take(), "192M", "memory", WORK_ONLY)
    for n in range(63):
        path = f"/tmp/backing{n}"
        with open(path, "wb") as file:
            file.truncate((16 << 20) + (64 << 10))
        Tidegate(stage, path, "16M", "memory", WORK_ONLY)
    for way in ways.values():
        fill(way, 192)
    return ways


def counted():
    """All on RAM disks. Servers do not look for requests, which would be counted as work."""
    rams, ways = caches(lambda name, rams: rams.take(), attach=WORK_ONLY)
    ways |= {KERNEL_LOOP: kernel_loop(rams.take()), RAW: Way(rams.take()), NULL: rublk("null")}
    ways[LOOP_ZERO] = rublk("loop", "-z", "-f", rams.take())
    fill(ways[OURS_MEMORY], 200)
    return ways


def counted_files():
    """The same with a file system on each."""
    rams, ways = caches(lambda name, rams: rams.take(), attach=WORK_ONLY)
    return with_files("ext4", ways | {CEILING: Way(rams.take())})


def ext4():
    return formatted("ext4")


def xfs():
    return formatted("xfs")


def formatted(kind):
    """Slow backings as above, and a RAM disk, with a file system on each."""
    ways = slowed()
    ways[CEILING] = ways.pop(RAW)
    return with_files(kind, ways)


def with_files(kind, ways):
    """A file system on each, mounted."""
    for n, way in enumerate(ways.values()):
        quick = ["-E", "lazy_itable_init=0,lazy_journal_init=0"] if kind == "ext4" else []
        run(f"mkfs.{kind}", "-q", *(["-F"] if kind == "ext4" else ["-f"]), *quick, way.path)
        way.folder = f"/mnt/{kind}-{n}"
        os.makedirs(way.folder)
        run("mount", "-o", "noatime", way.path, way.folder)
        way.settle()
    return ways
