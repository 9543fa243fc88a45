"""From verified payloads of codec 3 to what the kernels are told, and calibrations in the device's memory.

What is damaged, or nothing for a device, is not planned: the CPU decodes it, or says what is wrong with it.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.constants import Array, Constants, Put
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
from kvstore_s3.codec.tables import uncalibrated_tables
from kvstore_s3.layout import DTYPES

ANGLE_BYTES = 16 * 1024 * 1024
"""Of tables of angles that are kept on the host: one for each chunk of a prompt, which all of its sections share."""

_Pin = Callable[[Array], Array]


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


class ScalablePlanner:
    """Plans sections of codec 3. `put` copies an array to the device, `pin` to where it can be copied from at once.
    For several threads.

    Up to `most_bytes` of calibrations stay on the device; what does not fit is copied there with each batch.
    """

    def __init__(self, calls: ScalableCalls, put: Put, pin: _Pin, most_bytes: int) -> None:
        self._calls = calls
        self._constants = Constants(put, most_bytes)
        self._angles = _Angles(pin)

    def plan(self, given: CodedSection) -> Piece | None:
        """The jobs of a section, one for each stream; None: the CPU is to decode it, or to refuse it."""
        held: list[object] = []
        runs = [Run(address_of(payload), len(payload)) for payload in given.payloads]
        section = self._describe(given, runs, held)
        if section is None:
            return None
        for level in range(len(given.payloads)):
            section.payload[level], section.lengths[level] = runs[level].address, runs[level].length
            section.device[level] = place_in(level)
        if not self._add_angles(section, given, runs):
            return None
        parsed = self._calls.parse([section])
        if parsed.faults.any():
            return None
        work = ScalableWork(self._calls, DTYPES[given.dtype].id, section.tables)
        totals = parsed.totals
        return Piece(tuple(runs), parsed.jobs, work, Scratch(totals.numbers, totals.order), totals, held)

    def _describe(self, given: CodedSection, runs: list[Run], held: list[object]) -> ScalableSection | None:
        """What is known of a section beside its payloads; None where it is not one of its calibration's.

        `runs` get what is to be copied beside the payloads, `held` what must stay as long as the section is used.
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
        calibration = given.calibration
        tables = self._constants.find_tables(calibration, self._calls.pack_tables)
        section.tables = tables.addresses[0]
        held.append(tables)
        section.first[:] = (uncalibrated_tables() if calibration is None else calibration.tables).first
        return section if calibration is None else self._add_units(section, given, calibration, runs, held)

    def _add_units(
        self,
        section: ScalableSection,
        given: CodedSection,
        calibration: Calibration,
        runs: list[Run],
        held: list[object],
    ) -> ScalableSection | None:
        begin, end = given.layers
        group = find_group(calibration, begin, end - begin, given.first_head, given.section_heads)
        if group is None:
            return None
        count = 1 if calibration.span == "all" else given.section_heads
        heads = range(given.first_head, given.first_head + count)
        units = (ScalableUnit * count)(*(self._unit(calibration, group, head, runs, held) for head in heads))
        section.units = ctypes.addressof(units)
        held.append(units)
        section.span = SPANS.index(calibration.span)
        section.style = calibration.rotation.style_id
        rotation = calibration.rotation
        rotated = self._constants.find_small(calibration, ("rotated", group), lambda: rotation.select(begin, end))
        section.rotated = rotated.addresses[0]
        held.append(rotated)
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
            for table in self._angles.find(rotation.inverse_frequencies.tobytes(), header.first_position, given.tokens):
                runs.append(Run(address_of(table), table.nbytes, table))
        return True

    def _unit(
        self, calibration: Calibration, group: int, head: int, runs: list[Run], held: list[object]
    ) -> ScalableUnit:
        place = (group, 0 if calibration.span == "all" else head)
        unit = calibration.units[place]
        list_arrays = partial(_arrays_of, calibration, place)
        kept = self._constants.find(calibration, ("unit", place), list_arrays)
        if kept is None:
            classes, mean, scale, matrix = [_bring(array, runs) for array in list_arrays()]
        else:
            classes, mean, scale, matrix = kept.addresses
            held.append(kept)
        return ScalableUnit(
            host_classes=address_of(unit.classes),
            classes=classes,
            mean=mean,
            scale=scale,
            matrix=matrix,
            components=len(unit.classes),
            matrix_bytes=0 if unit.synthesis is None else unit.synthesis.itemsize,
            largest_scale=float(np.abs(unit.synthesis_scale).max()),
        )


def _arrays_of(calibration: Calibration, place: tuple[int, int]) -> Sequence[Array | None]:
    unit = calibration.units[place]
    return (unit.classes, calibration.unit_mean(*place), unit.synthesis_scale, unit.synthesis)


def _bring(array: Array | None, runs: list[Run]) -> int:
    """Copy an array along; the address, for now, of where it will be."""
    if array is None:
        return 0
    rows = np.ascontiguousarray(array)
    runs.append(Run(address_of(rows), rows.nbytes, rows))
    return place_in(len(runs) - 1)


class _Angles:
    """Cosines and sines, float32 [tokens, pairs] each, where they can be copied from: the last `ANGLE_BYTES`."""

    def __init__(self, pin: _Pin) -> None:
        self._pin = pin
        self._kept: OrderedDict[tuple[bytes, int, int], Sequence[Array]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, frequencies: bytes, position: int, tokens: int) -> Sequence[Array]:
        key = (frequencies, position, tokens)
        with self._lock:
            if key not in self._kept:
                rotation = Rotation("halves", np.frombuffer(frequencies, np.float32), np.zeros(0, np.uint8))
                self._kept[key] = [self._pin(table) for table in rotation.tables(position, tokens)]
                self._bytes += _size_of(self._kept[key])
            self._kept.move_to_end(key)
            found = self._kept[key]
            while self._bytes > ANGLE_BYTES:
                self._bytes -= _size_of(self._kept.popitem(last=False)[1])
            return found


def _size_of(arrays: Sequence[Array]) -> int:
    return sum(array.nbytes for array in arrays)
