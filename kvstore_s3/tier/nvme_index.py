"""What a process knows of the files of its NVMe tier, and which of them to evict. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from kvstore_s3.tier.eviction import Eviction
from kvstore_s3.tier.extents import Extent, Extents
from kvstore_s3.tier.nvme_records import Reservation
from kvstore_s3.tier.pieces import file_size

_TOUCH_S = 10.0
Victim = tuple[Extent, int]
"""A piece and when it was last used as far as this process knows (ns since 1970)."""


class NvmeIndex:
    """Kept pieces by the digest of their object's key."""

    def __init__(self, budget: int) -> None:
        self.extents = Extents()
        self._eviction: Eviction[Extent] = Eviction(budget)
        self._used_ns: dict[Extent, int] = {}
        self._touched: dict[Extent, float] = {}
        self._verified: set[Extent] = set()
        self._listings = 0
        self._forgotten: set[Extent] = set()

    @property
    def bytes(self) -> int:
        """What the files take up together."""
        return self._eviction.bytes

    def add(self, extent: Extent, used_ns: int, now: float, *, proven: bool) -> None:
        self.extents.add(extent)
        self._used_ns[extent] = used_ns
        self._eviction.add(extent, file_size(extent), now, proven=proven)

    @contextmanager
    def listing(self) -> Iterator[None]:
        """While files are listed: what is forgotten meanwhile may stand in the list, but is gone."""
        self._listings += 1
        try:
            yield
        finally:
            self._listings -= 1
            if self._listings == 0:
                self._forgotten.clear()

    def add_found(self, found: Mapping[Extent, int], leaving: Collection[Extent], now: float) -> None:
        """Add what is new in a listing and does not leave just now, the longest unused first. Inside `listing`."""
        for extent, used_ns in sorted(found.items(), key=lambda item: item[1]):
            if extent not in self.extents and extent not in leaving and extent not in self._forgotten:
                self.add(extent, used_ns, now, proven=True)

    def forget(self, extent: Extent) -> None:
        if self._listings:
            self._forgotten.add(extent)
        self.extents.discard(extent)
        self._eviction.remove(extent)
        self._verified.discard(extent)
        self._used_ns.pop(extent, None)
        self._touched.pop(extent, None)

    def forget_all(self) -> None:
        for extent in tuple(self.extents):
            self.forget(extent)

    def is_verified(self, extent: Extent) -> bool:
        """Whether the header of its file was found right, or written, by this process."""
        return extent in self._verified

    def verify(self, extent: Extent) -> None:
        if extent in self.extents:
            self._verified.add(extent)

    def visit(self, extent: Extent, now: float) -> None:
        self._eviction.visit(extent, now)

    def wants_touch(self, extent: Extent, now: float) -> bool:
        """Whether it is time to tell the other processes that the piece is in use; at most every ten seconds."""
        if now - self._touched.get(extent, float("-inf")) < _TOUCH_S:
            return False
        self._touched[extent] = now
        return True

    def touched(self, extent: Extent, used_ns: int) -> None:
        if extent in self.extents:
            self._used_ns[extent] = used_ns

    def choose_victims(self, missing: int) -> list[Victim]:
        """Pieces that give `missing` bytes back; `settle` must follow."""
        victims: list[Victim] = []
        while missing > 0 and (extent := self._eviction.evict()) is not None:
            victims.append((extent, self._used_ns[extent]))
            missing -= file_size(extent)
        return victims

    def settle(self, victims: Iterable[Victim], reservation: Reservation | None, now: float) -> None:
        """Forget the victims that were removed; the others were used by another process, or were not needed."""
        removed = set(reservation.removed) if reservation else set()
        spared = reservation.spared if reservation else {}
        for extent, used_ns in victims:
            if extent in removed:
                self.forget(extent)
            elif extent in self.extents:
                self.add(extent, spared.get(extent, used_ns), now, proven=True)
