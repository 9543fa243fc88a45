"""Ranges of objects into slabs: in turn, as many at once as the link takes, and the late ones asked for twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from kvstore_s3.arena import PAGE, round_up
from kvstore_s3.errors import InvalidArgumentError, StoreBusyError
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.transfer.bandwidth import Bandwidth
from kvstore_s3.transfer.buffers import Slab, SlabPool
from kvstore_s3.transfer.hedging import HedgePolicy
from kvstore_s3.transfer.window import Window

Read = Callable[[str, int, memoryview], Awaitable[None]]
"""Fills the view with an object's bytes from a position on, or raises; after a cancellation it writes no more."""

ReadNear = Callable[[str, int, memoryview], Awaitable[bool]]
"""The same from a tier in front of the store; False: not there. The view's content is then undefined."""

Extent = tuple[int, int]
"""(start, end) of bytes of an object."""


class Prefetcher:
    """Reads ranges of objects through `read` into slabs of `pool`. For one event loop.

    A buffer has one writer, ever: the second try of a late read goes into a slab of its own, the first good one wins,
    and the loser is cancelled; its slab comes back when it has ended, which nobody waits for (but `close`).
    """

    def __init__(
        self,
        read: Read,
        pool: SlabPool,
        window: Window,
        bandwidth: Bandwidth,
        hedge: HedgePolicy,
        count: Count = ignore,
    ) -> None:
        self.pool = pool
        self._read = read
        self._window = window
        self._bandwidth = bandwidth
        self._hedge = hedge
        self._count = count
        self._tries: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def fetch(
        self, key: str, start: int, length: int, urgency: float = 0.0, lead: int = 0
    ) -> AsyncIterator[memoryview]:
        """The `length` bytes from `start` on, in a slab that is given back at the end; smaller `urgency` goes first.

        The first byte lies `lead` bytes after a page boundary of memory; `lead` = `start` % 4096 makes the object's
        pages those of the memory, as direct writes to a disk want it. Raises what `read` raises, and
        `InvalidArgumentError` where the pool is smaller than the range.
        """
        async with self._fetch(key, [(start, start + length)], [lead], urgency) as views:
            yield views[0]

    @asynccontextmanager
    async def fetch_ranges(
        self, key: str, ranges: Sequence[Extent], urgency: float = 0.0, *, near: ReadNear | None = None
    ) -> AsyncIterator[list[memoryview]]:
        """Several ranges (start, end) of one object, read side by side: a view for each, in their order.

        They share one slab (so that nobody who holds one waits for another) and each lies in memory as it lies in the
        object, modulo 4096. `near` is asked first: what it has takes no slot of the window, and tells nothing about
        the link. The first failure cancels the other reads and is raised.
        """
        async with self._fetch(key, ranges, [start % PAGE for start, _ in ranges], urgency, near) as views:
            yield views

    async def close(self) -> None:
        """Await the end of reads that lost against their second try."""
        while self._tries:
            await asyncio.wait(set(self._tries))

    @asynccontextmanager
    async def _fetch(
        self, key: str, ranges: Sequence[Extent], leads: Sequence[int], urgency: float, near: ReadNear | None = None
    ) -> AsyncIterator[list[memoryview]]:
        places, size = _lay_out(ranges, leads)
        slab = _Shared(await self.pool.acquire(size, urgency=urgency))
        targets = [_Target(slab.hold(), place, end - start) for (start, end), place in zip(ranges, places, strict=True)]
        try:
            await self._read_all(key, ranges, targets, urgency, near)
            yield [target.view for target in targets]
        finally:
            for target in targets:
                target.slab.drop()
            slab.drop()

    async def _read_all(
        self,
        key: str,
        ranges: Sequence[Extent],
        targets: Sequence[_Target],
        urgency: float,
        near: ReadNear | None,
    ) -> None:
        if len(ranges) == 1:
            await self._read_range(key, ranges[0][0], targets[0], urgency, near)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for (start, _), target in zip(ranges, targets, strict=True):
                    group.create_task(self._read_range(key, start, target, urgency, near))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _read_range(self, key: str, start: int, target: _Target, urgency: float, near: ReadNear | None) -> None:
        if near is not None and await near(key, start, target.view):
            return
        async with self._window.slot(urgency, target.size):
            asked = monotonic()
            late_s = self._hedge.late_after(target.size)
            try:
                if late_s is None:
                    began = asked
                    await self._read(key, start, target.view)
                else:
                    began = await self._race(key, start, target, late_s)
            except StoreBusyError:
                self._window.slow_down()
                raise
            self._learn(target.size, asked, began)

    def _learn(self, size: int, asked: float, began: float) -> None:
        """`asked`: when the bytes were first asked for; `began`: when the read that brought them was."""
        ended, in_flight = monotonic(), self._window.in_flight
        self._hedge.observe(size, ended - asked)
        self._bandwidth.observe(size, began, ended, in_flight)
        self._window.observe(size, began, ended, in_flight)

    async def _race(self, key: str, start: int, target: _Target, late_s: float) -> float:
        """Read into `target`, and once late into another slab too, which `target` has if it wins.

        Returns when the good read began.
        """
        first = self._begin(key, start, target)
        tries = [first]
        spare = None
        try:
            await asyncio.wait({first.task}, timeout=late_s)
            if not first.task.done() and (spare := self._take_spare(target)) is not None:
                tries.append(self._begin(key, start, spare))
                self._count("hedged_reads", 1)
            winner = await _first_good(tries)
        except BaseException:
            for one in tries:
                one.task.cancel()
            await finish(asyncio.wait([one.task for one in tries]))
            if spare is not None:
                spare.slab.drop()
            raise
        if spare is None:
            return winner.began
        loser = first
        if winner is first:
            loser = tries[1]
        else:
            target.exchange(spare)
            self._count("hedges_won", 1)
        loser.task.cancel()  # its slab is held until it has ended
        spare.slab.drop()
        return winner.began

    def _begin(self, key: str, start: int, target: _Target) -> _Try:
        slab = target.slab.hold()
        task = asyncio.create_task(_await(self._read(key, start, target.view)))
        self._tries.add(task)

        def end(task: asyncio.Task[None]) -> None:
            self._tries.discard(task)
            slab.drop()
            if not task.cancelled():
                task.exception()  # marks it as seen: a loser's failure is nobody's

        task.add_done_callback(end)
        return _Try(task, monotonic())

    def _take_spare(self, target: _Target) -> _Target | None:
        """A place for a second try, where neither the budget of hedges nor the pool is spent."""
        if not self._hedge.allows:
            return None
        slab = self.pool.try_acquire(target.lead + target.size)
        if slab is None:
            return None
        self._hedge.spend()
        return _Target(_Shared(slab), target.lead, target.size)


