"""Codec 5: CacheGen as published (Liu et al., SIGCOMM 2024): lossy, anchors and deltas. docs/format-cachegen.md.

Of every ten tokens the first, the anchor, is quantised with 8 bits; the others are coded as quantised differences from
it. The pure steps stand on their own, for measuring variants of the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.arithmetic import (
    Cdfs,
    Symbols,
    ascends,
    count_symbols,
    cumulate,
    decode_symbols,
    encode_symbols,
)
from kvstore_s3.codec.base import Bits
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError

GROUP = 10
"""Tokens that share an anchor, the anchor included."""

ANCHOR_MOST = 127
"""Anchors are numbers from -127 to 127 steps."""

STREAM_SYMBOLS = 65536
"""Symbols of one stream at most, so that what the coder needs at once, a table row for each symbol, stays small."""

DTYPES = ("bfloat16", "float16", "float32")
"""What this codec codes: the dtypes with something to quantise away."""

Floats = npt.NDArray[np.float32]
Scales = npt.NDArray[np.uint16]
"""One scale for each token, as the bits of a bfloat16."""

_LEAST_SCALE, _INFINITE_SCALE = 0x0D80, 0x7F80  # 2^-100: below it a token is all zeros, and no step is denormal
_LARGEST = {"bfloat16": 0x7F7F0000, "float16": 0x477FE000, "float32": 0x7F7FFFFF}


@dataclass(frozen=True, slots=True)
class CacheGenCodec:
    """Values of `dtype` (one of `DTYPES`), with `bins[layer][kind]` quantisation bins for the deltas.

    Only `encode` needs `bins` (see `published_bins`); a payload tells the decoder.
    """

    dtype: str
    bins: tuple[tuple[int, ...], ...] = ()
    id: ClassVar[int] = 5
    name: ClassVar[str] = "cachegen"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidArgumentError(f"CacheGen codes {', '.join(DTYPES)}, not {self.dtype}")

    def encode(self, values: Bits) -> bytes:
        """Code bit patterns [layers, 2, tokens, heads, head_dim]. The payload may be longer than raw for short chunks.

        Raises `InvalidArgumentError` where a value is not finite, or too near the largest float32 for its scale.
        """
        payload = self.encode_finite(values)
        if payload is None:
            raise InvalidArgumentError("CacheGen codes finite values alone; code this section with an exact codec")
        return payload

    def encode_finite(self, values: Bits) -> bytes | None:
        """As `encode`, with None in place of an error for what has to be coded exactly."""
        if tuple(map(len, self.bins)) != (values.shape[1],) * values.shape[0]:
            raise InvalidArgumentError(f"bins {self.bins} do not fit a section of shape {values.shape}")
        planes = []
        for layer, kinds in enumerate(self.bins):
            for kind, bins in enumerate(kinds):
                plane = _encode_plane(to_float(values[layer, kind], self.dtype), bins)
                if plane is None:
                    return None
                planes += plane
        return b"".join(planes)

    def decode(self, payload: memoryview, out: Bits, *, head_begin: int, section_heads: int) -> None:
        """Decode heads `head_begin` on into `out`. Raises `DamagedObjectError`. Holds the GIL, a stream at a time."""
        fields = _Fields(payload)
        heads = range(head_begin, head_begin + out.shape[3])
        for layer in range(out.shape[0]):
            for kind in range(out.shape[1]):
                target = out[layer, kind]
                target[:] = from_float(_decode_plane(fields, target.shape, heads, section_heads), self.dtype)
        if fields.position != len(payload):
            raise _bad(f"{len(payload) - fields.position} bytes follow the last plane")


def published_bins(layer_begin: int, layers: int, model_layers: int) -> tuple[tuple[int, int], ...]:
    """Bins of K and of V for `layers` layers of a model of `model_layers`, from `layer_begin` on.

    As published: K 32 bins in the first third of the layers, V in the first two, 16 after them; 32 throughout where a
    model has fewer than ten layers.
    """
    few = model_layers < 10
    fine_k, fine_v = (model_layers, model_layers) if few else (model_layers // 3, 2)
    return tuple(
        (32 if layer < fine_k else 16, 32 if layer < fine_v else 16)
        for layer in range(layer_begin, layer_begin + layers)
    )


def quantize_by_token_max(values: Floats, most: int) -> tuple[npt.NDArray[np.int8], Scales] | None:
    """Quantise `values` [tokens, channels] to -most..most steps of its largest magnitude / most, token by token.

    None where a value, or a scale rounded up to bfloat16, is not finite.
    """
    largest: Floats = np.abs(values).max(axis=1)
    if not np.isfinite(largest).all():
        return None
    scales = ((largest.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    scales[scales < _LEAST_SCALE] = 0
    if (scales >= _INFINITE_SCALE).any():
        return None
    steps = _steps(scales, most)
    quantized = np.zeros(values.shape, np.float32)
    np.divide(values, steps, out=quantized, where=steps > 0)
    return np.rint(quantized).clip(-most, most).astype(np.int8), scales


def dequantize(quantized: npt.NDArray[Any], scales: Scales, most: int) -> Floats:
    """The values [tokens, channels] that `quantized` stands for."""
    return quantized.astype(np.float32) * _steps(scales, most)


def to_float(bits: Bits, dtype: str) -> Floats:
    """Bit patterns [tokens, heads, head_dim] as float32, exactly."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    floats = np.float16 if dtype == "float16" else np.float32
    return np.ascontiguousarray(bits).view(floats).astype(np.float32)


