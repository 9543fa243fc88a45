"""What to evict: S3-FIFO by bytes, pure.

Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023), with sizes. New entries pass a small queue;
those that nobody asks for on the way leave it soon, so documents that are read once do not flush what is used again.
Entries that were asked for move to the main queue, where each visit buys another round. Names that left the small queue
are remembered for a while (the ghosts): one that comes back enters the main queue at once.

docs/tiers.md has the hit rates beside LRU, SIEVE and W-TinyLFU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)

_MOST_VISITS = 3
_LEAST_GHOSTS = 16


@dataclass(slots=True)
class _Entry:
    size: int
    visits: int = 0
    visited: float = float("-inf")


class Eviction(Generic[Name]):
    """The order in which entries leave a tier of `capacity` bytes.

    Visits less than `one_visit_s` seconds apart count once: one load reads an entry in several pieces.
    """

    def __init__(self, capacity: int, *, small_share: float = 0.2, one_visit_s: float = 1.0) -> None:
        self._small_bytes_wanted = capacity * small_share
        self._ghost_bytes_wanted = capacity
        self._one_visit_s = one_visit_s
        self._small: OrderedDict[Name, _Entry] = OrderedDict()
        self._main: OrderedDict[Name, _Entry] = OrderedDict()
        self._ghosts: OrderedDict[Name, int] = OrderedDict()
        self._small_bytes = self._main_bytes = self._ghost_bytes = 0

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, name: Name) -> bool:
        return name in self._small or name in self._main

    @property
    def bytes(self) -> int:
        """What the entries take up together."""
        return self._small_bytes + self._main_bytes

    def add(self, name: Name, size: int, now: float = 0.0, *, proven: bool = False) -> None:
        """A new entry of `size` bytes; one that is there already is visited. A proven one goes to the main queue."""
        if name in self:
            self.visit(name, now)
        elif self._forget_ghost(name) or proven:
            self._add_main(name, _Entry(size, visited=now))
        else:
            self._small[name] = _Entry(size, visited=now)
            self._small_bytes += size

    def visit(self, name: Name, now: float) -> None:
        """Somebody asked for this entry at `now` (seconds, monotonic)."""
        entry = self._small.get(name) or self._main.get(name)
        if entry is not None and now - entry.visited >= self._one_visit_s:
            entry.visits = min(entry.visits + 1, _MOST_VISITS)
            entry.visited = now

    def remove(self, name: Name) -> None:
        """The entry is gone for another reason than eviction."""
        if (entry := self._small.pop(name, None)) is not None:
            self._small_bytes -= entry.size
        elif (entry := self._main.pop(name, None)) is not None:
            self._main_bytes -= entry.size

    def evict(self, is_busy: Callable[[Name], bool] = lambda name: False) -> Name | None:
        """Remove and return the next entry to go, never a busy one; None where there is none."""
        for _ in range((_MOST_VISITS + 2) * len(self)):
            from_small = self._small and (self._small_bytes > self._small_bytes_wanted or not self._main)
            victim = self._step_small(is_busy) if from_small else self._step_main(is_busy)
            if victim is not None:
                return victim
        return self._evict_any(is_busy)

    def _evict_any(self, is_busy: Callable[[Name], bool]) -> Name | None:
        """Where the queue whose turn it is holds busy entries alone."""
        for name in (*self._small, *self._main):
            if not is_busy(name):
                self.remove(name)
                return name
        return None

    def _step_small(self, is_busy: Callable[[Name], bool]) -> Name | None:
        name, entry = self._small.popitem(last=False)
        self._small_bytes -= entry.size
        if entry.visits > 0 or is_busy(name):
            entry.visits = 0
            self._add_main(name, entry)
            return None
        self._remember_ghost(name, entry.size)
        return name

    def _step_main(self, is_busy: Callable[[Name], bool]) -> Name | None:
        name, entry = self._main.popitem(last=False)
        self._main_bytes -= entry.size
        if entry.visits > 0 or is_busy(name):
            entry.visits = max(entry.visits - 1, 0)
            self._add_main(name, entry)
            return None
        return name

    def _add_main(self, name: Name, entry: _Entry) -> None:
        self._main[name] = entry
        self._main_bytes += entry.size

    def _remember_ghost(self, name: Name, size: int) -> None:
        self._ghosts[name] = size
        self._ghost_bytes += size
        while self._ghost_bytes > self._ghost_bytes_wanted and len(self._ghosts) > _LEAST_GHOSTS:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _forget_ghost(self, name: Name) -> bool:
        size = self._ghosts.pop(name, None)
        if size is None:
            return False
        self._ghost_bytes -= size
        return True
