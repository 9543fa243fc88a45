from __future__ import annotations

import fcntl
import secrets
from pathlib import Path

import pytest
from cli.conftest import Cli
from local_server import LocalServer
from servers import BUCKET

from kvstore_s3.cli.gc import parse_age
from kvstore_s3.errors import InvalidArgumentError


@pytest.fixture(
    params=[
        "moto",
        pytest.param("minio", marks=pytest.mark.server),
        pytest.param("versitygw", marks=pytest.mark.server),
    ]
)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    found: LocalServer = request.getfixturevalue(request.param)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def orphans(server: LocalServer) -> tuple[str, str, str]:
    """A prefix, the key of an upload below it that nobody will complete, and its id."""
    prefix = f"Gc/{secrets.token_hex(8)}"
    key = f"{prefix}/aa/bb"
    with server.client() as client:
        return prefix, key, str(client._create_multipart_upload(BUCKET, key, {}))


def write_journal(folder: Path, server: LocalServer, key: str, upload_id: str) -> Path:
    """What a killed process leaves."""
    path = folder / "cache" / "kvstore-s3" / "uploads" / "dead.jsonl"
    path.parent.mkdir(parents=True)
    endpoint = server.endpoint
    begin = f'{{"begin": 1, "endpoint": "{endpoint}", "bucket": "{BUCKET}", "key": "{key}", "time": 1.0}}'
    path.write_text(f'{begin}\n{{"upload": 1, "id": "{upload_id}"}}\n')
    return path


def pending(server: LocalServer, key: str) -> list[str]:
    with server.client() as client:
        return [upload.upload_id for upload in client._list_multipart_uploads(BUCKET, prefix=key).uploads]


def test_uploads_that_nobody_will_complete_are_aborted(
    cli: Cli, server: LocalServer, orphans: tuple[str, str, str], tmp_path: Path
) -> None:
    prefix, key, upload = orphans
    path = write_journal(tmp_path, server, key, upload)
    arguments = ("gc", "--uploads", "--store", f"s3://{BUCKET}/{prefix}", "--older-than", "0s", "--json")

    planned = cli(*arguments, "--dry-run")
    assert planned.code == 0
    assert [found["upload"] for found in planned.json["aborted"]] == [upload]
    assert pending(server, key) == [upload]
    assert path.exists()

    done = cli(*arguments)
    assert done.code == 0
    assert [(found["key"], found["upload"]) for found in done.json["aborted"]] == [(key, upload)]
    assert pending(server, key) == []
    assert not path.exists()

    assert cli(*arguments).json["aborted"] == []


def test_young_uploads_are_kept(cli: Cli, server: LocalServer, orphans: tuple[str, str, str]) -> None:
    if server.name != "versitygw":
        pytest.skip("moto says that every upload began in 2010, and MinIO lists none")
    prefix, key, upload = orphans
    ran = cli("gc", "--uploads", "--store", f"s3://{BUCKET}/{prefix}", "--json")
    assert ran.code == 0
    assert [found["upload"] for found in ran.json["kept"]] == [upload]
    assert ran.json["aborted"] == []
    assert pending(server, key) == [upload]


def test_the_lifecycle_rule_is_set_or_its_refusal_is_said(
    cli: Cli, server: LocalServer, orphans: tuple[str, str, str]
) -> None:
    ran = cli("gc", "--uploads", "--lifecycle", "--store", f"s3://{BUCKET}/{orphans[0]}", "--json")
    if server.name == "moto":
        assert (ran.code, ran.json["lifecycle"]) == (0, "set")
    else:
        assert (ran.code, ran.json["lifecycle"]) == (1, "refused")
        assert "takes no lifecycle rule" in ran.json["problems"][0]


def test_people_read_what_was_done(cli: Cli, server: LocalServer, orphans: tuple[str, str, str]) -> None:
    if server.name == "minio":
        pytest.skip("it lists none")
    prefix, key, _ = orphans
    ran = cli("gc", "--uploads", "--store", f"s3://{BUCKET}/{prefix}", "--older-than", "0")
    assert ran.out.splitlines() == [f"aborted: {key}", "1 unfinished upload aborted"]


def test_a_missing_bucket_is_a_store_that_refused(cli: Cli, server: LocalServer) -> None:
    cli("gc", "--uploads", "--store", "s3://no-such-bucket-here").fails_with(3, "bucket does not exist")


def test_temporaries_of_dead_writers_are_removed_from_a_directory(cli: Cli, tmp_path: Path) -> None:
    temporaries = tmp_path / "store" / ".tmp"
    temporaries.mkdir(parents=True)
    (temporaries / "dead").write_text("x")
    arguments = ("gc", "--uploads", "--store", (tmp_path / "store").as_uri(), "--json")
    with (temporaries / "living").open("w") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        assert cli(*arguments, "--dry-run").json["temporaries"] == 1
        assert (temporaries / "dead").exists()
        ran = cli(*arguments)
        assert (ran.code, ran.json["temporaries"]) == (0, 1)
        assert [path.name for path in temporaries.iterdir()] == ["living"]


def test_a_store_in_memory_has_nothing_to_remove(cli: Cli) -> None:
    ran = cli("gc", "--uploads", "--store", "memory://", "--json")
    assert (ran.code, ran.json["aborted"], ran.json["temporaries"]) == (0, [], 0)


def test_a_directory_takes_no_lifecycle_rule(cli: Cli, tmp_path: Path) -> None:
    done = cli("gc", "--uploads", "--lifecycle", "--store", tmp_path.as_uri())
    assert done.code == 2
    assert "leave it out" in done.err


def test_gc_without_saying_what_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli("gc", "--store", tmp_path.as_uri()).fails_with(2, "--uploads")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1h", 3600), ("2d", 172800)])
def test_ages_have_units(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1w", "1 h", "nan", "1e9"])
def test_other_ages_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--older-than"):
        parse_age(text)
