"""KVStore: lookup, load, stream, save. The only place where keys, codec, transfer and object store meet."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.bitstream import HINT_NAME, Identity, encode_hint
from kvstore_s3.calibrations import Calibrations
from kvstore_s3.codec.arithmetic import require_coder
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import LEVELS
from kvstore_s3.config import Settings, load_settings
from kvstore_s3.encode import Encoding, encode_object
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hashing import as_token_array, chunk_keys, root_key
from kvstore_s3.hits import Hit, LayerGroup, Saved
from kvstore_s3.load import StoredChunk, in_thread
from kvstore_s3.loader import Loader
from kvstore_s3.lookup import ChunkFinder, object_key
from kvstore_s3.metrics import Counters
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.guarded import GuardedStore
from kvstore_s3.objectstore.open import open_store
from kvstore_s3.quality import check_dtype, describe_quality, find_quality, worst_quality
from kvstore_s3.section_index import SectionTable
from kvstore_s3.streaming import Pace, Stream
from kvstore_s3.transfer.uploader import Uploader, UploadJob

__all__ = ["Hit", "KVStore", "LayerGroup", "Pace", "Saved", "TokenIds"]

log = logging.getLogger("kvstore_s3")

TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor
"""Token ids from 0 to 2**32 - 1: a list, a numpy array, or a tensor; shape [n] or [1, n]."""


class KVStore:
    """KV caches of one namespace in one object store. Made by `open`; for one event loop.

    Values are torch tensors on the CPU, in the layout's dtype and the canonical order [layer, K or V, token, kv head,
    dim]. A damaged, missing, short or swapped object ends a hit before it; a store that does not answer raises a
    `StoreError`. `settings.profile` is the quality that is written and read; objects of a profile that it does not
    accept are misses, and a save replaces them.
    """

    def __init__(
        self,
        objects: ObjectStore,
        namespace: Namespace,
        settings: Settings,
        *,
        probe: bool,
        counters: Counters | None = None,
    ) -> None:
        self.namespace = namespace
        self.settings = settings
        self.counters = counters = counters or Counters()
        self.objects = objects
        self.quality = find_quality(settings.profile)
        check_dtype(self.quality, namespace.layout.dtype)
        self.calibrations = Calibrations(objects, namespace, lifetime_s=settings.verdict_lifetime_s)
        scalable = self.quality.object_profile == "scalable"
        layout = namespace.layout
        self._rotation = Rotation.from_layout(layout) if scalable else Rotation.none(layout.layers)
        self._probe = probe
        cores = settings.codec_threads or os.cpu_count() or 1
        self._encoders = ThreadPoolExecutor(cores, "kvstore-s3-encode")  # apart: a load does not wait for a save
        self._loader = Loader(
            objects,
            layout,
            namespace.chunk_tokens,
            self.quality,
            settings,
            find_calibration=self.calibrations.find,
            count=counters.add,
        )
        self._uploader = Uploader(settings.upload_concurrency, settings.upload_bytes, counters.add, encoders=cores)
        self._finder = ChunkFinder(
            self.objects,
            self.quality,
            find_calibration=self.calibrations.find,
            concurrency=settings.lookup_concurrency,
            verdict_lifetime_s=settings.verdict_lifetime_s,
            miss_lifetime_s=settings.miss_lifetime_s,
            read_local=self._loader.tiers.read_start,
            on_delay=self._loader.link.bandwidth.observe_delay,
            count=counters.add,
        )
        self._described = False
        self._told_lossy = False

    @classmethod
    def open(cls, url: str, namespace: Namespace, settings: Settings | None = None, *, probe: bool = True) -> Self:
        """Open `url` (file:///dir, s3://bucket/prefix, memory://) for `async with`.

        Entering raises `StoreRefusedError` or `StoreUnavailableError` where the store cannot be used, unless `probe`
        is False. A URL or setting that cannot work raises `InvalidArgumentError`: a lossy profile with float8 KV, or
        profile "cachegen" without torchac, for two (the latter when entering).
        """
        settings = settings or load_settings()
        counters = Counters()
        objects = GuardedStore(open_store(url, settings, counters.add), settings, counters.add)
        return cls(objects, namespace, settings, probe=probe, counters=counters)

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
        await self._loader.close()
        await self.objects.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def lookup(self, token_ids: TokenIds, *, salt: str | bytes | None = None, thorough: bool = False) -> Hit:
        """The longest unbroken stored prefix of `token_ids`, in whole chunks.

        Asks for all chunks at once, at most `lookup_concurrency` in flight; what lies behind the first miss is not
        waited for any longer than what is in flight. `thorough` is for those who will not load the hit: it reads
        the headers of scalable objects too, and ends the hit before one whose calibration is not in the store. Raises
        `StoreError` where the store does not answer.
        """
        found = await self._finder.find_all(self._identities(token_ids, salt), stop_at_miss=True, thorough=thorough)
        length = next((index for index, chunk in enumerate(found) if chunk is None), len(found))
        chunks = tuple(chunk for chunk in found[:length] if chunk is not None)
        return self.make_hit(chunks)

    def make_hit(self, chunks: Sequence[StoredChunk]) -> Hit:
        """A hit of chunks that a lookup found, in this process or another, for this store's `load` and `stream`."""
        expected = tuple(chunk.quality(self.quality.levels) for chunk in chunks)
        return Hit(tuple(chunks), self.namespace.chunk_tokens, expected)

    async def load(self, hit: Hit, *, pace: Pace | None = None) -> torch.Tensor:
        """The hit's KV [layers, 2, tokens, kv_heads, head_dim]: bit for bit what was saved, or at `hit.quality`.

        Fewer tokens than `hit.tokens`, down to none, where an object turned out damaged, short, swapped or gone, or
        where computing is faster than loading the rest: that is asked where `pace` says how fast computing is. Raises
        `StoreError` where the store fails.
        """
        self._check_hit(hit)
        out = self._loader.empty(self.namespace.layout.layers, hit.tokens)
        tokens = 0
        async with aclosing(self._stream(hit, 0, out, pace)) as groups:
            async for group in groups:
                tokens = group.tokens
        return out[:, :, :tokens]

    async def stream(
        self, hit: Hit, *, first_token: int = 0, pace: Pace | None = None
    ) -> AsyncGenerator[LayerGroup, None]:
        """The hit's KV from `first_token` (a chunk boundary) on, group by group of layers in layer order.

        The next group is read and decoded while the caller works on this one. See `LayerGroup` for what damage does,
        and `load` for what `pace` does. No group at all comes where nothing is worth loading.
        """
        self._check_hit(hit)
        self._check_boundary(first_token)
        async with aclosing(self._stream(hit, first_token // self.namespace.chunk_tokens, None, pace)) as groups:
            async for group in groups:
                yield group

    async def save(
        self,
        token_ids: TokenIds,
        kv: torch.Tensor,
        *,
        salt: str | bytes | None = None,
        first_token: int = 0,
        prefix_quality: str = "lossless",
    ) -> Saved:
        """Store the whole chunks of `token_ids` that `kv` covers and that are not there yet.

        `kv` [layers, 2, tokens, kv_heads, head_dim] in the layout's dtype holds the tokens from `first_token` (a chunk
        boundary) on, and must not change until the call returns. `prefix_quality` is that of the KV in front of it,
        which it was computed from: what was computed from "small" is stored as "small", and is a miss to readers of
        more. An object found damaged before, of a profile that the store's does not accept, or coded with a calibration
        that is not there is replaced, and counts as new. A scalable profile uses the namespace's current calibration,
        where it has one. Raises `StoreError` where the store fails; what was written by then is whole and stays.
        """
        tokens = as_token_array(token_ids)
        self._check_boundary(first_token)
        self._check_values(kv, len(tokens) - first_token)
        size = self.namespace.chunk_tokens
        first = first_token // size
        chunks = self._identities(tokens, salt)[first : first + kv.shape[2] // size]
        found = await self._finder.find_all(
            chunks, stop_at_miss=False, thorough=True, first_token=first_token, fresh=True
        )
        missing = [index for index, chunk in enumerate(found) if chunk is None]
        damaged = {index for index in missing if self._finder.is_lost(chunks[index])}
        encoding = await self._choose_encoding(prefix_quality) if missing else None
        if encoding is None:
            return Saved(0, len(chunks), 0, self.quality.name)
        if isinstance(self.objects, GuardedStore):
            self.objects.check_writable()
        await self._describe_namespace()

        def jobs() -> Iterable[UploadJob[tuple[bytearray, SectionTable], int]]:
            for index in missing:
                values = kv[:, :, index * size : (index + 1) * size]
                position = first_token + index * size
                yield self._upload_job(chunks[index], values, position, encoding, replace=index in damaged)

        written = await self._uploader.run(jobs())
        new = sum(1 for length in written if length)
        calibrated = encoding.calibrated if new else None
        return Saved(new, len(chunks) - new, sum(written), self.quality.name, calibrated)

    async def _choose_encoding(self, prefix_quality: str) -> Encoding:
        scalable = self.quality.object_profile == "scalable"
        calibration = await self.calibrations.current() if scalable else None
        prefix = find_quality(prefix_quality)
        levels = prefix.levels if prefix.object_profile == "scalable" else LEVELS
        return Encoding(self.quality, self.settings.layer_group, self._rotation, calibration, levels)

    def _identities(self, token_ids: TokenIds, salt: str | bytes | None) -> list[Identity]:
        keys = chunk_keys(root_key(self.namespace.digest, salt), token_ids, self.namespace.chunk_tokens)
        return [self._identity(key) for key in keys]

    def _identity(self, key: bytes) -> Identity:
        layout = self.namespace.layout
        return Identity(self.namespace.digest, key, layout.full_shard, layout, self.namespace.chunk_tokens)

    async def _stream(
        self, hit: Hit, first_chunk: int, out: torch.Tensor | None, pace: Pace | None
    ) -> AsyncGenerator[LayerGroup, None]:
        chunks = hit.chunks[first_chunk:]
        if not chunks:
            return
        stream = self._loader.stream(chunks, out, on_lost=self._finder.lose, pace=pace)
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

    def _upload_job(
        self, identity: Identity, kv: torch.Tensor, first_token: int, encoding: Encoding, *, replace: bool
    ) -> UploadJob[tuple[bytearray, SectionTable], int]:
        """Encode and put one chunk; the job's result is its bytes, or 0 where another writer was first."""
        key = object_key(identity)

        async def encode() -> tuple[bytearray, SectionTable]:
            return await in_thread(self._encoders, encode_object, identity, kv, encoding, first_token)

        async def put(encoded: tuple[bytearray, SectionTable]) -> int:
            data, table = encoded
            hint = encode_hint(table)
            metadata = {HINT_NAME: hint} if hint else None
            created = await self.objects.put(key, memoryview(data), metadata=metadata, replace=replace)
            self._finder.mend(identity)
            if replace:
                self._loader.tiers.drop(key)
            if created:
                self._loader.keep(key, table, data)
            return len(data) if created else 0

        return UploadJob(encode, kv.nbytes, put, size=lambda encoded: len(encoded[0]))

    async def _describe_namespace(self) -> None:
        """Put the namespace's JSON beside the data, once, for people."""
        if not self._described:
            await self.objects.put(f"{self.namespace.hex}/namespace.json", self.namespace.to_json().encode("ascii"))
            self._described = True

    def _check_boundary(self, first_token: int) -> None:
        if first_token < 0 or first_token % self.namespace.chunk_tokens:
            raise InvalidArgumentError(
                f"first_token {first_token} is not a multiple of chunk_tokens {self.namespace.chunk_tokens}"
            )

    def _check_hit(self, hit: Hit) -> None:
        """A hit of another store's namespace would decode to that model's KV, or into the wrong places."""
        size = self.namespace.chunk_tokens
        if hit.chunk_tokens != size or any(c.identity != self._identity(c.identity.key) for c in hit.chunks):
            raise InvalidArgumentError(
                "this hit is of another namespace; look the tokens up in the store that loads them"
            )

    def _check_values(self, kv: torch.Tensor, most: int) -> None:
        if not isinstance(kv, torch.Tensor) or kv.layout != torch.strided or kv.is_meta:
            raise InvalidArgumentError(f"kv must be a dense tensor with values, not {kv!r:.80}")
        layout = self.namespace.layout
        expected = (layout.layers, 2, layout.kv_heads, layout.head_dim)
        shape = tuple(kv.shape)
        if len(shape) != 5 or (*shape[:2], *shape[3:]) != expected:
            wanted = f"[{layout.layers}, 2, tokens, {layout.kv_heads}, {layout.head_dim}]"
            raise InvalidArgumentError(f"kv has shape {list(shape)}; this namespace's layout is {wanted}")
        if kv.dtype != getattr(torch, layout.dtype):
            raise InvalidArgumentError(f"kv is {kv.dtype}; this namespace holds {layout.dtype}")
        if shape[2] > max(most, 0):
            raise InvalidArgumentError(
                f"kv holds {shape[2]} tokens, but only {max(most, 0)} token ids follow first_token"
            )
