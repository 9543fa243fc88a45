"""HTTP/1.1 messages as a proxy sees them: heads, and bodies piece by piece, whatever their framing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 64 * 1024
"""Most bytes of a body in one piece."""

_RANGE = re.compile(r"bytes=(\d+)-(\d+)", re.ASCII)

# By method, and by the first of these names that is in the query.
_OPERATIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "GET": (("uploads", "ListMultipartUploads"), ("list-type", "ListObjectsV2"), ("", "GetObject")),
    "HEAD": (("", "HeadObject"),),
    "PUT": (("partNumber", "UploadPart"), ("", "PutObject")),
    "POST": (
        ("uploads", "CreateMultipartUpload"),
        ("uploadId", "CompleteMultipartUpload"),
        ("delete", "DeleteObjects"),
    ),
    "DELETE": (("uploadId", "AbortMultipartUpload"), ("", "DeleteObject")),
}


@dataclass(frozen=True, slots=True)
class Head:
    """The first line of a message and its fields, in their order."""

    start: str
    fields: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str | None:
        return next((value for field, value in self.fields if field.lower() == name.lower()), None)

    def having(self, changes: Mapping[str, str]) -> Head:
        """A copy with these fields set."""
        return replace(self.without(*changes), fields=(*self.without(*changes).fields, *changes.items()))

    def without(self, *names: str) -> Head:
        gone = {name.lower() for name in names}
        return replace(self, fields=tuple(field for field in self.fields if field[0].lower() not in gone))

    def encode(self) -> bytes:
        lines = [self.start, *(f"{name}: {value}" for name, value in self.fields)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    @property
    def chunked(self) -> bool:
        return "chunked" in (self.get("transfer-encoding") or "").lower()

    @property
    def closing(self) -> bool:
        return "close" in (self.get("connection") or "").lower()

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.start.split(" ")[1])

    @property
    def method(self) -> str:
        """Of a request."""
        return self.start.split(" ")[0]

    @property
    def path(self) -> str:
        """Of a request, decoded, without the query."""
        return unquote(urlsplit(self.start.split(" ")[1]).path)

    @property
    def operation(self) -> str:
        """The name that S3 has for a request."""
        query = parse_qs(urlsplit(self.start.split(" ")[1]).query, keep_blank_values=True)
        known = _OPERATIONS.get(self.method, ())
        return next((operation for name, operation in known if not name or name in query), self.method)

    @property
    def range(self) -> tuple[int, int] | None:
        """First byte that a request asks for, and the one after the last."""
        match = _RANGE.fullmatch(self.get("range") or "")
        return (int(match[1]), int(match[2]) + 1) if match else None


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head, or None where the peer ended the connection in order."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    start, *lines = raw.decode("latin-1").split("\r\n")[:-2]
    fields = (line.partition(":") for line in lines)
    return Head(start, tuple((name, value.strip()) for name, _, value in fields))


async def read_body(head: Head, reader: asyncio.StreamReader, *, to_end: bool) -> AsyncIterator[bytes]:
    """Pieces of the body that follows `head`. `to_end`: without a length, it ends with the connection."""
    length = head.get("content-length")
    if head.chunked:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            async for piece in _read_exactly(reader, size):
                yield piece
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers say nothing that matters here
    elif length is not None:
        async for piece in _read_exactly(reader, int(length)):
            yield piece
    elif to_end:
        while piece := await reader.read(PIECE):
            yield piece


async def _read_exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


def frame(head: Head, piece: bytes) -> bytes:
    """A piece of the body as it goes over the wire."""
    return b"%x\r\n%b\r\n" % (len(piece), piece) if head.chunked else piece


def last_frame(head: Head) -> bytes:
    return b"0\r\n\r\n" if head.chunked else b""
