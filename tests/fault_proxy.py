"""A proxy between an S3 client and a real server that does on purpose what networks and servers do by accident.

Rules say which request meets which fault (see `faults.actions`); what no rule matches passes unharmed. Connections are
kept alive, one to the server for each of the client's. It runs in a thread and a loop of its own, so that a test that
blocks its own loop does not stop it, and its methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, Self, TypeVar
from urllib.parse import urlsplit

from faults.wire import PIECE, Head, frame, last_frame, read_body, read_head

T = TypeVar("T")

_BROKEN = (ConnectionError, asyncio.IncompleteReadError)


class Hangup(BaseException):
    """Ends the connection to the client: in order, or with a reset."""

    def __init__(self, *, reset: bool) -> None:
        self.reset = reset


class Action(Protocol):
    async def act(self, exchange: Exchange) -> None:
        """Answer one request, or raise `Hangup`."""


class Pass:
    """No fault."""

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        await exchange.respond(head, body)


@dataclass(slots=True)
class Rule:
    """A fault, and the requests that it meets: S3 operation ("" for all), regular expression for the path.

    The first `skip` matching requests pass, the next `times` are met (None: all), those after pass again.
    """

    operation: str
    action: Action
    path: str = ""
    skip: int = 0
    times: int | None = None
    seen: int = 0
    met: int = 0
    first_met: threading.Event = field(default_factory=threading.Event)

    def meets(self, request: Head) -> bool:
        """Whether `request` meets the fault; counts it."""
        if self.operation not in ("", request.operation) or re.search(self.path, request.path) is None:
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.met >= self.times):
            return False
        self.met += 1
        self.first_met.set()
        return True


@dataclass(slots=True)
class Seen:
    """One request as it went by. `status` is what the client was told; 0 as long as it was told nothing."""

    request: Head
    connection: int
    status: int = 0

    @property
    def operation(self) -> str:
        return self.request.operation


class FaultProxy:
    """Use as a context manager; `endpoint` is its URL. `requests` and `connections` are what came by so far."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._address = (parts.hostname or "", parts.port or 80)
        self._rules: list[Rule] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._link_free_at = 0.0
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._started = threading.Event()
        self.requests: list[Seen] = []
        self.connections = 0
        self.bytes_per_s: float | None = None
        """Of all answers together; None: no limit."""
        self.latency_s = 0.0
        """Between each request and its answer."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._thread.join()

    def add(self, *rules: Rule) -> None:
        """Later rules come first."""
        self._call(self._add(rules))

    def clear(self) -> None:
        """Forget all rules and requests, and end the limits."""
        self._call(self._clear())

    @contextlib.contextmanager
    def fault(self, operation: str, action: Action, path: str = "", **when: int) -> Iterator[Rule]:
        rule = Rule(operation, action, path, **when)
        self.add(rule)
        try:
            yield rule
        finally:
            self._call(self._remove(rule))

    def black_hole(self) -> None:
        """From now on connections are accepted and nothing moves on any of them."""
        self._call(self._set_open(is_open=False))

    def refuse(self) -> None:
        """From now on connections are refused; those that exist are reset."""
        self._call(self._refuse())

    def recover(self) -> None:
        """End `black_hole` and `refuse`. What waited goes on."""
        self._call(self._recover())

    def reset_connections(self) -> None:
        """Reset what is connected; new connections are welcome."""
        self._call(self._drop_connections())

    def count(self, operation: str = "") -> int:
        """Requests so far."""
        return sum(1 for seen in self.requests if operation in ("", seen.operation))

    def _call(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        await self._listen()
        self._started.set()
        await self._stopping.wait()
        await self._refuse()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, reuse_address=True)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        writer.transport.set_write_buffer_limits(0)  # so that `drain` waits until the kernel has all of it
        connection = _Connection(self, self.connections, reader, writer)
        try:
            await connection.serve()
            writer.close()
        except Hangup as hangup:
            _reset(writer) if hangup.reset else writer.close()
        except _BROKEN:
            writer.close()
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            connection.close()
            self._tasks.discard(task)

    async def find(self, request: Head, connection: int) -> tuple[Action, Seen]:
        seen = Seen(request, connection)
        self.requests.append(seen)
        return next((rule.action for rule in self._rules if rule.meets(request)), Pass()), seen

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self._address)

    async def share(self, size: int) -> None:
        """Wait for the turn of `size` bytes on the link."""
        await self.open.wait()
        if self.bytes_per_s is not None:
            now = self._loop.time()
            self._link_free_at = max(now, self._link_free_at) + size / self.bytes_per_s
            await asyncio.sleep(self._link_free_at - now)

    async def _stop(self) -> None:
        self._stopping.set()

    async def _add(self, rules: tuple[Rule, ...]) -> None:
        self._rules[:0] = rules

    async def _remove(self, rule: Rule) -> None:
        self._rules = [other for other in self._rules if other is not rule]

    async def _clear(self) -> None:
        self._rules.clear()
        self.requests.clear()
        self.bytes_per_s, self.latency_s = None, 0.0
        await self._recover()

    async def _set_open(self, *, is_open: bool) -> None:
        self.open.set() if is_open else self.open.clear()

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._drop_connections()

    async def _recover(self) -> None:
        self.open.set()
        await self._listen()

    async def _drop_connections(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class Exchange:
    """One request and its answer, as an action sees them."""

    def __init__(self, proxy: FaultProxy, request: Head, connection: _Connection, seen: Seen) -> None:
        self.request = request
        self._proxy = proxy
        self._connection = connection
        self._seen = seen
        self._was_read = False

    async def discard_request(self) -> None:
        """Read the request to its end and do nothing with it."""
        async for _ in self.upload():
            pass

    async def forward(self, *, upload: AsyncIterator[bytes] | None = None) -> tuple[Head, AsyncIterator[bytes]]:
        """Send the request to the server, and return the head of its answer and the pieces of its body."""
        reader, writer = await self._connection.reach_server()
        answer = asyncio.ensure_future(_read_answer(reader))
        try:
            writer.write(self.request.without("expect").encode())
            async for piece in upload or self.upload():
                if not answer.done():  # a server may refuse before it has all of the body, and end the connection
                    with contextlib.suppress(ConnectionError):
                        writer.write(frame(self.request, piece))
                        await writer.drain()
            if not answer.done():
                writer.write(last_frame(self.request))
            head = await answer
        finally:
            answer.cancel()
        await asyncio.sleep(self._proxy.latency_s)
        bodyless = self.request.method == "HEAD" or head.status in (204, 304)
        return head, _nothing() if bodyless else read_body(head, reader, to_end=True)

    async def upload(self) -> AsyncIterator[bytes]:
        """The request's body, once: nothing the second time."""
        if self._was_read:
            return
        self._was_read = True
        if self.request.get("expect"):
            self._connection.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for piece in read_body(self.request, self._connection.reader, to_end=False):
            await self._proxy.open.wait()
            yield piece

    async def respond(self, head: Head, body: AsyncIterator[bytes]) -> None:
        """Send an answer to the client. The connection is kept if both sides want that and the length is known."""
        writer = self._connection.writer
        await self._proxy.open.wait()
        self._seen.status = head.status
        writer.write(head.encode())
        async for piece in body:
            await self._proxy.share(len(piece))
            writer.write(frame(head, piece))
            await writer.drain()
        writer.write(last_frame(head))
        await writer.drain()
        unknown = head.get("content-length") is None and not head.chunked and head.status not in (204, 304)
        if head.closing or self.request.closing or (unknown and self.request.method != "HEAD"):
            raise Hangup(reset=False)

    async def respond_whole(self, start: str, body: bytes, **fields: str) -> None:
        """Send an answer of the proxy's own."""
        given = tuple((name.replace("_", "-"), value) for name, value in fields.items())
        head = Head(f"HTTP/1.1 {start}", (*given, ("Content-Length", str(len(body)))))
        await self.respond(head, _nothing() if self.request.method == "HEAD" else _single(body))

    async def wait_for_client(self) -> NoReturn:
        """Wait until the client gives up."""
        while await self._connection.reader.read(PIECE):
            pass
        raise Hangup(reset=False)


class _Connection:
    """A client's connection and the one to the server that goes with it."""

    def __init__(
        self, proxy: FaultProxy, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader, self.writer = reader, writer
        self._proxy = proxy
        self._number = number
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def serve(self) -> None:
        while (request := await read_head(self.reader)) is not None:
            await self._proxy.open.wait()
            action, seen = await self._proxy.find(request, self._number)
            await action.act(Exchange(self._proxy, request, self, seen))

    async def reach_server(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._server is None or self._server[0].at_eof():
            self.close()
            self._server = await self._proxy.connect()
            self._server[1].transport.set_write_buffer_limits(0)
        return self._server

    def close(self) -> None:
        """A server that sees an unfinished request end throws it away, as when a client dies."""
        if self._server is not None:
            self._server[1].close()
            self._server = None


def _reset(writer: asyncio.StreamWriter) -> None:
    found: socket.socket | None = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if found is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends RST
    writer.transport.abort()


async def _read_answer(reader: asyncio.StreamReader) -> Head:
    while (head := await read_head(reader)) is not None:
        if head.status != 100:
            return head
    raise ConnectionResetError("the server ended the connection without an answer")


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _single(body: bytes) -> AsyncIterator[bytes]:
    yield body
