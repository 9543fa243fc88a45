"""One directory and one budget for several tiers, as several processes have them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import threading
from pathlib import Path

import pytest
from tier.disk import check_nothing_leaked, content, files_in, keep, pieces_in, read, used_in

from kvstore_s3.tier import nvme
from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme import NvmeTier
from kvstore_s3.tier.nvme_files import NvmeFiles
from kvstore_s3.tier.nvme_usage import SharedUsage

BUDGET = 64 * PAGE
TESTS = Path(__file__).resolve().parent.parent

WRITER = """
import asyncio, sys
from pathlib import Path
from tier.disk import keep, read
from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme import NvmeTier
from kvstore_s3.tier.nvme_files import NvmeFiles

async def main(directory, budget, name):
    tier = NvmeTier(Path(directory), int(budget), 2)
    await tier.start()
    for number in range(40):
        key = f"{name}{number % 25}" if number % 2 else f"shared{number % 10}"
        await keep(tier, key, 0, 3 * 4096)
        found = await read(tier, key, 0, 3 * 4096)
        assert found is None or found == __import__("tier.disk").disk.content(key, 0, 3 * 4096)
    await tier.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_processes_that_write_at_once_stay_within_the_budget_together(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    writers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(tmp_path), str(BUDGET), name, env=environment
        )
        for name in ("a", "b", "c")
    ]
    assert [await writer.wait() for writer in writers] == [0, 0, 0]
    check_nothing_leaked(tmp_path, BUDGET)
    assert used_in(tmp_path) == BUDGET


async def test_a_tier_finds_what_another_process_wrote_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme, "_NEWS_S", 0.0)
    first, second = NvmeTier(tmp_path, BUDGET, 1), NvmeTier(tmp_path, BUDGET, 1)
    await first.start()
    await second.start()
    await keep(first, "a", 0, 5000)
    assert not second.covers("a", 0, 5000), "it does not know yet, and starts to look"
    await second.settle()
    assert second.covers("a", 0, 5000)
    assert await read(second, "a", 0, 5000) == content("a", 0, 5000)
    await first.close()
    await second.close()


async def test_what_is_dropped_while_files_are_listed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme, "_NEWS_S", 0.0)
    first, second = NvmeTier(tmp_path, BUDGET, 2), NvmeTier(tmp_path, BUDGET, 2)
    await second.start()
    await keep(first, "a", 0, 5000)
    await first.settle()
    listed, dropped = threading.Event(), threading.Event()

    def find() -> dict[Extent, int]:
        found = NvmeFiles.find(first._files)
        listed.set()
        dropped.wait(10)
        return found

    monkeypatch.setattr(first._files, "find", find)
    await keep(second, "b", 0, 5000)
    assert not first.covers("b", 0, 5000)
    await asyncio.to_thread(listed.wait, 10)
    first.drop("a")
    asyncio.get_running_loop().call_later(0.2, dropped.set)
    await first.settle()
    assert first.covers("b", 0, 5000)
    assert not first.covers("a", 0, 5000)
    await first.close()
    await second.close()


async def test_own_pieces_are_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "_NEWS_S", 0.0)
    tier = NvmeTier(tmp_path, BUDGET, 2)
    await asyncio.gather(*(keep(tier, f"k{number}", 0, PAGE) for number in range(9)))
    monkeypatch.setattr(tier._files, "find", None)
    assert not tier.covers("absent", 0, 1)
    await tier.close()


async def test_a_piece_that_another_process_evicted_is_a_miss_and_forgotten(tmp_path: Path) -> None:
    first = NvmeTier(tmp_path, BUDGET, 1)
    await keep(first, "a", 0, 5000)
    second = NvmeTier(tmp_path, BUDGET, 1)
    await second.start()
    second.drop("a")
    await second.settle()
    assert await read(first, "a", 0, 5000) is None
    assert not first.covers("a", 0, 5000)
    assert await keep(first, "a", 0, 5000)
    await first.close()
    await second.close()


