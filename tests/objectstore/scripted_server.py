"""An HTTP server that answers exactly as a test says: for answers that no healthy S3 server gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

RESET = b"RESET"
"""An answer that ends here breaks the connection off; any other closes it in order."""
STALL = b"STALL"
"""An answer that ends here keeps the connection open and sends nothing more."""
TRICKLE = b"TRICKLE"
"""An answer that ends here goes on with a byte every tenth of a second."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class ScriptedServer:
    endpoint: str
    requests: list[Request]


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *headers]
    if not any(line.startswith("Content-Length") for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def error(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>your key AKIASHOWN is on file</Message></Error>"
    return answer(status, body.encode(), "Content-Type: application/xml")


@asynccontextmanager
async def running(script: Callable[[Request], bytes]) -> AsyncIterator[ScriptedServer]:
    """Serve on a free port; `script` returns the raw answer to each request."""
    requests: list[Request] = []
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await _read_request(reader, writer)
            requests.append(request)
            await _send(script(request), writer, ended)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client gave up first
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield ScriptedServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests)
    finally:
        ended.set()
        server.close()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
    if "expect" in headers:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, target, _ = first.split(" ")
    return Request(method, target, headers, body)


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
