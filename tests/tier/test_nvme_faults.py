"""A disk that fails: the tier steps aside, says so once, and comes back by itself. What it reads wrongly is a miss."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tier.disk import (
    check_nothing_leaked,
    content,
    filled,
    keep,
    open_below,
    pieces_in,
    read,
    temporaries_in,
    used_in,
)

from kvstore_s3.metrics import Counters
from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme import NvmeTier
from kvstore_s3.tier.nvme_names import digest_of, path_of
from kvstore_s3.tier.pieces import file_size
from kvstore_s3.tier.switch import Switch

BUDGET = 64 * PAGE


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
async def tier(tmp_path: Path, counters: Counters) -> AsyncIterator[NvmeTier]:
    tier = NvmeTier(tmp_path / "tier", BUDGET, 2, counters.add)
    tier._writes = Switch(failures=1, pause_s=0.001, longest_s=0.001)
    yield tier
    await tier.close()
    assert open_below(tmp_path) == []


def the_file(tier: NvmeTier) -> Path:
    return next(tier._files.root.glob("??/*"))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a disk that is full: the system refuses to make a file longer."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB that is really full when it is full."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


async def test_a_disk_without_room_costs_the_piece_and_is_said_once(
    tier: NvmeTier, counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    assert await keep(tier, "a", 0, 3 * PAGE)
    with files_no_larger_than(2 * PAGE), caplog.at_level(logging.WARNING, "kvstore_s3"):
        for key in ("b", "c", "d"):
            assert not await keep(tier, key, 0, 3 * PAGE)
            tier._writes.worked()
    assert await read(tier, "a", 0, 3 * PAGE) == content("a", 0, 3 * PAGE), "reads go on"
    assert len(caplog.records) == 1
    assert "the object store goes on without it" in caplog.text
    assert counters.snapshot()["nvme_errors"] >= 1
    check_nothing_leaked(tier._directory, BUDGET)


async def test_a_failed_tier_is_left_alone_and_tried_again_after_its_pause(tier: NvmeTier, counters: Counters) -> None:
    tier._writes = Switch(failures=1, pause_s=3600)
    await tier.start()
    with files_no_larger_than(2 * PAGE):
        assert not await keep(tier, "a", 0, 3 * PAGE)
    assert not await keep(tier, "a", 0, 3 * PAGE)
    assert counters.snapshot()["nvme_errors"] == 1
    tier._writes = Switch(failures=1, pause_s=0.0)
    assert await keep(tier, "a", 0, 3 * PAGE)


async def test_a_full_disk_fails_the_write_and_not_the_tier(small_disk: Path, counters: Counters) -> None:
    tier = NvmeTier(small_disk, 1024 * PAGE, 2, counters.add)
    tier._writes = Switch(failures=1, pause_s=0.0)
    kept = [key for key in map(str, range(30)) if await keep(tier, key, 0, 15 * PAGE)]
    assert 5 < len(kept) < 17
    for key in kept:
        assert await read(tier, key, 0, 15 * PAGE) == content(key, 0, 15 * PAGE)
    for key in kept[:3]:
        tier.drop(key)
    await tier.settle()
    assert await keep(tier, "again", 0, 15 * PAGE)
    await tier.close()
    check_nothing_leaked(small_disk, 1024 * PAGE)


async def test_a_file_system_that_turned_read_only_is_still_read(small_disk: Path, counters: Counters) -> None:
    tier = NvmeTier(small_disk, 1024 * PAGE, 2, counters.add)
    tier._writes = Switch(failures=1, pause_s=0.0)
    await keep(tier, "a", 0, PAGE)
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", small_disk], check=True)
    assert not await keep(tier, "b", 0, PAGE)
    assert await read(tier, "a", 0, PAGE) == content("a", 0, PAGE)
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,rw", small_disk], check=True)
    assert await keep(tier, "b", 0, PAGE)
    await tier.close()


async def test_a_removed_directory_is_made_again(tier: NvmeTier, caplog: pytest.LogCaptureFixture) -> None:
    await keep(tier, "a", 0, PAGE)
    await tier.offer("half", 0, 9000, 0, filled("half", 0, 5000))
    shutil.rmtree(tier._directory)
    assert await read(tier, "a", 0, PAGE) is None
    await tier.offer("b", 0, PAGE, 0, filled("b", 0, PAGE))
    assert not tier.covers("a", 0, PAGE)
    assert tier._open.pop_all() == [], "what was half written is gone with its directory"
    await tier.settle()
    tier._writes = Switch(failures=1, pause_s=0.0)
    assert await keep(tier, "b", 0, PAGE)
    assert await read(tier, "b", 0, PAGE) == content("b", 0, PAGE)
    await tier.settle()
    check_nothing_leaked(tier._directory, BUDGET)


async def test_a_directory_that_cannot_be_made_switches_the_tier_off_and_is_said_once(
    tmp_path: Path, counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    tier = NvmeTier(tmp_path / "file" / "tier", BUDGET, 1, counters.add)
    assert not await tier.start()
    assert not await keep(tier, "a", 0, PAGE)
    assert not await tier.start()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not await read(tier, "a", 0, PAGE)
    await tier.close()


async def test_a_directory_that_others_may_write_to_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "v1").mkdir(mode=0o777)
    (tmp_path / "v1").chmod(0o777)
    tier = NvmeTier(tmp_path, BUDGET, 1)
    assert not await tier.start()
    assert "belongs to this user alone" in caplog.text
    await tier.close()


@pytest.mark.parametrize("known", [True, False], ids=["of this process", "found at the start"])
async def test_a_file_cut_short_is_a_miss_and_goes(tier: NvmeTier, counters: Counters, known: bool) -> None:
    await keep(tier, "a", 0, 5 * PAGE)
    other = tier if known else NvmeTier(tier._directory, BUDGET, 1, counters.add)
    await other.start()
    os.truncate(the_file(tier), 3 * PAGE)
    assert await read(other, "a", 0, 5 * PAGE) is None
    assert not other.covers("a", 0, PAGE)
    await other.settle()
    assert pieces_in(tier._directory) == []
    assert counters.snapshot()["nvme_errors"] == 1
    await other.close()


async def test_every_byte_of_the_header_counts(tmp_path: Path) -> None:
    for byte in [*range(80), 2000, PAGE - 33, PAGE - 32, PAGE - 1]:
        tier = NvmeTier(tmp_path, BUDGET, 1)
        await keep(tier, "a", 100, 5000)
        with the_file(tier).open("r+b") as file:
            file.seek(byte)
            old = file.read(1)
            file.seek(byte)
            file.write(bytes([old[0] ^ 1]))
        await tier.close()
        later = NvmeTier(tmp_path, BUDGET, 1)
        await later.start()
        assert later.covers("a", 100, 5000), "names are believed until the first read"
        assert await read(later, "a", 100, 5000) is None, byte
        assert not later.covers("a", 100, 5000)
        await later.close()
        assert pieces_in(tmp_path) == []


async def test_two_files_that_were_swapped_are_misses(tier: NvmeTier) -> None:
    await keep(tier, "a", 0, PAGE)
    await keep(tier, "b", 0, PAGE)
    first, second = tier._files.root.glob("??/*")
    aside = tier._directory / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    later = NvmeTier(tier._directory, BUDGET, 1)
    await later.start()
    assert await read(later, "a", 0, PAGE) is None
    assert await read(later, "b", 0, PAGE) is None
    await later.close()


async def test_reads_that_fail_in_a_row_switch_reading_off_for_a_while(tier: NvmeTier) -> None:
    keys = [f"k{number}" for number in range(5)]
    for key in keys:
        await keep(tier, key, 0, 3 * PAGE)
    for key in keys[:3]:
        os.truncate(tier._files.root / path_of(Extent(digest_of(key), 0, 3 * PAGE)), PAGE)
        assert await read(tier, key, 0, 3 * PAGE) is None
    assert not any(tier.covers(key, 0, 3 * PAGE) for key in keys), "off"
    tier._reads = Switch(failures=3)
    assert [key for key in keys if tier.covers(key, 0, 3 * PAGE)] == keys[3:]
    assert await read(tier, keys[3], 0, 3 * PAGE) == content(keys[3], 0, 3 * PAGE)


async def test_foreign_files_are_left_alone_and_do_not_count(tier: NvmeTier) -> None:
    await keep(tier, "a", 0, PAGE)
    place = the_file(tier).parent
    foreign = [place / "notes.txt", place / f"{'0' * 64}.5-5", place / f"{'g' * 64}.0-5", tier._files.root / "readme"]
    for path in foreign:
        path.write_bytes(bytes(100))
    (place / f"{place.name}{'0' * 62}.0-7").mkdir()
    await tier.close()
    later = NvmeTier(tier._directory, BUDGET, 1)
    await later.start()
    assert later.stats.entries == 1
    assert used_in(tier._directory) == sum(map(file_size, pieces_in(tier._directory)[:1]))
    assert all(path.exists() for path in foreign)
    await later.close()


async def test_a_link_in_the_place_of_a_piece_is_not_followed(tier: NvmeTier, tmp_path: Path) -> None:
    await keep(tier, "a", 0, PAGE)
    path = the_file(tier)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert await read(tier, "a", 0, PAGE) is None


async def test_a_living_writers_temporary_survives_the_start_of_another(tier: NvmeTier) -> None:
    await tier.offer("a", 0, 9000, 0, filled("a", 0, 5000))
    other = NvmeTier(tier._directory, BUDGET, 1)
    await other.start()
    assert len(temporaries_in(tier._directory)) == 1
    assert used_in(tier._directory) == 4 * PAGE
    await tier.offer("a", 0, 9000, 5000, filled("a", 5000, 9000))
    assert await read(tier, "a", 0, 9000) == content("a", 0, 9000)
    await other.close()
    check_nothing_leaked(tier._directory, BUDGET)
