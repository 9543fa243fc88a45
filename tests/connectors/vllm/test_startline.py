"""The line at start says what is on, and only that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore_s3.config import Settings
from kvstore_s3.connectors.vllm.startline import describe


def line(settings: Settings | None = None, **changed: Any) -> str:
    facts: dict[str, Any] = {
        "store": "s3://bucket/prefix",
        "namespace": "ab12",
        "settings": settings or Settings(nvme_tier_dir=None, host_tier_bytes=0),
        "profile": "lossless",
        "chunk_tokens": 256,
        "load_mode": "async",
        "admission": "cost",
        "save_at": 1,
        "loads": True,
        "saves": True,
    }
    return describe(**facts | changed)


def test_the_plain_line():
    assert line() == (
        "KV store s3://bucket/prefix: loads and saves, namespace ab12, profile lossless, chunks of 256 tokens, "
        "tiers none, loads async, admission cost"
    )


def test_what_is_not_the_default_is_said():
    tiers = Settings(host_tier_bytes=1 << 31, nvme_tier_dir=Path("/var/kv"), nvme_tier_bytes=1 << 40)
    told = line(tiers, saves=False, ranks=4, events=True)
    assert ": loads only," in told
    assert "tiers host 2 GiB and NVMe /var/kv 1024 GiB" in told
    assert told.endswith("4 shards, KV events on")


def test_saving_at_the_second_sight_is_said_where_anything_is_saved():
    assert "saved at sight 2" in line(save_at=2)
    assert "sight" not in line(save_at=2, saves=False)


def test_a_server_that_would_lose_saves_when_it_stops_says_so() -> None:
    assert "--shutdown-timeout" not in line(stop_waits=True)
    assert "--shutdown-timeout" in line(stop_waits=False)
    assert "--shutdown-timeout" not in line(stop_waits=False, saves=False)
