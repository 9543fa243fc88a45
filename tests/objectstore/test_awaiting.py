"""`finish` lets nothing run on behind the back of its caller."""

from __future__ import annotations

import asyncio

import pytest

from kvstore_s3.errors import StoreUnavailableError
from kvstore_s3.objectstore.awaiting import finish


async def test_the_result_is_returned_and_an_error_raised() -> None:
    assert await finish(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ZeroDivisionError):
        await finish(fail())


async def fail() -> None:
    raise ZeroDivisionError


async def test_a_cancellation_is_raised_after_the_end_however_often_it_comes() -> None:
    going, end = asyncio.Event(), asyncio.Event()
    ended = False

    async def work() -> None:
        nonlocal ended
        going.set()
        await end.wait()
        ended = True

    task = asyncio.create_task(finish(work()))
    await going.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_a_cancellation_counts_for_more_than_the_error_that_follows() -> None:
    end = asyncio.Event()

    async def work() -> None:
        await end.wait()
        raise ZeroDivisionError

    task = asyncio.create_task(finish(work(), on_cancel=end.set))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_somebody_else_cancelled_is_an_error_and_no_cancellation() -> None:
    work = asyncio.create_task(asyncio.Event().wait())
    waiting = asyncio.create_task(finish(work))
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(StoreUnavailableError, match="closed"):
        await waiting
