"""s3:// passes the suite by either data plane: on moto (always), MinIO and versitygw (`make test-servers`)."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from local_server import LocalServer
from objectstore.suite import KEY, PART, ObjectStoreSuite, names
from servers import BUCKET, MOTO_PAGE

from kvstore_s3.config import Settings
from kvstore_s3.errors import StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore import s3_client
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.open import open_store
from kvstore_s3.objectstore.s3 import S3Store


@pytest.fixture(params=["direct", "aiobotocore"], autouse=True)
def plane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Each way for the bytes in turn."""
    monkeypatch.setenv("KVSTORE_S3_DATA_PLANE", request.param)
    monkeypatch.setenv("KVSTORE_S3_CACHE_DIR", str(tmp_path))
    return str(request.param)


@pytest.fixture(
    params=[
        "moto",
        pytest.param("minio", marks=pytest.mark.server),
        pytest.param("versitygw", marks=pytest.mark.server),
    ]
)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    """Each S3 server in turn, in the environment of the test."""
    found: LocalServer = request.getfixturevalue(request.param)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
async def store(server: LocalServer) -> AsyncIterator[ObjectStore]:
    store = open_store(f"s3://{BUCKET}/Tests/{secrets.token_hex(8)}", Settings(multipart_bytes=PART))
    yield store
    await store.close()


def uploads_under_way(server: LocalServer, store: ObjectStore, key: str) -> list[str]:
    """Ids of the multipart uploads of `key`; MinIO lists them by their exact key only."""
    name = f"{urlsplit(store.url).path[1:]}/{key}"
    with server.client() as client:
        return [upload.upload_id for upload in client._list_multipart_uploads(BUCKET, prefix=name).uploads]


@pytest.fixture
def atomic(server: LocalServer) -> None:
    if server.name == "moto":
        pytest.skip("moto looks before it writes, not while it does, and ignores If-None-Match on Complete")


async def test_the_bytes_go_the_way_that_was_asked_for(server: LocalServer, store: S3Store, plane: str) -> None:
    await store.put(KEY, b"some bytes")
    assert (store._client._plane is not None) == (plane == "direct")


class TestS3Store(ObjectStoreSuite):
    @pytest.fixture
    def page(self, server: LocalServer) -> int:
        return MOTO_PAGE if server.name == "moto" else 1000

    @pytest.fixture
    def atomic(self, atomic: None) -> None:
        """As above: not on moto."""


