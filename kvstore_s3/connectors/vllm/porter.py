"""Work handed to an event loop from a thread that must not be held up, not even for the interpreter's lock.

Waking an event loop writes to a pipe, and that gives the interpreter's lock away: the loop takes it, and the caller is
back when the loop is through, or after 5 ms. A queue's `put` keeps the lock. So a thread of its own takes the work out
of a queue and wakes the loop, once the caller waits for something else; and that thread is woken once a step alone.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from kvstore_s3.errors import StoreUnavailableError
from kvstore_s3.runtime import Runtime

T = TypeVar("T")


class Errand(Generic[T]):
    """Work that was handed over. `done` and `result` never wait."""

    def __init__(self) -> None:
        self.future: concurrent.futures.Future[T] | None = None
        self.cancelled = False

    def done(self) -> bool:
        return self.future is not None and self.future.done()


class Porter:
    """Hands work to one runtime, in the order it comes. `submit`, `cancel` and `send` are for one thread."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._queue: SimpleQueue[list[Callable[[], None]] | None] = SimpleQueue()
        self._collected: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._carry, name="kvstore-s3-porter", daemon=True)
        self._thread.start()

    def submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Errand[T]:
        """Start what `make` makes on the loop, soon after `send`. An errand of a closed runtime never ends."""
        errand: Errand[T] = Errand()

        def start() -> None:
            if not errand.cancelled:
                errand.future = self._runtime.submit(make())

        self._collected.append(start)
        return errand

    def cancel(self, errand: Errand[Any]) -> None:
        """End an errand that nobody waits for any more, soon after `send`."""
        errand.cancelled = True

        def cancel() -> None:
            if errand.future is not None:
                errand.future.cancel()

        if not errand.done():
            self._collected.append(cancel)

    def send(self) -> None:
        """Let go what was collected."""
        if self._collected:
            self._queue.put(self._collected)
            self._collected = []

    def close(self) -> None:
        """Take no more work. Safe to call twice."""
        self._queue.put(None)
        self._thread.join()

    def _carry(self) -> None:
        while (collected := self._queue.get()) is not None:
            for work in collected:
                with suppress(StoreUnavailableError):  # the runtime was closed meanwhile
                    work()
