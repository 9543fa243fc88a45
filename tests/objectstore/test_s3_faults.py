"""What s3:// makes of answers that it should not get: retried, refused or damaged, and told in one clear line."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from local_server import LocalServer
from objectstore.scripted_server import RESET, STALL, TRICKLE, Request, ScriptedServer, answer, error, running
from objectstore.suite import KEY, PART, read

from kvstore_s3.config import Settings
from kvstore_s3.errors import DamagedObjectError, StoreError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.open import open_store

GOOD = answer("206 Partial Content", b"0123456789", "Content-Range: bytes 0-9/100")
LISTING = b"<ListBucketResult><Name>bucket</Name></ListBucketResult>"
SLOW_DOWN = error("503 Slow Down", "SlowDown")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASHOWN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")


@pytest.fixture(params=["direct", "aiobotocore"], autouse=True)
def plane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each way for the bytes in turn."""
    monkeypatch.setenv("KVSTORE_S3_DATA_PLANE", request.param)
    monkeypatch.setenv("KVSTORE_S3_CACHE_DIR", str(tmp_path))


@asynccontextmanager
async def opened(
    *answers: bytes, script: Callable[[Request], bytes] | None = None, patience_s: float = 20.0
) -> AsyncIterator[tuple[ObjectStore, ScriptedServer]]:
    """A store whose server gives these answers in turn, the last one for ever, or those of `script`."""
    turns = iter([*answers[:-1]])
    async with running(script or (lambda _: next(turns, answers[-1]))) as server:
        settings = Settings(
            endpoint_url=server.endpoint, connect_timeout_s=patience_s, read_timeout_s=patience_s, multipart_bytes=PART
        )
        store = open_store("s3://bucket/prefix", settings)
        try:
            yield store, server
        finally:
            await store.close()


@pytest.mark.parametrize(
    "fault",
    [
        SLOW_DOWN,
        error("500 Internal Server Error", "InternalError"),
        error("429 Too Many Requests", "TooManyRequests"),
        error("400 Bad Request", "RequestTimeout"),
        RESET,
        STALL,
        answer("206 Partial Content", b"0123", "Content-Length: 10", "Content-Range: bytes 0-9/100"),
        answer("206 Partial Content", b"0123", "Content-Length: 10", "Content-Range: bytes 0-9/100") + RESET,
        answer("206 Partial Content", b"0123", "Content-Length: 10", "Content-Range: bytes 0-9/100") + STALL,
    ],
)
async def test_a_passing_fault_is_retried_and_heals(fault: bytes) -> None:
    patience_s = 3.0 if fault.endswith(STALL) else 20.0  # the good answer, too, must come within it
    async with opened(fault, fault, GOOD, patience_s=patience_s) as (store, server):
        assert await read(store, KEY, 0, 10) == b"0123456789"
        assert len(server.requests) == 3


async def test_a_lasting_fault_is_unavailable_after_the_last_attempt() -> None:
    async with opened(SLOW_DOWN) as (store, server):
        with pytest.raises(StoreUnavailableError, match=r"s3://bucket/prefix.*try again later \[SlowDown\]"):
            await read(store, KEY, 0, 10)
        assert len(server.requests) == Settings().max_attempts


async def test_a_connection_that_always_breaks_is_unavailable() -> None:
    async with opened(RESET) as (store, server):
        with pytest.raises(StoreUnavailableError, match="broke the connection off"):
            await read(store, KEY, 0, 10)
        assert len(server.requests) <= 2 * Settings().max_attempts  # aiohttp repeats a GET once of its own accord


async def test_a_body_that_trickles_is_given_up() -> None:
    body = answer("206 Partial Content", b"", "Content-Length: 1000", "Content-Range: bytes 0-999/1000") + TRICKLE
    async with opened(body, patience_s=0.5) as (store, _):
        with pytest.raises(StoreUnavailableError, match="did not answer in time"):
            await asyncio.wait_for(read(store, KEY, 0, 1000), 60)


