"""From verified payloads of codec 3 to what the kernels are told, and calibrations in the device's memory.

What is damaged, or nothing for a device, is not planned: the CPU decodes it, or says what is wrong with it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.library import Library, Pages
from kvstore_s3.codec.device.pieces import Jobs, Piece, Places, Run, Scratch, address_of, place_in
from kvstore_s3.codec.device.scalable_calls import (
    ScalableCalls,
    ScalableSection,
    ScalableUnit,
    join_totals,
)
from kvstore_s3.codec.rotation import STYLES, Rotation
from kvstore_s3.codec.scalable import find_group
from kvstore_s3.codec.tables import TableSet, uncalibrated_tables
from kvstore_s3.layout import DTYPES

_ANGLES = 64
"""Tables of angles that are kept: one for each chunk of a prompt, which all of its sections share."""


@dataclass(frozen=True, slots=True, eq=False)
class CodedSection:
    """The first levels of one section of codec 3, verified, of which `heads` from `head_begin` on are wanted.

    `layers` and `first_head` are the section's place in the model, `layer_begin` its first layer in the target.
    """

    payloads: Sequence[memoryview]
    layers: tuple[int, int]
    first_head: int
    section_heads: int
    head_begin: int
    heads: int
    tokens: int
    head_dim: int
    layer_begin: int
    first_position: int
    object_levels: int
    dtype: str
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class ScalableWork:
    """Jobs are `KvsScalableJob`; those of one dtype and table set go together."""

    calls: ScalableCalls
    dtype_id: int
    tables: int

    def addresses(self, jobs: Jobs) -> npt.NDArray[np.uint64]:
        found: npt.NDArray[np.uint64] = jobs["addresses"]
        return found

    def move_scratch(self, jobs: Jobs, by: Scratch) -> None:
        jobs["numbers"] += np.uint64(by.numbers)
        jobs["order"] += np.uint64(by.order)

    def launch(
        self, library: Library, pieces: Sequence[Piece], pages: Pages, places: Places, faults: int, stream: int
    ) -> None:
        self.calls.decode(
            places.jobs,
            join_totals([piece.totals for piece in pieces]),
            pages,
            dtype_id=self.dtype_id,
            numbers=places.numbers,
            order=places.order,
            faults=faults,
            stream=stream,
        )


@dataclass(slots=True)
class _Prepared:
    """Tables, and what was needed so far of a calibration, on the device. `held` keeps it there."""

    first: tuple[int, int, int]
    tables: int
    held: list[object]
    units: dict[tuple[int, int], ScalableUnit] = field(default_factory=dict)
    rotated: dict[int, int] = field(default_factory=dict)


class ScalablePlanner:
    """Plans sections of codec 3. `put` copies an array to the device, `pin` to where it can be copied from at once.
    For several threads.

    Calibrations stay on the device, beside the decoder's budget, for as long as somebody has them.
    """

    def __init__(
        self,
        calls: ScalableCalls,
        put: Callable[[npt.NDArray[np.generic]], torch.Tensor],
        pin: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]],
    ) -> None:
        self._calls = calls
        self._put = put
        self._find_angles = lru_cache(_ANGLES)(partial(_pin_angles, pin))
        self._calibrated: WeakKeyDictionary[Calibration, _Prepared] = WeakKeyDictionary()
        self._uncalibrated: _Prepared | None = None
        self._lock = threading.Lock()

    def plan(self, given: CodedSection) -> Piece | None:
        """The jobs of a section, one for each stream; None: the CPU is to decode it, or to refuse it."""
        held: list[object] = []
        section = self._describe(given, held)
        if section is None:
            return None
        runs = [Run(address_of(payload), len(payload)) for payload in given.payloads]
        for level, run in enumerate(runs):
            section.payload[level], section.lengths[level] = run.address, run.length
            section.device[level] = place_in(level)
        if not self._add_angles(section, given, runs):
            return None
        parsed = self._calls.parse([section])
        if parsed.faults.any():
            return None
        work = ScalableWork(self._calls, DTYPES[given.dtype].id, section.tables)
        totals = parsed.totals
        return Piece(tuple(runs), parsed.jobs, work, Scratch(totals.numbers, totals.order), totals)

    def _describe(self, given: CodedSection, held: list[object]) -> ScalableSection | None:
        """What is known of a section beside its payloads; None where it is not one of its calibration's.

        `held` gets what must stay as long as the section is used.
        """
        begin, end = given.layers
        section = ScalableSection(
            first_position=given.first_position,
            levels=len(given.payloads),
            object_levels=given.object_levels,
            tokens=given.tokens,
            heads=given.section_heads,
            dim=given.head_dim,
            head_begin=given.head_begin,
            head_end=given.head_begin + given.heads,
            layer_begin=given.layer_begin,
            layers=end - begin,
            item_bytes=DTYPES[given.dtype].itemsize,
        )
        with self._lock:
            prepared = self._prepare(given.calibration)
            section.tables = prepared.tables
            section.first[:] = prepared.first
            if given.calibration is not None:
                return self._add_units(section, given, given.calibration, prepared, held)
        return section

    def _add_units(
        self,
        section: ScalableSection,
        given: CodedSection,
        calibration: Calibration,
        prepared: _Prepared,
        held: list[object],
    ) -> ScalableSection | None:
        begin, end = given.layers
        group = find_group(calibration, begin, end - begin, given.first_head, given.section_heads)
        if group is None:
            return None
        count = 1 if calibration.span == "all" else given.section_heads
        heads = range(given.first_head, given.first_head + count)
        units = (ScalableUnit * count)(*(self._unit(calibration, group, head, prepared) for head in heads))
        section.units = ctypes.addressof(units)
        held.append(units)
        section.span = SPANS.index(calibration.span)
        section.style = calibration.rotation.style_id
        if group not in prepared.rotated:
            prepared.rotated[group] = self._hold(prepared, calibration.rotation.select(begin, end))
        section.rotated = prepared.rotated[group]
        return section

    def _add_angles(self, section: ScalableSection, given: CodedSection, runs: list[Run]) -> bool:
        """K's angles, as two more runs. False where the header of level 0 is not sound."""
        fault, header = self._calls.read_header(section)
        if fault:
            return False
        if given.calibration is not None:
            rotation = given.calibration.rotation
        else:
            at = header.frequencies_at
            frequencies = np.frombuffer(given.payloads[0][at : at + 4 * header.pairs], "<f4").astype(np.float32)
            rotation = Rotation(STYLES[header.style], frequencies, np.zeros(0, np.uint8))
        section.pairs = len(rotation.inverse_frequencies)
        if section.pairs:
            section.cosines, section.sines = place_in(len(runs)), place_in(len(runs) + 1)
            for table in self._find_angles(rotation.inverse_frequencies.tobytes(), header.first_position, given.tokens):
                runs.append(Run(address_of(table), table.nbytes, table))
        return True

    def _prepare(self, calibration: Calibration | None) -> _Prepared:
        if calibration is None:
            self._uncalibrated = self._uncalibrated or self._put_tables(uncalibrated_tables())
            return self._uncalibrated
        if calibration not in self._calibrated:
            self._calibrated[calibration] = self._put_tables(calibration.tables)
        return self._calibrated[calibration]

    def _put_tables(self, tables: TableSet) -> _Prepared:
        prepared = _Prepared(tables.first, 0, [])
        prepared.tables = self._hold(prepared, self._calls.pack_tables(tables))
        return prepared

    def _unit(self, calibration: Calibration, group: int, head: int, prepared: _Prepared) -> ScalableUnit:
        place = (group, 0 if calibration.span == "all" else head)
        if place not in prepared.units:
            unit = calibration.units[place]
            matrix = unit.synthesis
            prepared.held.append(unit.classes)
            prepared.units[place] = ScalableUnit(
                host_classes=address_of(unit.classes),
                classes=self._hold(prepared, unit.classes),
                mean=self._hold(prepared, calibration.unit_mean(*place)),
                scale=self._hold(prepared, unit.synthesis_scale),
                matrix=0 if matrix is None else self._hold(prepared, matrix),
                components=len(unit.classes),
                matrix_bytes=0 if matrix is None else matrix.itemsize,
                largest_scale=float(np.abs(unit.synthesis_scale).max()),
            )
        return prepared.units[place]

    def _hold(self, prepared: _Prepared, values: npt.NDArray[np.generic]) -> int:
        """Put an array on the device for as long as `prepared` is there; its address."""
        tensor = self._put(values)
        prepared.held.append(tensor)
        return tensor.data_ptr()


def _pin_angles(
    pin: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]], frequencies: bytes, position: int, tokens: int
) -> list[npt.NDArray[np.generic]]:
    """Cosines and sines, float32 [tokens, pairs] each."""
    rotation = Rotation("halves", np.frombuffer(frequencies, np.float32), np.zeros(0, np.uint8))
    return [pin(table) for table in rotation.tables(position, tokens)]
