"""KVStore: lookup, load, stream, save. The only place where keys, codec, transfer and object store meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.arguments import check_boundary, check_hit, check_shard, check_values
from kvstore_s3.assembly import assemble
from kvstore_s3.bitstream import Identity
from kvstore_s3.codec.arithmetic import require_coder
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.config import Settings, load_settings
from kvstore_s3.device_load import Device
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.gauges import measure
from kvstore_s3.hashing import as_token_array, chunk_keys, root_key
from kvstore_s3.hits import Hit, LayerGroup, Saved
from kvstore_s3.inspection import object_key
from kvstore_s3.layout import Shard
from kvstore_s3.load import ChunkPlace, StoredChunk
from kvstore_s3.metrics import Counters
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.guarded import GuardedStore
from kvstore_s3.objectstore.open import open_store
from kvstore_s3.pace import Pace
from kvstore_s3.quality import check_dtype, describe_quality, find_quality, worst_quality
from kvstore_s3.streaming import PlaceFinder, Sink, Stream

__all__ = ["ChunkPlace", "Hit", "KVStore", "LayerGroup", "Pace", "Saved", "TokenIds"]

log = logging.getLogger("kvstore_s3")

TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor
"""Token ids from 0 to 2**32 - 1: a list, a numpy array, or a tensor; shape [n] or [1, n]."""


class KVStore:
    """KV caches of one namespace in one object store. Made by `open`; for one event loop.

    Values are torch tensors in the layout's dtype and the canonical order [layer, K or V, token, kv head, dim], on the
    CPU unless a load asks for another device. A damaged, missing, short or swapped object ends a hit before it; a store
    that does not answer raises a `StoreError`. `settings.profile` is the quality that is written and read; objects of a
    profile that it does not accept are misses, and a save replaces them.

    `shard` is the rectangle of layers x KV heads that this process holds: what is saved and what is loaded. A chunk is
    there when what anybody has written covers that rectangle, however the writers were partitioned.
    """

    def __init__(
        self,
        objects: ObjectStore,
        namespace: Namespace,
        settings: Settings,
        *,
        probe: bool,
        counters: Counters | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.namespace = namespace
        self.settings = settings
        self.counters = counters = counters or Counters()
        self.objects = objects
        self.quality = find_quality(settings.profile)
        check_dtype(self.quality, namespace.layout.dtype)
        self.shard = check_shard(shard, namespace)
        self._probe = probe
        parts = assemble(objects, namespace, self.quality, settings, self.shard, counters.add)
        self.calibrations = parts.calibrations
        self._loader = parts.loader
        self._shards = parts.shards
        self._finder = parts.finder
        self._saver = parts.saver
        self._told_lossy = False

    @classmethod
    def open(
        cls,
        url: str,
        namespace: Namespace,
        settings: Settings | None = None,
        *,
        probe: bool = True,
        shard: Shard | None = None,
    ) -> Self:
        """Open `url` (file:///dir, s3://bucket/prefix, memory://) for `async with`.

        `shard` is the rectangle that this process holds, one rank of an engine; None: the whole model.

        Entering raises `StoreRefusedError` or `StoreUnavailableError` where the store cannot be used, unless `probe`
        is False. A URL, shard or setting that cannot work raises `InvalidArgumentError`: a lossy profile with float8
        KV, or profile "cachegen" without torchac, for two (the latter when entering).
        """
        settings = settings or load_settings()
        counters = Counters()
        objects = GuardedStore(open_store(url, settings, counters.add), settings, counters.add)
        return cls(objects, namespace, settings, probe=probe, counters=counters, shard=shard)

    async def __aenter__(self) -> Self:
        try:
            if self.quality.object_profile == "cachegen":
                await asyncio.to_thread(require_coder)
            await self._loader.tiers.start()
            if self._probe:
                await self.objects.probe()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Release connections, memory and threads. Safe to call twice."""
        await self._shards.close()
        await self._loader.close()
        await self.objects.close()
        self._saver.close()

    async def lookup(self, token_ids: TokenIds, *, salt: str | bytes | None = None, thorough: bool = False) -> Hit:
        """The longest unbroken stored prefix of `token_ids`, in whole chunks.

        Asks for all chunks at once, at most `lookup_concurrency` in flight; what lies behind the first miss is not
        waited for any longer than what is in flight. `thorough` is for those who will not load the hit: it reads
        the headers of scalable objects too, and ends the hit before one whose calibration is not in the store. Raises
        `StoreError` where the store does not answer.
        """
        return await self.lookup_keys(self._keys(token_ids, salt), thorough=thorough)

    async def lookup_keys(self, keys: Sequence[bytes], *, first_token: int = 0, thorough: bool = False) -> Hit:
        """As `lookup`, of the chunks of these keys (see `hashing.chunk_keys`), which follow each other in a prompt.

        The first begins at position `first_token`, a chunk boundary; the hit's token 0 is that one.
        """
        check_boundary(first_token, self.namespace)
        found = await self._finder.find_all(
            [self._identity(key) for key in keys], stop_at_miss=True, thorough=thorough, first_token=first_token
        )
        length = next((index for index, chunk in enumerate(found) if chunk is None), len(found))
        chunks = tuple(chunk for chunk in found[:length] if chunk is not None)
        return self.make_hit(chunks)

    def make_hit(self, chunks: Sequence[StoredChunk]) -> Hit:
        """A hit of chunks that a lookup found, in this process or another, for this store's `load` and `stream`."""
        expected = tuple(chunk.quality(self.quality.levels) for chunk in chunks)
        return Hit(tuple(chunks), self.namespace.chunk_tokens, expected)

    def hit_of(self, places: Sequence[ChunkPlace]) -> Hit:
        """The hit of chunks that another process found: what `place` gave for each of them, in order.

        That process may hold another rectangle, if it has all of this one. Raises `InvalidArgumentError` otherwise.
        """
        return self.make_hit([self._chunk_of(place) for place in places])

    async def load(self, hit: Hit, *, pace: Pace | None = None, device: Device | None = None) -> torch.Tensor:
        """The hit's KV [layers, 2, tokens, kv_heads, head_dim]: bit for bit what was saved, or at `hit.quality`.

        Layers and heads are those of the store's rectangle.

        Fewer tokens than `hit.tokens`, down to none, where an object turned out damaged, short, swapped or gone, or
        where computing is faster than loading the rest: that is asked where `pace` says how fast computing is. With
        `device` "cuda" or such, compressed bytes travel to the GPU, and its kernels decode them, where the package was
        built with them. Raises `StoreError` where the store fails, and `DeviceError` where the device does.
        """
        check_hit(hit, self.namespace)
        decoder = self._loader.devices.decoder_for(device)
        out = self._loader.empty(self.shard.layers, hit.tokens, decoder)
        tokens = 0
        async with aclosing(self._stream(hit, 0, out, pace, decoder=decoder)) as groups:
            async for group in groups:
                tokens = group.tokens
        return out[:, :, :tokens]

    async def stream(
        self,
        hit: Hit,
        *,
        first_token: int = 0,
        pace: Pace | None = None,
        by_layer: bool = False,
        sink: Sink | None = None,
        find_place: PlaceFinder | None = None,
        device: Device | None = None,
    ) -> AsyncGenerator[LayerGroup, None]:
        """The hit's KV from `first_token` (a chunk boundary) on, group by group of layers in layer order.

        The next group is read and decoded while the caller works on this one. See `LayerGroup` for what damage does,
        and `load` for what `pace` and `device` do. No group at all comes where nothing is worth loading. `by_layer`:
        groups are as small as they can be. `sink` is awaited for each chunk's share of a group as soon as it is
        decoded, and has to copy it: memory is used again when it returns, and a group's own `kv` then has a shape, but
        no values. `find_place`, beside a sink, is asked first where on the device a chunk's share of a group is decoded
        to: into an engine's blocks, and the sink has nothing to do.
        """
        check_hit(hit, self.namespace)
        check_boundary(first_token, self.namespace)
        first_chunk = first_token // self.namespace.chunk_tokens
        decoder = self._loader.devices.decoder_for(device)
        stream = self._stream(
            hit, first_chunk, None, pace, by_layer=by_layer, sink=sink, find_place=find_place, decoder=decoder
        )
        async with aclosing(stream) as groups:
            async for group in groups:
                yield group

    async def save(
        self,
        token_ids: TokenIds,
        kv: torch.Tensor | DeviceKV,
        *,
        salt: str | bytes | None = None,
        first_token: int = 0,
        prefix_quality: str = "lossless",
    ) -> Saved:
        """Store the whole chunks of `token_ids` that `kv` covers and that are not there yet.

        `kv` [layers, 2, tokens, kv_heads, head_dim] in the layout's dtype, of the store's rectangle, holds the tokens
        from `first_token` (a chunk boundary) on, and must not change until the call returns. `prefix_quality` is that
        of the KV in front of it, which it was computed from: what was computed from "small" is stored as "small", and
        is a miss to readers of more. An object found damaged before, of a profile that the store's does not accept, or
        coded with a calibration that is not there is replaced, and counts as new. A scalable profile uses the
        namespace's current calibration, where it has one that fits the rectangle. Raises `StoreError` where the store
        fails; what was written by then is whole and stays. KV on a GPU, which the calling thread's stream computes, is
        coded there where the package was built for it: the same bytes.
        """
        tokens = as_token_array(token_ids)
        check_boundary(first_token, self.namespace)
        check_values(kv, self.namespace, self.shard)
        most = max(len(tokens) - first_token, 0)
        if kv.shape[2] > most:
            raise InvalidArgumentError(f"kv holds {kv.shape[2]} tokens, but only {most} token ids follow first_token")
        first, count = first_token // self.namespace.chunk_tokens, kv.shape[2] // self.namespace.chunk_tokens
        keys = self._keys(tokens, salt)[first : first + count]
        return await self.save_keys(keys, kv, first_token=first_token, prefix_quality=prefix_quality)

    async def save_keys(
        self,
        keys: Sequence[bytes],
        kv: torch.Tensor | DeviceKV,
        *,
        first_token: int = 0,
        prefix_quality: str = "lossless",
    ) -> Saved:
        """As `save`, by the keys of the whole chunks that `kv` has, the first of which begins at `first_token`."""
        check_boundary(first_token, self.namespace)
        check_values(kv, self.namespace, self.shard)
        count = kv.shape[2] // self.namespace.chunk_tokens
        if len(keys) != count:
            raise InvalidArgumentError(f"kv holds {count} whole chunks, but {len(keys)} keys were given")
        chunks = [self._identity(key) for key in keys]
        if isinstance(kv, torch.Tensor) and kv.device.type == "cuda":
            encoder = self._loader.devices.encoder_for(kv.device)
            kv = kv.detach()
            kv = kv if encoder is None else DeviceKV.of(kv if kv.stride(4) == 1 else kv.contiguous(), encoder)
        return await self._saver.save(chunks, kv, first_token=first_token, prefix_quality=prefix_quality)

    async def take(self, kv: DeviceKV, *, first_token: int = 0, prefix_quality: str = "lossless") -> None:
        """Read all of `kv` that `save_keys` will be given, as it will be given it, off its device: coded, or as it is.

        The store is not asked for anything: lossy profiles are coded on the device once a save has found out which
        calibration there is. When it returns or raises, nothing reads the device's memory any more. Raises
        `DeviceError`.
        """
        await self._saver.take(kv, self.shard, first_token=first_token, prefix_quality=prefix_quality)

    def encoder_for(self, device: Device | None) -> DeviceEncoder | None:
        """What encodes out of the memory of `device`; see `decoder_for`."""
        return self._loader.devices.encoder_for(device)

    def decoder_for(self, device: Device | None) -> DeviceDecoder | None:
        """What decodes into the memory of `device`, for as long as the store is open; None for the host.

        Raises `InvalidArgumentError` for a device of another kind than CUDA, and `DeviceError` where it is not there.
        """
        return self._loader.devices.decoder_for(device)

    async def warm_up(self, tokens: int) -> None:
        """Have the memory that a load of so many tokens into a sink takes before the first load waits for it."""
        await self._loader.warm_up(tokens)

    def is_near(self, hit: Hit) -> bool:
        """Whether the tiers on this machine will probably give all of the hit."""
        return bool(hit) and all(self._loader.is_near(chunk) for chunk in hit.chunks)

    def is_lost(self, key: bytes) -> bool:
        """Whether the chunk of this key turned out damaged, short, swapped or gone lately."""
        return self._finder.is_lost(self._identity(key))

    def expect_shards(self, shards: Iterable[Shard]) -> None:
        """Look for objects of these rectangles before any marker tells of them: those of an engine's own ranks."""
        self._shards.expect(shards)

    def stats(self) -> dict[str, float]:
        """Gauges of the moment, by name; see `gauges.measure`. Cheap, and for any thread."""
        return measure(self._loader, self.objects)

    def _keys(self, token_ids: TokenIds, salt: str | bytes | None) -> list[bytes]:
        return chunk_keys(root_key(self.namespace.digest, salt), token_ids, self.namespace.chunk_tokens)

    def _identity(self, key: bytes, shard: Shard | None = None) -> Identity:
        return Identity(
            self.namespace.digest, key, shard or self.shard, self.namespace.layout, self.namespace.chunk_tokens
        )

    def _chunk_of(self, place: ChunkPlace) -> StoredChunk:
        tiles = []
        for shard, table in place.tiles:
            identity = self._identity(place.key, shard)
            tiles.append(StoredChunk(object_key(identity), identity, table, None, place.first_token))
        return StoredChunk.join(tiles).within(self.shard)

    async def _stream(
        self,
        hit: Hit,
        first_chunk: int,
        out: torch.Tensor | None,
        pace: Pace | None,
        *,
        by_layer: bool = False,
        sink: Sink | None = None,
        find_place: PlaceFinder | None = None,
        decoder: DeviceDecoder | None = None,
    ) -> AsyncGenerator[LayerGroup, None]:
        chunks = hit.chunks[first_chunk:]
        if not chunks:
            return
        stream = self._loader.stream(
            chunks,
            out,
            on_lost=self._finder.lose,
            pace=pace,
            by_layer=by_layer,
            sink=sink,
            find_place=find_place,
            decoder=decoder,
        )
        async with aclosing(stream.run()) as bands:
            async for band, kv in bands:
                qualities, calibrated = self._learn(hit, stream)
                tokens = stream.good * self.namespace.chunk_tokens
                yield LayerGroup(band.layer_begin, band.layer_end, kv[:, :, :tokens], qualities, calibrated)

    def _learn(self, hit: Hit, stream: Stream) -> tuple[tuple[str, ...], tuple[bool | None, ...]]:
        """Quality of each chunk that was read, and whether it is calibrated; complete the hit, say lossy use once."""
        read, qualities = stream.chunks[: stream.good], stream.qualities
        calibrated = tuple(chunk.calibrated for chunk in read)
        hit.learn(read, qualities)
        worst = worst_quality(qualities)
        if worst != "lossless" and not self._told_lossy:
            self._told_lossy = True
            known = False if False in calibrated else None
            log.info("%s: lossy values are used, quality %s", self.objects.url, describe_quality(worst, known))
        return qualities, calibrated
