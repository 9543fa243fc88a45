"""The product's path from page-locked memory to an engine's blocks: `DeviceDecoder.decode`, as loads call it.

Objects of `chunks` chunks lie in the store's arena as they were read, sections one behind the other. Each chunk is
asked for in ranges of `range_bytes` (lossless) or at once (lossy), into the blocks of its own block table. Beside it,
in the same run, the plain copy of the same bytes. Both on the host's clock: it is the host that a load keeps waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_cases import BLOCK_TOKENS, Model, PagedCache, Sections, pick
from gpu_compare import Expected, check_row
from gpu_scalable import FIRST_POSITION, LEVELS, LossySections

from kvstore_s3.arena import PAGE, Arena
from kvstore_s3.codec.calibration import Calibration, Unit
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.jobs import LosslessSection, plan_pieces
from kvstore_s3.codec.device.pieces import Form, Piece, Target
from kvstore_s3.codec.device.pieces import round_up as align
from kvstore_s3.codec.device.scalable_jobs import CodedSection
from kvstore_s3.config import MiB, Settings

ROUNDS = 5
BUDGETS = {"default": Settings.model_fields["device_buffer_bytes"].default, "512 MiB": 512 * MiB}
"""What a store is given of the GPU's memory for loads."""
WAIT = 30.0
"""Seconds for one round, which takes some 30 ms."""

Row = dict[str, Any]
Stored = Sections | LossySections


@dataclass(frozen=True)
class Object:
    """A chunk as it was read: payloads of [groups][levels] in a block of the arena."""

    block: memoryview
    payloads: list[list[memoryview]]


