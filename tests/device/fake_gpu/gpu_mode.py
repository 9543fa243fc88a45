"""A pytest plugin: tests of tests/device in GPU mode, on the fake runtime that was preloaded (.ci/fake-gpu-test).

KVSTORE_S3_TEST_FAKE_GPU names the folder in which the GPU library is looked for first: there it is its emulation.
KVSTORE_S3_TEST_FAKE_DEVICE=n is the device that the tests use; another that they touch fails the run.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from device.fake_gpu import operators

import kvstore_s3
from kvstore_s3.codec.device.library import Library
from kvstore_s3.errors import DeviceError

FOLDER = os.environ["KVSTORE_S3_TEST_FAKE_GPU"]
DEVICE = os.environ.get("KVSTORE_S3_TEST_FAKE_DEVICE")
WITHOUT_STREAM = {"kvs_limit_multiprocessors"}

_call = Library.call


def call(library: Library, name: str, *arguments: object) -> None:
    """As a launch: on a stream of the device that is current in this thread, or not at all."""
    if name not in WITHOUT_STREAM:
        stream = arguments[-1]
        handle = stream.value if isinstance(stream, ctypes.c_void_p) else stream
        if fault := operators.RUNTIME.fake_launch(handle):
            raise DeviceError(f"{name} failed with CUDA error {fault}")
    _call(library, name, *arguments)


def pytest_configure() -> None:
    operators.install()
    kvstore_s3.__path__.insert(0, FOLDER)
    Library.call = call  # type: ignore[method-assign]
    if DEVICE is not None:
        torch.cuda.set_device(int(DEVICE))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if DEVICE is None:
        return
    touched = [device for device in range(2) if operators.RUNTIME.fake_has_context(device)]
    if touched != [int(DEVICE)]:
        print(f"\nthe tests use device {DEVICE}, but these have a context: {touched}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
