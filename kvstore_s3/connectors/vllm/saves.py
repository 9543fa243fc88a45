"""Saves on the worker: what was copied out of the engine's blocks is encoded and uploaded in the background."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Container, Iterable

import torch

from kvstore_s3.codec.device.sources import RevokedError, Source
from kvstore_s3.connectors.vllm.health import StoreHealth
from kvstore_s3.connectors.vllm.messages import SaveOrder, SaveReport
from kvstore_s3.connectors.vllm.stats import Tally
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import KVStoreError, StoreBusyError
from kvstore_s3.store import KVStore


class SaveBudget:
    """Bytes of KV that wait in memory to be saved, at most `limit`, or one save if that is more. For one thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def take(self, size: int) -> bool:
        if self._taken and self._taken + size > self._limit:
            return False
        self._taken += size
        return True

    def give_back(self, size: int) -> None:
        self._taken -= size

    @property
    def taken(self) -> int:
        return self._taken


class ReadLater:
    """Saves that still read a device's blocks, and requests that have ended and whose blocks are held for them."""

    def __init__(self) -> None:
        self._reading: dict[int, tuple[str, Source]] = {}
        self._held: set[str] = set()
        self._lock = threading.Condition()  # saves end on the event loop

    def begin(self, order: SaveOrder, source: Source) -> None:
        with self._lock:
            self._reading[order.save_id] = (order.request_id, source)

    def end(self, order: SaveOrder, _: object = None) -> None:
        """The save reads no more, or never will. Further calls do nothing."""
        with self._lock:
            self._reading.pop(order.save_id, None)
            self._lock.notify_all()

    def wait(self) -> None:
        """Until nothing is read any more."""
        with self._lock:
            self._lock.wait_for(lambda: not self._reading)

    def sources_of(self, request_ids: Container[str]) -> list[Source]:
        with self._lock:
            return [source for request_id, source in self._reading.values() if request_id in request_ids]

    def hold(self, request_ids: Iterable[str]) -> None:
        """These requests have ended, and wait for `take_unread`."""
        self._held.update(request_ids)

    def take_unread(self) -> set[str]:
        """Those of them whose blocks nothing reads any more."""
        if not self._held:
            return set()
        with self._lock:
            unread = self._held - {request_id for request_id, _ in self._reading.values()}
        self._held -= unread
        return unread


_AT_ONCE = 4
"""Saves at a time: `KVStore.save_keys` encodes and uploads the chunks of one in parallel, but waits for the store in
between."""


class Saver:
    """Carries out saves, in the order they come."""

    def __init__(
        self,
        kv: KVStore,
        health: StoreHealth,
        tally: Tally,
        *,
        on_read: Callable[[SaveOrder], None],
        on_end: Callable[[SaveReport, int], None],
    ) -> None:
        self._kv = kv
        self._health = health
        self._tally = tally
        self._on_read = on_read
        self._on_end = on_end
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def save(self, order: SaveOrder, kv: torch.Tensor | DeviceKV) -> None:
        """Save `kv`, the order's tokens; `on_end` is called in any case, once, with the bytes that `kv` held.

        What is on a device is read first, whatever the store does, and `on_read` called, once, when it need not stay.
        """
        report = SaveReport(order.save_id, "failed")
        try:
            if isinstance(kv, DeviceKV):
                await self._take(order, kv)
            async with self._turns:
                report = await self._try_save(order, kv)
        except RevokedError:
            report = SaveReport(order.save_id, "shed")
        except KVStoreError as error:
            self._health.report_save(error)
        finally:
            self._on_end(report, kv.nbytes)

    async def _take(self, order: SaveOrder, kv: DeviceKV) -> None:
        try:
            if not self._health.available:
                kv.source.revoke()  # its blocks go to others now: not to be read even if the store is back
            await self._kv.take(kv, first_token=order.tokens.begin, prefix_quality=order.quality)
        finally:
            self._on_read(order)

    async def _try_save(self, order: SaveOrder, kv: torch.Tensor | DeviceKV) -> SaveReport:
        if not self._health.available:
            return SaveReport(order.save_id, "shed")
        begun = time.monotonic()
        try:
            saved = await self._kv.save_keys(
                order.keys, kv, first_token=order.tokens.begin, prefix_quality=order.quality
            )
        except StoreBusyError:  # writes are put off while reads go on
            return SaveReport(order.save_id, "shed")
        self._tally.observe("kvstore_save_seconds", time.monotonic() - begun)
        tokens = saved.chunks_new * self._kv.namespace.chunk_tokens
        return SaveReport(order.save_id, "stored", tokens, saved.bytes)
