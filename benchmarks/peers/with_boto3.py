"""boto3 with threads, tuned as aiobotocore is; bodies are read into the caller's buffer by urllib3."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import boto3
import crc32c
from botocore.config import Config

from peers.base import Job, share_out_to_threads


class Boto3:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.threads = ThreadPoolExecutor(job.connections)
        config = Config(
            max_pool_connections=job.connections,
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self.client = boto3.client(
            "s3",
            region_name="us-east-1",
            endpoint_url=job.url,
            aws_access_key_id=job.access_key,
            aws_secret_access_key=job.secret_key,
            config=config,
        )

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        def read(number: int, start: int) -> None:
            into = buffers[number]
            wanted = f"bytes={start}-{start + len(into) - 1}"
            answer = self.client.get_object(Bucket=self.job.bucket, Key=self.job.key, Range=wanted)
            raw, filled = answer["Body"]._raw_stream, 0  # the body itself has no readinto
            while filled < len(into):
                count = raw.readinto(into[filled:])
                assert count
                filled += count
            raw.release_conn()

        share_out_to_threads(self.threads, starts, read, len(buffers))

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        def write(_: int, key: str) -> None:
            checksum = base64.b64encode(crc32c.crc32c(data).to_bytes(4, "big")).decode()
            self.client.put_object(Bucket=self.job.bucket, Key=key, Body=io.BytesIO(data), ChecksumCRC32C=checksum)

        share_out_to_threads(self.threads, keys, write, connections)

    def close(self) -> None:
        self.threads.shutdown()
        self.client.close()
