"""The golden objects, as code: identities, values, and how each is encoded. `golden/regenerate.py` writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from crafted import Crafted, CraftedSection

from kvstore_s3.bitstream import PARTS_K, PARTS_KV, PARTS_V, Identity, Payload, build_object
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.registry import codec_for
from kvstore_s3.layout import KVLayout, Shard

CACHEGEN = Path(__file__).parent / "golden" / "cachegen"
MAC_KEY = bytes(range(32))
"""The key of the golden object with an authenticator."""

SPECIAL = {
    "bfloat16": (0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81),
    "float16": (0x0000, 0x8000, 0x0001, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01),
    "float32": (0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001),
    "float8_e4m3fn": (0x00, 0x80, 0x01, 0x7F, 0xFF, 0x7E, 0xFE, 0x08),
    "float8_e5m2": (0x00, 0x80, 0x01, 0x7C, 0xFC, 0x7E, 0xFE, 0x7D),
}
"""Zeros of both signs, a subnormal, infinities, NaNs quiet, negative and signalling, as far as the dtype has them."""

_CODECS = {"raw": 0, "lossless": 1, "planes": 2}


@dataclass(frozen=True)
class Golden:
    """One golden object: its bytes, who it is, and the values in it (None where it is lossy: `golden_scalable.py`).

    `first_position` is that of the chunk's first token, `artefact` the calibration that its header names.
    """

    name: str
    identity: Identity
    data: bytes
    values: Bits | None
    profile: str = "lossless"
    codecs: tuple[str, ...] = field(default=())
    levels: int = 1
    first_position: int | None = None
    artefact: bytes | None = None


def make_identity(
    name: str, shard: Shard, *, dtype: str, tokens: int, head_dim: int, layers: int = 6, kv_heads: int = 4
) -> Identity:
    """An identity whose namespace and key are digests of fixed strings."""
    layout = KVLayout(layers, kv_heads, head_dim, dtype)
    namespace, key = (blake3(f"golden {what} of {name}".encode()).digest() for what in ("namespace", "key"))
    return Identity(namespace, key, shard, layout, tokens)


def make_values(identity: Identity, seed: str) -> Bits:
    """Bit patterns [layers, 2, tokens, heads, head_dim]: bell-shaped floats per channel, and every kind of special."""
    layout, shard = identity.layout, identity.shard
    shape = (shard.layers, 2, identity.tokens, shard.heads, layout.head_dim)
    count = int(np.prod(shape))
    octets = np.frombuffer(blake3(seed.encode()).digest(length=8 * count), dtype=np.uint8).reshape(8, *shape)
    bell = octets[:4].astype(np.int64).sum(axis=0) - 510  # integers alone, so that every machine makes the same
    scale = 2.0 ** (np.arange(layout.head_dim) % 5 - 9)
    bits = _as_bits((bell * scale).astype(np.float32), layout.dtype)
    special = SPECIAL[layout.dtype]
    if count > 64:
        bits.reshape(-1)[5 : 5 + 7 * len(special) : 7] = special
    return bits


def as_bytes(values: Bits) -> bytes:
    """Little-endian bytes in the canonical order, as `values_blake3` in the manifest takes them."""
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()


def make_all() -> list[Golden]:
    """Every golden object, in the order of `docs/FORMAT.md`."""
    return [make() for make in _MAKERS]


def make_payloads(values: Bits, identity: Identity, division: Sequence[tuple[int, int, int, str]]) -> list[Payload]:
    """Encode `values`; `division` says parts, first layer, last layer and codec of each section."""
    payloads = []
    for parts, begin, end, codec in division:
        kinds = {PARTS_K: slice(0, 1), PARTS_V: slice(1, 2), PARTS_KV: slice(0, 2)}[parts]
        part = values[begin - identity.shard.layer_begin : end - identity.shard.layer_begin, kinds]
        codec_id, data = encode_exact(part, identity, codec)
        payloads.append(Payload(0, parts, codec_id, begin, end, data))
    return payloads


def encode_exact(values: Bits, identity: Identity, codec: str) -> tuple[int, bytes]:
    """Codec id and payload."""
    return _CODECS[codec], codec_for(_CODECS[codec], identity.layout.dtype).encode(values)


def _build(
    name: str, identity: Identity, division: Sequence[tuple[int, int, int, str]], *, digest_id: int = 1
) -> Golden:
    values = make_values(identity, name)
    data, _ = build_object(identity, make_payloads(values, identity, division), digest_id=digest_id)
    return Golden(name, identity, bytes(data), values, codecs=tuple(sorted({codec for *_, codec in division})))


def _raw_bf16() -> Golden:
    """The worked example: one layer, one head, two tokens of four values."""
    identity = make_identity(
        "raw-bf16", Shard(0, 1, 0, 1), dtype="bfloat16", tokens=2, head_dim=4, layers=1, kv_heads=1
    )
    return _build("raw-bf16", identity, [(PARTS_KV, 0, 1, "raw")])


def _whole(name: str, dtype: str, codec: str) -> Callable[[], Golden]:
    def make() -> Golden:
        tokens = 64 if dtype.startswith("float8") or codec == "lossless" else 16
        identity = make_identity(name, Shard(0, 2, 0, 2), dtype=dtype, tokens=tokens, head_dim=8, layers=2, kv_heads=2)
        return _build(name, identity, [(PARTS_KV, 0, 1, codec), (PARTS_KV, 1, 2, codec)])

    return make


def _apart_uneven() -> Golden:
    """K and V apart, groups of one and two layers, a shard within the model, three codecs."""
    identity = make_identity("apart-uneven", Shard(2, 5, 1, 3), dtype="float16", tokens=32, head_dim=8)
    division = [(PARTS_K, 2, 3, "planes"), (PARTS_V, 2, 3, "raw"), (PARTS_KV, 3, 5, "planes")]
    return _build("apart-uneven", identity, division)


def _apart_lossless() -> Golden:
    """Codec 1 over K and V apart, and one group that is raw."""
    identity = make_identity("apart-lossless", Shard(1, 4, 0, 3), dtype="bfloat16", tokens=40, head_dim=6)
    division = [(PARTS_K, 1, 3, "lossless"), (PARTS_V, 1, 3, "lossless"), (PARTS_KV, 3, 4, "raw")]
    return _build("apart-lossless", identity, division)


def _digest_256() -> Golden:
    identity = make_identity("digest-256", Shard(0, 1, 0, 2), dtype="bfloat16", tokens=4, head_dim=8)
    return _build("digest-256", identity, [(PARTS_KV, 0, 1, "raw")], digest_id=2)


def _digest_xxh3() -> Golden:
    """Small, and with padding in both sections."""
    identity = make_identity("digest-xxh3", Shard(0, 1, 0, 1), dtype="float16", tokens=3, head_dim=5)
    return _build("digest-xxh3", identity, [(PARTS_K, 0, 1, "raw"), (PARTS_V, 0, 1, "raw")], digest_id=3)


def _digest_xxh3_lengths() -> Golden:
    """Sections of 64 to 1,536 bytes: XXH3 is another algorithm up to 128, 240 and 1,024 bytes, prefix included."""
    name = "digest-xxh3-lengths"
    identity = make_identity(name, Shard(0, 16, 0, 1), dtype="float16", tokens=2, head_dim=16, layers=16)
    apart = [(PARTS_K, 0, 1, "raw"), (PARTS_V, 0, 1, "raw")]
    together = [(PARTS_KV, begin, end, "raw") for begin, end in ((1, 2), (2, 4), (4, 16))]
    return _build(name, identity, apart + together, digest_id=3)


def _authenticated() -> Golden:
    """With a keyed authenticator, which the encoder of this version does not write."""
    identity = make_identity("authenticated", Shard(0, 1, 0, 1), dtype="bfloat16", tokens=4, head_dim=4)
    values = make_values(identity, "authenticated")
    crafted = Crafted(identity, [CraftedSection(data=as_bytes(values))], digest_id=2, mac_key=MAC_KEY)
    return Golden("authenticated", identity, crafted.object(), values, codecs=("raw",))


def _cachegen() -> Golden:
    """Profile 3: a golden payload of codec 5, which gives every decoder the same bits, beside a raw section."""
    name = "cachegen"
    identity = make_identity(name, Shard(0, 4, 0, 2), dtype="bfloat16", tokens=48, head_dim=8, layers=4, kv_heads=2)
    values = make_values(identity, name)
    payload, decoded = ((CACHEGEN / f"bfloat16.{ending}").read_bytes() for ending in ("payload", "decoded"))
    values[:3] = np.frombuffer(decoded, "<u2").reshape(values[:3].shape)
    payloads = [Payload(0, PARTS_KV, 5, 0, 3, payload), Payload(0, PARTS_KV, 0, 3, 4, as_bytes(values[3:]))]
    data, _ = build_object(identity, payloads, profile="cachegen", digest_id=1)
    return Golden(name, identity, bytes(data), values, profile="cachegen", codecs=("cachegen", "raw"))


_MAKERS: Sequence[Callable[[], Golden]] = (
    _raw_bf16,
    _whole("lossless-bf16", "bfloat16", "lossless"),
    _whole("planes-bf16", "bfloat16", "planes"),
    _whole("planes-fp16", "float16", "planes"),
    _whole("planes-fp32", "float32", "planes"),
    _whole("planes-fp8-e4m3", "float8_e4m3fn", "planes"),
    _whole("planes-fp8-e5m2", "float8_e5m2", "planes"),
    _apart_uneven,
    _apart_lossless,
    _digest_256,
    _authenticated,
    _cachegen,
    _digest_xxh3,
    _digest_xxh3_lengths,
)


def identity_to_json(identity: Identity) -> dict[str, Any]:
    layout = identity.layout
    return {
        "namespace": identity.namespace.hex(),
        "key": identity.key.hex(),
        "shard": identity.shard.name,
        "tokens": identity.tokens,
        "layers": layout.layers,
        "kv_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "dtype": layout.dtype,
    }


def identity_from_json(found: Mapping[str, Any]) -> Identity:
    layout = KVLayout(found["layers"], found["kv_heads"], found["head_dim"], found["dtype"])
    namespace, key = bytes.fromhex(found["namespace"]), bytes.fromhex(found["key"])
    return Identity(namespace, key, Shard.parse(found["shard"]), layout, found["tokens"])


def _as_bits(values: np.ndarray[Any, Any], dtype: str) -> Bits:
    """Round towards zero to `dtype`; exact for the values above in all but fp8, where any pattern will do."""
    wide = values.view(np.uint32)
    if dtype == "float32":
        return wide.copy()
    if dtype == "bfloat16":
        return (wide >> 16).astype(np.uint16)
    half = values.astype(np.float16).view(np.uint16)
    if dtype == "float16":
        return half
    return ((half >> 8) if dtype == "float8_e5m2" else (half >> 7 & 0x7F) | (half >> 8 & 0x80)).astype(np.uint8)
