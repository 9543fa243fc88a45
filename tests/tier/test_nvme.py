"""The NVMe tier: what was offered is read back, across restarts, and nothing leaks."""

from __future__ import annotations

import asyncio
import os
import random
import stat
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tier.disk import (
    buffer_for,
    check_nothing_leaked,
    content,
    filled,
    keep,
    pieces_in,
    read,
    temporaries_in,
)

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.metrics import Counters
from kvstore_s3.tier.base import PAGE, DiskTier
from kvstore_s3.tier.nvme import NvmeTier
from kvstore_s3.tier.nvme_names import digest_of

BUDGET = 64 * PAGE


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "made" / "by the tier"


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
async def tier(directory: Path, counters: Counters) -> AsyncIterator[NvmeTier]:
    descriptors = len(os.listdir("/proc/self/fd"))
    tier = NvmeTier(directory, BUDGET, 2, counters.add)
    assert isinstance(tier, DiskTier)
    yield tier
    await tier.close()
    if (directory / "v1").exists():
        check_nothing_leaked(directory, BUDGET)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (0, PAGE), (1, PAGE), (100, 200), (PAGE - 1, PAGE + 1), (5000, 5 * PAGE), (7, 7 + 4 * PAGE)],
)
async def test_a_piece_comes_back_byte_for_byte(tier: NvmeTier, start: int, end: int, shift: int) -> None:
    await tier.offer("ns/a", start, end, start, filled("ns/a", start, end, shift=shift))
    assert tier.covers("ns/a", start, end)
    assert await read(tier, "ns/a", start, end, shift=shift) == content("ns/a", start, end)
    assert await read(tier, "ns/a", start, end, shift=shift + 1) == content("ns/a", start, end)


@given(st.integers(0, 2 * PAGE), st.integers(1, 5 * PAGE), st.integers(0, 3), st.randoms(use_true_random=True))
@settings(max_examples=40, deadline=None)
def test_any_part_of_a_piece_offered_in_any_order_can_be_read(
    start: int, size: int, cuts: int, chance: random.Random
) -> None:
    async def work(directory: Path) -> None:
        tier = NvmeTier(directory, BUDGET, 1)
        end = start + size
        edges = sorted({start, end, *(chance.randrange(start, end) for _ in range(cuts))})
        offers = list(pairwise(edges))
        chance.shuffle(offers)
        for begin, stop in offers:
            assert not tier.covers("a", start, end)
            await tier.offer("a", start, end, begin, filled("a", begin, stop, shift=chance.randrange(2)))
        begin = chance.randrange(start, end)
        stop = chance.randrange(begin, end) + 1
        assert await read(tier, "a", begin, stop, shift=chance.randrange(2)) == content("a", begin, stop)
        await tier.close()

    with TemporaryDirectory() as directory:
        asyncio.run(work(Path(directory)))


async def test_a_read_may_span_several_pieces_but_no_hole(tier: NvmeTier) -> None:
    assert await keep(tier, "a", 0, 6000)
    assert await keep(tier, "a", 6000, 9000)
    assert await keep(tier, "a", 9001, 12000)
    assert await read(tier, "a", 5000, 9000) == content("a", 5000, 9000)
    assert not tier.covers("a", 5000, 10000)
    assert await read(tier, "a", 5000, 10000) is None


async def test_hits_and_kept_bytes_are_counted(tier: NvmeTier, counters: Counters) -> None:
    await keep(tier, "a", 0, 6000)
    await keep(tier, "a", 0, 6000)
    await read(tier, "a", 1000, 6000)
    await read(tier, "a", 1000, 6001)
    counts = counters.snapshot()
    assert (counts["nvme_kept_bytes"], counts["nvme_hit_bytes"], counts.get("nvme_errors", 0)) == (6000, 5000, 0)


async def test_a_new_process_finds_what_the_last_one_kept(tier: NvmeTier, directory: Path) -> None:
    await keep(tier, "a", 100, 9000)
    await tier.close()
    later = NvmeTier(directory, BUDGET, 1)
    assert not later.covers("a", 100, 9000), "it has not looked yet"
    assert await later.start()
    assert await read(later, "a", 200, 9000) == content("a", 200, 9000)
    assert later.stats.entries == 1
    await later.close()


async def test_files_and_directories_are_for_their_owner_alone(tier: NvmeTier, directory: Path) -> None:
    await keep(tier, "a", 0, 100)
    for path in (directory / "v1").rglob("*"):
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == (0o700 if path.is_dir() else 0o600)


async def test_a_dropped_object_is_gone_and_its_file_soon_after(tier: NvmeTier, directory: Path) -> None:
    await keep(tier, "a", 0, 100)
    await keep(tier, "b", 0, 100)
    tier.drop("a")
    assert not tier.covers("a", 0, 100)
    assert await read(tier, "a", 0, 100) is None
    await tier.settle()
    assert [extent.name for extent in pieces_in(directory)] == [digest_of("b")]


async def test_an_object_that_was_dropped_can_be_offered_again_at_once(tier: NvmeTier, directory: Path) -> None:
    for _ in range(20):
        assert await keep(tier, "a", 0, 3 * PAGE)
        tier.drop("a")
    assert await keep(tier, "a", 0, 3 * PAGE)
    await tier.settle()
    assert await read(tier, "a", 0, 3 * PAGE) == content("a", 0, 3 * PAGE)


