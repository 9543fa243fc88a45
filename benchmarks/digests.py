"""What it costs to verify sections, by digest id: CPU seconds per GB, and microseconds for one section.

    python benchmarks/digests.py

`Header.verify` over 32 sections of random bytes, of 2 MiB and of 64 KiB each, 3 bytes short of a multiple of 16, so
that there is padding to check. Beside it, over the same bytes: CRC-32C, which finds less, and a copy. The rows take
turns; best of 15 rounds, in the thread's own CPU time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from crc32c import crc32c
from record import record

from kvstore_s3 import KVLayout
from kvstore_s3.bitstream import Identity, Payload, build_object, parse_header

SECTIONS, ROUNDS = 32, 15
SIZES = (64 << 10, 2 << 20)
DIGESTS = {"BLAKE3, 16 bytes": 1, "BLAKE3, 32 bytes": 2, "XXH3-128": 3}
LAYOUT = KVLayout(SECTIONS, 8, 128, "bfloat16")
IDENTITY = Identity(bytes(32), bytes(32), LAYOUT.full_shard, LAYOUT, 1024)

Tasks = Sequence[Callable[[], object]]
"""One for each section."""


def make_tasks(size: int) -> dict[str, Tasks]:
    rows: dict[str, Tasks] = {}
    for name, digest_id in DIGESTS.items():
        payloads = [Payload(0, 3, 0, layer, layer + 1, os.urandom(size - 3)) for layer in range(SECTIONS)]
        data, table = build_object(IDENTITY, payloads, digest_id=digest_id)
        header, view = parse_header(data, IDENTITY), memoryview(data)
        stored = [view[section.offset : section.end] for section in table.sections]
        rows[name] = [partial(header.verify, number, part) for number, part in enumerate(stored)]
    return rows | {"CRC-32C": [partial(crc32c, part) for part in stored], "copy": [partial(bytes, p) for p in stored]}


def run(tasks: Tasks) -> None:
    for task in tasks:
        task()


def cpu_seconds(tasks: Tasks) -> float:
    begin = time.thread_time()
    run(tasks)
    return time.thread_time() - begin


def measure(size: int) -> dict[str, Any]:
    rows = make_tasks(size)
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(ROUNDS):
        for name, tasks in rows.items():
            best[name] = min(best[name], cpu_seconds(tasks))
    return {
        name: {
            "cpu_s_per_gb": round(taken / (SECTIONS * size) * 1e9, 4),
            "us_per_section": round(taken / SECTIONS * 1e6, 1),
        }
        for name, taken in best.items()
    }


def main() -> None:
    results = {size: measure(size) for size in SIZES}
    for size, rows in results.items():
        print(f"{f'sections of {size}':24}{'CPU-s/GB':>10}{'us each':>10}")
        for name, row in rows.items():
            print(f"{name:24}{row['cpu_s_per_gb']:10.4f}{row['us_per_section']:10.1f}")
    record("digests", {"sections": SECTIONS, "rounds": ROUNDS, "results": results}, "blake3", "xxhash", "crc32c")


if __name__ == "__main__":
    main()
