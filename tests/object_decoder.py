"""Whole objects through the package's own parts, in the order that `docs/FORMAT.md` lays down."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from reference_decoder import Expected

from kvstore_s3.bitstream import PROFILES, Identity, parse_header
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.layout import DTYPES
from kvstore_s3.load import decode_section
from kvstore_s3.section_index import LOSSLESS
from kvstore_s3.transfer.ranges import group_levels

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
ALL_PROFILES = frozenset(PROFILES)


def decode_object(
    data: bytes,
    identity: Identity,
    profiles: frozenset[str] = LOSSLESS,
    *,
    calibrations: Mapping[bytes, Calibration] = {},
    levels: int = 3,
    first_token: int | None = None,
) -> Bits:
    """Bit patterns [layers, 2, tokens, heads, head_dim] of a whole object, from its first `levels` levels."""
    header = parse_header(data, identity, profiles=profiles, calibrations=set(calibrations))
    header.table.check_object_length(len(data))
    layout, shard = identity.layout, identity.shard
    out = np.zeros((shard.layers, 2, identity.tokens, shard.heads, layout.head_dim), dtype=_BITS[layout.itemsize])
    numbers = [number for number, section in enumerate(header.table.sections) if section.level < levels]
    calibration = None if header.calibration is None else calibrations[header.calibration]
    for place in group_levels(header.table, numbers):
        payloads = []
        for number in place:
            section = header.table.sections[number]
            payloads.append(header.verify(number, memoryview(data)[section.offset : section.end]))
        base = header.table.sections[place[0]]
        target = out[base.layer_begin - shard.layer_begin : base.layer_end - shard.layer_begin]
        decode_section(header, place, payloads, target, first_token, calibration)
    return out


def to_reference(identity: Identity, first_position: int | None = None) -> Expected:
    """The same expectation for the reference decoder."""
    shard, layout = identity.shard, identity.layout
    ranges = (shard.layer_begin, shard.layer_end, shard.head_begin, shard.head_end)
    dtype = DTYPES[layout.dtype].id
    return Expected(identity.namespace, identity.key, *ranges, identity.tokens, layout.head_dim, dtype, first_position)
