from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from codec.streams import IMPLEMENTATIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3 import _native

Array = npt.NDArray[Any]
DTYPES = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32}
RNG = np.random.Generator(np.random.PCG64(3))
STYLES = {"none": 0, "halves": 1, "pairs": 2}
HALF_OF_RANGE = {1: 2.0**127, 2: 2.0**15, 3: 2.0**127}


def bits_of(values: Array, dtype_id: int) -> Array:
    """Bit patterns of float32 values in a dtype, rounded by torch."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(DTYPES[dtype_id])
    return (
        tensor.view(torch.int32 if dtype_id == 3 else torch.int16)
        .numpy()
        .view(np.uint32 if dtype_id == 3 else np.uint16)
    )


def floats_of(bits: Array, dtype_id: int) -> Array:
    signed = bits.view(np.int32 if dtype_id == 3 else np.int16)
    return torch.from_numpy(signed).view(DTYPES[dtype_id]).to(torch.float32).numpy()


def to_rows(section: Array) -> Array:
    """[layers, kinds, tokens, heads, dim] as [tokens, head x layer x kind x dim]."""
    return np.ascontiguousarray(section.transpose(2, 3, 0, 1, 4)).reshape(section.shape[2], -1)


def turn(section: Array, cos: Array, sin: Array, style: int, rotated: Array) -> Array:
    """The rotation of the format, in float32, no operation fused."""
    turned = section.copy()
    pairs = cos.shape[1]
    for layer in np.flatnonzero(rotated) if style else []:
        first = slice(0, pairs) if style == 1 else slice(0, 2 * pairs, 2)
        second = slice(pairs, 2 * pairs) if style == 1 else slice(1, 2 * pairs, 2)
        a, b = section[layer, 0, ..., first], section[layer, 0, ..., second]
        turned[layer, 0, ..., first] = a * cos[:, None] - b * sin[:, None]
        turned[layer, 0, ..., second] = b * cos[:, None] + a * sin[:, None]
    return turned


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**32))))
    dim = draw(st.sampled_from([1, 2, 3, 8, 20, 32, 64, 80]))
    shape = (draw(st.integers(1, 3)), 2, draw(st.integers(1, 5)), draw(st.integers(1, 3)), dim)
    style = draw(st.sampled_from(list(STYLES.values()))) if dim > 1 else 0
    pairs = draw(st.integers(1, dim // 2)) if style else 0
    angles = rng.uniform(0, 7, (shape[2], pairs))
    width = shape[3] * shape[0] * 2 * dim
    return {
        "section": (rng.normal(size=shape) * 2.0 ** rng.integers(-9, 9)).astype(np.float32),
        "dtype_id": draw(st.sampled_from([1, 2, 3])),
        "style": style,
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "rotated": rng.integers(0, 2, shape[0]).astype(np.uint8),
        "mean": rng.normal(size=width).astype(np.float32) if draw(st.booleans()) else None,
        "scale": rng.normal(size=width).astype(np.float32) if draw(st.booleans()) else None,
    }


def prepare(bits: Array, case: dict[str, Any], implementation: str) -> tuple[Array, Array]:
    x = np.full((bits.shape[2], bits[:, :, 0].size), np.nan, np.float32)
    unfit = _native.scalable_prepare(
        bits,
        case["dtype_id"],
        x,
        case["mean"],
        case["cos"],
        case["sin"],
        case["style"],
        case["rotated"],
        implementation=implementation,
    )
    return unfit, x


def finish(x: Array, out: Array, case: dict[str, Any], implementation: str) -> None:
    _native.scalable_finish(
        x,
        case["scale"],
        case["mean"],
        case["cos"],
        case["sin"],
        case["style"],
        case["rotated"],
        case["dtype_id"],
        out,
        implementation=implementation,
    )


@settings(max_examples=100, deadline=None)
@given(cases())
def test_prepare_undoes_the_rotation_and_takes_the_mean_off_in_every_implementation(case: dict[str, Any]) -> None:
    bits = bits_of(case["section"], case["dtype_id"])
    section = floats_of(bits, case["dtype_id"])
    expected = to_rows(turn(section, case["cos"], -case["sin"], case["style"], case["rotated"]))
    if case["mean"] is not None:
        expected = expected - case["mean"]
    for implementation in IMPLEMENTATIONS:
        unfit, x = prepare(bits, case, implementation)
        assert unfit.dtype == np.uint8
        assert not unfit.any()
        np.testing.assert_array_equal(x, expected)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_finish_scales_adds_the_mean_rotates_and_rounds_in_every_implementation(case: dict[str, Any]) -> None:
    section = case["section"]
    layers, kinds, tokens, heads, dim = section.shape
    x = to_rows(section)
    restored = x if case["scale"] is None else case["scale"] * x
    restored = restored if case["mean"] is None else case["mean"] + restored
    back = restored.reshape(tokens, heads, layers, kinds, dim).transpose(2, 3, 0, 1, 4)
    turned = turn(back, case["cos"], case["sin"], case["style"], case["rotated"])
    expected = bits_of(turned, case["dtype_id"])
    for implementation in IMPLEMENTATIONS:
        out = np.zeros_like(expected)
        finish(x, out, case, implementation)
        np.testing.assert_array_equal(out, expected)


def plain(dtype_id: int, width: int) -> dict[str, Any]:
    return {"dtype_id": dtype_id, "style": 0, "cos": None, "sin": None, "rotated": None, "mean": None, "scale": None}


@pytest.mark.parametrize("dtype_id", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_16_bit_patterns_below_half_of_the_range_come_back(dtype_id: int, implementation: str) -> None:
    patterns = np.arange(65536, dtype=np.uint16).reshape(1, 2, 1, 1, -1)
    case = plain(dtype_id, patterns.size)
    fit = np.abs(floats_of(patterns, dtype_id)) < HALF_OF_RANGE[dtype_id]
    patterns = np.where(fit, patterns, 0).astype(np.uint16)
    unfit, x = prepare(patterns, case, implementation)
    assert unfit.tolist() == [0]
    np.testing.assert_array_equal(x.view(np.uint32), to_rows(floats_of(patterns, dtype_id)).view(np.uint32))
    out = np.full_like(patterns, 7)
    finish(x, out, case, implementation)
    np.testing.assert_array_equal(out, patterns)


@pytest.mark.parametrize("dtype_id", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rounding_to_16_bits_is_that_of_torch(dtype_id: int, implementation: str) -> None:
    edges = np.arange(0, 65536, dtype=np.uint32) << 16
    offsets = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0xFFFF], np.uint32)
    patterns = np.concatenate([(edges[:, None] + offsets).ravel(), RNG.integers(0, 2**32, 50_000).astype(np.uint32)])
    patterns = patterns[: patterns.size // 2 * 2]
    values = patterns.view(np.float32)
    values = values[np.isfinite(values)]
    values = values[: values.size // 2 * 2].reshape(1, -1)
    out = np.zeros((1, 2, 1, 1, values.size // 2), np.uint16)
    finish(values, out, plain(dtype_id, values.size), implementation)
    np.testing.assert_array_equal(out.ravel(), bits_of(values, dtype_id).ravel())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finish_makes_something_of_nan_and_infinity(implementation: str) -> None:
    values = np.array([[np.nan, -np.nan, np.inf, -np.inf]], np.float32)
    for dtype_id in DTYPES:
        out = np.zeros((1, 2, 1, 1, 2), np.uint32 if dtype_id == 3 else np.uint16)
        finish(values, out, plain(dtype_id, 4), implementation)
        back = floats_of(out, dtype_id).ravel()
        assert np.isnan(back).tolist() == [True, True, False, False]
        assert back[2:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("dtype_id", [1, 2, 3])
@pytest.mark.parametrize("style", [0, 1])
def test_a_token_with_a_nan_or_an_infinity_is_named_and_left_out(dtype_id: int, style: int) -> None:
    values = RNG.normal(size=(2, 2, 7, 2, 40)).astype(np.float32)
    values[1, 1, 2, 0, 39] = np.nan
    values[0, 0, 4, 1, 0] = -np.inf
    case = plain(dtype_id, 320) | {
        "style": style,
        "cos": np.ones((7, 20), np.float32),
        "sin": np.zeros((7, 20), np.float32),
        "rotated": np.ones(2, np.uint8),
        "mean": np.ones(320, np.float32),
    }
    for implementation in IMPLEMENTATIONS:
        unfit, x = prepare(bits_of(values, dtype_id), case, implementation)
        assert unfit.tolist() == [0, 0, 1, 0, 1, 0, 0]
        assert not x[[2, 4]].any()
        assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype_id", [1, 2, 3])
def test_a_token_whose_values_could_overflow_is_named_and_left_out(dtype_id: int) -> None:
    values = np.zeros((1, 2, 4, 1, 8), np.float32)
    values[0, 0, 1, 0, 0] = HALF_OF_RANGE[dtype_id]
    values[0, 1, 2, 0, 7] = -HALF_OF_RANGE[dtype_id]
    values[0, 0, 3, 0, 0] = HALF_OF_RANGE[dtype_id] * (1 - 2**-8)
    for implementation in IMPLEMENTATIONS:
        unfit, x = prepare(bits_of(values, dtype_id), plain(dtype_id, 16), implementation)
        assert unfit.tolist() == [0, 1, 1, 0]
        assert not x[1:3].any()


def test_sections_may_be_strided_over_layers_kinds_and_tokens() -> None:
    whole = bits_of(RNG.normal(size=(5, 2, 12, 2, 16)).astype(np.float32), 1)
    part = whole[1:4, :, 3:9]
    case = plain(1, 192)
    for implementation in IMPLEMENTATIONS:
        _, x = prepare(part, case, implementation)
        np.testing.assert_array_equal(x, prepare(part.copy(), case, implementation)[1])
        out = np.full_like(whole, 9)
        finish(x, out[1:4, :, 3:9], case, implementation)
        np.testing.assert_array_equal(out[1:4, :, 3:9], part)
        assert (out[0] == 9).all()
        assert (out[:, :, [0, 1, 2, 9, 10, 11]] == 9).all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    values = np.zeros((1, 2, 3, 1, 8), np.uint16)
    x = np.zeros((3, 16), np.float32)
    case = plain(1, 16)
    tables = {"cos": np.ones((3, 4), np.float32), "sin": np.ones((3, 4), np.float32), "rotated": np.ones(1, np.uint8)}
    for wrong, message in (
        ({"dtype_id": 4}, "dtype"),
        ({"dtype_id": 3}, "uint32"),
        ({"style": 3}, "style"),
        ({"style": 1}, "needs cos"),
        ({"mean": np.zeros(15, np.float32)}, "mean"),
        (tables | {"style": 1, "cos": np.ones((3, 5), np.float32)}, "cos and sin"),
        (tables | {"style": 1, "cos": np.ones((3, 5), np.float32), "sin": np.ones((3, 5), np.float32)}, "dim / 2"),
        (tables | {"style": 2, "rotated": np.ones(2, np.uint8)}, "rotated"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(values, case | wrong, "auto")
        with pytest.raises(ValueError, match=message):
            finish(x, values.copy(), case | wrong, "auto")
    with pytest.raises(ValueError, match="x is float32"):
        finish(x[:, :15].copy(), values.copy(), case, "auto")
    with pytest.raises(ValueError, match="scale"):
        finish(x, values.copy(), case | {"scale": np.zeros(3, np.float32)}, "auto")
    with pytest.raises(TypeError):
        finish(x.astype(np.float64), values.copy(), case, "auto")
