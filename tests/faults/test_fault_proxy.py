"""The fault proxy itself: a test of a fault that did not happen would prove nothing."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from fault_proxy import Action, FaultProxy, Rule
from faults.actions import (
    SLOW_DOWN,
    Answer,
    Break,
    Delay,
    Flip,
    Hang,
    IgnoredRange,
    Interrupt,
    LoseAnswer,
    Meanwhile,
    ShortRange,
    Stall,
    Substitute,
    Trickle,
    WrongRange,
)
from faults.wire import Head

CONTENT = bytes(range(256)) * 1024
RANGE = {"Range": "bytes=100-1099"}
WANTED = CONTENT[100:1100]


class Objects(BaseHTTPRequestHandler):
    """A server of one object that keeps connections and remembers what was put."""

    protocol_version = "HTTP/1.1"
    put: list[bytes]

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        begin, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(CONTENT))
        self.send_response(206 if match else 200)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(CONTENT)}")
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
            return
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(CONTENT[begin:end])

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if len(data) == int(self.headers["Content-Length"]):
            self.put.append(data)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not in the tests' output."""


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what these tests are about."""


@pytest.fixture
def put() -> list[bytes]:
    return []


@pytest.fixture
def proxy(put: list[bytes]) -> Iterator[FaultProxy]:
    handler = type("Handler", (Objects,), {"put": put})
    with QuietServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with FaultProxy(f"http://127.0.0.1:{server.server_port}") as running:
                yield running
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=5)) as connection:
        yield connection


def get(client: http.client.HTTPConnection, path: str = "/object") -> tuple[int, str | None, bytes]:
    client.request("GET", path, headers=RANGE)
    with client.getresponse() as answer:
        return answer.status, answer.getheader("Content-Range"), answer.read()


GOOD = (206, f"bytes 100-1099/{len(CONTENT)}", WANTED)


def test_what_no_rule_meets_passes_unchanged_on_one_connection(
    proxy: FaultProxy, client: http.client.HTTPConnection, put: list[bytes]
) -> None:
    proxy.add(Rule("GetObject", SLOW_DOWN, path="/other"))
    for _ in range(3):
        assert get(client) == GOOD
    client.request("PUT", "/object", b"some bytes", {"Expect": "100-continue"})
    assert client.getresponse().read() == b""
    client.request("HEAD", "/object")
    with client.getresponse() as answer:
        assert (int(answer.headers["Content-Length"]), answer.read()) == (len(CONTENT), b"")
    assert get(client, "/chunked") == (206, GOOD[1], b"abcde")
    assert get(client) == GOOD
    assert put == [b"some bytes"]
    assert proxy.connections == 1
    assert [seen.status for seen in proxy.requests] == [206, 206, 206, 200, 200, 206, 206]
    assert proxy.requests[0].request.range == (100, 1100)


def test_a_rule_meets_the_requests_it_names_and_counts_them(
    proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    with proxy.fault("GetObject", SLOW_DOWN, path="ject$", skip=1, times=2) as rule:
        assert [get(client)[0] for _ in range(4)] == [206, 503, 503, 206]
        assert get(client, "/other")[0] == 206
        assert (rule.seen, rule.met) == (4, 2)
    assert rule.first_met.is_set()
    assert proxy.connections == 1, "an error that the server tells in order keeps the connection"


def test_a_rule_ends_with_its_block(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    with proxy.fault("GetObject", SLOW_DOWN):
        assert get(client)[0] == 503
    assert get(client) == GOOD


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (ShortRange(10), (206, f"bytes 100-109/{len(CONTENT)}", WANTED[:10])),
        (WrongRange(7), (206, f"bytes 107-1106/{len(CONTENT)}", WANTED)),
        (WrongRange(0), (206, None, WANTED)),
        (Flip(0), (206, GOOD[1], bytes([WANTED[0] ^ 16]) + WANTED[1:])),
        (Flip(-1), (206, GOOD[1], WANTED[:-1] + bytes([WANTED[-1] ^ 16]))),
        (Substitute(b"x" * 500), (206, GOOD[1], b"x" * 400 + bytes(600))),
    ],
)
def test_an_answer_is_falsified_as_asked(
    proxy: FaultProxy, client: http.client.HTTPConnection, action: Action, answer: tuple[int, str | None, bytes]
) -> None:
    with proxy.fault("GetObject", action):
        assert get(client) == answer
    assert get(client) == GOOD
    assert proxy.connections == 1


def test_a_range_that_is_ignored_is_the_whole_object(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    with proxy.fault("GetObject", IgnoredRange()):
        status, told, data = get(client)
    assert (status, told, len(data), data[100:1100]) == (200, None, len(CONTENT), WANTED)


@pytest.mark.parametrize(("reset", "error"), [(True, ConnectionResetError), (False, http.client.IncompleteRead)])
def test_a_body_breaks_off_where_it_should(
    proxy: FaultProxy, client: http.client.HTTPConnection, reset: bool, error: type[Exception]
) -> None:
    with proxy.fault("GetObject", Break(after=300, reset=reset)):
        client.request("GET", "/object", headers=RANGE)
        with client.getresponse() as answer:
            assert answer.read(300) == WANTED[:300]
            with pytest.raises(error):
                answer.read()


def test_an_answer_may_break_off_before_its_head(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    with proxy.fault("GetObject", Break(after=-1)), pytest.raises(ConnectionResetError):
        get(client)


@pytest.mark.parametrize("action", [Hang(), Stall(300)])
def test_a_stall_ends_when_the_client_gives_up(
    proxy: FaultProxy, client: http.client.HTTPConnection, action: Action
) -> None:
    client.timeout = 0.2
    with proxy.fault("GetObject", action):
        with pytest.raises(TimeoutError):
            get(client)
        client.close()
    client.timeout = 5
    assert get(client) == GOOD


def test_a_trickle_and_a_delay_take_their_time(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    for action in (Trickle(5000), Delay(0.2)):
        begin = time.monotonic()
        with proxy.fault("GetObject", action):
            assert get(client) == GOOD
        assert 0.15 < time.monotonic() - begin < 20


def test_the_link_is_as_narrow_and_as_long_as_it_is_told(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.bytes_per_s, proxy.latency_s = 10_000, 0.1
    begin = time.monotonic()
    assert get(client) == GOOD
    assert get(client) == GOOD
    assert 0.35 < time.monotonic() - begin < 20
    proxy.clear()
    assert proxy.bytes_per_s is None


@pytest.mark.parametrize("instead", [None, SLOW_DOWN])
def test_an_acknowledgement_is_lost_after_the_server_did_its_work(
    proxy: FaultProxy, client: http.client.HTTPConnection, put: list[bytes], instead: Answer | None
) -> None:
    with proxy.fault("PutObject", LoseAnswer(instead)):
        client.request("PUT", "/object", b"some bytes")
        if instead is None:
            with pytest.raises(ConnectionResetError):
                client.getresponse()
        else:
            assert client.getresponse().status == 503
    assert put == [b"some bytes"]


@pytest.mark.parametrize(("sent", "applied"), [(0, []), (500, []), (None, [bytes(1000)])])
def test_an_interruption_stops_at_its_step(
    proxy: FaultProxy, client: http.client.HTTPConnection, put: list[bytes], sent: int | None, applied: list[bytes]
) -> None:
    called = threading.Event()
    with proxy.fault("PutObject", Interrupt(called.set, sent=sent)):
        client.request("PUT", "/object", bytes(1000))
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            client.getresponse()
    assert called.is_set()
    assert put == applied


def test_something_may_happen_meanwhile(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    called = threading.Event()
    with proxy.fault("GetObject", Meanwhile(called.set)):
        assert get(client) == GOOD
    assert called.is_set()


def test_an_early_refusal_does_not_wait_for_the_body(proxy: FaultProxy) -> None:
    with proxy.fault("PutObject", Answer("503 Slow Down", "SlowDown", retry_after_s=1, early=True)):
        address = urlsplit(proxy.endpoint)
        with socket.create_connection((address.hostname, address.port), timeout=5) as client:
            client.sendall(
                b"PUT /object HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
            )
            head = client.recv(65536)
    assert head.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 1" in head


def test_a_refused_connection_is_refused_until_it_recovers(
    proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    assert get(client) == GOOD
    proxy.refuse()
    with pytest.raises(ConnectionError):
        get(client)
    for _ in range(2):
        client.close()
        with pytest.raises(ConnectionRefusedError):
            get(client)
    client.close()
    proxy.recover()
    assert get(client) == GOOD


def test_a_black_hole_swallows_and_recovers(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    client.timeout = 0.2
    proxy.black_hole()
    with pytest.raises(TimeoutError):
        get(client)
    client.close()
    client.timeout = 5
    threading.Timer(0.1, proxy.recover).start()
    assert get(client) == GOOD


def test_what_is_connected_can_be_reset(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    assert get(client) == GOOD
    proxy.reset_connections()
    with pytest.raises(ConnectionResetError):
        get(client)
    client.close()
    assert get(client) == GOOD


@pytest.mark.parametrize(
    ("line", "operation"),
    [
        ("GET /bucket/key", "GetObject"),
        ("HEAD /bucket/key", "HeadObject"),
        ("PUT /bucket/key", "PutObject"),
        ("DELETE /bucket/key", "DeleteObject"),
        ("GET /bucket?list-type=2&prefix=a", "ListObjectsV2"),
        ("GET /bucket?uploads", "ListMultipartUploads"),
        ("POST /bucket/key?uploads", "CreateMultipartUpload"),
        ("POST /bucket/key?uploads=", "CreateMultipartUpload"),
        ("PUT /bucket/key?partNumber=1&uploadId=x", "UploadPart"),
        ("POST /bucket/key?uploadId=x", "CompleteMultipartUpload"),
        ("DELETE /bucket/key?uploadId=x", "AbortMultipartUpload"),
        ("OPTIONS /bucket", "OPTIONS"),
    ],
)
def test_requests_are_known_by_the_names_that_s3_has_for_them(line: str, operation: str) -> None:
    assert Head(f"{line} HTTP/1.1", ()).operation == operation
