"""Loads into device memory: checksums on the host, then kernels. What these cannot do is decoded here and copied."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from kvstore_s3.bitstream import PARTS_KV, PROFILES, Header, Section
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.jobs import LosslessSection, plan_pieces
from kvstore_s3.codec.device.pieces import Piece, Target, find_target
from kvstore_s3.codec.device.requests import Copy, Deed, OnQueued
from kvstore_s3.codec.device.scalable_jobs import CodedSection
from kvstore_s3.codec.device.sources import Memory
from kvstore_s3.codec.device.streams import Mark
from kvstore_s3.codec.scalable import SCALABLE
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import Shard
from kvstore_s3.load import HALVES, decode_section, in_thread, verify_range
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.quality import LOSSY_DTYPES
from kvstore_s3.transfer.ranges import BandRange, group_levels

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration


Device: TypeAlias = torch.device | str | DeviceDecoder
"""A device's name, or the caller's own decoder for one."""


class DeviceMemory(Memory, Protocol):
    """Memory that is loaded to."""

    def copy_from(self, values: torch.Tensor, layer_begin: int, halves: slice) -> Deed:
        """The deed that writes `values` [some layers, K or V or both, tokens, heads, dim] from `layer_begin` on."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorMemory:
    """A tensor [layers, 2, tokens, heads, dim], or a part of one."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def __getitem__(self, index: Any) -> TensorMemory:
        return TensorMemory(self.values[index])

    def target(self) -> Target:
        values = self.values
        return find_target(values.data_ptr(), values.shape, values.stride(), values.element_size())

    def gather(self, out: torch.Tensor) -> None:
        """Queue the copy into `out`, of this shape."""
        out.copy_(self.values, non_blocking=True)

    def copy_from(self, values: torch.Tensor, layer_begin: int, halves: slice) -> Deed:
        return Copy(values, self.values[layer_begin : layer_begin + len(values), halves])


Ready = Callable[[], Awaitable[Mark | None]]
"""Waits until memory may be written to; gives the mark in the device's queue from which on."""


@dataclass(frozen=True, slots=True)
class DevicePlace:
    """Where values are decoded to: memory of the decoder's device.

    `after` says from where on in the device's queue it may be written to, or `ready` does, once it is known.
    `on_queued` hears of what is being decoded there.
    """

    memory: DeviceMemory
    decoder: DeviceDecoder
    after: Mark | None = None
    ready: Ready | None = None
    on_queued: OnQueued | None = None

    @classmethod
    def of(cls, values: torch.Tensor, decoder: DeviceDecoder) -> DevicePlace:
        """The place that is all of `values`, which the calling thread has allocated."""
        return cls(TensorMemory(values), decoder, decoder.mark_current())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.memory.shape

    def __getitem__(self, index: Any) -> DevicePlace:
        return replace(self, memory=self.memory[index])

    async def decode_band(
        self,
        threads: Executor,
        header: Header,
        first_token: int,
        calibration: Calibration | None,
        wanted: Shard,
        pieces: Sequence[tuple[BandRange, memoryview]],
    ) -> None:
        """As `load.decode_band`, into this place, which is the rectangle `wanted`."""
        work = (self, header, first_token, calibration, wanted, pieces)
        streams, copies = await in_thread(threads, _plan_band, *work)
        after = self.after if self.ready is None else await self.ready()
        target = self.memory.target()
        decoding = self.decoder.decode(target, streams, copies, after=after, on_queued=self.on_queued)
        await finish(asyncio.wrap_future(decoding), on_cancel=decoding.cancel)


