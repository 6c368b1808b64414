#!/usr/bin/env python3
"""Durable appends by SQLite: WAL, synchronous=FULL, one row an append; several in flight are rows of one transaction, which is
how SQLite commits a group. Prints notes as the program `bytes` does.

Usage: sqlite.py DIR      DIR: a folder on the disk
Environment: ROUNDS, SECONDS_EACH
"""

import json
import os
import sqlite3
import sys
import tempfile
import time

SIZES = (64, 512, 4096)
DEPTHS = (1, 8, 64)


def run(folder, size, depth, span):
    """Latencies in seconds, sorted, and how long they took together."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        database = sqlite3.connect(os.path.join(place, "db"), isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE log (entry BLOB)")
        rows = [(os.urandom(size),) for _ in range(depth)]
        latencies = []
        started = time.monotonic()
        while time.monotonic() - started < span:
            begun = time.monotonic()
            database.execute("BEGIN")
            database.executemany("INSERT INTO log VALUES (?)", rows)
            database.execute("COMMIT")
            latencies += [time.monotonic() - begun] * depth
        took = time.monotonic() - started
        database.close()
    return sorted(latencies), took


def note(scenario, measure, unit, values):
    line = {"stand": "durable appends", "scenario": scenario, "who": "SQLite WAL", "ours": "tidegate", "measure": measure,
            "unit": unit, "better": "more" if measure == "rate" else "less", "values": values}
    print(json.dumps(line), flush=True)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    runs, span = int(os.environ.get("ROUNDS", "5")), float(os.environ.get("SECONDS_EACH", "2"))
    for size in SIZES:
        for depth in DEPTHS:
            samples = [run(sys.argv[1], size, depth, span) for _ in range(runs)]
            what = f"{size} B appends, {depth} in flight"
            note(what, "rate", "records/s", [len(latencies) / took for latencies, took in samples])
            for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
                values = [latencies[min(int(len(latencies) * part), len(latencies) - 1)] for latencies, _ in samples]
                note(what, name, "us", [value * 1e6 for value in values])


main()
