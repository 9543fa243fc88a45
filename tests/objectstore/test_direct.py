"""The direct data plane and servers that misbehave: what is resumed, repeated, given up and left behind (nothing)."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from crc32c import crc32c
from objectstore.scripted_server import RESET, STALL, TRICKLE, Request, ScriptedServer, answer, error, kept, running
from objectstore.suite import KEY, PART, PATIENCE_S, read

from kvstore_s3.config import MiB, Settings
from kvstore_s3.errors import DamagedObjectError, StoreBusyError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.metrics import Counters
from kvstore_s3.objectstore.base import ObjectInfo
from kvstore_s3.objectstore.direct_exchange import Download, Limits, fetch
from kvstore_s3.objectstore.open import open_store
from kvstore_s3.objectstore.s3 import S3Store

DATA = bytes(range(256)) * 4
LISTING = b"<ListBucketResult><Name>bucket</Name></ListBucketResult>"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, and no proxy of the machine that the tests run on."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASHOWN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class Scene:
    """A store, the server it talks to, and what was counted."""

    def __init__(self, server: ScriptedServer, url: str = "s3://bucket/prefix", **settings: object) -> None:
        chosen = {"endpoint_url": server.endpoint, "connect_timeout_s": 6.0, "read_timeout_s": 6.0, **settings}
        self.server = server
        self.counters = Counters()
        store = open_store(url, Settings(multipart_bytes=PART, **chosen), self.counters.add)
        assert isinstance(store, S3Store)
        self.store = store

    def count(self, name: str) -> int:
        return self.counters.snapshot().get(name, 0)

    @property
    def direct(self) -> bool:
        return self.store._client._plane is not None and not self.store._client._fallen_back


@asynccontextmanager
async def opened(
    *answers: bytes, script: Callable[[Request], bytes] | None = None, **settings: object
) -> AsyncIterator[Scene]:
    turns = iter([*answers[:-1]])
    async with running(script or (lambda _: next(turns, answers[-1]))) as server:
        scene = Scene(server, **settings)
        try:
            yield scene
        finally:
            await scene.store.close()


def range_of(request: Request) -> tuple[int, int]:
    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["range"]).groups()
    return int(first), int(last) + 1


def piece(request: Request, *, data: bytes = DATA, etag: str = '"one"', send: int | None = None) -> bytes:
    """The range that was asked for, kept alive; only its first `send` bytes, and then a reset, if `send` is given."""
    start, end = range_of(request)
    headers = [f"Content-Range: bytes {start}-{end - 1}/{len(data)}", f"ETag: {etag}", f"Content-Length: {end - start}"]
    body = data[start:end]
    whole = kept("206 Partial Content", body, *headers)
    return whole if send is None else whole[: len(whole) - len(body) + send] + RESET


async def test_one_connection_serves_many_requests() -> None:
    async with opened(script=piece) as scene:
        for start in range(0, 1000, 100):
            assert await read(scene.store, KEY, start, 24) == DATA[start : start + 24]
        assert {request.connection for request in scene.server.requests} == {0}
        assert scene.counters.snapshot() == {"requests": 10}


async def test_an_idle_connection_that_the_server_closed_is_no_failure() -> None:
    async with opened(script=piece, max_attempts=1) as scene:
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        await scene.server.hang_up()
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        assert scene.count("stale_connections") == 1
        assert scene.count("retries") == 0


async def test_a_connection_that_closes_as_the_request_arrives_is_no_failure_once() -> None:
    seen: list[int] = []

    def script(request: Request) -> bytes:
        seen.append(request.connection)
        return RESET if len(seen) == 2 else piece(request)

    async with opened(script=script, max_attempts=1) as scene:
        await read(scene.store, KEY, 0, 10)
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        assert seen == [0, 0, 1]
        assert scene.count("stale_connections") == 1


async def test_a_fresh_connection_that_closes_is_a_failure() -> None:
    async with opened(RESET, max_attempts=1) as scene:
        with pytest.raises(StoreUnavailableError, match="broke the connection off"):
            await read(scene.store, KEY, 0, 10)
        assert scene.count("stale_connections") == 0


async def test_heads_share_connections_and_survive_stale_ones() -> None:
    found = kept("200 OK", b"", "Content-Length: 77", "x-amz-meta-kvs-index: a b")
    async with opened(found, max_attempts=1) as scene:
        for _ in range(3):
            assert await scene.store.head(KEY) == ObjectInfo(KEY, 77, {"kvs-index": "a b"})
        await scene.server.hang_up()
        await asyncio.gather(*(scene.store.head(KEY) for _ in range(5)))
        assert [request.connection for request in scene.server.requests] == [0, 0, 0, 1, 2, 3, 4, 5]
        await asyncio.gather(*(scene.store.head(KEY) for _ in range(5)))
        assert len(scene.server.connections) == 6


async def test_a_head_on_a_connection_that_closes_as_it_arrives_is_asked_again() -> None:
    found = kept("200 OK", b"", "Content-Length: 77")
    async with opened(found, RESET, found, max_attempts=1) as scene:
        assert await scene.store.head(KEY) == await scene.store.head(KEY)
        assert scene.count("stale_connections") == 1


async def test_heads_in_flight_are_bounded_by_the_setting() -> None:
    async with opened(kept("200 OK", b"", "Content-Length: 1"), lookup_concurrency=3) as scene:
        await asyncio.gather(*(scene.store.head(f"a/{number}") for number in range(20)))
        assert len(scene.server.connections) == 3


async def test_a_head_that_is_not_answered_in_time_is_tried_again() -> None:
    def script(request: Request) -> bytes:
        scene.store._client._plane._heads._read_timeout_s = 60.0  # for the answer that comes
        return STALL if len(scene.server.requests) == 1 else kept("200 OK", b"", "Content-Length: 7")

    async with opened(script=script, read_timeout_s=0.2) as scene:
        assert await scene.store.head(KEY) == ObjectInfo(KEY, 7, {})
        assert scene.count("retries") == 1


async def test_a_body_that_breaks_is_resumed_from_there_of_the_same_object_only() -> None:
    def script(request: Request) -> bytes:
        return piece(request, send={0: 300, 300: 200}.get(range_of(request)[0]))

    async with opened(script=script) as scene:
        assert await read(scene.store, KEY, 0, 1000) == DATA[:1000]
        assert [range_of(request) for request in scene.server.requests] == [(0, 1000), (300, 1000), (500, 1000)]
        assert [request.headers.get("if-match") for request in scene.server.requests] == [None, '"one"', '"one"']
        assert scene.count("resumed_bodies") == 2
        assert scene.count("retries") == 2


@pytest.mark.parametrize("plan", [[0], [1], [0, 0, 0], [979, 0], [100, 1, 0, 300], [1] * 9])
async def test_however_often_and_wherever_it_breaks_every_byte_arrives_once(plan: list[int]) -> None:
    breaks = iter(plan)

    def script(request: Request) -> bytes:
        return piece(request, send=next(breaks, None))

    async with opened(script=script, max_attempts=10) as scene:
        buffer = bytearray(b"." * 1000)
        await scene.store.get_range(KEY, 7, memoryview(buffer)[10:990])
        assert buffer == b"." * 10 + DATA[7:987] + b"." * 10


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
async def test_without_a_strong_etag_a_broken_body_is_read_again_from_its_beginning(etag: str) -> None:
    attempts: list[Request] = []

    def script(request: Request) -> bytes:
        attempts.append(request)
        return piece(request, etag=etag, send=300 if len(attempts) == 1 else None)

    async with opened(script=script) as scene:
        assert await read(scene.store, KEY, 0, 1000) == DATA[:1000]
        assert [range_of(request) for request in attempts] == [(0, 1000), (0, 1000)]
        assert scene.count("resumed_bodies") == 0


@pytest.mark.parametrize("heeds_if_match", [True, False])
async def test_an_object_that_was_replaced_meanwhile_is_read_from_its_beginning(heeds_if_match: bool) -> None:
    other = DATA[::-1]

    def script(request: Request) -> bytes:
        if len(scene.server.requests) == 1:
            return piece(request, send=300)
        if heeds_if_match and request.headers.get("if-match", '"two"') != '"two"':
            return error("412 Precondition Failed", "PreconditionFailed")
        return piece(request, data=other, etag='"two"')

    async with opened(script=script, max_attempts=2) as scene:
        assert await read(scene.store, KEY, 0, 1000) == other[:1000]
        assert [range_of(request) for request in scene.server.requests] == [(0, 1000), (300, 1000), (0, 1000)]


async def test_an_object_that_is_replaced_again_and_again_is_unavailable() -> None:
    def script(request: Request) -> bytes:
        if "if-match" in request.headers:
            return error("412 Precondition Failed", "PreconditionFailed")
        return piece(request, send=300)

    async with opened(script=script, max_attempts=3) as scene:
        with pytest.raises(StoreUnavailableError, match="replaced again and again"):
            await read(scene.store, KEY, 0, 1000)


async def test_a_resumed_range_that_is_wrong_is_damage() -> None:
    def script(request: Request) -> bytes:
        if len(scene.server.requests) == 1:
            return piece(request, send=300)
        return answer("206 Partial Content", DATA[:1000], "Content-Range: bytes 0-999/1024", 'ETag: "one"')

    async with opened(script=script) as scene:
        with pytest.raises(DamagedObjectError):
            await read(scene.store, KEY, 0, 1000)


async def test_nothing_lands_before_the_answer_was_found_right() -> None:
    wrong = answer("206 Partial Content", b"y" * 100, "Content-Range: bytes 5-104/200", "Content-Length: 100")
    async with opened(wrong) as scene:
        buffer = bytearray(100)
        with pytest.raises(DamagedObjectError):
            await scene.store.get_range(KEY, 0, memoryview(buffer))
        assert buffer == bytes(100)


async def test_a_transfer_that_is_too_slow_is_given_up_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_s3.objectstore.direct._WATCHED_S", 0.4)
    slow = kept("206 Partial Content", b"", "Content-Length: 1000", "Content-Range: bytes 0-999/1000") + TRICKLE
    async with opened(slow, piece_of_zeros(1000), read_timeout_s=60.0) as scene:
        assert await asyncio.wait_for(read(scene.store, KEY, 0, 1000), PATIENCE_S) == bytes(1000)
        assert scene.count("slow_transfers") == 1


def piece_of_zeros(size: int) -> bytes:
    return kept("206 Partial Content", bytes(size), f"Content-Range: bytes 0-{size - 1}/{size}")


async def test_a_slow_answer_is_waited_for_as_long_as_the_read_timeout_says() -> None:
    async with opened(STALL, read_timeout_s=0.5, max_attempts=1) as scene:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(StoreUnavailableError, match="did not answer in time"):
            await read(scene.store, KEY, 0, 10)
        assert 0.4 < loop.time() - began < 20


async def test_the_deadline_ends_a_request_wherever_it_is() -> None:
    async with opened(STALL, read_timeout_s=60.0, request_deadline_s=0.3) as scene:
        with pytest.raises(StoreUnavailableError, match="did not answer in time"):
            await asyncio.wait_for(read(scene.store, KEY, 0, 10), PATIENCE_S)
        with pytest.raises(StoreUnavailableError, match="did not answer in time"):
            await asyncio.wait_for(scene.store.put(KEY, b"x"), PATIENCE_S)
        with pytest.raises(StoreUnavailableError, match="did not answer in time"):
            await asyncio.wait_for(scene.store.head(KEY), PATIENCE_S)


async def test_a_request_allocates_next_to_nothing_beside_the_callers_buffer() -> None:
    data = bytes(4 * MiB)
    whole = kept("206 Partial Content", data, f"Content-Range: bytes 0-{len(data) - 1}/{len(data)}")
    async with running(lambda request: whole) as server:
        scene = Scene(server)
        target = memoryview(bytearray(len(data)))
        await scene.store.get_range(KEY, 0, target)
        wire = scene.store._client._plane._connections._idle[-1][0]
        assert len(wire.scratch) <= 16 * 1024
        tracemalloc.start()
        fetched = Download(KEY, 0, target)
        request = b"GET / HTTP/1.1\r\n\r\n"
        await asyncio.to_thread(fetch, wire, request, fetched, Limits(60.0, 1, 60.0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        await scene.store.close()
    assert peak < MiB, "of which the server, in the same process, takes some"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def no_more_descriptors_than(before: int, server: ScriptedServer) -> None:
    """Soon: the server may hear of a connection only after its end."""
    for _ in range(1000):
        await server.hang_up()
        if descriptors() <= before:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a connection was left open")


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20, 100])
@pytest.mark.parametrize("verb", ["get", "put", "head"])
async def test_a_cancelled_request_ends_at_once_and_leaves_no_connection(verb: str, turns: int) -> None:
    stalled = kept("206 Partial Content", b"x" * 10, "Content-Length: 1000", "Content-Range: bytes 0-999/1000") + STALL

    def script(request: Request) -> bytes:
        return STALL if request.method == "HEAD" else stalled

    async with opened(script=script, read_timeout_s=60.0) as scene:
        with pytest.raises(DamagedObjectError):  # everything is warm: threads, the client
            await read(scene.store, KEY, 5, 10)
        before = descriptors()
        buffer = bytearray(1000)
        match verb:
            case "get":
                work = scene.store.get_range(KEY, 0, memoryview(buffer))
            case "put":
                work = scene.store.put(KEY, bytes(4 * MiB))
            case _:
                work = scene.store.head(KEY)
        task = asyncio.create_task(work)
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE_S)
        del task, work  # and with them the exception, whose frames know the buffer
        buffer[:] = bytes(1000)
        await no_more_descriptors_than(before, scene.server)
        assert not any(buffer)
        await resized(buffer)  # nobody holds the buffer any more


async def resized(buffer: bytearray) -> None:
    """Soon: a thread that is done with it may still be on its way out of its last function."""
    for _ in range(1000):
        try:
            buffer.append(0)
        except BufferError:
            await asyncio.sleep(0.01)
        else:
            return
    raise AssertionError("somebody holds the buffer")


async def test_closing_ends_what_is_under_way() -> None:
    arrived = asyncio.Event()

    def script(request: Request) -> bytes:
        if len(scene.server.requests) == 2:
            arrived.set()
        return STALL

    async with opened(script=script, read_timeout_s=60.0) as scene:
        waiting = [asyncio.create_task(work) for work in (read(scene.store, KEY, 0, 10), scene.store.head(KEY))]
        await arrived.wait()
        await scene.store.close()
        for task in waiting:
            with pytest.raises(StoreUnavailableError):
                await asyncio.wait_for(task, PATIENCE_S)


async def test_a_put_carries_a_checksum_that_the_server_can_verify() -> None:
    async with opened(kept("200 OK", b"", 'ETag: "x"')) as scene:
        for size in (0, 5, 100_000):
            await scene.store.put(KEY, DATA * (size // 1024 + 1))
        for request in scene.server.requests:
            expected = base64.b64encode(crc32c(request.body).to_bytes(4, "big")).decode()
            assert request.headers["x-amz-checksum-crc32c"] == expected
            assert "x-amz-checksum-crc32c" in request.headers["authorization"]
            assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"


@pytest.mark.parametrize(
    ("status", "code"), [("501 Not Implemented", "NotImplemented"), ("400 Bad Request", "InvalidRequest")]
)
async def test_a_server_that_refuses_checksums_is_used_without_and_that_is_said_once(
    status: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: Request) -> bytes:
        refused = "x-amz-checksum-crc32c" in request.headers
        return error(status, code) if refused else kept("200 OK", b"", 'ETag: "x"')

    async with opened(script=script) as scene:
        assert await scene.store.put(KEY, b"x")
        assert await scene.store.put(KEY, b"y")
        assert ["x-amz-checksum-crc32c" in request.headers for request in scene.server.requests] == [True, False, False]
    assert [record.message for record in caplog.records if "CRC-32C" in record.message] == [
        "s3://bucket/prefix: the server takes no CRC-32C; uploads go without"
    ]


async def test_a_body_that_was_damaged_on_its_way_is_sent_again() -> None:
    async with opened(error("400 Bad Request", "BadDigest"), kept("200 OK")) as scene:
        assert await scene.store.put(KEY, b"some bytes")
        assert scene.count("retries") == 1


async def test_a_large_body_is_not_sent_to_a_server_that_has_the_object() -> None:
    received = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await reader.readuntil(b"\r\n\r\n")
        writer.write(error("412 Precondition Failed", "PreconditionFailed"))
        received += len(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        scene = Scene(ScriptedServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", []))
        assert await scene.store.put(KEY, bytes(4 * MiB)) is False
        await scene.store.close()
    assert received == 0


async def test_a_server_that_answers_and_hangs_up_in_the_middle_of_a_body_is_understood() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(error("403 Forbidden", "AccessDenied"))
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
    async with server:
        scene = Scene(ScriptedServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", []))
        with pytest.raises((StoreRefusedError, StoreUnavailableError)):
            await scene.store.put(KEY, bytes(5 * MiB), replace=True)
        await scene.store.close()


@pytest.mark.parametrize("consent", [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"])
async def test_a_body_is_sent_with_the_servers_consent_or_after_a_while_without(consent: bytes) -> None:
    body = os.urandom(MiB)
    received = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(consent)
        received.append(await reader.readexactly(len(body)))
        writer.write(kept("200 OK"))
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        scene = Scene(ScriptedServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", []))
        assert await scene.store.put(KEY, body)
        await scene.store.close()
    assert received == [body]


async def test_a_server_that_knows_no_expect_is_not_asked_first_again() -> None:
    def script(request: Request) -> bytes:
        return error("417 Expectation Failed", "ExpectationFailed") if "expect" in request.headers else kept("200 OK")

    async with opened(script=script) as scene:
        assert await scene.store.put(KEY, bytes(MiB))
        assert await scene.store.put(KEY, bytes(MiB))
        assert ["expect" in request.headers for request in scene.server.requests] == [True, False, False]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (error("503 Slow Down", "SlowDown"), StoreBusyError),
        (error("429 Too Many Requests", "TooManyRequests"), StoreBusyError),
        (error("503 Service Unavailable", "ServiceUnavailable"), StoreUnavailableError),
        (error("500 Internal Server Error", "InternalError"), StoreUnavailableError),
    ],
)
async def test_a_server_that_asks_to_slow_down_is_busy_and_others_are_unavailable(
    fault: bytes, kind: type[StoreUnavailableError]
) -> None:
    async with opened(fault, max_attempts=1) as scene:
        for attempt in (read(scene.store, KEY, 0, 10), scene.store.put(KEY, b"x")):
            with pytest.raises(StoreUnavailableError) as caught:
                await attempt
            assert type(caught.value) is kind


async def test_retry_after_is_heeded() -> None:
    asked = error("503 Slow Down", "SlowDown", "Retry-After: 1")
    async with opened(asked, piece_of_zeros(10)) as scene:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await read(scene.store, KEY, 0, 10) == bytes(10)
        assert loop.time() - began >= 0.99


async def test_a_store_that_is_down_is_not_asked_several_times_as_much() -> None:
    async with opened(error("503 Slow Down", "SlowDown"), retry_ratio=0.1) as scene:
        results = await asyncio.gather(*(read(scene.store, KEY, 0, 10) for _ in range(50)), return_exceptions=True)
        assert all(isinstance(result, StoreBusyError) for result in results)
        assert len(scene.server.requests) <= 50 + 10 + 5


@pytest.mark.parametrize(
    "strange",
    [
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
        b"HTTP/1.0 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nConnection: close\r\n\r\n0123456789",
    ],
)
async def test_an_answer_that_is_not_understood_is_read_by_the_aws_client_which_then_takes_over(
    strange: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(strange) as scene:
        for _ in range(5):
            assert await read(scene.store, KEY, 0, 10) == b"0123456789"
        assert not scene.direct
        assert scene.count("data_plane_fallbacks") == 1
        assert len(scene.server.requests) == 3 * 2 + 2
    assert len([record for record in caplog.records if "bytes go by the AWS client" in record.message]) == 1


async def test_a_proxy_is_left_to_the_aws_client_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: Request) -> bytes:
        assert request.target.startswith("http://s3.example/bucket/prefix/")
        return answer("206 Partial Content", b"0123456789", "Content-Range: bytes 0-9/100")

    async with running(script) as server:
        monkeypatch.setenv("HTTP_PROXY", server.endpoint)
        scene = Scene(server, endpoint_url="http://s3.example")
        for _ in range(2):
            assert await read(scene.store, KEY, 0, 10) == b"0123456789"
        assert not scene.direct
        assert scene.count("data_plane_fallbacks") == 1
        await scene.store.close()
    assert [record.levelno for record in caplog.records if "proxy" in record.message] == [logging.WARNING]


async def test_a_proxy_that_does_not_apply_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with opened(script=piece) as scene:
        await read(scene.store, KEY, 0, 10)
        assert scene.direct


@pytest.mark.parametrize("status", ["301 Moved Permanently", "307 Temporary Redirect", "400 Bad Request"])
async def test_a_bucket_in_another_region_is_followed_once_and_remembered(
    status: str, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: Request) -> bytes:
        if "/eu-west-9/s3/" in request.headers["authorization"]:
            return piece(request) if request.method == "GET" else kept("200 OK", b"", "Content-Length: 5")
        return error(status, "PermanentRedirect", "x-amz-bucket-region: eu-west-9")

    async with opened(script=script) as scene:
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        assert await scene.store.head(KEY) is not None
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        assert len(scene.server.requests) == 4
    assert len([record for record in caplog.records if "eu-west-9" in record.message]) == 1


async def test_regions_that_point_at_each_other_end_in_a_refusal() -> None:
    def script(request: Request) -> bytes:
        there = "us-east-1" if "/eu-west-9/s3/" in request.headers["authorization"] else "eu-west-9"
        return error("301 Moved Permanently", "PermanentRedirect", f"x-amz-bucket-region: {there}")

    async with opened(script=script) as scene:
        for _ in range(2):
            with pytest.raises(StoreRefusedError, match="another region; set region"):
                await read(scene.store, KEY, 0, 10)
        assert len(scene.server.requests) == 3


async def test_expired_credentials_are_looked_up_once_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))

    def write(token: str) -> None:
        profile.write_text(f"[default]\naws_access_key_id=AKIA\naws_secret_access_key=x\naws_session_token={token}\n")

    def script(request: Request) -> bytes:
        fresh = request.headers["x-amz-security-token"] == "second"
        return piece(request) if fresh else error("400 Bad Request", "ExpiredToken")

    write("first")
    async with opened(script=script) as scene:
        with pytest.raises(StoreRefusedError, match="session token has expired; renew"):
            await read(scene.store, KEY, 0, 10)
        assert len(scene.server.requests) == 1  # there were no others to try
        write("second")
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        assert len(scene.server.requests) == 4


async def test_a_port_that_refuses_connections_is_told_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        scene = Scene(ScriptedServer(f"http://127.0.0.1:{taken.getsockname()[1]}", []))
        for attempt in (read(scene.store, KEY, 0, 10), scene.store.head(KEY), scene.store.put(KEY, b"x")):
            with pytest.raises(StoreUnavailableError, match="cannot be reached; is endpoint_url right"):
                await asyncio.wait_for(attempt, PATIENCE_S)
        await scene.store.close()


async def test_a_host_that_does_not_answer_is_given_up_within_the_connect_timeout() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with socket.create_connection(address):  # the only place in its queue; more are not answered
            scene = Scene(ScriptedServer(f"http://127.0.0.1:{address[1]}", []), connect_timeout_s=0.3, max_attempts=1)
            for attempt in (read(scene.store, KEY, 0, 10), scene.store.head(KEY), scene.store.put(KEY, b"x")):
                with pytest.raises(StoreUnavailableError, match="cannot be reached; is endpoint_url right"):
                    await asyncio.wait_for(attempt, PATIENCE_S)
            await scene.store.close()


async def test_of_several_addresses_one_that_answers_is_enough() -> None:
    async with running(piece) as server:
        port = server.endpoint.rpartition(":")[2]
        scene = Scene(server, endpoint_url=f"http://localhost:{port}", max_attempts=1)  # perhaps ::1 as well
        for _ in range(3):
            assert await read(scene.store, KEY, 0, 10) == DATA[:10]
            await server.hang_up()
        assert server.requests[0].headers["host"] == f"localhost:{port}"
        await scene.store.close()


async def test_a_host_without_an_address_is_told_by_name() -> None:
    scene = Scene(ScriptedServer("http://no-such-host.invalid:9000", []), max_attempts=1)
    with pytest.raises(StoreUnavailableError, match="cannot be reached; is endpoint_url right"):
        await asyncio.wait_for(read(scene.store, KEY, 0, 10), PATIENCE_S)
    await scene.store.close()


async def test_buckets_may_be_addressed_as_hosts() -> None:
    async with running(piece) as server:
        port = server.endpoint.rpartition(":")[2]
        scene = Scene(server, endpoint_url=f"http://localhost:{port}", path_style=False)
        client = scene.store._client
        route = await (await client._open()).find_route("bucket")
        assert (route.host, route.authority, route.path) == ("bucket.localhost", f"bucket.localhost:{port}", "/")
        await scene.store.close()


async def test_ipv6_is_served() -> None:
    try:
        async with running(piece, host="::1") as server:
            scene = Scene(server)
            assert await read(scene.store, KEY, 0, 10) == DATA[:10]
            assert server.requests[0].headers["host"] == server.endpoint.removeprefix("http://")
            assert scene.direct
            await scene.store.close()
    except OSError:
        pytest.skip("this machine has no IPv6")
