"""Which codec codes a section, and which one an id in a section index names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvstore_s3.codec.base import Bits, Codec
from kvstore_s3.codec.lossless import MAX_HEAD_BYTES, LosslessCodec
from kvstore_s3.codec.planes import PlanesCodec
from kvstore_s3.codec.raw import RawCodec
from kvstore_s3.errors import BitstreamFault, DamagedObjectError
from kvstore_s3.layout import DTYPES

_RAW = RawCodec()
_PLANES = PlanesCodec()
_PREFERRED: Mapping[str, Codec] = MappingProxyType(
    {name: LosslessCodec() if name == "bfloat16" else _PLANES for name in DTYPES}
)
_NAMES: Mapping[int, str] = MappingProxyType({0: "raw", 1: "lossless", 2: "planes"})


def encode_section(values: Bits, dtype: str) -> tuple[int, bytes]:
    """Code a section of `dtype` (a key of `DTYPES`) with the codec that suits it, or raw where that is no longer.

    `values`: bit patterns, shape [layers, 2, tokens, heads, head_dim]. Answers codec id and payload. Releases the GIL.
    """
    if values.nbytes // values.shape[3] < MAX_HEAD_BYTES:
        preferred = _PREFERRED[dtype]
        payload = preferred.encode(values)
        if len(payload) < values.nbytes:
            return preferred.id, payload
    return _RAW.id, _RAW.encode(values)


def codec_for(codec_id: int, dtype: str) -> Codec:
    """The codec that `codec_id` names, for values of `dtype`.

    Raises `DamagedObjectError` (UNSUPPORTED_FEATURE) where no such codec is known, or not for this dtype.
    """
    for codec in (_RAW, _PLANES, _PREFERRED[dtype]):
        if codec.id == codec_id:
            return codec
    name = _NAMES.get(codec_id, "unknown")
    raise DamagedObjectError(
        BitstreamFault.UNSUPPORTED_FEATURE,
        f"codec {codec_id} ({name}) does not code {dtype}; this section needs a newer version, or is damaged",
    )
