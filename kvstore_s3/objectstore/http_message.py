"""The little of HTTP/1.1 that a client of S3 must understand. Pure: bytes in, values out."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD_BYTES = 64 * 1024
MAX_ERROR_BYTES = 64 * 1024
"""Of the body of an error no more than this is read: its code stands at the beginning."""

_STATUS = re.compile(r"HTTP/1\.([01]) ([1-5]\d\d)(?: |$)", re.ASCII)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_REGION = re.compile(rb"<Region>([a-z0-9-]{1,64})</Region>")
_REGION_NAME = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)
_ONCE = frozenset({"content-length", "content-range", "transfer-encoding"})


class UnfitAnswerError(Exception):
    """An answer that this client does not understand; another may. The message says why."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers (names in lower case) of an answer, and the `size` of them in bytes."""

    status: int
    headers: dict[str, str]
    size: int
    keep_alive: bool

    @property
    def length(self) -> int | None:
        """Content-Length, or None where there is none."""
        found = self.headers.get("content-length")
        return None if found is None else int(found)

    @property
    def chunked(self) -> bool:
        return "transfer-encoding" in self.headers


def parse_head(data: bytes) -> Head | None:
    """Return the head that `data` begins with, or None while it is not complete. Raises UnfitAnswerError."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > MAX_HEAD_BYTES:
            raise UnfitAnswerError(f"its head does not end within {MAX_HEAD_BYTES} bytes")
        return None
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    status = _STATUS.match(first)
    if status is None:
        raise UnfitAnswerError("it is not HTTP/1.0 or 1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if not colon or not name or name[0] in " \t" or name[-1] in " \t":
            raise UnfitAnswerError("it has a header line that is none")
        if name in _ONCE and headers.get(name, value) != value:
            raise UnfitAnswerError(f"it has two values of {name}")
        headers[name] = value
    _check_framing(headers)
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection and (status[1] == "1" or "keep-alive" in connection)
    return Head(int(status[2]), headers, end + 4, keep_alive)


def _check_framing(headers: dict[str, str]) -> None:
    length = headers.get("content-length")
    if length is not None and _LENGTH.fullmatch(length) is None:
        raise UnfitAnswerError("its Content-Length is no number")
    if headers.get("transfer-encoding", "chunked").lower() != "chunked":
        raise UnfitAnswerError("its Transfer-Encoding is not chunked")


def body_of(head: Head, data: bytes, *, ended: bool) -> bytes | None:
    """Return the body of an answer of which `data` has arrived after the head; None while more is to come.

    `ended`: nothing more will come. For the short bodies of errors and acknowledgements.
    """
    if head.status in (204, 304):
        return b""
    if head.chunked:
        body = _join_chunks(data)
        return data if body is None and ended else body
    if head.length is None:
        return data if ended else None
    return data[: head.length] if ended or len(data) >= head.length else None


def _join_chunks(data: bytes) -> bytes | None:
    joined: list[bytes] = []
    at = 0
    while (end := data.find(b"\r\n", at)) >= 0:
        try:
            size = int(data[at:end].partition(b";")[0], 16)
        except ValueError:
            raise UnfitAnswerError("a chunk of its body has no size") from None
        if size == 0:  # trailers, which nobody sends to us, would follow here
            return b"".join(joined) if data[end : end + 4] == b"\r\n\r\n" else None
        if size < 0 or end + 2 + size + 2 > len(data):
            return None
        joined.append(data[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return None


def error_code(body: bytes) -> str:
    """The S3 error code in the body of an answer, or ""."""
    found = _CODE.search(body, 0, MAX_ERROR_BYTES)
    return found[1].decode() if found else ""


def error_region(head: Head, body: bytes) -> str:
    """The region that the server says the bucket lies in, or ""."""
    named = head.headers.get("x-amz-bucket-region", "")
    found = _REGION.search(body, 0, MAX_ERROR_BYTES)
    region = named or (found[1].decode() if found else "")
    return region if _REGION_NAME.fullmatch(region) else ""


def retry_after_s(headers: dict[str, str]) -> float:
    """Seconds for which the server asked to be left alone; 0 where it did not (a date is not understood)."""
    value = headers.get("retry-after", "")
    return float(value) if _LENGTH.fullmatch(value) else 0.0
