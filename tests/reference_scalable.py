"""Codecs 3 and 4 in plain Python, in the order of docs/format-scalable.md. Slow on purpose; imports nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from reference_calibration import ALL, CHANNEL, HEAD, Calibration, RefusedError, Tables, require, uncalibrated_tables

LANES = 32
LOWEST = 1 << 15
RAW = 65535
ITEM_BYTES = {1: 2, 2: 2, 3: 4}


class ShortError(RefusedError):
    """The same, where the fault is TRUNCATED."""


@dataclass(frozen=True)
class Section:
    """What a reader knows of a section before it reads it. `layer_begin` and `head_begin` are those within the model;
    `levels` those of the object; `first_position` None where the reader does not know it."""

    layers: int
    tokens: int
    heads: int
    dim: int
    dtype: int = 1
    levels: int = 3
    layer_begin: int = 0
    head_begin: int = 0
    first_position: int | None = None


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def numbers(data: bytes, width: int) -> list[int]:
    return [number(data[at : at + width]) for at in range(0, len(data), width)]


def read_floats(data: bytes) -> list[float]:
    values = np.frombuffer(data, "<f4").tolist()
    require(all(math.isfinite(value) for value in values), "a number that is not finite")
    return values


def aligned(size: int) -> int:
    return -(-size // 4) * 4


# Codec 3, level 0


@dataclass(frozen=True)
class Head:
    """The fields in front of the streams, with what they leave to the calibration filled in."""

    calibrated: bool
    span: int
    levels: int
    rotary: int
    first_position: int
    frequencies: list[float]
    rotated: list[int]
    tables: Tables


def read_level_0(payload: bytes, section: Section, calibration: Calibration | None) -> tuple[Head, list[bytes]]:
    if len(payload) < 12:
        raise ShortError("no room for the fields")
    mode, span, levels, rotary = payload[:4]
    first_position, pairs, reserved = number(payload[4:8]), number(payload[8:10]), number(payload[10:12])
    require(mode <= 1 and reserved == 0, "mode or reserved")
    require((mode == 0) == (calibration is not None), "mode and the header's calibration contradict each other")
    require(levels == section.levels, "levels are not those of the object")
    require(section.first_position in (None, first_position), "first position")
    require(span == (calibration.span if calibration else CHANNEL), "span")
    require(rotary <= (0 if calibration else 2), "rotary")
    require(1 <= pairs <= section.dim // 2 if rotary else pairs == 0, "rotary pairs")
    flags_end = 12 + 4 * pairs + (aligned(section.layers) if pairs else 0)
    if len(payload) < flags_end:
        raise ShortError("no room for the rotation")
    frequencies = read_floats(payload[12 : 12 + 4 * pairs])
    flags = list(payload[12 + 4 * pairs : flags_end])
    rotated, padding = flags[: section.layers], flags[section.layers :]
    require(all(flag <= 1 for flag in rotated) and not any(padding), "rotated layers")
    streams = split_streams(payload[flags_end:], 1 if span == ALL else section.heads)
    if calibration is None:
        tables = uncalibrated_tables()
        return Head(False, span, levels, rotary, first_position, frequencies, rotated, tables), streams
    check_place(section, calibration)
    rotated = calibration.rotated[section.layer_begin : section.layer_begin + section.layers]
    frequencies = calibration.frequencies.tolist()
    tables = calibration.tables
    return Head(True, span, levels, calibration.rotary, first_position, frequencies, rotated, tables), streams


def check_place(section: Section, calibration: Calibration) -> None:
    """A calibrated section is one group of layers, and all heads of the model where the span is all."""
    group, rest = divmod(section.layer_begin, calibration.layer_group)
    require(rest == 0 and section.layer_begin < calibration.layers, "not a group of layers")
    require(section.layers == calibration.layers_of(group), "not a group of layers")
    require(section.dim == calibration.dim, "head dim")
    require(section.head_begin + section.heads <= calibration.kv_heads, "heads")
    require(calibration.span != ALL or section.heads == calibration.kv_heads, "not all heads")


def split_streams(data: bytes, count: int) -> list[bytes]:
    """Lengths and streams; nothing else."""
    if len(data) < 4 * count:
        raise ShortError("no room for the lengths")
    lengths = numbers(data[: 4 * count], 4)
    if 4 * count + sum(lengths) > len(data):
        raise ShortError("streams beyond the payload")
    require(4 * count + sum(lengths) == len(data), "bytes behind the streams")
    ends = [4 * count + sum(lengths[: index + 1]) for index in range(count)]
    return [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]


class Stream(NamedTuple):
    """The fields of a stream of level 0. A raw one has all tokens in `exact`, and no classes."""

    classes: list[int]
    steps: list[float]
    means: list[int]
    states: list[int]
    words: list[int]
    escapes: list[int]
    exact: dict[int, list[int]]


class Reader:
    """Takes the fields of a stream one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        require(self.at + size <= len(self.data), "a stream that is too short")
        self.at += size
        return self.data[self.at - size : self.at]

    def pad(self) -> None:
        require(not any(self.take(-self.at % 4)), "padding that is not zero")

    def end(self) -> None:
        self.pad()
        require(self.at == len(self.data), "a stream that is too long")


