"""What a codec is: bytes of one section in, bytes out. Codecs know no keys, headers or stores.

Values travel as numpy arrays of unsigned bit patterns (uint8, uint16 or uint32 for 1-, 2- and 4-byte dtypes), so that
NaN payloads and signed zeros are kept, in the canonical layout `[layer][K or V][token][kv head][dim]`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.unsignedinteger]
"""Bit patterns of KV values, shape [layers, 2, tokens, heads, head_dim], or [layers, 1, ...] for K or V alone; the last
two axes are contiguous."""


class Codec(Protocol):
    """One way of coding a section. `id` is the codec id in the bitstream's section index (FORMAT.md)."""

    @property
    def id(self) -> int: ...

    @property
    def name(self) -> str: ...

    def encode(self, values: Bits) -> bytes:
        """Code `values`; the result depends on nothing else, so equal values give equal bytes on every machine."""

    def decode(self, payload: memoryview, out: Bits, *, head_begin: int, section_heads: int) -> None:
        """Decode heads `head_begin` to `head_begin + out.shape[3]` of a section of `section_heads` heads into `out`.

        `out` may be strided over layers, K/V and tokens. All sizes come from `out`; a payload that does not fit them
        raises `DamagedObjectError` (BAD_PAYLOAD or TRUNCATED), and `out` is then undefined. Releases the GIL.
        """
