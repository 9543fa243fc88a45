"""What an operator and a router see of a real engine: metrics, the line at start, the log, KV events over ZMQ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

import msgspec  # noqa: E402
import zmq  # noqa: E402
from local_server import free_port  # noqa: E402
from vllm.distributed.kv_events import BlockStored, KVEventBatch  # noqa: E402

from kvstore_s3.connectors.vllm.admission import FIRST_SIGHT, NOT_WORTH_IT, SHORT, UNLIKELY  # noqa: E402
from kvstore_s3.connectors.vllm.events import MEDIUM  # noqa: E402
from kvstore_s3.connectors.vllm.measures import MISSES, NOT_SAVED  # noqa: E402
from kvstore_s3.connectors.vllm.refusals import REQUEST_REASONS  # noqa: E402

CHUNK = 256
SAVED = [(i * 131) % 1000 + 8 for i in range(600)]
OTHER = [(i * 137) % 1000 + 9 for i in range(40)]
SURELY = {"admission": "always", "prefill_tokens_per_s": 50.0, "lookup_deadline_s": 30.0}
"""Whatever else the machine has to do, computing is never the faster way."""


class Subscriber:
    """What came over the engine's event stream."""

    def __init__(self) -> None:
        self.batches: list[KVEventBatch] = []

    def stored(self) -> list[BlockStored]:
        """Events of the store's blocks; the engine's own are of another medium."""
        events = [event for batch in self.batches for event in batch.events]
        return [event for event in events if isinstance(event, BlockStored) and event.medium == MEDIUM]


@contextmanager
def subscribed(port: int) -> Iterator[Subscriber]:
    """Listen on the engine's stream from before it starts until the end of the block."""
    subscriber, ended = Subscriber(), threading.Event()
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(f"tcp://127.0.0.1:{port}")

        def listen() -> None:
            while not ended.is_set():
                if socket.poll(100):
                    _topic, _sequence, payload = socket.recv_multipart()
                    subscriber.batches.append(msgspec.msgpack.decode(payload, type=KVEventBatch))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield subscriber
        finally:
            ended.set()
            thread.join()


@pytest.fixture(scope="module")
def observed(run_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Subscriber]:
    """An engine that saves a prompt, answers a short one while that ends, and loads the first one twice."""
    port = free_port()
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
    with subscribed(port) as subscriber:
        run = run_engine(
            [[SAVED], [OTHER], [OTHER], [SAVED], [SAVED], [OTHER]],
            store=f"file://{tmp_path_factory.mktemp('observed')}",
            extra=SURELY,
            enable_prefix_caching=False,
            kv_events_config=events,
            max_tokens=24,
        )
    return run, subscriber


def test_a_subscriber_learns_the_chunks_that_were_saved(observed: tuple[Any, Subscriber]):
    _, subscriber = observed
    (stored,) = subscriber.stored()
    assert stored.token_ids == SAVED[: 2 * CHUNK]
    assert stored.block_size == CHUNK
    assert stored.parent_block_hash is None
    assert [len(key) for key in stored.block_hashes] == [32, 32]


def test_each_request_is_counted_once_by_outcome_and_by_quality(observed: tuple[Any, Subscriber]):
    run, _ = observed
    assert run.count("kvstore_requests") == 6
    assert run.count("kvstore_requests_quality") == 6
    assert run.count("kvstore_misses") == 4, "one is absent, three are short"
    assert run.count("kvstore_tokens_loaded") == 2 * 512
    assert run.count("kvstore_bytes_read") > 0
    assert run.count("kvstore_store_up") == 2, "the scheduler's process and the worker's"


def test_the_line_at_start_is_said_once(observed: tuple[Any, Subscriber]):
    run, _ = observed
    (line,) = run.log_lines("KV store file://")
    for part in ("loads and saves", "namespace ", "profile lossless", "chunks of 256 tokens", "KV events on"):
        assert part in line


def test_a_healthy_store_is_no_cause_for_warnings(observed: tuple[Any, Subscriber]):
    run, _ = observed
    assert not [line for line in run.log_lines("WARNING") if "kvstore_s3" in line or "KV store" in line]


def test_the_reasons_that_the_connector_gives_are_exported_from_the_start():
    assert {*REQUEST_REASONS, SHORT, NOT_WORTH_IT, UNLIKELY} <= set(MISSES)
    assert {SHORT, NOT_WORTH_IT, FIRST_SIGHT} <= set(NOT_SAVED)
