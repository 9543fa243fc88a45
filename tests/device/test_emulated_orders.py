"""What kernels write is the same whichever lane, warp or block comes first."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from device.emulated import ON_DEVICE, Device
from device.kernel_cases import KINDS, cases_of

pytestmark = [
    pytest.mark.skipif(ON_DEVICE, reason="a GPU takes its turns as it likes"),
    pytest.mark.kernels(),
]

ORDERS = {"from the last to the first": 1, "at random": 2, "at random, otherwise": 77}


@contextmanager
def turns(device: Device, seed: int) -> Iterator[None]:
    device.library.call("kvs_emulator_order", ctypes.c_uint32(seed))
    try:
        yield
    finally:
        device.library.call("kvs_emulator_order", ctypes.c_uint32(0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_depend_on_no_order_of_turns(device: Device, kind: str) -> None:
    for case in cases_of(kind):
        expected = case(device)
        for order, seed in ORDERS.items():
            with turns(device, seed):
                assert case(device) == expected, f"{case.name}, {order}"
