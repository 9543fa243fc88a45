"""Every metric of the connector: name, kind, label, meaning. Pure: docs and dashboards are checked against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from kvstore_s3.quality import QUALITIES

Kind = Literal["counter", "gauge", "histogram"]

FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bucket limits in seconds of what takes one round trip."""
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bucket limits in seconds of what moves a prompt's KV."""

OUTCOMES = ("hit", "partial", "miss", "skipped")
ENDS = ("late", "damaged", "store-out", "device", "given-up", "aborted", "stalled")
MISSES = (
    "absent",
    "local",
    "short",
    "not-worth-it",
    "unlikely",
    *ENDS,
    "reset",
    "lora-unknown",
    "multimodal",
    "embeds",
    "other-input",
    "off",
)
NOT_SAVED = ("short", "not-worth-it", "first-sight", "store-out")
ANSWERS = (*QUALITIES, "unknown")
TIERS = ("host", "nvme", "store")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; Prometheus calls it `vllm:<name>`, a counter `vllm:<name>_total`.

    `values` are the label's values that there are from the start, at zero. Gauges have a label "process" beside it.
    """

    kind: Kind
    text: str
    label: str = ""
    values: Sequence[str] = ()
    buckets: Sequence[float] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        own = (self.label,) if self.label else ()
        return (*own, "process") if self.kind == "gauge" else own


def _counter(text: str, label: str = "", values: Iterable[str] = ()) -> Metric:
    return Metric("counter", text, label, tuple(values))


def _gauge(text: str, label: str = "", values: Iterable[str] = ()) -> Metric:
    return Metric("gauge", text, label, tuple(values))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        # What became of requests: counted by the scheduler.
        "kvstore_requests": _counter(
            "Requests that ended or were computed, by what the KV store gave: all of their whole chunks, some, none; "
            "skipped: it was not asked.",
            "outcome",
            OUTCOMES,
        ),
        "kvstore_misses": _counter("Requests of outcome miss or skipped, by reason.", "reason", MISSES),
        "kvstore_requests_quality": _counter(
            "Finished requests by the worst quality of KV that they rest on; lossless: nothing lossy was loaded.",
            "quality",
            ANSWERS,
        ),
        "kvstore_time_saved_seconds": _counter(
            "Prefill time that loads saved: what computing the tokens would have taken, less what loading them took."
        ),
        "kvstore_added_wait_seconds": Metric(
            "histogram", "How long a request was held back for the KV store, lookup and load.", buckets=SLOW
        ),
        # Lookups.
        "kvstore_lookups": _counter("Requests whose prefix was looked up in the KV store."),
        "kvstore_lookups_failed": _counter("Lookups that the KV store did not answer, or not in time."),
        "kvstore_lookup_seconds": Metric("histogram", "Duration of lookups that were answered.", buckets=FAST),
        # Loads.
        "kvstore_loads": _counter("Loads from the KV store that were started."),
        "kvstore_loads_failed": _counter(
            "Loads that ended before all was there, by reason; the rest is computed.", "reason", ENDS
        ),
        "kvstore_loads_shared": _counter("Requests that waited for another one's load of the same prefix."),
        "kvstore_load_seconds": Metric("histogram", "Duration of loads that brought tokens.", buckets=SLOW),
        "kvstore_tokens_loaded": _counter("Prompt tokens whose KV was read from the KV store.", "quality", QUALITIES),
        "kvstore_bytes_read": _counter("Encoded bytes that were read, by where they came from.", "tier", TIERS),
        "kvstore_bytes_kept": _counter("Encoded bytes that a tier took over.", "tier", TIERS[:2]),
        "kvstore_loads_given_up": _counter("Loads that the planner ended because computing was faster."),
        "kvstore_chunks_left": _counter("Chunks of a hit that the planner left to computing."),
        "kvstore_levels_left_out": _counter("Levels of quality that were not read because there was no time."),
        "kvstore_chunks_lost": _counter("Chunks that were found damaged, short, swapped or gone when they were read."),
        # Saves.
        "kvstore_saves": _counter("Saves to the KV store that ended well."),
        "kvstore_saves_failed": _counter("Saves that failed."),
        "kvstore_saves_shed": _counter("Saves that were dropped because too much was waiting or the store was out."),
        "kvstore_not_saved": _counter("Requests or parts of them that were not saved, by reason.", "reason", NOT_SAVED),
        "kvstore_save_seconds": Metric(
            "histogram", "Duration of saves, from the blocks' copy to the last answer.", buckets=SLOW
        ),
        "kvstore_tokens_saved": _counter("Prompt tokens whose KV was newly written to the KV store."),
        "kvstore_bytes_saved": _counter("Bytes written to the KV store."),
        # The store and its tiers, as each process sees them.
        "kvstore_store_events": _counter("What happened between the process and the store; see the docs.", "event"),
        "kvstore_store_up": _gauge("1 while the KV store is asked, 0 while it is left alone."),
        "kvstore_breaker_open": _gauge(
            "1 while these requests to the KV store are not made.", "requests", ("reads", "writes")
        ),
        "kvstore_tier_on": _gauge("1 while the tier is used, 0 after it switched itself off.", "tier", TIERS[:2]),
        "kvstore_tier_bytes": _gauge("Bytes that the tier holds.", "tier", TIERS[:2]),
        "kvstore_tier_budget_bytes": _gauge("Bytes that the tier may hold.", "tier", TIERS[:2]),
        "kvstore_slab_bytes": _gauge("Memory for reading: in use, and the most there may be.", "state"),
        "kvstore_slab_waiting": _gauge("Reads that wait for memory."),
        "kvstore_link_bytes_per_s": _gauge("Measured speed of the way to the KV store."),
        "kvstore_link_latency_seconds": _gauge("Measured time to the first byte from the KV store."),
        "kvstore_save_queue_bytes": _gauge("Bytes of KV that wait in memory to be saved."),
        "kvstore_prefill_tokens_per_s": _gauge("Measured speed of computing a prompt's tokens."),
    }
)


class Series(NamedTuple):
    """One time series: a metric and the values of its labels, in the order of `Metric.labels`."""

    name: str
    values: tuple[str, ...]


def series_key(name: str, label: str = "", process: str = "") -> str:
    """The name of a series in statistics that travel: "kvstore_loads", "kvstore_misses/absent", "kvstore_x/y@rank 0".

    Raises `KeyError` where there is no such metric.
    """
    metric = METRICS[name]
    key = f"{name}/{label}" if metric.label else name
    return f"{key}@{process}" if metric.kind == "gauge" else key


def parse_key(key: str) -> Series:
    """The series that `series_key` named."""
    name, _, rest = key.partition("@")[0].partition("/")
    metric = METRICS[name]
    values = (rest,) if metric.label else ()
    return Series(name, (*values, key.partition("@")[2]) if metric.kind == "gauge" else values)


def outcome_of(loaded: int, loadable: int) -> str:
    """What the store gave a request: `loaded` of the `loadable` tokens in its whole chunks."""
    if loaded <= 0:
        return "miss"
    return "hit" if loaded >= loadable else "partial"
