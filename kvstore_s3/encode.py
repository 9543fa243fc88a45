"""From the KV of one chunk to the bytes of its object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_s3.bitstream import PARTS_KV, Identity, Payload, SectionTable, build_object
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.registry import encode_cachegen_section, encode_section
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import LEVELS, encode_scalable
from kvstore_s3.quality import Quality

_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the chunks of one save are coded.

    `layer_group` layers make a section, unless `calibration` (with its digest) brings its own number. Both it and
    `rotation`, which says how K was rotated, are for scalable objects alone; without a calibration these are coded on
    the scales of each chunk.
    """

    quality: Quality
    layer_group: int
    rotation: Rotation
    calibration: tuple[bytes, Calibration] | None = None
    levels: int = LEVELS
    """Of a scalable object: fewer where the values themselves are of a lower quality."""

    @property
    def section_layers(self) -> int:
        """Layers of a section."""
        return self.calibration[1].layer_group if self.calibration else self.layer_group

    @property
    def calibrated(self) -> bool | None:
        """Whether scalable objects are coded with a calibration; None for other profiles."""
        return self.calibration is not None if self.quality.object_profile == "scalable" else None


def view_bits(kv: torch.Tensor) -> Bits:
    """The bit patterns of a CPU tensor, sharing its memory."""
    bits: Bits = kv.view(_BITS[kv.element_size()]).numpy()
    return bits


def encode_object(
    identity: Identity, kv: torch.Tensor, encoding: Encoding, first_token: int
) -> tuple[bytearray, SectionTable]:
    """Encode one chunk [layers, 2, tokens, heads, dim] into an object.

    `first_token` is the position of the chunk's first token in its prompt.
    """
    kv = kv.detach().cpu()
    kv = kv if _rows_contiguous(kv) else kv.contiguous()
    ranges = layer_ranges(0, len(kv), encoding.section_layers)
    groups = [ValueGroup(begin, end, kv[begin:end]) for begin, end in ranges]
    return complete_object(identity, CodedChunk(encoding, first_token, groups))


@dataclass(frozen=True, slots=True)
class CodedGroup:
    """Layers `begin` to `end` of a chunk, the first of its shard being 0: codec id and payload of each level."""

    begin: int
    end: int
    levels: Sequence[tuple[int, bytes]]


@dataclass(frozen=True, slots=True, eq=False)
class ValueGroup:
    """The same, to be coded: `values` [layers, 2, tokens, heads, dim] on the host, each token's rows dense."""

    begin: int
    end: int
    values: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CodedChunk:
    """One chunk whose first token is at position `first_token`, its layers in order, some of them coded already."""

    encoding: Encoding
    first_token: int
    groups: Sequence[CodedGroup | ValueGroup]


def layer_ranges(begin: int, end: int, group: int) -> list[tuple[int, int]]:
    """Layers cut into groups of so many; the last may have fewer."""
    return [(first, min(first + group, end)) for first in range(begin, end, group)]


def complete_object(identity: Identity, chunk: CodedChunk) -> tuple[bytearray, SectionTable]:
    """The object of a chunk: what is not coded yet is."""
    groups = []
    for group in chunk.groups:
        if isinstance(group, ValueGroup):
            begin, end, bits = group.begin, group.end, view_bits(group.values)
            first = identity.shard.layer_begin + begin
            levels = _encode_levels(bits, identity, chunk.encoding, first, chunk.first_token)
            group = CodedGroup(begin, end, levels)
        groups.append(group)
    return _assemble(identity, groups, chunk.encoding)


def _assemble(identity: Identity, groups: Sequence[CodedGroup], encoding: Encoding) -> tuple[bytearray, SectionTable]:
    """The object of one chunk whose layer groups have been coded."""
    levels: list[list[Payload]] = []
    first = identity.shard.layer_begin
    for group in groups:
        for level, (codec_id, data) in enumerate(group.levels):
            if level == len(levels):
                levels.append([])
            levels[level].append(Payload(level, PARTS_KV, codec_id, first + group.begin, first + group.end, data))
    return build_object(
        identity,
        [payload for level in levels for payload in level],
        profile=encoding.quality.object_profile,
        calibration=encoding.calibration[0] if encoding.calibration else None,
    )


def _encode_levels(
    values: Bits, identity: Identity, encoding: Encoding, layer_begin: int, first_token: int
) -> Sequence[tuple[int, bytes]]:
    """Codec id and payload of each level of one section."""
    dtype, profile = identity.layout.dtype, encoding.quality.object_profile
    if profile == "scalable":
        return encode_scalable(
            values,
            dtype,
            layer_begin=layer_begin,
            first_position=first_token,
            calibration=encoding.calibration[1] if encoding.calibration else None,
            rotation=encoding.rotation,
            levels=encoding.levels,
            first_head=identity.shard.head_begin,
        )
    if profile == "cachegen":
        return [encode_cachegen_section(values, dtype, layer_begin=layer_begin, model_layers=identity.layout.layers)]
    return [encode_section(values, dtype)]


def _rows_contiguous(kv: torch.Tensor) -> bool:
    heads_stride, dim_stride = kv.stride()[3:]
    return dim_stride == 1 and heads_stride == kv.shape[4]
