"""How fast the link to the store is, learned from the reads that it served. Pure: time comes as an argument."""

from __future__ import annotations

import math

TINY = 64 * 1024
"""Reads up to this size tell of the delay, not of the rate."""

_ENOUGH = 1024 * 1024
"""Bytes that a sample of the rate takes: less is noise."""

_LEAST_BUSY_S = 1e-6
"""A shorter sample is the clock's doing."""

_MEMORY_S = 0.5
"""Seconds of transfer after which an old sample weighs 1/e."""

_DELAY_LIFETIME_S = 60.0
"""The base delay is the least of the last one to two of these spans: routes change."""


class Bandwidth:
    """Rate and base delay of the link, from finished reads.

    A sample is bytes over the time in which reads were under way: idle times do not count, nor does the base delay
    after one, so that a read alone shows the same link as many in a row. Reads that are still under way at its end are
    taken as half done, and the next sample is charged with that half. Samples are averaged with weights that fade by
    time of transfer, so that a collapse is believed as soon as it was seen to last.
    """

    def __init__(self) -> None:
        self._rate: float | None = None
        self._delay = RecentLeast(_DELAY_LIFETIME_S)
        self._reads: list[tuple[int, float, float]] = []  # bytes, started, ended: since the last sample
        self._since = -math.inf
        self._carried = 0.0  # bytes of reads under way at `_since` that the last sample was credited with

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes per second of all reads together while the link is busy; None: not known yet."""
        return self._rate

    @property
    def latency_s(self) -> float:
        """Seconds from a request to its first byte, at best; 0 as long as nothing small was asked for."""
        return self._delay.least or 0.0

    def observe_delay(self, seconds: float, now: float) -> None:
        """A request without a body to speak of, such as a head, took `seconds`."""
        self._delay.add(seconds, now)

    def observe(self, size: int, started: float, ended: float, in_flight: int) -> None:
        """A read of `size` bytes ended well; `in_flight` reads were under way just before its end, itself included.

        Reads are told in the order of their ends.
        """
        if size <= TINY:
            self._delay.add(ended - started, ended)
        self._reads.append((size, started, ended))
        others = max(0, in_flight - 1)
        if sum(size for size, *_ in self._reads) >= _ENOUGH and (others == 0 or len(self._reads) > others):
            self._close_sample(ended, others)

    def _close_sample(self, now: float, others: int) -> None:
        moved = sum(size for size, *_ in self._reads)
        partly = others * moved / len(self._reads) / 2
        credited = moved - self._carried + partly
        busy = self._busy_seconds()
        if credited > 0 and busy >= _LEAST_BUSY_S:
            self._take(credited / busy, busy, waiting_mostly=self._waiting_mostly(others))
        self._reads.clear()
        self._since, self._carried = now, partly

    def _take(self, sample: float, busy: float, *, waiting_mostly: bool) -> None:
        if self._rate is None:
            self._rate = sample
        elif waiting_mostly and sample < self._rate:
            return  # only a lower bound of the link
        else:
            weight = max(0.25, 1 - math.exp(-busy / _MEMORY_S))
            self._rate += weight * (sample - self._rate)

    def _waiting_mostly(self, others: int) -> bool:
        """Whether the reads were small for the delay and too few to fill the link."""
        mean = sum(ended - started for _, started, ended in self._reads) / len(self._reads)
        return others == 0 and mean < 2 * self.latency_s

    def _busy_seconds(self) -> float:
        """Seconds since the last sample with reads under way, less the base delay where they began after an idle time.

        Only there: when reads follow each other, their delays are a part of the pace that can be had.
        """
        busy, begin, covered = 0.0, math.inf, -math.inf
        for started, ended in sorted((started, ended) for _, started, ended in self._reads):
            if started > covered:
                busy += self._less_delay(begin, covered)
                begin = started
            covered = max(covered, ended)
        return busy + self._less_delay(begin, covered)

    def _less_delay(self, begin: float, end: float) -> float:
        if end <= self._since or begin > end:
            return 0.0
        if begin <= self._since:
            return end - self._since
        return max(end - begin - self.latency_s, (end - begin) / 2)


class RecentLeast:
    """The least of the values of the last one to two `lifetime_s`."""

    def __init__(self, lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        self._since = -math.inf
        self._previous: float | None = None
        self._current: float | None = None

    @property
    def least(self) -> float | None:
        """None: there was no value yet."""
        known = [value for value in (self._previous, self._current) if value is not None]
        return min(known, default=None)

    def add(self, value: float, now: float) -> None:
        if now - self._since >= self._lifetime_s:
            self._previous, self._current, self._since = self._current, None, now
        self._current = value if self._current is None else min(self._current, value)