class ProductPath:
    """Objects in page-locked memory, and what is asked for of each. `budget` is the decoder's, in bytes."""

    def __init__(self, decoder: DeviceDecoder, stored: Stored, chunks: int, cache: PagedCache) -> None:
        self._decoder, self._model, self._cache, self.chunks = decoder, stored.model, cache, chunks
        self._device = decoder.device
        on_gpu = self._device.type == "cuda"
        objects = [list(levels_of(stored, chunk)) for chunk in range(chunks)]
        sizes = [sum(align(len(level)) for levels in one for level in levels) for one in objects]
        self._arena = Arena(sum(size + PAGE for size in sizes), pin=on_gpu)
        assert self._arena.pinned == on_gpu, "memory could not be page-locked"
        self.objects = [place(self._arena, size, one) for size, one in zip(sizes, objects, strict=True)]
        begin = time.perf_counter()
        self._asked = [(self._target(chunk), pieces) for chunk in range(chunks) for pieces in self._plan(stored, chunk)]
        self.host_seconds = time.perf_counter() - begin
        self._expected = stored.expect(LEVELS) if isinstance(stored, LossySections) else Expected(stored.values)
        self._copied = torch.empty(max(sizes), dtype=torch.uint8, device=self._device)

    @property
    def bytes_in(self) -> int:
        return sum(len(one.block) for one in self.objects)

    @property
    def bytes_out(self) -> int:
        return self.chunks * self._model.chunk_bytes

    def decode(self) -> None:
        asked = [self._decoder.decode(target, pieces) for target, pieces in self._asked]
        wait(asked, WAIT)  # for all, before one that failed lets its memory go
        for ended in asked:
            ended.result(0)

    def copy(self) -> None:
        """All objects, one after the other to the same place."""
        for one in self.objects:
            source = torch.frombuffer(one.block, dtype=torch.uint8)
            self._copied[: len(source)].copy_(source, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def check(self) -> None:
        """Every section is what it must be. Raises `AssertionError`."""
        self._expected.check(self._cache, self._model, self.chunks)

    def close(self) -> None:
        self.objects.clear()
        self._arena.close()

    def _target(self, chunk: int) -> Target:
        """The blocks of a chunk."""
        pages, per_chunk = self._cache.pages, self._model.tokens // BLOCK_TOKENS
        form = Form(pages.dim, pages.token_stride, pages.head_stride, pages.block_tokens, pages.block_stride)
        planes = self._cache.planes.cpu().numpy().astype(np.uint64).reshape(-1, 2)
        blocks = self._cache.table[chunk * per_chunk : (chunk + 1) * per_chunk].cpu().numpy().astype(np.uint32)
        return Target(planes, form, blocks)

    def _plan(self, stored: Stored, chunk: int) -> Iterator[list[Piece]]:
        """What each call of `decode` gets of a chunk."""
        payloads = self.objects[chunk].payloads
        if isinstance(stored, LossySections):
            yield [self._plan_lossy(stored, group, levels) for group, levels in enumerate(payloads)]
            return
        for groups in ranges_of([len(levels[0]) for levels in payloads], Settings().range_bytes):
            sections = [self._section(group, payloads[group][0]) for group in groups]
            yield plan_pieces(sections, self._decoder.largest)

    def _section(self, group: int, payload: memoryview) -> LosslessSection:
        model = self._model
        return LosslessSection(
            payload,
            section_heads=model.heads,
            head_begin=0,
            heads=model.heads,
            tokens=model.tokens,
            layers=model.group,
            layer_begin=group * model.group,
        )

    def _plan_lossy(self, stored: LossySections, group: int, levels: Sequence[memoryview]) -> Piece:
        """Each layer group has its own part of the calibration, as a model's groups have."""
        model = self._model
        planner, known = self._decoder.scalable, stored.calibration
        assert planner is not None
        first = 0 if known is None else group * model.group
        calibration = known and stored.once(("all groups", model.groups), lambda: repeat_groups(known, model))
        piece = planner.plan(
            CodedSection(
                levels,
                layers=(first, first + model.group),
                first_head=0,
                section_heads=model.heads,
                head_begin=0,
                heads=model.heads,
                tokens=model.tokens,
                head_dim=model.dim,
                layer_begin=group * model.group,
                first_position=FIRST_POSITION,
                object_levels=LEVELS,
                dtype="bfloat16",
                calibration=calibration,
            )
        )
        assert piece is not None, "kernels do not decode these sections"
        return piece


def repeat_groups(known: Calibration, model: Model) -> Calibration:
    """The calibration of one layer group as that of all of a model's: the same numbers, but each group's its own."""

    def copy(unit: Unit) -> Unit:
        assert unit.synthesis is not None
        return replace(
            unit,
            classes=unit.classes.copy(),
            synthesis=unit.synthesis.copy(),
            synthesis_scale=unit.synthesis_scale.copy(),
        )

    return replace(
        known,
        layers=model.layers,
        rotation=replace(known.rotation, rotated=np.tile(known.rotation.rotated, model.groups)),
        mean=np.tile(known.mean, (model.groups, 1, 1, 1)),
        units={
            (group, head): copy(known.units[0, head]) for group in range(model.groups) for head in range(model.heads)
        },
    )


def levels_of(stored: Stored, chunk: int) -> Iterator[list[bytes]]:
    """Payloads of each layer group's levels."""
    for group in range(stored.model.groups):
        payload = stored.payloads[pick(stored.model, len(stored.payloads), chunk, group)]
        yield [payload] if isinstance(payload, bytes) else list(payload)


def place(arena: Arena, size: int, groups: Sequence[Sequence[bytes]]) -> Object:
    """Lay an object's sections one behind the other."""
    block = arena.allocate(size)
    assert block is not None
    at = 0
    found: list[list[memoryview]] = []
    for levels in groups:
        found.append([])
        for level in levels:
            block[at : at + len(level)] = level
            found[-1].append(block[at : at + len(level)])
            at += align(len(level))
    return Object(block, found)


def ranges_of(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Sections that are read together: as many as `most` bytes hold, one at least."""
    first = total = 0
    for number, size in enumerate(sizes):
        if number > first and total + size > most:
            yield range(first, number)
            first, total = number, 0
        total += size
    yield range(first, len(sizes))


def measure_product(decoder: DeviceDecoder, stored: Stored, chunks: int) -> Row:
    """`share_of_copy` is the plain copy's time by that of decoding. Raises `AssertionError` where values are wrong."""
    cache = PagedCache(stored.model, chunks, decoder.device)
    path = ProductPath(decoder, stored, chunks, cache)
    try:
        copy = wall(path.copy, decoder.device)
        whole = wall(path.decode, decoder.device, cache.spoil)
        row = describe(path, copy, whole)
        check_row(row, path.check)
    finally:
        path.close()
    return row


def describe(path: ProductPath, copy: float, whole: float) -> Row:
    return {
        "chunks": path.chunks,
        "milliseconds": whole * 1e3,
        "compressed_gb_s": path.bytes_in / whole / 1e9,
        "bf16_gb_s": path.bytes_out / whole / 1e9,
        "copy_alone_gb_s": path.bytes_in / copy / 1e9,
        "share_of_copy": copy / whole,
        "host_plan_ms": path.host_seconds * 1e3,
    }


def wall(work: Callable[[], None], device: torch.device, prepare: Callable[[], None] | None = None) -> float:
    """The median of some rounds on the host's clock, after one that does not count; `work` waits for what it queued."""
    taken = []
    for _ in range(ROUNDS + 1 if device.type == "cuda" else 2):
        if prepare is not None:
            prepare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return median(taken[1:])
