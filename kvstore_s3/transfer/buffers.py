"""Host buffers for encoded bytes, under one budget: a load that is too fast waits instead of growing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class BufferBudget:
    """Leases buffers first come, first served. For one event loop.

    A request larger than the whole budget is granted when nothing else is leased, so that it cannot wait for ever.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._leased = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def leased(self) -> int:
        """Bytes leased now."""
        return self._leased

    @asynccontextmanager
    async def lease(self, size: int) -> AsyncIterator[memoryview]:
        """A writable buffer of `size` bytes; its content is undefined."""
        cost = min(size, self._budget)
        await self._acquire(cost)
        try:
            yield memoryview(bytearray(size))
        finally:
            self._leased -= cost
            self._grant()

    async def _acquire(self, cost: int) -> None:
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((cost, ticket))
        self._grant()
        try:
            await ticket
        except asyncio.CancelledError:
            self._withdraw(cost, ticket)
            raise

    def _withdraw(self, cost: int, ticket: asyncio.Future[None]) -> None:
        if ticket.done() and not ticket.cancelled():
            self._leased -= cost  # granted in the same step as the cancellation
        else:
            self._waiting.remove((cost, ticket))
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._leased + self._waiting[0][0] <= self._budget:
            cost, ticket = self._waiting.popleft()
            self._leased += cost
            ticket.set_result(None)
