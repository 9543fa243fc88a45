"""The decode kernels of codec 3 against the native decoder: numbers and spans without a matrix bit for bit, products
within a bound, the same verdict on damaged bytes."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from codec.calibrations import make_calibration
from device.emulated import Device
from device.scalable_batch import Batch, Decoded, Given, numbers_of
from golden_files import LOSSY, OBJECTS, load_calibrations, read_object, read_values
from golden_objects import identity_from_json

from kvstore_s3 import _native
from kvstore_s3.bitstream import parse_header
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.scalable_calls import FOR_HOST
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import SCALABLE, decode_scalable, encode_scalable
from kvstore_s3.codec.scalable_stream import StreamShape, parse_base, parse_refinement, split_streams
from kvstore_s3.codec.stream_map import StreamMap, calibrated_map, uncalibrated_map
from kvstore_s3.encode import view_bits
from kvstore_s3.errors import DamagedObjectError
from kvstore_s3.layout import KVLayout
from kvstore_s3.transfer.ranges import group_levels

LAYERS, HEADS, DIM, TOKENS = 2, 2, 16, 20
LAYOUT = KVLayout(LAYERS, HEADS, DIM, "bfloat16", rope={"rope_type": "default", "rope_theta": 10000})
ROTATION = Rotation.from_layout(LAYOUT)
PROFILES = frozenset({"lossless", "scalable"})
RNG = np.random.Generator(np.random.PCG64(7))


def values_of(seed: int = 0, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """KV of a chunk [2, 2, tokens, 2, 16]: correlated, of many scales, with a mean."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) * torch.logspace(-1.5, 0.5, DIM)
    kv = torch.randn(LAYERS, 2, tokens, HEADS, DIM, generator=rng) @ mixing.T + torch.linspace(-3, 3, DIM)
    return kv.to(dtype)


CALIBRATIONS = {span: make_calibration(LAYOUT, span, lambda seed: values_of(seed, 96)) for span in SPANS}
MODES: dict[str, Calibration | None] = {"uncalibrated": None, **CALIBRATIONS}
IN_TILES = 2.0**-10
"""Of the largest value: what values here are off by where y is rounded to float16, 2^-12 of each component."""

EXACT_MODES = ("uncalibrated", "channel")
"""Modes without a product: the same floating-point operations as the host's, in the same order."""


def encode(kv: torch.Tensor, calibration: Calibration | None, **options: Any) -> list[bytes]:
    options = {"layer_begin": 0, "first_position": 256, "rotation": ROTATION, **options}
    coded = encode_scalable(view_bits(kv), str(kv.dtype)[6:], calibration=calibration, **options)
    assert all(codec_id == SCALABLE for codec_id, _ in coded)
    return [payload for _, payload in coded]


