"""Slabs: host buffers for encoded bytes, out of one fixed pool. A load that is too fast waits instead of growing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from heapq import heapify, heappop, heappush

from kvstore_s3.arena import Arena
from kvstore_s3.errors import InvalidArgumentError, StoreUnavailableError


class Slab:
    """A piece of the pool: `view` is writable, begins at a page boundary and has exactly the bytes asked for."""

    __slots__ = ("_pool", "view")

    def __init__(self, pool: SlabPool, view: memoryview) -> None:
        self._pool: SlabPool | None = pool
        self.view = view

    def release(self) -> None:
        """Give the memory back; `view` may not be used any more. Safe to call twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._take_back(self.view)


class SlabPool:
    """Leases slabs within `budget` bytes, the most urgent first, first come first served among equals. For one loop.

    Who waits is served as soon as enough is free in one piece; while the first one waits, nobody overtakes it, so that
    a large slab is not starved by small ones. That needs leases that end: whoever holds a slab must not wait for a
    second one (take one slab for all instead). The memory is taken, and page-locked as `pin` says (see `Arena`), by the
    first lease: a process that only looks up never pays for it.
    """

    def __init__(self, budget: int, *, pin: bool | None = None) -> None:
        self.budget = budget
        self._pin = pin
        self._arena: Arena | None = None
        self._closed = False
        self._arrivals = 0
        self._waiting: list[tuple[float, int, int, asyncio.Future[Slab]]] = []  # a heap: urgency, arrival, size

    @property
    def leased(self) -> int:
        """Bytes leased now, each slab in whole pages."""
        return self._arena.used if self._arena is not None else 0

    @property
    def waiting(self) -> int:
        """How many wait for a slab now."""
        return len(self._waiting)

    @property
    def pinned(self) -> bool:
        """Whether slabs are page-locked; False before the first lease."""
        return self._arena is not None and self._arena.pinned

    @asynccontextmanager
    async def lease(self, size: int, *, urgency: float = 0.0) -> AsyncIterator[memoryview]:
        """A writable view of `size` bytes at a page boundary, its content undefined; given back at the end."""
        slab = await self.acquire(size, urgency=urgency)
        try:
            yield slab.view
        finally:
            slab.release()

    async def acquire(self, size: int, *, urgency: float = 0.0) -> Slab:
        """A slab of `size` bytes, to be released by the caller; waits for room. Smaller `urgency` is served first.

        Raises `InvalidArgumentError` where the whole pool is smaller than `size`, `StoreUnavailableError` once closed.
        """
        self._check(size)
        slab = self.try_acquire(size)
        if slab is not None:
            return slab
        ticket: asyncio.Future[Slab] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heappush(self._waiting, (urgency, self._arrivals, size, ticket))
        try:
            return await ticket
        except asyncio.CancelledError:
            self._withdraw(ticket)
            raise

    def try_acquire(self, size: int) -> Slab | None:
        """A slab of `size` bytes at once, or None: no room now, or others wait already."""
        if self._waiting or self._closed or size > self.budget:
            return None
        return self._allocate(size)

    def close(self) -> None:
        """Refuse whoever waits or comes later. Slabs on lease stay usable until they are released."""
        self._closed = True
        for *_, ticket in self._waiting:
            if not ticket.done():
                ticket.set_exception(_closed())
        self._waiting.clear()
        self._close_arena()

    def _check(self, size: int) -> None:
        if self._closed:
            raise _closed()
        if size < 1:
            raise InvalidArgumentError(f"a slab of {size} bytes cannot be leased; ask for at least one byte")
        if size > self.budget:
            raise InvalidArgumentError(
                f"{size} bytes are needed in one piece, and the buffers have {self.budget}: raise buffer_bytes"
            )

    def _allocate(self, size: int) -> Slab | None:
        if self._arena is None:
            self._arena = Arena(self.budget, pin=self._pin)
        view = self._arena.allocate(size)
        return None if view is None else Slab(self, view)

    def _take_back(self, view: memoryview) -> None:
        assert self._arena is not None  # it gave the view
        self._arena.free(view)
        with suppress(BufferError):  # some array still looks at it; else a later use of the view fails loudly
            view.release()
        self._grant()
        self._close_arena()

    def _withdraw(self, ticket: asyncio.Future[Slab]) -> None:
        if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
            ticket.result().release()  # granted in the same step as the cancellation
            return
        kept = [entry for entry in self._waiting if entry[3] is not ticket]
        if len(kept) < len(self._waiting):
            self._waiting = kept
            heapify(self._waiting)
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            *_, size, ticket = self._waiting[0]
            if ticket.done():  # cancelled, and about to withdraw
                heappop(self._waiting)
                continue
            slab = self._allocate(size)
            if slab is None:
                return
            heappop(self._waiting)
            ticket.set_result(slab)

    def _close_arena(self) -> None:
        if self._closed and self._arena is not None and not self._arena.used:
            self._arena.close()


def _closed() -> StoreUnavailableError:
    return StoreUnavailableError("the store was closed; open it again")
