"""What the tests of the NVMe tier share."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
from contextlib import suppress
from functools import cache
from pathlib import Path

from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme import NvmeTier
from kvstore_s3.tier.nvme_names import parse_name
from kvstore_s3.tier.nvme_usage import parse
from kvstore_s3.tier.pieces import file_size


@cache
def _object(key: str) -> bytes:
    return random.Random(key).randbytes(64 * PAGE)


def content(key: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of the object `key`."""
    return _object(key)[start:end]


def buffer_for(start: int, size: int, *, shift: int = 0) -> memoryview:
    """Memory that lies in its page as the byte `start` lies in the object's, or `shift` bytes beside that."""
    lead = (start + shift) % PAGE
    return memoryview(mmap.mmap(-1, lead + size + PAGE))[lead : lead + size]


def filled(key: str, start: int, end: int, *, shift: int = 0) -> memoryview:
    view = buffer_for(start, end - start, shift=shift)
    view[:] = content(key, start, end)
    return view


async def keep(tier: NvmeTier, key: str, start: int, end: int) -> bool:
    """Offer a piece in one go; whether it was kept."""
    await tier.offer(key, start, end, start, filled(key, start, end))
    return tier.covers(key, start, end)


async def read(tier: NvmeTier, key: str, start: int, end: int, *, shift: int = 0) -> bytes | None:
    into = buffer_for(start, end - start, shift=shift)
    return bytes(into) if await tier.read(key, start, into) else None


def pieces_in(directory: Path) -> list[Extent]:
    return [extent for path in directory.glob("v1/??/*") if (extent := parse_name(path.name)) is not None]


def files_in(directory: Path) -> list[Path]:
    """The files of whole pieces."""
    return list(directory.glob("v1/??/*"))


def temporaries_in(directory: Path) -> list[Path]:
    return list(directory.glob("v1/.tmp/*"))


def used_in(directory: Path) -> int | None:
    """What the shared count says."""
    return parse((directory / "v1" / "usage").read_bytes())[0]


def open_below(directory: Path) -> list[str]:
    """What this process has open in it."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(f"{directory}/")]


def check_nothing_leaked(directory: Path, budget: int) -> None:
    """No temporaries, a right count, within the budget, and no lock held. For a moment when nobody writes."""
    assert temporaries_in(directory) == []
    used = used_in(directory)
    assert used == sum(map(file_size, pieces_in(directory)))
    assert used == sum(path.stat().st_size for path in directory.glob("v1/??/*"))
    assert used <= budget
    file = os.open(directory / "v1" / "usage", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(file)
