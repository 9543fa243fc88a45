"""Saves on the worker: what was copied out of the engine's blocks is encoded and uploaded in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import torch

from kvstore_s3.connectors.vllm.health import StoreHealth
from kvstore_s3.connectors.vllm.messages import SaveOrder, SaveReport
from kvstore_s3.connectors.vllm.stats import Tally
from kvstore_s3.errors import KVStoreError, StoreBusyError
from kvstore_s3.store import KVStore


class SaveBudget:
    """Bytes of KV that wait in memory to be saved, at most `limit`. For one thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def take(self, size: int) -> bool:
        if self._taken + size > self._limit:
            return False
        self._taken += size
        return True

    def give_back(self, size: int) -> None:
        self._taken -= size

    @property
    def taken(self) -> int:
        return self._taken


_AT_ONCE = 4
"""Saves at a time: `KVStore.save_keys` encodes and uploads the chunks of one in parallel, but waits for the store in
between."""


class Saver:
    """Carries out saves, in the order they come."""

    def __init__(
        self, kv: KVStore, health: StoreHealth, tally: Tally, *, on_end: Callable[[SaveReport, int], None]
    ) -> None:
        self._kv = kv
        self._health = health
        self._tally = tally
        self._on_end = on_end
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def save(self, order: SaveOrder, kv: torch.Tensor) -> None:
        """Save `kv`, the order's tokens; `on_end` is called in any case, once, with the bytes that `kv` held."""
        report = SaveReport(order.save_id, "failed")
        try:
            async with self._turns:
                report = await self._try_save(order, kv)
        finally:
            self._on_end(report, kv.nbytes)

    async def _try_save(self, order: SaveOrder, kv: torch.Tensor) -> SaveReport:
        if not self._health.available:
            return SaveReport(order.save_id, "shed")
        begun = time.monotonic()
        try:
            saved = await self._kv.save_keys(
                order.keys, kv, first_token=order.tokens.begin, prefix_quality=order.quality
            )
        except StoreBusyError:  # writes are put off while reads go on
            return SaveReport(order.save_id, "shed")
        except KVStoreError as error:
            self._health.report_save(error)
            return SaveReport(order.save_id, "failed")
        self._tally.observe("kvstore_save_seconds", time.monotonic() - begun)
        tokens = saved.chunks_new * self._kv.namespace.chunk_tokens
        return SaveReport(order.save_id, "stored", tokens, saved.bytes)
