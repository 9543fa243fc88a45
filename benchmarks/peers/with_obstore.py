"""obstore (Rust's object_store). Its bytes are its own: they are copied into the caller's buffer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import obstore
from obstore.store import S3Store

from peers.base import Job, share_out


class Obstore:
    def __init__(self, job: Job) -> None:
        self.key = job.key
        self.runner = asyncio.Runner()
        trust = {"root_certificate": Path(job.authority).read_text()} if job.authority else {}
        common = {
            "endpoint": job.url,
            "region": "us-east-1",
            "access_key_id": job.access_key,
            "secret_access_key": job.secret_key,
            "virtual_hosted_style_request": False,
            "client_options": {"allow_http": not job.secure, **trust},
        }
        self.store = S3Store(job.bucket, **common)
        self.writer = S3Store(job.bucket, unsigned_payload=True, checksum_algorithm="CRC64NVME", **common)

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        async def read(number: int, start: int) -> None:
            into = buffers[number]
            into[:] = memoryview(await obstore.get_range_async(self.store, self.key, start=start, length=len(into)))

        self.runner.run(share_out(starts, read, len(buffers)))

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        async def write(_: int, key: str) -> None:
            await obstore.put_async(self.writer, key, data, use_multipart=False)

        self.runner.run(share_out(keys, write, connections))

    def close(self) -> None:
        self.runner.close()
