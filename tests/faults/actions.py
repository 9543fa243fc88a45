"""What may happen to a request that passes the fault proxy. Each is one fault, made in one way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

from fault_proxy import Exchange, Hangup
from faults.wire import Head

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Answer:
    """An error of the server's, such as 503 SlowDown; the request never reaches it.

    `early`: the answer does not wait for the end of the request's body, and ends the connection.
    """

    status: str
    code: str
    retry_after_s: int | None = None
    early: bool = False

    async def act(self, exchange: Exchange) -> None:
        if not self.early:
            await exchange.discard_request()
        text = f"<Error><Code>{self.code}</Code><Message>your key AKIASHOWN is on file</Message></Error>"
        fields = {"Content_Type": "application/xml"}
        if self.retry_after_s is not None:
            fields["Retry_After"] = str(self.retry_after_s)
        if self.early:
            fields["Connection"] = "close"
        await exchange.respond_whole(self.status, text.encode(), **fields)


SLOW_DOWN = Answer("503 Slow Down", "SlowDown")
INTERNAL_ERROR = Answer("500 Internal Server Error", "InternalError")
TOO_MANY = Answer("429 Too Many Requests", "TooManyRequests")
NO_SUCH_KEY = Answer("404 Not Found", "NoSuchKey")
NO_SUCH_BUCKET = Answer("404 Not Found", "NoSuchBucket")
ACCESS_DENIED = Answer("403 Forbidden", "AccessDenied")
EXPIRED_TOKEN = Answer("400 Bad Request", "ExpiredToken")
CLOCK_SKEW = Answer("403 Forbidden", "RequestTimeTooSkewed")


@dataclass(frozen=True, slots=True)
class Hang:
    """The request is read, and never answered."""

    async def act(self, exchange: Exchange) -> None:
        await exchange.discard_request()
        await exchange.wait_for_client()


@dataclass(frozen=True, slots=True)
class Delay:
    """The answer is late by this much."""

    seconds: float

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        await asyncio.sleep(self.seconds)
        await exchange.respond(head, body)


@dataclass(frozen=True, slots=True)
class Break:
    """The connection is broken off when `after` bytes of the answer's body were sent; -1: before its head."""

    after: int
    reset: bool = True

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        if self.after < 0:
            raise Hangup(reset=self.reset)
        await exchange.respond(head, _then(_cut(body, self.after), self._hang_up))

    async def _hang_up(self) -> NoReturn:
        raise Hangup(reset=self.reset)


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing more comes when `after` bytes of the answer's body were sent."""

    after: int

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        await exchange.respond(head, _then(_cut(body, self.after), exchange.wait_for_client))


@dataclass(frozen=True, slots=True)
class Trickle:
    """The answer's body comes at this speed, byte by byte or in pieces of a tenth of a second."""

    bytes_per_s: float

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        await exchange.respond(head, self._slow(body))

    async def _slow(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        step = max(1, int(self.bytes_per_s / 10))
        async for piece in body:
            for begin in range(0, len(piece), step):
                part = piece[begin : begin + step]
                await asyncio.sleep(len(part) / self.bytes_per_s)
                yield part


@dataclass(frozen=True, slots=True)
class ShortRange:
    """A well-formed 206 of the first `length` bytes only: servers shorten ranges, and HTTP allows it."""

    length: int

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        start, _, total = _content_range(head)
        data = (await _read_all(body))[: self.length]
        last = start + len(data) - 1
        fields = {"Content-Range": f"bytes {start}-{last}/{total}", "Content-Length": str(len(data))}
        await exchange.respond(head.having(fields), _one(data))


@dataclass(frozen=True, slots=True)
class WrongRange:
    """The right bytes under a Content-Range that is `by` bytes off; 0: without one."""

    by: int

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        start, last, total = _content_range(head)
        told = {"Content-Range": f"bytes {start + self.by}-{last + self.by}/{total}"}
        await exchange.respond(head.having(told) if self.by else head.without("content-range"), body)


@dataclass(frozen=True, slots=True)
class IgnoredRange:
    """200 with an object as long as the whole one, as from a server or cache that knows no ranges."""

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        start, _, total = _content_range(head)
        data = (bytes(start) + await _read_all(body)).ljust(total, b"\0")
        whole = Head("HTTP/1.1 200 OK", head.fields).without("content-range").having({"Content-Length": str(total)})
        await exchange.respond(whole, _one(data))


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of the answer's body is wrong: of the byte `at`, from the end where it is negative."""

    at: int

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        data = bytearray(await _read_all(body))
        data[self.at] ^= 0x10
        await exchange.respond(head, _one(bytes(data)))


@dataclass(frozen=True, slots=True)
class Substitute:
    """The bytes of another object, under a head that fits the question."""

    data: bytes

    async def act(self, exchange: Exchange) -> None:
        head, body = await exchange.forward()
        length = len(await _read_all(body))
        start, _ = exchange.request.range or (0, 0)
        await exchange.respond(head, _one(self.data[start : start + length].ljust(length, b"\0")))


@dataclass(frozen=True, slots=True)
class LoseAnswer:
    """The server does what it was asked for, and the client hears of it what `instead` says: a reset if None."""

    instead: Answer | None = None

    async def act(self, exchange: Exchange) -> None:
        _, body = await exchange.forward()
        await _read_all(body)
        if self.instead is None:
            raise Hangup(reset=True)
        await self.instead.act(exchange)


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Calls a function at a step of a request, for instance to kill the client, and lets nothing more through.

    `sent`: bytes of the request's body that reach the server before; None: the server answers before.
    """

    call: Callable[[], object]
    sent: int | None = 0

    async def act(self, exchange: Exchange) -> None:
        if self.sent is None:
            _, body = await exchange.forward()
            await _read_all(body)
        elif self.sent:
            await exchange.forward(upload=_then(_cut(exchange.upload(), self.sent), self._finish))
        await self._finish()

    async def _finish(self) -> NoReturn:
        await asyncio.to_thread(self.call)
        raise Hangup(reset=False)


@dataclass(frozen=True, slots=True)
class Meanwhile:
    """Calls a function when the request is at the door, for instance to delete what it asks for, and lets it pass."""

    call: Callable[[], object]

    async def act(self, exchange: Exchange) -> None:
        await asyncio.to_thread(self.call)
        head, body = await exchange.forward()
        await exchange.respond(head, body)


def _content_range(head: Head) -> tuple[int, int, int]:
    match = _CONTENT_RANGE.fullmatch(head.get("content-range") or "")
    assert match is not None, f"this fault is for ranges; the server answered {head.start}"
    return int(match[1]), int(match[2]), int(match[3])


async def _read_all(body: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in body])


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _cut(body: AsyncIterator[bytes], after: int) -> AsyncIterator[bytes]:
    while after > 0 and (piece := await anext(body, b"")):
        yield piece[:after]
        after -= len(piece)


async def _then(body: AsyncIterator[bytes], what: Callable[[], Awaitable[NoReturn]]) -> AsyncIterator[bytes]:
    async for piece in body:
        yield piece
    await what()
