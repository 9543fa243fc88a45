"""Fixtures for all tests: an environment without the developer's own settings, and S3 servers on demand.

What runs servers is imported where one is asked for: tests of the GPU's kernels need no S3 client.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from slab_watch import watch_slabs

if TYPE_CHECKING:
    from local_server import LocalServer

_KEPT = {"AWS_CA_BUNDLE", "KVSTORE_S3_TEST_REQUIRE_SERVERS", "KVSTORE_S3_TEST_ASSETS"}

# How long an example takes, or its making, says something of the machine and nothing of the property.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell starts background jobs with SIGINT ignored, and programs inherit that; the tests of Ctrl-C need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


_COMPILING = {"device", "emulation", "library", "watched"}
"""Fixtures that compile the GPU's kernels where nobody has: one worker does for minutes, and the others wait for it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Compiling is no part of the time that a test may take."""
    if not config.pluginmanager.hasplugin("timeout"):
        return
    for item in items:
        if _COMPILING.intersection(getattr(item, "fixturenames", ())) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(func_only=True))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the servers before the first test: the minutes that it takes, once, would be that test's timeout."""
    wanted = any(item.get_closest_marker("server") for item in session.items)
    if wanted and not session.config.option.collectonly:
        from servers import build_servers

        build_servers()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("AWS_", "KVSTORE_S3_")) and name not in _KEPT:
            monkeypatch.delenv(name)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test where a slab of any pool made in it was not given back."""
    with watch_slabs():
        yield


def _serve(name: str) -> Iterator[LocalServer]:
    from servers import running_server

    with running_server(name) as server:
        yield server


@pytest.fixture(scope="session")
def minio() -> Iterator[LocalServer]:
    """A real MinIO. Put `minio.environment()` into the environment to use it; mark the test `server`."""
    yield from _serve("minio")


@pytest.fixture(scope="session")
def versitygw() -> Iterator[LocalServer]:
    """A second real S3 implementation; mark the test `server`."""
    yield from _serve("versitygw")


@pytest.fixture(scope="session")
def moto() -> Iterator[LocalServer]:
    """An imitation of S3: it proves semantics, not speed, and needs no program that is not in the venv."""
    yield from _serve("moto")
