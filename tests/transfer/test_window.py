"""The window: slots by urgency, and as many as fill the link, found by looking. On a simulated link and its clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_link import MB, SimulatedLink, run_window

from kvstore_s3.transfer.bandwidth import Bandwidth
from kvstore_s3.transfer.window import START, Limit, Window


def of(size: int) -> Callable[[], int]:
    return lambda: size


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_it_starts_at_four_within_its_bounds() -> None:
    assert (Limit(2, 16).reads, START) == (4, 4)
    assert [Limit(2, most).reads for most in (1, 2, 3)] == [1, 2, 3]
    assert Limit(5, 16).reads == 5


LINKS = {
    "a near store": (lambda: SimulatedLink(1000 * MB, 0.001), 8 * MB, range(2, 5), 0.9),
    "a slow link": (lambda: SimulatedLink(100 * MB, 0.02), 8 * MB, range(2, 5), 0.85),
    "a long fat link": (lambda: SimulatedLink(1000 * MB, 0.02, jitter=0.5), 1 * MB, range(24, 65), 0.85),
    "a cap for each connection": (
        lambda: SimulatedLink(2000 * MB, 0.02, 90 * MB, jitter=0.5),
        8 * MB,
        range(24, 49),
        0.8,
    ),
    "delays all over the place": (lambda: SimulatedLink(1000 * MB, 0.02, jitter=2.0), 8 * MB, range(6, 33), 0.85),
}


@pytest.mark.parametrize("name", LINKS)
def test_the_link_is_filled_with_no_more_in_flight_than_that_takes(name: str) -> None:
    make_link, size, expected, least_use = LINKS[name]
    link = make_link()
    limit, bandwidth = Limit(2, 64), Bandwidth()
    run_window(link, 8.0, of(size), limit, bandwidth)
    moved = [run_window(link, 1.0, of(size), limit, bandwidth)]
    seen = {limit.reads}
    for _ in range(4):
        moved.append(run_window(link, 1.0, of(size), limit, bandwidth))
        seen.add(limit.reads)
    assert sum(moved) / len(moved) > least_use * link.bytes_per_s
    assert sorted(seen)[len(seen) // 2] in expected


def test_sizes_of_all_kinds_do_not_confuse_it() -> None:
    link, limit, bandwidth, random = SimulatedLink(1000 * MB, 0.02), Limit(2, 64), Bandwidth(), Random(1)

    def size() -> int:
        return random.choice([MB // 3, MB, 4 * MB, 8 * MB])

    run_window(link, 3.0, size, limit, bandwidth)
    assert run_window(link, 5.0, size, limit, bandwidth) > 0.9e9
    assert 6 <= limit.reads <= 32


def test_after_a_step_of_the_link_it_finds_the_new_knee() -> None:
    link, limit, bandwidth = SimulatedLink(1000 * MB, 0.02, jitter=0.5), Limit(2, 64), Bandwidth()
    run_window(link, 5.0, of(2 * MB), limit, bandwidth)
    before = limit.reads
    assert before >= 12
    link.bytes_per_s = 100 * MB
    run_window(link, 20.0, of(2 * MB), limit, bandwidth)
    assert limit.reads <= before // 2
    assert run_window(link, 2.0, of(2 * MB), limit, bandwidth) > 0.8 * link.bytes_per_s
    link.bytes_per_s = 1000 * MB
    run_window(link, 8.0, of(2 * MB), limit, bandwidth)
    assert limit.reads >= before // 2
    assert run_window(link, 2.0, of(2 * MB), limit, bandwidth) > 0.75 * link.bytes_per_s


def test_too_little_to_read_changes_nothing() -> None:
    link, limit = SimulatedLink(1000 * MB, 0.001), Limit(2, 16)
    run_window(link, 5.0, of(8 * MB), limit, Bandwidth(), most_wanted=2)
    assert limit.reads == START


def test_a_store_that_asks_for_less_gets_half_and_never_less_than_the_least() -> None:
    limit = Limit(2, 16)
    for expected in (2, 2):
        limit.slow_down()
        assert limit.reads == expected


def test_an_epoch_whose_reads_failed_does_not_stop_the_learning() -> None:
    limit = Limit(2, 16)
    for _ in range(100):
        limit.start(1)  # these never end well
    for number in range(40):
        limit.observe(None, MB, 0.01, 4, number * 0.01)
    assert limit.start(1) is not None


async def test_slots_go_to_the_most_urgent_and_among_equals_to_the_first() -> None:
    window, order = Window(1, 1), []

    async def take(name: str, urgency: float) -> None:
        async with window.slot(urgency, 1):
            order.append(name)

    async with window.slot(0.0, 1):
        tasks = [asyncio.create_task(take(*who)) for who in (("c", 2.0), ("a", 1.0), ("d", 2.0), ("b", 1.0))]
        await settle()
        assert (window.in_flight, window.waiting, order) == (1, 4, [])
    await asyncio.gather(*tasks)
    assert (order, window.in_flight) == (["a", "b", "c", "d"], 0)


async def test_a_cancelled_wait_takes_no_slot_even_in_the_step_in_which_it_is_granted() -> None:
    window = Window(1, 1)

    async def take() -> None:
        async with window.slot(0.0, 1):
            await asyncio.Event().wait()

    held = window.slot(0.0, 1)
    await held.__aenter__()
    waiting, granted, third = (asyncio.create_task(take()) for _ in range(3))
    await settle()
    waiting.cancel()
    await settle()
    assert window.waiting == 2
    await held.__aexit__(None, None, None)  # grants
    granted.cancel()
    await settle()
    assert (window.in_flight, window.waiting, granted.cancelled()) == (1, 0, True)
    third.cancel()
    await asyncio.gather(waiting, granted, third, return_exceptions=True)
    assert window.in_flight == 0


async def test_a_failed_read_leaves_its_slot_and_teaches_nothing() -> None:
    window = Window()
    with pytest.raises(RuntimeError):
        async with window.slot(0.0, 1):
            raise RuntimeError
    assert (window.in_flight, window.limit) == (0, START)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), min_size=1, max_size=40),
    st.lists(st.integers(0, 39), max_size=10),
)
def test_no_more_are_in_flight_than_allowed_and_none_is_forgotten(
    work: list[tuple[int, int, bool]], cancelled: list[int]
) -> None:
    window = Window(1, 3)
    now = running = 0

    async def use(urgency: int, steps: int, good: bool) -> None:
        nonlocal running
        async with window.slot(urgency, 1000) as turn:
            running += 1
            try:
                assert running <= window.in_flight <= 3
                for _ in range(steps):
                    await asyncio.sleep(0)
            finally:
                running -= 1
            if good:
                turn.succeed(0.01, float(now))

    async def scenario() -> None:
        tasks = [asyncio.create_task(use(*each)) for each in work]
        for index in cancelled:
            await asyncio.sleep(0)
            tasks[index % len(tasks)].cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError)

    asyncio.run(scenario())
    assert (window.in_flight, window.waiting) == (0, 0)
