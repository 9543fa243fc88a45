"""Answers of HTTP/1.1 servers, from bytes: what is understood, and what is refused rather than guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.objectstore.http_message import (
    MAX_HEAD_BYTES,
    Head,
    UnfitAnswerError,
    body_of,
    error_code,
    error_region,
    parse_head,
    retry_after_s,
)

ANSWER = b'HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nETag: "x"\r\nX-Amz-Meta-A:  b c \r\n\r\n0123456789'


def head_of(*lines: str, first: str = "HTTP/1.1 200 OK") -> Head:
    head = parse_head("\r\n".join([first, *lines, "", ""]).encode("latin-1"))
    assert head is not None
    return head


def test_a_head_is_status_headers_and_size() -> None:
    head = parse_head(ANSWER)
    assert head is not None
    assert (head.status, head.length, head.keep_alive, head.chunked) == (206, 10, True, False)
    assert head.headers == {"content-length": "10", "etag": '"x"', "x-amz-meta-a": "b c"}
    assert ANSWER[head.size :] == b"0123456789"


@given(st.integers(0, len(ANSWER) - 11))
def test_a_head_that_has_not_all_arrived_is_none(count: int) -> None:
    assert parse_head(ANSWER[:count]) is None


@pytest.mark.parametrize(
    "bad",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: line\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"x" * (MAX_HEAD_BYTES + 1),
    ],
)
def test_a_head_that_could_mean_two_things_is_refused(bad: bytes) -> None:
    with pytest.raises(UnfitAnswerError):
        parse_head(bad)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    for prefix in (b"", b"HTTP/1.1 200 OK\r\n"):
        try:
            head = parse_head(prefix + data)
            if head is not None:
                body_of(head, data, ended=True)
        except UnfitAnswerError:
            pass


@pytest.mark.parametrize(
    ("first", "line", "kept"),
    [
        ("HTTP/1.1 200 OK", "A: b", True),
        ("HTTP/1.1 200 OK", "Connection: Close", False),
        ("HTTP/1.0 200 OK", "A: b", False),
        ("HTTP/1.0 200 OK", "Connection: Keep-Alive", True),
    ],
)
def test_a_connection_is_kept_where_the_server_keeps_it(first: str, line: str, kept: bool) -> None:
    assert head_of(line, first=first).keep_alive is kept


def test_a_body_ends_where_its_length_says_its_chunks_say_or_the_connection_does() -> None:
    counted, chunked, open_ended = head_of("Content-Length: 3"), head_of("Transfer-Encoding: chunked"), head_of()
    assert body_of(counted, b"ab", ended=False) is None
    assert body_of(counted, b"abcd", ended=False) == b"abc"
    pieces = b"2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n"
    assert [body_of(chunked, pieces[:count], ended=False) for count in range(len(pieces))] == [None] * len(pieces)
    assert body_of(chunked, pieces, ended=False) == b"abc"
    assert body_of(open_ended, b"abc", ended=False) is None
    assert body_of(open_ended, b"abc", ended=True) == b"abc"
    with pytest.raises(UnfitAnswerError):
        body_of(chunked, b"zz\r\n", ended=False)


def test_of_an_error_its_code_and_the_region_are_read_and_nothing_that_is_not_one() -> None:
    body = b"<Error><Code>SlowDown</Code><Region>eu-west-1</Region><Message>AKIA</Message></Error>"
    assert error_code(body) == "SlowDown"
    assert error_code(b"<Code>not a code</Code>") == ""
    assert error_region(head_of(), body) == "eu-west-1"
    assert error_region(head_of("x-amz-bucket-region: eu-west-2"), body) == "eu-west-2"
    assert error_region(head_of("x-amz-bucket-region: evil.example/"), b"") == ""


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7.0), ("", 0.0), ("-1", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)]
)
def test_retry_after_is_understood_in_seconds(value: str, seconds: float) -> None:
    assert retry_after_s({"retry-after": value}) == seconds
