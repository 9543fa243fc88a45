"""The GPU's lossless decoder, or its emulation, beside the native one: the same values and the same verdicts."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from codec.sections import CANARY, draw_normal, draw_random, sections
from codec.test_lossless_document import GOLDEN, golden_values, lossless_names
from device.emulated import Device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.device.library import LOSSLESS_JOB, Pages
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.errors import BitstreamFault, DamagedObjectError

RNG = np.random.Generator(np.random.PCG64(7))
BLOCK = draw_normal(RNG, (2, 2, 21, 1, 24))
BLOCK[0, 0, ::5, 0, ::7] = 0x7F80  # escapes
STREAM = LosslessCodec().encode(BLOCK)[4:]


@dataclass(frozen=True)
class Arrangement:
    """How pages lie: which axes come first in memory, and where in them the section goes."""

    axes: str = "lkbtnd"  # of layer, kind, block, token of the block, head (n), dim; the last is contiguous
    block_tokens: int = 0  # 0: no blocks
    token_begin: int = 0
    layer_begin: int = 0
    kind_begin: int = 0
    head: int = 0
    skew: int = 0
    """Of a stream's address from a multiple of 4."""
    front: bool = False
    """Whether what lies before a stream cannot be read; otherwise it is what lies behind."""


PLAIN = Arrangement()
ARRANGEMENTS = [
    PLAIN,
    Arrangement(token_begin=3, layer_begin=1, head=2, front=True),
    Arrangement(axes="lkbntd", skew=2),
    Arrangement(block_tokens=16),
    Arrangement(axes="blkntd", block_tokens=16, token_begin=21, layer_begin=1, head=1, skew=2, front=True),
    Arrangement(axes="lbktnd", block_tokens=5, token_begin=4, skew=2),
    Arrangement(block_tokens=1, token_begin=1),
]


