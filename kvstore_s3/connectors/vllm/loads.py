"""Loads on the worker: from the store into the engine's blocks, layer group by layer group."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import torch

from kvstore_s3.codec.device.streams import Mark
from kvstore_s3.connectors.vllm.blocks import Blocks, PagesReady
from kvstore_s3.connectors.vllm.following import Follower
from kvstore_s3.connectors.vllm.gates import LayerGate
from kvstore_s3.connectors.vllm.health import StoreHealth, late, log
from kvstore_s3.connectors.vllm.messages import LoadOrder, LoadReport
from kvstore_s3.connectors.vllm.plans import TokenRange, floor_to
from kvstore_s3.device_load import DevicePlace
from kvstore_s3.errors import DeviceError, KVStoreError
from kvstore_s3.hits import Hit
from kvstore_s3.load import StoredChunk
from kvstore_s3.quality import worst_quality
from kvstore_s3.store import KVStore
from kvstore_s3.transfer.ranges import Band


@dataclass(slots=True)
class LoadUnderWay:
    """A load on this rank. The request's first `good` tokens are in the engine's blocks, in all layers of the rank.

    Pages are written once `pages_ready` is set: at the start of a step, the engine may still be clearing them.
    """

    order: LoadOrder
    pages_ready: PagesReady
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

    A load ends only when the last write into its blocks has: once `on_end` was called, the engine may do with them what
    it likes.
    """

    def __init__(
        self,
        kv: KVStore,
        blocks: Blocks,
        health: StoreHealth,
        follower: Follower,
        *,
        deadline_s: float,
        stall_s: float,
        on_end: Callable[[LoadUnderWay], None],
    ) -> None:
        self._kv = kv
        self._blocks = blocks
        self._health = health
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
        except DeviceError as error:  # the store is not to blame
            load.reason = "device"
            self._tell_once(logging.WARNING, f"KV is not loaded, for {error}; such prompts are computed")
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
                if load.good < floor_to(wanted, self._blocks.block_tokens):
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
        order, block_tokens = load.order, self._blocks.block_tokens
        begin, good, layers, quality = load.good, load.good, 0, "lossless"
        pace = None if order.follow else order.pace  # who follows has chosen to wait
        size = self._kv.namespace.chunk_tokens
        at_once = size % block_tokens == 0  # each chunk has blocks of its own, written as soon as it is there

        async def write(layer_begin: int, number: int, values: torch.Tensor) -> None:
            await self._write(load, layer_begin, first_token + number * size, values, begin)

        shown: list[Future[None]] = []
        alone = order.by_layer and all(len(chunk.tiles) == 1 for chunk in hit.chunks)

        def find_place(band: Band, number: int) -> DevicePlace | None:
            chunk = TokenRange(first_token + number * size, first_token + (number + 1) * size)
            if not begin <= chunk.begin < chunk.end <= order.tokens.end:
                return None  # others have a part of its blocks
            show = partial(_show, load.gate, shown, band, len(hit.chunks)) if alone else None
            return self._blocks.place(band, self._block_ids(load, chunk), load.pages_ready, show)

        groups = self._kv.stream(
            hit,
            pace=pace,
            by_layer=order.by_layer,
            sink=write if at_once else None,
            find_place=find_place if at_once and self._blocks.decoder else None,
            device=self._blocks.decoder,
        )
        async with asyncio.timeout(self._deadline_s), aclosing(groups):
            async for group in groups:
                good = floor_to(min(first_token + group.tokens, order.tokens.end), block_tokens)
                if good <= begin:
                    return
                if not at_once:
                    await self._write(load, group.layer_begin, first_token, group.kv, begin)
                layers, quality = group.layer_end, worst_quality((quality, group.quality))
                load.gate.advance(layers)
        if any(map(_has_failed, shown)):
            return  # the step may have used what was not sound, even where it was read anew
        if layers == self._blocks.layer_end:
            load.good, load.quality = good, worst_quality((load.quality, quality))

    async def _write(
        self, load: LoadUnderWay, layer_begin: int, first_token: int, kv: torch.Tensor, begin: int
    ) -> None:
        """Write the whole blocks of `kv`, which holds the tokens from `first_token` on, that lie behind `begin`."""
        begin = max(begin, first_token)
        end = floor_to(min(first_token + kv.shape[2], load.order.tokens.end), self._blocks.block_tokens)
        if begin >= end:
            return
        values = kv[:, :, begin - first_token : end - first_token]
        block_ids = self._block_ids(load, TokenRange(begin, end))
        await self._blocks.write(layer_begin, values, block_ids, load.pages_ready)

    def _block_ids(self, load: LoadUnderWay, tokens: TokenRange) -> tuple[int, ...]:
        """The blocks of the order that hold `tokens`, whole blocks."""
        first, size = load.order.tokens.begin, self._blocks.block_tokens
        return load.order.block_ids[(tokens.begin - first) // size : (tokens.end - first) // size]

    def _key_at(self, order: LoadOrder, token: int) -> bytes:
        return order.keys[(token - order.first_token) // self._kv.namespace.chunk_tokens]

    def _tell_quality(self, hit: Hit) -> None:
        """Say once of each lossy quality that it is used."""
        if hit.quality != "lossless":
            self._tell_once(logging.INFO, f"KV of quality {hit.describe_quality()} is loaded from the store")

    def _tell_once(self, level: int, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            log.log(level, "%s", line)


def _show(
    gate: LayerGate, shown: list[Future[None]], band: Band, shares: int, decoding: Future[None], marks: Sequence[Mark]
) -> None:
    """A chunk's share of a band is in the device's queue: the step may go on, and its own queue waits."""
    shown.append(decoding)
    gate.note_queued(band.layer_begin, band.layer_end, marks, shares=shares)


def _has_failed(decoding: Future[None]) -> bool:
    return decoding.done() and not decoding.cancelled() and decoding.exception() is not None


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