def read_stream(data: bytes, section: Section, head: Head, n: int, classes: list[int]) -> Stream:
    """`n`: values of a token; `classes`: those of the calibration (none without: there, each value is a component)."""
    item, reader = ITEM_BYTES[section.dtype], Reader(data)
    words, escapes, exact = number(reader.take(4)), number(reader.take(4)), number(reader.take(2))
    flags, reserved = reader.take(2)
    require(reserved == 0, "reserved byte of a stream")
    if exact == RAW:
        require(words == escapes == flags == 0, "a raw stream with words, escapes or flags")
        values = {token: numbers(reader.take(n * item), item) for token in range(section.tokens)}
        reader.end()
        return Stream([], [], [], [], [], [], values)
    require(exact < section.tokens, "more exact tokens than a stream may have")
    require(flags <= 1 and (head.calibrated or flags == 1), "flags of a stream")
    steps, means = [], []
    if not head.calibrated:
        steps = read_floats(reader.take(4 * section.layers * 2))
        require(all(step > 0 for step in steps), "a step that is not above 0")
        means = [octet - 256 * (octet >> 7) for octet in reader.take(n)]
    if flags:
        classes = list(reader.take(len(classes) if head.calibrated else n))
        require(all(number < 48 for number in classes), "class")
    reader.pad()
    coded = sum(number >= head.tables.first[head.levels - 1] for number in classes)
    states = numbers(reader.take(4 * min(LANES, coded)), 4)
    require(all(LOWEST <= state < 1 << 31 for state in states), "state out of range")
    word_list = numbers(reader.take(2 * words), 2)
    escape_list = [value - 65536 * (value >> 15) for value in numbers(reader.take(2 * escapes), 2)]
    require(all(-3600 <= escape <= 3600 for escape in escape_list), "escape out of range")
    tokens = numbers(reader.take(2 * exact), 2)
    require(all(token < section.tokens for token in tokens), "number of an exact token")
    require(tokens == sorted(set(tokens)), "exact tokens do not ascend")
    values = {token: numbers(reader.take(n * item), item) for token in tokens}
    reader.end()
    return Stream(classes, steps, means, states, word_list, escape_list, values)


# Codec 3, levels 1 and 2


def read_words(data: bytes) -> list[int]:
    reader = Reader(data)
    words = numbers(reader.take(2 * number(reader.take(4))), 2)
    reader.end()
    return words


# Classes and coding order


def coding_order(classes: Sequence[int], first: int) -> list[int]:
    coded = [component for component in range(len(classes)) if classes[component] >= first]
    return sorted(coded, key=lambda component: (-classes[component], component))


# Decoding a stream


def take(source: Iterator[int]) -> int:
    value = next(source, None)
    require(value is not None, "ran out of words or escapes")
    assert value is not None
    return value


