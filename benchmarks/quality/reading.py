"""What readers of a part of an object must read: one tensor-parallel rank of its heads, or the first layers alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from kvstore_s3 import Namespace
from kvstore_s3.bitstream import Header
from kvstore_s3.codec.scalable import SCALABLE
from kvstore_s3.quality import QUALITIES
from quality.ours import Mode, example_object

_FIXED = 12
"""Bytes of a calibrated section in front of its streams' lengths (docs/format-scalable.md, Codec 3)."""


@dataclass(frozen=True, slots=True)
class ReaderCost:
    """Shares of the bytes that a near-lossless reader of everything reads."""

    one_head: float
    """By a rank with one KV head of all: tables, and that head's streams; the mean over heads."""
    first_group: float
    """Before the first layer can be handed over."""
    layer_group: int
    multiplications: int
    """Of the inverse transform, for each value and component that is not always zero: the transform's width."""


def reader_cost(mode: Mode, namespace: Namespace, chunk: torch.Tensor) -> ReaderCost:
    data, header = example_object(mode, namespace, chunk, QUALITIES["near-lossless"])
    heads = namespace.layout.kv_heads
    whole = header.table.object_length
    one = header.table.header_length + sum(
        _bytes_of_one_head(memoryview(data), header, number, heads) for number in range(len(header.table.sections))
    )
    first = [section for section in header.table.sections if section.layer_begin == 0]
    start = header.table.header_length + sum(section.stored_length for section in first)
    layers = first[0].layer_end - first[0].layer_begin
    return ReaderCost(one / whole, start / whole, layers, _width(mode, namespace, layers))


def _bytes_of_one_head(data: memoryview, header: Header, number: int, heads: int) -> float:
    section = header.table.sections[number]
    if section.codec != SCALABLE:
        return section.stored_length
    at = section.offset + (_FIXED if section.level == 0 else 0)
    (length,) = struct.unpack_from("<I", data, at)
    if at + 4 + length == section.offset + section.length:  # one stream for all heads
        return section.stored_length
    lengths = struct.unpack_from(f"<{heads}I", data, at)
    return at - section.offset + 4 * heads + sum(lengths) / heads


def _width(mode: Mode, namespace: Namespace, layers: int) -> int:
    layout = namespace.layout
    head = 2 * layers * layout.head_dim
    span = mode.calibration.span if mode.calibration else "channel"
    return {"channel": 1, "head": layout.head_dim, "group": head, "all": head * layout.kv_heads}[span]
