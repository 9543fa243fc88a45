"""KV events of what is saved: as vLLM publishes them, and as a subscriber of a real engine gets them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

import msgspec  # noqa: E402
from vllm.config.kv_events import KVEventsConfig  # noqa: E402
from vllm.distributed.kv_events import BlockStored, KVEventBatch  # noqa: E402

from kvstore_s3.connectors.vllm.events import MEDIUM, EventLog  # noqa: E402

KEYS = [bytes([number]) * 32 for number in range(3)]


def test_chunks_are_told_of_with_their_keys_and_tokens():
    log = EventLog(chunk_tokens=2)
    log.stored(KEYS[:2], None, [5, 6, 7, 8])
    log.stored(KEYS[2:], KEYS[1], [9, 10], first_token=4)
    log.removed([KEYS[2]])
    assert log.take() != []
    assert log.take() == []


def test_events_survive_the_wire():
    log = EventLog(chunk_tokens=2)
    log.stored(KEYS[:2], None, [5, 6, 7, 8], salt="tenant", lora_name="adapter")
    batch = KVEventBatch(ts=1.0, events=log.take())
    stored = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=KVEventBatch).events[0]
    assert isinstance(stored, BlockStored)
    assert stored.block_hashes == KEYS[:2]
    assert stored.token_ids == [5, 6, 7, 8]
    assert stored.block_size == 2
    assert stored.medium == MEDIUM
    assert [list(extra) for extra in stored.extra_keys or []] == [["adapter", "tenant"], ["adapter"]]


def test_token_ids_of_other_chunks_are_refused():
    log = EventLog(chunk_tokens=2)
    with pytest.raises(ValueError, match="are not those of 2 chunks"):
        log.stored(KEYS[:2], None, [5, 6, 7])
    with pytest.raises(ValueError, match="are not those of 1 chunks"):
        log.stored(KEYS[:1], None, [5, 6], first_token=2)
    assert log.take() == []


def test_an_engine_that_publishes_nothing_keeps_nothing():
    quiet = SimpleNamespace(kv_events_config=None)
    off = SimpleNamespace(kv_events_config=KVEventsConfig(enable_kv_cache_events=False))
    on = SimpleNamespace(kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"))
    assert EventLog.of_engine(quiet, 256) is None
    assert EventLog.of_engine(off, 256) is None
    assert EventLog.of_engine(on, 256) is not None