@contextmanager
def multiplied_as_in_tiles(dim: int, levels: int) -> Iterator[None]:
    """Lets the host round y to float16 before it multiplies, where tensor cores would get it so."""
    exactly = StreamMap.synthesise

    def synthesise(self: StreamMap, y: np.ndarray, coded: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        unit = self.unit
        matrix = None if unit is None else unit.synthesis
        if unit is None or matrix is None or matrix.ndim != 2 or matrix.dtype != np.float16 or dim % 8 != 0:
            return exactly(self, y, coded)
        scale = np.float32((9, 3, 1)[levels - 1])
        shrink = np.exp2(-np.frexp(np.abs(unit.synthesis_scale).max())[1]).astype(np.float32)
        factor = unit.synthesis_scale * (shrink * scale)
        away = np.abs(y) / scale
        numbers = np.ceil(away - 2.0**-12)
        shifts = np.sort(self.tables.shift[levels - 1])  # the stream may have classes of its own: which is told by y
        nearest = np.abs(shifts - (numbers - away)[..., None]).argmin(-1)
        shift, numbers = shifts[nearest], np.sign(y) * numbers
        halves = (numbers * factor - np.sign(y) * (shift * factor)).astype(np.float16)
        return halves.astype(np.float32) @ matrix.astype(np.float32) / shrink, None

    with patch.object(StreamMap, "synthesise", synthesise):
        yield


def decode_on_host(payloads: Sequence[bytes], like: torch.Tensor, calibration: Calibration | None) -> Bits:
    """As the CPU decodes, but for y, which is rounded as the device rounds it."""
    out = torch.zeros_like(like)
    with multiplied_as_in_tiles(like.shape[-1], len(payloads)):
        decode_scalable(
            [(SCALABLE, memoryview(payload)) for payload in payloads],
            view_bits(out),
            str(like.dtype)[6:],
            layer_begin=0,
            head_begin=0,
            section_heads=HEADS,
            first_position=256,
            calibration=calibration,
        )
    return view_bits(out)


def whole(payloads: Sequence[bytes], **options: Any) -> Given:
    return Given(payloads, **{"layers": (0, LAYERS), "heads": HEADS, "tokens": TOKENS, **options})


def decode(device: Device, kv: torch.Tensor, calibration: Calibration | None, given: Given, **options: Any) -> Decoded:
    batch = Batch(device, DIM, str(kv.dtype)[6:], calibration)
    decoded = batch.decode([given], (LAYERS, given.tokens, HEADS, 0), **options)
    assert decoded.elsewhere_untouched
    return decoded


def to_floats(bits: Bits, dtype: str) -> np.ndarray:
    values = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits.view(dtype)
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def assert_close(found: Bits, expected: Bits, dtype: str = "bfloat16", off: float = 2.0**-20) -> None:
    """Sums of floats in another order: `off` by 2^-20 of the largest value before rounding, which moves a value to its
    neighbour where it lay that near to the middle between two; not finite: the same bits."""
    one, two = to_floats(found, dtype), to_floats(expected, dtype)
    finite = np.isfinite(two)
    assert np.array_equal(found[~finite], expected[~finite])
    one, two = one[finite], two[finite]
    digits = {"bfloat16": 8, "float16": 11, "float32": 24}[dtype]
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(two), 1e-30))) + 1 - digits)
    before_rounding = off * np.abs(two).max(initial=0)
    assert np.all(np.abs(one - two) <= unit + before_rounding)
    if dtype == "bfloat16" and off <= 2.0**-20:
        assert np.count_nonzero(one != two) <= max(2, 5e-3 * one.size)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_the_host(device: Device, mode: str, levels: int) -> None:
    kv = values_of(7)
    payloads = encode(kv, MODES[mode])[:levels]
    expected = decode_on_host(payloads, kv, MODES[mode])
    decoded = decode(device, kv, MODES[mode], whole(payloads, object_levels=3), paged=levels != 2)
    assert decoded.faults == [0]
    if mode in EXACT_MODES:
        assert np.array_equal(decoded.values, expected)
    assert_close(decoded.values, expected)


@pytest.mark.parametrize("mode", ["head", "group"])
def test_matrices_of_floats_decode_as_those_of_half_floats(device: Device, mode: str) -> None:
    calibration = CALIBRATIONS[mode]
    units = {
        place: dataclasses.replace(unit, synthesis=unit.synthesis.astype(np.float32))
        for place, unit in calibration.units.items()
        if unit.synthesis is not None
    }
    floats = dataclasses.replace(calibration, units=units)
    kv = values_of(14)
    payloads = encode(kv, floats)
    decoded = decode(device, kv, floats, whole(payloads))
    assert decoded.faults == [0]
    assert_close(decoded.values, decode_on_host(payloads, kv, floats))


