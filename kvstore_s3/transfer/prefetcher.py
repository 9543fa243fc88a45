"""Ranges of objects into slabs: in turn, as many at once as the link takes, and the late ones asked for twice."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from kvstore_s3.arena import PAGE, round_up
from kvstore_s3.errors import InvalidArgumentError, StoreBusyError
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.transfer.bandwidth import Bandwidth
from kvstore_s3.transfer.buffers import SlabPool
from kvstore_s3.transfer.hedged_reads import HedgedReads, Read, SharedSlab, Target
from kvstore_s3.transfer.hedging import HedgePolicy
from kvstore_s3.transfer.ranges import Request, plan_ranges
from kvstore_s3.transfer.window import Window

ReadNear = Callable[[str, int, memoryview], Awaitable[bool]]
"""As `Read`, from a tier in front of the store; False: not there. The view's content is then undefined."""

Extent = tuple[int, int]
"""(start, end) of bytes of an object."""

MiB = 1024 * 1024


class Prefetcher:
    """Reads ranges of objects through `read` into slabs of `pool`. For one event loop.

    Ranges with at most `gap_bytes` between them are asked for together, and those larger than `max_bytes` in pieces,
    side by side (see `plan_ranges`). What `read` must keep: after its cancellation was awaited it writes no more.
    """

    def __init__(
        self,
        read: Read,
        pool: SlabPool,
        window: Window,
        bandwidth: Bandwidth,
        hedge: HedgePolicy,
        count: Count = ignore,
        *,
        max_bytes: int = 16 * MiB,
        gap_bytes: int = 64 * 1024,
    ) -> None:
        self.pool = pool
        self._reads = HedgedReads(read, pool, hedge, count)
        self._window = window
        self._bandwidth = bandwidth
        self._max_bytes = max_bytes
        self._gap_bytes = gap_bytes

    @asynccontextmanager
    async def fetch_ranges(
        self, key: str, ranges: Sequence[Extent], urgency: float = 0.0, *, near: ReadNear | None = None
    ) -> AsyncIterator[list[memoryview]]:
        """Several ranges (start, end) of one object, read side by side: a view for each, in their order.

        They share one slab (so that nobody who holds one waits for another) and each lies in memory as it lies in the
        object, modulo 4096, as direct reads from a disk want it. `near` is asked first for each: what it has takes no
        slot of the window, and tells nothing about the link. The first failure cancels the other reads and is raised.
        Ranges must not overlap.
        """
        places, size = _lay_out(ranges, self._gap_bytes)
        slab = SharedSlab(await self.pool.acquire(size, urgency=urgency))
        fetch = _Fetch(key, ranges, urgency, places, slab)
        try:
            missing = list(range(len(ranges))) if near is None else await _read_near(fetch, near)
            plan = plan_ranges([ranges[n] for n in missing], max_bytes=self._max_bytes, gap_bytes=self._gap_bytes)
            for request in plan:
                request = replace(request, parts=fetch.parts_of(request, missing))
                fetch.requests.append((request, fetch.target_of(request)))
            await _run_all([self._read_request(fetch, *each) for each in fetch.requests])
            yield fetch.views()
        finally:
            for _, target in fetch.requests:
                target.slab.drop()
            slab.drop()

    async def close(self) -> None:
        """Await the end of reads that lost against their second try."""
        await self._reads.close()

    async def _read_request(self, fetch: _Fetch, request: Request, target: Target) -> None:
        async with self._window.slot(fetch.urgency, target.size) as turn:
            try:
                began = await self._reads.read(fetch.key, request.start, target)
            except StoreBusyError:
                self._window.slow_down()
                raise
            ended = monotonic()
            self._bandwidth.observe(target.size, began, ended, self._window.in_flight)
            turn.succeed(ended - began, ended)


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Ranges of an object on their way into a slab, the first byte of each at its place."""

    key: str
    ranges: Sequence[Extent]
    urgency: float
    places: Sequence[int]
    slab: SharedSlab
    requests: list[tuple[Request, Target]] = field(default_factory=list)

    def place_of(self, number: int) -> memoryview:
        start, end = self.ranges[number]
        return self.slab.view[self.places[number] : self.places[number] + end - start]

    def parts_of(self, request: Request, missing: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the ranges that `request`, planned for the `missing` ones, writes: those in its gaps, too.

        A range that was found near and lies in a gap is written once more. It must be taken from where the request's
        bytes end up: in the other place, a second try that lost may still be writing.
        """
        if len(request.parts) == 1:
            return (missing[request.parts[0]],)
        inside = (request.start <= start and end <= request.end for start, end in self.ranges)
        return tuple(number for number, is_inside in enumerate(inside) if is_inside)

    def target_of(self, request: Request) -> Target:
        """Where `request` writes. A piece of a range must lie beside the others in the end."""
        start, end = self.ranges[request.parts[0]]
        place = self.places[request.parts[0]] + request.start - start
        size = request.end - request.start
        return Target(self.slab.hold(), place, size, fixed=end - start > size)

    def views(self) -> list[memoryview]:
        """Each range, in the slab that its bytes came into."""
        found = {number: self.place_of(number) for number in range(len(self.ranges))}
        for request, target in self.requests:
            if not target.fixed:
                for number in request.parts:
                    start, end = self.ranges[number]
                    found[number] = target.view[start - request.start : end - request.start]
        return list(found.values())


async def _read_near(fetch: _Fetch, near: ReadNear) -> list[int]:
    """Fill what `near` has; returns the numbers of the ranges that it has not."""
    has = [False] * len(fetch.ranges)

    async def ask(number: int) -> None:
        has[number] = await near(fetch.key, fetch.ranges[number][0], fetch.place_of(number))

    await _run_all([ask(number) for number in range(len(has))])
    return [number for number, found in enumerate(has) if not found]


async def _run_all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Await all of `work` side by side; the first failure cancels the rest and is raised as it is, not in a group."""
    if len(work) == 1:
        return await work[0]
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _lay_out(ranges: Sequence[Extent], gap_bytes: int) -> tuple[list[int], int]:
    """Where in a slab each range begins, and how many bytes that takes in all.

    Ranges with small gaps between them keep them, so that one request can read them; others begin on a page of their
    own, as far into it as they lie in a page of the object.
    """
    places = [0] * len(ranges)
    size, reached = 0, -math.inf
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        start, end = ranges[number]
        if start < max(0, reached) or end <= start:
            raise InvalidArgumentError(f"bytes {start} to {end} cannot be fetched: nothing, or fetched already")
        near = start - reached <= gap_bytes
        places[number] = size + int(start - reached) if near else round_up(size) + start % PAGE
        size, reached = places[number] + end - start, end
    if not places:
        raise InvalidArgumentError("no range was given to fetch")
    return places, size
