"""From the KV of one chunk to the bytes of its object."""

from __future__ import annotations

import torch

from kvstore_s3.bitstream import PARTS_KV, Identity, Payload, SectionTable, build_object
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.registry import encode_section

_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def view_bits(kv: torch.Tensor) -> Bits:
    """The bit patterns of a CPU tensor, sharing its memory."""
    bits: Bits = kv.view(_BITS[kv.element_size()]).numpy()
    return bits


def encode_object(identity: Identity, kv: torch.Tensor, layer_group: int) -> tuple[bytearray, SectionTable]:
    """Encode one chunk [layers, 2, tokens, heads, dim] into an object of sections of `layer_group` layers."""
    kv = kv.detach().cpu()
    bits = view_bits(kv if _rows_contiguous(kv) else kv.contiguous())
    payloads = []
    shard = identity.shard
    for begin in range(shard.layer_begin, shard.layer_end, layer_group):
        end = min(begin + layer_group, shard.layer_end)
        values = bits[begin - shard.layer_begin : end - shard.layer_begin]
        codec_id, data = encode_section(values, identity.layout.dtype)
        payloads.append(Payload(0, PARTS_KV, codec_id, begin, end, data))
    return build_object(identity, payloads)


def _rows_contiguous(kv: torch.Tensor) -> bool:
    heads_stride, dim_stride = kv.stride()[3:]
    return dim_stride == 1 and heads_stride == kv.shape[4]
