"""A pytest plugin: the tests of tests/device with kernels that are PTX (PYTHONPATH=tests pytest -p device.ptx.backend).

KVSTORE_S3_TEST_PTX_SEED=n takes lanes, warps and blocks in random order; KVSTORE_S3_TEST_PTX_REPORT=dir says which
statements were executed, a file for each process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from device import emulated
from device.emulated import Device
from device.ptx.library import AT_RANDOM, PtxDevice, open_ptx

SEED = os.environ.get("KVSTORE_S3_TEST_PTX_SEED")
REPORT = os.environ.get("KVSTORE_S3_TEST_PTX_REPORT")
STRICT = ("test_lossless_", "test_scalable_", "test_ptx_")
"""Modules in which kernels have memory from `put` alone."""
opened: list[PtxDevice] = []


def open_device(cache: Path) -> Device:
    if not opened:
        opened.append(PtxDevice(open_ptx(cache.with_name("ptx"))))
        if SEED is not None:
            opened[0].ptx.set_order(AT_RANDOM, int(SEED))
    return opened[0]


emulated.open_device = open_device


@pytest.fixture(autouse=True)
def reach(request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch's memory is nobody's to list: where kernels work on it, they may reach all of this process."""
    if "device" not in request.fixturenames:
        yield
        return
    ptx = request.getfixturevalue("device").ptx
    ptx.allow_anything(not Path(request.module.__file__).name.startswith(STRICT))
    yield
    ptx.allow_anything(False)


def pytest_sessionfinish() -> None:
    if REPORT is None or not opened:
        return
    lines = [
        f"{ran.kernel}\t{ran.line}\t{ran.times}\t{ran.source}\t{ran.source_line}\t{ran.text}\n"
        for ran in opened[0].ptx.report()
    ]
    (Path(REPORT) / f"{os.getpid()}.tsv").write_text("".join(lines))
