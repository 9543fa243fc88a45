"""When a read is late enough to ask for it a second time, and how often that may be done. Pure."""

from __future__ import annotations

from collections import deque

FLOOR_S = 0.05
"""No read is late before this."""

ENOUGH = 20
"""Reads that must be known before any counts as late."""

_REMEMBERED = 256
_LATE_QUANTILE = 0.99
_USUAL_QUANTILE, _USUAL_TIMES = 0.9, 2.0
_REFRESH = 16
"""Reads after which the limit is drawn anew."""

_MOST_SAVED = 4.0
"""Hedges that may be saved up in quiet times."""


class HedgePolicy:
    """Late is what takes longer than about 99 of 100 recent reads of its size; at most `ratio` of all are hedged.

    Late is also what takes twice as long as 90 of 100: where more than one read in a hundred hangs, the 99th is one of
    those that hang.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._saved = 1.0 if ratio > 0 else 0.0
        self._known: dict[int, _Times] = {}  # class of sizes -> its reads

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
        self._known.setdefault(_size_class(size), _Times()).add(size, seconds)

    def late_after(self, size: int) -> float | None:
        """Seconds after which a read of `size` bytes is late; None: too little is known, or nothing is hedged.

        Reads of about the size are the measure; where they are too few, larger ones, which take longer, and else
        smaller ones, their times scaled by size.
        """
        if self._ratio <= 0:
            return None
        here = _size_class(size)
        times = self._known.get(here)
        if times is None or times.count < ENOUGH:
            known = sorted(of for of, times in self._known.items() if times.count >= ENOUGH)
            if not known:
                return None
            times = self._known[next((of for of in known if of > here), known[-1])]
        return max(FLOOR_S, times.late_after(size))


class _Times:
    """Sizes and seconds of recent reads of one class of sizes."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._told = 0
        self._late: tuple[int, float] = (1, 0.0)  # the late one of `_recent`
        self._late_as_of = -_REFRESH

    @property
    def count(self) -> int:
        return len(self._recent)

    def add(self, size: int, seconds: float) -> None:
        self._recent.append((size, seconds))
        self._told += 1

    def late_after(self, size: int) -> float:
        if self._told - self._late_as_of >= _REFRESH:
            ordered = sorted(self._recent, key=lambda read: read[1])
            late_size, late = ordered[min(len(ordered) - 1, int(len(ordered) * _LATE_QUANTILE))]
            usual_size, usual = ordered[int(len(ordered) * _USUAL_QUANTILE)]
            self._late = (late_size, late) if late < _USUAL_TIMES * usual else (usual_size, _USUAL_TIMES * usual)
            self._late_as_of = self._told
        late_size, seconds = self._late
        return seconds * max(1.0, size / late_size)


def _size_class(size: int) -> int:
    """Sizes within a factor of four are of one class."""
    return (max(size, 1).bit_length() + 1) // 2
