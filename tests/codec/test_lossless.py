from __future__ import annotations

import threading

import numpy as np
import pytest
from codec.sections import KINDS_OF_VALUES, decode_guarded, draw_normal, draw_random, sections
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore_s3 import _native
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError

CODECS = [LosslessCodec(name) for name in _native.implementations()]
RNG = np.random.Generator(np.random.PCG64(7))
BLOCK = draw_normal(RNG, (2, 2, 40, 3, 16))
PAYLOAD = LosslessCodec().encode(BLOCK)


def decode(codec: LosslessCodec, payload: bytes, shape: tuple[int, ...]) -> Bits:
    return decode_guarded(codec, payload, shape, np.dtype(np.uint16), head_begin=0, section_heads=shape[3])


@settings(max_examples=150, deadline=None)
@given(sections())
def test_every_section_comes_back_bit_for_bit_from_every_implementation(values: Bits) -> None:
    payloads = {codec.encode(values) for codec in CODECS}
    assert len(payloads) == 1
    for codec in CODECS:
        np.testing.assert_array_equal(decode(codec, next(iter(payloads)), values.shape), values)


@settings(max_examples=60, deadline=None)
@given(sections(most_tokens=40), st.data())
def test_a_range_of_heads_decodes_alone_to_the_slice(values: Bits, data: st.DataObject) -> None:
    heads = values.shape[3]
    begin = data.draw(st.integers(0, heads - 1))
    end = data.draw(st.integers(begin + 1, heads))
    shape = (*values.shape[:3], end - begin, values.shape[4])
    payload = LosslessCodec().encode(values)
    for codec in CODECS:
        out = decode_guarded(codec, payload, shape, values.dtype, head_begin=begin, section_heads=heads)
        np.testing.assert_array_equal(out, values[:, :, :, begin:end])


@pytest.mark.parametrize("lanes", range(1, 34))
def test_a_block_of_any_number_of_lanes_is_coded_alike_by_every_implementation(lanes: int) -> None:
    values = draw_normal(RNG, (1, 1, 70, 2, lanes))
    values[0, 0, ::9, :, lanes // 2] = 0x7F80  # an escape
    payloads = {codec.encode(values) for codec in CODECS}
    assert len(payloads) == 1
    for codec in CODECS:
        np.testing.assert_array_equal(decode(codec, next(iter(payloads)), values.shape), values)


def test_strided_input_gives_the_bytes_of_its_contiguous_copy() -> None:
    whole = draw_normal(RNG, (6, 2, 80, 4, 32))
    part = whole[1:5, :, 16:48]
    assert LosslessCodec().encode(part) == LosslessCodec().encode(part.copy())


def test_a_read_only_section_is_coded() -> None:
    values = BLOCK.copy()
    values.flags.writeable = False
    assert LosslessCodec().encode(values) == PAYLOAD


@settings(max_examples=40, deadline=None)
@given(sections())
def test_no_payload_is_longer_than_raw_by_more_than_eight_bytes_a_head(values: Bits) -> None:
    assert len(LosslessCodec().encode(values)) <= values.nbytes + 8 * values.shape[3]


def test_random_bits_cost_less_than_one_percent() -> None:
    values = draw_random(RNG, (4, 2, 256, 2, 64))
    assert len(LosslessCodec().encode(values)) < 1.01 * values.nbytes


def test_normal_values_take_at_most_10_point_6_bits() -> None:
    values = draw_normal(RNG, (4, 2, 256, 2, 64))
    assert 8 * len(LosslessCodec().encode(values)) / values.size < 10.6


def test_more_tokens_than_a_16_bit_count_holds_are_coded() -> None:
    values = np.concatenate([draw_normal(RNG, (1, 1, 40_000, 1, 8)), np.zeros((1, 1, 30_000, 1, 8), np.uint16)], axis=2)
    for codec in CODECS:
        np.testing.assert_array_equal(decode(codec, codec.encode(values), values.shape), values)


def test_an_empty_implementation_name_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="implementation"):
        LosslessCodec("").encode(BLOCK)


@pytest.mark.parametrize(
    "values",
    [
        BLOCK.astype(np.uint32),
        BLOCK[0],
        BLOCK[..., ::2],
        BLOCK[:, :, :, ::2],
        BLOCK[:, :, :0],
        np.concatenate([BLOCK, BLOCK], axis=1),
    ],
    ids=["uint32", "four axes", "dim strided", "heads strided", "no tokens", "four kinds"],
)
def test_what_is_no_section_is_refused_with_its_shape(values: np.ndarray) -> None:
    with pytest.raises(InvalidArgumentError, match=r"found uint(16|32) \("):
        LosslessCodec().encode(values)


