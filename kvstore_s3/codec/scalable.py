"""The scalable codec: a section as base, E1 and E2, each a payload of its own.

`docs/format-scalable.md` is the authority. That KV stands a coarse step was found by Y. Liu et al., "CacheGen" (SIGCOMM
2024); the transform and its metric are this project's (docs/calibration.md).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_s3 import _native
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.registry import codec_for, encode_section
from kvstore_s3.codec.rotation import STYLES, Rotation
from kvstore_s3.codec.scalable_stream import (
    MAX_EXACT,
    Coded,
    RawStream,
    StreamShape,
    StreamSide,
    build_raw_stream,
    build_stream,
    damaged,
    parse_base,
    parse_refinement,
    split_streams,
)
from kvstore_s3.codec.stream_map import StreamMap, calibrated_map, fit_uncalibrated, uncalibrated_map
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError
from kvstore_s3.layout import DTYPES
from kvstore_s3.quality import LOSSY_DTYPES

SCALABLE, NOTHING = 3, 4
"""Codec ids: coded at this level; nothing, because level 0 is exact."""
LEVELS = 3

_SECTION = struct.Struct("<BBBBIHH")
_MAX_POSITION = 2**32 - 1
_MAX_TOKENS = 2**16


def encode_scalable(
    values: Bits,
    dtype: str,
    *,
    layer_begin: int,
    first_position: int,
    calibration: Calibration | None,
    rotation: Rotation,
    first_head: int = 0,
    levels: int = LEVELS,
) -> list[tuple[int, bytes]]:
    """Code one section [layers, 2, tokens, heads, head_dim] of bit patterns into (codec id, payload) for each level.

    `first_position` is that of the chunk's first token, `first_head` the section's first head within the model. With a
    calibration, the section must be one of its layer groups, with all heads where its span is "all"; without one,
    `rotation` says how K was rotated. Kept exact are tokens with values that are not finite or within a factor of two
    of the dtype's largest, the very first token of a prompt (the attention sink) and outliers beyond the quantiser. A
    section that would come out no smaller than its exact coding is coded exactly. Raises `InvalidArgumentError` for
    dtypes that it does not code, more than 65,536 tokens and positions beyond 32 bits.
    """
    if dtype not in LOSSY_DTYPES:
        raise InvalidArgumentError(f"lossy profiles code {', '.join(LOSSY_DTYPES)}, not {dtype}; use lossless")
    if not 0 <= first_position <= _MAX_POSITION:
        raise InvalidArgumentError(f"first position {first_position} does not fit 32 bits")
    if values.shape[2] > _MAX_TOKENS:
        raise InvalidArgumentError(f"{values.shape[2]} tokens in a chunk; {_MAX_TOKENS} are the most")
    maps = _maps_of(values, layer_begin, first_head, calibration, rotation)
    streams = [_encode_stream(values, dtype, one, first_position, levels) for one in maps]
    payloads = [_base_header(first_position, calibration, maps[0], levels), *([b""] * (levels - 1))]
    coded = [
        head
        + struct.pack(f"<{len(streams)}I", *(len(stream[level]) for stream in streams))
        + b"".join(stream[level] for stream in streams)
        for level, head in enumerate(payloads)
    ]
    size = sum(map(len, coded))
    if size > values.nbytes // 2:  # rare: exact coding may be shorter, and is better where it is
        codec_id, exact = encode_section(values, dtype)
        if len(exact) <= size or size > values.nbytes:
            return [(codec_id, exact)] + [(NOTHING, b"\0")] * (levels - 1)
    return [(SCALABLE, payload) for payload in coded]


def decode_scalable(
    payloads: Sequence[tuple[int, memoryview]],
    out: Bits,
    dtype: str,
    *,
    layer_begin: int,
    head_begin: int,
    section_heads: int,
    first_position: int | None,
    calibration: Calibration | None,
    first_head: int = 0,
    object_levels: int | None = None,
) -> None:
    """Decode heads `head_begin` on of one section from its first one to three levels into `out`.

    `out` [layers, 2, tokens, heads, head_dim] may be strided over layers, K/V and tokens. `first_position` None
    believes the payload's own, as `object_levels` None does, the number of levels in the object's index. `calibration`
    is the one that the object's header names, None where it names none; `first_head` the section's first head within
    the model.
    Raises `DamagedObjectError`; `out` is then undefined.
    """
    base_codec, base = payloads[0]
    refinements = payloads[1:]
    above = SCALABLE if base_codec == SCALABLE else NOTHING
    if any(codec_id != above for codec_id, _ in refinements):
        found = f"levels of codecs {[codec_id for codec_id, _ in payloads]}"
        raise DamagedObjectError(BitstreamFault.UNSUPPORTED_FEATURE, found)
    if base_codec != SCALABLE:
        if any(bytes(payload[:2]) != b"\0" for _, payload in refinements):
            raise damaged("level 0 is exact, but a level above it is not one zero byte")
        codec_for(base_codec, dtype).decode(base, out, head_begin=head_begin, section_heads=section_heads)
        return
    if dtype not in LOSSY_DTYPES or out.shape[1] != 2:
        raise DamagedObjectError(BitstreamFault.UNSUPPORTED_FEATURE, f"codec 3 with {dtype}, or with K or V alone")
    header = _parse_section(base, (out.shape[0], out.shape[4]), first_position, object_levels, calibration)
    if len(payloads) > header.levels:
        raise damaged(f"{len(payloads)} levels of an object that says it has {header.levels}")
    count = 1 if header.span == "all" else section_heads
    streams = [split_streams(base, header.end, count), *(split_streams(p, 0, count) for _, p in refinements)]
    if (
        calibration is not None
        and find_group(calibration, layer_begin, out.shape[0], first_head, section_heads) is None
    ):
        found = f"layers {layer_begin} on, {out.shape[0]} of them, heads {first_head} on, {section_heads} of them"
        raise damaged(f"{found}: no layer group of the calibration")
    wanted = range(1) if header.span == "all" else range(head_begin, head_begin + out.shape[3])
    whole = _whole_target(out, header.span, head_begin, section_heads)
    for number, stream in enumerate(wanted):
        target = whole if header.span == "all" else whole[:, :, :, number : number + 1]
        parts = [level[stream] for level in streams]
        _decode_stream(parts, target, dtype, header, layer_begin, stream, first_head, calibration)
    if whole is not out:
        out[:] = whole[:, :, :, head_begin : head_begin + out.shape[3]]


@dataclass(frozen=True, slots=True)
class _SectionHeader:
    span: str
    levels: int
    first_position: int
    rotation: Rotation
    """Of the section's layers."""
    end: int


