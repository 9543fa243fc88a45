"""A piece of an object on its way to the disk: which bytes it has, and what to write where. Pure.

The file is an image of the object: its first page is the header, and behind it each byte lies as deep in its page as it
lies in the object. So pages of a buffer that is laid out like the object go to the disk as they are. A page that is
offered in parts is put together in memory and written once.
"""

from __future__ import annotations

import mmap
from bisect import insort
from dataclasses import dataclass, field

from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.direct_io import page_down, page_up
from kvstore_s3.tier.extents import Extent

Write = tuple[int, memoryview]
"""Position in the file and the bytes for it, both whole pages."""


def file_size(extent: Extent) -> int:
    """Bytes of the file that keeps `extent`, header included."""
    return PAGE + page_up(extent.end) - page_down(extent.start)


def file_position(extent: Extent, byte: int) -> int:
    """Where the object's `byte` lies in the file that keeps `extent`."""
    return PAGE + byte - page_down(extent.start)


@dataclass(slots=True)
class _Page:
    memory: memoryview
    missing: int


@dataclass(slots=True)
class Piece:
    """The bytes of `extent` that were taken so far."""

    extent: Extent
    _taken: list[tuple[int, int]] = field(default_factory=list)
    _pages: dict[int, _Page] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return self._taken == [(self.extent.start, self.extent.end)]

    def take(self, start: int, data: memoryview) -> list[Write]:
        """The pages to write now that the bytes from `start` on are there. What was taken before is left out."""
        writes: list[Write] = []
        for begin, end in self._untaken(start, start + len(data)):
            writes += self._take_new(begin, data[begin - start : end - start])
            self._mark(begin, end)
        return writes

    def skip(self, start: int, end: int) -> None:
        """Count the bytes [start, end) as taken without keeping them."""
        for begin, stop in self._untaken(start, end):
            self._mark(begin, stop)

    def _take_new(self, start: int, data: memoryview) -> list[Write]:
        end = start + len(data)
        inner_start, inner_end = page_up(start), page_down(end)
        if inner_start > inner_end:
            return self._fill(start, data)
        head, inner = data[: inner_start - start], data[inner_start - start : inner_end - start]
        writes = self._fill(start, head)
        if inner:
            writes.append((file_position(self.extent, inner_start), inner))
        return writes + self._fill(inner_end, data[inner_end - start :])

    def _fill(self, start: int, part: memoryview) -> list[Write]:
        """Put `part`, which lies in one page, into that page, and write the page once nothing is missing."""
        if not part:
            return []
        first = page_down(start)
        page = self._pages.get(first)
        if page is None:
            needed = min(first + PAGE, self.extent.end) - max(first, self.extent.start)
            page = self._pages[first] = _Page(memoryview(mmap.mmap(-1, PAGE)), needed)
        page.memory[start - first : start - first + len(part)] = part
        page.missing -= len(part)
        if page.missing > 0:
            return []
        del self._pages[first]
        return [(file_position(self.extent, first), page.memory)]

    def _untaken(self, start: int, end: int) -> list[tuple[int, int]]:
        found = []
        for taken_start, taken_end in self._taken:
            if start < min(taken_start, end):
                found.append((start, min(taken_start, end)))
            start = max(start, taken_end)
        if start < end:
            found.append((start, end))
        return found

    def _mark(self, start: int, end: int) -> None:
        insort(self._taken, (start, end))
        merged: list[tuple[int, int]] = []
        for begin, stop in self._taken:
            if merged and merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((begin, stop))
        self._taken = merged
