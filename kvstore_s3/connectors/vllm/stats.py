"""Counters of the connector, in vLLM's own statistics: its log line "KV Transfer metrics" and its metrics endpoint."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "kvstore_lookups": "Requests whose prefix was looked up in the KV store.",
    "kvstore_lookups_failed": "Lookups that the KV store did not answer, or not in time.",
    "kvstore_loads": "Loads from the KV store that were started.",
    "kvstore_loads_failed": "Loads that ended early: damage, a vanished object, a failing store, deadline, abort.",
    "kvstore_tokens_loaded": "Prompt tokens whose KV was read from the KV store.",
    "kvstore_saves": "Saves to the KV store that ended well.",
    "kvstore_saves_failed": "Saves that failed.",
    "kvstore_saves_shed": "Saves that were dropped because too much was waiting or the store was out.",
    "kvstore_tokens_saved": "Prompt tokens whose KV was newly written to the KV store.",
    "kvstore_bytes_saved": "Bytes written to the KV store.",
}
"""Every counter and what it counts. All are counts since the last report."""


class StoreStats(KVConnectorStats):  # type: ignore[misc]
    """Counts of one interval; `data` maps names of `COUNTERS` to integers."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data = dict(Counter(self.data) + Counter(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(sorted(self.data.items()))

    def is_empty(self) -> bool:
        return not self.data


class Tally:
    """Counts from any thread, until they are taken."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def take(self) -> StoreStats | None:
        """What was counted since the last call, or None."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return StoreStats(data=dict(counts)) if counts else None


class StorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`COUNTERS` as Prometheus counters, `vllm:kvstore_...`, one for each engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters = {
            name: {engine: family.labels(*values) for engine, values in self.per_engine_labelvalues.items()}
            for name, family in (
                (name, self._counter_cls(name=f"vllm:{name}", documentation=text, labelnames=self._labelnames))
                for name, text in COUNTERS.items()
            )
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)