@pytest.mark.parametrize(
    "wrong",
    [
        answer("206 Partial Content", b"01234", "Content-Range: bytes 0-4/5"),
        answer("206 Partial Content", b"0123456789", "Content-Range: bytes 1-10/100"),
        answer("206 Partial Content", b"0123456789", "Content-Range: bytes 0-10/100"),
        answer("206 Partial Content", b"0123456789"),
        answer("206 Partial Content", b"0123456789", "Content-Range: nonsense"),
        answer("206 Partial Content", b"0123456789a", "Content-Range: bytes 0-9/100"),
        answer("200 OK", b"0123456789"),
        answer("200 OK", b"0123456789" * 10),
        error("416 Range Not Satisfiable", "InvalidRange"),
    ],
)
async def test_an_answer_that_is_not_the_range_is_damage_and_is_not_retried(wrong: bytes) -> None:
    async with opened(wrong) as (store, server):
        with pytest.raises(DamagedObjectError):
            await read(store, KEY, 0, 10)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        ("404 Not Found", "NoSuchBucket", "the bucket does not exist; create it"),
        ("403 Forbidden", "AccessDenied", "lack permission; s3:ListBucket, GetObject"),
        ("403 Forbidden", "InvalidAccessKeyId", "access key is not known"),
        ("403 Forbidden", "SignatureDoesNotMatch", "secret key does not belong"),
        ("400 Bad Request", "ExpiredToken", "token has expired; renew"),
        ("403 Forbidden", "RequestTimeTooSkewed", "set the clock"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "another region; set region"),
        ("418 I'm a teapot", "Teapot", r"the server refused the request.*\[Teapot\]"),
    ],
)
async def test_a_refusal_says_what_to_do_and_no_secrets(status: str, code: str, message: str) -> None:
    async with opened(error(status, code)) as (store, server):
        for attempt in (store.probe(), store.put(KEY, b"x"), read(store, KEY, 0, 1)):
            with pytest.raises(StoreRefusedError, match=message) as caught:
                await attempt
            told = str(caught.value)
            assert "AKIASHOWN" not in told
            assert "s3cr3t" not in told
            assert "\n" not in told
            assert server.endpoint in told
        assert len(server.requests) == 3


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><p>Hello", b"<html><body>Hello</body></html>", b"", b"{}"])
async def test_a_web_server_is_no_object_store(page: bytes) -> None:
    async with opened(answer("200 OK", page, "Content-Type: text/html")) as (store, _):
        with pytest.raises(StoreError, match=r"(does not answer like an S3 server; correct|is it one\?)"):
            await store.probe()


async def test_a_port_that_refuses_connections_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        port = taken.getsockname()[1]
        store = open_store("s3://bucket/prefix", Settings(endpoint_url=f"http://127.0.0.1:{port}"))
        try:
            with pytest.raises(StoreUnavailableError, match=rf":{port} cannot be reached; is endpoint_url right"):
                await asyncio.wait_for(store.probe(), 60)
        finally:
            await store.close()


async def test_tls_with_a_server_that_has_none_is_refused(moto: LocalServer) -> None:
    store = open_store("s3://bucket", Settings(endpoint_url=moto.endpoint.replace("http:", "https:")))
    try:
        with pytest.raises(StoreRefusedError, match="offers no valid TLS; use http://"):
            await store.probe()
    finally:
        await store.close()


async def test_a_miss_costs_one_request_once_the_bucket_was_seen() -> None:
    def script(request: Request) -> bytes:
        return answer("404 Not Found") if request.method == "HEAD" else answer("200 OK", LISTING)

    async with opened(script=script) as (store, server):
        assert await asyncio.gather(*(store.head(f"a/{number}") for number in range(5))) == [None] * 5
        assert sorted(request.method for request in server.requests) == ["GET"] + ["HEAD"] * 5


async def test_a_conflict_on_put_is_tried_again() -> None:
    async with opened(error("409 Conflict", "ConditionalRequestConflict"), answer("200 OK")) as (store, server):
        assert await store.put(KEY, b"some bytes") is True
        assert [request.body for request in server.requests] == [b"some bytes"] * 2
        assert server.requests[1].headers["if-none-match"] == "*"


