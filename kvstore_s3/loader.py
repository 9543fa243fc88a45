"""Everything a store's loads share: slabs, tiers, the link, threads. Streams are made here."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial

import torch

from kvstore_s3.bitstream import Identity
from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.config import Settings
from kvstore_s3.device_load import DevicePlace
from kvstore_s3.devices import Devices
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import KVLayout, Shard
from kvstore_s3.load import StoredChunk, in_thread
from kvstore_s3.metrics import Count
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.pace import Pace
from kvstore_s3.quality import Quality
from kvstore_s3.reader import Reader
from kvstore_s3.recycling import Recycler
from kvstore_s3.section_index import SectionTable
from kvstore_s3.shared_link import SharedLink
from kvstore_s3.streaming import PlaceFinder, Sink, Stream
from kvstore_s3.tiers import Tiers
from kvstore_s3.transfer.bandwidth import Bandwidth
from kvstore_s3.transfer.buffers import SlabPool
from kvstore_s3.transfer.hedging import HedgePolicy
from kvstore_s3.transfer.prefetcher import Prefetcher
from kvstore_s3.transfer.ranges import Band, plan_bands
from kvstore_s3.transfer.turns import Turns
from kvstore_s3.transfer.window import Window


class Loader:
    """Makes streams of chunks in `objects`, of the rectangle `shard` of `layout`. For one event loop."""

    def __init__(
        self,
        objects: ObjectStore,
        layout: KVLayout,
        shard: Shard,
        chunk_tokens: int,
        quality: Quality,
        settings: Settings,
        *,
        find_calibration: Callable[[bytes], Awaitable[Calibration | None]],
        count: Count,
    ) -> None:
        self._objects = objects
        self._layout = layout
        self._shard = shard
        self._chunk_tokens = chunk_tokens
        self._quality = quality
        self._settings = settings
        self._count = count
        cores = settings.codec_threads or os.cpu_count() or 1
        self._turns = Turns(settings.download_concurrency + cores)
        self._threads = ThreadPoolExecutor(cores, "kvstore-s3-decode")
        self.devices = Devices(settings)
        self._recycler = Recycler(settings.reuse_bytes)
        self.slabs = SlabPool(settings.buffer_bytes, pin=settings.pin_memory)
        self._written = 0  # bytes of objects on their way into the tiers
        self.link = SharedLink(Bandwidth())
        self.tiers = Tiers.open(settings, count)
        self._prefetcher = Prefetcher(
            self._read_range,
            self.slabs,
            Window(most=settings.download_concurrency),
            self.link.bandwidth,
            HedgePolicy(settings.hedge_ratio),
            count,
            max_bytes=2 * settings.range_bytes,
            gap_bytes=settings.gap_bytes,
        )
        self._reader = Reader(self._prefetcher, self.tiers, quality, self._threads, find_calibration, count)

    def stream(
        self,
        chunks: Sequence[StoredChunk],
        out: torch.Tensor | None,
        *,
        on_lost: Callable[[Identity, Exception, float], None],
        pace: Pace | None,
        by_layer: bool = False,
        sink: Sink | None = None,
        find_place: PlaceFinder | None = None,
        decoder: DeviceDecoder | None = None,
    ) -> Stream:
        """A load of `chunks` (one at least) into `out` [layers, 2, tokens, kv heads, head dim], or new memory.

        That is on the device of `decoder`, None: on the host. `by_layer`: bands are as small as they can be, for
        somebody begins with the first.
        """
        shard = self._shard
        chunks = [chunk.within(shard) for chunk in chunks]

        def allocate(band: Band, count: int) -> torch.Tensor:
            tokens = count * self._chunk_tokens
            if out is not None:
                return out[band.layer_begin - shard.layer_begin : band.layer_end - shard.layer_begin, :, :tokens]
            return self.empty(band.layer_end - band.layer_begin, tokens, decoder)

        tables = [tile.table for chunk in chunks for tile in chunk.tiles]
        # Each chunk's share of a band needs one slab, so it must fit into the pool; and the next one beside it.
        most = min(self._settings.range_bytes, self._settings.buffer_bytes // 2)
        if by_layer:
            most = 1
        elif pace is not None and not pace.by_layer:
            # The engine waits for all layers: a chunk that is whole is worth more than some layers of all chunks.
            most = max(most, self._settings.buffer_bytes // 4)
        return Stream(
            self._reader,
            self.link,
            chunks,
            plan_bands(tables, most, levels=self._quality.levels, within=Band(shard.layer_begin, shard.layer_end)),
            shard=shard,
            allocate=allocate,
            view=view_bits if decoder is None else partial(DevicePlace.of, decoder=decoder),
            on_lost=on_lost,
            sink=sink,
            find_place=find_place,
            turns=self._turns.of_load(),
            pace=pace,
            lowest_profile=self._settings.lowest_profile,
            count=self._count,
        )

    def is_near(self, chunk: StoredChunk) -> bool:
        """Whether the tiers on this machine will probably give all of a chunk."""
        tiles = chunk.tiles
        return all(self._reader.is_near(tile.object_key, 0, tile.table.object_length) for tile in tiles)

    async def warm_up(self, tokens: int) -> None:
        """Have the memory that a load of so many tokens into a sink takes before the first load waits for it."""
        size = 2 * self._shard.layers * self._chunk_tokens * self._shard.heads * self._layout.head_dim
        kept = self._settings.reuse_bytes // (size * self._layout.itemsize)
        chunks = min(-(-tokens // self._chunk_tokens), self._turns.most, kept)
        values = [self.empty(self._shard.layers, self._chunk_tokens) for _ in range(chunks)]
        slab = self.slabs.try_acquire(min(self.slabs.budget, 2 * self._settings.range_bytes))

        def touch() -> None:
            for chunk in values:
                chunk.view(torch.uint8).numpy().fill(0)  # torch would start threads of its own for it
            if slab is not None:
                slab.view[:] = bytes(len(slab.view))

        try:
            await in_thread(self._threads, touch)
        finally:
            if slab is not None:
                slab.release()

    def empty(self, layers: int, tokens: int, decoder: DeviceDecoder | None = None) -> torch.Tensor:
        """Memory for values [layers, 2, tokens, kv heads, head dim], which earlier values may have used."""
        shape = (layers, 2, tokens, self._shard.heads, self._layout.head_dim)
        dtype = getattr(torch, self._layout.dtype)
        return self._recycler.empty(shape, dtype) if decoder is None else decoder.empty(shape, dtype)

    def keep(self, key: str, table: SectionTable, data: bytearray) -> None:
        """Offer an object that was written to the tiers, unless they have fallen behind by as much as uploads may."""
        if not self.tiers or self._written + len(data) > self._settings.upload_bytes:
            return
        self._written += len(data)
        holding = AsyncExitStack()
        holding.callback(self._forget, len(data))
        self.tiers.keep_soon(key, table, [(0, memoryview(data))], holding)

    async def settle(self) -> None:
        """Wait until what was read and written is in the tiers."""
        await self.tiers.settle()

    async def close(self) -> None:
        """Release memory and threads, once the reads under way have ended."""
        await self._prefetcher.close()
        await self.tiers.close()
        await self.devices.close()
        self.slabs.close()
        self._recycler.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget(self, size: int) -> None:
        self._written -= size

    async def _read_range(self, key: str, start: int, into: memoryview) -> None:
        with self.link.reading(len(into)):
            await self._objects.get_range(key, start, into)
