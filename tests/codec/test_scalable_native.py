from __future__ import annotations

import ctypes
import dataclasses
import mmap
import sys

import numpy as np
import pytest
from codec.streams import (
    IMPLEMENTATIONS,
    Classes,
    Encoded,
    Floats,
    decode,
    draw_values,
    encode,
    everywhere,
    expected_numbers,
    expected_values,
    slowly_encoded,
    streams,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3 import _native
from kvstore_s3.codec.tables import TableSet, classes_of, uncalibrated_tables

BAD_PAYLOAD = 13
TABLES = uncalibrated_tables()
RNG = np.random.Generator(np.random.PCG64(11))
CLASSES = RNG.integers(0, 48, 75).astype(np.uint8)
VALUES = draw_values(RNG, CLASSES, 40)
STREAM = encode(TABLES, CLASSES, VALUES, 3, "auto")


def decode_all(
    tables: TableSet, classes: Classes, stream: Encoded, tokens: int, *, read: int = 3, levels: int = 3
) -> list[tuple[int, bytes]]:
    """Fault and, where there is none, the bytes of y, from each implementation."""
    answers = []
    for implementation in IMPLEMENTATIONS:
        fault, y = decode(tables, classes, stream, tokens, read=read, levels=levels, implementation=implementation)
        answers.append((fault, b"" if fault else y.tobytes()))
    return answers


@settings(max_examples=150, deadline=None)
@given(streams(), st.integers(1, 3))
def test_every_implementation_writes_what_the_slow_encoder_writes(
    case: tuple[TableSet, Classes, Floats], levels: int
) -> None:
    tables, classes, y = case
    expected = slowly_encoded(tables, classes, y, levels)
    for implementation in IMPLEMENTATIONS:
        assert encode(tables, classes, y, levels, implementation) == expected


@settings(max_examples=200, deadline=None)
@given(streams(), st.integers(1, 3), st.data())
def test_every_implementation_decodes_every_number_of_levels_exactly(
    case: tuple[TableSet, Classes, Floats], levels: int, data: st.DataObject
) -> None:
    tables, classes, y = case
    read = data.draw(st.integers(1, levels))
    stream = encode(tables, classes, y, levels, "auto")
    expected = expected_values(tables, classes, y, read - 1)
    if read < 3:  # what a later level of the object codes is not known yet
        expected[:, classes < tables.first[read - 1]] = 0
    for fault, decoded in decode_all(tables, classes, stream, len(y), read=read, levels=levels):
        assert fault == 0
        np.testing.assert_array_equal(np.frombuffer(decoded, np.float32).reshape(y.shape), expected)


def test_long_streams_of_whole_and_partial_blocks_come_back() -> None:
    for count in (32, 64, 90, 256):
        classes = RNG.integers(0, 40, count).astype(np.uint8)
        y = draw_values(RNG, classes, 300)
        stream = encode(TABLES, classes, y, 3, "auto")
        for implementation in IMPLEMENTATIONS:
            assert encode(TABLES, classes, y, 3, implementation) == stream
        for read in (1, 2, 3):
            for fault, decoded in decode_all(TABLES, classes, stream, 300, read=read):
                assert fault == 0
                assert decoded == expected_values(TABLES, classes, y, read - 1).tobytes()


def test_the_finest_level_is_within_half_a_step() -> None:
    classes = np.full(64, 24, np.uint8)
    y = draw_values(RNG, classes, 256, tail=30)
    _, decoded = decode(
        TABLES, classes, encode(TABLES, classes, y, 3, "auto"), 256, read=3, levels=3, implementation="auto"
    )
    assert np.abs(decoded - y).max() <= 1  # half a step, and at most half a step of shift
    assert np.mean(np.square(decoded - y)) < 1 / 12


def test_ties_are_rounded_to_even() -> None:
    classes = np.full(6, 30, np.uint8)
    y = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
    assert expected_numbers(TABLES, classes, y)[2].tolist() == [[0, 2, 2, 0, -2, -2]]
    for implementation in IMPLEMENTATIONS:
        assert encode(TABLES, classes, y, 3, implementation) == slowly_encoded(TABLES, classes, y, 3)


def test_what_no_level_can_say_is_cut_to_the_nearest_number() -> None:
    classes = np.array([0, 1, 3, 4, 9, 10, 47, 47, 47], np.uint8)
    y = np.array([[9, 9, -9, 9, -9, 9, 1e30, -np.inf, np.nan]], np.float32)
    assert expected_numbers(TABLES, classes, y)[2].tolist() == [[0, 1, -1, 4, -4, 9, 32404, -32404, -32404]]
    expected = expected_values(TABLES, classes, y, 2).tobytes()
    for implementation in IMPLEMENTATIONS:
        stream = encode(TABLES, classes, y, 3, implementation)
        assert decode_all(TABLES, classes, stream, 1) == [(0, expected)] * len(IMPLEMENTATIONS)


def test_values_far_beyond_the_table_are_escaped() -> None:
    classes = np.full(33, 12, np.uint8)
    y = np.full((50, 33), 20_000, np.float32)
    stream = encode(TABLES, classes, y, 3, "auto")
    assert len(stream.escapes) == 2 * y.size
    expected = expected_values(TABLES, classes, y, 2).tobytes()
    assert decode_all(TABLES, classes, stream, 50) == [(0, expected)] * len(IMPLEMENTATIONS)


def test_where_nothing_is_coded_a_stream_is_empty_and_decodes_to_zeros() -> None:
    classes = np.zeros(5, np.uint8)
    stream = encode(TABLES, classes, np.ones((3, 5), np.float32), 3, "auto")
    assert stream == Encoded(b"", [b"", b"", b""], b"")
    assert decode_all(TABLES, classes, stream, 3) == [(0, bytes(60))] * len(IMPLEMENTATIONS)


def test_one_component_of_one_token_is_one_lane() -> None:
    classes = np.array([20], np.uint8)
    y = np.array([[5.2]], np.float32)
    stream = encode(TABLES, classes, y, 3, "auto")
    assert len(stream.states) == 4
    expected = expected_values(TABLES, classes, y, 2).tobytes()
    assert decode_all(TABLES, classes, stream, 1) == [(0, expected)] * len(IMPLEMENTATIONS)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_rate_is_within_two_percent_of_the_entropy_of_the_tables(levels: int) -> None:
    classes = np.sort(RNG.integers(10, 34, 256)).astype(np.uint8)
    y = draw_values(RNG, classes, 256, tail=8)
    numbers = expected_numbers(TABLES, classes, y)
    columns = np.broadcast_to(classes, y.shape)
    symbols = np.where(np.abs(numbers[0]) <= 127, numbers[0] + 127, 255)
    symbols = np.where(TABLES.base[columns, symbols] == 0, 255, symbols)
    bits = -np.log2(TABLES.base[columns, symbols] / 4096).sum() + 16 * (symbols == 255).sum()
    for level in range(1, levels):
        coarse = numbers[level - 1]
        u = (numbers[level] - 3 * coarse) * np.where(coarse < 0, -1, 1)
        pairs = TABLES.refine[level - 1][columns, np.minimum(np.abs(coarse), 3)].astype(np.int64)
        edges = np.concatenate([np.zeros_like(pairs[..., :1]), pairs, np.full_like(pairs[..., :1], 4096)], axis=-1)
        frequency = np.take_along_axis(np.diff(edges, axis=-1), u[..., None] + 1, axis=-1)
        bits += -np.log2(frequency / 4096).sum()
    stream = encode(TABLES, classes, y, levels, "auto")
    coded = 8 * (sum(map(len, stream.words)) + len(stream.escapes))
    assert bits - 32 * 16 <= coded <= 1.02 * bits


def damaged(stream: Encoded, data: st.DataObject) -> Encoded:
    """The stream with one part cut, stretched, or some of its bytes replaced."""
    parts = [stream.states, *stream.words, stream.escapes]
    number = data.draw(st.sampled_from([at for at, part in enumerate(parts) if part]))
    part = bytearray(parts[number])
    match data.draw(st.sampled_from(["cut", "stretch", "replace", "swap"])):
        case "cut":
            del part[data.draw(st.integers(0, len(part) - 1)) :]
        case "stretch":
            part += data.draw(st.binary(min_size=1, max_size=80))
        case "swap":
            part = bytearray(data.draw(st.sampled_from(parts)))
        case _:
            for at in data.draw(st.lists(st.integers(0, len(part) - 1), min_size=1, max_size=4)):
                part[at] = data.draw(st.integers(0, 255))
    parts[number] = bytes(part)
    return Encoded(parts[0], parts[1:-1], parts[-1])


@settings(max_examples=300, deadline=None)
@given(streams(), st.integers(1, 3), st.data())
def test_damage_is_refused_by_all_or_decoded_alike(
    case: tuple[TableSet, Classes, Floats], levels: int, data: st.DataObject
) -> None:
    tables, classes, y = case
    stream = encode(tables, classes, y, levels, "auto")
    if not stream.states:
        return
    read = data.draw(st.integers(1, levels))
    answers = decode_all(tables, classes, damaged(stream, data), len(y), read=read, levels=levels)
    assert everywhere(answers)
    assert answers[0][0] in (0, BAD_PAYLOAD)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_bytes_are_refused_by_all_or_decoded_alike(data: st.DataObject) -> None:
    rng = np.random.Generator(np.random.PCG64(data.draw(st.integers(0, 2**32))))
    states = rng.integers(2**15, 2**31, 32).astype("<u4").tobytes()
    words = [rng.bytes(2 * data.draw(st.integers(0, 4000))) for _ in range(3)]
    escapes = rng.integers(-3600, 3601, data.draw(st.integers(0, 50))).astype("<i2").tobytes()
    answers = decode_all(TABLES, CLASSES, Encoded(states, words, escapes), 40)
    assert everywhere(answers)
    assert answers[0][0] in (0, BAD_PAYLOAD)


def refused(stream: Encoded, *, read: int = 3) -> bool:
    answers = decode_all(TABLES, CLASSES, stream, 40, read=read)
    return answers == [(BAD_PAYLOAD, b"")] * len(IMPLEMENTATIONS)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_that_is_a_word_short_or_a_word_long_is_refused(level: int) -> None:
    words = list(STREAM.words)
    for changed in (words[level][:-2], words[level] + b"\0\0", words[level][:-1]):
        part = [*words[:level], changed, *words[level + 1 :]]
        assert refused(dataclasses.replace(STREAM, words=part), read=level + 1)


def test_an_escape_too_few_too_many_or_out_of_range_is_refused() -> None:
    assert len(STREAM.escapes) >= 4
    for escapes in (
        STREAM.escapes[:-2],
        STREAM.escapes[:-1],
        STREAM.escapes + b"\0\0",
        (3601).to_bytes(2, "little") + STREAM.escapes[2:],
        (-3601).to_bytes(2, "little", signed=True) + STREAM.escapes[2:],
    ):
        assert refused(dataclasses.replace(STREAM, escapes=escapes), read=1)


def test_states_out_of_their_range_or_of_the_wrong_number_are_refused() -> None:
    for first in (0, 2**15 - 1, 2**31, 2**32 - 1):
        assert refused(dataclasses.replace(STREAM, states=first.to_bytes(4, "little") + STREAM.states[4:]))
    assert refused(dataclasses.replace(STREAM, states=STREAM.states[:-4]))
    assert refused(dataclasses.replace(STREAM, states=STREAM.states + STREAM.states[:4]))


def test_a_wrong_last_state_is_refused_where_the_last_level_was_read() -> None:
    classes = np.array([10], np.uint8)
    y = np.zeros((1, 1), np.float32)
    stream = encode(TABLES, classes, y, 3, "auto")
    state = int.from_bytes(stream.states, "little")
    other = dataclasses.replace(stream, states=(state + 4096 * 8).to_bytes(4, "little"))
    zeros = np.zeros(1, np.float32).tobytes()
    assert decode_all(TABLES, classes, other, 1, read=1) == [(0, zeros)] * len(IMPLEMENTATIONS)
    assert decode_all(TABLES, classes, other, 1) == [(BAD_PAYLOAD, b"")] * len(IMPLEMENTATIONS)


def test_a_class_beyond_the_last_is_refused() -> None:
    classes = CLASSES.copy()
    classes[3] = 48
    for fault, _ in decode_all(TABLES, classes, STREAM, 40):
        assert fault == BAD_PAYLOAD
    with pytest.raises(ValueError, match="class"):
        encode(TABLES, classes, VALUES, 3, "auto")


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_behind_the_words_is_read() -> None:
    page = mmap.PAGESIZE
    classes = np.full(64, 16, np.uint8)
    y = draw_values(RNG, classes, 200)
    stream = encode(TABLES, classes, y, 3, "auto")
    size = max(map(len, stream.words))
    room = -(-size // page) * page
    with mmap.mmap(-1, room + page) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0) == 0
        at_the_edge = np.ctypeslib.as_array((ctypes.c_uint8 * room).from_address(start))
        for implementation in IMPLEMENTATIONS:
            for short in (0, 2, 40):
                whole = stream.words[0][: len(stream.words[0]) - short]
                edge = at_the_edge[room - len(whole) :]
                edge[:] = np.frombuffer(whole, np.uint8)
                out = np.empty_like(y)
                fault = _native.scalable_decode(
                    TABLES.native,
                    classes,
                    stream.states,
                    [edge],
                    stream.escapes,
                    out,
                    object_levels=3,
                    implementation=implementation,
                )
                assert fault == (BAD_PAYLOAD if short else 0)


def test_wrong_arguments_are_refused() -> None:
    native = TABLES.native
    classes, y = np.zeros(4, np.uint8), np.zeros((2, 4), np.float32)
    for levels in (0, 4):
        with pytest.raises(ValueError, match="levels"):
            _native.scalable_encode(native, classes, y, levels=levels)
    with pytest.raises(ValueError, match="one class"):
        _native.scalable_encode(native, classes[:3], y)
    with pytest.raises(ValueError, match="at least one"):
        _native.scalable_encode(native, classes[:0], y[:, :0].copy())
    with pytest.raises(TypeError):
        _native.scalable_encode(native, classes, y.astype(np.float64))
    with pytest.raises(TypeError):
        _native.scalable_encode(native, classes, np.asfortranarray(y))
    with pytest.raises(ValueError, match="implementation"):
        _native.scalable_encode(native, classes, y, implementation="mmx")
    for words, object_levels in (([], 3), ([b""] * 2, 1), ([b""], 4), ([b""], 0)):
        with pytest.raises(ValueError, match="levels"):
            _native.scalable_decode(native, classes, b"", words, b"", y, object_levels=object_levels)


def test_values_encoded_by_their_own_classes_are_near_the_ideal_distortion() -> None:
    """A whole chunk without a calibration: classes found, coded, and back."""
    deviation = 2.0 ** RNG.uniform(-3, 5, 128)
    y = (RNG.normal(size=(256, 128)) * deviation).astype(np.float32)
    classes = classes_of(y)
    stream = encode(TABLES, classes, y, 3, "auto")
    errors = []
    for read in (1, 2, 3):
        fault, decoded = decode(TABLES, classes, stream, 256, read=read, levels=3, implementation="auto")
        assert fault == 0
        errors.append(float(np.mean(np.square(decoded - y))))
    assert errors[0] < 81 / 12
    assert errors[1] < 9 / 12
    assert errors[2] < 1 / 12
