"""Each dtype with each span and number of levels, coded and decoded by the compiled kernels and by the emulation: the
same bytes, with tensor cores too, whose sums both cut off alike; within the bound where sums of floats are fused.

These tests run with the plugin backend.py (`make test-kernels`), which needs nvcc.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if "device.ptx.backend" not in sys.modules:
    pytest.skip("these tests need nvcc: `make test-kernels`", allow_module_level=True)

from codec.calibrations import make_calibration
from device.emulated import Device, EmulatedDevice, build
from device.ptx.library import PtxDevice
from device.scalable_batch import Batch, Given
from device.scalable_encoder import CALIBRATIONS, Coder, Paging, case_of, case_of_layout, values_of
from device.test_scalable_decode import assert_close

from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import SCALABLE, encode_scalable
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import KVLayout

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODES = ["uncalibrated", *SPANS]
LAYERS, TOKENS = 2, 37
SHAPES = {"tiles": (2, 16), "rows": (2, 12), "odd": (3, 7)}
"""Heads and dim: matrices for tensor cores; values in fours; values in ones."""


@pytest.fixture(scope="module")
def emulation(pytestconfig: pytest.Config) -> Device:
    return EmulatedDevice(Library(build(Path(pytestconfig.cache.mkdir("kernels"))), emulated=True))


def spoil(kv: torch.Tensor, how: str) -> torch.Tensor:
    """`exact`: tokens that are kept as they are; `raw`: so many that a head is."""
    if how == "exact":
        kv[0, 0, 0, 0, 0], kv[1, 1, 7, 1, 3], kv[0, 1, 19, 0, 5] = float("nan"), float("inf"), float("-inf")
    if how == "raw":
        kv[:, :, :, 1] = float("nan")
    return kv


@pytest.mark.parametrize("how", ["plain", "exact", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_encoded(device: PtxDevice, emulation: Device, mode: str, dtype: torch.dtype, how: str) -> None:
    for levels, paging in ((3, Paging(8)), (2, Paging(5, head_major=True)), (1, Paging())):
        kv = spoil(values_of(21, TOKENS, dtype), how)
        case = case_of_layout(kv, CALIBRATIONS.get(mode), levels=levels)
        assert Coder(device).encode(case, paging) == Coder(emulation).encode(case, paging)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 13, 72])
@pytest.mark.parametrize("style", ["none", "halves", "pairs"])
def test_what_is_encoded_without_a_calibration(
    device: PtxDevice, emulation: Device, style: str, dim: int, dtype: torch.dtype
) -> None:
    pairs = 0 if style == "none" else dim // 2 - (dim == 72)
    rotation = Rotation(style, (0.7 ** np.arange(pairs)).astype(np.float32), np.full(2, style != "none", np.uint8))
    kv = (torch.randn(2, 2, 21, 2, dim, generator=torch.Generator().manual_seed(dim)) * 3).to(dtype)
    case = case_of(kv, rotation)
    coded = Coder(device).encode(case)
    assert coded == Coder(emulation).encode(case)
    for levels in (1, 2, 3):
        given = Given(coded[:levels], (0, 2), 2, 21, object_levels=3)
        one, two = (
            Batch(of, dim, case.dtype).decode([given], (2, 21, 2, 0), paged=levels != 2) for of in (device, emulation)
        )
        assert one.faults == two.faults == [0]
        assert one.values.tobytes() == two.values.tobytes()


def calibrate(layout: KVLayout, span: str, *, floats: bool) -> Calibration:
    """With matrices of float16, or of floats, which tensor cores do not take."""
    found = make_calibration(layout, span, lambda seed: draw(layout, seed, 80))
    if not floats:
        return found
    units = {
        place: dataclasses.replace(unit, synthesis=unit.synthesis.astype(np.float32))
        for place, unit in found.units.items()
        if unit.synthesis is not None
    }
    return dataclasses.replace(found, units=units)


def draw(layout: KVLayout, seed: int, tokens: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    shape = (layout.layers, 2, tokens, layout.kv_heads, layout.head_dim)
    return torch.randn(shape, generator=rng) * torch.logspace(0.5, -1.5, layout.head_dim) + 1


@pytest.mark.parametrize("floats", [False, True], ids=["halves", "floats"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_decoded(
    device: PtxDevice, emulation: Device, mode: str, shape: str, dtype: torch.dtype, floats: bool
) -> None:
    if floats and (mode in ("uncalibrated", "channel") or shape != "tiles"):
        return
    heads, dim = SHAPES[shape]
    name = str(dtype)[6:]
    rope = {"rope_type": "none"} if dim % 2 else {"rope_type": "default", "rope_theta": 10000}
    layout = KVLayout(LAYERS, heads, dim, name, rope=rope)
    of_layout = None if mode == "uncalibrated" else calibrate(layout, mode, floats=floats)
    for how in ("plain", "exact", "raw"):
        rotation, calibration = Rotation.from_layout(layout), of_layout
        if how == "exact" and rotation.style != "none":
            rotation = dataclasses.replace(rotation, style="pairs")
        if of_layout is not None:
            calibration = dataclasses.replace(of_layout, rotation=rotation)
        if how == "raw" and mode == "all":
            continue
        kv = spoil(draw(layout, 5, TOKENS).to(dtype), how)
        coded = encode_scalable(
            view_bits(kv),
            name,
            calibration=calibration,
            layer_begin=0,
            first_position=256,
            rotation=rotation,
        )
        if coded[0][0] != SCALABLE:  # it would be no shorter
            continue
        for levels in (1, 2, 3):
            given = Given([payload for _, payload in coded[:levels]], (0, LAYERS), heads, TOKENS, object_levels=3)
            one, two = (
                Batch(of, dim, name, calibration).decode([given], (LAYERS, TOKENS, heads, 0), paged=levels != 2)
                for of in (device, emulation)
            )
            assert one.faults == two.faults == [0]
            assert one.elsewhere_untouched
            assert one.numbers.tobytes() == two.numbers.tobytes()
            if mode in ("uncalibrated", "channel") or (shape == "tiles" and mode != "head" and not floats):
                assert one.values.tobytes() == two.values.tobytes()
            else:  # sums of floats, which are fused on a GPU alone
                assert_close(one.values, two.values, name)
