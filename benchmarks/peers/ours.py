"""This package's own object store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore_s3.config import Settings
from kvstore_s3.objectstore.open import open_store
from peers.base import Job, share_out


class Ours:
    """`plane`: as the setting data_plane."""

    def __init__(self, job: Job, plane: str) -> None:
        self.runner = asyncio.Runner()
        self.settings = Settings.model_validate(
            {"endpoint_url": job.url, "data_plane": plane, "upload_concurrency": job.connections}
        )
        self.store = open_store(f"s3://{job.bucket}", self.settings)
        self.key = job.key

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        async def read(number: int, start: int) -> None:
            await self.store.get_range(self.key, start, buffers[number])

        self.runner.run(share_out(starts, read, len(buffers)))

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        async def write(_: int, key: str) -> None:
            await self.store.put(key, data, replace=True)

        self.runner.run(share_out(keys, write, connections))

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()


def direct(job: Job) -> Ours:
    return Ours(job, "direct")
