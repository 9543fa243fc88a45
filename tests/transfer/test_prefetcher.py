"""Fetching ranges: the right bytes at the right place, late reads asked twice, one writer per buffer, nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.arena import PAGE, address_of
from kvstore_s3.errors import InvalidArgumentError, ObjectNotFoundError, StoreBusyError, StoreUnavailableError
from kvstore_s3.metrics import Counters
from kvstore_s3.transfer.bandwidth import Bandwidth
from kvstore_s3.transfer.buffers import SlabPool
from kvstore_s3.transfer.hedging import ENOUGH, HedgePolicy
from kvstore_s3.transfer.prefetcher import Prefetcher
from kvstore_s3.transfer.window import START, Window

pytestmark = pytest.mark.usefixtures("no_leaks")

DATA = bytes(number * 7 % 251 for number in range(128 * 1024))


@dataclass
class Answer:
    """What one read does: waits until it is let go, then fails or fills."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    fails_with: Exception | None = None
    slow_to_stop: asyncio.Event | None = None
    cancelled: bool = False
    view: memoryview | None = None


class Source:
    """An object store of one object whose answers can be held back. It watches that no two reads share memory."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int, int]] = []
        self.writing: list[tuple[int, int]] = []
        self.most_at_once = 0

    async def read(self, key: str, start: int, into: memoryview) -> None:
        self.asked.append((key, start, len(into)))
        begin = address_of(into)
        extent = (begin, begin + len(into))
        assert all(end <= extent[0] or extent[1] <= first for first, end in self.writing), "two writers of one buffer"
        self.writing.append(extent)
        self.most_at_once = max(self.most_at_once, len(self.writing))
        answer = self.answers.pop(0) if self.answers else None
        try:
            if answer is not None:
                await self._follow(answer)
            else:
                await asyncio.sleep(0)
            into[:] = DATA[start : start + len(into)]
        finally:
            self.writing.remove(extent)

    async def _follow(self, answer: Answer) -> None:
        try:
            await answer.go.wait()
        except asyncio.CancelledError:
            answer.cancelled = True
            if answer.slow_to_stop is not None:
                await answer.slow_to_stop.wait()
            raise
        if answer.fails_with is not None:
            raise answer.fails_with


class Late(HedgePolicy):
    """A policy for which every read is late at once, within the same budget."""

    def late_after(self, size: int) -> float | None:
        return 0.0


@dataclass
class Rig:
    prefetcher: Prefetcher
    pool: SlabPool
    window: Window
    counters: Counters


MakeRig = Callable[..., Rig]


@pytest.fixture
async def rig() -> AsyncIterator[MakeRig]:
    rigs: list[Rig] = []

    def make(
        source: Source,
        *,
        pages: int = 64,
        hedge: HedgePolicy | None = None,
        window: Window | None = None,
        **limits: int,
    ) -> Rig:
        pool, window, counters = SlabPool(pages * PAGE, pin=False), window or Window(), Counters()
        hedge = hedge or HedgePolicy(0.0)
        prefetcher = Prefetcher(
            source.read, pool, window, Bandwidth(), hedge, counters.add, **{"gap_bytes": 0, **limits}
        )
        rigs.append(Rig(prefetcher, pool, window, counters))
        return rigs[-1]

    yield make
    for each in rigs:
        await asyncio.wait_for(each.prefetcher.close(), 5)
        assert (each.window.in_flight, each.window.waiting, each.pool.leased) == (0, 0, 0)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def fetched(rig: Rig, start: int, length: int, urgency: float = 0.0) -> AsyncIterator[memoryview]:
    async with rig.prefetcher.fetch_ranges("k", [(start, start + length)], urgency) as views:
        yield views[0]


async def take(rig: Rig, start: int = 100, length: int = 5000) -> bytes:
    async with fetched(rig, start, length) as view:
        return bytes(view)


async def test_a_range_lies_in_memory_as_it_lies_in_the_object(rig: MakeRig) -> None:
    source = Source()
    made = rig(source)
    async with fetched(made, 5000, 9000) as view:
        assert bytes(view) == DATA[5000:14000]
        assert (address_of(view) - 5000) % PAGE == 0
    assert source.asked == [("k", 5000, 9000)]


async def test_several_ranges_share_one_slab_and_are_read_side_by_side(rig: MakeRig) -> None:
    source = Source()
    made = rig(source)
    async with made.prefetcher.fetch_ranges("k", [(10, 20), (5000, 9100), (300, 301)]) as views:
        assert [bytes(view) for view in views] == [DATA[10:20], DATA[5000:9100], DATA[300:301]]
        assert [(address_of(view) - start) % PAGE for view, start in zip(views, (10, 5000, 300), strict=True)] == [
            0
        ] * 3
        assert made.pool.leased == 4 * PAGE
    assert source.most_at_once == 3


async def test_no_more_reads_are_in_flight_than_the_window_lets_in(rig: MakeRig) -> None:
    source = Source()
    made = rig(source, window=Window(3, 3))  # one that measures raises and lowers its limit meanwhile
    assert await asyncio.gather(*(take(made) for _ in range(20))) == [DATA[100:5100]] * 20
    assert source.most_at_once == made.window.limit == 3


async def test_the_more_urgent_of_two_waiting_reads_goes_first(rig: MakeRig) -> None:
    held = [Answer() for _ in range(START)]
    source = Source(*held)
    made = rig(source)

    async def fetch(start: int, urgency: float) -> None:
        async with fetched(made, start, 10, urgency):
            pass

    tasks = [asyncio.create_task(fetch(0, 0.0)) for _ in range(START)]
    await settle()
    tasks += [asyncio.create_task(fetch(1, 2.0)), asyncio.create_task(fetch(2, 1.0))]
    await settle()
    for answer in held:
        answer.go.set()
    await asyncio.gather(*tasks)
    assert [start for _, start, _ in source.asked[START:]] == [2, 1]


@pytest.mark.parametrize(("start", "length"), [(0, 0), (-1, 5)])
async def test_what_is_no_range_is_refused(rig: MakeRig, start: int, length: int) -> None:
    with pytest.raises(InvalidArgumentError):
        async with fetched(rig(Source()), start, length):
            pass


async def test_no_ranges_at_all_are_refused(rig: MakeRig) -> None:
    with pytest.raises(InvalidArgumentError):
        async with rig(Source()).prefetcher.fetch_ranges("k", []):
            pass


async def test_a_range_larger_than_the_pool_is_refused_instead_of_waiting_for_ever(rig: MakeRig) -> None:
    with pytest.raises(InvalidArgumentError, match="raise buffer_bytes"):
        await take(rig(Source(), pages=1))


async def test_a_failure_is_raised_as_it_is_and_cancels_the_other_ranges(rig: MakeRig) -> None:
    held, failing = Answer(), Answer(fails_with=ObjectNotFoundError("gone"))
    failing.go.set()
    made = rig(Source(held, failing))
    with pytest.raises(ObjectNotFoundError, match="gone"):
        async with made.prefetcher.fetch_ranges("k", [(0, 5), (6, 10)]):
            pass
    assert held.cancelled
    assert made.pool.leased == 0


async def test_cancelling_a_fetch_cancels_the_read_and_gives_the_slab_back(rig: MakeRig) -> None:
    held = Answer()
    made = rig(Source(held))
    task = asyncio.create_task(take(made))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.cancelled
    assert made.pool.leased == 0


async def test_the_slab_of_a_cancelled_read_is_kept_until_the_read_has_really_ended(rig: MakeRig) -> None:
    held = Answer(slow_to_stop=asyncio.Event())
    made = rig(Source(held), hedge=Late(0.0))
    task = asyncio.create_task(take(made))
    await settle()
    task.cancel()
    await settle()
    assert held.cancelled
    assert not task.done()
    assert made.pool.leased == 2 * PAGE
    assert held.slow_to_stop is not None
    held.slow_to_stop.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made.pool.leased == 0


async def late_pair(rig: MakeRig, first: Answer, second: Answer, **options: int) -> tuple[Rig, asyncio.Task[bytes]]:
    """A fetch whose first read was found late, and whose second one was begun where there was room for it."""
    made = rig(Source(first, second), hedge=Late(0.02), **options)
    task = asyncio.create_task(take(made))
    await asyncio.sleep(0.01)
    await settle()
    return made, task


async def test_a_late_read_is_asked_for_again_and_the_second_wins(rig: MakeRig) -> None:
    first, second = Answer(slow_to_stop=asyncio.Event()), Answer()
    made, task = await late_pair(rig, first, second)
    assert made.pool.leased == 4 * PAGE, "two slabs"
    second.go.set()
    assert await task == DATA[100:5100]
    assert made.counters.snapshot() == {"hedged_reads": 1, "hedges_won": 1}
    assert first.cancelled
    assert made.pool.leased == 2 * PAGE, "the loser may still write"
    assert first.slow_to_stop is not None
    first.slow_to_stop.set()
    await made.prefetcher.close()
    assert made.pool.leased == 0


async def test_closing_does_not_wait_for_reads_that_have_not_lost(rig: MakeRig) -> None:
    first, second = Answer(), Answer()
    made, task = await late_pair(rig, first, second)
    await asyncio.wait_for(made.prefetcher.close(), 5)
    first.go.set()
    assert await task == DATA[100:5100]


async def test_the_first_may_still_win(rig: MakeRig) -> None:
    first, second = Answer(), Answer()
    made, task = await late_pair(rig, first, second)
    first.go.set()
    assert await task == DATA[100:5100]
    await made.prefetcher.close()
    assert made.counters.snapshot() == {"hedged_reads": 1}
    assert second.cancelled
    assert made.pool.leased == 0


@pytest.mark.parametrize("second_wins", [True, False])
async def test_one_failure_of_two_is_made_good_by_the_other(rig: MakeRig, second_wins: bool) -> None:
    first, second = Answer(), Answer()
    loser, winner = (first, second) if second_wins else (second, first)
    loser.fails_with = StoreUnavailableError("reset")
    made, task = await late_pair(rig, first, second)
    loser.go.set()
    await settle()
    assert not task.done()
    winner.go.set()
    assert await task == DATA[100:5100]
    assert made.pool.leased == 0


async def test_where_both_fail_the_first_error_is_raised(rig: MakeRig) -> None:
    first = Answer(fails_with=StoreUnavailableError("first"))
    second = Answer(fails_with=StoreUnavailableError("second"))
    made, task = await late_pair(rig, first, second)
    second.go.set()
    await settle()
    first.go.set()
    with pytest.raises(StoreUnavailableError, match="first"):
        await task
    assert made.pool.leased == 0


async def test_cancelling_ends_both_reads_of_a_late_one(rig: MakeRig) -> None:
    first, second = Answer(), Answer()
    made, task = await late_pair(rig, first, second)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (first.cancelled, second.cancelled, made.pool.leased) == (True, True, 0)


async def test_without_a_free_slab_a_late_read_is_waited_for(rig: MakeRig) -> None:
    first, second = Answer(), Answer()
    made, task = await late_pair(rig, first, second, pages=3)
    assert not task.done()
    first.go.set()
    assert await task == DATA[100:5100]
    assert made.counters.snapshot() == {}


async def test_no_more_is_hedged_than_the_budget_allows(rig: MakeRig) -> None:
    answers = [Answer() for _ in range(3)]
    made = rig(Source(*answers), hedge=Late(0.02))
    tasks = [asyncio.create_task(take(made)) for _ in range(2)]
    await asyncio.sleep(0.01)
    await settle()
    assert made.counters.snapshot() == {"hedged_reads": 1}
    for answer in answers:
        answer.go.set()
    await asyncio.gather(*tasks)


async def test_a_range_whose_hedge_won_lies_as_the_others_do(rig: MakeRig) -> None:
    first, other, second = Answer(), Answer(), Answer()
    other.go.set()
    second.go.set()
    made = rig(Source(first, other, second), hedge=Late(0.02))
    async with made.prefetcher.fetch_ranges("k", [(100, 5100), (7000, 8000)]) as views:
        assert [bytes(view) for view in views] == [DATA[100:5100], DATA[7000:8000]]
        assert [(address_of(view) - start) % PAGE for view, start in zip(views, (100, 7000), strict=True)] == [0, 0]
    assert made.counters.snapshot() == {"hedged_reads": 1, "hedges_won": 1}


async def test_reads_teach_when_one_is_late(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_s3.transfer.hedged_reads.monotonic", map(float, count()).__next__)  # a read takes 1 s
    hedge = HedgePolicy(0.02)
    made = rig(Source(), hedge=hedge)
    for _ in range(ENOUGH):
        await take(made)
    assert hedge.late_after(5000) == pytest.approx(1.0)


async def test_a_busy_store_makes_the_window_smaller(rig: MakeRig) -> None:
    busy = Answer(fails_with=StoreBusyError("slow down"))
    busy.go.set()
    made = rig(Source(busy))
    with pytest.raises(StoreBusyError):
        await take(made)
    assert made.window.limit == START // 2


async def test_what_is_near_is_not_asked_of_the_store(rig: MakeRig) -> None:
    near_asked: list[int] = []

    async def near(key: str, start: int, into: memoryview) -> bool:
        near_asked.append(start)
        into[:] = b"n" * len(into)
        return start == 100

    source = Source()
    made = rig(source)
    async with made.prefetcher.fetch_ranges("k", [(100, 110), (200, 210)], near=near) as views:
        assert [bytes(view) for view in views] == [b"n" * 10, DATA[200:210]]
    assert near_asked == [100, 200]
    assert [start for _, start, _ in source.asked] == [200]


async def test_ranges_with_small_gaps_are_one_request_and_each_has_its_own_view(rig: MakeRig) -> None:
    source = Source()
    made = rig(source, gap_bytes=100)
    ranges = [(9000, 9500), (100, 5100), (5200, 6000), (6101, 7000)]
    async with made.prefetcher.fetch_ranges("k", ranges) as views:
        assert [bytes(view) for view in views] == [DATA[start:end] for start, end in ranges]
        assert [(address_of(view) - start) % PAGE for view, (start, _) in zip(views, ranges, strict=True)] == [0] * 4
    assert sorted(source.asked) == [("k", 100, 5900), ("k", 6101, 899), ("k", 9000, 500)]


async def test_a_range_that_is_too_large_comes_in_pieces_side_by_side(rig: MakeRig) -> None:
    source = Source()
    made = rig(source, max_bytes=4000)
    async with fetched(made, 123, 10_000) as view:
        assert bytes(view) == DATA[123:10_123]
    assert sorted(source.asked) == [("k", 123, 3333), ("k", 3456, 3333), ("k", 6789, 3334)]
    assert source.most_at_once == 3


async def test_a_piece_whose_hedge_won_is_put_where_it_belongs_once_the_loser_has_ended(rig: MakeRig) -> None:
    first, other, second = Answer(slow_to_stop=asyncio.Event()), Answer(), Answer()
    other.go.set()
    made = rig(Source(first, other, second), hedge=Late(0.02), max_bytes=4000)

    async def fetch() -> bytes:
        async with fetched(made, 0, 8000) as view:
            return bytes(view)

    task = asyncio.create_task(fetch())
    await asyncio.sleep(0.01)
    second.go.set()
    await settle()
    assert first.cancelled
    assert not task.done(), "the loser may still write where the piece belongs"
    assert first.slow_to_stop is not None
    first.slow_to_stop.set()
    assert await task == DATA[:8000]
    assert made.counters.snapshot() == {"hedged_reads": 1, "hedges_won": 1}


async def test_joined_ranges_whose_hedge_won_are_found_in_the_other_slab(rig: MakeRig) -> None:
    first, second = Answer(), Answer()
    second.go.set()
    made = rig(Source(first, second), hedge=Late(0.02), gap_bytes=100)
    async with made.prefetcher.fetch_ranges("k", [(5100, 5200), (100, 5050)]) as views:
        assert [bytes(view) for view in views] == [DATA[5100:5200], DATA[100:5050]]
    assert made.counters.snapshot() == {"hedged_reads": 1, "hedges_won": 1}


async def test_a_gap_that_a_near_range_fills_is_read_along_where_it_is_small(rig: MakeRig) -> None:
    async def near(key: str, start: int, into: memoryview) -> bool:
        into[:] = DATA[start : start + len(into)]
        return start == 20

    source = Source()
    made = rig(source, gap_bytes=16)
    async with made.prefetcher.fetch_ranges("k", [(0, 10), (20, 24), (26, 5000)], near=near) as views:
        assert [bytes(view) for view in views] == [DATA[0:10], DATA[20:24], DATA[26:5000]]
    assert source.asked == [("k", 0, 5000)]


async def test_a_near_range_in_a_gap_is_not_where_a_loser_still_writes(rig: MakeRig) -> None:
    first, second = Answer(), Answer()
    second.go.set()
    source = Source(first, second)
    made = rig(source, hedge=Late(0.02), gap_bytes=16)

    async def near(key: str, start: int, into: memoryview) -> bool:
        into[:] = DATA[start : start + len(into)]
        return start == 20

    async with made.prefetcher.fetch_ranges("k", [(0, 10), (20, 24), (26, 5000)], near=near) as views:
        assert len(source.writing) == 1, "the loser has not ended yet"
        for view in views:
            begin = address_of(view)
            assert all(end <= begin or begin + len(view) <= start for start, end in source.writing)
        assert [bytes(view) for view in views] == [DATA[0:10], DATA[20:24], DATA[26:5000]]


async def test_overlapping_ranges_are_refused(rig: MakeRig) -> None:
    with pytest.raises(InvalidArgumentError):
        async with rig(Source()).prefetcher.fetch_ranges("k", [(0, 10), (9, 20)]):
            pass


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 9000)), min_size=1, max_size=6),
    st.integers(0, 2000),
    st.integers(1000, 9000),
    st.sets(st.integers(0, 5)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_ranges_come_back_right_whatever_is_near_late_or_cut(
    steps: list[tuple[int, int]], gap_bytes: int, max_bytes: int, nearby: set[int], late: bool, random: Random
) -> None:
    ranges: list[tuple[int, int]] = []
    for gap, length in steps:
        start = (ranges[-1][1] if ranges else 0) + gap
        ranges.append((start, start + length))
    random.shuffle(ranges)

    async def near(key: str, start: int, into: memoryview) -> bool:
        into[:] = DATA[start : start + len(into)]
        return [start for start, _ in ranges].index(start) in nearby

    async def scenario() -> None:
        source = Source(*(Answer() for _ in range(2)))
        for answer in source.answers[1:]:
            answer.go.set()
        if not late:
            source.answers.clear()
        pool = SlabPool(256 * PAGE, pin=False)
        prefetcher = Prefetcher(
            source.read, pool, Window(), Bandwidth(), Late(1.0), gap_bytes=gap_bytes, max_bytes=max_bytes
        )
        async with prefetcher.fetch_ranges("k", ranges, near=near) as views:
            assert [bytes(view) for view in views] == [DATA[start:end] for start, end in ranges]
            for view, (start, _) in zip(views, ranges, strict=True):
                assert (address_of(view) - start) % PAGE == 0
        await prefetcher.close()
        assert pool.leased == 0
        assert all(size <= max_bytes for _, _, size in source.asked)

    asyncio.run(asyncio.wait_for(scenario(), 10))


@pytest.mark.parametrize("late", [True, False])
async def test_a_cancellation_at_any_step_leaves_nothing_behind(rig: MakeRig, late: bool) -> None:
    for steps in range(60):
        source = Source(*(Answer() for _ in range(3)))
        for answer in source.answers[1:]:
            answer.go.set()
        made = rig(source, hedge=Late(1.0 if late else 0.0), max_bytes=3000)
        if not late:
            source.answers[0].go.set()

        async def fetch(made: Rig = made) -> None:
            async with made.prefetcher.fetch_ranges("k", [(0, 5000), (6000, 7000)]):
                await asyncio.sleep(0)

        task = asyncio.create_task(fetch())
        for _ in range(steps):
            await asyncio.sleep(0)
        finished = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert source.writing == [], "nothing writes after the fetch has ended"
        assert (made.window.in_flight, made.window.waiting, made.pool.waiting) == (0, 0, 0)
        await made.prefetcher.close()
        assert made.pool.leased == 0
    assert finished, "the last one was not cancelled"
