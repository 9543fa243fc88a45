"""The budget of host buffers: it waits instead of growing, and nothing is lost."""

from __future__ import annotations

import asyncio

import pytest

from kvstore_s3.transfer.buffers import BufferBudget


async def test_a_lease_over_the_budget_waits_for_another_to_end() -> None:
    budget = BufferBudget(100)
    order: list[str] = []

    async def second() -> None:
        async with budget.lease(60):
            order.append("second")

    async with budget.lease(60) as buffer:
        assert (len(buffer), buffer.readonly, budget.leased) == (60, False, 60)
        waiting = asyncio.create_task(second())
        await asyncio.wait([waiting], timeout=0.01)
        order.append("first ends")
    await waiting
    assert (order, budget.leased) == (["first ends", "second"], 0)


async def test_a_lease_larger_than_the_budget_is_granted_alone() -> None:
    budget = BufferBudget(10)
    async with budget.lease(1000) as buffer:
        assert len(buffer) == 1000
    assert budget.leased == 0


async def test_leases_are_granted_in_order_so_that_a_large_one_is_not_starved() -> None:
    budget = BufferBudget(10)
    order: list[int] = []

    async def take(size: int) -> None:
        async with budget.lease(size):
            order.append(size)
            await asyncio.wait([asyncio.create_task(asyncio.Event().wait())], timeout=0.005)

    async with budget.lease(5):
        tasks = [asyncio.create_task(take(size)) for size in (10, 1, 2)]
        await asyncio.wait(tasks, timeout=0.01)
        assert order == []
    await asyncio.gather(*tasks)
    assert order == [10, 1, 2]


async def test_a_cancelled_wait_leaves_the_queue() -> None:
    budget = BufferBudget(10)
    async with budget.lease(10):
        waiting = asyncio.create_task(budget.lease(10).__aenter__())
        await asyncio.wait([waiting], timeout=0.005)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    async with budget.lease(10):
        assert budget.leased == 10
    assert budget.leased == 0


async def test_a_failure_inside_gives_the_buffer_back() -> None:
    budget = BufferBudget(10)
    with pytest.raises(RuntimeError):
        async with budget.lease(10):
            raise RuntimeError
    assert budget.leased == 0
