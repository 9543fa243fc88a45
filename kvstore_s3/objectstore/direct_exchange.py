"""One request and its answer over a `Wire`: plain functions that a thread runs, with no knowledge of retries.

What they raise leaves the wire unusable (`reusable` is False), but for an `AnswerError` that was read to its end.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from kvstore_s3.errors import BitstreamFault, DamagedObjectError
from kvstore_s3.objectstore.direct_wire import Pace, Wire
from kvstore_s3.objectstore.http_message import (
    MAX_ERROR_BYTES,
    MAX_HEAD_BYTES,
    Head,
    UnfitAnswerError,
    body_of,
    parse_head,
)
from kvstore_s3.objectstore.s3_errors import AnswerError

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d{1,18}|\*)", re.ASCII)
_CONTINUE_S = 1.0
"""For so long a server is given the time to refuse a body before it is sent (as botocore does)."""


class StaleConnectionError(ConnectionError):
    """The server had closed the connection before this request; another connection may do."""


class ChangedError(Exception):
    """The object is not the one whose beginning was read."""


class SilenceError(TimeoutError):
    """Not a byte of an answer came in time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long is too long: see the settings of these names; a transfer is judged once in `window_s`."""

    read_timeout_s: float
    slowest_bytes_per_s: float
    window_s: float

    def pace(self) -> Pace:
        return Pace(self.slowest_bytes_per_s, self.window_s, time.monotonic())


class Download:
    """A range on its way into `into`, over as many attempts as it takes: what has arrived stays."""

    def __init__(self, key: str, start: int, into: memoryview) -> None:
        self.key = key
        self.start = start
        self.into = into
        self.filled = 0
        self.etag = ""
        self.restarts = 0

    @property
    def headers(self) -> dict[str, str]:
        """Of the request for what is missing: if a part is here already, of the same object only."""
        wanted = {"range": f"bytes={self.start + self.filled}-{self.start + len(self.into) - 1}"}
        return {**wanted, "if-match": self.etag} if self.filled else wanted

    def keep(self) -> bool:
        """After a failure: whether the rest can be asked for alone. If not, all will be."""
        if not self.filled or not self.etag or self.etag.startswith("W/"):
            self.filled = 0
        return self.filled > 0

    def restart(self) -> None:
        """The object was replaced: what has arrived is of another."""
        self.filled, self.etag = 0, ""
        self.restarts += 1


def check_range(status: int, found: str, length: int | None, download: Download) -> None:
    """Refuse an answer that is not the bytes asked for: servers shorten a range and call it success."""
    first, last = download.start + download.filled, download.start + len(download.into) - 1
    match = _CONTENT_RANGE.fullmatch(found)
    span = (int(match[1]), int(match[2])) if match else None
    if status != 206 or span != (first, last) or length not in (None, last - first + 1):
        raise DamagedObjectError(
            BitstreamFault.TRUNCATED,
            f"{download.key}: bytes {first}-{last} were asked for; the answer is {status} {found or 'without a range'}",
        )


def fetch(wire: Wire, request: bytes, download: Download, limits: Limits) -> None:
    """Ask for what `download` lacks, and fill it in. Raises AnswerError, DamagedObjectError, ChangedError, OSError."""
    head, early = _ask(wire, [memoryview(request)], limits)
    if head.status // 100 != 2:
        raise _refusal(wire, head, early, limits)
    if head.chunked or (head.length is None and head.status == 206):
        raise UnfitAnswerError("its length is not told beforehand")
    check_range(head.status, head.headers.get("content-range", ""), head.length, download)
    etag = head.headers.get("etag", "")
    if download.filled and etag != download.etag:
        raise ChangedError  # this server does not heed If-Match
    download.etag = etag
    missing = download.into[download.filled :]
    if len(early) > len(missing):
        raise UnfitAnswerError("more bytes follow than its length")
    missing[: len(early)] = early
    download.filled += len(early)
    _receive(wire, download, limits)
    wire.reusable = head.keep_alive


def send(
    wire: Wire, request: bytes, body: memoryview, limits: Limits, *, ask_first: bool = False
) -> tuple[Head, bytes]:
    """Send a request with `body` and return the answer. With `ask_first` the body waits for the server's consent.

    Raises AnswerError, UnfitAnswerError, OSError.
    """
    wire.reusable = False
    parts = [memoryview(request), body]
    early = b""
    if ask_first:
        _transmit(wire, [memoryview(request)], limits, untouched=True)
        parts = [body]
        early = _await_consent(wire, limits)
    try:
        _transmit(wire, parts, limits, untouched=not ask_first)
    except (ConnectionError, TimeoutError) as error:
        # A server that has seen enough answers and closes. If it has not answered, the error is the news.
        answered = not isinstance(error, StaleConnectionError) and wire.readable(0)
        if not answered:
            raise
        head, early = _answer_of_a_broken_wire(wire, limits, error)
        raise _refusal(wire, head, early, limits, spoilt=True) from error
    head, early = _read_head(wire, limits, untouched=not ask_first, early=early)
    if head.status // 100 != 2:
        raise _refusal(wire, head, early, limits)
    answer, whole = _read_body(wire, head, early, limits)
    wire.reusable = whole
    return head, answer


def _await_consent(wire: Wire, limits: Limits) -> bytes:
    """Wait for a "100 Continue", or for so long that the server cannot know it. Raises AnswerError: it refused."""
    if not wire.readable(_CONTINUE_S):
        return b""
    try:
        head, early = _read_head(wire, replace(limits, read_timeout_s=_CONTINUE_S), untouched=True, consent=True)
    except SilenceError:
        return b""  # what was readable were TLS's own messages
    if head.status != 100:
        raise _refusal(wire, head, early, limits, spoilt=True)
    return early


def _answer_of_a_broken_wire(wire: Wire, limits: Limits, error: OSError) -> tuple[Head, bytes]:
    try:
        head, early = _read_head(wire, limits, untouched=False)
    except (OSError, UnfitAnswerError):
        raise error from None
    if head.status // 100 == 2:
        raise error  # an acknowledgement of what was not sent is none
    return head, early


def _ask(wire: Wire, request: list[memoryview], limits: Limits) -> tuple[Head, bytes]:
    wire.reusable = False
    _transmit(wire, request, limits, untouched=True)
    return _read_head(wire, limits, untouched=True)


def _transmit(wire: Wire, parts: list[memoryview], limits: Limits, *, untouched: bool) -> None:
    """Send all of `parts`. `untouched`: nothing has come back yet, so a used connection may just be stale."""
    pace = limits.pace()
    parts = [part for part in parts if part]
    while parts:
        try:
            sent = wire.send(parts)
        except ConnectionError as error:
            if untouched and wire.used and not wire.readable(0):
                raise StaleConnectionError from error
            raise
        pace.moved(sent, time.monotonic())
        while parts and sent >= len(parts[0]):
            sent -= len(parts[0])
            del parts[0]
        if sent:
            parts[0] = parts[0][sent:]


def _read_head(
    wire: Wire, limits: Limits, *, untouched: bool, consent: bool = False, early: bytes = b""
) -> tuple[Head, bytes]:
    """Return the head of the answer, of which `early` is here, and what arrived of its body with it.

    `consent`: a 100 is an answer, too.
    """
    deadline = time.monotonic() + limits.read_timeout_s
    data, view = early, memoryview(wire.scratch)
    while True:
        if data and (head := parse_head(data)) is not None:
            data = data[head.size :]
            if head.status >= 200 or (consent and head.status == 100):
                return head, data
            continue
        try:
            count = wire.receive(view, fill=False)
        except ConnectionError as error:
            if untouched and wire.used and not data:
                raise StaleConnectionError from error
            raise
        if count == 0:
            if untouched and wire.used and not data:
                raise StaleConnectionError
            raise ConnectionResetError("the connection ended instead of an answer")
        if time.monotonic() > deadline:
            raise TimeoutError("no answer") if data or count else SilenceError("no answer")
        data += view[: count or 0]
        if len(data) > MAX_HEAD_BYTES:
            raise UnfitAnswerError("its head is too long")


def _receive(wire: Wire, download: Download, limits: Limits) -> None:
    pace = limits.pace()
    while missing := download.into[download.filled :]:
        count = wire.receive(missing, fill=True)
        if count == 0:
            raise ConnectionResetError(f"the answer ended after {download.filled} of {len(download.into)} bytes")
        download.filled += count or 0
        if count != len(missing):
            pace.moved(count or 0, time.monotonic())


def _refusal(wire: Wire, head: Head, early: bytes, limits: Limits, *, spoilt: bool = False) -> AnswerError:
    """The error that the server answered with. `spoilt`: the connection is of no use, whatever it says."""
    try:
        body, whole = _read_body(wire, head, early, limits)
        wire.reusable = whole and not spoilt
    except (OSError, UnfitAnswerError):
        body = early  # the status says enough
    return AnswerError(head, body)


def _read_body(wire: Wire, head: Head, early: bytes, limits: Limits) -> tuple[bytes, bool]:
    """The short body of an error or an acknowledgement, and whether the connection is in order after it."""
    pace, data, view = Pace(1, limits.read_timeout_s, time.monotonic()), early, memoryview(wire.scratch)
    while (body := body_of(head, data, ended=False)) is None:
        if len(data) > MAX_ERROR_BYTES:
            raise UnfitAnswerError("the body of an error is too long")
        count = wire.receive(view, fill=False)
        if count == 0:
            return body_of(head, data, ended=True) or b"", False
        pace.moved(count or 0, time.monotonic())
        data += view[: count or 0]
    in_order = data.endswith(b"\r\n\r\n") if head.chunked else len(data) == (head.length or 0)
    return body, head.keep_alive and in_order
