"""A volume of Tidegate as byte-addressable persistent memory: a thin binding of libtidegate.

    import tidegate

    with tidegate.Device("db") as device:
        ticket = device.write(4096, b"some bytes")      # atomic, of any length, at any offset
        device.persist(ticket)                          # survives the loss of power
        data = device.read(4096, 10)

        with device.log(0, 1 << 20, create=True) as log:
            position, _ = log.append(b"an entry")
            log.persist(position)
            for position, entry in log:
                ...

Calls that fail raise tidegate.Error, an OSError with errno and the library's message. What takes bytes takes everything that
has the buffer protocol. Calls that wait let other threads run. The library is found as the loader finds it; TIDEGATE_LIBRARY
names another. What is promised after which crash is at the top of tidegate.h.
"""

import ctypes
import ctypes.util
import errno
import os
import uuid
from ctypes import POINTER, byref, c_char, c_int, c_int64, c_size_t, c_ssize_t, c_uint8, c_uint32, c_uint64, c_void_p

__all__ = ["Device", "Error", "Info", "Log", "version"]

_DURABLE = 1
_SOLE_WRITER = 1
_LOG_CREATE = 1
_LOG_FORMAT = 2


class Error(OSError):
    """A call failed: errno says why to programs, strerror to people."""


class _Options(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("depth", c_uint32),
        ("arena_bytes", c_uint32),
        ("flags", c_uint32),
        ("callback", c_void_p),
        ("context", c_void_p),
    ]


class _Info(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("depth", c_uint32),
        ("volume_bytes", c_uint64),
        ("write_bytes_max", c_uint32),
        ("arena_bytes", c_uint32),
        ("ack", c_uint32),
        ("reserved", c_uint32),
        ("arena", c_void_p),
        ("stage_uuid", c_uint8 * 16),
        ("volume_uuid", c_uint8 * 16),
        ("name", c_char * 72),
    ]


class _Part(ctypes.Structure):
    _fields_ = [("base", c_void_p), ("length", c_size_t)]


def _load():
    name = os.environ.get("TIDEGATE_LIBRARY") or ctypes.util.find_library("tidegate") or "libtidegate.so.0"
    library = ctypes.CDLL(name, use_errno=True)
    pointer = c_void_p
    declare = {
        "tg_version": (ctypes.c_char_p, []),
        "tg_error": (ctypes.c_char_p, []),
        "tg_open": (c_int, [ctypes.c_char_p, POINTER(_Options), POINTER(pointer)]),
        "tg_close": (c_int, [pointer]),
        "tg_get_info": (c_int, [pointer, POINTER(_Info)]),
        "tg_interrupt": (c_int, [pointer]),
        "tg_accepted": (c_uint64, [pointer]),
        "tg_durable": (c_uint64, [pointer]),
        "tg_persist": (c_int, [pointer, c_uint64, c_int64]),
        "tg_pwritev": (c_int, [pointer, POINTER(_Part), c_int, c_uint64, c_int, POINTER(c_uint64)]),
        "tg_pwrite_async": (c_int, [pointer, pointer, c_size_t, c_uint64, c_int, POINTER(c_uint64)]),
        "tg_pread": (c_int, [pointer, pointer, c_size_t, c_uint64]),
        "tg_write_zeroes": (c_int, [pointer, c_uint64, c_uint64, c_int, POINTER(c_uint64)]),
        "tg_discard": (c_int, [pointer, c_uint64, c_uint64, POINTER(c_uint64)]),
        "tg_flush": (c_int, [pointer]),
        "tg_log_open": (c_int, [pointer, c_uint64, c_uint64, c_int, POINTER(pointer)]),
        "tg_log_appendv": (c_int, [pointer, POINTER(_Part), c_int, POINTER(c_uint64), POINTER(c_uint64)]),
        "tg_log_persist": (c_int, [pointer, c_uint64, c_int64]),
        "tg_log_read": (c_ssize_t, [pointer, POINTER(c_uint64), pointer, c_size_t]),
        "tg_log_entry_bytes": (c_ssize_t, [pointer, c_uint64]),
        "tg_log_truncate": (c_int, [pointer, c_uint64]),
        "tg_log_bounds": (c_int, [pointer, POINTER(c_uint64), POINTER(c_uint64)]),
        "tg_log_close": (c_int, [pointer]),
    }
    for function, (result, arguments) in declare.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


