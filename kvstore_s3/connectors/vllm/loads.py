"""Loads on the worker: from the store into the engine's blocks, layer group by layer group."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

import torch

from kvstore_s3.connectors.vllm.following import Follower
from kvstore_s3.connectors.vllm.health import StoreHealth, late, log
from kvstore_s3.connectors.vllm.messages import LoadOrder, LoadReport
from kvstore_s3.connectors.vllm.paged import PagedCache
from kvstore_s3.connectors.vllm.plans import floor_to
from kvstore_s3.errors import KVStoreError
from kvstore_s3.hits import Hit
from kvstore_s3.load import StoredChunk, in_thread
from kvstore_s3.quality import worst_quality
from kvstore_s3.store import KVStore


class LayerGate:
    """How far a load has come, for the thread that computes layer after layer and needs their KV."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._layers = 0
        self._ended = False

    def advance(self, layers: int) -> None:
        """Layers below `layers`, in the model's numbers, are there."""
        with self._changed:
            self._layers = layers
            self._changed.notify_all()

    def end(self) -> None:
        """The load has ended, well or not: nobody need wait any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, layer: int) -> None:
        """Return once `layer` is there or the load has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or layer < self._layers)

    def wait_for_end(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended)


@dataclass(slots=True)
class LoadUnderWay:
    """A load on this rank. The request's first `good` tokens are in the engine's blocks, in all layers of the rank.

    Pages are written once `pages_ready` is set: at the start of a step, the engine may still be clearing them.
    """

    order: LoadOrder
    pages_ready: threading.Event
    gate: LayerGate
    good: int
    quality: str = "lossless"
    reason: str | None = None
    near: bool = False
    begun: float = 0.0
    ended: float = 0.0
    task: asyncio.Task[None] | None = None
    revoked: bool = False

    def report(self) -> LoadReport:
        good, reason = (self.order.tokens.begin, "aborted") if self.revoked else (self.good, self.reason)
        if good == self.order.tokens.end:
            reason = None
        return LoadReport(self.order.request_id, good, reason, self.quality, self.ended - self.begun, self.near)


