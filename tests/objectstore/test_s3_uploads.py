"""Unfinished multipart uploads are found and aborted, on moto (always), on a real MinIO and on versitygw."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from local_server import LocalServer
from servers import BUCKET

from kvstore_s3.config import Settings
from kvstore_s3.errors import StoreRefusedError
from kvstore_s3.objectstore.s3_uploads import S3Uploads
from kvstore_s3.objectstore.upload_journal import UploadJournal

SERVERS = [
    "moto",
    pytest.param("minio", marks=pytest.mark.server),
    pytest.param("versitygw", marks=pytest.mark.server),
]
HOUR = 3600.0


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
async def uploads(server: LocalServer, base: str) -> AsyncIterator[S3Uploads]:
    uploads = S3Uploads.open(f"s3://{BUCKET}/{base}", Settings())
    yield uploads
    await uploads.close()


def begin(server: LocalServer, key: str) -> str:
    """Begin an upload that nobody will complete, and return its id."""
    with server.client() as client:
        return str(client._create_multipart_upload(BUCKET, key, {}))


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def ids(uploads: S3Uploads, prefix: str) -> set[str]:
    return {upload.upload_id async for upload in uploads.list_uploads(prefix)}


async def journal_of_the_dead(folder: Path, server: LocalServer, *entries: tuple[str, str | None]) -> None:
    journal = UploadJournal(folder)
    for key, upload_id in entries:
        async with journal.upload(BUCKET, key, server.endpoint) as note:
            if upload_id is not None:
                await note.begun(upload_id)
    await journal.close()


async def test_uploads_are_listed_by_their_key_and_aborted(server: LocalServer, uploads: S3Uploads, base: str) -> None:
    first, second = begin(server, f"{base}/a/b"), begin(server, f"{base}/a/b")
    found = [upload async for upload in uploads.list_uploads("a/b")]
    assert {upload.upload_id for upload in found} == {first, second}
    assert {upload.key for upload in found} == {f"{base}/a/b"}
    if server.name != "moto":  # which answers with a date of its own making
        assert all(abs(upload.initiated - time.time()) < 60 for upload in found)
    assert await uploads.abort_upload(f"{base}/a/b", first)
    assert await ids(uploads, "a/b") == {second}
    if server.name != "minio":  # where an abort of what is gone succeeds
        assert not await uploads.abort_upload(f"{base}/a/b", first)
    await uploads.abort_upload(f"{base}/a/b", second)


async def test_young_uploads_are_left_to_their_writers(server: LocalServer, uploads: S3Uploads, base: str) -> None:
    if server.name == "moto":
        pytest.skip("moto says that every upload began in 2010")
    upload = begin(server, f"{base}/a")
    swept = await uploads.sweep_listed(older_than_s=HOUR)
    assert {found.outcome for found in swept} <= {"young"}
    assert await ids(uploads, "a") == {upload}
    await uploads.abort_upload(f"{base}/a", upload)


async def test_uploads_beside_the_prefix_are_left_alone(server: LocalServer, uploads: S3Uploads, base: str) -> None:
    beside, below = begin(server, f"{base}-beside/a"), begin(server, f"{base}/a")
    swept = await uploads.sweep_listed(older_than_s=0)
    if server.name != "minio":
        assert [found.upload.upload_id for found in swept] == [below]
    other = S3Uploads.open(f"s3://{BUCKET}/{base}-beside", Settings())
    assert await ids(other, "a") == {beside}
    await other.abort_upload(f"{base}-beside/a", beside)
    await other.close()
    await uploads.abort_upload(f"{base}/a", below)


async def test_a_dry_run_aborts_nothing(server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path) -> None:
    upload = begin(server, f"{base}/a")
    await journal_of_the_dead(tmp_path, server, (f"{base}/a", upload))
    await uploads.sweep_listed(older_than_s=0, dry_run=True)
    (found,) = await uploads.sweep_journals(tmp_path, older_than_s=0, dry_run=True)
    assert (found.outcome, found.upload.upload_id) == ("aborted", upload)
    assert await ids(uploads, "a") == {upload}
    (found,) = await uploads.sweep_journals(tmp_path, older_than_s=0)
    assert await ids(uploads, "a") == set()


async def test_what_a_dead_writer_noted_is_aborted_whatever_its_age(
    server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path
) -> None:
    upload = begin(server, f"{base}/a/b")
    await journal_of_the_dead(tmp_path, server, (f"{base}/a/b", upload), (f"{base}/gone", "no such id"))
    await ids(uploads, "x")  # resolves the endpoint, as `probe` does
    swept = await uploads.sweep_journals(tmp_path, older_than_s=HOUR)
    assert [(found.upload.upload_id, found.outcome) for found in swept] == [(upload, "aborted")]
    assert await ids(uploads, "a/b") == set()
    assert files(tmp_path) == []


async def test_an_upload_whose_id_was_not_noted_is_aborted_once_it_is_old(
    server: LocalServer, uploads: S3Uploads, base: str, tmp_path: Path
) -> None:
    upload = begin(server, f"{base}/a")
    await journal_of_the_dead(tmp_path, server, (f"{base}/a", None))
    await ids(uploads, "x")
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
    await ids(uploads, "x")
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
