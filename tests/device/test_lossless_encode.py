"""The encode kernels of codec 1 against the native encoder: the same bytes, from pages of every kind."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from codec.sections import KINDS_OF_VALUES, draw_normal, draw_outliers, draw_random, sections, to_bfloat16
from device.emulated import Device
from hypothesis import given, settings

from kvstore_s3 import _native
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.device.library import LOSSLESS_ENCODE_JOB, Pages

GOLDEN = Path(__file__).parent.parent / "golden" / "codec"
CANARY = 0xA5
RNG = np.random.Generator(np.random.PCG64(11))


@dataclass(frozen=True, slots=True)
class Section:
    """A rectangle of what lies in pages."""

    layers: slice
    kinds: slice
    tokens: slice
    heads: slice

    def of(self, values: Bits) -> Bits:
        return np.ascontiguousarray(values[self.layers, self.kinds, self.tokens, self.heads])


WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Paging:
    """How values [layers, kinds, tokens, heads, dim] are laid out: in blocks of tokens whose order is drawn, or not."""

    block_tokens: int = 0
    """0: no block table."""
    head_major: bool = False
    """[head][token] within a block, as FlashInfer's HND pages have it."""
    spare_heads: int = 0
    align: int = 16


def lay_out(values: Bits, paging: Paging) -> tuple[Bits, list[list[int]], Bits, Pages]:
    """Memory, the elements at which each plane begins, the block table, and pages that lack addresses."""
    layers, kinds, tokens, heads, dim = values.shape
    block_tokens = paging.block_tokens or tokens
    blocks = -(-tokens // block_tokens)
    table = RNG.permutation(blocks + 2)[:blocks].astype(np.uint32) if paging.block_tokens else np.zeros(1, np.uint32)
    shape = (layers, kinds, blocks + 2, block_tokens, heads + paging.spare_heads, dim)
    memory = np.full(shape, 0x4242, np.uint16)
    for token in range(tokens):
        block = table[token // block_tokens]
        memory[:, :, block, token % block_tokens, :heads] = values[:, :, token]
    if paging.head_major:
        memory = np.ascontiguousarray(memory.swapaxes(3, 4)).swapaxes(3, 4)
    strides = [stride // 2 for stride in memory.strides]
    begins = [[layer * strides[0] + kind * strides[1] for kind in range(kinds)] for layer in range(layers)]
    pages = Pages(0, 0, block_tokens if paging.block_tokens else 0, dim, strides[2], strides[3], strides[4])
    flat = np.lib.stride_tricks.as_strided(memory, (memory.size,), (2,))
    return flat, begins, table, pages


def scratch_bytes(device: Device, components: int, tokens: int) -> int:
    call = ctypes.CDLL(str(device.library.path)).kvs_lossless_encode_scratch
    call.restype = ctypes.c_uint64
    return int(call(ctypes.c_uint64(components), ctypes.c_uint64(tokens)))


def encode(
    device: Device, values: Bits, wanted: Iterable[Section], paging: Paging = Paging(), *, payload_align: int = 16
) -> list[bytes]:
    """The payloads of all sections, by one call; what lies behind each is untouched."""
    memory, begins, table, pages = lay_out(values, paging)
    held = [device.put(memory, align=paging.align), device.put(table)]
    both = len(begins[0]) == 2
    planes = np.array(
        [[held[0].address + 2 * begin for begin in layer] + ([] if both else [0]) for layer in begins], np.uint64
    )
    held.append(device.put(planes))
    pages.planes = held[2].address
    pages.block_table = held[1].address if paging.block_tokens else 0

    jobs, payloads = [], []
    for section in wanted:
        layers, kinds, tokens, heads, dim = section.of(values).shape
        room = heads * (8 + 2 * layers * kinds * dim * tokens)
        payloads.append(device.put(bytes([CANARY]) * room, align=payload_align))
        for index in range(heads):
            held.append(device.put(bytes([CANARY]) * scratch_bytes(device, layers * kinds * dim, tokens)))
            begin = (section.tokens.start or 0, section.layers.start or 0, (section.heads.start or 0) + index)
            first_kind = section.kinds.start or 0
            addresses = (payloads[-1].address, held[-1].address)
            jobs.append((*addresses, tokens, *begin, heads, index, layers, first_kind, kinds, 0))
    queue = device.put(np.array(jobs, LOSSLESS_ENCODE_JOB))
    lengths = device.put(np.zeros(len(jobs), np.uint32))
    device.library.call(
        "kvs_lossless_encode",
        ctypes.c_void_p(queue.address),
        ctypes.c_uint32(len(jobs)),
        ctypes.byref(pages),
        ctypes.c_void_p(lengths.address),
        ctypes.c_void_p(device.stream),
    )
    streams = np.frombuffer(lengths.read(), np.uint32).astype(np.int64)
    found, job = [], 0
    for payload in payloads:
        heads = jobs[job][6]
        length = 4 * heads + int(streams[job : job + heads].sum())
        whole = payload.read()
        assert set(whole[length:]) <= {CANARY}
        found.append(whole[:length])
        job += heads
    return found


def encode_all(device: Device, values: Bits, paging: Paging = Paging()) -> bytes:
    return encode(device, values, [Section(WHOLE, WHOLE, WHOLE, WHOLE)], paging)[0]


@pytest.mark.parametrize(
    "name", [name for name, what in json.loads((GOLDEN / "index.json").read_text()).items() if what["codec"] == 1]
)
def test_golden_values_give_the_golden_payload(device: Device, name: str) -> None:
    shape = json.loads((GOLDEN / "index.json").read_text())[name]["shape"]
    values = np.fromfile(GOLDEN / f"{name}.values", np.uint16).reshape(shape)
    assert encode_all(device, values) == (GOLDEN / f"{name}.payload").read_bytes()


@settings(max_examples=12, deadline=None)
@given(sections(most_tokens=100))
def test_every_section_gives_the_bytes_of_the_native_encoder(device: Device, values: Bits) -> None:
    assert encode_all(device, values) == _native.lossless_encode(values)


@pytest.mark.parametrize("draw", KINDS_OF_VALUES, ids=lambda draw: draw.__name__)
def test_all_kinds_of_values_give_the_bytes_of_the_native_encoder(device: Device, draw: object) -> None:
    values = draw(RNG, (2, 2, 45, 2, 24))  # type: ignore[operator]
    assert encode_all(device, values) == _native.lossless_encode(values)


@pytest.mark.parametrize("lanes", [1, 2, 5, 7, 8, 11, 31, 33, 40])
def test_a_last_block_of_any_number_of_lanes_is_coded(device: Device, lanes: int) -> None:
    values = draw_normal(RNG, (1, 1, 21, 2, lanes))
    values[0, 0, ::9, :, lanes // 2] = 0x7F80  # an escape
    assert encode_all(device, values) == _native.lossless_encode(values)


@pytest.mark.parametrize(
    "paging",
    [
        Paging(16),
        Paging(16, head_major=True),
        Paging(5, spare_heads=2),
        Paging(16, align=2),
        Paging(16, align=8),
        Paging(align=2),
        Paging(head_major=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [13, 16, 80])
def test_pages_of_every_layout_give_the_same_bytes(device: Device, paging: Paging, dim: int) -> None:
    values = draw_normal(RNG, (1, 2, 38, 2, dim))
    assert encode_all(device, values, paging) == _native.lossless_encode(values)


@pytest.mark.parametrize("payload_align", [2, 4, 16])
def test_sections_of_many_shapes_are_coded_by_one_call(device: Device, payload_align: int) -> None:
    values = draw_normal(RNG, (4, 2, 50, 5, 24))
    values[:, :, 20:, 4] = draw_random(RNG, (4, 2, 30, 1, 24))[:, :, :, 0]  # raw streams among coded ones
    wanted = [
        Section(slice(0, 1), WHOLE, slice(0, 16), slice(0, 5)),
        Section(slice(1, 4), WHOLE, slice(16, 50), slice(1, 3)),
        Section(slice(2, 3), slice(1, 2), slice(3, 20), slice(4, 5)),
        Section(slice(2, 4), slice(0, 1), slice(49, 50), slice(2, 5)),
        Section(slice(0, 4), WHOLE, slice(20, 29), slice(3, 5)),
    ]
    found = encode(device, values, wanted, Paging(16), payload_align=payload_align)
    assert found == [_native.lossless_encode(section.of(values)) for section in wanted]


def test_keys_alone_touch_no_plane_of_values(device: Device) -> None:
    values = draw_normal(RNG, (2, 1, 33, 2, 32))  # the other planes' addresses are 0
    assert encode_all(device, values, Paging(8)) == _native.lossless_encode(values)


def test_components_that_span_more_than_the_counted_window_get_the_same_classes(device: Device) -> None:
    values = draw_normal(RNG, (1, 2, 70, 1, 64))
    rows = values[0, 0, :, 0]
    rows[::7, :8] = 0  # exact zeros
    rows[3, 8:16] = to_bfloat16(np.float32(3e38) * np.ones(8))  # one outlier
    rows[:, 16:24] = RNG.integers(0, 2**15, (70, 8))  # all exponents
    rows[:, 24:32] = to_bfloat16(RNG.normal(size=(70, 8)) * 1e-38)  # denormals and zeros
    rows[::2, 32:40] = 0x7F7F  # half huge, half tiny
    rows[1::2, 32:40] = 0x0080
    spread = np.linspace(-27, 27, 33)
    values[0, 1, :, 0, :33] = to_bfloat16(
        RNG.normal(size=(70, 33)) * 2.0 ** np.where(RNG.random((70, 33)) < 0.02, spread, 0)
    )
    assert encode_all(device, values) == _native.lossless_encode(values)


def test_outliers_far_above_the_rest_get_the_same_classes(device: Device) -> None:
    for power in range(0, 64, 3):
        values = draw_normal(RNG, (1, 1, 34, 1, 32))
        values[0, 0, 5] = to_bfloat16(2.0**power * RNG.normal(size=(1, 32)))
        assert encode_all(device, values) == _native.lossless_encode(values)


def test_negative_components_are_flipped_as_the_native_encoder_does(device: Device) -> None:
    values = draw_outliers(RNG, (1, 2, 40, 1, 32))
    for negative in range(32):
        values[0, 0, :, 0, negative] &= 0x7FFF
        values[0, 0, : negative + 8, 0, negative] |= 0x8000  # about half of 40
    assert encode_all(device, values) == _native.lossless_encode(values)


def test_only_the_tokens_that_a_16_bit_count_holds_choose_the_class(device: Device) -> None:
    values = np.full((1, 1, 32_768, 1, 1), 0x3F80, np.uint16)
    values[0, 0, :16_384] |= 0x8000  # more than half of 32,767, but not of all
    assert encode_all(device, values) == _native.lossless_encode(values)


def test_a_stream_that_would_be_as_long_as_raw_is_raw(device: Device) -> None:
    for tokens in range(4, 20):  # raw at first, coded in the end
        values = np.full((1, 1, tokens, 1, 2), 0x3F80, np.uint16)
        assert encode_all(device, values) == _native.lossless_encode(values)


def test_streams_longer_than_raw_stay_within_their_scratch(device: Device) -> None:
    values = draw_random(RNG, (1, 2, 200, 1, 64))
    payload = encode_all(device, values)
    assert payload == _native.lossless_encode(values)
    assert len(payload) == 8 + values.nbytes


def test_a_head_needs_its_raw_bytes_and_little_more_as_scratch(device: Device) -> None:
    for components, tokens in [(1, 1), (1024, 256), (2048, 256), (40, 1000)]:
        assert 0 < scratch_bytes(device, components, tokens) - 2 * components * tokens <= 2 * components + 208


def test_no_jobs_are_no_work(device: Device) -> None:
    device.library.call("kvs_lossless_encode", None, ctypes.c_uint32(0), ctypes.byref(Pages()), None, None)
