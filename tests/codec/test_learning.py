"""What calibration learns from samples: moments, metrics, bases, steps, and a quantiser that is the format's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.fitting import LEVELS, Quantiser, fit_quantiser
from kvstore_s3.codec.learning import (
    Moments,
    expected_error,
    find_step,
    fisher_metrics,
    gain_metrics,
    learn_basis,
)
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import decode_scalable, encode_scalable
from kvstore_s3.codec.spans import Spread
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout

LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=8, dtype="float32")
SPANS = ("channel", "head", "group", "all")


def draw_samples(rows: int, seed: int = 0) -> torch.Tensor:
    """Correlated over layers, heads, kinds and dimensions, far from zero: [rows, heads, layers, 2, dim]."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 2 * 3 * 2 * 8, generator=torch.Generator().manual_seed(99))
    flat = torch.randn(rows, 12, generator=random) @ mix + 0.1 * torch.randn(rows, mix.shape[1], generator=random)
    return (flat + 50).view(rows, 2, 3, 2, 8)


def learn(span: str, layer_group: int = 2, rows: int = 2000, gradients: torch.Tensor | None = None):
    spread = Spread.plan(LAYOUT, span, layer_group)
    values, slopes = Moments(spread, centred=True), Moments(spread, centred=False)
    for part in draw_samples(rows).split(300):
        values.add(part)
    slopes.add(
        torch.randn(500, 2, 3, 2, 8, generator=torch.Generator().manual_seed(1)) if gradients is None else gradients
    )
    return learn_basis(values, fisher_metrics(slopes))


def fit(basis, step: float) -> Quantiser:
    return fit_quantiser(basis, [basis.analyse(draw_samples(1500, seed=5))], step)


@pytest.mark.parametrize("span", SPANS)
def test_cutting_into_blocks_and_joining_gives_the_same_samples(span: str) -> None:
    spread = Spread.plan(LAYOUT, span, 2)
    samples = draw_samples(7)
    blocks = [spread.cut(samples, group) for group in range(len(spread.groups))]
    assert [block.shape[2] for block in blocks] == [spread.block_size(0), spread.block_size(1)]
    assert torch.equal(spread.join(blocks), samples)


def test_an_unknown_span_and_an_impossible_group_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown span 'layer'; use one of channel, head, group, all"):
        Spread.plan(LAYOUT, "layer", None)
    for layers in (0, 4):
        with pytest.raises(InvalidArgumentError, match="give 1 to 3"):
            Spread.plan(LAYOUT, "group", layers)


@pytest.mark.parametrize(("layers", "dim", "group"), [(32, 128, 4), (8, 64, 8), (80, 1024, 1), (4, 8, 4)])
def test_the_default_layer_group_keeps_a_heads_transform_at_dimension_1024(layers: int, dim: int, group: int) -> None:
    layout = KVLayout(layers=layers, kv_heads=1, head_dim=dim, dtype="bfloat16")
    assert Spread.plan(layout, "group", None).layer_group == group


