"""Unfinished multipart uploads are found and aborted, on moto (always), on a real MinIO and on versitygw."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from local_server import LocalServer
from objectstore.suite import KEY, PART
from servers import BUCKET

from kvstore_s3.config import Settings
from kvstore_s3.errors import StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore.open import open_store
from kvstore_s3.objectstore.s3 import S3Store
from kvstore_s3.objectstore.s3_uploads import S3Uploads
from kvstore_s3.objectstore.upload_journal import UploadJournal

SERVERS = [
    "moto",
    pytest.param("minio", marks=pytest.mark.server),
    pytest.param("versitygw", marks=pytest.mark.server),
]
HOUR = 3600.0

WRITER = """
import asyncio, os, sys
from pathlib import Path
from kvstore_s3.config import Settings
from kvstore_s3.objectstore.open import open_store

async def main():
    url, cache, key, part, step = sys.argv[1:]
    store = open_store(url, Settings(multipart_bytes=int(part), upload_concurrency=1, cache_dir=Path(cache)))
    call, parts = store._client.call, []

    async def stopping_call(operation, *arguments, **options):
        parts.append(operation)
        if operation == step and parts.count(operation) == (2 if operation == "upload_part" else 1):
            print("ready", flush=True)
            await asyncio.sleep(3600)
        return await call(operation, *arguments, **options)

    store._client.call = stopping_call
    await store.put(key, os.urandom(2 * int(part) + 1))

