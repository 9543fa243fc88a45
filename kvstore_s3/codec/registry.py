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
_CACHEGEN_ID = 5
_NAMES: Mapping[int, str] = MappingProxyType(
    {0: "raw", 1: "lossless", 2: "planes", 3: "scalable", 4: "nothing", _CACHEGEN_ID: "cachegen"}
)


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


def encode_cachegen_section(values: Bits, dtype: str, *, layer_begin: int, model_layers: int) -> tuple[int, bytes]:
    """Code a section as CacheGen does, or exactly (`encode_section`) where that is no longer or has to be.

    `layer_begin` is the number of the section's first layer in the model, `model_layers` how many the model has: they
    decide how finely a layer is quantised. Exact are values that are not finite, fp8, and chunks so short that the
    tables outweigh what they save. Raises `InvalidArgumentError` where the extra `cachegen` is not installed.
    """
    from kvstore_s3.codec.cachegen import DTYPES as CODED
    from kvstore_s3.codec.cachegen import CacheGenCodec, published_bins

    exact = encode_section(values, dtype)
    if dtype not in CODED:
        return exact
    bins = published_bins(layer_begin, values.shape[0], model_layers)
    payload = CacheGenCodec(dtype, bins).encode_finite(values)
    return exact if payload is None or len(payload) >= len(exact[1]) else (_CACHEGEN_ID, payload)


def codec_for(codec_id: int, dtype: str, *, cachegen: bool = False) -> Codec:
    """The codec that `codec_id` names, for values of `dtype`, among those that decode a section on their own.

    All are exact but CacheGen's, which belongs into objects of its own profile alone: `cachegen` says that this is one.
    Raises `DamagedObjectError` (UNSUPPORTED_FEATURE) where no such codec is known, or not for this dtype.
    """
    for codec in (_RAW, _PLANES, _PREFERRED[dtype]):
        if codec.id == codec_id:
            return codec
    if cachegen and codec_id == _CACHEGEN_ID:
        from kvstore_s3.codec.cachegen import DTYPES as CODED
        from kvstore_s3.codec.cachegen import CacheGenCodec

        if dtype in CODED:
            return CacheGenCodec(dtype)
    name = _NAMES.get(codec_id, "unknown")
    raise DamagedObjectError(
        BitstreamFault.UNSUPPORTED_FEATURE,
        f"codec {codec_id} ({name}) does not code {dtype} here; this section needs a newer version, or is damaged",
    )
