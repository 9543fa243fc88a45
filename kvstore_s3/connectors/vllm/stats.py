"""The connector's statistics in vLLM's own: its log line "KV Transfer metrics" and its metrics endpoint.

vLLM takes them from the scheduler's half and from each worker's after every step, joins them, and sends them to the
process that serves requests, which logs and exports them. So they are plain data, and an engine that stands still
reports nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvstore_s3.connectors.vllm.measures import METRICS, Metric, parse_key, series_key
from kvstore_s3.quality import QUALITIES

_MOST_VALUES = 4096
"""Observations that one interval keeps of a histogram; statistics that nobody takes must not grow for ever."""
_LOSSY = tuple(name for name, quality in QUALITIES.items() if quality.lossy)
_MB = 1e6


class StoreStats(KVConnectorStats):  # type: ignore[misc]
    """What was measured in one interval: series (see `measures.series_key`) to number, or list of seconds."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Join with what another rank measured, or this one later. Neither's data is changed: others hold it too."""
        joined = dict(self.data)
        for key, value in other.data.items():
            joined[key] = _join(parse_key(key).name, joined[key], value) if key in joined else value
        self.data = joined
        return self

    def reduce(self) -> dict[str, int | float]:
        """The few figures of the log line; those that are zero are left out."""
        figures: dict[str, int | float] = {
            "hits": self._sum("kvstore_requests", "hit", "partial"),
            "misses": self._sum("kvstore_requests", "miss"),
            "loaded_tokens": self._sum("kvstore_tokens_loaded"),
            "lossy_tokens": self._sum("kvstore_tokens_loaded", *_LOSSY),
            "read_MB": round(self._sum("kvstore_bytes_read") / _MB, 1),
            "lookup_ms": self._middle_ms("kvstore_lookup_seconds"),
            "load_ms": self._middle_ms("kvstore_load_seconds"),
            "failed_loads": self._sum("kvstore_loads_failed"),
            "saved_s": round(self._sum("kvstore_time_saved_seconds"), 1),
            "saved_tokens": self._sum("kvstore_tokens_saved"),
            "written_MB": round(self._sum("kvstore_bytes_saved") / _MB, 1),
            "shed_saves": self._sum("kvstore_saves_shed") + self._sum("kvstore_saves_failed"),
        }
        up = [value for key, value in self.data.items() if key.startswith("kvstore_store_up@")]
        return {name: value for name, value in figures.items() if value} | ({"store_up": min(up)} if up else {})

    def is_empty(self) -> bool:
        return not self.data

    def _sum(self, name: str, *labels: str) -> int | float:
        """Of one counter: of all its labels, or of some."""
        found = ((parse_key(key), value) for key, value in self.data.items())
        total: int | float = sum(
            value for series, value in found if series.name == name and (not labels or set(series.values) & set(labels))
        )
        return total

    def _middle_ms(self, name: str) -> float:
        seconds = [value for key, values in self.data.items() if parse_key(key).name == name for value in values]
        return round(1000 * median(seconds), 1) if seconds else 0.0


class Tally:
    """Measurements from any thread, until they are taken.

    `process` names this half in the gauges: "scheduler", "rank 0". Each method raises `KeyError` for a name that is not
    in `METRICS`.
    """

    def __init__(self, process: str = "scheduler") -> None:
        self._process = process
        self._lock = threading.Lock()
        self._counts: dict[str, int | float] = {}
        self._seconds: dict[str, deque[float]] = {}
        self._gauges: dict[str, float] = {}
        self._changed: set[str] = set()

    def add(self, name: str, count: int | float = 1, label: str = "") -> None:
        """Raise a counter."""
        key = series_key(name, label)
        if count:
            with self._lock:
                self._counts[key] = self._counts.get(key, 0) + count

    def observe(self, name: str, seconds: float, label: str = "") -> None:
        """Enter one duration into a histogram."""
        key = series_key(name, label)
        with self._lock:
            self._seconds.setdefault(key, deque(maxlen=_MOST_VALUES)).append(seconds)

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge. It is reported when it has changed."""
        key = series_key(name, label, self._process)
        with self._lock:
            if self._gauges.get(key) != value:
                self._gauges[key] = value
                self._changed.add(key)

    def take(self) -> StoreStats | None:
        """What was measured since the last call, or None."""
        with self._lock:
            counts, self._counts = self._counts, {}
            seconds, self._seconds = self._seconds, {}
            changed, self._changed = self._changed, set()
            gauges = {key: self._gauges[key] for key in changed}
        data = {**counts, **{key: list(values) for key, values in seconds.items()}, **gauges}
        return StoreStats(data=data) if data else None


class StorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`METRICS` for Prometheus, `vllm:kvstore_...`, with the labels of vLLM's own metrics in front of each one's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._families = {name: self._make_family(name, metric) for name, metric in METRICS.items()}
        self._children: dict[tuple[int, str], Any] = {}
        for engine in self.per_engine_labelvalues:
            for name, metric in METRICS.items():
                if metric.kind != "gauge":
                    for label in metric.values or ([] if metric.label else [""]):
                        self._child(engine, series_key(name, label))

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            child = self._child(engine_idx, key)
            kind = METRICS[parse_key(key).name].kind
            if kind == "counter":
                child.inc(value)
            elif kind == "gauge":
                child.set(value)
            else:
                for seconds in value:
                    child.observe(seconds)

    def _child(self, engine: int, key: str) -> Any:
        """The series of one engine; a counter is exported from here on, at zero."""
        child = self._children.get((engine, key))
        if child is None:
            series = parse_key(key)
            child = self._families[series.name].labels(*self.per_engine_labelvalues[engine], *series.values)
            self._children[engine, key] = child
        return child

    def _make_family(self, name: str, metric: Metric) -> Any:
        described = {
            "name": f"vllm:{name}",
            "documentation": metric.text,
            "labelnames": [*self._labelnames, *metric.labels],
        }
        if metric.kind == "counter":
            return self._counter_cls(**described)
        if metric.kind == "gauge":
            return self._gauge_cls(**described, multiprocess_mode="mostrecent")
        return self._histogram_cls(**described, buckets=list(metric.buckets))


def _join(name: str, first: Any, then: Any) -> Any:
    kind = METRICS[name].kind
    if kind == "gauge":
        return then
    return [*first, *then][-_MOST_VALUES:] if kind == "histogram" else first + then
