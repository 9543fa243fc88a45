"""What the device is told about payloads: which bytes to copy, one job for each head, and what is refused before."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from codec.sections import draw_normal, draw_random

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.device.jobs import LosslessSection, plan_pieces, plan_section
from kvstore_s3.codec.device.pieces import Piece, find_target, place_in, resolve
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.errors import BitstreamFault, DamagedObjectError

RNG = np.random.Generator(np.random.PCG64(5))
TOKENS, HEADS, DIM = 9, 3, 8
LARGE = 1 << 20


def section_of(
    payload: memoryview, *, head_begin: int = 0, heads: int = HEADS, layer_begin: int = 0
) -> LosslessSection:
    return LosslessSection(payload, HEADS, head_begin, heads, TOKENS, 2, layer_begin)


def put_in_one_buffer(payloads: list[bytes], *, gap: int = 0) -> list[memoryview]:
    """Payloads as they lie in an object, each at a multiple of 16, and `gap` bytes more between them."""
    buffer = bytearray()
    places = []
    for payload in payloads:
        places.append((len(buffer), len(buffer) + len(payload)))
        buffer += payload + bytes(-len(payload) % 16 + gap)
    view = memoryview(buffer)
    return [view[begin:end] for begin, end in places]


def encode(values: Bits) -> bytes:
    return LosslessCodec().encode(values)


def draw_payloads(count: int) -> list[bytes]:
    """Coded and raw streams in turn."""
    shape = (2, 2, TOKENS, HEADS, DIM)
    return [encode(draw_random(RNG, shape) if number % 2 else draw_normal(RNG, shape)) for number in range(count)]


def bytes_of(piece: Piece) -> bytes:
    (run,) = piece.runs
    return ctypes.string_at(run.address, run.length)


def streams_of(payload: bytes) -> list[bytes]:
    lengths = np.frombuffer(payload, "<u4", HEADS)
    ends = 4 * HEADS + np.cumsum(lengths)
    return [payload[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def test_each_head_is_a_job_whose_bytes_are_its_stream() -> None:
    payloads = draw_payloads(4)
    views = put_in_one_buffer(payloads)
    sections = [section_of(view, layer_begin=2 * number) for number, view in enumerate(views)]
    (piece,) = plan_pieces(reversed(sections), LARGE)
    copied = bytes_of(piece)
    found = [copied[int(job["stream"]) - place_in(0) :][: int(job["length"])] for job in piece.jobs]
    assert found == [stream for payload in payloads for stream in streams_of(payload)]
    assert piece.jobs["layer_begin"].tolist() == [2 * (number // HEADS) for number in range(4 * HEADS)]
    assert piece.jobs["head"].tolist() == list(range(HEADS)) * 4
    assert set(piece.jobs["tokens"]) == {TOKENS}
    assert set(piece.jobs["layers"]) == {2}
    assert set(piece.jobs["kinds"]) == {2}


def test_only_the_wanted_heads_are_copied() -> None:
    payload = draw_payloads(1)[0]
    piece = plan_section(section_of(memoryview(payload), head_begin=1, heads=1))
    assert bytes_of(piece) == streams_of(payload)[1]
    assert piece.jobs["head"].tolist() == [0]


def test_sections_that_lie_apart_are_copied_apart() -> None:
    views = put_in_one_buffer(draw_payloads(2), gap=8192)
    assert len(plan_pieces([section_of(view) for view in views], LARGE)) == 2


def test_no_piece_is_larger_than_allowed() -> None:
    views = put_in_one_buffer(draw_payloads(6))
    most = len(views[0]) + len(views[1]) + 32
    pieces = plan_pieces([section_of(view) for view in views], most)
    assert 3 <= len(pieces) < 6
    assert max(piece.data_bytes for piece in pieces) <= most


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (bytes.fromhex("04000000 04000000 040000"), BitstreamFault.TRUNCATED),  # not even a table
        (bytes.fromhex("04000000 04000000 04000000") + bytes(11), BitstreamFault.TRUNCATED),
        (bytes.fromhex("04000000 04000000 04000000") + bytes(13), BitstreamFault.BAD_PAYLOAD),
        (bytes.fromhex("ffffffff ffffffff ffffffff") + bytes(12), BitstreamFault.TRUNCATED),  # no sum overflows
        (bytes.fromhex("05000000 03000000 04000000") + bytes(12), BitstreamFault.BAD_PAYLOAD),  # odd lengths
    ],
    ids=["short", "long table", "short table", "overflow", "odd"],
)
def test_a_table_of_lengths_that_does_not_fit_is_refused(payload: bytes, code: BitstreamFault) -> None:
    with pytest.raises(DamagedObjectError) as caught:
        plan_section(section_of(memoryview(payload)))
    assert caught.value.code == code


def test_a_target_names_each_layers_keys_and_values() -> None:
    values = np.zeros((3, 2, 10, 4, 8), np.uint16)[:, :, 2:5, 1:3]
    strides = [stride // 2 for stride in values.strides]
    target = find_target(values.ctypes.data, values.shape, strides, 2)
    assert target.planes.tolist() == [[values[layer, kind].ctypes.data for kind in range(2)] for layer in range(3)]
    assert (target.form.dim, target.form.token_stride, target.form.head_stride) == (8, 32, 8)


def test_addresses_in_runs_become_those_on_the_device_and_others_stay() -> None:
    addresses = np.array([[place_in(0), place_in(1, 7)], [4096, place_in(2, 1 << 40)], [0, place_in(0, 5)]], np.uint64)
    resolve(addresses[:, 1], [100, 200, 300])
    assert addresses.tolist() == [[place_in(0), 207], [4096, 300 + (1 << 40)], [0, 105]]
    resolve(addresses, [100, 200, 300])
    assert addresses[:, 0].tolist() == [100, 4096, 0]
