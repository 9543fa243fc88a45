"""Requests to an S3 server by whichever plane can make them, with retries in which every foreign exception is mapped.

The AWS client (aiobotocore) controls: it lists, deletes, begins and completes. The bytes go directly, unless the
settings or the endpoint want otherwise.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from crc32c import crc32c

from kvstore_s3.config import Settings
from kvstore_s3.errors import KVStoreError, StoreUnavailableError
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.direct import OPERATIONS, Answer, Call, DirectPlane
from kvstore_s3.objectstore.direct_exchange import Download, check_range
from kvstore_s3.objectstore.direct_route import NoRouteError
from kvstore_s3.objectstore.http_message import UnfitAnswerError
from kvstore_s3.objectstore.retry import Retrying
from kvstore_s3.objectstore.s3_errors import (
    FOREIGN_ERRORS,
    AnswerError,
    ConflictError,
    Target,
    map_error,
    pause_asked_s,
    refuses_checksum,
    tells_expired,
)
from kvstore_s3.objectstore.s3_session import S3Session, look_up_credentials, open_session

_log = logging.getLogger("kvstore_s3")

_IN_THE_LOOP_BYTES = 64 * 1024
"""A checksum over more than this is computed in a thread."""
_UNFIT_ANSWERS = 3
"""After so many answers that the direct plane did not understand, it is not asked any more."""
_CHECKSUMS = ("ChecksumCRC32C", "ChecksumAlgorithm")


class S3Client:
    """Requests to one bucket. Belongs to the event loop of its first request."""

    def __init__(self, url: str, settings: Settings, count: Count = ignore) -> None:
        self.checksums = True
        """Whether bodies are sent with a CRC-32C: until the server refuses one."""
        self._url = url
        self._settings = settings
        self._count = count
        self._stack = AsyncExitStack()  # of the session, and of the plane that goes with it
        self._retired: AsyncExitStack | None = None
        self._opening = asyncio.Lock()
        self._session: S3Session | None = None
        self._plane: DirectPlane | None = None
        self._fallen_back = settings.data_plane == "aiobotocore"
        self._unfit = 0
        self._moved = False
        self._closed = False
        self._retrying = Retrying(settings, FOREIGN_ERRORS, self._explain, draw=random.random, count=count)

    @property
    def target(self) -> Target:
        """What error messages name: known in full once the client has resolved its endpoint."""
        endpoint = self._session.client.meta.endpoint_url if self._session else self._settings.endpoint_url
        return Target(self._url, endpoint or "AWS")

    @property
    def deadline_s(self) -> float:
        """Seconds that all attempts of a request take at most."""
        return self._settings.request_deadline_s

    async def call(
        self,
        operation: str,
        arguments: Mapping[str, object],
        *,
        body: memoryview | None = None,
        download: Download | None = None,
        retry_conflict: bool = True,
        on_retry: Callable[[KVStoreError], object] | None = None,
    ) -> Answer:
        """Make one request, again where the server was unavailable, and return its answer.

        `body` is sent with a checksum and without being signed. `download` (for get_object) is filled. Without
        `retry_conflict`, a 409 is raised at once. `on_retry` is told of failures that may lead to another attempt.
        """
        call = Call(operation, dict(arguments), body, download)
        if body is not None and self.checksums:
            call.arguments["ChecksumCRC32C"] = await _checksum(body)

        def again(error: KVStoreError) -> bool:
            if on_retry is not None:
                on_retry(error)
            return retry_conflict or not isinstance(error, ConflictError)

        return await self._retrying.run(lambda: self._attempt(call), again=again)

    async def close(self) -> None:
        self._closed = True
        async with self._opening:
            self._session = self._plane = None
            await finish(self._close_stacks())

    async def _close_stacks(self) -> None:
        if self._retired is not None:
            await self._retired.aclose()
        await self._stack.aclose()

    async def _attempt(self, call: Call) -> Answer:
        """One attempt; and a second one at once, where an error says how it would succeed."""
        session = await self._open()
        try:
            return await self._perform(session, call)
        except FOREIGN_ERRORS as error:
            if any(name in call.arguments for name in _CHECKSUMS) and refuses_checksum(error):
                return await self._perform_without_checksum(session, call)
            if not await self._mend(session, error, str(call.arguments["Bucket"])):
                raise
        return await self._perform(await self._open(), call)

    async def _perform(self, session: S3Session, call: Call) -> Answer:
        self._count("requests", 1)
        plane = await self._find_plane(session, str(call.arguments["Bucket"])) if call.operation in OPERATIONS else None
        if plane is not None and (call.download is not None or call.operation != "get_object"):
            try:
                return await plane.perform(call, await session.credentials())
            except UnfitAnswerError as error:
                self._unfit += 1
                if self._unfit >= _UNFIT_ANSWERS:
                    self._fall_back(f"an answer was not understood: {error}")
        return await self._perform_by_client(session, call)

    async def _perform_by_client(self, session: S3Session, call: Call) -> Answer:
        payload = {} if call.body is None else {"Body": io.BytesIO(call.body)}
        async with asyncio.timeout(self._longest_s(call)):
            if call.download is None:
                answer: Answer = await getattr(session.client, call.operation)(**call.arguments, **payload)
                return answer
            return await _download_by_client(session, call, call.download)

    async def _perform_without_checksum(self, session: S3Session, call: Call) -> Answer:
        for name in _CHECKSUMS:
            call.arguments.pop(name, None)
        answer = await self._perform(session, call)
        if self.checksums:
            self.checksums = False
            _log.warning("%s: the server takes no CRC-32C; uploads go without", self._url)
        return answer

    async def _find_plane(self, session: S3Session, bucket: str) -> DirectPlane | None:
        if self._plane is None and not self._fallen_back:
            async with self._opening:
                self._check_open()
                if self._plane is None and not self._fallen_back:
                    try:
                        route = await session.find_route(bucket)
                    except NoRouteError as error:
                        self._fall_back(str(error))
                        return None
                    tls = session.tls_context() if route.tls else None
                    self._plane = DirectPlane(route, self._settings, tls, self._count)
                    self._stack.callback(self._plane.close)
        return None if self._fallen_back else self._plane

    def _fall_back(self, reason: str) -> None:
        if not self._fallen_back:
            self._fallen_back = True
            self._count("data_plane_fallbacks", 1)
            _log.warning("%s: bytes go by the AWS client, at a higher cost: %s", self._url, reason)

    async def _mend(self, session: S3Session, error: Exception, bucket: str) -> bool:
        """Whether the same request has better prospects now: in the bucket's own region, or with newer credentials."""
        if isinstance(error, AnswerError) and error.region and error.status in (301, 307, 400):
            return await self._move(session, error.region)
        return tells_expired(error) and await self._renew(session)

    async def _move(self, session: S3Session, region: str) -> bool:
        if region == session.region or (self._moved and self._session is session):
            return False
        async with self._opening:
            self._check_open()
            if self._session is session:
                self._moved = True
                await self._reopen(region)
                _log.warning("%s: the bucket is in %s; set region to spare the detour", self._url, region)
        return True

    async def _renew(self, session: S3Session) -> bool:
        stale = await session.credentials()
        async with self._opening:
            self._check_open()
            if self._session is session:
                if await look_up_credentials() == stale:
                    return False
                await self._reopen(session.region)
        return True

    async def _reopen(self, region: str) -> None:
        """Replace the session. The old one may still be in use: it is closed when it is replaced once more."""
        fresh = AsyncExitStack()
        self._session = await open_session(self._url, self._settings, region, fresh)
        self._plane = None
        closing, self._retired, self._stack = self._retired, self._stack, fresh
        if closing is not None:
            await finish(closing.aclose())

    async def _open(self) -> S3Session:
        if self._session is None:
            async with self._opening:
                self._check_open()
                if self._session is None:
                    self._session = await open_session(self._url, self._settings, None, self._stack)
        return self._session

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailableError(f"{self._url} is closed; open it again")

    def _explain(self, error: Exception) -> tuple[KVStoreError, float]:
        return map_error(error, self.target), pause_asked_s(error)

    def _longest_s(self, call: Call) -> float | None:
        """For the AWS client, whose read timeout alone never ends a transfer that trickles, nor a stuck upload."""
        settings = self._settings
        transfer = len(call.download.into) if call.download else len(call.body) if call.body is not None else 0
        if not transfer:
            return None
        return settings.connect_timeout_s + settings.read_timeout_s + transfer / settings.slowest_bytes_per_s


async def _download_by_client(session: S3Session, call: Call, download: Download) -> Answer:
    download.filled = 0
    answer: Answer = await session.client.get_object(**call.arguments, Range=download.headers["range"])
    async with answer["Body"] as body:
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        check_range(status, str(answer.get("ContentRange", "")), answer.get("ContentLength"), download)
        while missing := download.into[download.filled :]:
            count = await body.readinto(missing)
            if not count:
                raise ConnectionResetError(f"the answer ended after {download.filled} of {len(download.into)} bytes")
            download.filled += count
    return answer


async def _checksum(body: memoryview) -> str:
    if len(body) <= _IN_THE_LOOP_BYTES:
        value = crc32c(body)
    else:
        value = await finish(asyncio.to_thread(crc32c, body))
    return base64.b64encode(value.to_bytes(4, "big")).decode()
