"""An HTTP server that answers exactly as a test says: for answers that no healthy S3 server gives."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

RESET = b"RESET"
"""An answer that ends here breaks the connection off; any other closes it in order, or keeps it open (`kept`)."""
STALL = b"STALL"
"""An answer that ends here keeps the connection open and sends nothing more."""
TRICKLE = b"TRICKLE"
"""An answer that ends here goes on with a byte every tenth of a second."""
_CLOSE = b"\r\nConnection: close\r\n"


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int = 0
    """Which connection it came on, counted from 0."""


@dataclass(slots=True)
class ScriptedServer:
    endpoint: str
    requests: list[Request]
    connections: list[asyncio.StreamWriter] = field(default_factory=list)

    async def hang_up(self) -> None:
        """Close all connections that are open, as a server does with idle ones."""
        for writer in self.connections:
            if self.endpoint.startswith("https"):
                writer.transport.abort()  # in order, TLS would wait for the client's consent
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self.connections), return_exceptions=True)

    @property
    def open_connections(self) -> int:
        """Connections that neither side has closed, as far as the server has heard."""
        return sum(not writer.is_closing() for writer in self.connections)


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """An answer after which the connection is closed."""
    return _compose(status, body, "Connection: close", *headers)


def kept(status: str, body: bytes = b"", *headers: str) -> bytes:
    """An answer after which the connection stays open for another request."""
    return _compose(status, body, *headers)


def _compose(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if not any(line.startswith(("Content-Length", "Transfer-Encoding")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def error(status: str, code: str, *headers: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>your key AKIASHOWN is on file</Message></Error>"
    return answer(status, body.encode(), "Content-Type: application/xml", *headers)


@asynccontextmanager
async def running(
    script: Callable[[Request], bytes], *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    """Serve on a free port; `script` returns the raw answer to each request."""
    found = ScriptedServer("", [])
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(found.connections)
        found.connections.append(writer)
        try:
            while True:
                request = await _read_request(reader, writer, number)
                found.requests.append(request)
                raw = script(request)
                await _send(raw, writer, ended)
                if _CLOSE in raw or raw.endswith((RESET, STALL, TRICKLE)) or not raw:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client gave up first
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0, ssl=tls)
    name = f"[{host}]" if ":" in host else host
    found.endpoint = f"{'https' if tls else 'http'}://{name}:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        ended.set()
        server.close()
        await found.hang_up()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> Request:
    first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
    if "expect" in headers:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, target, _ = first.split(" ")
    return Request(method, target, headers, body, number)


async def _send(raw: bytes, writer: asyncio.StreamWriter, ended: asyncio.Event) -> None:
    ending = next((ending for ending in (RESET, STALL, TRICKLE) if raw.endswith(ending)), b"")
    writer.write(raw.removesuffix(ending))
    await writer.drain()
    if ending == RESET:
        writer.transport.abort()
    elif ending == STALL:
        await ended.wait()
    elif ending == TRICKLE:
        while not ended.is_set():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)
