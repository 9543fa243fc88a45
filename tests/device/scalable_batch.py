"""Sections of codec 3 for the device: what a test has in bytes becomes a batch, and pages with canaries around them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from device.emulated import Buffer, Device

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.library import Pages
from kvstore_s3.codec.device.scalable_calls import (
    ScalableCalls,
    ScalableJobs,
    ScalableSection,
    ScalableTotals,
    ScalableUnit,
    join_totals,
)
from kvstore_s3.codec.rotation import STYLES, Rotation
from kvstore_s3.codec.tables import uncalibrated_tables
from kvstore_s3.layout import DTYPES

CANARY = 0xA5
BLOCK_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Given:
    """One section: its payloads as far as they are read, and what its reader knows. Shapes as in decode_scalable."""

    payloads: Sequence[bytes]
    layers: tuple[int, int]
    heads: int
    tokens: int
    token_begin: int = 0
    head_begin: int = 0
    head_end: int = 0
    """0: all."""
    first_head: int = 0
    first_position: int | None = 256
    object_levels: int | None = None
    skew: int = 0
    """Where the payloads begin on the device, from a multiple of 4 on."""

    @property
    def wanted(self) -> slice:
        return slice(self.head_begin, self.head_end or self.heads)


@dataclass(slots=True)
class Decoded:
    """What came of a batch: `values` [layers, 2, tokens, heads, dim]; the verdict of each section; the scratch."""

    values: Bits
    faults: list[int]
    jobs: ScalableJobs
    numbers: npt.NDArray[np.int16]
    order: npt.NDArray[np.uint32]
    elsewhere_untouched: bool


class Pool:
    """Blocks of a paged cache on the device, in no order, [layer][kind] planes one after the other."""

    def __init__(self, device: Device, shape: tuple[int, int, int, int], item_bytes: int, *, paged: bool) -> None:
        layers, tokens, heads, dim = self.shape = shape
        self._item, self._paged = item_bytes, paged
        block_tokens = BLOCK_TOKENS if paged else tokens
        used = -(-tokens // block_tokens)
        self._blocks = 2 * used + 1 if paged else 1
        self._table = np.random.default_rng(3).permutation(self._blocks)[:used].astype(np.uint32)
        plane = self._blocks * block_tokens * heads * dim
        self._memory = device.put(np.full(layers * 2 * plane * item_bytes, CANARY, np.uint8))
        planes = self._memory.address + np.arange(layers * 2, dtype=np.uint64) * np.uint64(plane * item_bytes)
        self._kept = [device.put(planes), device.put(self._table)]
        self.pages = Pages(
            planes=self._kept[0].address,
            block_table=self._kept[1].address if paged else 0,
            block_tokens=block_tokens if paged else 0,
            dim=dim,
            block_stride=block_tokens * heads * dim,
            token_stride=heads * dim,
            head_stride=dim,
        )
        self._block_tokens = block_tokens

    def read(self) -> tuple[Bits, bool]:
        """The values, and whether all blocks that are not in the table are as they were."""
        layers, tokens, heads, dim = self.shape
        whole = np.frombuffer(self._memory.read(), f"<u{self._item}")
        whole = whole.reshape(layers, 2, self._blocks, self._block_tokens, heads, dim)
        values = whole[:, :, self._table].reshape(layers, 2, -1, heads, dim)
        others = np.delete(whole, self._table, axis=2).tobytes() + values[:, :, tokens:].tobytes()
        return values[:, :, :tokens].copy(), others == bytes([CANARY]) * len(others)


@dataclass
class Batch:
    """Decodes sections of one calibration (or of none) on a device, all in one call."""

    device: Device
    dim: int
    dtype: str
    calibration: Calibration | None = None
    kept: list[Any] = field(default_factory=list)
    units: dict[tuple[int, int], ScalableUnit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = ScalableCalls(self.device.library)
        self.tables = uncalibrated_tables() if self.calibration is None else self.calibration.tables
        self._packed = self.put(self.calls.pack_tables(self.tables))

    def put(self, data: npt.NDArray[Any] | bytes, *, align: int = 16, skew: int = 0) -> int:
        """The address of a copy on the device."""
        buffer: Buffer = self.device.put(data, align=align, skew=skew)
        self.kept.append(buffer)
        return buffer.address

    def decode(
        self,
        sections: Sequence[Given],
        shape: tuple[int, int, int, int],
        *,
        paged: bool = True,
        apart: bool = False,
    ) -> Decoded:
        """`shape`: layers, tokens, heads of the pages, and the layer that they begin with.

        `apart`: each section is parsed by itself.
        """
        layers, tokens, heads, layer_base = shape
        pool = Pool(self.device, (layers, tokens, heads, self.dim), DTYPES[self.dtype].itemsize, paged=paged)
        described = [self.describe(given, layer_base) for given in sections]
        parsed = join([self.calls.parse([one]) for one in described]) if apart else self.calls.parse(described)
        numbers = self.device.put(np.full(max(parsed.totals.numbers, 1), -21931, np.int16))
        order = self.device.put(np.full(max(parsed.totals.order, 1), 0xA5A5A5A5, np.uint32))
        verdicts = self.device.put(np.full(max(parsed.totals.jobs, 1), 77, np.uint32))
        self.run(parsed.totals, parsed.jobs, pool, numbers, order, verdicts)
        values, untouched = pool.read()
        of_jobs = np.frombuffer(verdicts.read(), np.uint32)
        faults = parsed.faults.tolist()
        for index, (begin, end) in enumerate(zip(parsed.first_jobs[:-1], parsed.first_jobs[1:], strict=True)):
            faults[index] = faults[index] or int(of_jobs[begin:end].max(initial=0))
        found = np.frombuffer(numbers.read(), np.int16), np.frombuffer(order.read(), np.uint32)
        return Decoded(values, faults, parsed, *found, untouched)

    def run(
        self,
        totals: ScalableTotals,
        jobs: npt.NDArray[np.void],
        pool: Pool,
        numbers: Buffer,
        order: Buffer,
        verdicts: Buffer,
    ) -> None:
        self.calls.decode(
            self.put(jobs),
            totals,
            pool.pages,
            dtype_id=DTYPES[self.dtype].id,
            numbers=numbers.address,
            order=order.address,
            faults=verdicts.address,
            stream=self.device.stream,
        )

    def describe(self, given: Given, layer_base: int = 0) -> ScalableSection:
        begin, end = given.layers
        section = ScalableSection(
            units=0,
            tables=self._packed,
            first_position=-1 if given.first_position is None else given.first_position,
            levels=len(given.payloads),
            object_levels=given.object_levels or 0,
            tokens=given.tokens,
            heads=given.heads,
            dim=self.dim,
            head_begin=given.wanted.start,
            head_end=given.wanted.stop,
            token_begin=given.token_begin,
            layer_begin=begin - layer_base,
            head=given.wanted.start,
            layers=end - begin,
            item_bytes=DTYPES[self.dtype].itemsize,
        )
        section.first[:] = self.tables.first
        for level, payload in enumerate(given.payloads):
            host = np.frombuffer(bytes(payload) + b"\0", np.uint8)  # never of length 0
            self.kept.append(host)
            section.payload[level] = host.ctypes.data
            section.device[level] = self.put(bytes(payload), align=4, skew=given.skew)
            section.lengths[level] = len(payload)
        if self.calibration is not None:
            self._set_units(section, given)
        self._set_angles(section, given)
        return section

    def _set_units(self, section: ScalableSection, given: Given) -> None:
        calibration = self.calibration
        assert calibration is not None
        group = given.layers[0] // calibration.layer_group
        count = 1 if calibration.span == "all" else given.heads
        units = (ScalableUnit * count)(*(self._unit(group, given.first_head + head) for head in range(count)))
        self.kept.append(units)
        section.units = ctypes.addressof(units)
        section.span = SPANS.index(calibration.span)
        section.style = calibration.rotation.style_id
        section.rotated = self.put(np.ascontiguousarray(calibration.rotation.select(*given.layers)))

    def _unit(self, group: int, head: int) -> ScalableUnit:
        if (group, head) not in self.units:
            calibration = self.calibration
            assert calibration is not None
            unit = calibration.units[group, head]
            self.kept.append(unit.classes)
            self.units[group, head] = ScalableUnit(
                host_classes=unit.classes.ctypes.data,
                classes=self.put(unit.classes),
                mean=self.put(calibration.unit_mean(group, head)),
                scale=self.put(unit.synthesis_scale),
                matrix=0 if unit.synthesis is None else self.put(unit.synthesis),
                components=len(unit.classes),
                matrix_bytes=0 if unit.synthesis is None else unit.synthesis.itemsize,
                largest_scale=float(np.abs(unit.synthesis_scale).max()),
            )
        return self.units[group, head]

    def _set_angles(self, section: ScalableSection, given: Given) -> None:
        fault, header = self.calls.read_header(section)
        if fault:
            return
        if self.calibration is not None:
            rotation = self.calibration.rotation
        else:
            at = header.frequencies_at
            stored = np.frombuffer(given.payloads[0][at : at + 4 * header.pairs], "<f4")
            rotation = Rotation(STYLES[header.style], stored.astype(np.float32), np.zeros(0, np.uint8))
        section.pairs = len(rotation.inverse_frequencies)
        if section.pairs:
            cosines, sines = rotation.tables(header.first_position, given.tokens)
            section.cosines, section.sines = self.put(cosines), self.put(sines)


def join(parts: Sequence[ScalableJobs]) -> ScalableJobs:
    """One batch of several."""
    totals = join_totals([part.totals for part in parts])
    jobs = [part.jobs.copy() for part in parts]
    for index, part in enumerate(parts):
        for later in jobs[index + 1 :]:
            later["numbers"] += np.uint64(part.totals.numbers)
            later["order"] += np.uint64(part.totals.order)
    first_jobs = np.cumsum([0, *(part.totals.jobs for part in parts)]).astype(np.uint32)
    return ScalableJobs(np.concatenate(jobs), totals, first_jobs, np.concatenate([part.faults for part in parts]))


def numbers_of(decoded: Decoded, job: int) -> Iterator[tuple[int, npt.NDArray[np.int16]]]:
    """(component, its numbers [tokens]) of a job, in coding order."""
    fields = decoded.jobs.jobs[job]
    tokens, first = int(fields["tokens"]), int(fields["numbers"])
    octets = -(-tokens // 8)
    for c in range(fields["coded"][fields["levels"] - 1]):
        begin = first + c // 32 * 256 * octets
        block = decoded.numbers[begin : begin + 256 * octets].reshape(octets, 32, 8)
        assert not block[:, c % 32].reshape(-1)[tokens:].any()
        yield int(decoded.order[int(fields["order"]) + c]) & 0xFFFF, block[:, c % 32].reshape(-1)[:tokens]