@pytest.mark.parametrize("wait_for", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_cancelled_upload_is_aborted(
    server: LocalServer, store: S3Store, monkeypatch: pytest.MonkeyPatch, wait_for: str, when: str
) -> None:
    at_work, call = asyncio.Event(), store._client.call

    async def pausing_call(operation: str, *arguments: object, **options: object) -> object:
        if operation != wait_for:
            return await call(operation, *arguments, **options)
        if when == "before":
            at_work.set()
            await asyncio.sleep(0.05 if wait_for == "create_multipart_upload" else 60)
        answer = await call(operation, *arguments, **options)
        at_work.set()
        if wait_for != "create_multipart_upload":
            await asyncio.sleep(60)
        return answer

    monkeypatch.setattr(store._client, "call", pausing_call)
    task = asyncio.create_task(store.put(KEY, os.urandom(3 * PART)))
    await at_work.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(uploads_under_way, server, store, KEY) == []
    completed = (wait_for, when) == ("complete_multipart_upload", "after")
    assert (await store.head(KEY) is not None) == completed


async def test_an_upload_is_in_the_journal_from_before_its_creation_until_nothing_is_left(
    server: LocalServer, store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call, seen = store._client.call, []

    def journaled() -> list[str]:
        return [path.read_text() for path in (tmp_path / "uploads").glob("*.jsonl")]

    async def watching_call(operation: str, *arguments: object, **options: object) -> object:
        seen.append((operation, any(KEY in text for text in journaled())))
        return await call(operation, *arguments, **options)

    monkeypatch.setattr(store._client, "call", watching_call)
    await store.put(KEY, bytes(PART + 1))
    assert ("create_multipart_upload", True) in seen
    assert ("complete_multipart_upload", True) in seen
    await store.close()
    assert journaled() == []


async def test_an_upload_that_cannot_be_aborted_stays_in_the_journal(
    server: LocalServer, store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call = store._client.call

    async def failing_call(operation: str, *arguments: object, **options: object) -> object:
        if operation in ("upload_part", "abort_multipart_upload"):
            raise StoreUnavailableError("the network is gone")
        return await call(operation, *arguments, **options)

    monkeypatch.setattr(store._client, "call", failing_call)
    with pytest.raises(StoreUnavailableError, match="the network is gone"):
        await store.put(KEY, bytes(PART + 1))
    await store.close()
    (journal,) = (tmp_path / "uploads").glob("*.jsonl")
    assert KEY in journal.read_text()


async def test_an_upload_that_fails_in_the_middle_is_aborted(
    server: LocalServer, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = store._client.call

    async def failing_call(operation: str, arguments: dict[str, object], **options: object) -> object:
        if operation == "upload_part" and arguments["PartNumber"] == 2:
            raise StoreUnavailableError("the network is gone")
        return await call(operation, arguments, **options)

    monkeypatch.setattr(store._client, "call", failing_call)
    with pytest.raises(StoreUnavailableError, match="the network is gone"):
        await store.put(KEY, os.urandom(3 * PART))
    assert await asyncio.to_thread(uploads_under_way, server, store, KEY) == []
    assert await store.head(KEY) is None


@pytest.mark.usefixtures("atomic")
async def test_the_loser_of_a_race_leaves_no_upload_behind(server: LocalServer, store: ObjectStore) -> None:
    created = await asyncio.gather(*(store.put(KEY, bytes(2 * PART)) for _ in range(3)))
    assert created.count(True) == 1
    assert await asyncio.to_thread(uploads_under_way, server, store, KEY) == []


async def test_parts_in_flight_are_bounded(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"s3://{BUCKET}/{secrets.token_hex(8)}", Settings(multipart_bytes=PART, upload_concurrency=2))
    assert isinstance(store, S3Store)
    call, running, most = store._client.call, 0, 0

    async def counting_call(operation: str, *arguments: object, **options: object) -> object:
        nonlocal running, most
        body = options.get("body")
        running += body is not None
        most = max(most, running)
        try:
            return await call(operation, *arguments, **options)
        finally:
            running -= body is not None

    monkeypatch.setattr(store._client, "call", counting_call)
    try:
        await asyncio.gather(store.put("a", bytes(4 * PART)), store.put("b", bytes(4 * PART)), store.put("c", b"x"))
    finally:
        await store.close()
    assert most == 2


async def test_foreign_objects_are_not_listed(server: LocalServer, store: ObjectStore) -> None:
    await store.put("ours", b"x")
    foreign = open_store(f"s3://{BUCKET}/{urlsplit(store.url).path[1:]}/Foreign", Settings())
    await foreign.put("theirs", b"x")
    await foreign.close()
    assert await names(store.list()) == ["ours"]


async def test_a_missing_bucket_is_refused_and_never_a_miss(server: LocalServer) -> None:
    store = open_store("s3://no-such-bucket/prefix", Settings())
    try:
        for attempt in (store.probe(), store.head(KEY), store.put(KEY, b"x"), store.delete(KEY), names(store.list())):
            with pytest.raises(StoreRefusedError, match=r"no-such-bucket.*bucket does not exist.*NoSuchBucket"):
                await attempt
        with pytest.raises(StoreRefusedError, match="NoSuchBucket"):
            await store.get_range(KEY, 0, memoryview(bytearray(1)))
    finally:
        await store.close()


@pytest.mark.server
@pytest.mark.parametrize("server", ["minio", "versitygw"], indirect=True)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "AWS_ACCESS_KEY_ID",
            "nobody-at-all",
            "the access key is not known there.*(InvalidAccessKeyId|XAdminUserNotFound)",
        ),
        ("AWS_SECRET_ACCESS_KEY", "s3cr3t-and-wrong", "the secret key does not belong.*SignatureDoesNotMatch"),
    ],
)
async def test_wrong_credentials_are_refused_without_being_shown(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    store = open_store(f"s3://{BUCKET}/prefix", Settings())
    try:
        with pytest.raises(StoreRefusedError, match=message) as caught:
            await store.probe()
    finally:
        await store.close()
    assert value not in str(caught.value)
    assert server.secret_key not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_no_credentials_are_refused_with_the_ways_to_give_them(
    moto: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_store(f"s3://{BUCKET}/prefix", Settings())
    try:
        with pytest.raises(StoreRefusedError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile"):
            await store.probe()
    finally:
        await store.close()


@pytest.mark.server
@pytest.mark.parametrize("server", ["minio", "versitygw"], indirect=True)
@pytest.mark.parametrize("size", [5, PART + 1])
async def test_the_server_verifies_the_checksum_of_what_arrives(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    async def of_something_else(body: memoryview) -> str:
        return base64.b64encode(bytes(4)).decode()

    monkeypatch.setattr(s3_client, "_checksum", of_something_else)
    with pytest.raises(StoreUnavailableError, match=r"BadDigest|XAmzContentChecksumMismatch"):
        await store.put(KEY, b"x" * size)
    assert await store.head(KEY) is None
