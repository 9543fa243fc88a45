"""Cold reads and writes of the NVMe tier, beside aiofiles, plain executor calls and the limit, in one run.

    python benchmarks/tiers.py [--directory DIR] [--mib 1024] [--rounds 5]

Pieces of 16 MiB (the largest range that a load reads), four at a time, read into and written from one page-aligned
buffer. "Cold" means that the page cache holds nothing of the files (written out, then POSIX_FADV_DONTNEED); the tier's
own reads go past it anyway. The limit is the bare system calls with O_DIRECT: open and preadv; create, fallocate and
pwrite. "full tier" is the state in which a tier spends its life: each write evicts, and takes over a file whose blocks
were written before. CPU seconds are this process's, user and system, for each GB (10^9 bytes); medians of the rounds,
whose order changes.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiofiles
from record import record

from kvstore_s3.tier.nvme import NvmeTier

PIECE = 16 * 1024 * 1024
AT_ONCE = 4
Work = Callable[[int, memoryview], Awaitable[None]]
"""Reads or writes the object of that number."""


@dataclass(slots=True)
class Row:
    """What one way of reading or writing costs, per round."""

    cpu_s_per_gb: list[float] = field(default_factory=list)
    mb_per_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        return {
            "cpu_s_per_gb": round(statistics.median(self.cpu_s_per_gb), 4),
            "cpu_s_per_gb_least": round(min(self.cpu_s_per_gb), 4),
            "cpu_s_per_gb_most": round(max(self.cpu_s_per_gb), 4),
            "mb_per_s": round(statistics.median(self.mb_per_s)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments.directory, arguments.mib, arguments.rounds)
    for verb, rows in result["rows"].items():
        for name, figures in rows.items():
            print(f"{verb:6} {name:28} {figures['cpu_s_per_gb']:8.3f} CPU-s/GB {figures['mb_per_s']:8} MB/s")
    record("tiers", result, "aiofiles")


def measure(directory: Path, mib: int = 1024, rounds: int = 5) -> dict[str, Any]:
    """Rows by verb ("read", "write") and way; `directory` should lie on the disk that is meant."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        rows = asyncio.run(_measure(Path(folder), mib * 1024 * 1024 // PIECE, rounds))
    summaries = {verb: {name: row.summary() for name, row in found.items()} for verb, found in rows.items()}
    ratios = {verb: _ratio(found) for verb, found in summaries.items()}
    return {
        "piece_bytes": PIECE,
        "pieces": mib * 1024 * 1024 // PIECE,
        "at_once": AT_ONCE,
        "rounds": rounds,
        "rows": summaries,
        "ours_of_aiofiles": ratios,
    }


def _ratio(rows: dict[str, dict[str, float]]) -> float:
    return round(rows["ours"]["cpu_s_per_gb"] / rows["aiofiles"]["cpu_s_per_gb"], 3)


async def _measure(folder: Path, pieces: int, rounds: int) -> dict[str, dict[str, Row]]:
    memory = memoryview(mmap.mmap(-1, AT_ONCE * 2 * PIECE))
    for start in range(0, len(memory), PIECE):
        memory[start : start + PIECE] = os.urandom(PIECE)
    tier = NvmeTier(folder / "tier", 4 * pieces * PIECE, AT_ONCE)
    full = NvmeTier(folder / "full", pieces * (PIECE + 4096), AT_ONCE)
    for number in range(pieces):
        await full.offer(f"old/{number}", 0, PIECE, 0, memory[:PIECE])
    plain = folder / "plain"
    plain.mkdir()
    pool = ThreadPoolExecutor(AT_ONCE)
    writes, reads = _writes(tier, full, plain, pool), _reads(tier, plain, pool)
    rows = {"write": {name: Row() for name in writes}, "read": {name: Row() for name in reads}}
    for number in range(rounds):
        for verb, ways in (("write", writes), ("read", reads)):
            for name in _rotated(list(ways), number):
                await _prepare(verb, name, tier, plain, pieces)
                shift = 64 if "shifted" in name else 0
                await _timed(rows[verb][name], ways[name], memory, shift, pieces)
                if verb == "write" and "ours" not in name:
                    await _write_out(plain, pieces)
    await tier.close()
    await full.close()
    pool.shutdown()
    return rows


