"""Codec 1: bfloat16, bit for bit, in about two thirds of the space.

The work is native (csrc/lossless.h); docs/format-lossless.md is the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore_s3 import _native
from kvstore_s3.codec.base import Bits
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError

MAX_HEAD_BYTES = 2**31
"""Uncompressed bytes of one head of a section from which on the codec refuses it; raw has no such limit."""


@dataclass(frozen=True, slots=True)
class LosslessCodec:
    """One rANS stream for each head: sign, exponent and top mantissa bit coded, six mantissa bits stored.

    `implementation` is "auto" (the fastest that the CPU has) or a name in `_native.implementations()`; all give the
    same bytes.
    """

    implementation: str = "auto"
    id: ClassVar[int] = 1
    name: ClassVar[str] = "lossless"

    def encode(self, values: Bits) -> bytes:
        """Code uint16 bit patterns [layers, 2, tokens, heads, head_dim]. Releases the GIL.

        At most 8 bytes per KV head longer than raw; `registry.encode_section` stores raw where this is not shorter.
        Raises `InvalidArgumentError` where one head has `MAX_HEAD_BYTES` or more.
        """
        try:
            return _native.lossless_encode(values, implementation=self.implementation)
        except (TypeError, ValueError) as error:
            raise _no_section(values, error) from error

    def decode(self, payload: memoryview, out: Bits, *, head_begin: int, section_heads: int) -> None:
        """Decode heads `head_begin` on into `out` (uint16, writable). Raises `DamagedObjectError`. Releases the GIL."""
        try:
            fault = _native.lossless_decode(
                payload, out, head_begin=head_begin, section_heads=section_heads, implementation=self.implementation
            )
        except (TypeError, ValueError) as error:
            raise _no_section(out, error) from error
        if fault:
            raise DamagedObjectError(
                BitstreamFault(fault),
                f"a lossless payload of {len(payload)} bytes does not decode to the layout's {section_heads} heads of "
                f"{out.shape[0]} layers x {out.shape[2]} tokens x {out.shape[4]} dimensions; save the chunk again",
            )


def _no_section(values: Bits, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        "expected a uint16 array [layers, 2, tokens, heads, head_dim], its last two axes contiguous, less than "
        f"{MAX_HEAD_BYTES} bytes a head; found {values.dtype} {values.shape}: {str(error).splitlines()[0]}"
    )
