"""kill -9 at each step of a write and of an eviction: no half file is seen, and no budget is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from tier.disk import check_nothing_leaked, content, keep, pieces_in, read, temporaries_in

from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.nvme import NvmeTier

BUDGET = 16 * PAGE
TESTS = Path(__file__).resolve().parent.parent

VICTIM = """
import asyncio, os, signal, sys
from pathlib import Path
from tier.disk import keep
from kvstore_s3.tier.nvme import NvmeTier

def die_at(name, calls, after):
    real = getattr(os, name)
    def call(*arguments, **named):
        nonlocal calls
        calls -= 1
        if calls == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*arguments, **named)
        finally:
            if calls == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, name, call)

async def main(directory, budget, name, calls, after):
    tier = NvmeTier(Path(directory), int(budget), 1)
    await tier.start()
    die_at(name, int(calls), after == "after")
    for number in range(3):
        await keep(tier, f"new{number}", 0, 3 * 4096)

asyncio.run(main(*sys.argv[1:]))
"""


async def die(directory: Path, call: str, number: int, when: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VICTIM, str(directory), str(BUDGET), call, str(number), when,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("old_pages", "call", "number"),
    [
        # The old pieces are of another size: they are removed, and a new file is made.
        (2, "unlink", 1),  # evicting
        (2, "posix_fallocate", 1),  # reserved, the temporary has no size
        (2, "pwritev", 1),  # reserved
        (2, "rename", 1),  # written
        (2, "pwrite", 1),  # counting
        (2, "pwrite", 2),
        (2, "pwrite", 3),
        # The old pieces are as large as the new ones, which take over their files.
        (3, "rename", 1),  # evicting
        (3, "pwritev", 1),
        (3, "rename", 2),  # written
        (3, "pwrite", 1),
    ],
)
async def test_a_process_killed_at_any_step_leaves_whole_pieces_and_its_budget(
    tmp_path: Path, old_pages: int, call: str, number: int, when: str
) -> None:
    survivor = NvmeTier(tmp_path, BUDGET, 1)
    for old in range(BUDGET // PAGE // (1 + old_pages)):
        await keep(survivor, f"old{old}", 0, old_pages * PAGE)
    await die(tmp_path, call, number, when)
    for key in ("again0", "again1"):
        assert await keep(survivor, key, 0, 3 * PAGE), "a living process is not held up"
    await survivor.close()

    later = NvmeTier(tmp_path, BUDGET, 1)
    assert await later.start()
    check_nothing_leaked(tmp_path, BUDGET)
    names = [("old", old_pages * PAGE), ("new", 3 * PAGE), ("again", 3 * PAGE)]
    keys = [(f"{name}{number}", end) for name, end in names for number in range(6)]
    found = {(key, end): await read(later, key, 0, end) for key, end in keys if later.covers(key, 0, end)}
    assert len(found) == len(pieces_in(tmp_path)) == later.stats.entries
    assert all(bytes_read == content(key, 0, end) for (key, end), bytes_read in found.items())
    for number in range(8):
        assert await keep(later, f"next{number}", 0, 3 * PAGE), "all of the budget can be used"
    assert BUDGET - 4 * PAGE < later.stats.bytes <= BUDGET
    await later.close()
    check_nothing_leaked(tmp_path, BUDGET)


async def test_the_leavings_of_a_killed_writer_are_swept_by_a_living_one_that_needs_room(tmp_path: Path) -> None:
    survivor = NvmeTier(tmp_path, 4 * PAGE, 1)
    await survivor.start()
    await die(tmp_path, "rename", 1, "before")
    assert len(temporaries_in(tmp_path)) == 1
    assert await keep(survivor, "a", 0, 3 * PAGE)
    await survivor.close()
    check_nothing_leaked(tmp_path, 4 * PAGE)