def _plan_band(
    place: DevicePlace,
    header: Header,
    first_token: int,
    calibration: Calibration | None,
    wanted: Shard,
    pieces: Sequence[tuple[BandRange, memoryview]],
) -> tuple[list[Piece], list[Deed]]:
    """Verify the sections in `pieces`; what the device is to decode, and what it is to be given decoded."""
    streams: list[Piece] = []
    rest: dict[int, memoryview] = {}
    for part, data in pieces:
        payloads = verify_range(header, part, data)
        sections = []
        for number, payload in payloads.items():
            section = header.table.sections[number]
            if _is_for_device(place.decoder, header, section, wanted, len(payload)):
                sections.append(_lossless_section(header, section, wanted, payload))
            else:
                rest[number] = payload
        streams += plan_pieces(sections, place.decoder.largest)
    copies: list[Deed] = []
    for numbers in group_levels(header.table, list(rest)):
        stored = [rest[number] for number in numbers]
        piece = _plan_scalable(place, header, numbers, stored, first_token, calibration, wanted)
        if piece is not None:
            streams.append(piece)
            continue
        copies.append(_decode_here(place, header, numbers, stored, first_token, calibration, wanted))
    return streams, copies


def _is_for_device(decoder: DeviceDecoder, header: Header, section: Section, wanted: Shard, size: int) -> bool:
    if header.table.profile == PROFILES["scalable"] or not _is_within(section, wanted):
        return False
    return decoder.takes(section.codec, header.identity.layout.dtype, size)


def _is_within(section: Section, wanted: Shard) -> bool:
    return wanted.layer_begin <= section.layer_begin and section.layer_end <= wanted.layer_end


def _lossless_section(header: Header, section: Section, wanted: Shard, payload: memoryview) -> LosslessSection:
    halves = HALVES[section.parts]
    return LosslessSection(
        payload,
        section_heads=header.identity.shard.heads,
        head_begin=wanted.head_begin - header.identity.shard.head_begin,
        heads=wanted.heads,
        tokens=header.identity.tokens,
        layers=section.layers,
        layer_begin=section.layer_begin - wanted.layer_begin,
        kinds=halves.stop - halves.start,
        kind_begin=halves.start,
    )


def _plan_scalable(
    place: DevicePlace,
    header: Header,
    numbers: Sequence[int],
    payloads: Sequence[memoryview],
    first_token: int,
    calibration: Calibration | None,
    wanted: Shard,
) -> Piece | None:
    """What the device is to decode of the levels of one section; None where the CPU is to."""
    planner, identity = place.decoder.scalable, header.identity
    sections = [header.table.sections[number] for number in numbers]
    base = sections[0]
    coded = header.table.profile == PROFILES["scalable"] and all(one.codec == SCALABLE for one in sections)
    if planner is None or not coded or base.parts != PARTS_KV or not _is_within(base, wanted):
        return None
    if identity.layout.dtype not in LOSSY_DTYPES:
        return None
    given = CodedSection(
        payloads,
        layers=(base.layer_begin, base.layer_end),
        first_head=identity.shard.head_begin,
        section_heads=identity.shard.heads,
        head_begin=wanted.head_begin - identity.shard.head_begin,
        heads=wanted.heads,
        tokens=identity.tokens,
        head_dim=identity.layout.head_dim,
        layer_begin=base.layer_begin - wanted.layer_begin,
        first_position=first_token,
        object_levels=header.table.sections[-1].level + 1,
        dtype=identity.layout.dtype,
        calibration=calibration,
    )
    piece = planner.plan(given)
    return piece if piece is not None and piece.data_bytes <= place.decoder.largest else None


def _decode_here(
    place: DevicePlace,
    header: Header,
    numbers: Sequence[int],
    payloads: Sequence[memoryview],
    first_token: int,
    calibration: Calibration | None,
    wanted: Shard,
) -> Deed:
    """Decode the levels of one place on the host, all of its layers; give what of it is wanted to the device."""
    section = header.table.sections[numbers[0]]
    whole = place.decoder.staging((section.layers, *place.shape[1:]), place.memory.dtype)
    head_begin = wanted.head_begin - header.identity.shard.head_begin
    decode_section(header, numbers, payloads, view_bits(whole), first_token, calibration, head_begin=head_begin)
    halves = HALVES[section.parts]
    begin, end = max(section.layer_begin, wanted.layer_begin), min(section.layer_end, wanted.layer_end)
    decoded = whole[begin - section.layer_begin : end - section.layer_begin, halves]
    return place.memory.copy_from(decoded, begin - wanted.layer_begin, halves)
