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