_library = _load()


def version():
    """Version of the library, "MAJOR.MINOR.PATCH"."""
    return _library.tg_version().decode()


def _check(result):
    if result < 0:
        raise Error(-result, _library.tg_error().decode(errors="replace"))
    return result


def _nanoseconds(timeout):
    return -1 if timeout is None else max(0, int(timeout * 1e9))


def _parts(buffers):
    """Parts for the library, and what must stay alive during the call."""
    parts = (_Part * max(1, len(buffers)))()
    alive = []
    for part, buffer in zip(parts, buffers):
        view = memoryview(buffer).cast("B")
        if view.readonly:
            # ctypes takes the address of writable buffers only; bytes have one of their own.
            keep = view.obj if isinstance(view.obj, bytes) and len(view.obj) == len(view) else view.tobytes()
            part.base = ctypes.cast(ctypes.c_char_p(keep), c_void_p)
        else:
            keep = (c_char * len(view)).from_buffer(view)
            part.base = ctypes.addressof(keep)
        part.length = len(view)
        alive.append(keep)
    return parts, alive


class _Handle:
    """Something that is closed once, with `with` or close()."""

    _close = None

    def __init__(self, handle):
        self._handle = handle

    def close(self):
        """Ends it; what was submitted is carried out or not, in order. May be called again."""
        handle, self._handle = self._handle, None
        if handle:
            _check(type(self)._close(handle))

    def _open(self):
        if not self._handle:
            raise Error(errno.EBADF, "it is closed")
        return self._handle

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        try:
            self.close()
        except Error:
            # The first error says more.
            if kind is None:
                raise

    def __del__(self):
        if getattr(self, "_handle", None):
            type(self)._close(self._handle)


class Info:
    """What a device is to: name, volume_bytes, write_bytes_max, depth, arena_bytes, ack, stage_uuid, volume_uuid."""

    def __init__(self, info):
        self.name = info.name.decode()
        self.volume_bytes = info.volume_bytes
        self.write_bytes_max = info.write_bytes_max
        self.depth = info.depth
        self.arena_bytes = info.arena_bytes
        self.ack = {1: "memory", 2: "log"}.get(info.ack, str(info.ack))
        self.stage_uuid = uuid.UUID(bytes=bytes(info.stage_uuid))
        self.volume_uuid = uuid.UUID(bytes=bytes(info.volume_uuid))

    def __repr__(self):
        return f"Info({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


