"""The peers of `make bench-codec`: what they count and what they give back, on small tensors and without a model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from quality.baselines import Fp8, Kivi, Zstd
from quality.code_length import count_symbols, learn_tables, scaled_counts, static_length, stream_lengths
from quality.corpus import cut_windows
from quality.curves import bits_at, curves_of, ratios
from quality.embedding import nest
from quality.kvtc import Basis, Learned, TransformCoder, rotate
from quality.lmcache import LmcacheCacheGen, ideal_bits, levels_for
from quality.measure import Judgement, Point
from quality.plot import draw_curves

from kvstore_s3.codec.rotation import Rotation

SHAPE = (2, 2, 64, 2, 16)
ROTATION = Rotation("halves", np.array([1.0, 0.5, 0.25], np.float32), np.array([1, 0], np.uint8))


@pytest.fixture
def chunk() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).bfloat16()


def point(curve: str, bits: float, kl: float) -> Point:
    return Point(curve, f"{bits}", bits, Judgement(kl, 100.0, 0.0))


def test_fp8_counts_a_byte_and_saturates() -> None:
    chunk = torch.tensor([1e9, -1e9, 1.0, 0.3]).bfloat16().view(1, 1, 1, 1, 4)
    coded = Fp8().encode(chunk, 0)
    assert sum(coded.bits.values()) == 8 * chunk.numel()
    assert Fp8().decode(coded, 0).flatten().tolist() == [448.0, -448.0, 1.0, 0.3125]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_kivi_pays_a_bit_for_scales_and_errs_by_half_a_step(chunk: torch.Tensor, width: int) -> None:
    method = Kivi(width)
    coded = method.encode(chunk, 0)
    assert sum(coded.bits.values()) == (width + 1) * chunk.numel()
    error = (method.decode(coded, 0).float() - chunk.float()).abs()
    reach = chunk.float().amax() - chunk.float().amin()
    assert error.max() <= 0.51 * reach / (2**width - 1) + 0.05


def test_kivi_groups_k_by_channel_and_v_by_token(chunk: torch.Tensor) -> None:
    chunk[0, 0, :, 0, 5] = 100.0  # a channel that is constant in K ...
    chunk[0, 1, 9, :, :] = -7.0  # ... and a token that is constant in V cost nothing in precision
    restored = Kivi(2).decode(Kivi(2).encode(chunk, 0), 0)
    assert (restored[0, 0, :, 0, 5] == 100.0).all()
    assert (restored[0, 1, 9] == -7.0).all()


def test_zstd_gives_every_bit_back(chunk: torch.Tensor) -> None:
    coded = Zstd().encode(chunk, 0)
    assert torch.equal(Zstd().decode(coded, 0), chunk)
    assert 8 * chunk.numel() < sum(coded.bits.values()) < 17 * chunk.numel()


def test_lmcache_bins_are_those_of_its_source() -> None:
    assert levels_for(8) == ([32] * 8, [32] * 8)
    assert levels_for(12) == ([32] * 10 + [16] * 2, [32] * 2 + [16] * 10)


def test_lmcache_pays_for_tables_lengths_and_maxima(chunk: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quality.lmcache.load_torchac", lambda: None)
    method = LmcacheCacheGen([32, 32], [16, 16], "test")
    bits = method.encode(chunk, 0).bits
    channels = 2 * 16
    assert bits["tables"] == 16 * 2 * channels * (33 + 17)
    assert bits["stream lengths"] == 32 * 4 * channels
    assert bits["maxima"] == 16 * 4 * 64
    assert bits["streams"] < 5 * chunk.numel()


def test_lmcache_errs_by_half_a_step_of_each_tokens_largest_value(
    chunk: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quality.lmcache.load_torchac", lambda: None)
    method = LmcacheCacheGen([32, 32], [32, 32], "test")
    restored = method.decode(method.encode(chunk, 0), 0).float()
    largest = chunk.float().abs().amax((-1, -2), keepdim=True)
    assert ((restored - chunk.float()).abs() <= largest * (0.5 / 15 + 0.006)).all()


def test_a_cumulative_table_gives_every_symbol_a_place_and_ends_at_65536() -> None:
    table = scaled_counts(torch.tensor([[0], [0], [0], [2]]), 4)
    assert table[0, 0] == 0
    assert table[0, -1] == 65536
    assert (table.diff() >= 1).all()


def test_the_length_of_a_stream_is_its_entropy_where_the_table_is_its_own() -> None:
    symbols = torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]])
    lengths = stream_lengths(symbols, scaled_counts(symbols, 2))
    assert lengths.tolist() == pytest.approx([4.0, 0.0], abs=0.01)
    assert ideal_bits(symbols[None], [scaled_counts(symbols, 2)]) == 16.0  # bytes, one of them begun


def test_learned_tables_are_probabilities_near_the_counts() -> None:
    symbols = torch.randint(0, 5, (4000, 3), generator=torch.Generator().manual_seed(1))
    tables = learn_tables(symbols, 5)
    assert tables.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert static_length(symbols, tables) == pytest.approx(symbols.numel() * math.log2(5), rel=0.01)
    assert count_symbols(symbols, 5).sum() == symbols.numel()


def test_turning_k_back_and_again_changes_nothing_but_rounding(chunk: torch.Tensor) -> None:
    keys = chunk[:, 0].float()
    turned = rotate(keys, ROTATION, 5, -1)
    assert torch.equal(turned[1], keys[1])  # a layer that is not rotated
    assert torch.equal(turned[0, ..., 6:], keys[0, ..., 6:])  # numbers beyond the pairs
    assert not torch.allclose(turned[0], keys[0])
    assert torch.allclose(rotate(turned, ROTATION, 5, 1), keys, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_the_transform_coder_errs_as_its_step_says(joint: bool) -> None:
    kv = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(5)).bfloat16()
    coder = TransformCoder(Learned.of([kv], ROTATION, joint=joint), 0.25)
    coded = coder.encode(kv[0], 0)
    error = coder.decode(coded, 0).float() - kv[0].float()
    assert not error[:, :, 0].any()  # the first token is exact
    assert error[:, :, 1:].square().mean().sqrt().item() == pytest.approx(0.25 / math.sqrt(12), rel=0.15)
    assert coded.bits["exact token"] == 16 * 2 * 2 * 2 * 16
    entropy = 0.5 * math.log2(2 * math.pi * math.e / 0.25**2)
    assert coded.bits["components"] / (63 * 128) == pytest.approx(entropy, rel=0.1)


def test_a_basis_of_more_numbers_than_samples_spans_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quality.kvtc.MOST_DIMENSIONS", 32)
    rows = torch.randn(20, 48, generator=torch.Generator().manual_seed(2))
    basis = Basis.fit(rows)
    centred = rows - basis.mean
    assert torch.allclose(centred @ basis.components @ basis.components.T, centred, atol=1e-3)
    assert (basis.deviation[:-1] >= basis.deviation[1:]).all()


def test_rates_at_equal_kl_are_read_off_a_logarithmic_line() -> None:
    curves = curves_of([point("a", 3.0, 0.1), point("a", 1.0, 10.0), point("b", 2.0, 1.0)])
    assert bits_at(curves["a"], 1.0) == pytest.approx(2.0)
    assert bits_at(curves["a"], 11.0) == pytest.approx(2 - math.log10(11.0))  # little beyond an end
    assert bits_at(curves["a"], 13.0) is None
    assert bits_at(curves["b"], 1.0) == 2.0
    assert ratios(curves["a"], curves["b"]) == [(1.0, pytest.approx(1.0))]


def test_nested_integers_are_bounded_by_the_level_below() -> None:
    levels, _ = nest((np.array([[-14, 4, 1, 13]], np.int16), np.array([20, 20, 2, 9], np.uint8)), (15, 8, 3))
    assert [level.tolist() for level in levels] == [[[-2, 0, 0, 0]], [[-5, 1, 0, 1]], [[-14, 4, 0, 4]]]


def test_windows_share_no_token_and_spread_over_all_texts() -> None:
    texts = [list(range(3000)), list(range(10_000, 12_000))]
    windows = cut_windows(texts, 256, 6, [7])
    assert windows.shape == (6, 384)
    assert (windows[:, 0] == 7).all()
    rest = windows[:, 1:].flatten()
    assert len(rest.unique()) == len(rest)
    assert (windows[:, 1] >= 10_000).sum() == 3


def test_the_plot_names_every_method() -> None:
    svg = draw_curves(curves_of([point("ours", 1.0, 2.0), point("a <b>", 2.0, 0.5), point("exact", 8.0, 0.0)]), "t")
    assert svg.startswith("<svg ")
    assert "a &lt;b&gt;" in svg
    assert "exact" not in svg