async def test_a_put_whose_acknowledgement_is_lost_ends_well() -> None:
    async with opened(RESET, error("412 Precondition Failed", "PreconditionFailed")) as (store, _):
        assert await store.put(KEY, b"some bytes") is False


class MultipartScript:
    """An S3 server that knows multipart uploads alone, and answers Complete as the test says."""

    def __init__(self, *completions: bytes, exists: bool = False) -> None:
        self.completions = list(completions)
        self.exists = [False, exists]
        self.created: list[str] = []
        self.aborted: list[str] = []

    def __call__(self, request: Request) -> bytes:
        upload = request.target.rpartition("uploadId=")[2].split("&")[0]
        match request.method:
            case "HEAD":
                return answer("200 OK" if self.exists.pop(0) else "404 Not Found")
            case "GET":
                return answer("200 OK", LISTING)
            case "DELETE":
                self.aborted.append(upload)
                return answer("204 No Content")
            case "PUT":
                return answer("200 OK", b"", 'ETag: "x"')
        if request.target.endswith("?uploads"):
            self.created.append(f"upload-{len(self.created)}")
            result = f"<UploadId>{self.created[-1]}</UploadId>"
            return answer("200 OK", f"<InitiateMultipartUploadResult>{result}</InitiateMultipartUploadResult>".encode())
        return self.completions.pop(0)


COMPLETED = answer("200 OK", b"<CompleteMultipartUploadResult><Key>k</Key></CompleteMultipartUploadResult>")
CONFLICT = error("409 Conflict", "ConditionalRequestConflict")
NO_UPLOAD = error("404 Not Found", "NoSuchUpload")


async def test_a_conflict_on_complete_starts_again_from_create() -> None:
    script = MultipartScript(CONFLICT, COMPLETED)
    async with opened(script=script) as (store, _):
        assert await store.put(KEY, bytes(PART + 1)) is True
    assert script.created == ["upload-0", "upload-1"]
    assert script.aborted == ["upload-0"]


async def test_conflicts_without_end_are_unavailable_and_aborted() -> None:
    script = MultipartScript(CONFLICT, CONFLICT, CONFLICT)
    async with opened(script=script) as (store, _):
        with pytest.raises(StoreUnavailableError, match="another writer"):
            await store.put(KEY, bytes(PART + 1))
    assert script.aborted == script.created == ["upload-0", "upload-1", "upload-2"]


async def test_a_complete_that_lost_its_race_is_aborted_and_no_failure() -> None:
    script = MultipartScript(error("412 Precondition Failed", "PreconditionFailed"))
    async with opened(script=script) as (store, _):
        assert await store.put(KEY, bytes(PART + 1)) is False
    assert script.aborted == ["upload-0"]


async def test_a_complete_whose_acknowledgement_is_lost_ends_well() -> None:
    script = MultipartScript(RESET, NO_UPLOAD, exists=True)
    async with opened(script=script) as (store, _):
        assert await store.put(KEY, bytes(PART + 1)) is True
    assert script.created == ["upload-0"]


async def test_an_error_inside_a_200_answer_to_complete_is_no_success() -> None:
    late = answer("200 OK", b"<Error><Code>InternalError</Code><Message>late</Message></Error>")
    script = MultipartScript(late, late, late)
    async with opened(script=script) as (store, _):
        with pytest.raises(StoreError):
            await store.put(KEY, bytes(PART + 1))
    assert script.aborted == ["upload-0"]


@pytest.mark.parametrize(("found", "outcome"), [("200 OK", False), ("404 Not Found", None)])
async def test_a_put_whose_answers_are_lost_finds_out_whether_the_object_is_there(
    found: str, outcome: bool | None
) -> None:
    def script(request: Request) -> bytes:
        if request.method == "PUT":
            return RESET
        return answer(found, b"", "Content-Length: 10") if request.method == "HEAD" else answer("200 OK", LISTING)

    async with opened(script=script) as (store, _):
        if outcome is None:
            with pytest.raises(StoreUnavailableError):
                await store.put(KEY, b"0123456789")
        else:
            assert await store.put(KEY, b"0123456789") is outcome
