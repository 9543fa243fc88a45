"""Codec 0: the bit patterns as they are, for any dtype. The fallback that bounds every other codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvstore_s3.codec.base import Bits
from kvstore_s3.errors import BitstreamFault, DamagedObjectError


@dataclass(frozen=True, slots=True)
class RawCodec:
    """Little-endian bit patterns in the canonical order `[layer][K or V][token][head][dim]`."""

    id: ClassVar[int] = 0
    name: ClassVar[str] = "raw"

    def encode(self, values: Bits) -> bytes:
        """The bytes of `values`, shape [layers, 2, tokens, heads, head_dim]."""
        return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()

    def decode(self, payload: memoryview, out: Bits, *, head_begin: int, section_heads: int) -> None:
        """Copy heads `head_begin` on into `out`. Raises `DamagedObjectError` where the length is not the layout's."""
        layers, kinds, tokens, _, head_dim = out.shape
        shape = (layers, kinds, tokens, section_heads, head_dim)
        expected = int(np.prod(shape, dtype=np.int64)) * out.itemsize
        check_length(len(payload), expected)
        stored = np.frombuffer(payload, dtype=out.dtype.newbyteorder("<")).reshape(shape)
        out[:] = stored[:, :, :, head_begin : head_begin + out.shape[3]]


def check_length(found: int, expected: int) -> None:
    """Refuse a payload that is not exactly as long as the layout calls for."""
    if found == expected:
        return
    code = BitstreamFault.TRUNCATED if found < expected else BitstreamFault.BAD_PAYLOAD
    raise DamagedObjectError(code, f"payload has {found} bytes, the layout calls for {expected}; save the chunk again")
