"""MinIO's SDK with threads; bodies are read into the caller's buffer by urllib3. It signs payloads over http (SHA-256),
and sends their MD5 over https: these are its checksums."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from minio import Minio
from urllib3 import PoolManager

from peers.base import Job, share_out_to_threads


class MinioSdk:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.threads = ThreadPoolExecutor(job.connections)
        self.pool = PoolManager(maxsize=job.connections, ca_certs=job.authority)
        self.client = Minio(
            job.host, job.access_key, job.secret_key, secure=job.secure, region="us-east-1", http_client=self.pool
        )

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        def read(number: int, start: int) -> None:
            into = buffers[number]
            answer = self.client.get_object(self.job.bucket, self.job.key, offset=start, length=len(into))
            filled = 0
            while filled < len(into):
                count = answer.readinto(into[filled:])
                assert count
                filled += count
            answer.release_conn()

        share_out_to_threads(self.threads, starts, read, len(buffers))

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        def write(_: int, key: str) -> None:
            self.client.put_object(self.job.bucket, key, io.BytesIO(data), len(data), part_size=len(data))

        share_out_to_threads(self.threads, keys, write, connections)

    def close(self) -> None:
        self.threads.shutdown()
        self.pool.clear()
