"""Codec 1 in plain Python, in the order of docs/format-lossless.md, which its tables are read from. Slow on purpose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parent.parent / "docs" / "format-lossless.md"
LANES = 32


class RefusedError(Exception):
    """The document says that this payload MUST be refused."""


class Shape(NamedTuple):
    layers: int
    kinds: int
    tokens: int
    heads: int
    dim: int


class Class(NamedTuple):
    table: int
    flip: int
    top: int


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def bit_string(data: bytes, widths: Iterator[int]) -> Iterator[int]:
    """The numbers of a bit string, each of the next width."""
    bits, at = number(data), 0
    for width in widths:
        yield bits >> at & ((1 << width) - 1)
        at += width


def read_tables() -> list[list[int]]:
    block = re.search(r"```tables\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert block is not None
    numbers = [int(word) for word in block[1].split()]
    return [numbers[at : at + 64] for at in range(0, len(numbers), 64)]


TABLES = read_tables()
SYMBOLS = [[symbol for symbol in range(64) for _ in range(table[symbol])] for table in TABLES]
FIRST = [[sum(table[:symbol]) for symbol in range(64)] for table in TABLES]


# Payload


def decode(
    payload: bytes, shape: Shape, head_begin: int = 0, head_end: int | None = None
) -> dict[tuple[int, ...], int]:
    """Bit patterns by (layer, kind, token, head, dim), of the heads from `head_begin` to `head_end`."""
    starts = [4 * shape.heads]
    if len(payload) < starts[0]:
        raise RefusedError("no room for the lengths")
    for head in range(shape.heads):
        starts.append(starts[-1] + number(payload[4 * head : 4 * head + 4]))
    if starts[-1] != len(payload):
        raise RefusedError("the lengths are not those of the payload")
    values = {}
    for head in range(head_begin, shape.heads if head_end is None else head_end):
        stream = payload[starts[head] : starts[head + 1]]
        for (layer, kind, token, dim), value in decode_stream(stream, shape):
            values[layer, kind, token, head, dim] = value
    return values


# Stream


def decode_stream(stream: bytes, shape: Shape) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    if len(stream) < 4 or stream[0] > 1:
        raise RefusedError("unknown mode")
    return decode_coded(stream, shape) if stream[0] == 1 else decode_raw(stream, shape)


def decode_raw(stream: bytes, shape: Shape) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    layers, kinds, tokens, _, dims = shape
    if any(stream[1:4]) or len(stream) != 4 + 2 * layers * kinds * tokens * dims:
        raise RefusedError("reserved bytes or length of a raw stream")
    at = 4
    for layer in range(layers):
        for kind in range(kinds):
            for token in range(tokens):
                for dim in range(dims):
                    yield (layer, kind, token, dim), number(stream[at : at + 2])
                    at += 2


class Coded(NamedTuple):
    """The fields of a coded stream."""

    states: list[int]
    words: list[int]
    rows: list[list[list[int]]]  # [block][token][lane]
    classes: list[Class]
    escapes: list[int]


def lanes_of(block: int, components: int) -> int:
    return min(LANES, components - LANES * block)


def read_fields(stream: bytes, components: int, tokens: int) -> Coded:
    if len(stream) < 12:
        raise RefusedError("no room for the fields")
    top_min, top_bits, reserved = stream[1], stream[2], stream[3]
    words, escapes = number(stream[4:8]), number(stream[8:12])
    if top_bits > 8 or reserved != 0:
        raise RefusedError("top_bits or reserved")
    lanes = [lanes_of(block, components) for block in range(-(-components // LANES))]
    row_bytes = [-(-6 * count // 8) for count in lanes]
    sizes = [
        4 * lanes[0],
        2 * words,
        tokens * sum(row_bytes),
        -(-components * (5 + top_bits) // 8),
        escapes,
    ]
    end = 12 + sum(sizes)
    if end + -end % 4 != len(stream):
        raise RefusedError("length of a coded stream")
    parts, at = [], 12
    for size in sizes:
        parts.append(stream[at : at + size])
        at += size
    return Coded(
        states=check_states([number(parts[0][at : at + 4]) for at in range(0, len(parts[0]), 4)]),
        words=[number(parts[1][at : at + 2]) for at in range(0, len(parts[1]), 2)],
        rows=list(read_rows(parts[2], lanes, row_bytes, tokens)),
        classes=list(read_classes(parts[3], components, top_min, top_bits)),
        escapes=list(parts[4]),
    )


def check_states(states: list[int]) -> list[int]:
    if not all(1 << 15 <= state < 1 << 31 for state in states):
        raise RefusedError("state out of range")
    return states


def read_rows(data: bytes, lanes: list[int], row_bytes: list[int], tokens: int) -> Iterator[list[list[int]]]:
    at = 0
    for count, size in zip(lanes, row_bytes, strict=True):
        block = []
        for _ in range(tokens):
            block.append(list(bit_string(data[at : at + size], iter([6] * count))))
            at += size
        yield block


def read_classes(data: bytes, components: int, top_min: int, top_bits: int) -> Iterator[Class]:
    fields = bit_string(data, iter([4, 1, top_bits] * components))
    for _ in range(components):
        table, flip, top = next(fields), next(fields), next(fields)
        yield Class(table, flip, (top_min + top) % 256)


# Decoding


def decode_coded(stream: bytes, shape: Shape) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    components = shape.layers * shape.kinds * shape.dim
    coded = read_fields(stream, components, shape.tokens)
    state, words, escapes = coded.states, iter(coded.words), iter(coded.escapes)
    for block, rows in enumerate(coded.rows):
        for token in range(shape.tokens):
            for lane in range(lanes_of(block, components)):
                component = LANES * block + lane
                state[lane], value = decode_value(state[lane], coded.classes[component], words, escapes)
                plane, dim = divmod(component, shape.dim)
                layer, kind = divmod(plane, shape.kinds)
                yield (layer, kind, token, dim), value + rows[token][lane]
    if next(words, None) is not None or next(escapes, None) is not None or any(x != 1 << 15 for x in state):
        raise RefusedError("words or escapes are left, or a state is not what the encoder started from")


def decode_value(x: int, of: Class, words: Iterator[int], escapes: Iterator[int]) -> tuple[int, int]:
    slot = x % 4096
    symbol = SYMBOLS[of.table][slot]
    x = TABLES[of.table][symbol] * (x // 4096) + slot - FIRST[of.table][symbol]
    if x < 1 << 15:
        x = (x << 16) + take(words)
    step = symbol % 32
    sign = symbol // 32 ^ of.flip
    half_octave = (2 * of.top + 1 - step) % 512
    if step >= 30:
        half_octave = 2 * take(escapes) + half_octave % 2
    return x, (sign << 15) + 64 * half_octave


def take(source: Iterator[int]) -> int:
    value = next(source, None)
    if value is None:
        raise RefusedError("ran out of words or escapes")
    return value
