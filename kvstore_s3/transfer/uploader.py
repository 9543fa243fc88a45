"""Encodes and uploads: the next objects are encoded while the last are on the wire, within a budget of bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvstore_s3.metrics import Count, ignore

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class UploadJob(Generic[T, R]):
    """One object to be made and stored. Both callables may be cancelled, and leave nothing behind then."""

    encode: Callable[[], Awaitable[T]]
    """Makes the bytes."""

    reserve_bytes: int
    """Most bytes that `encode` will need, such as those of the values themselves."""

    put: Callable[[T], Awaitable[R]]
    """Stores what `encode` returned."""

    size: Callable[[T], int] | None = None
    """Bytes of what `encode` returned: what is held from then on. None: `reserve_bytes`."""


class Uploader:
    """Runs jobs of several saves at once, in bounded memory. For one event loop.

    At most `concurrency` puts and `encoders` encodes (as many, where not given) are under way at once, and at most
    `budget_bytes` are reserved by jobs that have begun. Runs take turns, job by job, so that a long one does not keep
    a short one waiting. Counters: "objects_uploaded" and "bytes_uploaded", of jobs whose `put` returned something true.
    """

    def __init__(
        self, concurrency: int, budget_bytes: int, count: Count = ignore, *, encoders: int | None = None
    ) -> None:
        self._bytes = _Reservations(budget_bytes)
        self._encoders = asyncio.Semaphore(encoders or concurrency)
        self._puts = asyncio.Semaphore(concurrency)
        self._count = count

    @property
    def reserved(self) -> int:
        """Bytes reserved now."""
        return self._bytes.reserved

    async def run(self, jobs: Iterable[UploadJob[T, R]]) -> list[R]:
        """What `put` returned, job by job, in their order.

        `jobs` is drawn from as room becomes free. The first failure cancels the other jobs of this run and is raised
        as it is, after their end. A job that reserves more than the whole budget runs when no other holds any of it.
        """
        running: list[asyncio.Task[R]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    held = await self._bytes.reserve(job.reserve_bytes)
                    task = group.create_task(self._run_job(job, held))
                    task.add_done_callback(held.release_after)  # even where it is cancelled before its first step
                    running.append(task)
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        return [task.result() for task in running]

    async def _run_job(self, job: UploadJob[T, R], held: _Reservation) -> R:
        async with self._encoders:
            encoded = await job.encode()
        size = job.reserve_bytes if job.size is None else job.size(encoded)
        held.resize(size)
        async with self._puts:
            stored = await job.put(encoded)
        if stored:
            self._count("objects_uploaded", 1)
            self._count("bytes_uploaded", size)
        return stored


class _Reservation:
    """Bytes of the budget that a job holds."""

    __slots__ = ("_of", "size")

    def __init__(self, of: _Reservations, size: int) -> None:
        self._of, self.size = of, size

    def resize(self, size: int) -> None:
        """Hold `size` bytes from now on. More than before is granted at once: the bytes are there already."""
        self._of.change(size - self.size)
        self.size = size

    def release(self) -> None:
        self.resize(0)

    def release_after(self, task: asyncio.Task[R]) -> None:
        self.release()


class _Reservations:
    """A budget of bytes, first come, first served."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self.reserved = 0
        self._waiting: deque[tuple[int, asyncio.Future[_Reservation]]] = deque()

    async def reserve(self, size: int) -> _Reservation:
        turn: asyncio.Future[_Reservation] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._grant()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                turn.result().release()  # granted in the same step as the cancellation
            self._grant()
            raise

    def change(self, by: int) -> None:
        self.reserved += by
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done() and self.reserved and self.reserved + size > self._budget:
                return
            self._waiting.popleft()
            if turn.done():
                continue  # its waiter was cancelled
            self.reserved += size
            turn.set_result(_Reservation(self, size))


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    leaf: BaseException = failures
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf
