"""When a read is late enough to ask for it a second time, and how often that may be done. Pure."""

from __future__ import annotations

from collections import deque

FLOOR_S = 0.05
"""No read is late before this."""

ENOUGH = 20
"""Reads that must be known before any counts as late."""

_REMEMBERED = 256
_LATE_QUANTILE = 0.99
_MOST_SAVED = 4.0
"""Hedges that may be saved up in quiet times."""


class HedgePolicy:
    """Late is what takes longer than about 99 of 100 recent reads of its size; at most `ratio` of all are hedged."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._saved = 1.0 if ratio > 0 else 0.0
        self._recent: dict[int, deque[tuple[int, float]]] = {}

    @property
    def allows(self) -> bool:
        """Whether the budget has a hedge left."""
        return self._saved >= 1

    def spend(self) -> None:
        """A read was asked for a second time."""
        self._saved -= 1

    def observe(self, size: int, seconds: float) -> None:
        """A read of `size` bytes had its answer, the first or the second, `seconds` after it was first asked for."""
        self._saved = min(_MOST_SAVED, self._saved + self._ratio)
        self._recent.setdefault(_size_class(size), deque(maxlen=_REMEMBERED)).append((size, seconds))

    def late_after(self, size: int) -> float | None:
        """Seconds after which a read of `size` bytes is late; None: too little is known, or nothing is hedged.

        Reads of about the size are the measure; where they are too few, larger ones, which take longer, and else
        smaller ones, their times scaled by size.
        """
        if self._ratio <= 0:
            return None
        here = _size_class(size)
        known = sorted(of for of, recent in self._recent.items() if len(recent) >= ENOUGH)
        if not known:
            return None
        nearest = next((of for of in known if of >= here), known[-1])
        times = sorted(seconds * max(1.0, size / of_size) for of_size, seconds in self._recent[nearest])
        return max(FLOOR_S, times[min(len(times) - 1, int(len(times) * _LATE_QUANTILE))])


def _size_class(size: int) -> int:
    """Sizes within a factor of four are of one class."""
    return (max(size, 1).bit_length() + 1) // 2
