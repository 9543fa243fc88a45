"""One stream of a scalable section: its bytes at each level, and what they say. `docs/format-scalable.md`, "A stream".

Encoding and parsing know no calibration and no floats; the entropy coder itself is native.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_s3.errors import BitstreamFault, DamagedObjectError

Bytes = bytes | memoryview
Classes = npt.NDArray[np.uint8]

MAX_COARSE = 3600
"""Largest |q0|, so that q2 fits 16 bits."""

_HEAD = struct.Struct("<IIHBB")
_RAW = 0xFFFF
MAX_EXACT = _RAW - 1
"""Most exact tokens of a stream that is not raw."""
_EXPLICIT = 1
_LANES = 32


@dataclass(frozen=True, slots=True)
class StreamShape:
    """What a reader knows before it reads: tokens, numbers of a token (n), components (n'), bytes of a value, levels of
    the object, and in uncalibrated mode how many steps there are (else 0)."""

    tokens: int
    numbers: int
    components: int
    itemsize: int
    levels: int
    steps: int


@dataclass(frozen=True, slots=True)
class StreamSide:
    """What a base stream says beside its entropy-coded numbers.

    `classes` uint8 [n'] or None where the calibration's count; `steps` float32 and `means` int8 [n] in uncalibrated
    mode; `exact_tokens` uint16 [X] with `exact_values` [X, n], bit patterns.
    """

    classes: Classes | None
    steps: npt.NDArray[np.float32] | None
    means: npt.NDArray[np.int8] | None
    exact_tokens: npt.NDArray[np.uint16]
    exact_values: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Coded:
    """What the entropy coder gave: states, words of each level, escapes."""

    states: Bytes
    words: Sequence[Bytes]
    escapes: Bytes


@dataclass(frozen=True, slots=True)
class RawStream:
    """All tokens of a stream as they are: `values` [T, n], bit patterns."""

    values: npt.NDArray[Any]


def lanes_of(classes: Classes, last_first: int) -> int:
    """S: the lanes that a stream uses, from the components coded at the object's last level."""
    return min(_LANES, int(np.count_nonzero(classes >= last_first)))


def build_raw_stream(values: npt.NDArray[Any], levels: int) -> list[bytes]:
    """The bytes of each level for values [T, n] that are stored as they are."""
    data = _little(values).tobytes()
    return [_pad(_HEAD.pack(0, 0, _RAW, 0, 0) + data)] + [b""] * (levels - 1)


def build_stream(side: StreamSide, coded: Coded) -> list[bytes]:
    """The bytes of each level."""
    words = coded.words[0]
    explicit = _EXPLICIT if side.classes is not None else 0
    head = [_HEAD.pack(len(words) // 2, len(coded.escapes) // 2, len(side.exact_tokens), explicit, 0)]
    if side.steps is not None and side.means is not None:
        head += [side.steps.astype("<f4").tobytes(), side.means.tobytes()]
    if side.classes is not None:
        head.append(side.classes.tobytes())
    body = [coded.states, words, coded.escapes, _little(side.exact_tokens).tobytes()]
    base = _pad(b"".join(head)) + b"".join(body) + _little(side.exact_values).tobytes()
    return [_pad(base)] + [_pad(struct.pack("<I", len(words) // 2) + words) for words in coded.words[1:]]


def parse_base(
    stream: memoryview, shape: StreamShape, static_classes: Classes | None, last_first: int
) -> tuple[StreamSide, Coded] | RawStream:
    """Take a base stream apart. `static_classes` are the calibration's, None in uncalibrated mode.

    Raises `DamagedObjectError` (BAD_PAYLOAD) for lengths, flags or numbers that cannot be.
    """
    reader = _Reader(stream)
    words, escapes, exact, flags, reserved = _HEAD.unpack(reader.take(_HEAD.size))
    if exact == _RAW:
        return _parse_raw(reader, shape, (words, escapes, flags, reserved))
    if exact >= shape.tokens or flags > _EXPLICIT or reserved or (shape.steps and not flags):
        raise damaged(f"a stream says {exact} exact tokens of {shape.tokens}, flags {flags:#x}")
    steps = means = classes = None
    if shape.steps:
        steps = _take_steps(reader, shape.steps)
        means = np.frombuffer(reader.take(shape.numbers), np.int8)
    if flags:
        classes = np.frombuffer(reader.take(shape.components), np.uint8)
        if classes.max() > 47:
            raise damaged(f"a stream names class {classes.max()}; 47 is the highest")
    reader.skip_padding()
    used = classes if classes is not None else static_classes
    assert used is not None, "uncalibrated streams give their classes"
    states = reader.take(4 * lanes_of(used, last_first))
    coded = Coded(states, [reader.take(2 * words)], reader.take(2 * escapes))
    tokens = np.frombuffer(reader.take(2 * exact), "<u2")
    if exact and ((tokens[1:] <= tokens[:-1]).any() or tokens[-1] >= shape.tokens):
        raise damaged("the exact tokens of a stream do not ascend within the chunk")
    values = _take_values(reader, exact, shape)
    reader.finish()
    return StreamSide(classes, steps, means, tokens, values), coded


def parse_refinement(stream: memoryview) -> memoryview:
    """The words of a stream of level 1 or 2."""
    reader = _Reader(stream)
    words = reader.take(2 * int(struct.unpack("<I", reader.take(4))[0]))
    reader.finish()
    return words


def split_streams(payload: memoryview, at: int, count: int) -> list[memoryview]:
    """The `count` streams behind their table of lengths at `at`; together they are the rest of the payload."""
    if len(payload) < at + 4 * count:
        raise DamagedObjectError(
            BitstreamFault.TRUNCATED,
            f"payload has {len(payload)} bytes, its table of lengths ends at {at + 4 * count}; save the chunk again",
        )
    lengths = struct.unpack_from(f"<{count}I", payload, at)
    at += 4 * count
    if at + sum(lengths) != len(payload):
        fault = BitstreamFault.TRUNCATED if at + sum(lengths) > len(payload) else BitstreamFault.BAD_PAYLOAD
        found = f"payload has {len(payload)} bytes, its streams call for {at + sum(lengths)}; save the chunk again"
        raise DamagedObjectError(fault, found)
    streams = []
    for length in lengths:
        streams.append(payload[at : at + length])
        at += length
    return streams


def damaged(found: str) -> DamagedObjectError:
    """A payload whose digest holds, but that no encoder writes."""
    return DamagedObjectError(BitstreamFault.BAD_PAYLOAD, f"{found}; save the chunk again")


class _Reader:
    """Takes parts off the front of a stream, and never more than it has."""

    def __init__(self, stream: memoryview) -> None:
        self._stream, self._at = stream, 0

    def take(self, size: int) -> memoryview:
        if size > len(self._stream) - self._at:
            raise damaged(f"a stream of {len(self._stream)} bytes calls for {self._at + size}")
        self._at += size
        return self._stream[self._at - size : self._at]

    def skip_padding(self) -> None:
        if any(self.take(-self._at % 4)):
            raise damaged("the padding of a stream is not zero")

    def finish(self) -> None:
        self.skip_padding()
        if self._at != len(self._stream):
            raise damaged(f"a stream of {len(self._stream)} bytes ends at {self._at}")


def _parse_raw(reader: _Reader, shape: StreamShape, others: tuple[int, int, int, int]) -> RawStream:
    if any(others):
        raise damaged("a raw stream has words, escapes or flags")
    values = _take_values(reader, shape.tokens, shape)
    reader.finish()
    return RawStream(values)


def _take_steps(reader: _Reader, count: int) -> npt.NDArray[np.float32]:
    steps = np.frombuffer(reader.take(4 * count), "<f4").astype(np.float32)
    if not (np.isfinite(steps) & (steps > 0)).all():
        raise damaged("a stream has a step that is not above 0, or not finite")
    return steps


def _take_values(reader: _Reader, tokens: int, shape: StreamShape) -> npt.NDArray[Any]:
    stored = reader.take(tokens * shape.numbers * shape.itemsize)
    return np.frombuffer(stored, f"<u{shape.itemsize}").reshape(tokens, shape.numbers)


def _little(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
