"""Scenes for the fault matrix: behind a proxy of their own, on each S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from faults.scene import REAL, Scene, assert_quiet
from local_server import LocalServer


@pytest.fixture(params=["moto", *REAL])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    """Each S3 server in turn, its credentials in the environment of the test."""
    found: LocalServer = request.getfixturevalue(request.param)
    for name, value in found.environment().items():
        if name != "KVSTORE_S3_ENDPOINT_URL":  # scenes go through the proxy
            monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def proxy(server: LocalServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint) as running:
        yield running


@pytest.fixture
def scene(server: LocalServer, proxy: FaultProxy, tmp_path: Path) -> Scene:
    """An empty scene."""
    return Scene(server, proxy, tmp_path / "cache")


@pytest.fixture
async def filled(scene: Scene, caplog: pytest.LogCaptureFixture) -> Scene:
    """A scene whose prompt was saved before."""
    await scene.fill()
    caplog.clear()
    return scene


@pytest.fixture
def quiet(server: LocalServer, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts P5's part about the log at the end of the test."""
    caplog.set_level("INFO", "kvstore_s3")
    yield
    assert_quiet(caplog.get_records("call"), server)
