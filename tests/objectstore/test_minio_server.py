"""The script behind `make minio`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import LocalServer, reserved_port
from minio_server import CHECKOUT, read_record

SCRIPT = CHECKOUT / "examples" / "minio_server.py"
pytestmark = pytest.mark.server


@pytest.fixture
def reserved() -> Iterator[int]:
    with reserved_port() as port:
        yield port


def run(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@pytest.mark.usefixtures("minio")  # skips where there is none
def test_it_is_started_once_stopped_once_and_remembers(tmp_path: Path, reserved: int) -> None:
    home, port = ("--data-dir", tmp_path), str(reserved)
    try:
        first = run(*home, "--detach", "--port", port)
        server = read_record(tmp_path)
        assert isinstance(server, LocalServer)
        assert f"export KVSTORE_S3_ENDPOINT_URL=http://127.0.0.1:{port}\n" in first
        assert f"export AWS_SECRET_ACCESS_KEY={server.secret_key}\n" in first
        assert "--store s3://kvstore/demo" in first
        assert "running already" in run(*home, "--detach")
    finally:
        assert "stopped" in run(*home, "--stop")
    assert read_record(tmp_path) is None
    assert "no MinIO runs" in run(*home, "--stop")
    try:
        assert server.secret_key in run(*home, "--detach", "--port", port)
    finally:
        run(*home, "--stop")


@pytest.mark.usefixtures("minio")
def test_the_files_that_hold_secrets_are_private(tmp_path: Path, reserved: int) -> None:
    try:
        run("--data-dir", tmp_path, "--detach", "--port", str(reserved))
        assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.json")} == {0o600}
    finally:
        run("--data-dir", tmp_path, "--stop")
