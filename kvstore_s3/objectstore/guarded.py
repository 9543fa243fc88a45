"""An object store that is left alone while it fails: requests fail at once instead of one by one after their timeouts.

Two breakers. One for the store as a whole, which failing reads open; a probe in the background closes it again, so that
no request has to find out. One for writes alone, which a store that says "slow down" opens at the first time, and
failing writes open at the limit (a full disk, credentials that may only read); it is closed by a write that succeeds.
Writes that come while that one is under way wait for its outcome: a save writes many objects at once, and the second
would else fail the save and cancel the first.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from kvstore_s3.config import Settings
from kvstore_s3.errors import (
    DamagedObjectError,
    KVStoreError,
    ObjectNotFoundError,
    StoreBusyError,
    StoreRefusedError,
    StoreUnavailableError,
)
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.base import Buffer, ObjectInfo, ObjectStore
from kvstore_s3.objectstore.breaker import Breaker, Ticket

log = logging.getLogger("kvstore_s3")
outages = logging.getLogger("kvstore_s3.outages")
"""For the lines that the whole store is left alone and is back: whoever says so in its own words silences it."""

_ANSWERS = (ObjectNotFoundError, DamagedObjectError)
"""Errors of one object: the store is well."""
_FAILURES = (StoreUnavailableError, StoreRefusedError)


class GuardedStore:
    """An `ObjectStore` around another one. For one event loop.

    Beside the errors of the store: `StoreUnavailableError` at once while the store is left alone, and for writes
    `StoreBusyError` at once while it asks to slow down; both name the last failure and when it is tried again.
    Counters: "breaker_opened", "breaker_rejected", "writes_shed", "store_read_bytes".
    """

    def __init__(
        self,
        inner: ObjectStore,
        settings: Settings,
        count: Count = ignore,
        *,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self.inner = inner
        self._count = count
        self._clock = clock
        self._whole, self._writes = (
            Breaker(failures=settings.breaker_failures, pause_s=settings.breaker_pause_s, spread=spread)
            for _ in range(2)
        )
        self._patience_s = settings.connect_timeout_s
        self._silent_since: float | None = None
        self._busy = False
        self._trial_ended = asyncio.Event()
        self._well = asyncio.Event()
        self._well.set()
        self._healing: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def available(self) -> bool:
        """Whether requests are made at all."""
        return self._whole.closed

    @property
    def writable(self) -> bool:
        """Whether a write would be made now, or would wait for the outcome of one."""
        return self.available and (self._writes.passes(self._clock()) or self._writes.trying)

    def check_writable(self) -> None:
        """Raise what a write would raise at once: worth knowing before its bytes are encoded."""
        self._admit()
        if not self.writable and not self._closed:
            raise self._shed_error()

    async def probe(self) -> None:
        """As `ObjectStore.probe`; it goes through in every state, and where it succeeds requests are made again."""
        await self._probe(decisive=False, limit_s=None)

    async def check(self) -> None:
        """As `probe`, for whoever doubts the store: one failure is enough for it to be left alone until it is well."""
        await self._probe(decisive=True, limit_s=2 * self._patience_s)

    async def wait_until_available(self) -> None:
        """Return when requests are made, or when the store is closed."""
        await self._well.wait()

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        with self._writing(await self._admit_write()):
            return await self.inner.put(key, data, metadata=metadata, replace=replace)

    async def head(self, key: str) -> ObjectInfo | None:
        with self._reading():
            return await self.inner.head(key)

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        with self._reading():
            await self.inner.get_range(key, start, into)
        self._count("store_read_bytes", len(into))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        with self._reading():
            async for info in self.inner.list(prefix):
                yield info

    async def delete(self, key: str) -> None:
        with self._writing(await self._admit_write()):
            await self.inner.delete(key)

    async def close(self) -> None:
        self._closed = True
        self._well.set()
        if self._healing is not None and not self._healing.done():
            self._healing.cancel()
            await finish(asyncio.wait([self._healing]))
        await self.inner.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Around a request that only reads."""
        ticket, begun = self._admit(), self._clock()
        try:
            yield
        except _FAILURES as error:
            self._read_failed(ticket, error)
            raise
        except _ANSWERS:
            self._answered(ticket)
            raise
        except asyncio.CancelledError:
            self._given_up(begun)
            raise
        self._answered(ticket)

    @contextmanager
    def _writing(self, write: Ticket) -> Iterator[None]:
        """Around a request that writes. A failure of it is no proof that reads fail too."""
        ticket, begun = self._whole.admit_probe(), self._clock()
        try:
            yield
        except _FAILURES as error:
            self._write_failed(write, error)
            raise
        except _ANSWERS:
            self._written(ticket, write)
            raise
        except asyncio.CancelledError:
            self._writes.release(write)
            self._given_up(begun)
            raise
        except BaseException:  # refused before it was made
            self._writes.release(write)
            raise
        else:
            self._written(ticket, write)
        finally:
            if write.trial:
                self._trial_ended.set()

    def _admit(self) -> Ticket:
        ticket = self._whole.admit_probe()
        if self._closed or not ticket.trial:
            return ticket  # a closed store says so itself
        self._heal()  # should the loop that it ran in have ended
        self._count("breaker_rejected", 1)
        raise StoreUnavailableError(self._explain(self._whole, "is not asked at the moment"))

    async def _admit_write(self) -> Ticket:
        while True:
            self._admit()
            ticket = self._writes.admit_probe() if self._closed else self._writes.admit(self._clock())
            if ticket is not None:
                if ticket.trial:
                    self._trial_ended.clear()
                return ticket
            if not self._writes.trying:
                break
            await self._trial_ended.wait()
        raise self._shed_error()

    def _shed_error(self) -> StoreUnavailableError:
        self._count("writes_shed", 1)
        kind = StoreBusyError if self._busy else StoreUnavailableError
        return kind(self._explain(self._writes, "is not written to at the moment"))

    def _explain(self, breaker: Breaker, what: str) -> str:
        wait = max(0.0, breaker.retry_at - self._clock())
        return f"{self.url} {what} and is tried again in {wait:.1f} s; it failed: {breaker.reason}"

    def _answered(self, ticket: Ticket) -> None:
        self._silent_since = None
        if self._whole.succeed(ticket, self._clock()):
            self._well.set()
            outages.warning("%s answers again", self.url)

    def _written(self, ticket: Ticket, write: Ticket) -> None:
        self._answered(ticket)
        if self._writes.succeed(write, self._clock()):
            log.warning("%s is written to again", self.url)

    def _read_failed(self, ticket: Ticket, error: KVStoreError, *, decisive: bool = False) -> None:
        if self._closed:
            return
        if isinstance(error, StoreBusyError) and self._writes.trip(self._clock(), str(error)):
            self._busy = True
            self._shed(error)
        if self._whole.fail(ticket, self._clock(), str(error), at_once=decisive):
            self._leave_alone(error)

    def _write_failed(self, write: Ticket, error: KVStoreError) -> None:
        if self._closed:
            return
        busy = isinstance(error, StoreBusyError)
        if self._writes.fail(write, self._clock(), str(error), at_once=busy):
            self._shed(error)
            if not busy:
                self._heal(doubt=True)

        if self._writes.reason == str(error):
            self._busy = busy

    def _given_up(self, begun: float) -> None:
        """A cancellation is no failure. But callers with little patience may never see the store's own time-outs."""
        if self._silent_since is None:
            self._silent_since = begun
        if self._whole.closed and self._clock() - self._silent_since >= self._patience_s:
            self._heal(doubt=True)

    def _shed(self, error: KVStoreError) -> None:
        log.warning("%s is not written to for a while, reads go on: %s", self.url, error)

    def _leave_alone(self, error: KVStoreError) -> None:
        self._count("breaker_opened", 1)
        self._well.clear()
        outages.warning("%s fails and is left alone until it answers a probe: %s", self.url, error)
        self._heal()

    def _heal(self, *, doubt: bool = False) -> None:
        if not self._closed and (self._healing is None or self._healing.done()):
            self._healing = asyncio.create_task(self._probe_until_well(doubt=doubt))

    async def _probe_until_well(self, *, doubt: bool) -> None:
        """Probe after each pause until the store answers. With `doubt`, first find out whether it fails at all."""
        limit_s = 2 * self._patience_s
        if doubt:
            with suppress(KVStoreError):
                await self._probe(decisive=True, limit_s=limit_s)
        while not self._whole.closed:
            await asyncio.sleep(max(0.0, self._whole.retry_at - self._clock()))
            with suppress(KVStoreError):
                await self._probe(decisive=True, limit_s=limit_s)

    async def _probe(self, *, decisive: bool, limit_s: float | None) -> None:
        """Probe once. A store that has come back must not wait for the time-outs of a request that it never saw."""
        ticket = self._whole.admit_probe()
        try:
            async with asyncio.timeout(limit_s):
                await self.inner.probe()
        except TimeoutError as error:
            slow = StoreUnavailableError(f"{self.url} did not answer a small request within {limit_s or 0:.1f} s")
            self._read_failed(ticket, slow, decisive=decisive)
            raise slow from error
        except KVStoreError as error:
            self._read_failed(ticket, error, decisive=decisive)
            raise
        self._answered(ticket)