def test_a_read_only_target_is_refused() -> None:
    out = BLOCK.copy()
    out.flags.writeable = False
    with pytest.raises(InvalidArgumentError):
        LosslessCodec().decode(memoryview(PAYLOAD), out, head_begin=0, section_heads=3)


@pytest.mark.parametrize(("begin", "heads"), [(1, 3), (4, 3), (0, 2)])
def test_a_head_range_outside_of_the_section_is_refused(begin: int, heads: int) -> None:
    with pytest.raises(InvalidArgumentError, match="head range"):
        LosslessCodec().decode(memoryview(PAYLOAD), BLOCK.copy(), head_begin=begin, section_heads=heads)


def damaged_at(offset: int, octet: int) -> bytes:
    payload = bytearray(PAYLOAD)
    payload[offset] = octet
    return bytes(payload)


STREAM = 4 * BLOCK.shape[3]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", BitstreamFault.TRUNCATED),
        (PAYLOAD[:11], BitstreamFault.TRUNCATED),
        (PAYLOAD[:-1], BitstreamFault.TRUNCATED),
        (PAYLOAD + b"\0", BitstreamFault.BAD_PAYLOAD),
        (damaged_at(3, 0xFF), BitstreamFault.TRUNCATED),
        (damaged_at(STREAM, 2), BitstreamFault.BAD_PAYLOAD),
        (damaged_at(STREAM, 0), BitstreamFault.BAD_PAYLOAD),
        (damaged_at(STREAM + 2, 9), BitstreamFault.BAD_PAYLOAD),
        (damaged_at(STREAM + 3, 1), BitstreamFault.BAD_PAYLOAD),
        (damaged_at(STREAM + 7, 0xFF), BitstreamFault.BAD_PAYLOAD),
        (damaged_at(STREAM + 11, 0xFF), BitstreamFault.BAD_PAYLOAD),
        (damaged_at(STREAM + 15, 0x80), BitstreamFault.BAD_PAYLOAD),
        (bytes(12), BitstreamFault.BAD_PAYLOAD),
    ],
    ids=[
        "empty",
        "no lengths",
        "one byte short",
        "one byte too long",
        "length beyond the end",
        "unknown mode",
        "coded bytes as raw",
        "top_bits 9",
        "reserved byte",
        "words beyond the end",
        "escapes beyond the end",
        "state out of range",
        "empty streams",
    ],
)
def test_each_fault_has_its_code(codec: LosslessCodec, payload: bytes, code: BitstreamFault) -> None:
    with pytest.raises(DamagedObjectError) as caught:
        decode(codec, payload, BLOCK.shape)
    assert caught.value.code == code


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(PAYLOAD) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, len(PAYLOAD)),
)
@example([(STREAM + 12, 0)], len(PAYLOAD))
def test_damaged_payloads_decode_to_something_or_are_refused(changes: list[tuple[int, int]], end: int) -> None:
    payload = bytearray(PAYLOAD)
    for offset, octet in changes:
        payload[offset] = octet
    outcomes = [outcome(codec, bytes(payload[:end]), BLOCK.shape) for codec in CODECS]
    assert all(np.array_equal(outcomes[0], other) for other in outcomes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_payloads_with_sound_lengths_and_random_streams_do_no_harm(data: st.DataObject) -> None:
    values = data.draw(sections(most_tokens=40))
    payload = bytearray(LosslessCodec().encode(values))
    rng = np.random.Generator(np.random.PCG64(data.draw(st.integers(0, 2**32))))
    begin = 4 * values.shape[3] + data.draw(st.sampled_from([0, 12, 40, 140]))
    payload[begin:] = rng.integers(0, 256, len(payload[begin:]), dtype=np.uint8).tobytes()
    outcomes = [outcome(codec, bytes(payload), values.shape) for codec in CODECS]
    assert all(np.array_equal(outcomes[0], other) for other in outcomes)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_do_no_harm(payload: bytes) -> None:
    for codec in CODECS:
        outcome(codec, payload, (1, 2, 3, 2, 16))


def outcome(codec: LosslessCodec, payload: bytes, shape: tuple[int, ...]) -> Bits:
    """The decoded values, or the number of the fault."""
    try:
        return decode(codec, payload, shape)
    except DamagedObjectError as error:
        return np.array(error.code)


@pytest.mark.parametrize("draw", KINDS_OF_VALUES)
def test_threads_encode_and_decode_side_by_side(draw: object) -> None:
    values = draw(RNG, (2, 2, 256, 2, 64))  # type: ignore[operator]
    expected = LosslessCodec().encode(values)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            if LosslessCodec().encode(values) != expected:
                wrong.append("payload")
            if not np.array_equal(decode(LosslessCodec(), expected, values.shape), values):
                wrong.append("values")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
