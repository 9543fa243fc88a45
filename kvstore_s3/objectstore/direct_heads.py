"""Many small questions at once: HEAD requests over kept-alive connections inside the event loop.

A lookup asks for hundreds of objects together; a thread for each would cost more than the question.
"""

from __future__ import annotations

import asyncio
import ssl

from kvstore_s3.metrics import Count
from kvstore_s3.objectstore.direct_connections import Dialler
from kvstore_s3.objectstore.direct_exchange import StaleConnectionError
from kvstore_s3.objectstore.direct_route import Route
from kvstore_s3.objectstore.http_message import Head, UnfitAnswerError, parse_head
from kvstore_s3.objectstore.s3_errors import TlsRefusedError, UnreachableError


class HeadConnection(asyncio.Protocol):
    """One connection: one question at a time, and its answer as a future."""

    def __init__(self) -> None:
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Head] | None = None
        self._data = b""

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            head = parse_head(self._data)
            while head is not None and head.status < 200:
                self._data = self._data[head.size :]
                head = parse_head(self._data)
        except UnfitAnswerError as error:
            return self._end(error)
        if head is None:
            return None
        surplus = len(self._data) > head.size
        self._data = b""
        if self._answer is None or self._answer.done() or surplus or not head.keep_alive:
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(head)
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(StaleConnectionError() if self.used and not self._data else ConnectionResetError("no answer"))

    def ask(self, request: bytes) -> asyncio.Future[Head]:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def expire(self) -> None:
        """Nothing came in time."""
        self._end(TimeoutError("no answer"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _end(self, error: Exception) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class HeadConnections:
    """Asks over as many connections as there are questions at once, at most `most`."""

    def __init__(
        self,
        route: Route,
        dialler: Dialler,
        tls: ssl.SSLContext | None,
        *,
        most: int,
        read_timeout_s: float,
        connect_timeout_s: float,
        count: Count,
    ) -> None:
        self._route = route
        self._dialler = dialler
        self._tls = tls
        self._slots = asyncio.Semaphore(most)
        self._read_timeout_s = read_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._count = count
        self._idle: list[HeadConnection] = []
        self._busy: set[HeadConnection] = set()
        self._closed = False

    async def ask(self, request: bytes) -> Head:
        """Return the answer to a HEAD request. Raises UnfitAnswerError, TlsRefusedError, OSError."""
        async with self._slots:
            connection = await self._take(fresh=False)
            try:
                return await self._ask(connection, request)
            except StaleConnectionError:
                self._count("stale_connections", 1)
            return await self._ask(await self._take(fresh=True), request)

    def close(self) -> None:
        self._closed = True
        for connection in [*self._busy, *self._idle]:
            connection.close()
        self._idle.clear()

    async def _ask(self, connection: HeadConnection, request: bytes) -> Head:
        timer = asyncio.get_running_loop().call_later(self._read_timeout_s, connection.expire)
        self._busy.add(connection)
        try:
            head = await connection.ask(request)
        except BaseException:
            connection.close()  # an answer that nobody waits for must not meet the next question
            raise
        finally:
            timer.cancel()
            self._busy.discard(connection)
        connection.used = True
        if connection.open and not self._closed:
            self._idle.append(connection)
        return head

    async def _take(self, *, fresh: bool) -> HeadConnection:
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return await self._open()

    async def _open(self) -> HeadConnection:
        sock = await self._dialler.dial()
        host = self._route.host if self._tls else None
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                HeadConnection,
                sock=sock,
                ssl=self._tls,
                server_hostname=host,
                ssl_handshake_timeout=self._connect_timeout_s if self._tls else None,
            )
        except ssl.SSLError as error:
            sock.close()
            raise TlsRefusedError(str(error)) from error
        except (OSError, TimeoutError) as error:
            sock.close()
            raise UnreachableError(str(error)) from error
        except BaseException:
            sock.close()
            raise
        if self._closed:
            connection.close()
            raise ConnectionAbortedError("the store is closed")
        return connection
