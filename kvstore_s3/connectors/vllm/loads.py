"""Loads on the worker: from the store into the engine's blocks, layer group by layer group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from kvstore_s3.connectors.vllm.health import StoreHealth, log
from kvstore_s3.connectors.vllm.messages import LoadOrder
from kvstore_s3.connectors.vllm.paged import PagedCache
from kvstore_s3.connectors.vllm.plans import floor_to
from kvstore_s3.errors import KVStoreError, StoreUnavailableError
from kvstore_s3.hits import Hit
from kvstore_s3.load import in_thread
from kvstore_s3.store import KVStore


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A load has ended and will not write any more. The request's first `good` tokens are in the engine's blocks."""

    order: LoadOrder
    good: int


class Loader:
    """Carries out load orders. All methods run on the event loop.

    Blocks are written by `writer`, one thread, and a load ends only when its last write has: once `on_end` was called,
    the engine may do with the blocks what it likes.
    """

    def __init__(
        self,
        kv: KVStore,
        cache: PagedCache,
        health: StoreHealth,
        writer: ThreadPoolExecutor,
        *,
        deadline_s: float,
        on_end: Callable[[LoadResult], None],
    ) -> None:
        self._kv = kv
        self._cache = cache
        self._health = health
        self._deadline_s = deadline_s
        self._on_end = on_end
        self._fills: dict[str, asyncio.Task[int]] = {}
        self._writer = writer
        self._told: set[str] = set()

    async def load(self, order: LoadOrder) -> None:
        """Carry out one order; `on_end` is called in any case, once."""
        fill = asyncio.create_task(self._fill(order))
        self._fills[order.request_id] = fill
        good = order.tokens.begin
        try:
            async with asyncio.timeout(self._deadline_s):
                good = await fill
        except TimeoutError:
            self._health.report(StoreUnavailableError(f"a load took longer than {self._deadline_s} s"))
        except KVStoreError as error:
            self._health.report(error)
        except asyncio.CancelledError:
            if not fill.cancelled() or _is_cancelling():
                raise
        finally:
            del self._fills[order.request_id]
            self._on_end(LoadResult(order, good))

    async def abort(self, request_id: str) -> None:
        """End the load of a request that is gone; its blocks are still held until `on_end`."""
        fill = self._fills.get(request_id)
        if fill is not None:
            fill.cancel()

    async def _fill(self, order: LoadOrder) -> int:
        """Write all layers of the order's tokens; return up to which token all layers are good."""
        tokens, block_tokens = order.tokens, self._cache.block_tokens
        good, layers = tokens.begin, 0
        hit = order.to_hit(self._kv)
        async with aclosing(self._kv.stream(hit)) as groups:
            async for group in groups:
                good = floor_to(min(order.first_token + group.tokens, tokens.end), block_tokens)
                if good <= tokens.begin:
                    return tokens.begin
                kv = group.kv[:, :, tokens.begin - order.first_token : good - order.first_token]
                block_ids = order.block_ids[: (good - tokens.begin) // block_tokens]
                await in_thread(self._writer, self._cache.write, group.layer_begin, kv, block_ids)
                layers = group.layer_end
        self._tell_quality(hit)
        return good if layers == len(self._cache.layers) else tokens.begin

    def _tell_quality(self, hit: Hit) -> None:
        """Say once of each lossy quality that it is used."""
        found = hit.describe_quality()
        if hit.quality != "lossless" and found not in self._told:
            self._told.add(found)
            log.info("KV of quality %s is loaded from the store", found)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
