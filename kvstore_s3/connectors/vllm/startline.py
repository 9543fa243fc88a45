"""The one line at start that says what is on. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore_s3.config import Settings

_MiB = 1 << 20
_GiB = 1 << 30


def describe(
    *,
    store: str,
    namespace: str,
    settings: Settings,
    profile: str,
    chunk_tokens: int,
    load_mode: str,
    admission: str,
    save_at: int,
    loads: bool,
    saves: bool,
    ranks: int = 1,
    events: bool = False,
    stop_waits: bool = True,
) -> str:
    """What the connector of one engine does. `ranks`: workers that hold a shard each.

    `stop_waits`: whether vLLM gives its workers time when it is told to stop.
    """
    role = {(True, True): "loads and saves", (True, False): "loads only", (False, True): "saves only"}
    told = [
        f"KV store {store}: {role.get((loads, saves), 'off')}",
        f"namespace {namespace}",
        f"profile {profile}",
        f"chunks of {chunk_tokens} tokens",
        f"tiers {_describe_tiers(settings)}",
        f"loads {load_mode}",
        f"admission {admission}" + (f", saved at sight {save_at}" if saves and save_at > 1 else ""),
    ]
    if ranks > 1:
        told.append(f"{ranks} shards")
    if events:
        told.append("KV events on")
    if saves and not stop_waits:
        told.append("a server that is told to stop loses saves under way (--shutdown-timeout is 0)")
    return ", ".join(told)


def _describe_tiers(settings: Settings) -> str:
    tiers = []
    if settings.host_tier_bytes:
        tiers.append(f"host {_describe_bytes(settings.host_tier_bytes)}")
    if settings.nvme_tier_dir is not None:
        tiers.append(f"NVMe {settings.nvme_tier_dir} {_describe_bytes(settings.nvme_tier_bytes)}")
    return " and ".join(tiers) or "none"


def _describe_bytes(size: int) -> str:
    return f"{size / _GiB:.4g} GiB" if size >= _GiB else f"{size / _MiB:.4g} MiB"