asyncio.run(main())
"""


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    """Each S3 server in turn, in the environment of the test."""
    found: LocalServer = request.getfixturevalue(request.param)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def base() -> str:
    return f"Uploads/{secrets.token_hex(8)}"


@pytest.fixture
async def store(server: LocalServer, base: str, tmp_path: Path) -> AsyncIterator[S3Store]:
    settings = Settings(multipart_bytes=PART, cache_dir=tmp_path / "cache")
    store = open_store(f"s3://{BUCKET}/{base}", settings)
    assert isinstance(store, S3Store)
    yield store
    await store.close()


@pytest.fixture
def uploads(store: S3Store) -> S3Uploads:
    return store.uploads


def begin(server: LocalServer, key: str) -> str:
    """Begin an upload that nobody will complete, and return its id."""
    with server.client() as client:
        return str(client._create_multipart_upload(BUCKET, key, {}))


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*.jsonl"))


def start_writer(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True)


async def ids(uploads: S3Uploads, key: str) -> set[str]:
    return {upload.upload_id for upload in await uploads.find_uploads(key)}


async def journal_of_the_dead(folder: Path, server: LocalServer, *entries: tuple[str, str | None]) -> None:
    journal = UploadJournal(folder)
    for key, upload_id in entries:
        async with journal.upload(BUCKET, key, server.endpoint) as note:
            if upload_id is not None:
                await note.begun(upload_id)
    await journal.close()


async def test_uploads_are_listed_by_their_key_and_aborted(server: LocalServer, uploads: S3Uploads, base: str) -> None:
    first, second = begin(server, f"{base}/a/b"), begin(server, f"{base}/a/b")
    found = await uploads.find_uploads(f"{base}/a/b")
    assert {upload.upload_id for upload in found} == {first, second}
    assert {upload.key for upload in found} == {f"{base}/a/b"}
    if server.name != "moto":  # which answers with a date of its own making
        assert all(abs(upload.initiated - time.time()) < 60 for upload in found)
    assert await uploads.abort_upload(f"{base}/a/b", first)
    assert await ids(uploads, f"{base}/a/b") == {second}
    if server.name != "minio":  # where an abort of what is gone succeeds
        assert not await uploads.abort_upload(f"{base}/a/b", first)
    await uploads.abort_upload(f"{base}/a/b", second)


async def test_young_uploads_are_left_to_their_writers(server: LocalServer, uploads: S3Uploads, base: str) -> None:
    if server.name == "moto":
        pytest.skip("moto says that every upload began in 2010")
    upload = begin(server, f"{base}/a")
    swept = await uploads.sweep_listed(older_than_s=HOUR)
    assert {found.outcome for found in swept} <= {"young"}
    assert await ids(uploads, f"{base}/a") == {upload}
    await uploads.abort_upload(f"{base}/a", upload)


async def test_uploads_beside_the_prefix_are_left_alone(server: LocalServer, uploads: S3Uploads, base: str) -> None:
    beside, below = begin(server, f"{base}-beside/a"), begin(server, f"{base}/a")
    swept = await uploads.sweep_listed(older_than_s=0)
    if server.name != "minio":
        assert [found.upload.upload_id for found in swept] == [below]
    assert await ids(uploads, f"{base}-beside/a") == {beside}
    await uploads.abort_upload(f"{base}-beside/a", beside)
    await uploads.abort_upload(f"{base}/a", below)


async def test_a_dry_run_aborts_nothing(server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path) -> None:
    upload = begin(server, f"{base}/a")
    await journal_of_the_dead(tmp_path, server, (f"{base}/a", upload))
    await uploads.sweep_listed(older_than_s=0, dry_run=True)
    (found,) = await uploads.sweep_journals(tmp_path, older_than_s=0, dry_run=True)
    assert (found.outcome, found.upload.upload_id) == ("aborted", upload)
    assert await ids(uploads, f"{base}/a") == {upload}
    (found,) = await uploads.sweep_journals(tmp_path, older_than_s=0)
    assert await ids(uploads, f"{base}/a") == set()


async def test_what_a_dead_writer_noted_is_aborted_whatever_its_age(
    server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path
) -> None:
    upload = begin(server, f"{base}/a/b")
    await journal_of_the_dead(tmp_path, server, (f"{base}/a/b", upload), (f"{base}/gone", "no such id"))
    await ids(uploads, f"{base}/x")  # resolves the endpoint, as `probe` does
    swept = await uploads.sweep_journals(tmp_path, older_than_s=HOUR)
    assert [(found.upload.upload_id, found.outcome) for found in swept] == [(upload, "aborted")]
    assert await ids(uploads, f"{base}/a/b") == set()
    assert files(tmp_path) == []


async def test_an_upload_whose_id_was_not_noted_is_aborted_once_it_is_old(
    server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path
) -> None:
    upload = begin(server, f"{base}/a")
    await journal_of_the_dead(tmp_path, server, (f"{base}/a", None))
    await ids(uploads, f"{base}/x")
    if server.name != "moto":
        (found,) = await uploads.sweep_journals(tmp_path, older_than_s=HOUR)
        assert found.outcome == "young"
        assert len(files(tmp_path)) == 1
    (found,) = await uploads.sweep_journals(tmp_path, older_than_s=0)
    assert (found.outcome, found.upload.upload_id) == ("aborted", upload)
    assert files(tmp_path) == []


async def test_lines_of_other_stores_stay(server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path)
    for endpoint, bucket, key in [
        ("http://elsewhere:9000", BUCKET, f"{base}/a"),
        (server.endpoint, "other-bucket", f"{base}/a"),
        (server.endpoint, BUCKET, "other/prefix"),
    ]:
        async with journal.upload(bucket, key, endpoint) as note:
            await note.begun("id")
    await journal.close()
    (path,) = files(tmp_path)
    before = path.read_text()
    await ids(uploads, f"{base}/x")
    assert await uploads.sweep_journals(tmp_path, older_than_s=0) == []
    assert path.read_text() == before


async def test_the_bucket_is_told_to_abort_by_itself_where_it_takes_the_rule(
    server: LocalServer, uploads: S3Uploads
) -> None:
    if server.name != "moto":
        with pytest.raises(StoreRefusedError):
            await uploads.set_upload_lifetime(1)
        return
    kept = {"ID": "mine", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 9}}
    arguments = {"Bucket": BUCKET, "LifecycleConfiguration": {"Rules": [kept]}}
    await uploads._client.call("put_bucket_lifecycle_configuration", arguments)
    assert await uploads.set_upload_lifetime(1) is True
    assert await uploads.set_upload_lifetime(1) is False
    assert await uploads.set_upload_lifetime(2) is True
    found = await uploads._client.call("get_bucket_lifecycle_configuration", {"Bucket": BUCKET})
    days = [rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation") for rule in found["Rules"]]
    assert sorted(rule["ID"] for rule in found["Rules"])[-1] == "mine"
    assert days == [None, 2]
    await uploads._client.call("delete_bucket_lifecycle", {"Bucket": BUCKET})


async def test_a_bucket_without_rules_gets_its_first(server: LocalServer, uploads: S3Uploads) -> None:
    if server.name != "moto":
        pytest.skip("it takes no such rule")
    assert await uploads.set_upload_lifetime(1) is True
    await uploads._client.call("delete_bucket_lifecycle", {"Bucket": BUCKET})


async def test_lines_of_stores_that_are_no_more_are_dropped_after_a_month(
    server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path
) -> None:
    month = time.time() - 31 * 86400
    line = f'{{"begin": 1, "endpoint": "http://gone", "bucket": "gone", "key": "a", "time": {month}}}'
    (tmp_path / "old.jsonl").write_text(line + "\n")
    assert await uploads.sweep_journals(tmp_path, older_than_s=0) == []
    assert files(tmp_path) == []


async def test_opening_a_store_sweeps_what_a_dead_writer_left(
    server: LocalServer, store: S3Store, base: str, tmp_path: Path
) -> None:
    upload = begin(server, f"{base}/a")
    await journal_of_the_dead(tmp_path / "cache" / "uploads", server, (f"{base}/a", upload))
    await store.probe()
    assert store._sweep._task is not None
    await asyncio.wait([store._sweep._task])
    assert await ids(store.uploads, f"{base}/a") == set()
    assert files(tmp_path / "cache" / "uploads") == []


@pytest.mark.parametrize("step", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
async def test_what_a_killed_writer_left_is_gone_after_the_next_opening(
    server: LocalServer, store: S3Store, base: str, tmp_path: Path, step: str
) -> None:
    arguments = [store.url, str(tmp_path / "cache"), KEY, str(PART), step]
    with start_writer(*arguments) as writer:
        assert writer.stdout is not None
        assert await asyncio.to_thread(writer.stdout.readline) == "ready\n"
        left = await ids(store.uploads, f"{base}/{KEY}")
        assert len(left) == (0 if step == "create_multipart_upload" else 1)
        await store.uploads.sweep_journals(tmp_path / "cache" / "uploads", older_than_s=0)
        assert await ids(store.uploads, f"{base}/{KEY}") == left, "its writer lives"
        writer.kill()
    await store.probe()
    assert store._sweep._task is not None
    await asyncio.wait([store._sweep._task])
    assert await ids(store.uploads, f"{base}/{KEY}") == set()
    assert await store.head(KEY) is None


async def test_an_upload_is_in_the_journal_while_it_runs_and_not_afterwards(
    server: LocalServer, store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, seen = store._client.call, []

    async def watching_call(operation: str, *arguments: object, **options: object) -> object:
        text = "".join(path.read_text() for path in files(tmp_path / "cache" / "uploads"))
        seen.append((operation, text.count("begin"), text.count("upload")))
        return await call(operation, *arguments, **options)

    monkeypatch.setattr(store._client, "call", watching_call)
    assert await store.put(KEY, os.urandom(PART + 1)) is True
    assert [step for step in seen if step[0].endswith(("_multipart_upload", "_part"))] == [
        ("create_multipart_upload", 1, 0),
        ("upload_part", 1, 1),
        ("upload_part", 1, 1),
        ("complete_multipart_upload", 1, 1),
    ]
    assert [path.stat().st_size for path in files(tmp_path / "cache" / "uploads")] == [0]
    await store.close()
    assert files(tmp_path / "cache" / "uploads") == []


async def test_an_upload_that_cannot_be_aborted_stays_in_the_journal(
    server: LocalServer, store: S3Store, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = store._client.call

    async def failing_call(operation: str, *arguments: object, **options: object) -> object:
        if operation in ("upload_part", "abort_multipart_upload"):
            raise StoreUnavailableError("the network is gone")
        return await call(operation, *arguments, **options)

    monkeypatch.setattr(store._client, "call", failing_call)
    with pytest.raises(StoreUnavailableError):
        await store.put(KEY, os.urandom(PART + 1))
    monkeypatch.undo()
    await store.close()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    later = open_store(store.url, Settings(cache_dir=tmp_path / "cache"))
    assert isinstance(later, S3Store)
    (left,) = await ids(later.uploads, f"{base}/{KEY}")
    (swept,) = await later.uploads.sweep_journals(tmp_path / "cache" / "uploads", older_than_s=HOUR)
    assert (swept.upload.upload_id, swept.outcome) == (left, "aborted")
    assert await ids(later.uploads, f"{base}/{KEY}") == set()
    await later.close()


async def test_a_create_whose_answer_was_lost_leaves_no_upload(
    server: LocalServer, store: S3Store, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server.name == "moto":
        pytest.skip("moto says that every upload began in 2010")
    perform, lost = store._client._perform, []

    async def losing_perform(session: object, request: object) -> object:
        answer = await perform(session, request)
        if request.operation == "create_multipart_upload" and not lost:
            lost.append(answer["UploadId"])
            raise ConnectionResetError
        return answer

    monkeypatch.setattr(store._client, "_perform", losing_perform)
    assert await store.put(KEY, os.urandom(PART + 1)) is True
    assert len(lost) == 1
    assert await ids(store.uploads, f"{base}/{KEY}") == set()


async def test_an_upload_that_a_janitor_aborted_begins_anew(
    server: LocalServer, store: S3Store, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server.name == "moto":
        pytest.skip("moto answers 500 to a part of an upload that is gone")
    call, aborted = store._client.call, []

    async def meddling_call(operation: str, arguments: dict[str, object], **options: object) -> object:
        if operation == "upload_part" and not aborted:
            aborted.append(arguments["UploadId"])
            await store.uploads.abort_upload(f"{base}/{KEY}", str(arguments["UploadId"]))
        return await call(operation, arguments, **options)

    monkeypatch.setattr(store._client, "call", meddling_call)
    assert await store.put(KEY, os.urandom(PART + 1)) is True
    assert await ids(store.uploads, f"{base}/{KEY}") == set()
    found = await store.head(KEY)
    assert found is not None
    assert found.size == PART + 1


async def test_a_lost_create_that_cannot_be_looked_for_stays_in_the_journal(
    server: LocalServer, store: S3Store, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform, lost = store._client._perform, []

    async def losing_perform(session: object, request: object) -> object:
        if request.operation == "list_multipart_uploads":
            raise ConnectionResetError
        answer = await perform(session, request)
        if request.operation == "create_multipart_upload" and not lost:
            lost.append(answer["UploadId"])
            raise ConnectionResetError
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(store._client, "_perform", losing_perform)
        assert await store.put(KEY, os.urandom(PART + 1)) is True
        await store.close()
    later = open_store(store.url, Settings(cache_dir=tmp_path / "cache"))
    assert isinstance(later, S3Store)
    assert await ids(later.uploads, f"{base}/{KEY}") == set(lost)
    (swept,) = await later.uploads.sweep_journals(tmp_path / "cache" / "uploads", older_than_s=0)
    assert (swept.upload.upload_id, swept.outcome) == (lost[0], "aborted")
    await later.close()