class Loader:
    """Carries out load orders. All methods run on the event loop.

    Blocks are written by `writer`, and a load ends only when its last write has: once `on_end` was called, the engine
    may do with the blocks what it likes. A thread of `waiter` waits for the engine to have its pages ready.
    """

    def __init__(
        self,
        kv: KVStore,
        cache: PagedCache,
        health: StoreHealth,
        writer: ThreadPoolExecutor,
        waiter: ThreadPoolExecutor,
        follower: Follower,
        *,
        deadline_s: float,
        stall_s: float,
        on_end: Callable[[LoadUnderWay], None],
    ) -> None:
        self._kv = kv
        self._cache = cache
        self._health = health
        self._writer = writer
        self._waiter = waiter
        self._follower = follower
        self._deadline_s = deadline_s
        self._stall_s = stall_s
        self._on_end = on_end
        self._told: set[str] = set()

    async def load(self, load: LoadUnderWay) -> None:
        """Carry out one order; `on_end` is called in any case, once."""
        load.begun = time.monotonic()
        load.task = fill = asyncio.create_task(self._fill(load))
        if load.revoked:
            fill.cancel()
        try:
            await fill
        except TimeoutError:
            load.reason = "late"
            self._health.report(late("load", self._deadline_s))
        except KVStoreError as error:
            load.reason = "store-out"
            self._health.report(error)
        except asyncio.CancelledError:
            if not fill.cancelled() or _is_cancelling():
                raise
        finally:
            load.ended = time.monotonic()  # the engine may take a long step before it hears of it
            self._on_end(load)  # first, so that who waits for the gate finds it done
            load.gate.end()

    async def revoke(self, load: LoadUnderWay) -> None:
        """End a load that nobody wants any more; its blocks are still held until `on_end`, and count as not filled."""
        load.revoked = True
        if load.task is not None:
            load.task.cancel()

    async def _fill(self, load: LoadUnderWay) -> None:
        """Write all layers of the order's tokens, as far as they are there and good."""
        async with aclosing(self._hits(load)) as hits:
            async for first_token, hit in hits:
                wanted = min(first_token + hit.tokens, load.order.tokens.end)
                await self._fill_hit(load, first_token, hit)
                self._tell_quality(hit)
                if load.good < floor_to(wanted, self._cache.block_tokens):
                    lost = self._kv.is_lost(self._key_at(load.order, load.good))
                    load.reason = "damaged" if lost else "given-up"
                    return
        load.reason = "stalled" if load.order.follow else None

    async def _hits(self, load: LoadUnderWay) -> AsyncGenerator[tuple[int, Hit], None]:
        """Hits and the tokens they begin at; each begins with the chunk that holds the first token still missing."""
        order, size = load.order, self._kv.namespace.chunk_tokens
        if not order.follow:
            hit = self._kv.hit_of(order.places)
            load.near = self._kv.is_near(hit)
            yield order.first_token, hit
            return
        chunks: list[StoredChunk] = []
        arrivals = self._follower.follow(
            order.keys,
            chunk_tokens=size,
            stall_s=self._stall_s,
            first_token=order.first_token,
            speed=None if order.pace is None else order.pace.prefill,
        )
        async with aclosing(arrivals) as hits:
            async for hit in hits:
                chunks += hit.chunks
                skipped = (load.good - order.first_token) // size
                yield order.first_token + skipped * size, self._kv.make_hit(chunks[skipped:])

    async def _fill_hit(self, load: LoadUnderWay, first_token: int, hit: Hit) -> None:
        """Write one hit; `load.good` grows only where all layers are there."""
        order, block_tokens = load.order, self._cache.block_tokens
        begin, good, layers, quality = load.good, load.good, 0, "lossless"
        pace = None if order.follow else order.pace  # who follows has chosen to wait
        size = self._kv.namespace.chunk_tokens
        at_once = size % block_tokens == 0  # each chunk has blocks of its own, written as soon as it is there

        async def write(layer_begin: int, number: int, values: torch.Tensor) -> None:
            await self._write(load, layer_begin, first_token + number * size, values, begin)

        groups = self._kv.stream(hit, pace=pace, by_layer=order.by_layer, sink=write if at_once else None)
        async with asyncio.timeout(self._deadline_s), aclosing(groups):
            async for group in groups:
                good = floor_to(min(first_token + group.tokens, order.tokens.end), block_tokens)
                if good <= begin:
                    return
                if not at_once:
                    await self._write(load, group.layer_begin, first_token, group.kv, begin)
                layers, quality = group.layer_end, worst_quality((quality, group.quality))
                load.gate.advance(layers)
        if layers == self._cache.layer_end:
            load.good, load.quality = good, worst_quality((load.quality, quality))

    async def _write(
        self, load: LoadUnderWay, layer_begin: int, first_token: int, kv: torch.Tensor, begin: int
    ) -> None:
        """Write the whole blocks of `kv`, which holds the tokens from `first_token` on, that lie behind `begin`."""
        tokens, block_tokens = load.order.tokens, self._cache.block_tokens
        begin = max(begin, first_token)
        end = floor_to(min(first_token + kv.shape[2], tokens.end), block_tokens)
        if begin >= end:
            return
        if not load.pages_ready.is_set():
            await in_thread(self._waiter, load.pages_ready.wait)
        blocks = slice((begin - tokens.begin) // block_tokens, (end - tokens.begin) // block_tokens)
        values = kv[:, :, begin - first_token : end - first_token]
        await in_thread(self._writer, self._cache.write, layer_begin, values, load.order.block_ids[blocks])

    def _key_at(self, order: LoadOrder, token: int) -> bytes:
        return order.keys[(token - order.first_token) // self._kv.namespace.chunk_tokens]

    def _tell_quality(self, hit: Hit) -> None:
        """Say once of each lossy quality that it is used."""
        found = hit.describe_quality()
        if hit.quality != "lossless" and found not in self._told:
            self._told.add(found)
            log.info("KV of quality %s is loaded from the store", found)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
