"""The encode kernels of codec 3 against the host's encoder: the same bytes, but for what products may round apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from codec.calibrations import make_calibration
from device.emulated import Device
from device.scalable_encoder import (
    CALIBRATIONS,
    COARSE,
    DIM,
    ROPE,
    ROTATION,
    Case,
    Coder,
    EnginePages,
    Paging,
    case_of,
    case_of_layout,
    values_of,
)
from golden_files import LOSSY, OBJECTS, read_values
from golden_objects import identity_from_json
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.codec.device.scalable_encode import find_borders, find_gains
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import encode_scalable
from kvstore_s3.codec.tables import classes_of, uncalibrated_tables
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import KVLayout

RNG = np.random.Generator(np.random.PCG64(17))


@pytest.fixture(scope="module")
def coder(device: Device) -> Coder:
    return Coder(device)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("mode", ["uncalibrated", "channel"])
def test_the_bytes_are_those_of_the_host(coder: Coder, mode: str, levels: int) -> None:
    case = case_of_layout(values_of(7), CALIBRATIONS.get(mode), levels=levels)
    assert coder.encode(case) == case.on_host()
    coded = encode_scalable(
        case.values,
        case.dtype,
        layer_begin=0,
        first_position=256,
        calibration=case.calibration,
        rotation=ROTATION,
        levels=levels,
    )
    assert [payload for _, payload in coded] == case.on_host()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["uncalibrated", "channel"])
def test_every_dtype_gives_the_bytes_of_the_host(coder: Coder, mode: str, dtype: torch.dtype) -> None:
    case = case_of_layout(values_of(8, dtype=dtype), CALIBRATIONS.get(mode))
    assert coder.encode(case) == case.on_host()


@pytest.mark.parametrize(
    "paging", [Paging(), Paging(16), Paging(5), Paging(8, head_major=True), Paging(8, skew=2)], ids=str
)
def test_pages_of_every_layout_give_the_same_bytes(coder: Coder, paging: Paging) -> None:
    case = case_of_layout(values_of(9, 37))
    assert coder.encode(case, paging) == case.on_host()


def rope(style: str, pairs: int, layers: int) -> Rotation:
    rotated = (np.arange(layers) % 3 != 1).astype(np.uint8)
    return Rotation(style, (0.7 ** np.arange(pairs)).astype(np.float32), rotated)


@pytest.mark.parametrize(
    ("shape", "rotation"),
    [
        ((1, 2, 1, 1, 2), rope("halves", 1, 1)),
        ((1, 2, 2, 3, 1), Rotation.none(1)),
        ((3, 2, 5, 1, 13), rope("pairs", 4, 3)),
        ((2, 2, 33, 1, 80), rope("halves", 40, 2)),
        ((1, 2, 9, 2, 130), rope("halves", 64, 1)),
        ((1, 2, 6, 1, 256), rope("pairs", 128, 1)),
        ((4, 2, 3, 1, 7), Rotation.none(4)),
    ],
    ids=lambda value: value.style if isinstance(value, Rotation) else str(value),
)
def test_sections_of_every_shape_give_the_bytes_of_the_host(
    coder: Coder, shape: tuple[int, ...], rotation: Rotation
) -> None:
    scales = np.exp(RNG.normal(size=shape[-1]) * 2)
    kv = torch.from_numpy(RNG.normal(size=shape) * scales + RNG.normal(size=shape[-1])).to(torch.bfloat16)
    case = case_of(kv, rotation)
    assert coder.encode(case) == case.on_host()


def tokens_that_are_not_finite(kv: torch.Tensor) -> None:
    kv[1, 0, 3, 0, 5] = float("nan")
    kv[0, 1, 7, 1, 2] = float("-inf")
    kv[0, 0, 8, 0, 0] = torch.finfo(kv.dtype).max


def constants(kv: torch.Tensor) -> None:
    kv[0, 0] = 1.5
    kv[1, 1, :, :, 3] = -0.0


def zeros(kv: torch.Tensor) -> None:
    kv[:] = 0
    kv[1, 0, :, 1] = -0.0


def subnormals(kv: torch.Tensor) -> None:
    kv[0] = kv[0] * 1e-39
    kv[1, 1] = kv[1, 1] * 1e-41


def one_outlier(kv: torch.Tensor) -> None:
    kv[0, 1, 4, 0, 6] = 3e4


def outliers_behind_outliers(kv: torch.Tensor) -> None:
    for token in range(2, 8):
        kv[0, 1, token, 0, 6] = 10.0**token


def loud_tokens(kv: torch.Tensor) -> None:
    kv[:, :, 5] *= 40
    kv[1, 1, 11] *= 12


def quiet_and_loud_halves(kv: torch.Tensor) -> None:
    kv[:, :, ::2] *= 1e-3


def huge(kv: torch.Tensor) -> None:
    kv *= 2.0**124 if kv.dtype != torch.float16 else 2.0**11


def all_tokens_exact(kv: torch.Tensor) -> None:
    kv[0, 0, :, :, 0] = float("nan")


ADVERSARIAL: list[Callable[[torch.Tensor], None]] = [
    tokens_that_are_not_finite,
    constants,
    zeros,
    subnormals,
    one_outlier,
    outliers_behind_outliers,
    loud_tokens,
    quiet_and_loud_halves,
    huge,
    all_tokens_exact,
]


@pytest.mark.parametrize("change", ADVERSARIAL, ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", ["uncalibrated", "channel"])
def test_adversarial_values_give_the_bytes_of_the_host(
    coder: Coder, mode: str, change: Callable[[torch.Tensor], None]
) -> None:
    for dtype, tokens in ((torch.bfloat16, 20), (torch.float32, 17)):
        kv = values_of(10, tokens, dtype)
        change(kv)
        case = case_of_layout(kv, CALIBRATIONS.get(mode))
        assert coder.encode(case) == case.on_host()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from(["bits", "tails", "mixed"]), st.booleans())
def test_random_sections_give_the_bytes_of_the_host(
    device: Device, tokens: int, seed: int, kind: str, calibrated: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = view_bits(values_of(seed % 1000, tokens)).copy()
    if kind == "bits":
        values[:] = rng.integers(0, 2**16, values.shape)
    elif kind == "tails":
        tails = torch.from_numpy(rng.standard_cauchy(values.shape)).to(torch.bfloat16)
        values[:] = view_bits(tails)
    else:
        values[:, :, rng.random(tokens) < 0.3] = rng.integers(0, 2**16, (DIM,))
    case = Case(values, ROTATION, calibration=CALIBRATIONS["channel"] if calibrated else None, first_position=seed % 2)
    assert Coder(device).encode(case) == case.on_host()


@pytest.mark.parametrize("factor", [0.01, 0.3, 1.0, 3.0, 40.0, 700.0, 1e5])
def test_values_unlike_the_calibration_give_the_bytes_of_the_host(coder: Coder, factor: float) -> None:
    case = case_of_layout(values_of(11, 30) * factor, CALIBRATIONS["channel"])
    assert coder.encode(case) == case.on_host()


@pytest.mark.parametrize("tokens", [7, 30, 150, 290])
def test_components_with_rare_outliers_get_the_classes_of_the_host(coder: Coder, tokens: int) -> None:
    kv = values_of(12, tokens, torch.float32)
    kv[0, 0, ::29] += torch.linspace(0, 60, DIM)
    kv[1, 1, 3::41] -= torch.linspace(0, 15, DIM)
    kv[:, :, 5, 0] = float("inf")  # sums leave out exact tokens
    case = case_of_layout(kv, COARSE)
    assert coder.encode(case) == case.on_host()


def test_outliers_of_every_height_get_the_classes_of_the_host(coder: Coder) -> None:
    step = float(COARSE.units[0, 0].synthesis_scale[0])
    kv = values_of(21, 400, torch.float32)
    noise = 0.05 * step * torch.randn(2, 400, 2, DIM, generator=torch.Generator().manual_seed(3))
    kv[:, 1] = torch.from_numpy(COARSE.mean[:, 1, None]) + noise
    kv[:, 1, 5] += step * torch.linspace(3, 7.5, 4 * DIM).reshape(2, 2, DIM)
    case = case_of_layout(kv, COARSE)
    assert coder.encode(case) == case.on_host()


def test_many_components_are_weighed_as_by_the_host(coder: Coder) -> None:
    layout = KVLayout(2, 1, 70, "bfloat16", rope=ROPE)

    def draw(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        return (torch.randn(2, 2, 60, 1, 70, generator=rng) * torch.logspace(-1, 1, 70)).to(torch.bfloat16)

    calibration = make_calibration(layout, "channel", draw)
    for factor in (1.0, 1.2, 1.5):
        case = case_of_layout(draw(9)[:, :, :12] * factor, calibration)
        assert coder.encode(case) == case.on_host()


def test_the_first_token_of_a_prompt_is_exact(coder: Coder) -> None:
    for position in (0, 1):
        case = case_of_layout(values_of(13), first_position=position)
        assert coder.encode(case) == case.on_host()


@pytest.mark.parametrize("name", LOSSY)
def test_golden_values_give_the_bytes_of_the_host(coder: Coder, name: str) -> None:
    entry = OBJECTS["objects"][name]
    identity = identity_from_json(entry["identity"])
    shard, dim, dtype = identity.shard, identity.layout.head_dim, identity.layout.dtype
    stored = read_values(name, len(entry["integers_blake3"]))
    values = np.frombuffer(stored, "<u4" if dtype == "float32" else "<u2")
    values = values.reshape(shard.layers, 2, identity.tokens, shard.heads, dim)
    case = Case(values, rope("halves", dim // 2, shard.layers), dtype, first_position=16)
    assert coder.encode(case) == case.on_host()


def test_sections_of_many_places_are_encoded_by_one_call(coder: Coder) -> None:
    kv = values_of(14, 48)
    kv[:, :, 20:30, 1] = float("nan")
    values = view_bits(kv)
    places = [(slice(0, 2), slice(0, 16), slice(0, 2)), (slice(1, 2), slice(16, 48), slice(0, 2))]
    places += [(slice(0, 1), slice(20, 30), slice(1, 2)), (slice(0, 2), slice(19, 47), slice(1, 2))]
    plans, expected = [], []
    for layers, tokens, heads in places:
        part = np.ascontiguousarray(values[layers, :, tokens, heads])
        local = replace(ROTATION, rotated=ROTATION.select(layers.start, layers.stop))
        case = Case(part, local, first_position=tokens.start)
        begins = {"token_begin": tokens.start, "layer_begin": layers.start, "head": heads.start}
        plan = coder.plan(case, **begins)
        assert plan is not None
        plans.append(plan)
        expected.append(case.on_host())
    assert coder.run(plans, EnginePages(coder.device, values, Paging(8))) == expected


def test_class_borders_are_where_the_hosts_classes_change() -> None:
    borders = find_borders()
    assert borders[0] == 0
    y = np.sqrt(np.repeat(borders[1:], 2) * np.tile([1 - 1e-5, 1 + 1e-5], len(borders) - 1)).astype(np.float32)
    spread = np.stack([y, -y])
    found, first = classes_of(spread), uncalibrated_tables().first
    expected = np.searchsorted(borders, np.square(y, dtype=np.float64), side="right") - 1
    coded = expected >= first[0]  # below, outliers and zeros have a say
    assert np.array_equal(found[coded], expected[coded])


def test_nothing_is_gained_by_naming_the_static_class() -> None:
    gains = find_gains(4)
    assert not np.diagonal(gains).any()
    assert np.isinf(gains[8, 3])
    assert not gains[7, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"tokens": 2**16 + 1},
        {"layers": 0},
        {"levels": 0},
        {"levels": 4},
        {"heads": 2},
        {"heads": 0},
        {"heads": 2**31, "span": 3, "calibrated": 1},
        {"components": 47},
        {"components": 0},
        {"pairs": 7},
        {"style": 3},
        {"style": 0},
        {"span": 1},
        {"matrix_bytes": 2},
        {"index": 2},
        {"streams": 0},
        {"header_bytes": 13},
        {"layers": 2**16 - 1, "components": 2 * 12 * (2**16 - 1)},
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(coder: Coder, change: dict[str, int]) -> None:
    plan = coder.plan(case_of_layout(values_of(18)))
    assert plan is not None
    job = plan.jobs[:1].copy()
    assert coder.calls.measure(job, DIM, 2) > (0, 0)
    for name, value in change.items():
        job[name] = value
    assert coder.calls.measure(job, DIM, 2) == (0, 0)
    assert coder.calls.measure(plan.jobs[:1], 257, 2) == (0, 0)
    assert coder.calls.measure(plan.jobs[:1], DIM, 1) == (0, 0)


def test_sections_that_the_device_does_not_encode_are_not_planned(coder: Coder) -> None:
    wide = np.zeros((1, 2, 3, 1, 300), np.uint16)
    assert coder.plan(Case(wide, Rotation.none(1))) is None
    assert coder.plan(case_of_layout(values_of(19), CALIBRATIONS["group"]), layers=(1, 2)) is None
    assert coder.plan(replace(case_of_layout(values_of(19)), dtype="float8_e4m3fn")) is None


def test_scratch_is_a_small_multiple_of_the_values(coder: Coder) -> None:
    values = np.zeros((4, 2, 256, 1, 128), np.uint16)
    plan = coder.plan(Case(values, Rotation.none(4)))
    assert plan is not None
    assert 8 * values.size <= plan.scratch_bytes <= 8.2 * values.size
