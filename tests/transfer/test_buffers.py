"""The slab pool: fixed in size, it waits instead of growing, and no slab is lost on any path."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slab_watch import watch_slabs

from kvstore_s3.arena import PAGE, address_of, round_up
from kvstore_s3.errors import InvalidArgumentError, StoreUnavailableError
from kvstore_s3.transfer.buffers import SlabPool

pytestmark = pytest.mark.usefixtures("no_leaks")


def pool_of(pages: int) -> SlabPool:
    return SlabPool(pages * PAGE, pin=False)


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_lease_over_the_budget_waits_for_another_to_end() -> None:
    pool = pool_of(10)
    order: list[str] = []

    async def second() -> None:
        async with pool.lease(6 * PAGE):
            order.append("second")

    async with pool.lease(6 * PAGE - 5) as view:
        assert (len(view), view.readonly, pool.leased, address_of(view) % PAGE) == (6 * PAGE - 5, False, 6 * PAGE, 0)
        waiting = asyncio.create_task(second())
        await settle()
        assert pool.waiting == 1
        order.append("first ends")
    await waiting
    assert (order, pool.leased) == (["first ends", "second"], 0)


async def test_more_than_the_whole_pool_is_refused_at_once() -> None:
    pool = pool_of(2)
    with pytest.raises(InvalidArgumentError, match="raise buffer_bytes"):
        await pool.acquire(2 * PAGE + 1)
    assert pool.try_acquire(2 * PAGE + 1) is None


async def test_a_slab_of_no_bytes_is_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        await pool_of(1).acquire(0)


async def test_leases_are_granted_in_order_so_that_a_large_one_is_not_starved() -> None:
    pool = pool_of(10)
    order: list[int] = []

    async def take(pages: int) -> None:
        async with pool.lease(pages * PAGE):
            order.append(pages)
            await asyncio.sleep(0)

    async with pool.lease(5 * PAGE):
        tasks = [asyncio.create_task(take(pages)) for pages in (10, 1, 2)]
        await settle()
        assert order == []
        assert pool.try_acquire(PAGE) is None, "nobody overtakes"
    await asyncio.gather(*tasks)
    assert order == [10, 1, 2]


async def test_the_most_urgent_is_served_first_and_equals_in_order() -> None:
    pool = pool_of(1)
    order: list[str] = []

    async def take(name: str, urgency: float) -> None:
        async with pool.lease(PAGE, urgency=urgency):
            order.append(name)

    async with pool.lease(PAGE):
        tasks = [asyncio.create_task(take(*who)) for who in (("c", 2.0), ("a", 1.0), ("d", 2.0), ("b", 1.0))]
        await settle()
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c", "d"]


async def test_a_large_lease_waits_until_enough_is_free_in_one_piece() -> None:
    pool = pool_of(4)
    slabs = [await pool.acquire(PAGE) for _ in range(4)]
    waiting = asyncio.create_task(pool.acquire(2 * PAGE))
    for index in (0, 2):
        slabs[index].release()
        await settle()
        assert not waiting.done()
    slabs[3].release()
    (await waiting).release()
    slabs[1].release()


async def test_a_slab_is_given_back_once_however_often_it_is_released() -> None:
    pool = pool_of(2)
    first, second = await pool.acquire(PAGE), await pool.acquire(PAGE)
    first.release()
    first.release()
    assert pool.leased == PAGE
    second.release()
    assert pool.leased == 0


async def test_a_view_that_is_used_after_its_release_fails() -> None:
    async with pool_of(1).lease(PAGE) as view:
        view[0] = 1
    with pytest.raises(ValueError, match="released"):
        view[0] = 2


async def test_a_cancelled_wait_leaves_the_queue_and_lets_the_next_one_in() -> None:
    pool = pool_of(2)
    async with pool.lease(PAGE):
        large = asyncio.create_task(pool.acquire(2 * PAGE))
        small = asyncio.create_task(pool.acquire(PAGE))
        await settle()
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large
        (await small).release()
    assert (pool.leased, pool.waiting) == (0, 0)


async def test_a_wait_that_is_cancelled_in_the_step_in_which_it_is_granted_loses_nothing() -> None:
    pool = pool_of(1)
    slab = await pool.acquire(PAGE)
    waiting = asyncio.create_task(pool.acquire(PAGE))
    await settle()
    slab.release()  # grants
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert pool.leased == 0


async def test_a_failure_inside_gives_the_slab_back() -> None:
    pool = pool_of(1)
    with pytest.raises(RuntimeError):
        async with pool.lease(10):
            raise RuntimeError
    assert pool.leased == 0


async def test_close_refuses_who_waits_or_comes_later_but_leases_end_in_their_own_time() -> None:
    pool = pool_of(1)
    async with pool.lease(PAGE) as view:
        waiting = asyncio.create_task(pool.acquire(PAGE))
        await settle()
        pool.close()
        with pytest.raises(StoreUnavailableError, match="closed"):
            await waiting
        view[:] = b"z" * PAGE
    with pytest.raises(StoreUnavailableError, match="closed"):
        await pool.acquire(1)
    assert pool.try_acquire(1) is None
    pool.close()


async def test_the_first_lease_takes_the_memory() -> None:
    pool = SlabPool(1 << 60, pin=False)  # more than any machine has
    pool.close()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8 * PAGE), st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=30),
    st.lists(st.integers(0, 29), max_size=10),
)
def test_any_mix_of_sizes_urgencies_and_cancellations_ends_with_an_empty_pool(
    work: list[tuple[int, int, int]], cancelled: list[int]
) -> None:
    pool = pool_of(8)
    running = 0

    async def use(size: int, urgency: int, steps: int) -> None:
        nonlocal running
        async with pool.lease(size, urgency=urgency) as view:
            assert len(view) == size
            running += round_up(size)
            try:
                assert running <= pool.leased <= pool.budget, "granted ones may not have run yet"
                for _ in range(steps):
                    await asyncio.sleep(0)
            finally:
                running -= round_up(size)

    async def scenario() -> None:
        tasks = [asyncio.create_task(use(*each)) for each in work]
        for index in cancelled:
            await asyncio.sleep(0)
            tasks[index % len(tasks)].cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError)

    asyncio.run(scenario())
    assert (pool.leased, pool.waiting, running) == (0, 0, 0)


async def test_the_watch_for_leaks_fails_on_one_leaked_slab() -> None:
    with pytest.raises(pytest.fail.Exception, match="leaked slabs: 4096 of 8192 bytes"), watch_slabs():
        leaked = await pool_of(2).acquire(1)
    leaked.release()
    with watch_slabs():
        (await pool_of(2).acquire(1)).release()
