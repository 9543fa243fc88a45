"""How the two halves of the connector are put together."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm import envs
from vllm.platforms import current_platform

from kvstore_s3.connectors.vllm.adapters import AdapterDigests
from kvstore_s3.connectors.vllm.admission import Admission
from kvstore_s3.connectors.vllm.costs import PrefillMeter, recall, remember, speed_file
from kvstore_s3.connectors.vllm.events import EventLog
from kvstore_s3.connectors.vllm.health import StoreHealth, log
from kvstore_s3.connectors.vllm.lookups import Lookups
from kvstore_s3.connectors.vllm.porter import Porter
from kvstore_s3.connectors.vllm.ranks import shards_of_engine, writes
from kvstore_s3.connectors.vllm.requests import Role
from kvstore_s3.connectors.vllm.scheduler_side import SchedulerSide
from kvstore_s3.connectors.vllm.startline import describe
from kvstore_s3.connectors.vllm.worker_side import WorkerSide
from kvstore_s3.errors import KVStoreError
from kvstore_s3.hashing import KEY_BYTES
from kvstore_s3.planner import PrefillSpeed

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvstore_s3.config import Settings
    from kvstore_s3.connectors.vllm.options import Options
    from kvstore_s3.connectors.vllm.stats import Tally
    from kvstore_s3.runtime import SyncKVStore
    from kvstore_s3.store import KVStore

_REMEMBER_EVERY_S = 60.0
_WARM_TOKENS = 4096
"""Tokens of a load whose memory is there before the first request comes; longer ones bring theirs."""
_CONNECTIONS = 8
"""Connections that are open before the first request comes."""


def scheduler_settings(settings: Settings, options: Options) -> Settings:
    """The scheduler's store only looks up: it needs no memory for values. It sees the NVMe tier that workers fill."""
    unused = {"host_tier_bytes": 0, "reuse_bytes": 0, "pin_memory": False}
    return settings.model_copy(update={"profile": options.profile, **unused})


def worker_settings(settings: Settings, options: Options) -> Settings:
    """The worker's store. It asks again for what was not there: another engine may be storing it."""
    return settings.model_copy(update={"profile": options.profile, "miss_lifetime_s": 0.0})


def make_scheduler_side(
    config: VllmConfig,
    kv_cache: KVCacheConfig,
    store: SyncKVStore,
    options: Options,
    settings: Settings,
    tally: Tally,
    resources: ExitStack,
) -> SchedulerSide:
    """The scheduler's half; what it learned is remembered when `resources` are closed, and now and then before."""
    kv, transfer, parallel = store.kv, config.kv_transfer_config, config.parallel_config
    kv.expect_shards(shards_of_engine(config, kv.namespace.layout))
    role = Role(
        block_tokens=kv_cache.kv_cache_groups[0].kv_cache_spec.block_size,
        ranks=parallel.world_size,
        loads=transfer.is_kv_consumer,
        saves=transfer.is_kv_producer,
        caches_prefixes=bool(config.cache_config.enable_prefix_caching),
        has_tiers=bool(settings.host_tier_bytes or settings.nvme_tier_dir),
        reads_later=keeps_kv_on_device() and steps_without_requests(),
    )
    path = speed_file(settings.cache_dir, kv.namespace.hex, _device(), torch.get_num_threads(), parallel.world_size)
    meter = _make_meter(options, path)
    always = options.admission == "always"
    admission = Admission(meter, chunk_tokens=options.chunk_tokens, always=always, save_at=options.save_at)
    health = StoreHealth(kv.objects, settings)
    lookups = Lookups(kv, health, AdapterDigests(settings.cache_dir, config.lora_config))
    events = EventLog.of_engine(config, options.chunk_tokens)
    resources.callback(_remember, path, meter)
    store.runtime.submit(_remember_now_and_then(path, meter))
    store.runtime.submit(_get_ready(kv, health))
    log.info(
        describe(
            store=kv.objects.url,
            namespace=kv.namespace.hex,
            settings=settings,
            profile=options.profile,
            chunk_tokens=options.chunk_tokens,
            load_mode=options.load_mode,
            admission=options.admission,
            save_at=options.save_at,
            loads=role.loads,
            saves=role.saves,
            ranks=role.ranks,
            events=events is not None,
            stop_waits=getattr(config, "shutdown_timeout", 1) != 0,
        )
    )
    porter = Porter(store.runtime)
    resources.callback(porter.close)
    return SchedulerSide(kv, porter, lookups, health, options, tally, role, meter, admission, events)


def make_worker_side(
    config: VllmConfig, kv_cache: KVCacheConfig, store: SyncKVStore, options: Options, tally: Tally
) -> WorkerSide:
    health = StoreHealth(store.kv.objects, store.kv.settings)
    store.runtime.submit(_get_ready(store.kv))
    loads = config.kv_transfer_config.is_kv_consumer and not keeps_kv_on_device()
    warm_tokens = min(config.model_config.max_model_len, _WARM_TOKENS) if loads else 0
    if warm_tokens:
        store.runtime.submit(store.kv.warm_up(warm_tokens))
    return WorkerSide(
        store,
        health,
        options,
        tally,
        block_tokens=kv_cache.kv_cache_groups[0].kv_cache_spec.block_size,
        model_dtype=config.model_config.dtype,
        writes=writes(config, store.namespace.layout),
        warm_tokens=warm_tokens,
    )


def keeps_kv_on_device() -> bool:
    """Whether the engine's blocks are a GPU's."""
    return not current_platform.is_cpu()


def steps_without_requests() -> bool:
    """Whether the engine goes on after its last answer as long as blocks are held: not in its caller's own process."""
    return bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)


def _make_meter(options: Options, path: Path) -> PrefillMeter:
    if options.prefill_tokens_per_s is not None:
        return PrefillMeter(given=PrefillSpeed(1 / options.prefill_tokens_per_s))
    return PrefillMeter(prior=recall(path))


def _remember(path: Path, meter: PrefillMeter) -> None:
    if meter.measured is not None:
        remember(path, meter.measured)


async def _remember_now_and_then(path: Path, meter: PrefillMeter) -> None:
    while True:
        await asyncio.sleep(_REMEMBER_EVERY_S)
        await asyncio.to_thread(_remember, path, meter)


async def _get_ready(kv: KVStore, health: StoreHealth | None = None) -> None:
    """Do what the first request would wait for: make the client, find credentials, open connections, list markers.

    `health` is the scheduler's, which says it where the store is out; the workers need not say it too.
    """
    if health is not None:
        await health.check()
        if not health.available:
            return
    with suppress(KVStoreError):
        await kv.objects.probe()
        name = f"{kv.namespace.hex}/namespace.json"
        if health is not None:
            await asyncio.gather(*[kv.objects.head(name) for _ in range(_CONNECTIONS)])
            await kv.lookup_keys([bytes(KEY_BYTES)])  # of no prompt
        else:
            reads = [kv.objects.get_range(name, 0, memoryview(bytearray(1))) for _ in range(_CONNECTIONS)]
            await asyncio.gather(*reads, return_exceptions=True)  # in a new store, there is nothing to read


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
