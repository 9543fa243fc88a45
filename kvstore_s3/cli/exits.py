"""Exit codes, and the signals that end a run early."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

DONE = 0
SOME_FAILED = 1
USAGE = 2
STORE_FAILED = 3
DAMAGED = 4


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM. A KeyboardInterrupt, so that asyncio and every `finally` treat it as one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Interrupted` at the first SIGINT or SIGTERM; a second one kills, should cleaning up hang."""
    before: dict[int, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs stay as they are
                before[number] = signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
