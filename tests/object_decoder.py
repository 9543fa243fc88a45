"""Whole objects through the package's own parts, in the order that `docs/FORMAT.md` lays down."""

from __future__ import annotations

import numpy as np
from reference_decoder import Expected

from kvstore_s3.bitstream import PARTS_K, PARTS_V, Identity, parse_header
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.registry import codec_for
from kvstore_s3.layout import DTYPES

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_KINDS = {PARTS_K: slice(0, 1), PARTS_V: slice(1, 2)}


def decode_object(data: bytes, identity: Identity) -> Bits:
    """Bit patterns [layers, 2, tokens, heads, head_dim] of a whole object."""
    header = parse_header(data, identity)
    header.table.check_object_length(len(data))
    layout, shard = identity.layout, identity.shard
    out = np.zeros((shard.layers, 2, identity.tokens, shard.heads, layout.head_dim), dtype=_BITS[layout.itemsize])
    for number, section in enumerate(header.table.sections):
        payload = header.verify(number, memoryview(data)[section.offset : section.end])
        layers = slice(section.layer_begin - shard.layer_begin, section.layer_end - shard.layer_begin)
        target = out[layers, _KINDS.get(section.parts, slice(0, 2))]
        codec = codec_for(section.codec, layout.dtype)
        codec.decode(payload, target, head_begin=0, section_heads=shard.heads)
    return out


def to_reference(identity: Identity) -> Expected:
    """The same expectation for the reference decoder."""
    shard, layout = identity.shard, identity.layout
    ranges = (shard.layer_begin, shard.layer_end, shard.head_begin, shard.head_end)
    dtype = DTYPES[layout.dtype].id
    return Expected(identity.namespace, identity.key, *ranges, identity.tokens, layout.head_dim, dtype)