class Pool:
    """Pages in a device's memory, full of canaries."""

    def __init__(self, device: Device, shape: Sequence[int], where: Arrangement) -> None:
        layers, _, tokens, heads, dim = shape
        self.where, self.shape = where, shape
        last = where.token_begin + tokens
        per_block = where.block_tokens or last
        blocks = -(-last // per_block)
        self.table = np.random.Generator(np.random.PCG64(3)).permutation(blocks + 2)[:blocks].astype(np.uint32)
        extents = {"l": where.layer_begin + layers + 1, "k": 2, "b": blocks + 2, "t": per_block}
        extents |= {"n": where.head + heads + 1, "d": dim}
        self._axes = [where.axes.index(axis) for axis in "lkbtnd"]
        self._memory = np.full([extents[axis] for axis in where.axes], 0x0101 * CANARY, np.uint16)
        self._buffer = device.put(self._memory)
        strides = {axis: stride // 2 for axis, stride in zip(where.axes, self._memory.strides, strict=True)}
        planes = np.arange(extents["l"])[:, None] * strides["l"] + np.arange(2) * strides["k"]
        if not where.block_tokens:
            self.table = np.zeros(1, np.uint32)
        self._planes = device.put((self._buffer.address + 2 * planes).astype(np.uint64))
        self._table = device.put(self.table, align=4)
        self.pages = Pages(
            self._planes.address,
            self._table.address if where.block_tokens else 0,
            where.block_tokens,
            dim,
            strides["b"],
            strides["t"],
            strides["n"],
        )

    def read(self, heads: Sequence[int]) -> Bits:
        """The section's values of `heads`. Asserts that nothing but places of the section was touched."""
        layers, kinds, tokens, _, _ = self.shape
        where = self.where
        at = np.frombuffer(self._buffer.read(), np.uint16).reshape(self._memory.shape).transpose(self._axes)
        layer = where.layer_begin + np.arange(layers)
        token = where.token_begin + np.arange(tokens)
        index = np.ix_(layer, where.kind_begin + np.arange(kinds), token, where.head + np.array(heads))
        per_block = where.block_tokens or at.shape[3]
        flat = (index[0], index[1], self.table[index[2] // per_block], index[2] % per_block, index[3])
        outside = np.ones(at.shape, bool)
        outside[flat] = False
        assert (at[outside] == 0x0101 * CANARY).all()
        return at[flat]


def decode(
    device: Device, streams: Sequence[bytes], shape: Sequence[int], where: Arrangement = PLAIN
) -> tuple[list[int], Bits]:
    """The faults and values [layer, kind, token, head, dim] of `streams`, one for each head."""
    layers, kinds, tokens, heads, _ = shape
    pool = Pool(device, shape, where)
    buffers = [device.put(stream, align=4, skew=where.skew, front=where.front) for stream in streams]
    jobs = np.zeros(heads, LOSSLESS_JOB)
    jobs["stream"] = [buffer.address for buffer in buffers]
    jobs["length"] = [len(stream) for stream in streams]
    jobs["tokens"] = tokens
    jobs["token_begin"] = where.token_begin
    jobs["layer_begin"] = where.layer_begin
    jobs["layers"] = layers
    jobs["kind_begin"] = where.kind_begin
    jobs["kinds"] = kinds
    jobs["head"] = where.head + np.arange(heads)
    faults = device.put(np.full(heads, 0xFFFFFFFF, np.uint32), align=4)
    at = device.put(jobs)
    device.library.lossless_decode(at.address, heads, pool.pages, faults.address, device.stream)
    found = np.frombuffer(faults.read(), np.uint32).tolist()
    return found, pool.read(range(heads))


def cut(payload: bytes, heads: int) -> list[bytes]:
    """The heads' streams."""
    lengths = np.frombuffer(payload[: 4 * heads], "<u4")
    ends = 4 * heads + np.cumsum(lengths)
    return [payload[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def assert_decodes(device: Device, payload: bytes, values: Bits, where: Arrangement = PLAIN) -> None:
    heads = values.shape[3]
    faults, found = decode(device, cut(payload, heads), values.shape, where)
    assert faults == [0] * heads
    np.testing.assert_array_equal(found, values)


def verdict(stream: bytes, shape: Sequence[int]) -> tuple[int, Bits]:
    """What the native decoder says of one head's stream."""
    out = np.zeros(shape, np.uint16)
    payload = len(stream).to_bytes(4, "little") + stream
    try:
        LosslessCodec().decode(memoryview(payload), out, head_begin=0, section_heads=1)
    except DamagedObjectError as error:
        return int(error.code), out
    return 0, out


def assert_same_verdicts(
    device: Device, streams: Sequence[bytes], shape: Sequence[int], where: Arrangement = PLAIN
) -> None:
    """`streams` are heads of one section; `shape` is that of one head."""
    section = (*shape[:3], len(streams), shape[4])
    faults, found = decode(device, streams, section, where)
    expected = [verdict(stream, shape) for stream in streams]
    assert faults == [fault for fault, _ in expected]
    for head, (fault, values) in enumerate(expected):
        if not fault:
            np.testing.assert_array_equal(found[:, :, :, head : head + 1], values)


def test_the_structures_are_laid_out_as_the_interface_says() -> None:
    assert LOSSLESS_JOB.itemsize == 32
    assert ctypes.sizeof(Pages) == 48


@pytest.mark.parametrize("name", lossless_names())
def test_every_golden_payload_decodes_to_its_values(device: Device, name: str) -> None:
    payload = (GOLDEN / f"{name}.payload").read_bytes()
    for where in ARRANGEMENTS[:5]:
        assert_decodes(device, payload, golden_values(name), where)


@pytest.mark.parametrize("where", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 37, 2, 8), (2, 2, 18, 1, 40), (1, 2, 35, 1, 32)], ids=str)
def test_values_come_to_their_places_in_pages_of_any_arrangement(
    device: Device, where: Arrangement, shape: tuple[int, ...]
) -> None:
    values = draw_normal(RNG, shape)
    assert_decodes(device, LosslessCodec().encode(values), values, where)


def test_values_alone_come_into_the_pages_of_values(device: Device) -> None:
    values = draw_normal(RNG, (2, 1, 19, 1, 32))
    assert_decodes(device, LosslessCodec().encode(values), values, Arrangement(kind_begin=1, block_tokens=4))


@pytest.mark.parametrize("lanes", [*range(1, 6), 31, 32, 33, 63, 65])
def test_heads_with_any_number_of_components_decode(device: Device, lanes: int) -> None:
    values = draw_normal(RNG, (1, 1, 13, 2, lanes))
    values[0, 0, ::9, :, lanes // 2] = 0x7F80
    assert_decodes(device, LosslessCodec().encode(values), values, replace(PLAIN, skew=lanes % 2 * 2))


def test_the_head_dims_of_real_models_decode(device: Device) -> None:
    for dim in (64, 80, 128):
        values = draw_normal(RNG, (1, 2, 16, 1, dim))
        assert_decodes(device, LosslessCodec().encode(values), values, Arrangement(block_tokens=16))


@pytest.mark.parametrize("top", [0, 3, 9, 12, 14, 15])
def test_values_near_zero_take_their_exponents_modulo_256(device: Device, top: int) -> None:
    shape = (1, 1, 80, 1, 64)
    values = RNG.integers(max(0, top - 3) << 7, (top + 1) << 7, shape).astype(np.uint16)
    values[0, 0, 7::40] = RNG.choice(np.array([0x7FC1, 0x7FFF, 0x4000], np.uint16), (2, 1, 64))
    values |= RNG.choice(np.array([0, 0x8000], np.uint16), shape)
    payload = LosslessCodec().encode(values)
    assert payload[4] == 1  # coded
    assert_decodes(device, payload, values)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(sections(most_tokens=40), st.sampled_from(ARRANGEMENTS))
def test_every_section_decodes_as_the_native_decoder_does(device: Device, values: Bits, where: Arrangement) -> None:
    if values.size > 6000:
        values = np.ascontiguousarray(values[:1, :, :, :1, :64])
    assert_decodes(device, LosslessCodec().encode(values), values, where)


def test_more_heads_than_warps_decode_side_by_side_and_each_has_its_own_verdict(device: Device) -> None:
    values = draw_normal(RNG, (1, 1, 6, 150, 8))
    values[:, :, :, ::7] = draw_random(RNG, (1, 1, 6, 22, 8))  # stored raw
    streams = cut(LosslessCodec().encode(values), 150)
    for head in range(0, 150, 10):
        streams[head] = streams[head][:-4]
    faults, found = decode(device, streams, values.shape)
    good = [head for head in range(150) if head % 10]
    assert faults == [0 if head % 10 else BitstreamFault.BAD_PAYLOAD for head in range(150)]
    np.testing.assert_array_equal(found[:, :, :, good], values[:, :, :, good])


def test_heads_decode_on_as_few_multiprocessors_as_are_allowed(device: Device) -> None:
    values = draw_normal(RNG, (1, 1, 5, 70, 8))
    device.library.call("kvs_limit_multiprocessors", ctypes.c_uint32(1))
    try:
        assert_decodes(device, LosslessCodec().encode(values), values)
    finally:
        device.library.call("kvs_limit_multiprocessors", ctypes.c_uint32(0))


def test_no_jobs_are_no_work(device: Device) -> None:
    device.library.lossless_decode(0, 0, Pages(), 0, device.stream)


def damaged_at(offset: int, octet: int) -> bytes:
    stream = bytearray(STREAM)
    stream[offset] = octet
    return bytes(stream)


HEADER_FAULTS = [
    b"\0\0",
    bytes(4),
    STREAM[:8],
    STREAM[:-2],
    STREAM[:-4],
    STREAM + bytes(4),
    damaged_at(0, 2),
    damaged_at(0, 0),
    damaged_at(2, 9),
    damaged_at(3, 1),
    damaged_at(7, 0xFF),
    damaged_at(11, 0xFF),
    damaged_at(15, 0x80),
    damaged_at(15, 0) if STREAM[14] == 0 else damaged_at(12, STREAM[12] ^ 1),
]


@pytest.mark.parametrize("where", [PLAIN, Arrangement(block_tokens=4, skew=2), Arrangement(front=True)], ids=str)
def test_each_fault_is_found(device: Device, where: Arrangement) -> None:
    shape = BLOCK.shape
    assert all(verdict(stream, shape)[0] for stream in HEADER_FAULTS)
    assert_same_verdicts(device, HEADER_FAULTS, shape, where)


def words_and_escapes(stream: bytes) -> tuple[int, int]:
    words, escapes = np.frombuffer(stream[4:12], "<u4").tolist()
    return words, escapes


def put_in(stream: bytes, words: bytes, escapes: bytes) -> bytes:
    """`stream`, of `BLOCK`, with more words and escapes behind those that it has."""
    counts = np.frombuffer(stream[4:12], "<u4")
    rows = 12 + 4 * 32 + 2 * int(counts[0])
    end = rows + 21 * 72 + 96 * (5 + stream[2]) // 8 + int(counts[1])
    more = (counts + np.array([len(words) // 2, len(escapes)])).astype("<u4").tobytes()
    changed = stream[:4] + more + stream[12:rows] + words + stream[rows:end] + escapes
    return changed + bytes(-len(changed) % 4)


def test_words_or_escapes_that_are_left_over_are_refused(device: Device) -> None:
    assert put_in(STREAM, b"", b"") == STREAM
    streams = [put_in(STREAM, bytes(2), b""), put_in(STREAM, bytes(4), b""), put_in(STREAM, b"", bytes(1))]
    assert [verdict(stream, BLOCK.shape)[0] for stream in streams] == [13, 13, 13]
    for skew in (0, 2):
        assert_same_verdicts(device, streams, BLOCK.shape, replace(PLAIN, skew=skew))


@pytest.mark.parametrize(("words", "escapes"), [(-2, 4), (-1, 2), (1, -2), (2, -4), (-1, 0), (0, -1)])
def test_a_stream_with_other_counts_and_the_same_length_is_refused(device: Device, words: int, escapes: int) -> None:
    counts = (np.frombuffer(STREAM[4:12], "<u4") + np.array([words, escapes])).astype("<u4").tobytes()
    changed = STREAM[:4] + counts + STREAM[12:]
    for skew in (0, 2):
        assert_same_verdicts(device, [changed], BLOCK.shape, replace(PLAIN, skew=skew))


def test_states_out_of_range_or_with_another_end_are_refused_where_all_else_fits(device: Device) -> None:
    # One value in table 13. Symbol 2 begins at slot 0, so that the state 0 is 0 again and the word 0x8000 ends it. A
    # large state with symbol 5 needs no word and ends where no encoder begins.
    low = bytes([1, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 13])
    high = bytes([1, 127, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x70, 0xF5, 0xFF, 0x7F, 0, 13, 0, 0])
    assert [verdict(stream, (1, 1, 1, 1, 1))[0] for stream in (low, high)] == [13, 13]
    assert_same_verdicts(device, [low, high], (1, 1, 1, 1, 1))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, len(STREAM) - 1), st.integers(0, 255)), min_size=1, max_size=4),
        min_size=4,
        max_size=4,
    ),
    st.sampled_from(ARRANGEMENTS),
)
def test_damaged_streams_get_the_native_decoders_verdict(
    device: Device, changes: list[list[tuple[int, int]]], where: Arrangement
) -> None:
    streams = []
    for change in changes:
        stream = bytearray(STREAM)
        for offset, octet in change:
            stream[offset] = octet
        streams.append(bytes(stream))
    assert_same_verdicts(device, streams, BLOCK.shape, where)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_sound_headers_with_random_bytes_behind_them_do_no_harm(device: Device, data: st.DataObject) -> None:
    rng = np.random.Generator(np.random.PCG64(data.draw(st.integers(0, 2**32))))
    streams = []
    for begin in (12, 40, 140, len(STREAM) // 2):
        states = (rng.integers(1 << 15, 1 << 31, 32).astype("<u4")).tobytes()
        random = STREAM[:12] + states + rng.integers(0, 256, len(STREAM), dtype=np.uint8).tobytes()
        streams.append(STREAM[:begin] + random[begin : len(STREAM)])
    assert_same_verdicts(device, streams, BLOCK.shape, data.draw(st.sampled_from(ARRANGEMENTS)))
