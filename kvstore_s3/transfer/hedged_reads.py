"""One read, asked for a second time where its answer is late: two requests, two buffers, one result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic

from kvstore_s3.arena import PAGE
from kvstore_s3.metrics import Count
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.transfer.buffers import Slab, SlabPool
from kvstore_s3.transfer.hedging import HedgePolicy

Read = Callable[[str, int, memoryview], Awaitable[None]]
"""Fills the view with an object's bytes from a position on, or raises; after a cancellation it writes no more."""


class SharedSlab:
    """A slab that goes back when the last of those who use it has dropped it."""

    def __init__(self, slab: Slab) -> None:
        self.view = slab.view
        self._slab = slab
        self._users = 1

    def hold(self) -> SharedSlab:
        self._users += 1
        return self

    def drop(self) -> None:
        self._users -= 1
        if not self._users:
            self._slab.release()


class Target:
    """Where one read goes: `size` bytes from `place` on in a slab, of which this is one user.

    `fixed`: the bytes must end up in this slab, because others that belong to them lie beside them.
    """

    def __init__(self, slab: SharedSlab, place: int, size: int, *, fixed: bool = False) -> None:
        self.slab = slab
        self.lead = place % PAGE
        self.size = size
        self.fixed = fixed
        self.view = slab.view[place : place + size]

    def exchange(self, other: Target) -> None:
        """Swap slabs: the bytes are in the other one."""
        self.slab, other.slab = other.slab, self.slab
        self.view, other.view = other.view, self.view


@dataclass(frozen=True, slots=True)
class _Try:
    task: asyncio.Task[None]
    began: float


class HedgedReads:
    """Reads that are asked for twice when `policy` finds them late. For one event loop.

    A buffer has one writer, ever: the second try goes into a slab of its own, where one is free at once. The first good
    answer wins; the loser is cancelled. Its slab comes back when it has ended, which nobody waits for (but `close`).
    """

    def __init__(self, read: Read, pool: SlabPool, policy: HedgePolicy, count: Count) -> None:
        self._read = read
        self._pool = pool
        self._policy = policy
        self._count = count
        self._tries: set[asyncio.Task[None]] = set()

    async def read(self, key: str, start: int, target: Target) -> float:
        """Fill `target`; returns when the read that brought the bytes began (monotonic seconds)."""
        asked = monotonic()
        late_s = self._policy.late_after(target.size)
        if late_s is None:
            began = asked
            await self._read(key, start, target.view)
        else:
            began = await self._race(key, start, target, late_s)
        self._policy.observe(target.size, monotonic() - asked)
        return began

    async def close(self) -> None:
        """Await the end of reads that lost, and not of others: those may take as long as the store lets them."""
        while losers := {task for task in self._tries if task.cancelling()}:
            await asyncio.wait(losers)

    async def _race(self, key: str, start: int, target: Target, late_s: float) -> float:
        first = self._begin(key, start, target)
        tries = [first]
        spare = None
        try:
            await asyncio.wait({first.task}, timeout=late_s)
            if not first.task.done() and (spare := self._take_spare(target)) is not None:
                tries.append(self._begin(key, start, spare))
                self._count("hedged_reads", 1)
            winner = await _first_good(tries)
            if spare is not None and winner is not first:
                await self._take_over(target, spare, first.task)
        except BaseException:
            await _stop(one.task for one in tries)
            raise
        finally:
            if spare is not None:
                tries[-1].task.cancel()
                spare.slab.drop()
        return winner.began

    async def _take_over(self, target: Target, spare: Target, loser: asyncio.Task[None]) -> None:
        """Let `target` have the bytes that the second try brought."""
        self._count("hedges_won", 1)
        if target.fixed:
            await _stop([loser])
            target.view[:] = spare.view
        else:
            loser.cancel()
            target.exchange(spare)

    def _begin(self, key: str, start: int, target: Target) -> _Try:
        slab = target.slab.hold()
        task = asyncio.create_task(_call(self._read, key, start, target.view))
        self._tries.add(task)

        def end(task: asyncio.Task[None]) -> None:
            self._tries.discard(task)
            slab.drop()
            if not task.cancelled():
                task.exception()  # marks it as seen: a loser's failure is nobody's

        task.add_done_callback(end)
        return _Try(task, monotonic())

    def _take_spare(self, target: Target) -> Target | None:
        """A place for a second try, where neither the budget of hedges nor the pool is spent."""
        if not self._policy.allows:
            return None
        slab = self._pool.try_acquire(target.lead + target.size)
        if slab is None:
            return None
        self._policy.spend()
        return Target(SharedSlab(slab), target.lead, target.size)


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


async def _stop(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel, and wait until nothing of them writes any more."""
    stopping = list(tasks)
    for task in stopping:
        task.cancel()
    await finish(asyncio.wait(stopping))


async def _call(read: Read, key: str, start: int, into: memoryview) -> None:
    await read(key, start, into)  # here: a task may be cancelled before its first step
