"""One aiobotocore client: made on first use, tuned, with retries in which every foreign exception is mapped."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from kvstore_s3.config import Settings
from kvstore_s3.errors import InvalidArgumentError, StoreUnavailableError
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.s3_errors import FOREIGN_ERRORS, ConflictError, Target, map_error

Answer = Mapping[str, Any]

_DEFAULT_REGION = "us-east-1"
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_SLOWEST_BYTES_PER_S = 64 * 1024
"""A transfer slower than this is stuck: the read timeout alone never ends one that trickles, nor a stuck upload."""


class S3Client:
    """Requests to one endpoint. Belongs to the event loop of its first request."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._settings = settings
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._client: Any = None
        self._closed = False

    @property
    def target(self) -> Target:
        """What error messages name: known in full once the client has resolved its endpoint."""
        endpoint = self._client.meta.endpoint_url if self._client else self._settings.endpoint_url
        return Target(self._url, endpoint or "AWS")

    async def call(
        self,
        operation: str,
        arguments: Mapping[str, object],
        *,
        body: memoryview | None = None,
        consume: Callable[[Answer], Awaitable[None]] | None = None,
        transfer: int = 0,
        retry_conflict: bool = True,
    ) -> Answer:
        """Make one request, again where the server was unavailable, and return its answer.

        `body` is sent without being signed or hashed. `consume` reads the answer's body, once per attempt. `transfer`
        is the number of bytes that go either way, from which the longest time to wait for them follows. Without
        `retry_conflict`, a 409 is raised at once.
        """
        pause = _FIRST_PAUSE_S
        left = self._settings.max_attempts
        while True:
            try:
                async with asyncio.timeout(self._longest_s(transfer)):
                    return await self._call_once(operation, arguments, body, consume)
            except FOREIGN_ERRORS as error:
                mapped = map_error(error, self.target)
                conflict = isinstance(mapped, ConflictError) and not retry_conflict
                left -= 1
                if not left or conflict or not isinstance(mapped, StoreUnavailableError):
                    raise mapped from error
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def close(self) -> None:
        self._closed = True
        async with self._opening:
            self._client = None
            await finish(self._stack.aclose())

    async def _call_once(
        self,
        operation: str,
        arguments: Mapping[str, object],
        body: memoryview | None,
        consume: Callable[[Answer], Awaitable[None]] | None,
    ) -> Answer:
        client = await self._open()
        payload = {} if body is None else {"Body": io.BytesIO(body)}
        answer: Answer = await getattr(client, operation)(**arguments, **payload)
        if consume is not None:
            await consume(answer)
        return answer

    async def _open(self) -> Any:
        if self._client is None:
            async with self._opening:
                if self._closed:
                    raise StoreUnavailableError(f"{self._url} is closed; open it again")
                if self._client is None:
                    self._client = await self._create()
        return self._client

    async def _create(self) -> Any:
        settings, session = self._settings, get_session()
        region = settings.region or session.get_config_variable("region") or _DEFAULT_REGION
        connections = max(settings.download_concurrency, settings.lookup_concurrency, settings.upload_concurrency)
        config = AioConfig(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            max_pool_connections=connections,
            retries={"total_max_attempts": 1},  # `call` retries, so that bodies are covered too
            signature_version="s3v4",
            s3={
                "addressing_style": "path" if settings.path_style else "virtual",
                # Sections carry their own checksums: hashing payloads once more would cost more CPU than all the rest.
                "payload_signing_enabled": False,
            },
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        context = session.create_client("s3", region_name=region, endpoint_url=settings.endpoint_url, config=config)
        try:
            return await self._stack.enter_async_context(context)
        except ValueError as error:
            raise InvalidArgumentError(f"{self._url}: the endpoint or region is not valid: {error}") from error

    def _longest_s(self, transfer: int) -> float | None:
        if not transfer:
            return None
        return self._settings.connect_timeout_s + self._settings.read_timeout_s + transfer / _SLOWEST_BYTES_PER_S
