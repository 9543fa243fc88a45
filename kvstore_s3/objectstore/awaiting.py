"""Awaiting what must not be left half-done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kvstore_s3.errors import StoreUnavailableError

T = TypeVar("T")


async def finish(awaitable: Awaitable[T], *, on_cancel: Callable[[], object] | None = None) -> T:
    """Await to the end even when cancelled meanwhile; the cancellation is raised only then.

    For work that goes on whether it is awaited or not (a thread that writes into the caller's buffer), and for
    cleaning up (an abort that must reach the server). `on_cancel` may ask the work to end sooner. Raises
    `StoreUnavailableError` where somebody else cancelled the work, as the end of a store does.
    """
    future = asyncio.ensure_future(awaitable)
    cancellation: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancellation = error
            if on_cancel is not None:
                on_cancel()
    if cancellation is None:
        if future.cancelled():  # a CancelledError would pass for the caller's own: a TaskGroup takes it for success
            raise StoreUnavailableError("the store was closed; open it again")
        return future.result()
    if not future.cancelled():
        future.exception()  # marks it as seen: the cancellation counts for more
    try:
        raise cancellation
    finally:
        del cancellation  # it refers to this frame: the cycle would keep the caller's buffers until the next collection