SHAPES = [
    # No product; rows that cannot be written by four numbers.
    *(("uncalibrated", 6, 21, "bfloat16", True), ("channel", 12, 17, "float16", True)),
    # Products of floats: rows that are no multiple of 16 bytes.
    *(("group", 7, 33, "bfloat16", False), ("group", 130, 66, "float32", False), ("all", 5, 65, "bfloat16", False)),
    *(("head", 7, 17, "bfloat16", False), ("group", 6, 9, "bfloat16", True), ("group", 12, 9, "float16", True)),
    # Tensor cores: a part of a tile, several planes in one, more tokens or columns than one has.
    *(("group", 8, 21, "bfloat16", True), ("group", 24, 70, "float16", True), ("all", 56, 40, "bfloat16", True)),
    *(("group", 128, 150, "float32", True), ("group", 256, 12, "bfloat16", True), ("all", 160, 16, "float32", False)),
]
"""span, dim, tokens, dtype, and whether K is rotated."""


@pytest.mark.parametrize(("span", "dim", "tokens", "dtype", "rotated"), SHAPES)
def test_shapes_of_heads_and_tiles_decode(
    device: Device, span: str, dim: int, tokens: int, dtype: str, rotated: bool
) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000} if rotated else {"rope_type": "none"}
    layout = KVLayout(1, 1, dim, dtype, rope=rope)

    def sample(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        scales = torch.logspace(0.5, -1.5, dim)
        return (torch.randn(1, 2, max(tokens, 40), 1, dim, generator=rng) * scales).to(getattr(torch, dtype))

    calibration = None if span == "uncalibrated" else make_calibration(layout, span, sample)
    kv = sample(5)[:, :, :tokens].contiguous()
    options: dict[str, Any] = {"layer_begin": 0, "first_position": 256, "calibration": calibration}
    coded = encode_scalable(view_bits(kv), dtype, rotation=Rotation.from_layout(layout), **options)
    assert coded[0][0] == SCALABLE
    out = torch.zeros_like(kv)
    payloads = [(codec_id, memoryview(payload)) for codec_id, payload in coded]
    with multiplied_as_in_tiles(dim, len(payloads)):
        decode_scalable(payloads, view_bits(out), dtype, head_begin=0, section_heads=1, **options)
    batch = Batch(device, dim, dtype, calibration)
    decoded = batch.decode([Given([payload for _, payload in coded], (0, 1), 1, tokens)], (1, tokens, 1, 0))
    assert decoded.faults == [0]
    assert decoded.elsewhere_untouched
    if span in EXACT_MODES:
        assert np.array_equal(decoded.values, view_bits(out))
    assert_close(decoded.values, view_bits(out), dtype)


@pytest.mark.parametrize("bytes_of_a_block", [99 * 1024, 48 * 1024, 20 * 1024])
@pytest.mark.parametrize("mode", ["uncalibrated", "group"])
def test_devices_with_less_shared_memory_decode_the_same(device: Device, mode: str, bytes_of_a_block: int) -> None:
    if not device.library.emulated:
        pytest.skip("a GPU has the shared memory that it has")
    kv = values_of(23)
    payloads = encode(kv, MODES[mode])
    expected = decode(device, kv, MODES[mode], whole(payloads)).values
    if mode == "group":  # its products take 80 KB: on no device that there is are there fewer than 99
        bytes_of_a_block = max(bytes_of_a_block, 99 * 1024)
    device.library.call("kvs_emulator_limit_shared", ctypes.c_uint32(bytes_of_a_block))
    try:
        decoded = decode(device, kv, MODES[mode], whole(payloads))
    finally:
        device.library.call("kvs_emulator_limit_shared", ctypes.c_uint32(227 * 1024))
    assert decoded.faults == [0]
    assert np.array_equal(decoded.values, expected)


def components_on_host(payloads: Sequence[bytes], stream: int, calibration: Calibration | None) -> np.ndarray:
    """y [tokens, n'] of a section of the test's layout, in finest steps."""
    if calibration is None:
        one = uncalibrated_map(ROTATION, LAYERS, DIM, stream)
        at = 12 + 4 * len(ROTATION.inverse_frequencies) + LAYERS + -LAYERS % 4
    else:
        one, at = calibrated_map(calibration, 0, 0, stream), 12
    count = 1 if one.whole else HEADS
    levels = [
        split_streams(memoryview(payload), 0 if level else at, count)[stream] for level, payload in enumerate(payloads)
    ]
    shape = StreamShape(TOKENS, one.numbers, one.components, 2, 3, one.step_count)
    static = one.classes if one.calibrated else None
    parsed = parse_base(levels[0], shape, static, one.tables.first[2])
    assert isinstance(parsed, tuple)
    side, coded = parsed
    y = np.empty((TOKENS, one.components), np.float32)
    words = [memoryview(coded.words[0]), *map(parse_refinement, levels[1:])]
    classes = one.classes if side.classes is None else side.classes
    tables = one.tables.native
    assert _native.scalable_decode(tables, classes, coded.states, words, coded.escapes, y, object_levels=3) == 0
    shift = one.tables.shift[len(payloads) - 1][classes]
    return np.stack([y, np.broadcast_to(shift, y.shape)])


@pytest.mark.parametrize("span", ["group", "all"])
def test_rounding_y_to_half_floats_moves_values_by_a_small_part_of_what_quantisation_did(
    device: Device, span: str
) -> None:
    kv = values_of(31, 96)
    payloads = encode(kv, MODES[span])
    found = to_floats(decode(device, kv, MODES[span], whole(payloads, tokens=96)).values, "bfloat16")
    with patch(f"{__name__}.multiplied_as_in_tiles", lambda *_: nullcontext()):
        exact = to_floats(decode_on_host(payloads, kv, MODES[span]), "bfloat16")
    largest = np.abs(exact).max()
    assert 0 < np.abs(found - exact).max() <= IN_TILES * largest + np.spacing(np.float32(largest)) * 2**16
    lost = np.square(exact - to_floats(view_bits(kv), "bfloat16")).mean()
    assert np.square(found - exact).mean() < 0.05 * lost


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("mode", ["uncalibrated", "group", "all"])
def test_numbers_before_the_transform_are_those_of_the_host(device: Device, mode: str, levels: int) -> None:
    kv = values_of(8)
    payloads = encode(kv, MODES[mode])[:levels]
    decoded = decode(device, kv, MODES[mode], whole(payloads, object_levels=3))
    scale = np.float32((9, 3, 1)[levels - 1])
    for job in range(1 if mode == "all" else HEADS):
        y, shift = components_on_host(payloads, job, MODES[mode])
        seen = np.zeros(y.shape[1], bool)
        for component, numbers in numbers_of(decoded, job):
            signs = np.sign(numbers).astype(np.float32)
            assert np.array_equal((numbers - signs * shift[:, component]) * scale, y[:, component])
            seen[component] = True
        assert not y[:, ~seen].any()


@pytest.mark.parametrize("mode", MODES)
def test_chunks_of_one_call_and_ranges_of_their_heads_go_where_they_belong(device: Device, mode: str) -> None:
    chunks = [values_of(seed, tokens) for seed, tokens in ((1, TOKENS), (2, 5), (3, 9))]
    sections, expected, at = [], [], 0
    for number, kv in enumerate(chunks):
        payloads = encode(kv, MODES[mode])
        heads = (1, 2) if number == 1 else (0, HEADS)
        sections.append(whole(payloads, tokens=kv.shape[2], token_begin=at, head_begin=heads[0], head_end=heads[1]))
        found = decode_on_host(payloads, kv, MODES[mode])
        if number == 1:
            found[:, :, :, 0] = 0xA5A5
        expected.append(found)
        at += kv.shape[2]
    batch = Batch(device, DIM, "bfloat16", MODES[mode])
    decoded = batch.decode(sections, (LAYERS, at, HEADS, 0))
    assert decoded.faults == [0, 0, 0]
    assert decoded.elsewhere_untouched
    everything = np.concatenate(expected, axis=2)
    assert np.array_equal(decoded.values[:, :, TOKENS : TOKENS + 5, 0], everything[:, :, TOKENS : TOKENS + 5, 0])
    assert_close(decoded.values, everything)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mode", ["uncalibrated", "group"])
def test_other_dtypes_are_rounded_as_on_the_host(device: Device, mode: str, dtype: torch.dtype) -> None:
    kv = values_of(9, dtype=dtype)
    payloads = encode(kv, MODES[mode])
    expected = decode_on_host(payloads, kv, MODES[mode])
    decoded = decode(device, kv, MODES[mode], whole(payloads))
    if mode == "uncalibrated":
        assert np.array_equal(decoded.values, expected)
    assert_close(decoded.values, expected, str(dtype)[6:])


@pytest.mark.parametrize("mode", MODES)
def test_exact_tokens_keep_their_bits(device: Device, mode: str) -> None:
    kv = values_of(10)
    kv[0, 0, 0, 0, 0], kv[1, 1, 7, 1, 3], kv[0, 1, 19, 0, 5] = float("nan"), float("inf"), -3e38
    payloads = encode(kv, MODES[mode])
    decoded = decode(device, kv, MODES[mode], whole(payloads))
    assert decoded.faults == [0]
    expected = decode_on_host(payloads, kv, MODES[mode])
    for layer, kind, token, head in ((0, 0, 0, 0), (1, 1, 7, 1), (0, 1, 19, 0)):
        assert np.array_equal(decoded.values[layer, kind, token, head], view_bits(kv)[layer, kind, token, head])
    assert_close(decoded.values, expected)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "all"])