class Device(_Handle):
    """A session with the server of a volume: by its name, or by the path of its socket. For many threads, not across fork.

    With sole_writer it is the only one that asks for that: EBUSY while there is another, of whatever program.
    """

    _close = _library.tg_close

    def __init__(self, target, depth=0, arena_bytes=0, sole_writer=False):
        flags = _SOLE_WRITER if sole_writer else 0
        options = _Options(size=ctypes.sizeof(_Options), depth=depth, arena_bytes=arena_bytes, flags=flags)
        handle = c_void_p()
        _check(_library.tg_open(os.fsencode(target), byref(options), byref(handle)))
        super().__init__(handle)

    def interrupt(self):
        """Has every call that waits on the device now, in whatever thread, fail with EINTR. What it submitted is carried out."""
        _check(_library.tg_interrupt(self._open()))

    def info(self):
        """An Info."""
        info = _Info(size=ctypes.sizeof(_Info))
        _check(_library.tg_get_info(self._open(), byref(info)))
        return Info(info)

    def read(self, offset, length):
        """`length` bytes from `offset` on."""
        data = bytearray(length)
        self.readinto(offset, data)
        return bytes(data)

    def readinto(self, offset, buffer):
        """Fills a writable buffer from `offset` on."""
        view = memoryview(buffer).cast("B")
        if len(view):
            into = (c_char * len(view)).from_buffer(view)
            _check(_library.tg_pread(self._open(), ctypes.addressof(into), len(view), offset))

    def write(self, offset, *buffers, durable=False):
        """Writes the buffers, one after the other, as one atomic change, and waits until it has completed. Its ticket."""
        parts, _alive = _parts(buffers)
        ticket = c_uint64()
        flags = _DURABLE if durable else 0
        _check(_library.tg_pwritev(self._open(), parts, len(buffers), offset, flags, byref(ticket)))
        return ticket.value

    def write_async(self, offset, buffer, durable=False):
        """Writes, and waits for nothing: persist(ticket) says whether it succeeded."""
        parts, _alive = _parts([buffer])
        ticket = c_uint64()
        flags = _DURABLE if durable else 0
        part = parts[0]
        _check(_library.tg_pwrite_async(self._open(), part.base, part.length, offset, flags, byref(ticket)))
        return ticket.value

    def write_zeroes(self, offset, length, durable=False):
        """Makes a range zero, as one atomic change. Its ticket."""
        ticket = c_uint64()
        flags = _DURABLE if durable else 0
        _check(_library.tg_write_zeroes(self._open(), offset, length, flags, byref(ticket)))
        return ticket.value

    def discard(self, offset, length):
        """Says that a range is no longer needed. Its ticket."""
        ticket = c_uint64()
        _check(_library.tg_discard(self._open(), offset, length, byref(ticket)))
        return ticket.value

    def flush(self):
        """Waits until everything submitted before, and everything accepted on the stage, is durable."""
        _check(_library.tg_flush(self._open()))

    def persist(self, ticket, timeout=None):
        """Waits until every change up to `ticket` is durable; `timeout` in seconds. ETIMEDOUT."""
        _check(_library.tg_persist(self._open(), ticket, _nanoseconds(timeout)))

    @property
    def accepted(self):
        """Every change up to this ticket survives the end of this program and of the server."""
        return _library.tg_accepted(self._open())

    @property
    def durable(self):
        """Every change up to this ticket survives the loss of power."""
        return _library.tg_durable(self._open())

    def log(self, base, length, create=False, format=False):
        """The append log in the `length` bytes from `base` on; see Log."""
        return Log(self, base, length, create, format)


class Log(_Handle):
    """An append log. After every crash it holds a prefix of what was appended, with everything that was persisted.

    A position grows for ever, whatever is truncated. One handle at a time, of all programs, may change a log:
    open the device with sole_writer to be sure of that.
    """

    _close = _library.tg_log_close

    def __init__(self, device, base, length, create=False, format=False):
        flags = (_LOG_CREATE if create else 0) | (_LOG_FORMAT if format else 0)
        handle = c_void_p()
        _check(_library.tg_log_open(device._open(), base, length, flags, byref(handle)))
        super().__init__(handle)

    def append(self, *buffers):
        """Appends one entry, made of the buffers. Its position and ticket; persist() makes it durable."""
        parts, _alive = _parts(buffers)
        position, ticket = c_uint64(), c_uint64()
        _check(_library.tg_log_appendv(self._open(), parts, len(buffers), byref(position), byref(ticket)))
        return position.value, ticket.value

    def persist(self, position, timeout=None):
        """Waits until the entry at `position`, and all before it, are durable; `timeout` in seconds. ETIMEDOUT."""
        _check(_library.tg_log_persist(self._open(), position, _nanoseconds(timeout)))

    def read(self, position):
        """The entry at `position` and the position of the next; None at the tail."""
        length = _check(_library.tg_log_entry_bytes(self._open(), position))
        if length == 0:
            return None
        data = ctypes.create_string_buffer(length)
        after = c_uint64(position)
        length = _check(_library.tg_log_read(self._open(), byref(after), data, length))
        return data.raw[:length], after.value

    def entries(self, position=None):
        """Positions and entries from `position`, or the head, up to the tail."""
        at = self.head if position is None else position
        while True:
            found = self.read(at)
            if found is None:
                return
            yield at, found[0]
            at = found[1]

    def __iter__(self):
        return self.entries()

    def truncate(self, position):
        """Drops everything before the entry at `position`, or everything if that is the tail."""
        _check(_library.tg_log_truncate(self._open(), position))

    @property
    def bounds(self):
        """Position of the first entry, and of the next append."""
        head, tail = c_uint64(), c_uint64()
        _check(_library.tg_log_bounds(self._open(), byref(head), byref(tail)))
        return head.value, tail.value

    @property
    def head(self):
        """Position of the first entry."""
        return self.bounds[0]

    @property
    def tail(self):
        """Where the next entry goes."""
        return self.bounds[1]
