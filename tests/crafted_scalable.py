"""Codec 3 written field by field, right or wrong, from integers: what someone who knows the format can write.

A slow encoder in plain Python, from docs/format-scalable.md alone, and apart from `kvstore_s3`. Equal integers give
equal bytes on every machine, so golden files are made with it; floating point has no part in it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3
from reference_calibration import DTYPES, STYLES, Calibration, Tables
from reference_scalable import LANES, LOWEST, RAW, coding_order

Integers = Sequence[Sequence[int]]
"""q2 by token and component."""


def nearest_third(q: int) -> int:
    """Integers have no ties in thirds."""
    return (q + 1) // 3


def chain(q2: int, number: int, first: Sequence[int]) -> tuple[int, int, int]:
    """q0, q1 and q2 of a component of class `number`, clamped where a level does not code it."""
    if number < first[2]:
        return 0, 0, 0
    if number < first[1]:
        return 0, 0, max(-1, min(1, q2))
    if number < first[0]:
        q2 = max(-4, min(4, q2))
        q1 = max(-1, min(1, nearest_third(q2)))
        return 0, q1, q2
    q1 = nearest_third(q2)
    return nearest_third(q1), q1, q2


@dataclass(frozen=True)
class Coded:
    """What the entropy coder leaves of a stream: first states, words of each level, escapes."""

    states: list[int]
    words: list[list[int]]
    escapes: list[int]


@dataclass
class Lanes:
    """States of an encoder, which goes backwards."""

    states: list[int]
    words: list[int] = field(default_factory=list)

    def put(self, lane: int, start: int, frequency: int) -> None:
        x = self.states[lane]
        if x >= frequency << 19:
            self.words.append(x % 65536)
            x >>= 16
        self.states[lane] = 4096 * (x // frequency) + x % frequency + start


def encode_integers(
    q2: Integers, classes: Sequence[int], tables: Tables, levels: int = 3, last_state: int = LOWEST
) -> Coded:
    """Code all tokens of one stream. `last_state` is what a decoder ends with."""
    order = coding_order(classes, tables.first[levels - 1])
    values = [[chain(row[component], classes[component], tables.first) for component in order] for row in q2]
    lanes = Lanes([last_state] * min(LANES, len(order)))
    words: list[list[int]] = []
    escapes: list[int] = []
    for level in reversed(range(levels)):
        lanes.words = []
        count = len(coding_order(classes, tables.first[level]))
        for at, token, lane in reversed(list(places(count, len(q2)))):
            q, of = values[token][at], classes[order[at]]
            if level == 0:
                symbol = q[0] + 127 if -127 <= q[0] <= 127 else 255
                if symbol == 255 or tables.base[of][symbol] == 0:
                    symbol = 255
                    escapes.insert(0, q[0])
                lanes.put(lane, tables.starts[of][symbol], tables.base[of][symbol])
            else:
                p = q[level - 1]
                u = (q[level] - 3 * p) * (-1 if p < 0 else 1)
                low, high = tables.refine[level - 1][of][min(abs(p), 3)]
                start, end = {-1: (0, low), 0: (low, high), 1: (high, 4096)}[u]
                lanes.put(lane, start, end - start)
        words.insert(0, lanes.words[::-1])
    return Coded(lanes.states, words, escapes)


def places(count: int, tokens: int) -> list[tuple[int, int, int]]:
    """(number in coding order, token, lane), in the order of the decoder."""
    return [
        (block + lane, token, lane)
        for block in range(0, count, LANES)
        for token in range(tokens)
        for lane in range(min(LANES, count - block))
    ]


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


@dataclass(frozen=True)
class CraftedStream:
    """One stream of all levels. `fields` replaces any of those that are written, before they are put together."""

    coded: Coded
    classes: Sequence[int] | None = None
    steps: Sequence[float] = ()
    means: Sequence[int] = ()
    exact: Mapping[int, Sequence[int]] = field(default_factory=dict)
    item: int = 2
    fields: Mapping[str, object] = field(default_factory=dict)

    def base(self) -> bytes:
        words = self.coded.words[0]
        parts: dict[str, object] = {
            "words": len(words),
            "escapes": len(self.coded.escapes),
            "exact": len(self.exact),
            "flags": int(self.classes is not None),
            "reserved": 0,
            "steps": struct.pack(f"<{len(self.steps)}f", *self.steps),
            "means": struct.pack(f"<{len(self.means)}b", *self.means),
            "classes": bytes(self.classes or b""),
            "padding": b"",
            "states": struct.pack(f"<{len(self.coded.states)}I", *self.coded.states),
            "word_list": struct.pack(f"<{len(words)}H", *words),
            "escape_list": struct.pack(f"<{len(self.coded.escapes)}h", *self.coded.escapes),
            "tokens": struct.pack(f"<{len(self.exact)}H", *self.exact),
            "values": b"".join(pattern.to_bytes(self.item, "little") for row in self.exact.values() for pattern in row),
            "end": b"",
        }
        parts.update(self.fields)
        head = struct.pack("<IIHBB", *(parts[name] for name in ("words", "escapes", "exact", "flags", "reserved")))
        for name in ("steps", "means", "classes"):
            head += parts[name]  # type: ignore[operator]
        body = parts["padding"] or bytes(-len(head) % 4)
        for name in ("states", "word_list", "escape_list", "tokens", "values"):
            body += parts[name]  # type: ignore[operator]
        return head + body + (parts["end"] or bytes(-(len(head) + len(body)) % 4))  # type: ignore[operator,arg-type]

    def level(self, level: int) -> bytes:
        if level == 0:
            return self.base()
        words = self.coded.words[level]
        data = struct.pack("<I", self.fields.get(f"words {level}", len(words))) + struct.pack(f"<{len(words)}H", *words)
        return data + (self.fields.get(f"end {level}") or bytes(-len(data) % 4))  # type: ignore[operator]


@dataclass(frozen=True)
class RawStream:
    """All tokens exact: bit patterns by token."""

    rows: Sequence[Sequence[int]]
    item: int = 2
    fields: Mapping[str, int] = field(default_factory=dict)

    def level(self, level: int) -> bytes:
        if level:
            return b""
        words, escapes, flags = (self.fields.get(name, 0) for name in ("words", "escapes", "flags"))
        head = struct.pack("<IIHBB", words, escapes, RAW, flags, 0)
        return pad(head + b"".join(pattern.to_bytes(self.item, "little") for row in self.rows for pattern in row))


@dataclass(frozen=True)
class CraftedHead:
    """The fields in front of the streams; `pairs` and `padding` are the honest ones unless given."""

    mode: int = 0
    span: int = 0
    levels: int = 3
    rotary: int = 0
    first_position: int = 0
    frequencies: Sequence[float] = ()
    rotated: Sequence[int] = ()
    pairs: int | None = None
    reserved: int = 0
    padding: bytes | None = None

    def pack(self) -> bytes:
        pairs = len(self.frequencies) if self.pairs is None else self.pairs
        fixed = (self.mode, self.span, self.levels, self.rotary, self.first_position, pairs, self.reserved)
        frequencies = struct.pack(f"<{len(self.frequencies)}f", *self.frequencies)
        padding = bytes(-len(self.rotated) % 4) if self.padding is None else self.padding
        return struct.pack("<BBBBIHH", *fixed) + frequencies + bytes(self.rotated) + padding


def pack_payloads(head: CraftedHead, streams: Sequence[CraftedStream | RawStream]) -> list[bytes]:
    """The payloads of all levels of one section."""
    payloads = []
    for level in range(head.levels):
        data = [stream.level(level) for stream in streams]
        lengths = struct.pack(f"<{len(data)}I", *(len(stream) for stream in data))
        payloads.append((head.pack() if level == 0 else b"") + lengths + b"".join(data))
    return payloads


# Numbers that look like something, without a random generator whose versions differ


def draw(seed: str, count: int) -> list[int]:
    """Bell-shaped integers of a deviation of 1000."""
    octets = blake3(seed.encode()).digest(length=12 * count)
    sums = [sum(octets[12 * at : 12 * at + 12]) - 1530 for at in range(count)]
    return [value * 1000 // 256 for value in sums]


def draw_integers(seed: str, classes: Sequence[int], tokens: int) -> list[list[int]]:
    """q2 of the deviations that the classes name."""
    bell = iter(draw(seed, tokens * len(classes)))
    scale = [int(1024 * 2 ** ((of - 13) / 4)) for of in classes]
    return [[next(bell) * factor // 1024000 for factor in scale] for _ in range(tokens)]


# Calibrations


def make_tables(first: Sequence[int] = (13, 9, 5), keep: int = 48) -> Tables:
    """Simple tables: a pyramid of frequencies for each class. Classes from `keep` on are like class `keep - 1`."""
    base, refine = [], [[], []]
    for number in range(48):
        width = min(127, 1 + 2 ** (max(0, min(number, keep - 1) - 13) // 4))
        base.append(pyramid(width) if number >= first[0] else [0] * 256)
        for level in (1, 2):
            coded = number >= first[level]
            cuts = [(1100 + 13 * c - number, 2900 + 17 * c + number) if coded else (0, 0) for c in range(4)]
            refine[level - 1].append(cuts)
    shift = [[float(np.float32((level + 1) * number / 512)) for number in range(48)] for level in range(3)]
    return Tables(list(first), base, refine, shift).check()


def pyramid(width: int) -> list[int]:
    """Frequencies around symbol 127, at most `width` away from it, and an escape."""
    weights = [max(0, width + 1 - abs(symbol - 127)) for symbol in range(255)]
    row = [4000 * weight // sum(weights) for weight in weights] + [1]
    row[127] += 4096 - sum(row)
    return row


def draw_matrix(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float16 numbers of magnitude 1 at most, eighths."""
    count = int(np.prod(shape))
    return (
        (np.array([octet % 17 - 8 for octet in blake3(seed.encode()).digest(length=count)]) / 8)
        .astype(np.float16)
        .reshape(shape)
    )


