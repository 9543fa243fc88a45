"""A library of kernels that counts what it is given, and a store whose KV lies in a device's memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from partitions import CHUNK, LAYOUT

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.codec.device.library import Library, Pages
from kvstore_s3.errors import DeviceError
from kvstore_s3.layout import Shard


class CountingLibrary(Library):
    """Counts the streams of codec 1 that kernels decoded, the calls to encode it and the heads these were given, and
    the calls to encode codec 3; fails instead once it is told to.
    """

    jobs = calls = heads = lossy_calls = 0
    broken = False

    def call(self, name: str, *arguments: object) -> None:
        if name == "kvs_scalable_encode":
            if self.broken:
                raise DeviceError("kvs_scalable_encode failed with CUDA error 700")
            self.lossy_calls += 1
        super().call(name, *arguments)

    def lossless_decode(self, jobs: int, count: int, pages: Pages, faults: int, stream: int) -> None:
        if self.broken:
            raise DeviceError("kvs_lossless_decode failed with CUDA error 700")
        self.jobs += count
        super().lossless_decode(jobs, count, pages, faults, stream)

    def lossless_encode(self, jobs: int, count: int, pages: Pages, lengths: int, stream: int) -> None:
        if self.broken:
            raise DeviceError("kvs_lossless_encode failed with CUDA error 700")
        self.calls += 1
        self.heads += count
        super().lossless_encode(jobs, count, pages, lengths, stream)


@asynccontextmanager
async def opened(
    path: Path, layout: KVLayout = LAYOUT, shard: Shard | None = None, **overrides: object
) -> AsyncIterator[KVStore]:
    namespace = Namespace(model="parted", revision="1", layout=layout, chunk_tokens=CHUNK)
    settings = Settings(**({"layer_group": 2} | overrides))
    async with KVStore.open(f"file://{path}", namespace, settings, shard=shard) as store:
        yield store
