"""Threads for a tier's blocking calls, and tasks that go on by themselves; both end with `close`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvstore_s3.objectstore.awaiting import finish

T = TypeVar("T")


class Background:
    """Reads and writes have threads of their own: a write that waits for a lock holds up no read."""

    def __init__(self, threads: int, name: str) -> None:
        self._reading = ThreadPoolExecutor(threads, f"kvstore-s3-{name}-read")
        self._writing = ThreadPoolExecutor(threads, f"kvstore-s3-{name}-write")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def read(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread, to its end even when cancelled: it may be writing into a caller's buffer."""
        return await finish(asyncio.get_running_loop().run_in_executor(self._reading, work))

    async def write(self, work: Callable[[], T]) -> T:
        """Like `read`, in a thread for writes."""
        return await finish(asyncio.get_running_loop().run_in_executor(self._writing, work))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settle(self) -> None:
        """Wait until all tasks are done."""
        while self._tasks:
            await finish(asyncio.wait(tuple(self._tasks)))

    async def close(self) -> None:
        await self.settle()
        for pool in (self._reading, self._writing):
            await finish(asyncio.to_thread(pool.shutdown))
