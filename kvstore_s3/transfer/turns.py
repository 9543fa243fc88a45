"""Whose chunks are worked on: a bound for all loads of a process together, of which no load gets nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Self


class Turns:
    """`most` turns in all. A load that has none gets one beside them, so that it goes on however many others there are.

    Those that are left are given to waiting loads in turn, so that a long one does not keep a short one waiting. For
    one event loop.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._waiting: dict[LoadTurns, None] = {}  # in the order of their turns

    def of_load(self) -> LoadTurns:
        """The turns of one load."""
        return LoadTurns(self)

    def wait_for(self, load: LoadTurns) -> None:
        """Note that a load waits."""
        self._waiting.setdefault(load)

    def grant(self) -> None:
        """Give out what is free."""
        while self._waiting and self.taken < self.most:
            load = next(iter(self._waiting))
            del self._waiting[load]
            if load.grant_next():
                self._waiting[load] = None


class LoadTurns:
    """Turns of one load, first come first served. A context: one turn is taken for as long as it lasts."""

    def __init__(self, shared: Turns) -> None:
        self._shared = shared
        self._taken = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> Self:
        if not self._queue and (self._taken == 0 or self._shared.taken < self._shared.most):
            self._take()
            return self
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(ticket)
        self._shared.wait_for(self)
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled():
                self._give_back()  # granted in the same step as the cancellation
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give_back()

    def grant_next(self) -> bool:
        """Give the one that has waited longest its turn, if there is any. Whether more wait."""
        while self._queue:
            ticket = self._queue.popleft()
            if not ticket.done():  # else it was cancelled
                self._take()
                ticket.set_result(None)
                break
        return bool(self._queue)

    def _take(self) -> None:
        self._taken += 1
        self._shared.taken += 1

    def _give_back(self) -> None:
        self._taken -= 1
        self._shared.taken -= 1
        if self._taken == 0:
            self.grant_next()
        self._shared.grant()
