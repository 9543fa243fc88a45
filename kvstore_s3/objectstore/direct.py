"""The direct data plane: HEAD, range GET, PutObject and UploadPart between the socket and the caller's buffer.

Bytes move in threads with blocking calls, heads inside the event loop; docs/decisions/2026-11-21-data-plane.md has the
measurements behind that. Requests and answers have the names that the AWS client gives them, so that either plane
can serve a call. One call is one attempt: retries, redirects and errors' meaning are the caller's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kvstore_s3.config import Settings
from kvstore_s3.metrics import Count
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.direct_connections import Connections, Dialler
from kvstore_s3.objectstore.direct_exchange import (
    ChangedError,
    Download,
    Limits,
    StaleConnectionError,
    fetch,
    send,
)
from kvstore_s3.objectstore.direct_heads import HeadConnections
from kvstore_s3.objectstore.direct_route import Route
from kvstore_s3.objectstore.direct_wire import SlowTransferError, Wire
from kvstore_s3.objectstore.http_message import Head, UnfitAnswerError
from kvstore_s3.objectstore.s3_errors import AnswerError, ChangedWhileReadError
from kvstore_s3.objectstore.signing import Credentials, Signer, quote_key, quote_query

T = TypeVar("T")
Answer = Mapping[str, Any]

OPERATIONS = frozenset({"get_object", "head_object", "put_object", "upload_part"})

_WATCHED_S = 5.0
"""A transfer's pace is judged once in so many seconds (sooner where the read timeout is shorter)."""
_ASK_FIRST_BYTES = 256 * 1024
"""A body as large as this waits for the server's consent where the server may know already that it will refuse."""
_META = "x-amz-meta-"


@dataclass(slots=True)
class Call:
    """A request in the words of the AWS client, over all its attempts."""

    operation: str
    arguments: dict[str, object]
    body: memoryview | None = None
    download: Download | None = None