def test_moments_far_from_zero_are_those_of_all_samples_at_once() -> None:
    spread = Spread.plan(LAYOUT, "group", 2)
    moments = Moments(spread, centred=True)
    samples = draw_samples(1000) * 1e-2 + 100
    for part in samples.split(90):
        moments.add(part)
    assert torch.allclose(moments.mean, samples.double().mean(0).float(), rtol=1e-6)
    for group in range(2):
        blocks = spread.cut(samples.double(), group)
        expected = torch.stack([torch.cov(block.T, correction=0) for block in blocks])
        assert torch.allclose(moments.matrix(group), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("span", SPANS)
def test_synthesis_undoes_analysis(span: str) -> None:
    basis = learn(span)
    samples = draw_samples(50, seed=3)
    assert torch.allclose(basis.synthesise(basis.analyse(samples)), samples, atol=1e-3)


@pytest.mark.parametrize("span", SPANS)
def test_components_are_uncorrelated_within_a_block_and_have_the_stated_deviations(span: str) -> None:
    basis = learn(span)
    for y, group in zip(basis.analyse(draw_samples(2000)), basis.groups, strict=True):
        covariance = y.mT @ y / y.shape[1]
        assert torch.allclose(
            covariance, torch.diag_embed(group.deviations.square()), atol=2e-2 * float(covariance.max())
        )


@pytest.mark.parametrize("span", ["head", "group", "all"])
def test_an_error_of_one_component_costs_the_same_in_the_metric_whatever_the_component(span: str) -> None:
    spread = Spread.plan(LAYOUT, span, 3)
    values, slopes = Moments(spread, centred=True), Moments(spread, centred=False)
    values.add(draw_samples(1000))
    slopes.add(draw_samples(1000, seed=8) - 50)
    (metric,) = fisher_metrics(slopes)
    (group,) = learn_basis(values, [metric]).groups
    synthesis = group.synthesis.double()
    costs = synthesis @ metric @ synthesis.mT
    assert torch.allclose(costs, torch.eye(costs.shape[-1], dtype=costs.dtype).expand_as(costs), atol=2e-3)


def test_what_hurts_more_is_coded_finer() -> None:
    gains = torch.ones(3, 2)
    gains[1, 0] = 16.0
    spread = Spread.plan(LAYOUT, "channel", 3)
    values = Moments(spread, centred=True)
    values.add(draw_samples(1000))
    (group,) = learn_basis(values, gain_metrics(spread, gains)).groups
    steps = group.synthesis.view(2, 3, 2, 8)
    assert torch.allclose(steps[:, 1, 0], torch.tensor(0.25))
    assert torch.allclose(steps[:, 0, 1], torch.tensor(1.0))


def test_a_layer_that_nothing_depends_on_still_has_a_transform() -> None:
    gradients = torch.randn(400, 2, 3, 2, 8, generator=torch.Generator().manual_seed(2))
    gradients[:, :, 2] = 0
    basis = learn("group", 1, gradients=gradients)
    samples = draw_samples(20, seed=4)
    assert torch.isfinite(basis.groups[2].synthesis).all()
    assert torch.allclose(basis.synthesise(basis.analyse(samples)), samples, atol=1e-2)


def test_few_rows_shrink_the_covariance_and_many_do_not() -> None:
    few, many = (learn("all", 3, rows=rows) for rows in (100, 4000))
    smallest = [float(basis.groups[0].deviations.min()) for basis in (few, many)]
    assert smallest[0] > 10 * smallest[1]  # without it, what 100 rows do not span would seem to be nothing


def test_the_step_gives_the_error_that_was_asked_for() -> None:
    basis = learn("group")
    for step in (1e-3, 0.1, 3.0):
        assert find_step(basis, expected_error(basis, step)) == pytest.approx(step, rel=1e-6)
    errors = [expected_error(basis, step) for step in (0.01, 0.02)]
    assert errors[1] == pytest.approx(4 * errors[0])


@pytest.mark.parametrize("span", SPANS)
def test_the_quantiser_is_that_of_the_format(span: str) -> None:
    quantiser = fit(learn(span), 0.8)
    calibration = quantiser.build(bytes(32), Rotation.none(3), {})
    calibration = Calibration.from_bytes(calibration.to_bytes(), LAYOUT, bytes(32))
    samples = draw_samples(40, seed=6)
    bits = np.ascontiguousarray(samples.permute(2, 3, 0, 1, 4).numpy()).view(np.uint32)
    for level in range(LEVELS):
        expected = quantiser.basis.synthesise(quantiser.quantise(quantiser.basis.analyse(samples), level))
        found = code(bits, calibration, level).permute(2, 3, 0, 1, 4)
        error = (found - expected).abs()
        scale = float((samples - quantiser.basis.mean).std())
        assert float(error.median()) < 2e-3 * scale  # float16 matrices; a component on a boundary may round elsewhere
        assert float((error > 0.1 * scale).float().mean()) < 0.02


def code(bits: np.ndarray, calibration: Calibration, level: int) -> torch.Tensor:
    """Encode, keep levels 0 to `level`, decode: float32 [layers, 2, tokens, heads, dim]."""
    out = np.zeros_like(bits)
    for group in range(calibration.groups):
        begin, end = calibration.group_layers(group)
        payloads = encode_scalable(
            bits[begin:end],
            "float32",
            layer_begin=begin,
            first_position=256,
            calibration=calibration,
            rotation=calibration.rotation,
        )
        assert payloads[0][0] == 3
        decode_scalable(
            [(codec, memoryview(payload)) for codec, payload in payloads[: level + 1]],
            out[begin:end],
            "float32",
            layer_begin=begin,
            head_begin=0,
            section_heads=calibration.kv_heads,
            first_position=256,
            calibration=calibration,
        )
    return torch.from_numpy(out.view(np.float32))


def size_at_equal_error(span: str) -> int:
    """Bytes of 256 tokens whose error in the metric is the same for every span."""
    basis = learn(span, 3)
    quantiser = fit(basis, find_step(basis, 0.05))
    calibration = quantiser.build(bytes(32), Rotation.none(3), {})
    bits = np.ascontiguousarray(draw_samples(256, seed=7).permute(2, 3, 0, 1, 4).numpy()).view(np.uint32)
    payloads = encode_scalable(
        bits, "float32", layer_begin=0, first_position=256, calibration=calibration, rotation=calibration.rotation
    )
    return sum(len(payload) for _, payload in payloads)


def test_a_wider_span_needs_fewer_bytes_at_the_same_error() -> None:
    sizes = [size_at_equal_error(span) for span in SPANS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 0.5 * sizes[0]


def test_components_that_round_to_nothing_are_left_out() -> None:
    basis = learn("all", 3)
    units = fit(basis, 2.0).build(bytes(32), Rotation.none(3), {}).units
    assert 1 <= len(units[0, 0].classes) < 24  # twelve sources, and a little noise far below the step
    everything_lost = fit(basis, 1e6).build(bytes(32), Rotation.none(3), {}).units
    assert len(everything_lost[0, 0].classes) == 1


def test_learning_again_gives_the_same_artefact() -> None:
    first, second = (fit(learn("group"), 0.5).build(bytes(32), Rotation.none(3), {}).to_bytes() for _ in range(2))
    assert first == second
