"""From what a KVStore counts and measures to the connector's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvstore_s3.connectors.vllm.stats import Tally
    from kvstore_s3.metrics import Counters

_COUNTERS = {
    "host_hit_bytes": ("kvstore_bytes_read", "host"),
    "nvme_hit_bytes": ("kvstore_bytes_read", "nvme"),
    "store_read_bytes": ("kvstore_bytes_read", "store"),
    "host_kept_bytes": ("kvstore_bytes_kept", "host"),
    "nvme_kept_bytes": ("kvstore_bytes_kept", "nvme"),
    "loads_given_up": ("kvstore_loads_given_up", ""),
    "chunks_left_to_recompute": ("kvstore_chunks_left", ""),
    "levels_left_out": ("kvstore_levels_left_out", ""),
    "chunks_lost": ("kvstore_chunks_lost", ""),
}
"""Counters of a KVStore that have a metric of their own; all others are events of `kvstore_store_events`."""

_ELSEWHERE = frozenset({"bytes_uploaded"})
"""Counters that the connector counts itself: `kvstore_bytes_saved`."""


class CounterFeed:
    """Passes on how much the counters of a KVStore grew since the last time. For one thread."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._seen: Mapping[str, int] = {}

    def feed(self, tally: Tally) -> None:
        found = self._counters.snapshot()
        for name, total in found.items():
            grown = total - self._seen.get(name, 0)
            if grown and name not in _ELSEWHERE:
                metric, label = _COUNTERS.get(name, ("kvstore_store_events", name))
                tally.add(metric, grown, label)
        self._seen = found


_GAUGES = {
    "link_bytes_per_s": ("kvstore_link_bytes_per_s", ""),
    "link_latency_s": ("kvstore_link_latency_seconds", ""),
    "slab_bytes": ("kvstore_slab_bytes", "in-use"),
    "slab_budget_bytes": ("kvstore_slab_bytes", "most"),
    "slab_waiting": ("kvstore_slab_waiting", ""),
    "reads_open": ("kvstore_breaker_open", "reads"),
    "writes_open": ("kvstore_breaker_open", "writes"),
} | {
    f"tier_{tier}_{what}": (f"kvstore_tier_{what}", tier)
    for tier in ("host", "nvme")
    for what in ("on", "bytes", "budget_bytes")
}
"""Names in `KVStore.stats()` to gauge and label."""


def feed_gauges(tally: Tally, stats: Mapping[str, float]) -> None:
    """Set the gauges that `KVStore.stats()` tells of."""
    for name, (metric, label) in _GAUGES.items():
        if name in stats:
            tally.set(metric, stats[name], label)
    if "reads_open" in stats:
        tally.set("kvstore_store_up", 0.0 if stats["reads_open"] else 1.0)


class Measured(Protocol):
    """What a feed needs of a KVStore."""

    @property
    def counters(self) -> Counters: ...

    def stats(self) -> Mapping[str, float]: ...


class StoreFeed:
    """Counters and gauges of one KVStore, every `interval_s` seconds and when something ended. For one thread.

    A step of a busy engine takes milliseconds; asking the store at each would be work for nothing.
    """

    def __init__(self, store: Measured, tally: Tally, *, interval_s: float = 1.0) -> None:
        self._store = store
        self._tally = tally
        self._interval_s = interval_s
        self._counters = CounterFeed(store.counters)
        self._next = float("-inf")

    def feed(self, *, at_once: bool = False, now: float | None = None) -> None:
        """To be called before the tally is taken. `at_once`: what this step ended must not wait for the next one, which
        may be long in coming. `now`: monotonic seconds.
        """
        now = monotonic() if now is None else now
        if now < self._next and not at_once:
            return
        self._next = now + self._interval_s
        self._counters.feed(self._tally)
        feed_gauges(self._tally, self._store.stats())
