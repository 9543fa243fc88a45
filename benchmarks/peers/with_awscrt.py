"""awscrt, AWS's C client, whose body callback copies into the caller's buffer (as LMCache's connector uses it)."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from awscrt.auth import AwsCredentialsProvider
from awscrt.http import HttpHeaders, HttpRequest
from awscrt.io import ClientBootstrap, ClientTlsContext, DefaultHostResolver, EventLoopGroup, TlsContextOptions
from awscrt.s3 import (
    S3ChecksumAlgorithm,
    S3ChecksumConfig,
    S3ChecksumLocation,
    S3Client,
    S3RequestTlsMode,
    S3RequestType,
    create_default_s3_signing_config,
)

from peers.base import Job

PART = 8 * 1024 * 1024


class Awscrt:
    def __init__(self, job: Job) -> None:
        self.job = job
        group = EventLoopGroup(1)
        provider = AwsCredentialsProvider.new_static(job.access_key, job.secret_key)
        self.client = S3Client(
            bootstrap=ClientBootstrap(group, DefaultHostResolver(group)),
            region="us-east-1",
            tls_mode=S3RequestTlsMode.ENABLED if job.secure else S3RequestTlsMode.DISABLED,
            tls_connection_options=_trust(job.authority) if job.authority else None,
            signing_config=create_default_s3_signing_config(region="us-east-1", credential_provider=provider),
            part_size=PART,
            multipart_upload_threshold=2 * PART,
            max_active_connections_override=job.connections,
        )

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        def read(number: int, start: int) -> Future[None]:
            into, filled = buffers[number], 0

            def land(chunk: bytes, **_: Any) -> None:
                nonlocal filled
                into[filled : filled + len(chunk)] = chunk
                filled += len(chunk)

            headers = HttpHeaders([("Host", self.job.host), ("Range", f"bytes={start}-{start + len(into) - 1}")])
            request = HttpRequest("GET", f"/{self.job.bucket}/{self.job.key}", headers)
            made = self.client.make_request(type=S3RequestType.GET_OBJECT, request=request, on_body=land)
            return made.finished_future

        _keep_in_flight(starts, read, len(buffers))

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        checksum = S3ChecksumConfig(algorithm=S3ChecksumAlgorithm.CRC32C, location=S3ChecksumLocation.HEADER)

        def write(_: int, key: str) -> Future[None]:
            headers = HttpHeaders([("Host", self.job.host), ("Content-Length", str(len(data)))])
            request = HttpRequest("PUT", f"/{self.job.bucket}/{key}", headers, io.BytesIO(data))
            made = self.client.make_request(type=S3RequestType.PUT_OBJECT, request=request, checksum_config=checksum)
            return made.finished_future

        _keep_in_flight(keys, write, connections)

    def close(self) -> None:
        del self.client


def _trust(authority: str) -> Any:
    options = TlsContextOptions()
    options.override_default_trust_store_from_path(ca_filepath=authority)
    return ClientTlsContext(options).new_connection_options()


def _keep_in_flight(work: Sequence[Any], start: Callable[[int, Any], Future[None]], count: int) -> None:
    """Each item begins when the one `count` before it has ended, in whose place it goes."""
    flying: deque[Future[None]] = deque()
    for index, item in enumerate(work):
        if len(flying) == count:
            flying.popleft().result()
        flying.append(start(index % count, item))
    for future in flying:
        future.result()
