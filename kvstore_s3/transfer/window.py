"""How many reads are in flight at once, and whose turn it is: enough to fill the link, the most urgent first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush

START = 4
"""Reads in flight before anything was measured."""


class Window:
    """Slots for reads in flight, between `least` and `most`. For one event loop."""

    def __init__(self, least: int = 2, most: int = 16) -> None:
        self.least = min(least, most)
        self.most = most
        self.in_flight = 0
        self._limit = float(max(self.least, min(START, most)))
        self._arrivals = 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap: urgency, arrival

    @property
    def limit(self) -> int:
        """Reads that may be in flight now."""
        return int(self._limit)

    @property
    def waiting(self) -> int:
        """How many wait for a slot now."""
        return len(self._waiting)

    @asynccontextmanager
    async def slot(self, urgency: float, size: int) -> AsyncIterator[None]:
        """Wait for a turn to read `size` bytes; the smallest `urgency` goes first, else first come first served."""
        await self._enter(urgency)
        try:
            yield
        finally:
            self.in_flight -= 1
            self._grant()

    def observe(self, size: int, started: float, ended: float, in_flight: int) -> None:
        """A read of `size` bytes ended well; `in_flight` reads were under way just before its end, itself included."""

    def slow_down(self) -> None:
        """The store asked for less."""
        self._limit = max(float(self.least), self._limit / 2)

    async def _enter(self, urgency: float) -> None:
        if not self._waiting and self.in_flight < self.limit:
            self.in_flight += 1
            return
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heappush(self._waiting, (urgency, self._arrivals, ticket))
        try:
            await ticket
        except asyncio.CancelledError:
            self._withdraw(ticket)
            raise

    def _withdraw(self, ticket: asyncio.Future[None]) -> None:
        if ticket.done() and not ticket.cancelled():
            self.in_flight -= 1  # granted in the same step as the cancellation
        else:
            self._waiting = [entry for entry in self._waiting if entry[2] is not ticket]
            heapify(self._waiting)
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self.in_flight < self.limit:
            *_, ticket = heappop(self._waiting)
            if not ticket.done():
                self.in_flight += 1
                ticket.set_result(None)
