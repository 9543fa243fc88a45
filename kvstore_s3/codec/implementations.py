"""Which ways of computing the native codecs have on this machine."""

from __future__ import annotations

from kvstore_s3 import _native


def native_implementations() -> list[str]:
    """Names for `LosslessCodec.implementation`, slowest first; the last is what "auto" takes."""
    return list(_native.implementations())