def _maps_of(
    values: Bits, layer_begin: int, first_head: int, calibration: Calibration | None, rotation: Rotation
) -> list[StreamMap]:
    layers, heads = values.shape[0], values.shape[3]
    if calibration is None:
        local = Rotation(
            rotation.style, rotation.inverse_frequencies, rotation.select(layer_begin, layer_begin + layers)
        )
        return [uncalibrated_map(local, layers, values.shape[4], head) for head in range(heads)]
    group = find_group(calibration, layer_begin, layers, first_head, heads)
    if group is None:
        whose = "all heads" if calibration.span == "all" else "heads of the model"
        raise InvalidArgumentError(
            f"layers {layer_begin}-{layer_begin + layers} with {heads} heads are no layer group of the calibration; "
            f"save groups of {calibration.layer_group} layers, {whose}"
        )
    count = 1 if calibration.span == "all" else heads
    return [calibrated_map(calibration, group, first_head, head) for head in range(count)]


def find_group(calibration: Calibration, layer_begin: int, layers: int, first_head: int, heads: int) -> int | None:
    """The layer group that a section is, None where it is none or its heads are not those of the calibration."""
    group = layer_begin // calibration.layer_group
    if group >= calibration.groups or calibration.group_layers(group) != (layer_begin, layer_begin + layers):
        return None
    if calibration.span == "all" and heads != calibration.kv_heads:
        return None
    return group if first_head + heads <= calibration.kv_heads else None