class _Shared:
    """A slab that goes back when the last of those who use it has dropped it."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self._users = 1

    def hold(self) -> _Shared:
        self._users += 1
        return self

    def drop(self) -> None:
        self._users -= 1
        if not self._users:
            self.slab.release()


class _Target:
    """Where one range goes: `size` bytes from `place` on in a slab, of which this is one user."""

    def __init__(self, slab: _Shared, place: int, size: int) -> None:
        self.slab = slab
        self.lead = place % PAGE
        self.size = size
        self.view = slab.slab.view[place : place + size]

    def exchange(self, other: _Target) -> None:
        """Swap slabs: the bytes are in the other one."""
        self.slab, other.slab = other.slab, self.slab
        self.view, other.view = other.view, self.view


@dataclass(frozen=True, slots=True)
class _Try:
    task: asyncio.Task[None]
    began: float


async def _first_good(tries: Sequence[_Try]) -> _Try:
    """The first try that ends well; where none does, the first one's failure is raised."""
    pending = {one.task for one in tries}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for one in tries:
            if one.task in done and one.task.exception() is None:
                return one
    failure = tries[0].task.exception()
    assert failure is not None  # no try ended well
    raise failure


async def _await(reading: Awaitable[None]) -> None:
    await reading


def _lay_out(ranges: Sequence[Extent], leads: Sequence[int]) -> tuple[list[int], int]:
    """Where in a slab each range begins, `leads` bytes after a page boundary, and how many bytes that takes in all."""
    places, end = [], 0
    for (start, stop), lead in zip(ranges, leads, strict=True):
        if start < 0 or stop <= start or not 0 <= lead < PAGE:
            raise InvalidArgumentError(f"bytes {start} to {stop}, {lead} after a page boundary: nothing to fetch there")
        places.append(round_up(end) + lead)
        end = places[-1] + stop - start
    if not places:
        raise InvalidArgumentError("no range was given to fetch")
    return places, end
