"""Whether the store is worth asking. After a failure nobody asks, and one timer finds out when it is back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from kvstore_s3.errors import StoreError

log = logging.getLogger("vllm.kvstore_s3")
"""A child of vLLM's logger, so that the lines appear where and how the engine's own do."""

T = TypeVar("T")

_FIRST_RETRY_S = 2.0
_LONGEST_RETRY_S = 60.0


class StoreHealth:
    """The state of one store as one process sees it. `available` may be read from any thread.

    One line is logged when the store fails, and one when it answers again; no request pays for finding that out.
    """

    def __init__(self, url: str, probe: Callable[[], Awaitable[None]]) -> None:
        self._url = url
        self._probe = probe
        self._healing: asyncio.Task[None] | None = None
        self.available = True

    async def check(self) -> None:
        """Ask once, so that the first request meets an open connection, or a store known to be down."""
        try:
            await self._probe()
        except StoreError as error:
            self.report(error)

    def report(self, error: Exception) -> None:
        """Note a failure. To be called on the event loop."""
        if not self.available:
            return
        self.available = False
        log.warning("prompts are computed without the KV store %s until it answers again: %s", self._url, error)
        self._healing = asyncio.create_task(self._heal())

    async def report_soon(self, error: Exception) -> None:
        """`report` for callers on other threads, by way of `Runtime.submit`."""
        self.report(error)

    async def _heal(self) -> None:
        for delay in _retry_delays():
            await asyncio.sleep(delay)
            try:
                await self._probe()
            except StoreError as error:
                log.debug("the KV store %s is still out: %s", self._url, error)
            else:
                self.available = True
                log.info("the KV store %s answers again", self._url)
                return


def _retry_delays() -> Iterator[float]:
    delay = _FIRST_RETRY_S
    while True:
        yield delay
        delay = min(2 * delay, _LONGEST_RETRY_S)


def result_or_none(future: concurrent.futures.Future[T]) -> T | None:
    """The result of a finished future; None, and a line in the log, where it failed for a reason nobody foresaw.

    The engine outlives a defect of the connector: what it cannot load, it computes.
    """
    if future.cancelled():
        return None
    error = future.exception()
    if error is None:
        return future.result()
    log.error("a task of the KV store connector failed; please report this", exc_info=error)
    return None