async def test_an_abandoned_piece_leaves_nothing(tier: NvmeTier, directory: Path) -> None:
    await tier.offer("a", 0, 9000, 0, filled("a", 0, 5000))
    assert len(temporaries_in(directory)) == 1
    tier.abandon("a", 0)
    tier.abandon("a", 0)
    await tier.settle()
    assert temporaries_in(directory) == []
    await tier.offer("a", 0, 9000, 5000, filled("a", 5000, 9000))
    assert not tier.covers("a", 0, 9000), "the first part was forgotten"


async def test_closing_abandons_what_is_not_whole(tier: NvmeTier, directory: Path) -> None:
    await tier.offer("a", 0, 9000, 0, filled("a", 0, 5000))
    await tier.close()
    check_nothing_leaked(directory, BUDGET)
    await tier.offer("a", 0, 9000, 0, filled("a", 0, 9000))
    assert not tier.covers("a", 0, 9000)


async def test_a_cancelled_offer_leaves_nothing_and_the_buffer_alone(tier: NvmeTier, directory: Path) -> None:
    await tier.start()
    for turns in range(12):
        task = asyncio.create_task(tier.offer("a", 0, 9000, 0, filled("a", 0, 5000)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            tier.abandon("a", 0)
        await tier.settle()
        assert temporaries_in(directory) == []


async def test_nothing_is_written_into_the_buffer_of_a_cancelled_read(tier: NvmeTier) -> None:
    await keep(tier, "a", 0, 20 * PAGE)
    for turns in range(8):
        into = buffer_for(0, 20 * PAGE)
        task = asyncio.create_task(tier.read("a", 0, into))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        before = bytes(into)
        await asyncio.sleep(0.01)
        assert bytes(into) == before


async def test_two_loads_that_offer_the_same_piece_at_once_write_it_once(tier: NvmeTier, counters: Counters) -> None:
    data = filled("a", 0, 9000)
    halves = [(0, 5000), (5000, 9000)] * 2
    await asyncio.gather(*(tier.offer("a", 0, 9000, start, data[start:end]) for start, end in halves))
    assert await read(tier, "a", 0, 9000) == content("a", 0, 9000)
    assert counters.snapshot()["nvme_kept_bytes"] == 9000


async def test_bytes_outside_their_piece_are_refused(tier: NvmeTier) -> None:
    for piece, start, size in (((0, 10), 5, 6), ((10, 20), 5, 5), ((-5, 5), -5, 10)):
        with pytest.raises(InvalidArgumentError, match="are not in"):
            await tier.offer("a", *piece, start, memoryview(bytes(size)))
    with pytest.raises(InvalidArgumentError, match="not an object key"):
        await tier.offer("../a", 0, 10, 0, memoryview(bytes(10)))


async def test_more_open_pieces_than_allowed_are_ignored_to_their_end(
    tier: NvmeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier._open, "_most", 2)
    for key in ("a", "b", "c"):
        await tier.offer(key, 0, 200, 0, filled(key, 0, 100))
    for key in ("a", "b", "c"):
        await tier.offer(key, 0, 200, 100, filled(key, 100, 200))
    assert [tier.covers(key, 0, 200) for key in ("a", "b", "c")] == [True, True, False]
    assert await keep(tier, "c", 0, 200), "the ignored piece ended; this is a new one"


async def test_a_larger_piece_replaces_those_within_it(tier: NvmeTier, directory: Path) -> None:
    await keep(tier, "a", 0, 5000)
    await keep(tier, "a", 5000, 9000)
    await keep(tier, "a", 0, 12000)
    await tier.settle()
    assert [(extent.start, extent.end) for extent in pieces_in(directory)] == [(0, 12000)]
    assert await read(tier, "a", 0, 12000) == content("a", 0, 12000)


async def test_the_budget_is_kept_and_what_is_used_stays(tier: NvmeTier, counters: Counters) -> None:
    await keep(tier, "used", 0, 3 * PAGE)
    for number in range(60):
        assert await keep(tier, f"k{number}", 0, 3 * PAGE)
        if number % 3 == 0:
            tier._index._eviction._one_visit_s = 0.0
            assert await read(tier, "used", 0, 3 * PAGE) is not None
    assert tier.stats.bytes <= BUDGET
    assert tier.stats.entries == BUDGET // (4 * PAGE)
    assert counters.snapshot()["tier_evictions"] == 61 - tier.stats.entries


async def test_a_piece_larger_than_the_budget_is_not_kept_and_evicts_nothing(tier: NvmeTier) -> None:
    await keep(tier, "a", 0, PAGE)
    assert not await keep(tier, "b", 0, BUDGET)
    assert tier.covers("a", 0, PAGE)


async def test_without_o_direct_all_works_through_the_page_cache(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_s3.tier.nvme_files.probe_direct", lambda directory: False)
    tier = NvmeTier(directory, BUDGET, 1)
    await keep(tier, "a", 5000, 20000)
    assert not tier._files.direct
    assert await read(tier, "a", 6000, 20000, shift=3) == content("a", 6000, 20000)
    await tier.close()
    check_nothing_leaked(directory, BUDGET)
