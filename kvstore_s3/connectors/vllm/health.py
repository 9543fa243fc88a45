"""Whether the store is worth asking, and the one line that says so. The state itself is `GuardedStore`'s."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from time import monotonic
from typing import TypeVar

from kvstore_s3.config import Settings
from kvstore_s3.errors import KVStoreError, StoreUnavailableError
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.guarded import GuardedStore

log = logging.getLogger("vllm.kvstore_s3")
"""A child of vLLM's logger, so that the lines appear where and how the engine's own do."""

T = TypeVar("T")

_QUIET_S = 60.0
"""Seconds after an outage was told in which another one is not: a store that comes and goes would fill the log."""


class StoreHealth:
    """What one process thinks of the store, from its guard. `available` may be read from any thread.

    A failure that is reported makes it ask the store once, and until that is answered nobody else does: no request pays
    for finding out. One line is logged when the store fails, and one when it answers again.
    """

    def __init__(self, objects: ObjectStore, settings: Settings) -> None:
        """`objects`: as `KVStore.objects`; one without a guard is given one here."""
        self._guard = objects if isinstance(objects, GuardedStore) else GuardedStore(objects, settings)
        self._doubted = False
        self._quiet_until = float("-inf")
        self._saves_quiet_until = float("-inf")
        self._outage: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """Whether requests should use the store now."""
        return self._guard.available and not self._doubted

    async def check(self) -> None:
        """Ask once, so that the first request meets an open connection, or a store known to be down."""
        try:
            await self._guard.check()
        except KVStoreError as error:
            self.report(error)

    def report(self, error: Exception) -> None:
        """Note a failure. To be called on the event loop."""
        if self._outage is not None and not self._outage.done():
            return
        self._doubted = True
        self._outage = asyncio.create_task(self._sit_out(error))

    def report_save(self, error: Exception) -> None:
        """Note that a save failed, once a minute. Reads may go on: whether they do, the guard finds out by itself."""
        told = monotonic() >= self._saves_quiet_until
        if told:
            self._saves_quiet_until = monotonic() + _QUIET_S
        log.log(logging.WARNING if told else logging.DEBUG, "KV is not saved to %s: %s", self._guard.url, error)

    async def report_soon(self, error: Exception) -> None:
        """`report` for callers on other threads, by way of `Runtime.submit`."""
        self.report(error)

    async def _sit_out(self, error: Exception) -> None:
        told = self._tell(error)
        try:
            if self._guard.available:
                await self._guard.check()
        except KVStoreError as failure:
            told = told or self._tell(failure)
        self._doubted = False
        if not told:
            told = await self._tell_if_it_lasts(error)
        await self._guard.wait_until_available()
        if told:
            self._quiet_until = monotonic() + _QUIET_S
        if told and self._guard.available:
            log.info("the KV store %s answers again", self._guard.url)

    async def _tell_if_it_lasts(self, error: Exception) -> bool:
        """Tell of an outage that began in quiet time once that is over."""
        try:
            async with asyncio.timeout(max(0.0, self._quiet_until - monotonic())):
                await self._guard.wait_until_available()
        except TimeoutError:
            return self._tell(error)
        return False

    def _tell(self, error: Exception) -> bool:
        told = monotonic() >= self._quiet_until
        log.log(
            logging.WARNING if told else logging.DEBUG,
            "prompts are computed without the KV store %s until it answers again: %s",
            self._guard.url,
            error,
        )
        return told


def late(what: str, deadline_s: float) -> StoreUnavailableError:
    """The failure of a store that took longer for a lookup or load than the engine has time."""
    return StoreUnavailableError(f"a {what} took longer than {deadline_s} s")


def speak_through_engine() -> None:
    """Let the package's own lines appear where and how the engine's do, less those that `StoreHealth` replaces."""
    package = logging.getLogger("kvstore_s3")
    if not package.handlers:  # else the user has decided
        engine = logging.getLogger("vllm")
        package.handlers = list(engine.handlers)
        package.propagate = engine.propagate
        package.setLevel(engine.level)
    logging.getLogger("kvstore_s3.outages").setLevel(logging.ERROR)


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
