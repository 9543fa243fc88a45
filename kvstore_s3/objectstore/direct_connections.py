"""Connections to one host: dialled inside the event loop, used by threads, kept for the next request.

Every connection is dialled in the loop, so that a name server or a host that does not answer holds no thread, and a
cancelled request none either.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from typing import Any

from kvstore_s3.metrics import Count
from kvstore_s3.objectstore.direct_route import Route
from kvstore_s3.objectstore.direct_wire import PlainWire, TlsWire, Wire
from kvstore_s3.objectstore.s3_errors import UnreachableError

_ADDRESSES_LIVE_S = 10.0
_LONGEST_IDLE_S = 50.0
"""Connections idle for longer are not trusted: routers forget them without telling anyone."""
_KEEP_ALIVE_AFTER_S = 30


class Dialler:
    """Opens sockets to the host of `route`, to each of its addresses in turn."""

    def __init__(self, route: Route, connect_timeout_s: float) -> None:
        self._route = route
        self._timeout_s = connect_timeout_s
        self._resolving = asyncio.Lock()
        self._addresses: deque[tuple[int, Any]] = deque()
        self._resolved = 0.0

    async def dial(self) -> socket.socket:
        """Return a connected, non-blocking socket, within the connect timeout. Raises UnreachableError."""
        failure: Exception | None = None
        left = len(await self._resolve())
        now = asyncio.get_running_loop().time
        deadline = now() + self._timeout_s
        while left:
            left -= 1
            family, address = self._addresses[0]
            self._addresses.rotate(-1)  # the next goes to another server, and one that failed is tried last
            patience_s = (deadline - now()) / (2 if left else 1)  # one address that hangs must not use up all
            try:
                async with asyncio.timeout(patience_s):
                    return await _connect(family, address)
            except (OSError, TimeoutError) as error:
                failure = error
        self._resolved = 0.0
        raise UnreachableError(str(failure)) from failure

    async def _resolve(self) -> deque[tuple[int, Any]]:
        loop = asyncio.get_running_loop()
        async with self._resolving:
            if not self._addresses or loop.time() - self._resolved > _ADDRESSES_LIVE_S:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        found = await loop.getaddrinfo(self._route.host, self._route.port, type=socket.SOCK_STREAM)
                except (OSError, TimeoutError) as error:
                    raise UnreachableError(f"{self._route.host} has no address") from error
                self._addresses = deque((family, address) for family, _, _, _, address in found)
                self._resolved = loop.time()
        return self._addresses


async def _connect(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_AFTER_S)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


class Connections:
    """Idle connections, the warmest first, and those in use, which `close` ends."""

    def __init__(
        self, route: Route, dialler: Dialler, tls: ssl.SSLContext | None, *, window_s: float, count: Count
    ) -> None:
        self._route = route
        self._dialler = dialler
        self._tls = tls
        self._window_s = window_s
        self._count = count
        self._idle: deque[tuple[Wire, float]] = deque()
        self._busy: set[Wire] = set()
        self._closed = False

    async def take(self, *, fresh: bool = False) -> Wire:
        """Return a connection, an idle one that is still open if there is any; with `fresh`, a new one."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            wire, since = self._idle.pop()
            if not fresh and now - since < _LONGEST_IDLE_S and not wire.readable(0):
                self._busy.add(wire)
                return wire
            if not fresh:
                self._count("stale_connections", 1)
            wire.close()
        sock = await self._dialler.dial()
        if self._closed:
            sock.close()
            raise ConnectionAbortedError("the store is closed")
        wire = self._make(sock)
        self._busy.add(wire)
        return wire

    def give(self, wire: Wire) -> None:
        """Take `wire` back from whoever has used it, to be used again if its last exchange ended in order."""
        self._busy.discard(wire)
        if wire.reusable and not self._closed:
            wire.used = True
            self._idle.append((wire, asyncio.get_running_loop().time()))
        else:
            wire.close()

    def close(self) -> None:
        """Close the idle ones and end the exchanges on the others, which their users then give back."""
        self._closed = True
        for wire in self._busy:
            wire.kill()
        while self._idle:
            self._idle.pop()[0].close()

    def _make(self, sock: socket.socket) -> Wire:
        try:
            if self._tls is None:
                return PlainWire(sock, self._window_s)
            return TlsWire(sock, self._window_s, self._tls, self._route.host)
        except BaseException:
            sock.close()
            raise
