"""Loads that the scheduler's half has ordered, until every rank has reported; and chunks that failed lately. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore_s3.connectors.vllm.messages import LoadOrder, LoadReport
from kvstore_s3.quality import worst_quality

LOST = {"damaged", "late", "store-out"}
"""Reasons for which the chunk where a load was cut is not to be offered again at once."""


@dataclass(slots=True)
class LoadUnderWay:
    """One order, and what the ranks that have reported say together: the fewest tokens, the worst quality.

    `block_ids` are all blocks that the request had when it was ordered, from the first that the load fills on.
    """

    order: LoadOrder
    block_ids: tuple[int, ...]
    ranks_left: int
    good: int
    reason: str | None = None
    quality: str = "lossless"
    seconds: float = 0.0
    near: bool = True

    @property
    def lost(self) -> bool:
        return self.reason in LOST


_MOST_LOSSY = 1 << 16
"""Chunks of which it is remembered that the engine holds them at a lower quality."""


class LoadsUnderWay:
    """Loads by request, and by the keys of the chunks that they bring."""

    def __init__(self, ranks: int, *, lifetime_s: float) -> None:
        self._ranks = ranks
        self._lifetime_s = lifetime_s
        self._new: list[LoadOrder] = []
        self._loads: dict[str, LoadUnderWay] = {}
        self._coming: dict[bytes, str] = {}
        self._bad_until: dict[bytes, float] = {}
        self._lossy: dict[bytes, str] = {}
        self._forgotten = "lossless"  # the worst of chunks that were too many to remember

    @property
    def any(self) -> bool:
        return bool(self._loads)

    def is_loading(self, request_id: str) -> bool:
        """Whether a load of this request is under way."""
        return request_id in self._loads

    @property
    def any_by_layer_new(self) -> bool:
        """Whether loads by layer were ordered for the step that is being scheduled."""
        return any(order.by_layer for order in self._new)

    def add(self, order: LoadOrder, block_ids: Sequence[int]) -> None:
        """`block_ids`: see `LoadUnderWay`."""
        self._new.append(order)
        self._loads[order.request_id] = LoadUnderWay(order, tuple(block_ids), self._ranks, order.tokens.end)
        for key in () if order.follow else order.keys:  # what another engine computes may take its time
            self._coming.setdefault(key, order.request_id)

    def take_orders(self) -> tuple[LoadOrder, ...]:
        """Orders since the last call."""
        orders, self._new = tuple(self._new), []
        return orders

    def is_coming(self, key: bytes) -> bool:
        """Whether a load under way brings this chunk."""
        return key in self._coming

    def note(self, report: LoadReport) -> LoadUnderWay | None:
        """One rank's load has ended. The load, once all of them have."""
        load = self._loads[report.request_id]
        load.ranks_left -= 1
        if report.good < load.good or load.reason is None or (report.good == load.good and report.reason in LOST):
            load.reason = report.reason
        load.good = min(load.good, report.good)
        load.quality = worst_quality((load.quality, report.quality))
        load.seconds = max(load.seconds, report.seconds)
        load.near &= report.near
        if load.ranks_left:
            return None
        del self._loads[report.request_id]
        for key in load.order.keys:
            if self._coming.get(key) == report.request_id:
                del self._coming[key]
            if load.quality != "lossless":
                self._lossy[key] = worst_quality((load.quality, self._lossy.pop(key, "lossless")))
        while len(self._lossy) > _MOST_LOSSY:
            self._forgotten = worst_quality((self._forgotten, self._lossy.pop(next(iter(self._lossy)))))
        return load

    def quality_of(self, keys: Iterable[bytes]) -> str:
        """The worst quality at which the engine may hold these chunks, or what it computed from them."""
        if not self._lossy:
            return "lossless"
        return worst_quality([self._forgotten, *(self._lossy.get(key, "lossless") for key in keys)])

    def avoid(self, key: bytes, now: float) -> None:
        """Do not count the chunk as stored for a while."""
        self._bad_until = {key: until for key, until in self._bad_until.items() if until > now}
        self._bad_until[key] = now + self._lifetime_s

    def mend(self, keys: Iterable[bytes]) -> None:
        """These chunks were written anew."""
        for key in keys:
            self._bad_until.pop(key, None)

    def count_good(self, keys: Sequence[bytes], now: float) -> int:
        """How many of `keys`, from the first on, are not to be avoided."""
        if not self._bad_until:
            return len(keys)
        return next((i for i, key in enumerate(keys) if self._bad_until.get(key, 0.0) > now), len(keys))
