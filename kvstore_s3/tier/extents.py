"""Which bytes of which objects are kept: a pure index of extents."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """The bytes [start, end) of the object `name`."""

    name: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Extents:
    """A set of extents that knows what they cover. An object has few of them, so each is looked at."""

    def __init__(self) -> None:
        self._of: dict[str, list[Extent]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Extent]:
        for extents in self._of.values():
            yield from extents

    def __contains__(self, extent: Extent) -> bool:
        return extent in self._of.get(extent.name, ())

    def add(self, extent: Extent) -> None:
        if extent not in self:
            insort(self._of.setdefault(extent.name, []), extent)
            self._count += 1

    def discard(self, extent: Extent) -> None:
        if extent not in self:
            return
        kept = self._of[extent.name]
        kept.remove(extent)
        self._count -= 1
        if not kept:
            del self._of[extent.name]

    def of(self, name: str) -> tuple[Extent, ...]:
        """All extents of one object, by their start."""
        return tuple(self._of.get(name, ()))

    def holding(self, name: str, start: int, end: int) -> Extent | None:
        """One extent that holds all of [start, end), or None."""
        for extent in self._of.get(name, ()):
            if extent.start <= start and end <= extent.end:
                return extent
        return None

    def within(self, extent: Extent) -> tuple[Extent, ...]:
        """The other extents that `extent` makes superfluous."""
        kept = self._of.get(extent.name, ())
        return tuple(each for each in kept if each != extent and extent.start <= each.start and each.end <= extent.end)

    def covers(self, name: str, start: int, end: int) -> bool:
        return bool(self.parts(name, start, end))

    def parts(self, name: str, start: int, end: int) -> list[tuple[Extent, int, int]]:
        """(extent, from, to) whose ranges are [start, end) without a gap, in order; empty where there is a gap."""
        found: list[tuple[Extent, int, int]] = []
        kept = self._of.get(name, ())
        while start < end:
            best = max(
                (each for each in kept if each.start <= start < each.end), key=lambda each: each.end, default=None
            )
            if best is None:
                return []
            stop = min(best.end, end)
            found.append((best, start, stop))
            start = stop
        return found