def test_raw_streams_keep_their_bits(device: Device, mode: str) -> None:
    kv = values_of(11)
    kv[:, :, :, 1] = float("nan")
    payloads = encode(kv, MODES[mode])[:2]
    decoded = decode(device, kv, MODES[mode], whole(payloads, object_levels=3))
    assert decoded.faults == [0]
    assert np.array_equal(decoded.values[:, :, :, 1], view_bits(kv)[:, :, :, 1])
    assert_close(decoded.values, decode_on_host(payloads, kv, MODES[mode]))


def golden_sections(name: str, levels: int) -> tuple[list[Given], Any, Calibration | None]:
    """The sections of codec 3 of a golden object, its identity and its calibration."""
    identity, calibrations = identity_from_json(OBJECTS["objects"][name]["identity"]), {}
    if OBJECTS["objects"][name]["calibrated"]:
        calibrations = load_calibrations(name)
    data = read_object(name)
    header = parse_header(data, identity, profiles=PROFILES, calibrations=set(calibrations))
    sections = []
    numbers = [number for number, section in enumerate(header.table.sections) if section.level < levels]
    for place in group_levels(header.table, numbers):
        parts = [header.table.sections[number] for number in place]
        if parts[0].codec != SCALABLE:
            continue
        payloads = [
            bytes(header.verify(number, memoryview(data)[part.offset : part.end]))
            for number, part in zip(place, parts, strict=True)
        ]
        sections.append(
            Given(
                payloads,
                (parts[0].layer_begin, parts[0].layer_end),
                identity.shard.heads,
                identity.tokens,
                first_head=identity.shard.head_begin,
                first_position=OBJECTS["objects"][name]["first_position"],
            )
        )
    return sections, identity, next(iter(calibrations.values()), None)