def draw_floats(seed: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Float32 numbers around 0."""
    count = int(np.prod(shape))
    return (np.array(draw(seed, count)) / 1024 * scale).astype(np.float32).reshape(shape)


def make_calibration(
    seed: str,
    *,
    namespace: bytes,
    span: str,
    layers: int,
    kv_heads: int,
    dim: int,
    layer_group: int,
    components: int | None = None,
    rotary: str = "none",
    frequencies: Sequence[float] = (),
    rotated: Sequence[int] | None = None,
    tables: Tables | None = None,
) -> bytes:
    """A small artefact whose numbers mean nothing."""
    tables = tables or make_tables()
    tensors: dict[str, np.ndarray] = {
        "rotated": np.array([0] * layers if rotated is None else rotated, np.uint8),
        "mean": draw_floats(f"{seed} mean", (layers, 2, kv_heads, dim), 1.5),
        "first": np.array(tables.first, np.uint8),
        "base": np.array(tables.base, np.uint16),
        "refine": np.array(tables.refine, np.uint16),
        "shift": np.array(tables.shift, np.float32),
    }
    if rotary != "none":
        tensors["inverse_frequencies"] = np.array(frequencies, np.float32)
    for g in range(-(-layers // layer_group)):
        height = min(layer_group, layers - g * layer_group)
        for u in range(1 if span == "all" else kv_heads):
            n = 2 * height * dim * (kv_heads if span == "all" else 1)
            count = min(components or n, n) if span in ("group", "all") else n
            place = f"{g}.{u}"
            order = draw(f"{seed} classes {place}", count)
            tensors[f"classes.{place}"] = np.array([4 + abs(value) % 26 for value in order], np.uint8)
            for name in ("synthesis", "analysis"):
                tensors[f"{name}_scale.{place}"] = np.abs(draw_floats(f"{seed} {name} scale {place}", (count,), 0.01))
                shape = (2 * height, dim, dim) if span == "head" else (count, n)
                if span != "channel":
                    tensors[f"{name}.{place}"] = draw_matrix(f"{seed} {name} {place}", shape)
    metadata = {"format": "kvstore-s3 calibration 1", "namespace": namespace.hex(), "span": span, "report": "{}"}
    metadata |= {"layer_group": str(layer_group), "layers": str(layers), "kv_heads": str(kv_heads)}
    return pack_safetensors(tensors, metadata | {"head_dim": str(dim), "rotary": rotary})


def pack_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    body = b""
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        data = tensor.astype(tensor.dtype.newbyteorder("<")).tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def style_id(name: str) -> int:
    return STYLES.index(name)


def unit_classes(calibration: Calibration, layer_begin: int, head: int) -> list[int]:
    """Classes of the stream of a head (0 for span all) in the group that starts at `layer_begin`."""
    return calibration.units[layer_begin // calibration.layer_group, head].classes
