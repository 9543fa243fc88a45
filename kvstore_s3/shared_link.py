"""What the loads of one store share: the link to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore_s3.planner import late_after
from kvstore_s3.transfer.bandwidth import Bandwidth
from kvstore_s3.transfer.link import bytes_ahead


class SharedLink:
    """The estimate of the link, and how urgent and how large the loads under way are. For one event loop."""

    def __init__(self, bandwidth: Bandwidth) -> None:
        self.bandwidth = bandwidth
        self.loads: dict[int, tuple[float, int]] = {}
        self._under_way = 0
        self._last_end = 0.0

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """Around one read from the store."""
        if not self._under_way:
            self._last_end = time.monotonic()
        self._under_way += size
        try:
            yield
        finally:
            self._under_way -= size
            self._last_end = time.monotonic()

    def bytes_per_s(self) -> float | None:
        """The rate as it was measured, or less, where nothing has arrived for longer than that rate explains.

        None where nothing is known: nothing has ever arrived, and nothing has been waited for long.
        """
        rate = self.bandwidth.bytes_per_s
        silent_s = time.monotonic() - self._last_end
        if not self._under_way or silent_s <= late_after(self._under_way, rate):
            return rate
        most = self._under_way / silent_s
        return most if rate is None else min(rate, most)

    def wait_s(self, load: int, mine: float) -> float:
        """Seconds until a load of urgency `mine` gets its first byte."""
        ahead = bytes_ahead(mine, (entry for number, entry in self.loads.items() if number != load))
        rate = self.bytes_per_s()
        return self.bandwidth.latency_s + (ahead / rate if rate else 0.0)
