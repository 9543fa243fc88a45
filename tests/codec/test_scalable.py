"""Sections through the scalable codec: what comes back, at each level, and what is refused."""

from __future__ import annotations

import contextlib
import gc
import struct
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import pytest
import torch
from codec.calibrations import make_calibration
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.codec.calibration import SPANS, Calibration, calibration_digest
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import NOTHING, SCALABLE, decode_scalable, encode_scalable
from kvstore_s3.encode import view_bits
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError
from kvstore_s3.layout import KVLayout

LAYOUT = KVLayout(4, 3, 16, "bfloat16", rope={"rope_type": "default", "rope_theta": 10000})
ROTATION = Rotation.from_layout(LAYOUT)
TOKENS = 48


def values_of(seed: int = 0, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """KV of a whole chunk [4, 2, tokens, 3, 16]: correlated, of many scales, with a mean."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(99)) * torch.logspace(-1.5, 0.5, 16)
    kv = torch.randn(4, 2, tokens, 3, 16, generator=rng) @ mixing.T + torch.linspace(-3, 3, 16)
    return kv.to(dtype)


def encode(kv: torch.Tensor, calibration: Calibration | None = None, **given: Any) -> list[tuple[int, bytes]]:
    given = {"layer_begin": 0, "first_position": 256, "rotation": ROTATION, **given}
    return encode_scalable(view_bits(kv), str(kv.dtype)[6:], calibration=calibration, **given)


def decode(
    coded: list[tuple[int, bytes]], like: torch.Tensor, calibration: Calibration | None = None, **given: Any
) -> torch.Tensor:
    out = torch.empty_like(like)
    options = {"layer_begin": 0, "head_begin": 0, "section_heads": 3, "first_position": 256, **given}
    payloads = [(codec_id, memoryview(payload)) for codec_id, payload in coded]
    decode_scalable(payloads, view_bits(out), str(like.dtype)[6:], calibration=calibration, **options)
    return out


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root mean square error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


CALIBRATIONS = {span: make_calibration(LAYOUT, span, lambda seed: values_of(seed, 256)) for span in SPANS}
MODES = {"uncalibrated": None, **CALIBRATIONS}


@pytest.mark.parametrize("mode", MODES)
def test_every_level_read_brings_the_values_closer(mode: str) -> None:
    kv = values_of(7)
    coded = encode(kv, MODES[mode])
    assert [codec_id for codec_id, _ in coded] == [SCALABLE] * 3
    errors = [error_of(decode(coded[: level + 1], kv, MODES[mode]), kv) for level in range(3)]
    assert errors[0] > 1.8 * errors[1] > 3 * errors[2]
    assert errors[2] < 0.06
    assert sum(len(payload) for _, payload in coded) < kv.numel()  # half of raw


@pytest.mark.parametrize("mode", MODES)
def test_a_range_of_heads_decodes_to_the_same_values(mode: str) -> None:
    kv = values_of(8)
    coded = encode(kv, MODES[mode])
    whole = decode(coded, kv, MODES[mode])
    for begin, end in ((0, 1), (1, 3), (2, 3)):
        part = decode(coded, kv[:, :, :, begin:end].contiguous(), MODES[mode], head_begin=begin)
        torch.testing.assert_close(part, whole[:, :, :, begin:end], rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_token_that_is_not_finite_or_far_out_is_kept_exactly_and_smears_nothing(mode: str, bad: float) -> None:
    kv = values_of(9)
    kv[2, 1, 5, 1, 3] = bad
    kv[0, 0, 9, 2, 0] = bad
    found = decode(encode(kv, MODES[mode]), kv, MODES[mode])
    for token, head in ((5, 1), (9, 2)):
        assert torch.equal(view(found[:, :, token, head]), view(kv[:, :, token, head]))
    others = [token for token in range(TOKENS) if token not in (5, 9)]
    assert error_of(found[:, :, others], kv[:, :, others]) < 0.06


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_at_the_end_of_the_range_neither_overflow_nor_smear(mode: str, dtype: torch.dtype) -> None:
    kv = values_of(9, dtype=dtype)
    largest = torch.finfo(dtype).max
    kv[0, 0, 9, :, [0, 8]] = largest  # a pair: turning it back overflows
    kv[3, 1, 13] = -largest  # a whole token: the deviation hides it
    found = decode(encode(kv, MODES[mode]), kv, MODES[mode])
    assert torch.equal(found[:, :, [9, 13]], kv[:, :, [9, 13]])
    others = [token for token in range(TOKENS) if token not in (9, 13)]
    assert error_of(found[:, :, others], kv[:, :, others]) < 0.06


@pytest.mark.parametrize("tokens", [16, 48, 256])
@pytest.mark.parametrize("loudness", [30, 1e4, 1e30])
def test_loud_tokens_do_not_coarsen_the_step_of_others(tokens: int, loudness: float) -> None:
    kv = values_of(9, tokens=tokens)
    kv[3, 1, 13] = loudness
    kv[1, 0, 7] *= loudness
    found = decode(encode(kv), kv)
    others = [token for token in range(tokens) if token not in (7, 13)]
    assert error_of(found[:, :, others], kv[:, :, others]) < 0.06


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e35])
def test_values_of_any_size_are_coded(scale: float) -> None:
    kv = (values_of(9, dtype=torch.float64) * scale).to(torch.bfloat16)
    assert error_of(decode(encode(kv), kv), kv) < 0.06


def test_a_chunk_of_nothing_but_nan_is_exact() -> None:
    kv = torch.full((4, 2, TOKENS, 3, 16), float("nan"), dtype=torch.bfloat16)
    assert torch.equal(view(decode(encode(kv), kv)), view(kv))


def test_random_bits_are_stored_exactly_and_no_larger_than_raw() -> None:
    kv = torch.randint(-32768, 32767, (4, 2, TOKENS, 3, 16), dtype=torch.int16).view(torch.bfloat16)
    coded = encode(kv)
    assert [codec_id for codec_id, _ in coded[1:]] == [NOTHING] * 2
    assert sum(len(payload) for _, payload in coded) <= kv.numel() * 2 + 2
    assert torch.equal(view(decode(coded, kv)), view(kv))
    assert torch.equal(view(decode(coded[:1], kv)), view(kv))


def test_the_first_token_of_a_prompt_is_exact() -> None:
    kv = values_of(10)
    found = decode(encode(kv, first_position=0), kv, first_position=0)
    assert torch.equal(found[:, :, 0], kv[:, :, 0])
    assert not torch.equal(found[:, :, 1], kv[:, :, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_dtypes_are_coded_too(dtype: torch.dtype) -> None:
    kv = values_of(11, dtype=dtype)
    assert error_of(decode(encode(kv), kv), kv) < 0.06


def test_fp8_is_refused_by_name() -> None:
    kv = torch.zeros(4, 2, TOKENS, 3, 16).to(torch.float8_e4m3fn)
    with pytest.raises(InvalidArgumentError, match="float8_e4m3fn"):
        encode(kv)


def test_data_unlike_that_of_the_calibration_is_still_within_its_step() -> None:
    calibration = CALIBRATIONS["group"]
    kv = values_of(12) * 40
    assert error_of(decode(encode(kv, calibration), kv, calibration), kv) < 0.02


def test_equal_values_give_equal_bytes() -> None:
    kv = values_of(13)
    for calibration in MODES.values():
        assert encode(kv, calibration) == encode(kv.clone(), calibration)


@pytest.mark.parametrize("head_dim", [1, 3, 10, 100])
def test_head_dims_that_are_no_multiple_of_8_are_coded(head_dim: int) -> None:
    layout = KVLayout(2, 2, head_dim, "bfloat16")
    kv = torch.randn(2, 2, 20, 2, head_dim).to(torch.bfloat16)
    coded = encode(kv, rotation=Rotation.from_layout(layout))
    assert error_of(decode(coded, kv, section_heads=2), kv) < 0.06


def test_constant_and_zero_values_come_back() -> None:
    kv = torch.zeros(4, 2, TOKENS, 3, 16, dtype=torch.bfloat16)
    assert torch.equal(decode(encode(kv), kv), kv)
    kv += 5
    assert error_of(decode(encode(kv), kv), kv) < 0.06


def test_a_section_that_is_no_layer_group_of_the_calibration_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="layer group"):
        encode(values_of()[:3], CALIBRATIONS["group"])


def test_another_position_another_calibration_or_none_are_refused() -> None:
    kv = values_of(14)
    coded = encode(kv, CALIBRATIONS["group"])
    for options, calibration in (
        ({"first_position": 0}, CALIBRATIONS["group"]),
        ({}, CALIBRATIONS["head"]),
        ({}, None),
        ({"layer_begin": 2}, CALIBRATIONS["group"]),
    ):
        with pytest.raises(DamagedObjectError):
            decode(coded, kv, calibration, **options)
    with pytest.raises(DamagedObjectError):
        decode(encode(kv), kv, CALIBRATIONS["group"])
    assert error_of(decode(coded, kv, CALIBRATIONS["group"], first_position=None), kv) < 0.06


def test_more_tokens_than_a_chunk_may_have_and_positions_beyond_32_bits_are_refused() -> None:
    kv = torch.zeros(1, 2, 2**16 + 1, 1, 2, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match="65537 tokens"):
        encode(kv, rotation=Rotation.none(1))
    with pytest.raises(InvalidArgumentError, match="4294967296"):
        encode(kv[:, :, :16], rotation=Rotation.none(1), first_position=2**32)


def test_the_last_tokens_of_the_longest_chunk_can_be_exact() -> None:
    kv = torch.randn(1, 2, 2**16, 1, 2).to(torch.bfloat16)
    kv[0, 0, -1, 0, 0] = torch.nan
    found = decode(encode(kv, rotation=Rotation.none(1)), kv, section_heads=1)
    assert torch.equal(view(found[:, :, -1]), view(kv[:, :, -1]))
    assert error_of(found[:, :, :-1], kv[:, :, :-1]) < 0.06


def test_a_section_of_more_than_a_million_numbers_a_token_is_coded() -> None:
    kv = torch.randn(129, 2, 16, 1, 4096).to(torch.bfloat16)
    coded = encode(kv, rotation=Rotation.none(129))
    assert coded[0][0] == SCALABLE
    assert error_of(decode(coded, kv, section_heads=1), kv) < 0.06


def test_a_number_of_levels_that_is_not_the_index_s_comes_before_a_payload_that_is_cut() -> None:
    _, payload = encode(values_of(15))[0]
    with pytest.raises(DamagedObjectError) as caught:
        decode([(SCALABLE, payload[:20])], values_of(15), object_levels=2)
    assert caught.value.code is BitstreamFault.BAD_PAYLOAD


@pytest.mark.parametrize("step", [1e-45, 1e38, 3.4e38])
def test_no_step_of_a_hostile_stream_fails_a_decoder(step: float) -> None:
    kv = values_of(15)
    coded = encode(kv, rotation=Rotation.none(4))
    _, payload = coded[0]
    steps = 12 + 4 * 3 + 12  # behind the header, the lengths and a stream's own
    payload = payload[:steps] + struct.pack("<8f", *[step] * 8) + payload[steps + 32 :]
    decode([(SCALABLE, payload), *coded[1:]], kv)


def test_levels_of_two_codecs_are_refused() -> None:
    kv = values_of(15)
    coded = encode(kv)
    with pytest.raises(DamagedObjectError) as caught:
        decode([coded[0], (NOTHING, b"\0")], kv)
    assert caught.value.code is BitstreamFault.UNSUPPORTED_FEATURE


PAYLOADS = {mode: encode(values_of(16), calibration) for mode, calibration in MODES.items()}


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)),
    level=st.integers(0, 2),
    where=st.floats(0, 1),
    change=st.one_of(st.integers(1, 255), st.just("cut"), st.just("grow")),
)
def test_hostile_payloads_are_refused_or_decode_to_finite_sizes(
    mode: str, level: int, where: float, change: int | str
) -> None:
    kv = values_of(16)
    coded = list(PAYLOADS[mode])
    codec_id, payload = coded[level]
    at = int(where * (len(payload) - 1))
    if change == "cut":
        payload = payload[:at]
    elif change == "grow":
        payload = payload[:at] + bytes(16) + payload[at:]
    else:
        assert isinstance(change, int)
        payload = payload[:at] + bytes([payload[at] ^ change]) + payload[at + 1 :]
    coded[level] = (codec_id, payload)
    with contextlib.suppress(DamagedObjectError):
        decode(coded, kv, MODES[mode])


def test_the_artefact_reads_back_and_is_the_same_bytes() -> None:
    for span, calibration in CALIBRATIONS.items():
        data = calibration.to_bytes()
        again = Calibration.from_bytes(data, LAYOUT, calibration.namespace)
        assert again.to_bytes() == data, span
        assert len(calibration_digest(data)) == 32
        kv = values_of(17)
        assert encode(kv, again) == encode(kv, calibration)


def test_a_calibration_is_let_go_after_its_last_use() -> None:
    kv = values_of(18)
    calibration = Calibration.from_bytes(CALIBRATIONS["group"].to_bytes(), LAYOUT, bytes(32))
    decode(encode(kv, calibration), kv, calibration)
    gone = weakref.ref(calibration)
    del calibration
    gc.collect()
    assert gone() is None


def test_threads_share_a_calibration_that_none_has_used_before() -> None:
    chunks = [values_of(seed) for seed in range(4)]
    expected = [encode(kv, CALIBRATIONS["group"]) for kv in chunks]
    fresh = Calibration.from_bytes(CALIBRATIONS["group"].to_bytes(), LAYOUT, bytes(32))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda number: encode(chunks[number % 4], fresh), range(16))) == expected * 4


def view(kv: torch.Tensor) -> npt.NDArray[Any] | torch.Tensor:
    return kv.contiguous().view(torch.int16)
