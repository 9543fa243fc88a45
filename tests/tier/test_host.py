"""The host tier: bytes are lent where they lie, and memory comes back on every path."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore_s3.metrics import Counters
from kvstore_s3.tier.base import PAGE, MemoryTier
from kvstore_s3.tier.host import HostTier


class Blocks:
    """Memory that counts; a block that is given back is overwritten, so that a late reader notices."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0

    def allocate(self, size: int) -> memoryview | None:
        size = -(-size // PAGE) * PAGE
        if self.used + size > self.size:
            return None
        self.used += size
        return memoryview(bytearray(size))

    def free(self, block: memoryview) -> None:
        self.used -= len(block)
        block[:] = b"\xee" * len(block)


@pytest.fixture
def memory() -> Blocks:
    return Blocks(8 * PAGE)


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def tier(memory: Blocks, counters: Counters) -> MemoryTier:
    return HostTier(memory, counters.add)


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def borrowed(tier: MemoryTier, key: str, start: int, end: int) -> bytes | None:
    loan = tier.borrow(key, start, end)
    if loan is None:
        return None
    with loan as view:
        return bytes(view)


async def test_what_was_offered_is_lent_without_a_copy_of_the_whole(tier: MemoryTier, counters: Counters) -> None:
    data = content(5000)
    assert await tier.offer("a", 100, memoryview(data))
    assert tier.covers("a", 200, 5100)
    assert borrowed(tier, "a", 200, 5100) == data[100:]
    assert counters.snapshot() == {"host_kept_bytes": 5000, "host_hit_bytes": 4900}


async def test_ranges_that_are_not_kept_in_one_piece_are_not_lent(tier: MemoryTier) -> None:
    await tier.offer("a", 0, memoryview(bytes(100)))
    await tier.offer("a", 100, memoryview(bytes(100)))
    for key, start, end in (("a", 50, 150), ("a", 150, 201), ("b", 0, 10), ("a", 5, 5)):
        assert tier.borrow(key, start, end) is None
    assert not tier.covers("a", 150, 201)
    assert not tier.covers("b", 0, 10)
    assert not tier.covers("a", 5, 5)


async def test_the_offered_buffer_may_change_afterwards(tier: MemoryTier) -> None:
    data = bytearray(content(1000))
    await tier.offer("a", 0, memoryview(data))
    data[:] = bytes(1000)
    assert borrowed(tier, "a", 0, 1000) == content(1000)


async def test_a_full_tier_evicts_and_counts_it(tier: MemoryTier, memory: Blocks, counters: Counters) -> None:
    for number in range(20):
        assert await tier.offer(f"k{number}", 0, memoryview(content(2 * PAGE, number)))
    assert memory.used == 8 * PAGE == tier.stats.bytes
    assert tier.stats.entries == 4
    assert counters.snapshot()["tier_evictions"] == 16
    assert borrowed(tier, "k19", 0, 2 * PAGE) == content(2 * PAGE, 19)


async def test_borrowed_bytes_are_neither_evicted_nor_freed_until_they_come_back(
    tier: MemoryTier, memory: Blocks
) -> None:
    await tier.offer("a", 0, memoryview(content(2 * PAGE)))
    loan = tier.borrow("a", 0, 2 * PAGE)
    assert loan is not None
    with loan as view:
        for number in range(20):
            await tier.offer(f"k{number}", 0, memoryview(bytes(2 * PAGE)))
        assert tier.covers("a", 0, 2 * PAGE)
        tier.drop("a")
        assert not tier.covers("a", 0, 1)
        assert view == content(2 * PAGE)
        used = memory.used
    assert memory.used == used - 2 * PAGE


async def test_where_all_is_borrowed_an_offer_comes_to_nothing(tier: MemoryTier) -> None:
    await tier.offer("a", 0, memoryview(bytes(8 * PAGE)))
    loan = tier.borrow("a", 0, 1)
    assert loan is not None
    with loan:
        assert not await tier.offer("b", 0, memoryview(bytes(PAGE)))
    assert await tier.offer("b", 0, memoryview(bytes(PAGE)))


async def test_an_offer_larger_than_the_tier_or_empty_is_not_kept(tier: MemoryTier) -> None:
    assert not await tier.offer("a", 0, memoryview(bytes(8 * PAGE + 1)))
    assert not await tier.offer("a", 0, memoryview(b""))


async def test_a_larger_extent_replaces_those_within_it(tier: MemoryTier) -> None:
    await tier.offer("a", 0, memoryview(bytes(PAGE)))
    await tier.offer("a", PAGE, memoryview(bytes(PAGE)))
    assert await tier.offer("a", 0, memoryview(content(3 * PAGE)))
    assert tier.stats.entries == 1
    assert await tier.offer("a", PAGE, memoryview(bytes(PAGE))), "it is there already"
    assert borrowed(tier, "a", 0, 3 * PAGE) == content(3 * PAGE)


async def test_closing_gives_all_memory_back_and_ends_offers(tier: MemoryTier, memory: Blocks) -> None:
    await tier.offer("a", 0, memoryview(bytes(PAGE)))
    await tier.offer("b", 0, memoryview(bytes(PAGE)))
    loan = tier.borrow("b", 0, PAGE)
    assert loan is not None
    with loan:
        await tier.close()
        await tier.close()
        assert memory.used == PAGE, "one block is borrowed still"
    assert memory.used == 0
    assert not await tier.offer("a", 0, memoryview(bytes(PAGE)))
    assert tier.stats.entries == 0


async def test_random_work_leaks_nothing(tier: MemoryTier, memory: Blocks) -> None:
    chance = random.Random(1)
    loans = []
    for _ in range(2000):
        key, start = f"k{chance.randrange(6)}", PAGE * chance.randrange(3)
        act = chance.randrange(4)
        if act == 0:
            await tier.offer(
                key, start, memoryview(content(6 * PAGE, int(key[1:])))[start : start + PAGE * chance.randrange(4)]
            )
        elif act == 1 and (loan := tier.borrow(key, start, start + PAGE)) is not None:
            loans.append((loan, loan.__enter__(), content(6 * PAGE, int(key[1:]))[start : start + PAGE]))
        elif act == 2 and loans:
            loan, view, expected = loans.pop(chance.randrange(len(loans)))
            assert view == expected
            loan.__exit__(None, None, None)
        elif act == 3 and chance.random() < 0.2:
            tier.drop(key)
    for loan, view, expected in loans:
        assert view == expected
        loan.__exit__(None, None, None)
    for number in range(6):
        tier.drop(f"k{number}")
    assert memory.used == 0


async def test_bytes_in_several_extents_are_read_together(tier: MemoryTier, counters: Counters) -> None:
    data = content(5000)
    await tier.offer("a", 100, memoryview(data)[:2000])
    await tier.offer("a", 2100, memoryview(data)[2000:])
    into = bytearray(4000)
    assert tier.borrow("a", 600, 4600) is None
    assert tier.covers("a", 600, 4600)
    assert await tier.read("a", 600, memoryview(into))
    assert into == data[500:4500]
    assert counters.snapshot()["host_hit_bytes"] == 4000
    assert not await tier.read("a", 1200, memoryview(into))
    assert not await tier.read("b", 600, memoryview(into))


async def test_what_is_read_stays_in_its_place_until_it_is_copied(tier: MemoryTier, memory: Blocks) -> None:
    data, into = content(4 * PAGE), bytearray(4 * PAGE)
    await tier.offer("a", 0, memoryview(data)[:PAGE])
    await tier.offer("a", PAGE, memoryview(data)[PAGE:])
    reading = asyncio.create_task(tier.read("a", 0, memoryview(into)))
    await asyncio.sleep(0)
    tier.drop("a")
    assert await reading
    assert into == data
    assert memory.used == 0


async def test_what_is_dropped_or_closed_while_it_arrives_is_not_kept(tier: MemoryTier, memory: Blocks) -> None:
    for end in (lambda: tier.drop("a"), lambda: asyncio.ensure_future(tier.close())):
        offering = asyncio.create_task(tier.offer("a", 0, memoryview(content(PAGE))))
        await asyncio.sleep(0)
        end()
        assert not await offering
        assert not tier.covers("a", 0, PAGE)
        assert memory.used == 0


async def test_a_cancelled_offer_gives_its_memory_back(tier: MemoryTier, memory: Blocks) -> None:
    offering = asyncio.create_task(tier.offer("a", 0, memoryview(content(PAGE))))
    await asyncio.sleep(0)
    offering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await offering
    assert memory.used == 0
    assert not tier.covers("a", 0, PAGE)


async def test_the_same_bytes_offered_twice_at_once_are_kept_once(tier: MemoryTier, memory: Blocks) -> None:
    data = memoryview(content(PAGE))
    assert await asyncio.gather(tier.offer("a", 0, data), tier.offer("a", 0, data)) == [True, False]
    assert memory.used == PAGE