def _writes(tier: NvmeTier, full: NvmeTier, plain: Path, pool: ThreadPoolExecutor) -> dict[str, Work]:
    async def ours(number: int, data: memoryview) -> None:
        await tier.offer(f"bench/{number}", 0, PIECE, 0, data)
        assert tier.covers(f"bench/{number}", 0, PIECE)

    fresh = count()

    async def ours_full(number: int, data: memoryview) -> None:
        await full.offer(f"new/{next(fresh)}", 0, PIECE, 0, data)

    async def by_aiofiles(number: int, data: memoryview) -> None:
        async with aiofiles.open(plain / str(number), "wb") as file:
            await file.write(data)

    async def by_pwrite(number: int, data: memoryview) -> None:
        await asyncio.get_running_loop().run_in_executor(pool, _pwrite, plain / str(number), data)

    async def bare(number: int, data: memoryview) -> None:
        await asyncio.get_running_loop().run_in_executor(pool, _pwrite_direct, plain / str(number), data)

    return {
        "ours": ours,
        "ours, full tier": ours_full,
        "ours, shifted buffer": ours,
        "aiofiles": by_aiofiles,
        "pwrite in threads": by_pwrite,
        "limit": bare,
    }


def _reads(tier: NvmeTier, plain: Path, pool: ThreadPoolExecutor) -> dict[str, Work]:
    async def ours(number: int, into: memoryview) -> None:
        assert await tier.read(f"bench/{number}", 0, into)

    async def by_aiofiles(number: int, into: memoryview) -> None:
        async with aiofiles.open(plain / str(number), "rb") as file:
            into[:] = await file.read()

    async def by_readinto(number: int, into: memoryview) -> None:
        async with aiofiles.open(plain / str(number), "rb", buffering=0) as file:
            assert await file.readinto(into) == PIECE

    async def by_preadv(number: int, into: memoryview) -> None:
        await asyncio.get_running_loop().run_in_executor(pool, _preadv, plain / str(number), into)

    async def bare(number: int, into: memoryview) -> None:
        await asyncio.get_running_loop().run_in_executor(pool, _preadv, plain / str(number), into, os.O_DIRECT)

    return {
        "ours": ours,
        "ours, shifted buffer": ours,
        "aiofiles": by_aiofiles,
        "aiofiles readinto": by_readinto,
        "preadv in threads": by_preadv,
        "limit": bare,
    }


async def _prepare(verb: str, name: str, tier: NvmeTier, plain: Path, pieces: int) -> None:
    """Empty places to write to; files that are not in the page cache to read from."""
    if verb == "write" and name == "ours, full tier":
        return
    if verb == "write" and "ours" in name:
        for number in range(pieces):
            tier.drop(f"bench/{number}")
        await tier.settle()
    elif verb == "write":
        for number in range(pieces):
            with suppress(FileNotFoundError):
                os.unlink(plain / str(number))
    else:
        for number in range(pieces):
            _forget(plain / str(number))


async def _write_out(plain: Path, pieces: int) -> None:
    """Empty the page cache, so that its writing does not fall to the next way."""
    for number in range(pieces):
        await asyncio.to_thread(_forget, plain / str(number))


async def _timed(row: Row, work: Work, memory: memoryview, shift: int, pieces: int) -> None:
    numbers = iter(range(pieces))

    async def worker(place: int) -> None:
        start = place * 2 * PIECE + shift
        for number in numbers:
            await work(number, memory[start : start + PIECE])

    cpu, began = _cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(worker(place) for place in range(AT_ONCE)))
    gigabytes = pieces * PIECE / 1e9
    row.cpu_s_per_gb.append((_cpu_seconds() - cpu) / gigabytes)
    row.mb_per_s.append(1000 * gigabytes / (time.perf_counter() - began))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _rotated(names: list[str], number: int) -> list[str]:
    number %= len(names)
    return names[number:] + names[:number]


def _pwrite(path: Path, data: memoryview) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    assert os.pwrite(file, data, 0) == len(data)
    os.close(file)


def _pwrite_direct(path: Path, data: memoryview) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    os.posix_fallocate(file, 0, len(data))
    assert os.pwrite(file, data, 0) == len(data)
    os.close(file)


def _preadv(path: Path, into: memoryview, flags: int = 0) -> None:
    file = os.open(path, os.O_RDONLY | flags)
    assert os.preadv(file, [into], 0) == len(into)
    os.close(file)


def _forget(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


if __name__ == "__main__":
    main()
