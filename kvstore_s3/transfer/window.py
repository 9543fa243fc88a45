"""How many reads are in flight at once, and whose turn it is: enough to fill the link, the most urgent first."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

START = 4
"""Reads in flight before anything was measured."""

_WORTH = 0.15
"""More in flight are worth it while throughput grows by this share of their growth: with 1.5 times as many, by 6 %."""

_LIFETIME_S = 5.0
"""Seconds of a full window after which the throughput at another level is measured anew: links change."""

_LEVELS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


class Limit:
    """How many reads should be in flight: no more than fill the link. Pure: time comes as an argument.

    A link holds bandwidth x delay bytes: with fewer in flight it idles, with more they wait in a queue and throughput
    grows no more. Where that knee lies is found by looking. Throughput is measured with as many in flight as allowed,
    by Little's law (reads in flight x work / seconds that they took), at one level of `_LEVELS` after the other,
    upwards while it is worth it. Then the levels beside the best are tried again from time to time. Epochs in which
    there was too little to read say nothing and change nothing.
    """

    def __init__(self, least: int, most: int) -> None:
        least = min(least, most)
        self._levels = sorted({least, most, *(level for level in _LEVELS if least < level < most)})
        self._at = max(index for index, level in enumerate(self._levels) if level <= max(START, least))
        self._step = 1  # the direction to look first
        self._measured: dict[int, tuple[float, float]] = {}  # index of a level -> work per second, when
        self._work = _Work()
        self._epoch = _Epoch(self.reads)

    @property
    def reads(self) -> int:
        """Reads that may be in flight now."""
        return self._levels[self._at]

    def start(self, in_flight: int) -> _Epoch | None:
        """A read begins, `in_flight` are under way, itself included. What it returns belongs to the read."""
        epoch = self._epoch
        if epoch.begun == epoch.wanted or in_flight > self.reads:
            return None  # an epoch is of the reads that began first: those that end first are the small ones
        epoch.begun += 1
        return epoch

    def observe(self, epoch: _Epoch | None, size: int, seconds: float, in_flight: int, now: float) -> None:
        """A read of `size` bytes ends well after `seconds`; `in_flight` are under way, itself included."""
        self._work.observe(size, seconds)
        self._epoch.passed += 1
        if epoch is self._epoch:
            epoch.reads.append((seconds, size))
            epoch.in_flight += in_flight
        if len(self._epoch.reads) >= self._epoch.wanted - max(1, self._epoch.wanted // 8):
            self._judge(self._epoch, now)
        elif self._epoch.passed > 4 * self._epoch.wanted:  # its reads failed
            self._epoch = _Epoch(self.reads)

    def slow_down(self) -> None:
        """The store asked for less: half as many, and what was measured is void."""
        half = self.reads / 2
        self._at = max(index for index, level in enumerate(self._levels) if index == 0 or level <= half)
        self._measured.clear()
        self._epoch = _Epoch(self.reads)

    def _judge(self, epoch: _Epoch, now: float) -> None:
        in_flight = epoch.in_flight / len(epoch.reads)
        if in_flight >= self.reads - 0.5:
            seconds = sum(seconds for seconds, _ in epoch.reads)
            throughput = in_flight * sum(self._work.of(size) for _, size in epoch.reads) / max(seconds, 1e-6)
            self._remember(throughput, now)
            self._at = self._next_level(now)
        self._epoch = _Epoch(self.reads)

    def _remember(self, throughput: float, now: float) -> None:
        before, _ = self._measured.get(self._at, (throughput, now))
        if not 0.6 < throughput / before < 1.6:  # another link than before
            self._measured.clear()
            self._step = 1 if throughput > before else -1
            before = throughput
        self._measured[self._at] = (throughput + before) / 2, now

    def _next_level(self, now: float) -> int:
        beside = [index for index in (self._at + self._step, self._at - self._step) if 0 <= index < len(self._levels)]
        best = max((index for index in (self._at, *beside) if index in self._measured), key=self._worth)
        if best != self._at:
            return best
        for index in beside:
            if index not in self._measured or now - self._measured[index][1] > _LIFETIME_S:
                return index
        return best

    def _worth(self, index: int) -> float:
        return math.log(self._measured[index][0]) - _WORTH * math.log(self._levels[index])


class _Epoch:
    """The reads by which one limit is judged."""

    def __init__(self, limit: int) -> None:
        self.wanted = max(8, limit)
        self.begun = 0
        self.passed = 0
        self.reads: list[tuple[float, int]] = []  # seconds, bytes
        self.in_flight = 0


class _Work:
    """What a read of some size is worth, so that throughput with many small reads compares to that with few large ones.

    Seconds are fitted as a + b x bytes over recent reads; a read is worth its bytes + a / b, over those of the mean.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, bytes, seconds, bytes squared, bytes x seconds; old ones fade

    def observe(self, size: int, seconds: float) -> None:
        terms = (1.0, size, seconds, size * size, size * seconds)
        self._sums = [0.99 * total + term for total, term in zip(self._sums, terms, strict=True)]

    def of(self, size: int) -> float:
        count, sizes, seconds, squares, products = self._sums
        spread = squares * count - sizes * sizes
        mean = sizes / count
        if spread < 1e-3 * sizes * sizes:
            return size / mean  # all of about one size
        slope = (products * count - sizes * seconds) / spread
        fixed = seconds / count - slope * mean
        overhead = min(max(fixed / slope, 0.0), 8 * mean) if slope > 0 else 8 * mean
        return (size + overhead) / (mean + overhead)


class Window:
    """Slots for reads in flight, between `least` and `most` (see `Limit`). For one event loop.

    Whoever waits gets a slot when one ends, the smallest urgency first, first come first served among equals.
    """

    def __init__(self, least: int = 2, most: int = 16) -> None:
        self.in_flight = 0
        self._limit = Limit(least, most)
        self._arrivals = 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap: urgency, arrival

    @property
    def limit(self) -> int:
        """Reads that may be in flight now."""
        return self._limit.reads

    @property
    def waiting(self) -> int:
        """How many wait for a slot now."""
        return len(self._waiting)

    @asynccontextmanager
    async def slot(self, urgency: float, size: int) -> AsyncIterator[Turn]:
        """Wait for a turn to read `size` bytes, which ends with the context. A smaller `urgency` goes first."""
        await self._enter(urgency)
        turn = Turn(self, size, self._limit.start(self.in_flight))
        try:
            yield turn
        finally:
            self._leave()

    def slow_down(self) -> None:
        """The store asked for less."""
        self._limit.slow_down()

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
            self._leave()  # granted in the same step as the cancellation
            return
        self._waiting = [entry for entry in self._waiting if entry[2] is not ticket]
        heapify(self._waiting)
        self._grant()

    def _leave(self) -> None:
        self.in_flight -= 1
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self.in_flight < self.limit:
            *_, ticket = heappop(self._waiting)
            if not ticket.done():
                self.in_flight += 1
                ticket.set_result(None)


@dataclass(frozen=True, slots=True)
class Turn:
    """A read that has its slot."""

    _window: Window
    _size: int
    _epoch: _Epoch | None

    def succeed(self, seconds: float, now: float) -> None:
        """The read ends well, `seconds` after it was asked for: the window learns from it."""
        self._window._limit.observe(self._epoch, self._size, seconds, self._window.in_flight, now)