def _base_header(first_position: int, calibration: Calibration | None, first: StreamMap, levels: int) -> bytes:
    if calibration is not None:
        return _SECTION.pack(0, SPANS.index(calibration.span), levels, 0, first_position, 0, 0)
    frequencies = first.rotation.inverse_frequencies
    head = _SECTION.pack(1, 0, levels, first.rotation.style_id, first_position, len(frequencies), 0)
    if not len(frequencies):
        return head
    rotated = first.rotation.rotated.tobytes()
    return head + frequencies.astype("<f4").tobytes() + rotated + bytes(-len(rotated) % 4)


def _encode_stream(values: Bits, dtype: str, one: StreamMap, first_position: int, levels: int) -> list[bytes]:
    view = values if one.whole else values[:, :, :, one.head : one.head + 1]
    tokens = values.shape[2]
    x = np.empty((tokens, one.numbers), np.float32)
    cos, sin = one.rotation.tables(first_position, tokens)
    exact = _native.scalable_prepare(
        view, DTYPES[dtype].id, x, one.mean, cos, sin, one.rotation.style_id, one.rotation.rotated
    ).astype(bool)
    exact[0] |= first_position == 0
    fitted = one
    if not one.calibrated:
        fitted, exact = fit_uncalibrated(one, x, exact)
    x[exact] = 0
    y = fitted.analyse(x)
    exact |= ~(np.abs(y).max(axis=1) < fitted.largest)
    originals = _by_token(view)
    if exact.all() or np.count_nonzero(exact) > MAX_EXACT:
        return build_raw_stream(originals, levels)
    y[exact] = 0
    explicit = fitted.choose_classes(y, exact)
    classes = fitted.classes if explicit is None else explicit
    coded = Coded(*_native.scalable_encode(fitted.tables.native, classes, y, levels=levels))
    numbers = np.flatnonzero(exact).astype(np.uint16)
    side = StreamSide(explicit, fitted.steps, fitted.means, numbers, originals[exact])
    built = build_stream(side, coded)
    if sum(map(len, built)) >= originals.nbytes:
        return build_raw_stream(originals, levels)
    return built


def _parse_section(
    base: memoryview,
    shape: tuple[int, int],
    first_position: int | None,
    object_levels: int | None,
    calibration: Calibration | None,
) -> _SectionHeader:
    """`shape`: layers of the section, and head dim."""
    layers, dim = shape
    if len(base) < _SECTION.size:
        raise DamagedObjectError(BitstreamFault.TRUNCATED, f"payload has {len(base)} bytes, its header 12")
    mode, span, levels, style, position, pairs, reserved = _SECTION.unpack_from(base)
    if mode > 1 or span >= len(SPANS) or style >= len(STYLES) or reserved or not 1 <= levels <= LEVELS:
        raise damaged(f"mode {mode}, span {span}, {levels} levels or rotary {style} are unknown")
    if object_levels is not None and levels != object_levels:
        raise damaged(f"the payload is of an object of {levels} levels, its index has {object_levels}")
    if first_position is not None and position != first_position:
        raise damaged(f"the section is of position {position}, expected {first_position}")
    if (mode == 0) != (calibration is not None):
        raise damaged("the header and the payload disagree on whether a calibration was used")
    if calibration is not None:
        if style or pairs or SPANS[span] != calibration.span:
            raise damaged(f"span {SPANS[span]}, expected {calibration.span}")
        return _SectionHeader(SPANS[span], levels, position, Rotation.none(layers), _SECTION.size)
    if span or (style == 0) != (pairs == 0) or 2 * pairs > dim:
        raise damaged(f"an uncalibrated section has a span, or {pairs} rotary pairs in a head of {dim}")
    return _parse_rotation(base, layers, levels, style, position, pairs)