def from_float(values: Floats, dtype: str) -> Bits:
    """Bit patterns of the nearest finite values of `dtype`, ties to even."""
    largest = np.uint32(_LARGEST[dtype]).view(np.float32)
    values = values.clip(-largest, largest)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == "float16" else values.view(np.uint32)


def _encode_plane(values: Floats, bins: int) -> list[bytes] | None:
    """K or V of one layer, [tokens, heads, head_dim]."""
    tokens, heads, head_dim = values.shape
    most = _most(bins)
    values = values.reshape(tokens, heads * head_dim)
    anchors = quantize_by_token_max(values[::GROUP], ANCHOR_MOST)
    if anchors is None:
        return None
    scales = np.zeros(tokens, "<u2")
    scales[::GROUP] = anchors[1]
    coded: list[bytes] = []
    if len(rest := _rest(tokens)):
        with np.errstate(over="ignore"):  # a difference that is too large has no finite scale
            deltas = values[rest] - dequantize(*anchors, ANCHOR_MOST)[rest // GROUP]
        quantized = quantize_by_token_max(deltas, most)
        if quantized is None:
            return None
        scales[rest] = quantized[1]
        symbols = np.ascontiguousarray(quantized[0].T.astype(np.int16) + np.int16(most))
        coded = _encode_deltas(symbols.reshape(heads, head_dim, -1), 2 * most + 1, _runs(tokens, head_dim))
    by_head = anchors[0].reshape(-1, heads, head_dim).swapaxes(0, 1)
    return [bytes([bins]), scales.tobytes(), by_head.tobytes(), *coded]


def _encode_deltas(symbols: Symbols, alphabet: int, runs: list[slice]) -> list[bytes]:
    """CDFs, lengths and streams of `symbols` [heads, head_dim, tokens], one stream for each run of channels."""
    stored, streams = [], []
    for head in symbols:
        cdfs = cumulate(count_symbols(head, alphabet))
        stored.append(cdfs[:, 1:-1].astype("<u2").tobytes())
        streams += [encode_symbols(head[channels], cdfs[channels]) for channels in runs]
    return [*stored, np.array([len(stream) for stream in streams], "<u4").tobytes(), *streams]


def _decode_plane(fields: _Fields, shape: tuple[int, ...], heads: range, section_heads: int) -> Floats:
    """The values of `heads`, [tokens, heads, head_dim]."""
    tokens, _, head_dim = shape
    rest = _rest(tokens)
    most = _most(fields.take_bins())
    scales = fields.take_scales(tokens)
    anchors = fields.take(section_heads * (tokens - len(rest)) * head_dim, "i1")
    anchors = anchors.reshape(section_heads, -1, head_dim)[heads.start : heads.stop].swapaxes(0, 1)
    if (anchors < -ANCHOR_MOST).any():
        raise _bad("an anchor of -128")
    values = np.empty((tokens, len(heads) * head_dim), np.float32)
    values[::GROUP] = dequantize(anchors.reshape(-1, len(heads) * head_dim), scales[::GROUP], ANCHOR_MOST)
    if len(rest):
        deltas = fields.take_deltas(tokens, head_dim, 2 * most + 1, heads, section_heads)
        with np.errstate(over="ignore"):  # what is too large becomes the largest value of the dtype
            values[rest] = values[rest // GROUP * GROUP] + dequantize(deltas.T - np.int16(most), scales[rest], most)
    return values.reshape(tokens, len(heads), head_dim)


@dataclass(slots=True)
class _Fields:
    """A payload, read from front to back. Every size comes from the layout, and is there before it is used."""

    payload: memoryview
    position: int = 0

    def take(self, count: int, dtype: str) -> npt.NDArray[Any]:
        return np.frombuffer(self.take_bytes(count * np.dtype(dtype).itemsize), dtype)

    def take_bytes(self, size: int) -> memoryview:
        if size > len(self.payload) - self.position:
            found = f"payload has {len(self.payload)} bytes, its fields go beyond {self.position + size}"
            raise DamagedObjectError(BitstreamFault.TRUNCATED, f"{found}; save the chunk again")
        self.position += size
        return self.payload[self.position - size : self.position]

    def take_bins(self) -> int:
        bins = int(self.take(1, "u1")[0])
        if not _usable(bins):
            raise _bad(f"{bins} bins, where an even number from 4 to 128 is called for")
        return bins

    def take_scales(self, tokens: int) -> Scales:
        scales = self.take(tokens, "<u2")
        if ((scales >= _INFINITE_SCALE) | ((scales > 0) & (scales < _LEAST_SCALE))).any():
            raise _bad("a scale that is neither 0 nor from 2^-100 on and finite")
        return scales.astype(np.uint16)

    def take_deltas(self, tokens: int, head_dim: int, alphabet: int, heads: range, section_heads: int) -> Symbols:
        """Symbols of `heads`, [channels, tokens that are no anchors]."""
        stored = self.take(section_heads * head_dim * (alphabet - 1), "<u2").reshape(section_heads, head_dim, -1)
        runs = _runs(tokens, head_dim)
        lengths = self.take(section_heads * len(runs), "<u4").reshape(section_heads, len(runs))
        begins = np.cumsum(lengths.reshape(-1), dtype=np.int64).reshape(lengths.shape) - lengths
        streams = self.take_bytes(int(lengths.sum(dtype=np.int64)))
        coded = tokens - len(range(0, tokens, GROUP))
        symbols = np.empty((len(heads), head_dim, coded), np.int16)
        for number, head in enumerate(heads):
            cdfs = _whole_cdfs(stored[head])
            for run, channels in enumerate(runs):
                begin, length = int(begins[head, run]), int(lengths[head, run])
                if not 0 < length <= 2 * coded * (channels.stop - channels.start) + 8:
                    raise _bad(f"a stream of {length} bytes")
                symbols[number, channels] = decode_symbols(
                    bytes(streams[begin : begin + length]), cdfs[channels], coded
                )
        return symbols.reshape(len(heads) * head_dim, coded)


def _whole_cdfs(stored: npt.NDArray[Any]) -> Cdfs:
    cdfs = np.zeros((stored.shape[0], stored.shape[1] + 2), np.uint16)
    cdfs[:, 1:-1] = stored
    if not ascends(cdfs):
        raise _bad("cumulated frequencies that do not ascend")
    return cdfs


def _runs(tokens: int, head_dim: int) -> list[slice]:
    """The channels of a head, stream by stream."""
    together = max(1, STREAM_SYMBOLS // tokens)
    return [slice(begin, min(begin + together, head_dim)) for begin in range(0, head_dim, together)]


def _rest(tokens: int) -> npt.NDArray[np.intp]:
    """The tokens that are no anchors."""
    return np.flatnonzero(np.arange(tokens) % GROUP)


def _steps(scales: Scales, most: int) -> Floats:
    scale: Floats = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (scale / np.float32(most))[:, None]


def _usable(bins: int) -> bool:
    return 4 <= bins <= 128 and bins % 2 == 0


def _most(bins: int) -> int:
    if not _usable(bins):
        raise InvalidArgumentError(f"bins must be an even number from 4 to 128, not {bins}")
    return bins // 2 - 1


def _bad(found: str) -> DamagedObjectError:
    return DamagedObjectError(
        BitstreamFault.BAD_PAYLOAD,
        f"a CacheGen payload is not what the layout calls for: {found}; save the chunk again",
    )
