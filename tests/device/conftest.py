"""The device that the tests of this room share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from device.emulated import ON_DEVICE, Device, open_device


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Device:
    """A GPU, or its emulation; see emulated.py."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not ON_DEVICE and shutil.which(compiler) is None:
        pytest.skip(f"the kernels' emulation is built with {compiler}, which is not here; say which: CXX=g++")
    return open_device(Path(pytestconfig.cache.mkdir("kernels")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Late queues in one order are for every day; the others take long."""
    for item in items:
        if "[order 1" in item.name or "[order 2" in item.name:
            item.add_marker(pytest.mark.kernels)
