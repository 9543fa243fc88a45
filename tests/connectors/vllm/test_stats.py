"""The connector's statistics: counted on any thread, joined over ranks and time, exported with labels."""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import msgspec  # noqa: E402
from prometheus_client import REGISTRY, Counter, Gauge, Histogram  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput  # noqa: E402

from kvstore_s3.connectors.vllm.stats import StorePromMetrics, StoreStats, Tally  # noqa: E402


def taken(tally: Tally) -> StoreStats:
    stats = tally.take()
    assert stats is not None
    return stats


def test_counts_of_many_threads_add_up():
    tally = Tally()
    threads = [threading.Thread(target=lambda: [tally.add("kvstore_loads") for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken(tally).data == {"kvstore_loads": 4000}


def test_nothing_measured_is_nothing_to_report():
    tally = Tally()
    tally.add("kvstore_tokens_saved", 0)
    assert tally.take() is None


def test_a_name_that_is_not_in_the_table_is_refused():
    with pytest.raises(KeyError):
        Tally().add("kvstore_lodes")


def test_a_gauge_is_reported_when_it_changes():
    tally = Tally("rank 1")
    tally.set("kvstore_tier_on", 1.0, "host")
    assert taken(tally).data == {"kvstore_tier_on/host@rank 1": 1.0}
    tally.set("kvstore_tier_on", 1.0, "host")
    assert tally.take() is None
    tally.set("kvstore_tier_on", 0.0, "host")
    assert taken(tally).data == {"kvstore_tier_on/host@rank 1": 0.0}


def test_what_each_rank_measures_is_joined():
    ranks = [Tally(f"rank {rank}") for rank in range(2)]
    for tally in ranks:
        tally.add("kvstore_bytes_read", 1000, "nvme")
        tally.observe("kvstore_save_seconds", 0.02)
        tally.set("kvstore_store_up", 1.0)
    assert joined([taken(tally) for tally in ranks]).data == {
        "kvstore_bytes_read/nvme": 2000,
        "kvstore_save_seconds": [0.02, 0.02],
        "kvstore_store_up@rank 0": 1.0,
        "kvstore_store_up@rank 1": 1.0,
    }


def joined(stats: list[StoreStats]) -> StoreStats:
    """As vLLM joins the reports of its workers, the second of which has nothing to say."""
    outputs = [
        ModelRunnerOutput(req_ids=[], req_id_to_index={}, kv_connector_output=KVConnectorOutput(kv_connector_stats=one))
        for one in (stats[0], None, *stats[1:])
    ]
    output = KVOutputAggregator(expected_finished_count=len(outputs)).aggregate(outputs)
    assert output is not None
    assert output.kv_connector_output is not None
    assert isinstance(output.kv_connector_output.kv_connector_stats, StoreStats)
    return output.kv_connector_output.kv_connector_stats


def test_joining_later_intervals_leaves_earlier_ones_as_they_were():
    first = StoreStats(data={"kvstore_loads": 1, "kvstore_load_seconds": [0.1], "kvstore_store_up@rank 0": 1.0})
    payload = first.data
    first.aggregate(StoreStats(data={"kvstore_loads": 2, "kvstore_load_seconds": [0.3], "kvstore_store_up@rank 0": 0}))
    assert first.data == {"kvstore_loads": 3, "kvstore_load_seconds": [0.1, 0.3], "kvstore_store_up@rank 0": 0}
    assert payload == {"kvstore_loads": 1, "kvstore_load_seconds": [0.1], "kvstore_store_up@rank 0": 1.0}


def test_statistics_that_nobody_takes_stay_small():
    tally = Tally()
    for _ in range(5000):
        tally.observe("kvstore_load_seconds", 0.1)
    assert len(taken(tally).data["kvstore_load_seconds"]) == 4096


def test_the_log_line_is_short_and_tells_of_what_happened():
    tally = Tally()
    tally.add("kvstore_requests", 3, "hit")
    tally.add("kvstore_requests", 1, "partial")
    tally.add("kvstore_requests", 2, "miss")
    tally.add("kvstore_tokens_loaded", 1024, "lossless")
    tally.add("kvstore_tokens_loaded", 256, "small")
    tally.add("kvstore_bytes_read", 2_500_000, "store")
    tally.observe("kvstore_load_seconds", 0.0415)
    tally.set("kvstore_store_up", 1.0)
    lines: list[str] = []
    logging = KVConnectorLogging(None)
    logging.connector_cls = Connector
    logging.observe(taken(tally).to_dict())
    logging.log(lambda text, *values: lines.append(text % values))
    assert lines == [
        "KV Transfer metrics: hits=4, misses=2, loaded_tokens=1280, lossy_tokens=256, read_MB=2.5, load_ms=41.5, "
        "store_up=1.0"
    ]


class Connector:
    @staticmethod
    def build_kv_connector_stats(data: dict[str, Any]) -> StoreStats:
        return StoreStats(data=data)


class Config:
    kv_transfer_config = None


@pytest.fixture(scope="module")
def exported() -> StorePromMetrics:
    kinds = {kind: kind for kind in (Counter, Gauge, Histogram)}
    return StorePromMetrics(Config, kinds, ["model_name", "engine"], {0: ["llama", "0"], 1: ["llama", "1"]})


def sample(name: str, engine: str = "0", **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"vllm:{name}", {"model_name": "llama", "engine": engine, **labels})


def test_counters_are_exported_at_zero_before_anything_happens(exported: StorePromMetrics):
    assert sample("kvstore_loads_total") == 0
    assert sample("kvstore_misses_total", reason="store-out") == 0
    assert sample("kvstore_lookup_seconds_count", engine="1") == 0


def test_what_came_over_the_wire_is_exported_with_its_labels(exported: StorePromMetrics):
    tally = Tally("rank 0")
    tally.add("kvstore_misses", 2, "absent")
    tally.add("kvstore_store_events", 5, "retries")
    tally.add("kvstore_time_saved_seconds", 1.5)
    tally.observe("kvstore_lookup_seconds", 0.003)
    tally.observe("kvstore_lookup_seconds", 0.2)
    tally.set("kvstore_breaker_open", 1.0, "writes")
    wire = msgspec.msgpack.encode(taken(tally).to_dict())
    exported.observe(msgspec.msgpack.decode(wire), 1)
    assert sample("kvstore_misses_total", engine="1", reason="absent") == 2
    assert sample("kvstore_misses_total", engine="0", reason="absent") == 0
    assert sample("kvstore_store_events_total", engine="1", event="retries") == 5
    assert sample("kvstore_time_saved_seconds_total", engine="1") == 1.5
    assert sample("kvstore_lookup_seconds_bucket", engine="1", le="0.005") == 1
    assert sample("kvstore_lookup_seconds_sum", engine="1") == pytest.approx(0.203)
    assert sample("kvstore_breaker_open", engine="1", requests="writes", process="rank 0") == 1
