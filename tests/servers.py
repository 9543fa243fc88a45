"""S3 servers for tests: MinIO, versitygw and moto, each on a free port of 127.0.0.1, with data that go with it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from local_server import VERSITYGW, LocalServer, ServerMissingError, running
from minio_server import find_command, running_minio

BUCKET = "kvstore-tests"
MOTO_PAGE = 20
"""Objects in a page of moto's listings, so that a second page costs little."""


def _find_versitygw() -> Path:
    return VERSITYGW.find() or VERSITYGW.build()


@contextmanager
def running_versitygw() -> Iterator[LocalServer]:
    program = _find_versitygw()
    credentials = ("kvstore", secrets.token_hex(16))
    with (
        TemporaryDirectory(prefix="kvstore-s3-versitygw-") as data,
        running(
            "versitygw",
            lambda port: [str(program), "--quiet", "--port", f"127.0.0.1:{port}", "posix", data],
            credentials=credentials,
            environment={"ROOT_ACCESS_KEY": credentials[0], "ROOT_SECRET_KEY": credentials[1]},
        ) as server,
    ):
        server.make_bucket(BUCKET)
        yield server


@contextmanager
def running_moto() -> Iterator[LocalServer]:
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port"]
    with running(
        "moto",
        lambda port: [*command, str(port)],
        credentials=("testing", "testing"),
        environment={"MOTO_S3_DEFAULT_MAX_KEYS": str(MOTO_PAGE)},
        ready_path="/moto-api/",
    ) as server:
        server.make_bucket(BUCKET)
        yield server


_SERVERS: dict[str, Callable[[], AbstractContextManager[LocalServer]]] = {
    "minio": lambda: running_minio(BUCKET),
    "versitygw": running_versitygw,
    "moto": running_moto,
}


def build_servers() -> None:
    """Build what is missing and can be built; what cannot is reported by `running_server`."""
    with suppress(ServerMissingError):
        find_command()
    with suppress(ServerMissingError):
        _find_versitygw()


@contextmanager
def running_server(name: str) -> Iterator[LocalServer]:
    """Run the server, or skip the test where it cannot be had (or fail: KVSTORE_S3_TEST_REQUIRE_SERVERS=1)."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_SERVERS[name]())
        except ServerMissingError as error:
            if os.environ.get("KVSTORE_S3_TEST_REQUIRE_SERVERS") == "1":
                pytest.fail(f"{name} is required, but: {error}")
            pytest.skip(str(error))
        yield server
