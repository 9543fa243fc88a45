"""What a save writes: the namespace's description and marker, and the objects of the chunks that are not there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from kvstore_s3.bitstream import HINT_NAME, Identity, encode_hint
from kvstore_s3.calibrations import Calibrations
from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import LEVELS
from kvstore_s3.config import Settings
from kvstore_s3.device_save import DeviceCoding, DeviceKV
from kvstore_s3.encode import CodedChunk, Encoding, complete_object, encode_object
from kvstore_s3.errors import InvalidArgumentError, StoreRefusedError
from kvstore_s3.hits import Saved
from kvstore_s3.inspection import object_key
from kvstore_s3.layout import KVLayout, Shard
from kvstore_s3.load import in_thread
from kvstore_s3.loader import Loader
from kvstore_s3.lookup import ChunkFinder
from kvstore_s3.metrics import Count
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.guarded import GuardedStore
from kvstore_s3.quality import Quality, find_quality
from kvstore_s3.section_index import SectionTable
from kvstore_s3.shards import KnownShards
from kvstore_s3.transfer.uploader import Uploader, UploadJob

log = logging.getLogger("kvstore_s3")

_Job = UploadJob[tuple[bytearray, SectionTable], int]


class Saver:
    """Writes chunks of one namespace and one rectangle of its model. For one event loop."""

    def __init__(
        self,
        objects: ObjectStore,
        namespace: Namespace,
        quality: Quality,
        settings: Settings,
        *,
        finder: ChunkFinder,
        loader: Loader,
        shards: KnownShards,
        calibrations: Calibrations,
        count: Count,
    ) -> None:
        self._objects = objects
        self._namespace = namespace
        self._quality = quality
        self._layer_group = settings.layer_group
        self._finder = finder
        self._loader = loader
        self._shards = shards
        self._calibrations = calibrations
        scalable = quality.object_profile == "scalable"
        layout = namespace.layout
        self._rotation = Rotation.from_layout(layout) if scalable else Rotation.none(layout.layers)
        cores = settings.codec_threads or os.cpu_count() or 1
        self._encoders = ThreadPoolExecutor(cores, "kvstore-s3-encode")  # apart: a load does not wait for a save
        self._uploader = Uploader(settings.upload_concurrency, settings.upload_bytes, count, encoders=cores)
        self._described = self._told_misfit = False

    async def take(self, kv: DeviceKV, shard: Shard, *, first_token: int, prefix_quality: str) -> None:
        """Read whole chunks of the rectangle `shard` off their device; see `KVStore.take`."""
        scalable = self._quality.object_profile == "scalable"
        coding = None
        if self._calibrations.asked or not scalable:  # the store may be slow: it is not asked now
            encoding = self._make_encoding(prefix_quality, shard, self._calibrations.last if scalable else None)
            coding = self._device_coding(encoding, shard, first_token)
        await kv.take_all(self._namespace.chunk_tokens, coding)

    async def save(
        self, chunks: Sequence[Identity], kv: torch.Tensor | DeviceKV, *, first_token: int, prefix_quality: str
    ) -> Saved:
        """Store those of `chunks`, the first at position `first_token`, that are not there; see `KVStore.save`.

        `kv` [layers, 2, tokens, heads, dim] is the rectangle that `chunks` name.
        """
        size = self._namespace.chunk_tokens
        found = await self._finder.find_all(
            chunks, stop_at_miss=False, thorough=True, first_token=first_token, fresh=True
        )
        missing = [index for index, chunk in enumerate(found) if chunk is None]
        damaged = {index for index in missing if self._finder.is_lost(chunks[index])}
        encoding = await self._choose_encoding(prefix_quality, chunks[0].shard) if missing else None
        if encoding is None:
            if chunks:  # the marker may have been removed with old objects
                with suppress(StoreRefusedError):  # by whom nothing new is written either
                    await self._shards.mark(chunks[0].shard)
            return Saved(0, len(chunks), 0, self._quality.name)
        if isinstance(self._objects, GuardedStore):
            self._objects.check_writable()
        await self._describe_namespace(chunks[0].shard)

        def jobs() -> Iterable[_Job]:
            for index in missing:
                position = first_token + index * size
                yield self._upload_job(chunks[index], kv, index * size, position, encoding, replace=index in damaged)

        written = await self._uploader.run(jobs())
        new = sum(1 for length in written if length)
        calibrated = encoding.calibrated if new else None
        return Saved(new, len(chunks) - new, sum(written), self._quality.name, calibrated)

    def close(self) -> None:
        """Release threads."""
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def _choose_encoding(self, prefix_quality: str, shard: Shard) -> Encoding:
        scalable = self._quality.object_profile == "scalable"
        return self._make_encoding(prefix_quality, shard, await self._calibrations.current() if scalable else None)

    def _make_encoding(
        self, prefix_quality: str, shard: Shard, calibration: tuple[bytes, Calibration] | None
    ) -> Encoding:
        if calibration is not None and not fits_shard(calibration[1], shard, self._namespace.layout):
            if not self._told_misfit:
                self._told_misfit = True
                log.info("%s is no part that the current calibration can code alone: it is coded without", shard.name)
            calibration = None
        prefix = find_quality(prefix_quality)
        levels = prefix.levels if prefix.object_profile == "scalable" else LEVELS
        return Encoding(self._quality, self._layer_group, self._rotation, calibration, levels)

    def _device_coding(self, encoding: Encoding, shard: Shard, first_token: int) -> DeviceCoding | None:
        """How KV on a device, its first token at position `first_token`, is coded there; None: not at all."""
        return None if self._quality.object_profile == "cachegen" else DeviceCoding(encoding, shard, first_token)

    def _upload_job(
        self,
        identity: Identity,
        kv: torch.Tensor | DeviceKV,
        begin: int,
        first_token: int,
        encoding: Encoding,
        *,
        replace: bool,
    ) -> _Job:
        """Encode and put one chunk, the tokens of `kv` from `begin` on, which is at position `first_token`.

        The job's result is its bytes, or 0 where another writer was first.
        """
        key, tokens = object_key(identity), self._namespace.chunk_tokens

        async def encode() -> tuple[bytearray, SectionTable]:
            if isinstance(kv, DeviceKV):
                coding = self._device_coding(encoding, identity.shard, first_token - begin)
                values = await kv.take(begin, tokens, coding)
                if isinstance(values, CodedChunk):
                    _check_position(values, first_token)
                    return await in_thread(self._encoders, complete_object, identity, values)
            else:
                values = kv[:, :, begin : begin + tokens]
            return await in_thread(self._encoders, encode_object, identity, values, encoding, first_token)

        async def put(encoded: tuple[bytearray, SectionTable]) -> int:
            data, table = encoded
            hint = encode_hint(table)
            metadata = {HINT_NAME: hint} if hint else None
            created = await self._objects.put(key, memoryview(data), metadata=metadata, replace=replace)
            await self._remove_broken(identity)
            self._finder.mend(identity)
            if replace:
                self._loader.tiers.drop(key)
            if created:
                self._loader.keep(key, table, data)
            return len(data) if created else 0

        return UploadJob(encode, kv.nbytes // kv.shape[2] * tokens, put, size=lambda encoded: len(encoded[0]))

    async def _remove_broken(self, identity: Identity) -> None:
        """Remove the object of another rectangle that lost the chunk: nobody else may ever write it anew."""
        broken = self._finder.find_broken(identity)
        if broken is None:
            return
        key = object_key(broken)
        self._loader.tiers.drop(key)
        try:
            await self._objects.delete(key)
        except StoreRefusedError as error:
            log.warning("%s is damaged and cannot be removed: %s", key, error)

    async def _describe_namespace(self, shard: Shard) -> None:
        """Put the namespace's JSON beside the data, once, for people, and the shard's marker, for readers."""
        if not self._described:
            name = self._namespace
            await self._objects.put(f"{name.hex}/namespace.json", name.to_json().encode("ascii"))
            self._described = True
        await self._shards.mark(shard)


def _check_position(taken: CodedChunk, first_token: int) -> None:
    if taken.first_token != first_token:
        raise InvalidArgumentError(
            f"a chunk was taken as of position {taken.first_token}, and is saved as of {first_token}; give both the "
            "same first_token"
        )


def fits_shard(calibration: Calibration, shard: Shard, layout: KVLayout) -> bool:
    """Whether `shard` divides into layer groups of the calibration, with all heads where it codes across heads."""
    if calibration.span == "all" and shard.heads != layout.kv_heads:
        return False
    ends_well = shard.layer_end == layout.layers or shard.layer_end % calibration.layer_group == 0
    return shard.layer_begin % calibration.layer_group == 0 and ends_well
