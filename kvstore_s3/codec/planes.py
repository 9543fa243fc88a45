"""Codec 2: byte planes, each compressed with zstd. Exact for any dtype; used for fp16, fp32 and fp8."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import zstandard

from kvstore_s3.codec.base import Bits
from kvstore_s3.errors import BitstreamFault, DamagedObjectError

LEVEL = 3
"""zstd level: planes hold little but skewed byte counts, which higher levels do not code any better."""


@dataclass(frozen=True, slots=True)
class PlanesCodec:
    """For each head and byte position one plane, in the order `[layer][K or V][token][dim]`.

    The payload is a table of plane lengths (u32, `[head][byte position]`) and the planes in the same order. A plane
    as long as its number of values is stored; a shorter one is a single zstd frame.
    """

    id: ClassVar[int] = 2
    name: ClassVar[str] = "planes"

    def encode(self, values: Bits) -> bytes:
        """Code `values`, shape [layers, 2, tokens, heads, head_dim]."""
        compressor = zstandard.ZstdCompressor(level=LEVEL)
        coded = []
        for head in range(values.shape[3]):
            octets = _octets(values[:, :, :, head, :])
            for position in range(values.itemsize):
                plane = np.ascontiguousarray(octets[..., position]).tobytes()
                frame = compressor.compress(plane)
                coded.append(frame if len(frame) < len(plane) else plane)
        return struct.pack(f"<{len(coded)}I", *map(len, coded)) + b"".join(coded)

    def decode(self, payload: memoryview, out: Bits, *, head_begin: int, section_heads: int) -> None:
        """Decode heads `head_begin` on into `out`. Raises `DamagedObjectError` on bytes that do not fit `out`."""
        planes = _plane_spans(payload, count=section_heads * out.itemsize)
        layers, kinds, tokens, heads, head_dim = out.shape
        values = layers * kinds * tokens * head_dim
        for head in range(heads):
            decoded = np.empty((values, out.itemsize), dtype=np.uint8)
            for position in range(out.itemsize):
                span = planes[(head_begin + head) * out.itemsize + position]
                decoded[:, position] = _decode_plane(payload[span], values)
            out[:, :, :, head, :] = decoded.view(out.dtype.newbyteorder("<")).reshape(layers, kinds, tokens, head_dim)


def _octets(values: Bits) -> npt.NDArray[np.uint8]:
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(*values.shape, values.itemsize)


def _plane_spans(payload: memoryview, *, count: int) -> list[slice]:
    table = 4 * count
    if len(payload) < table:
        found = f"payload has {len(payload)} bytes, its length table alone {table}; save the chunk again"
        raise DamagedObjectError(BitstreamFault.TRUNCATED, found)
    spans = list(_running_spans(table, struct.unpack(f"<{count}I", payload[:table])))
    end = spans[-1].stop if spans else table
    if end != len(payload):
        code = BitstreamFault.TRUNCATED if end > len(payload) else BitstreamFault.BAD_PAYLOAD
        raise DamagedObjectError(code, f"payload has {len(payload)} bytes, its planes {end}; save the chunk again")
    return spans


def _running_spans(start: int, lengths: tuple[int, ...]) -> Iterator[slice]:
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _decode_plane(coded: memoryview, values: int) -> npt.NDArray[np.uint8]:
    if len(coded) == values:
        return np.frombuffer(coded, dtype=np.uint8)
    # The frame's own claim of its size is checked first: zstandard would allocate whatever it says.
    try:
        frame = zstandard.get_frame_parameters(coded)
        if frame.content_size != values or frame.dict_id != 0:
            raise _bad_plane(f"its frame claims {frame.content_size} values")
        plane = zstandard.ZstdDecompressor().decompress(coded, max_output_size=values, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _bad_plane(str(error)) from error
    if len(plane) != values:
        raise _bad_plane(f"it holds {len(plane)} values")
    return np.frombuffer(plane, dtype=np.uint8)


def _bad_plane(found: str) -> DamagedObjectError:
    return DamagedObjectError(BitstreamFault.BAD_PAYLOAD, f"a byte plane is not what the layout calls for: {found}")