async def test_a_piece_that_another_process_uses_is_spared(tmp_path: Path) -> None:
    evicting, using = NvmeTier(tmp_path, BUDGET, 1), NvmeTier(tmp_path, BUDGET, 1)
    await keep(evicting, "used", 0, 3 * PAGE)
    await using.start()
    for number in range(15):
        await keep(evicting, f"k{number}", 0, 3 * PAGE)
    assert await read(using, "used", 0, 3 * PAGE) is not None
    await keep(evicting, "new", 0, 3 * PAGE)
    assert evicting.covers("used", 0, 3 * PAGE)
    assert not evicting.covers("k0", 0, 3 * PAGE)
    await evicting.close()
    await using.close()


async def test_a_file_that_is_being_read_is_not_taken_over_but_removed(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, 4 * PAGE, 1)
    await keep(tier, "old", 0, 3 * PAGE)
    (path,) = files_in(tmp_path)
    with path.open("rb") as reading:
        fcntl.flock(reading, fcntl.LOCK_SH)
        assert await keep(tier, "new", 0, 3 * PAGE)
        reading.seek(PAGE)
        assert reading.read() == content("old", 0, 3 * PAGE)
    assert await read(tier, "new", 0, 3 * PAGE) == content("new", 0, 3 * PAGE)
    await tier.close()
    check_nothing_leaked(tmp_path, 4 * PAGE)


async def test_a_file_that_becomes_another_piece_is_a_miss(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, 4 * PAGE, 1)
    await keep(tier, "old", 0, 3 * PAGE)
    (path,) = files_in(tmp_path)
    with path.open("r+b") as taken:
        fcntl.flock(taken, fcntl.LOCK_EX)
        assert await read(tier, "old", 0, 3 * PAGE) is None
    assert not tier.covers("old", 0, 3 * PAGE)
    await tier.close()


async def test_a_new_piece_takes_over_the_file_of_one_that_is_as_large(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, 4 * PAGE, 1)
    await keep(tier, "old", 0, 3 * PAGE)
    inode = files_in(tmp_path)[0].stat().st_ino
    assert await keep(tier, "new", 0, 3 * PAGE)
    assert [path.stat().st_ino for path in files_in(tmp_path)] == [inode]
    assert await read(tier, "old", 0, 3 * PAGE) is None
    assert await read(tier, "new", 0, 3 * PAGE) == content("new", 0, 3 * PAGE)
    await tier.close()
    check_nothing_leaked(tmp_path, 4 * PAGE)


async def test_a_tier_evicts_what_others_wrote_when_it_has_nothing_of_its_own(tmp_path: Path) -> None:
    idle, busy = NvmeTier(tmp_path, BUDGET, 1), NvmeTier(tmp_path, BUDGET, 1)
    await idle.start()
    for number in range(16):
        assert await keep(busy, f"k{number}", 0, 3 * PAGE)
    assert await keep(idle, "a", 0, 3 * PAGE)
    await idle.close()
    await busy.close()
    check_nothing_leaked(tmp_path, BUDGET)


async def test_two_that_write_the_same_piece_leave_one_file_and_count_it_once(tmp_path: Path) -> None:
    tiers = [NvmeTier(tmp_path, BUDGET, 1) for _ in range(2)]
    for tier in tiers:
        await tier.start()
    assert await asyncio.gather(*(keep(tier, "a", 100, 9000) for tier in tiers)) == [True, True]
    for tier in tiers:
        assert await read(tier, "a", 100, 9000) == content("a", 100, 9000)
        await tier.close()
    assert len(pieces_in(tmp_path)) == 1
    check_nothing_leaked(tmp_path, BUDGET)


@pytest.mark.parametrize("damage", [b"", b"short", bytes(32), b"\xff" * 100])
async def test_a_damaged_count_is_made_afresh(tmp_path: Path, damage: bytes) -> None:
    tier = NvmeTier(tmp_path, BUDGET, 1)
    await keep(tier, "a", 0, 5000)
    (tmp_path / "v1" / "usage").write_bytes(damage)
    await keep(tier, "b", 0, 5000)
    await tier.close()
    check_nothing_leaked(tmp_path, BUDGET)


async def test_a_count_that_drifted_upwards_does_not_shut_the_tier(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, BUDGET, 1)
    await tier.start()
    with SharedUsage(tmp_path / "v1" / "usage").locked() as ledger:
        ledger.change(BUDGET)
    assert await keep(tier, "a", 0, 5000)
    await tier.close()
    check_nothing_leaked(tmp_path, BUDGET)