class DirectPlane:
    """Requests to the objects of one bucket. Belongs to the event loop in which it was made."""

    def __init__(self, route: Route, settings: Settings, tls: ssl.SSLContext | None, count: Count) -> None:
        window_s = min(_WATCHED_S, settings.read_timeout_s)
        self._route = route
        self._count = count
        self._limits = Limits(settings.read_timeout_s, settings.slowest_bytes_per_s, window_s)
        dialler = Dialler(route, settings.connect_timeout_s)
        self._connections = Connections(route, dialler, tls, window_s=window_s, count=count)
        self._heads = HeadConnections(
            route,
            dialler,
            tls,
            most=settings.lookup_concurrency,
            read_timeout_s=settings.read_timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
            count=count,
        )
        # Reads never wait for writes; and hedged and small reads come on top of the window of bulk reads.
        self._readers = _Threads(2 * settings.download_concurrency, "kvstore-s3-read")
        self._writers = _Threads(settings.upload_concurrency, "kvstore-s3-write")
        self._signer: Signer | None = None
        self._asks_first = True

    async def perform(self, call: Call, credentials: Credentials) -> Answer:
        """Make one attempt. Raises AnswerError, ChangedWhileReadError, DamagedObjectError, UnfitAnswerError, OSError.

        After a broken download, the next attempt asks for the rest alone.
        """
        try:
            match call.operation:
                case "head_object":
                    return await self._head(call, credentials)
                case "get_object":
                    return await self._get(call, credentials)
                case _:
                    return await self._put(call, credentials)
        except SlowTransferError:
            self._count("slow_transfers", 1)
            raise

    def close(self) -> None:
        """End what is under way and close all connections."""
        self._connections.close()
        self._heads.close()
        self._readers.close()
        self._writers.close()

    async def _head(self, call: Call, credentials: Credentials) -> Answer:
        head = await self._heads.ask(self._sign("HEAD", call, credentials))
        if head.status != 200:
            raise AnswerError(head, b"")
        if head.length is None:
            raise UnfitAnswerError("it does not tell the size of the object")
        return _describe(head)

    async def _get(self, call: Call, credentials: Credentials) -> Answer:
        download = call.download
        assert download is not None
        while True:
            if download.filled:
                self._count("resumed_bodies", 1)
            request = self._sign("GET", call, credentials, headers=download.headers)
            try:
                await self._run(self._readers, partial(_fetch, request, download, self._limits))
                return {}
            except ChangedError:
                pass
            except AnswerError as error:
                if error.status != 412 or not download.filled:
                    download.keep()
                    raise
            except BaseException:
                download.keep()
                raise
            download.restart()
            if download.restarts > 1:
                raise ChangedWhileReadError

    async def _put(self, call: Call, credentials: Credentials) -> Answer:
        arguments, body = call.arguments, call.body
        assert body is not None
        headers = {"content-length": str(len(body))}
        query = {}
        ask_first = False
        if call.operation == "upload_part":
            query = {"partNumber": str(arguments["PartNumber"]), "uploadId": str(arguments["UploadId"])}
        else:
            metadata = arguments["Metadata"]
            assert isinstance(metadata, Mapping)
            headers |= {_META + name: value for name, value in metadata.items()}
        if "IfNoneMatch" in arguments:
            headers["if-none-match"] = str(arguments["IfNoneMatch"])
            ask_first = len(body) >= _ASK_FIRST_BYTES and self._asks_first
        if "ChecksumCRC32C" in arguments:
            headers["x-amz-checksum-crc32c"] = str(arguments["ChecksumCRC32C"])
        if ask_first:
            headers["expect"] = "100-continue"
        request = self._sign("PUT", call, credentials, headers=headers, query=query)
        work = partial(_send, request, body, self._limits, ask_first)
        try:
            return _describe(await self._run(self._writers, work))
        except AnswerError as error:
            if error.status != 417 or not ask_first:
                raise
            self._asks_first = False  # this server does not know "Expect: 100-continue"
        return await self._put(call, credentials)

    async def _run(self, threads: _Threads, work: Callable[[Wire], T]) -> T:
        async with threads.slots:
            try:
                return await self._run_on(await self._connections.take(), threads, work)
            except StaleConnectionError:
                self._count("stale_connections", 1)
            return await self._run_on(await self._connections.take(fresh=True), threads, work)

    async def _run_on(self, wire: Wire, threads: _Threads, work: Callable[[Wire], T]) -> T:
        try:
            running = asyncio.get_running_loop().run_in_executor(threads.pool, work, wire)
            return await finish(running, on_cancel=wire.kill)
        except AnswerError:
            raise
        except BaseException:
            wire.reusable = False
            raise
        finally:
            self._connections.give(wire)

    def _sign(
        self,
        method: str,
        call: Call,
        credentials: Credentials,
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> bytes:
        signer = self._signer
        if signer is None or signer.credentials != credentials:
            route = self._route
            self._signer = signer = Signer(
                credentials, region=route.region, service=route.service, authority=route.authority
            )
        target = self._route.path + quote_key(str(call.arguments["Key"]))
        if query:
            target = f"{target}?{quote_query(query)}"
        return signer.sign(method, target, headers or {})


class _Threads:
    """Threads that are there when a slot is, so that nothing ever waits in the pool's queue."""

    def __init__(self, number: int, name: str) -> None:
        self.pool = ThreadPoolExecutor(number, thread_name_prefix=name)
        self.slots = asyncio.Semaphore(number)

    def close(self) -> None:
        self.pool.shutdown(wait=False)


def _fetch(request: bytes, download: Download, limits: Limits, wire: Wire) -> None:
    wire.handshake()
    fetch(wire, request, download, limits)


def _send(request: bytes, body: memoryview, limits: Limits, ask_first: bool, wire: Wire) -> Head:
    wire.handshake()
    return send(wire, request, body, limits, ask_first=ask_first)[0]


def _describe(head: Head) -> Answer:
    """What callers look at in the answer, by the names that the AWS client has for it."""
    headers = head.headers
    answer: dict[str, object] = {
        "ContentLength": head.length or 0,
        "Metadata": {name[len(_META) :]: value for name, value in headers.items() if name.startswith(_META)},
    }
    for name, header in (("ETag", "etag"), ("ChecksumCRC32C", "x-amz-checksum-crc32c")):
        if header in headers:
            answer[name] = headers[header]
    return answer