@pytest.mark.parametrize("name", LOSSY)
def test_golden_objects_decode_at_each_number_of_levels(device: Device, name: str) -> None:
    for levels, _ in enumerate(OBJECTS["objects"][name]["integers_blake3"], start=1):
        sections, identity, calibration = golden_sections(name, levels)
        layout, shard = identity.layout, identity.shard
        batch = Batch(device, layout.head_dim, layout.dtype, calibration)
        shape = (shard.layers, identity.tokens, shard.heads, shard.layer_begin)
        decoded = batch.decode(sections, shape)
        assert decoded.faults == [0] * len(sections)
        assert decoded.elsewhere_untouched
        width = "<u4" if layout.dtype == "float32" else "<u2"
        expected = np.frombuffer(read_values(name, levels), width).reshape(decoded.values.shape)
        for given in sections:
            layers = slice(given.layers[0] - shard.layer_begin, given.layers[1] - shard.layer_begin)
            off = IN_TILES if calibration is not None and calibration.span in ("group", "all") else 2.0**-20
            assert_close(decoded.values[layers], expected[layers], layout.dtype, off)


def mutate(data: bytes) -> bytes:
    """A few bytes changed, cut out or put in; mostly where the side information is."""
    changed = bytearray(data)
    for _ in range(RNG.integers(1, 3)):
        at = int(RNG.integers(0, len(changed) + 1 if RNG.random() < 0.5 else min(90, len(changed) + 1)))
        new = [bytes(RNG.integers(0, 256, 1, np.uint8)), b"\0", b"\xff\xff\xff\xff", b"\0\0\x80\x7f"][RNG.integers(4)]
        gone = len(new) if RNG.random() < 0.7 else int(RNG.integers(0, 8))
        changed[at : at + gone] = new
    return bytes(changed[: len(changed) if RNG.random() < 0.8 else int(RNG.integers(0, len(changed) + 1))])


