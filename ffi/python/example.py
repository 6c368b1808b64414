#!/usr/bin/env python3
"""A walk through the byte door: example.py TARGET, the name of a volume or the path of its socket. Overwrites its first MiB."""

import json
import struct
import sys
import time

import tidegate

target = sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__)

# %% A volume is bytes. Writes are atomic, of any length, at any offset.
device = tidegate.Device(target)
print(device.info())
device.write(3, b"seven bytes in, ", b"two parts, one change")
print(device.read(3, 37))

# %% Order costs nothing: no wait between the data and the pointer to it. The pointer is never there without the data.
record = json.dumps({"name": "Ada", "visits": 1}).encode()
device.write_async(1000, record)
ticket = device.write_async(40, struct.pack("<HH", 1000, len(record)))
print("accepted" if device.accepted >= ticket else "on its way")

# %% Wait for the disk only where a promise is made to somebody.
began = time.perf_counter()
device.persist(ticket)
print(f"durable after {(time.perf_counter() - began) * 1e6:.0f} microseconds")

# %% Everything with a buffer goes in, and into everything writable it comes out.
numbers = memoryview(bytearray(struct.pack("<4d", 1, 2, 3, 4))).cast("d")
device.write(2000, numbers)
copy = bytearray(32)
device.readinto(2000, copy)
print(struct.unpack("<4d", copy))

# %% A log: append, persist, read again after whatever happened.
with device.log(64 << 10, 512 << 10, format=True) as log:
    for i in range(5):
        position, _ = log.append(struct.pack("<I", i), b" visits")
    log.persist(position)

with device.log(64 << 10, 512 << 10) as log:
    for position, entry in log:
        print(position, struct.unpack_from("<I", entry)[0], entry[4:].decode())
    log.truncate(position)
    print("kept:", len(list(log)))

# %% What goes wrong says so.
try:
    device.read(device.info().volume_bytes, 1)
except tidegate.Error as error:
    print(error.errno, error.strerror)
device.close()
