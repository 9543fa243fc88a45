"""Encoding codec 3 with a matrix: numbers are those of the exact products, as far as floats allow, and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from device.emulated import Device
from device.scalable_encoder import CALIBRATIONS, HEADS, Case, Coder, case_of_layout, values_of

from kvstore_s3 import _native
from kvstore_s3.codec.scalable import SCALABLE, _base_header, decode_scalable
from kvstore_s3.codec.scalable_stream import StreamShape, parse_base, parse_refinement, split_streams
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import DTYPES


@pytest.fixture(scope="module")
def coder(device: Device) -> Coder:
    return Coder(device)


def numbers_of(case: Case, levels: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each stream: numbers [tokens, components] at the finest step, classes, and which tokens are exact."""
    found, maps, tokens = [], case.maps, case.values.shape[2]
    header = len(_base_header(case.first_position, case.calibration, maps[0], case.levels))
    split = [split_streams(memoryview(p), 0 if level else header, len(maps)) for level, p in enumerate(levels)]
    for one, base, *refinements in zip(maps, *split, strict=True):
        shape = StreamShape(tokens, one.numbers, one.components, case.values.itemsize, case.levels, one.step_count)
        side, coded = parse_base(base, shape, one.classes, one.tables.first[case.levels - 1])  # type: ignore[misc]
        classes = one.classes if side.classes is None else side.classes
        y = np.empty((tokens, one.components), np.float32)
        words = [memoryview(coded.words[0]), *map(parse_refinement, refinements)]
        fault = _native.scalable_decode(
            one.tables.native, classes, coded.states, words, coded.escapes, y, object_levels=case.levels
        )
        assert not fault
        exact = np.isin(np.arange(tokens), side.exact_tokens)
        found.append((np.sign(y) * np.ceil(np.abs(y)), classes, exact))
    return found


def assert_numbers_within_bound(case: Case, levels: Sequence[bytes]) -> None:
    """Numbers are y rounded, where y may be off by what summing n products as floats can cost."""
    for one, (numbers, classes, exact) in zip(case.maps, numbers_of(case, levels), strict=True):
        x = np.empty((len(numbers), one.numbers), np.float32)
        view = case.values if one.whole else case.values[:, :, :, one.head : one.head + 1]
        cos, sin = one.rotation.tables(case.first_position, len(numbers))
        style = (one.rotation.style_id, one.rotation.rotated)
        _native.scalable_prepare(view, DTYPES[case.dtype].id, x, one.mean, cos, sin, *style)
        assert one.unit is not None
        matrix = one.unit.encode_matrix.to(torch.float64).numpy()
        blocks = x.astype(np.float64).reshape(len(x), -1, matrix.shape[-1])
        of_blocks = matrix.reshape(blocks.shape[1], -1, matrix.shape[-1])
        y = np.einsum("tbi,bci->tbc", blocks, of_blocks).reshape(numbers.shape)
        size = np.einsum("tbi,bci->tbc", np.abs(blocks), np.abs(of_blocks)).reshape(numbers.shape)
        bound = 2 * (matrix.shape[-1] + 8) * 2.0**-24 * size
        first = one.tables.first
        most = np.select([classes >= first[0], classes >= first[1], classes >= first[2]], [32404, 4, 1], 0)
        expected = np.clip(y, -most, most)
        assert np.all(np.abs(numbers - expected)[~exact] <= (0.5 + bound)[~exact])


@pytest.mark.parametrize("factor", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("span", ["head", "group", "all"])
def test_products_are_within_their_bound_of_the_hosts(coder: Coder, span: str, factor: float) -> None:
    kv = values_of(15, 70) * factor
    kv[0, 0, 7, 1, 3] = float("nan")
    case = case_of_layout(kv, CALIBRATIONS[span])
    found, expected = coder.encode(case), case.on_host()
    assert_numbers_within_bound(case, found)
    for (one, classes, exact), (two, known, also) in zip(
        numbers_of(case, found), numbers_of(case, expected), strict=True
    ):
        assert np.array_equal(classes, known)
        assert np.array_equal(exact, also)
        assert np.count_nonzero(one != two) <= 1e-3 * one.size


@pytest.mark.parametrize("span", ["head", "group", "all"])
def test_floats_of_a_matrix_are_taken_as_they_are(coder: Coder, span: str) -> None:
    calibration = CALIBRATIONS[span]
    units = {
        place: replace(unit, analysis=None if unit.analysis is None else unit.analysis.astype(np.float32))
        for place, unit in calibration.units.items()
    }
    case = case_of_layout(values_of(16, 12), replace(calibration, units=units))
    assert_numbers_within_bound(case, coder.encode(case))


@pytest.mark.parametrize("span", ["head", "group", "all"])
def test_what_a_device_encoded_with_a_matrix_decodes_on_the_host(coder: Coder, span: str) -> None:
    kv = values_of(17)
    levels = coder.encode(case_of_layout(kv, CALIBRATIONS[span]))
    out = torch.zeros_like(kv)
    decode_scalable(
        [(SCALABLE, memoryview(payload)) for payload in levels],
        view_bits(out),
        "bfloat16",
        layer_begin=0,
        head_begin=0,
        section_heads=HEADS,
        first_position=256,
        calibration=CALIBRATIONS[span],
    )
    assert torch.allclose(out.float(), kv.float(), atol=0.2, rtol=0.02)
