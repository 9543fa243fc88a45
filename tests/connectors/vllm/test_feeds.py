"""What a KVStore counts and measures becomes metrics: each number once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstore_s3 import KVStore, Namespace, Settings
from kvstore_s3.connectors.vllm.feeds import CounterFeed, StoreFeed
from kvstore_s3.connectors.vllm.measures import METRICS, outcome_of, parse_key, series_key
from kvstore_s3.layout import KVLayout
from kvstore_s3.metrics import Counters

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32")


class Notes:
    """A tally that keeps what it is told."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.gauges: dict[str, float] = {}

    def add(self, name: str, count: float = 1, label: str = "") -> None:
        key = series_key(name, label)
        self.counts[key] = self.counts.get(key, 0) + count

    def set(self, name: str, value: float, label: str = "") -> None:
        self.gauges[series_key(name, label)] = value


def test_only_what_a_counter_grew_by_is_passed_on():
    counters, notes = Counters(), Notes()
    feed = CounterFeed(counters)
    counters.add("host_hit_bytes", 100)
    feed.feed(notes)
    counters.add("host_hit_bytes", 20)
    counters.add("retries", 3)
    feed.feed(notes)
    feed.feed(notes)
    assert notes.counts == {"kvstore_bytes_read/host": 120, "kvstore_store_events/retries": 3}


def test_bytes_uploaded_are_left_to_the_saves():
    counters, notes = Counters(), Notes()
    counters.add("bytes_uploaded", 100)
    CounterFeed(counters).feed(notes)
    assert notes.counts == {}


def bytes_read(notes: Any) -> int:
    """From the host tier and from the store: whether the first load finds the chunk kept already is a race."""
    return sum(notes.counts.get(f"kvstore_bytes_read/{tier}", 0) for tier in ("host", "store"))


async def test_a_real_store_tells_of_its_bytes_by_tier_and_of_its_state():
    notes: Any = Notes()
    namespace = Namespace(model="m", revision="1", layout=LAYOUT, chunk_tokens=16)
    tokens = list(range(32))
    kv = torch.randn(2, 2, 32, 2, 16)
    async with KVStore.open(
        "memory://feeds", namespace, Settings(host_tier_bytes=1 << 20, nvme_tier_dir=None)
    ) as store:
        await store.save(tokens, kv)
        feed = StoreFeed(store, notes)
        feed.feed(now=0.0)
        assert notes.gauges["kvstore_store_up@"] == 1
        assert notes.gauges["kvstore_breaker_open/reads@"] == 0
        assert notes.gauges["kvstore_tier_on/host@"] == 1
        assert notes.gauges["kvstore_slab_bytes/most@"] > 0
        for _ in range(2):
            assert torch.equal(await store.load(await store.lookup(tokens)), kv)
        before = dict(notes.counts)
        feed.feed(now=0.5)
        assert notes.counts == before, "not before the interval is over"
        feed.feed(now=0.5, at_once=True)
        assert bytes_read(notes) > kv.nbytes, "two loads, encoded"
        before = dict(notes.counts)
        feed.feed(now=1.0)
        assert notes.counts == before, "nothing was read since"
        assert torch.equal(await store.load(await store.lookup(tokens)), kv)
        feed.feed(now=1.5)
    assert bytes_read(notes) > kv.nbytes * 1.5, "three loads, encoded"


async def test_bytes_of_a_store_without_tiers_come_from_the_store():
    notes: Any = Notes()
    namespace = Namespace(model="m", revision="1", layout=LAYOUT, chunk_tokens=16)
    kv = torch.randn(2, 2, 32, 2, 16)
    settings = Settings(host_tier_bytes=0, nvme_tier_dir=None)
    async with KVStore.open("memory://feeds-store", namespace, settings) as store:
        await store.save(range(32), kv)
        await store.load(await store.lookup(range(32)))
        StoreFeed(store, notes).feed()
    assert notes.counts["kvstore_bytes_read/store"] > kv.nbytes / 2
    assert not [key for key in notes.gauges if key.startswith("kvstore_tier")]


@pytest.mark.parametrize("name", METRICS)
def test_the_key_of_a_series_names_it(name: str):
    metric = METRICS[name]
    label = "a/b" if metric.label else ""
    process = "rank 0" if metric.kind == "gauge" else ""
    series = parse_key(series_key(name, label, process))
    assert series.name == name
    assert series.values == tuple(value for value in (label, process) if value)
    assert len(series.values) == len(metric.labels)


def test_a_request_is_a_hit_when_all_that_could_be_loaded_was():
    assert [outcome_of(loaded, 1024) for loaded in (0, 256, 1024, 1100)] == ["miss", "partial", "hit", "hit"]
