"""Counters of what happened, for logs, tests and metrics endpoints. Pure."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping

Count = Callable[[str, int], None]
"""Adds a number to the counter of that name."""


class Counters:
    """Named counters, such as "retries" or "host_hit_bytes"; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._values[name] += number

    def snapshot(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._values)


def ignore(name: str, number: int) -> None:
    """A `Count` for whoever does not want to know."""
