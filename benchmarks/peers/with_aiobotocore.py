"""aiobotocore, tuned: payloads are not hashed for the signature, bodies are read into the caller's buffer."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from contextlib import AsyncExitStack

import crc32c
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from peers.base import Job, share_out


class Aiobotocore:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        config = AioConfig(
            max_pool_connections=job.connections,
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        context = get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=job.url,
            aws_access_key_id=job.access_key,
            aws_secret_access_key=job.secret_key,
            config=config,
        )
        self.client = self.runner.run(self.stack.enter_async_context(context))

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        async def read(number: int, start: int) -> None:
            into = buffers[number]
            wanted = f"bytes={start}-{start + len(into) - 1}"
            answer = await self.client.get_object(Bucket=self.job.bucket, Key=self.job.key, Range=wanted)
            async with answer["Body"] as body:
                filled = 0
                while filled < len(into):
                    count = await body.readinto(into[filled:])
                    assert count
                    filled += count

        self.runner.run(share_out(starts, read, len(buffers)))

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        async def write(_: int, key: str) -> None:
            checksum = base64.b64encode(crc32c.crc32c(data).to_bytes(4, "big")).decode()
            await self.client.put_object(
                Bucket=self.job.bucket, Key=key, Body=io.BytesIO(data), ChecksumCRC32C=checksum
            )

        self.runner.run(share_out(keys, write, connections))

    def close(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()