def _parse_rotation(
    base: memoryview, layers: int, levels: int, style: int, position: int, pairs: int
) -> _SectionHeader:
    at = _SECTION.size
    end = at + (4 * pairs + layers + -layers % 4 if pairs else 0)
    if len(base) < end:
        raise DamagedObjectError(BitstreamFault.TRUNCATED, f"payload has {len(base)} bytes, its header {end}")
    frequencies = np.frombuffer(base[at : at + 4 * pairs], "<f4").astype(np.float32)
    flags = np.frombuffer(base[at + 4 * pairs : end], np.uint8)
    if not np.isfinite(frequencies).all() or (flags > 1).any() or flags[layers:].any():
        raise damaged("the rotation of a section is not finite, or flags are neither 0 nor 1")
    rotated = flags[:layers].copy() if pairs else np.zeros(layers, np.uint8)
    return _SectionHeader("channel", levels, position, Rotation(STYLES[style], frequencies, rotated), end)


def _decode_stream(
    parts: list[memoryview],
    out: Bits,
    dtype: str,
    header: _SectionHeader,
    layer_begin: int,
    stream: int,
    first_head: int,
    calibration: Calibration | None,
) -> None:
    layers, _, tokens, heads, dim = out.shape
    if calibration is None:
        one = uncalibrated_map(header.rotation, layers, dim, stream)
    else:
        one = calibrated_map(calibration, layer_begin // calibration.layer_group, first_head, stream)
    shape = StreamShape(tokens, one.numbers, one.components, out.itemsize, header.levels, one.step_count)
    parsed = parse_base(parts[0], shape, one.classes if one.calibrated else None, one.tables.first[header.levels - 1])
    if isinstance(parsed, RawStream):
        if any(len(part) for part in parts[1:]):
            raise damaged("a raw stream has a refinement")
        out[:] = _from_tokens(parsed.values, out.shape)
        return
    side, coded = parsed
    words = [memoryview(coded.words[0]), *map(parse_refinement, parts[1:])]
    y = np.empty((tokens, one.components), np.float32)
    used = one if side.steps is None or side.means is None else one.with_steps(side.steps, side.means)
    classes = used.classes if side.classes is None else side.classes
    fault = _native.scalable_decode(
        one.tables.native, classes, coded.states, words, coded.escapes, y, object_levels=header.levels
    )
    if fault:
        raise damaged(f"the entropy-coded numbers of stream {stream} do not decode")
    x, scale = used.synthesise(y, None if side.classes is not None else len(parts))
    cos, sin = one.rotation.tables(header.first_position, tokens)
    _native.scalable_finish(
        x, scale, used.mean, cos, sin, one.rotation.style_id, one.rotation.rotated, DTYPES[dtype].id, out
    )
    if len(side.exact_tokens):
        shape5 = (layers, 2, len(side.exact_tokens), heads, dim)
        out[:, :, side.exact_tokens.astype(np.intp)] = _from_tokens(side.exact_values, shape5)


def _whole_target(out: Bits, span: str, head_begin: int, section_heads: int) -> Bits:
    """Where span "all" decodes to: all heads, though a reader may want some of them."""
    if span != "all" or (head_begin == 0 and out.shape[3] == section_heads):
        return out
    layers, kinds, tokens, _, dim = out.shape
    return np.empty((layers, kinds, tokens, section_heads, dim), out.dtype)


def _by_token(values: Bits) -> npt.NDArray[Any]:
    """[layers, 2, T, heads, dim] as [T, n], n in the order `[head][layer][kind][dim]`."""
    return np.ascontiguousarray(values.transpose(2, 3, 0, 1, 4)).reshape(values.shape[2], -1)


def _from_tokens(values: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The reverse of `_by_token`."""
    layers, kinds, tokens, heads, dim = shape
    return values.reshape(tokens, heads, layers, kinds, dim).transpose(2, 3, 0, 1, 4)