class Decoder:
    """The states and integers of one stream, level by level."""

    def __init__(self, stream: Stream, head: Head, tokens: int) -> None:
        self.stream, self.tables, self.levels, self.tokens = stream, head.tables, head.levels, tokens
        self.order = coding_order(stream.classes, head.tables.first[head.levels - 1])
        self.state = list(stream.states)
        self.q = [[0] * len(stream.classes) for _ in range(tokens)]

    def places(self, level: int) -> Iterator[tuple[int, int, int]]:
        """(token, lane, component) in the order of coding."""
        count = len(coding_order(self.stream.classes, self.tables.first[level]))
        for block in range(0, count, LANES):
            for token in range(self.tokens):
                for lane in range(min(LANES, count - block)):
                    yield token, lane, self.order[block + lane]

    def step(self, lane: int, start: int, frequency: int, words: Iterator[int]) -> None:
        state = self.state[lane]
        state = frequency * (state // 4096) + state % 4096 - start
        self.state[lane] = state if state >= LOWEST else (state << 16) + take(words)

    def decode_base(self) -> None:
        words, escapes = iter(self.stream.words), iter(self.stream.escapes)
        for token, lane, component in self.places(0):
            of = self.stream.classes[component]
            symbol = self.tables.symbols[of][self.state[lane] % 4096]
            self.step(lane, self.tables.starts[of][symbol], self.tables.base[of][symbol], words)
            self.q[token][component] = take(escapes) if symbol == 255 else symbol - 127
        require(next(words, None) is None and next(escapes, None) is None, "words or escapes are left")
        self.finish(0)

    def decode_refinement(self, level: int, data: list[int]) -> None:
        words = iter(data)
        for row in self.q:
            row[:] = [3 * p for p in row]
        for token, lane, component in self.places(level):
            p = self.q[token][component] // 3
            low, high = self.tables.refine[level - 1][self.stream.classes[component]][min(abs(p), 3)]
            slot = self.state[lane] % 4096
            u = -1 if slot < low else 0 if slot < high else 1
            start, end = {-1: (0, low), 0: (low, high), 1: (high, 4096)}[u]
            self.step(lane, start, end - start, words)
            self.q[token][component] += -u if p < 0 else u
        require(next(words, None) is None, "words are left")
        self.finish(level)

    def finish(self, level: int) -> None:
        last = level == self.levels - 1
        require(not last or all(state == LOWEST for state in self.state), "a last state that is not 2^15")


# Reconstruction


def reconstruct(q: list[list[int]], level: int, stream: Stream, tables: Tables) -> np.ndarray:
    """y, float64 [tokens, components]."""
    numbers_ = np.array(q, dtype=np.float64)
    shift = np.array([tables.shift[level][of] for of in stream.classes])
    return 9 / 3**level * (numbers_ - np.sign(numbers_) * shift)


def synthesize(y: np.ndarray, stream: Stream, section: Section, calibration: Calibration | None, u: int) -> np.ndarray:
    """x, float64 [tokens, n], K with its rotation undone. `u`: the stream's number within the model."""
    if calibration is None:
        steps = np.repeat(np.array(stream.steps), section.dim)
        return steps * (9 * np.array(stream.means, dtype=np.float64) + y)
    unit = calibration.units[section.layer_begin // calibration.layer_group, u]
    layers = slice(section.layer_begin, section.layer_begin + section.layers)
    heads = slice(None) if calibration.span == ALL else slice(u, u + 1)
    mean = calibration.mean[layers, :, heads].astype(np.float64).transpose(2, 0, 1, 3).reshape(-1)
    scaled = y * unit.scale.astype(np.float64)
    if unit.synthesis is None:
        return mean + scaled
    matrices = unit.synthesis.astype(np.float64)
    if calibration.span == HEAD:
        blocks = scaled.reshape(len(y), 2 * section.layers, section.dim)
        return mean + np.einsum("tbc,bcx->tbx", blocks, matrices).reshape(len(y), -1)
    return mean + np.einsum("ti,ix->tx", scaled, matrices)


# Rotation


def rotate(x: np.ndarray, head: Head, section: Section) -> np.ndarray:
    """`x` as [tokens, heads, layers, kinds, dim]; K of rotated layers is rotated."""
    pairs = len(head.frequencies)
    positions = head.first_position + np.arange(len(x), dtype=np.float64)
    angles = positions[:, None] * np.array(head.frequencies, dtype=np.float64)
    cos, sin = (part.astype(np.float32)[:, None].astype(np.float64) for part in (np.cos(angles), np.sin(angles)))
    for layer, rotated in enumerate(head.rotated):
        if rotated:
            keys = x[:, :, layer, 0]
            one, two = (
                (slice(0, pairs), slice(pairs, 2 * pairs))
                if head.rotary == 1
                else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
            )
            a, b = keys[..., one].copy(), keys[..., two].copy()
            keys[..., one], keys[..., two] = a * cos - b * sin, b * cos + a * sin
    return x


def round_to(x: np.ndarray, dtype: int) -> np.ndarray:
    """Bit patterns, to nearest, ties to even."""
    with np.errstate(over="ignore"):
        if dtype == 2:
            return x.astype(np.float16).view(np.uint16)
        bits = x.astype(np.float32).view(np.uint32)
    if dtype == 3:
        return bits
    # Infinity stays one; NaN cannot come up but from numbers that overflowed.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


# Sections


def decode_integers(
    payloads: Sequence[bytes], section: Section, calibration: Calibration | None
) -> tuple[Head, list[Stream], list[list[list[int]]]]:
    """Fields and streams of level 0, and q of the last level given, by stream, token and component."""
    require(1 <= len(payloads) <= section.levels, "levels")
    head, streams = read_level_0(payloads[0], section, calibration)
    refinements = [split_streams(payload, len(streams)) for payload in payloads[1:]]
    n = 2 * section.layers * section.dim * (section.heads if head.span == ALL else 1)
    fields, q = [], []
    for index, data in enumerate(streams):
        given: list[int] = []
        if calibration is not None:
            u = 0 if head.span == ALL else section.head_begin + index
            given = calibration.units[section.layer_begin // calibration.layer_group, u].classes
        stream = read_stream(data, section, head, n, given)
        decoder = Decoder(stream, head, section.tokens)
        if len(stream.exact) == section.tokens:
            require(not any(level[index] for level in refinements), "levels of a raw stream")
        else:
            decoder.decode_base()
            for level, refinement in enumerate(refinements, start=1):
                decoder.decode_refinement(level, read_words(refinement[index]))
        fields.append(stream)
        q.append(decoder.q)
    return head, fields, q


def decode(payloads: Sequence[bytes], section: Section, calibration: Calibration | None = None) -> np.ndarray:
    """Bit patterns [layers, 2, tokens, heads, dim] from the levels given, the base first."""
    head, streams, q = decode_integers(payloads, section, calibration)
    heads = section.heads if head.span == ALL else 1
    shape = (section.tokens, heads, section.layers, 2, section.dim)
    parts = []
    for index, (stream, integers) in enumerate(zip(streams, q, strict=True)):
        bits = np.zeros(shape, np.uint32)
        if stream.classes:
            y = reconstruct(integers, len(payloads) - 1, stream, head.tables)
            u = 0 if head.span == ALL else section.head_begin + index
            with np.errstate(over="ignore", invalid="ignore"):
                x = synthesize(y, stream, section, calibration, u).reshape(shape)
                bits = round_to(rotate(x, head, section), section.dtype).astype(np.uint32)
        for token, values in stream.exact.items():
            bits[token] = np.array(values, np.uint32).reshape(shape[1:])
        parts.append(bits)
    whole = np.concatenate(parts, axis=1)
    return whole.transpose(2, 3, 0, 1, 4)


# Codec 4


def check_nothing(payload: bytes) -> None:
    require(payload == b"\0", "codec 4 is one zero byte")