@pytest.mark.parametrize("mode", MODES)
def test_damaged_payloads_get_the_verdict_of_the_host_and_harm_nothing_else(device: Device, mode: str) -> None:
    kv = values_of(11, 6)
    sound = encode(kv, MODES[mode])
    cases, verdicts, expected = [], [], []
    for number in range(40):
        payloads = list(sound[: 1 + number % 3])
        level = int(RNG.integers(0, len(payloads)))
        payloads[level] = mutate(payloads[level])
        # The object has as many levels as were read where its header says so: the last states are checked then.
        cases.append(whole(payloads, tokens=6, token_begin=6 * number, object_levels=None))
        try:
            expected.append(decode_on_host(payloads, kv, MODES[mode]))
            verdicts.append(0)
        except DamagedObjectError as error:
            expected.append(np.zeros_like(view_bits(kv)))
            verdicts.append(int(error.code))
    decoded = Batch(device, DIM, "bfloat16", MODES[mode]).decode(cases, (LAYERS, 6 * len(cases), HEADS, 0))
    assert decoded.elsewhere_untouched
    for number, (verdict, found) in enumerate(zip(verdicts, decoded.faults, strict=True)):
        if found == FOR_HOST:
            continue
        assert (number, found) == (number, verdict)
        part, host = decoded.values[:, :, 6 * number : 6 * number + 6], expected[number]
        tame = np.abs(to_floats(host, "bfloat16")) < 1e30
        if verdict == 0 and tame.all():
            assert_close(part, host)


def test_streams_that_a_gpu_cannot_address_are_left_to_the_host(device: Device) -> None:
    payloads = encode(values_of(12), None)
    for skew in (1, 2):
        decoded = decode(device, values_of(12), None, whole(payloads, skew=skew))
        assert decoded.faults == [FOR_HOST]
        assert decoded.jobs.totals.jobs == 0


def test_batches_that_were_parsed_apart_decode_in_one_call(device: Device) -> None:
    chunks = [values_of(seed) for seed in (21, 22)]
    batch = Batch(device, DIM, "bfloat16", None)
    given = [whole(encode(kv, None), token_begin=TOKENS * number) for number, kv in enumerate(chunks)]
    decoded = batch.decode(given, (LAYERS, 2 * TOKENS, HEADS, 0), apart=True)
    assert decoded.faults == [0, 0]
    expected = [decode_on_host(one.payloads, kv, None) for one, kv in zip(given, chunks, strict=True)]
    assert np.array_equal(decoded.values, np.concatenate(expected, axis=2))
