"""Where the GPU library is there and cannot run: values are coded by the CPU, and the reason is said."""

from __future__ import annotations

import ctypes
import json

import pytest
from device.emulated import CSRC, Device


def test_a_device_that_runs_kernels_is_not_refused(device: Device) -> None:
    assert device.library.why_not() is None


def test_asking_loads_every_kernel(device: Device) -> None:
    kernels = json.loads((CSRC / "cuda" / "budget.json").read_text())["kernels"]
    assert device.library._calls.kvs_count_kernels() == len(kernels)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (2, "memory is full"),
        (35, "the driver is older"),
        (209, "no code for this GPU"),
        (100, "there is no GPU"),
        (1, "error 1"),
    ],
)
def test_the_reason_names_what_to_do(device: Device, monkeypatch: pytest.MonkeyPatch, fault: int, said: str) -> None:
    @ctypes.CFUNCTYPE(ctypes.c_int)
    def refuse() -> int:
        return fault

    monkeypatch.setattr(device.library._calls, "kvs_probe", refuse)
    assert said in str(device.library.why_not())
