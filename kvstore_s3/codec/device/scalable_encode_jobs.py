"""From sections in an engine's pages to what the kernels that encode codec 3 are told.

What is nothing for a device is not planned: the CPU encodes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.scalable_encode import (
    SCALABLE_ENCODE_JOB,
    ScalableEncodeCalls,
    ScalableEncodeTotals,
    level_sizes,
    sum_up,
)
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import _base_header, find_group
from kvstore_s3.codec.stream_map import StreamMap, calibrated_map, uncalibrated_map
from kvstore_s3.codec.tables import TableSet, uncalibrated_tables
from kvstore_s3.layout import DTYPES
from kvstore_s3.quality import LOSSY_DTYPES

_ANGLES = 64
"""Tables of angles that are kept: one for each chunk of a prompt, which all of its sections share."""


class OnDevice(Protocol):
    """Bytes in the device's memory, there as long as this is: a tensor."""

    def data_ptr(self) -> int: ...


Put = Callable[[npt.NDArray[np.generic]], OnDevice]


@dataclass(frozen=True, slots=True, eq=False)
class SectionInPages:
    """A section to encode. `layers` and `first_head` are its place in the model; `token_begin`, `layer_begin` and
    `head` that of its first token, layer and head in the pages. `rotation` is the model's; a calibration's own counts.
    """

    layers: tuple[int, int]
    first_head: int
    heads: int
    head_dim: int
    tokens: int
    token_begin: int
    layer_begin: int
    head: int
    first_position: int
    dtype: str
    levels: int
    calibration: Calibration | None
    rotation: Rotation

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        begin, end = self.layers
        return (end - begin) * 2 * self.tokens * self.heads * self.head_dim * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, eq=False)
class EncodePlan:
    """The jobs of one section, one for each stream. Their `payload` is 0 and their `scratch` counts from 0: `place`
    says where both are. `held` is what they point to."""

    section: SectionInPages
    jobs: npt.NDArray[np.void]
    tables: int
    scratch_bytes: int
    payload_bytes: int
    """The most that all levels may take together."""
    held: Sequence[object]

    def place(self, payload: int, scratch: int) -> npt.NDArray[np.void]:
        """The jobs with device addresses, both multiples of 16."""
        jobs = self.jobs.copy()
        jobs["payload"] = payload
        jobs["scratch"] += np.uint64(scratch)
        return jobs

    def totals(self) -> ScalableEncodeTotals:
        """For a call of this plan alone; of several plans: `sum_up` of their jobs."""
        return sum_up(self.jobs, self.tables, self.section.head_dim)

    def level_sizes(self, lengths: npt.NDArray[np.uint32]) -> Sequence[int] | None:
        """Bytes of each level, which lie one behind the other, from the `lengths` [streams, 3] that the device gave.

        None: exact coding may be shorter, and is to be chosen where it is (`encode_scalable`).
        """
        sizes = level_sizes(lengths, int(self.jobs["header_bytes"][0]), self.section.levels)
        return sizes if sum(sizes) <= self.section.nbytes // 2 else None


@dataclass(slots=True)
class _Prepared:
    """Tables, and what was needed so far of a calibration, on the device. `held` keeps it there."""

    tables: int
    held: list[OnDevice]
    units: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=dict)


class ScalableEncodePlanner:
    """Plans sections to encode. `put` copies an array to the device. For several threads.

    Calibrations stay on the device for as long as somebody has them.
    """

    def __init__(self, calls: ScalableEncodeCalls, put: Put) -> None:
        self._calls, self._put = calls, put
        self._find_angles = lru_cache(_ANGLES)(self._put_angles)
        self._calibrated: WeakKeyDictionary[Calibration, _Prepared] = WeakKeyDictionary()
        self._uncalibrated: _Prepared | None = None
        self._lock = threading.Lock()

    def plan(self, section: SectionInPages) -> EncodePlan | None:
        """The jobs of a section; None: the CPU is to encode it, or to refuse it."""
        if section.dtype not in LOSSY_DTYPES or not 0 <= section.first_position < 2**32:
            return None
        one = _find_map(section)
        if one is None:
            return None
        calibration = section.calibration
        jobs = np.zeros(1 if one.whole else section.heads, SCALABLE_ENCODE_JOB)
        _describe(section, jobs, one)
        header = np.frombuffer(_base_header(section.first_position, calibration, one, section.levels), np.uint8)
        jobs["header_bytes"] = len(header)
        with self._lock:
            prepared = self._prepare(calibration)
            if calibration is not None:
                self._add_units(jobs, calibration, section, prepared)
        sizes = self._measure(section, jobs)
        if sizes is None:
            return None
        held = [prepared, self._put_header(jobs, header), *self._add_rotation(section, jobs, one.rotation)]
        return EncodePlan(section, jobs, prepared.tables, sizes[0], sizes[1] + len(header), held)

    def _add_units(
        self, jobs: npt.NDArray[np.void], calibration: Calibration, section: SectionInPages, prepared: _Prepared
    ) -> None:
        jobs["calibrated"], jobs["span"] = 1, SPANS.index(calibration.span)
        group = section.layers[0] // calibration.layer_group
        for job in jobs:
            place = (group, 0 if calibration.span == "all" else section.first_head + int(job["index"]))
            unit = calibration.units[place]
            if place not in prepared.units:
                prepared.units[place] = (
                    self._hold(prepared, calibration.unit_mean(*place)),
                    self._hold(prepared, unit.classes),
                    0 if unit.analysis is None else self._hold(prepared, unit.analysis),
                    self._hold(prepared, unit.analysis_scale),
                )
            job["mean"], job["classes"], job["matrix"], job["scale"] = prepared.units[place]
            job["components"] = len(unit.classes)
            job["matrix_bytes"] = 0 if unit.analysis is None else unit.analysis.itemsize

    def _measure(self, section: SectionInPages, jobs: npt.NDArray[np.void]) -> tuple[int, int] | None:
        """Bytes of scratch and payload; gives the jobs their places in the scratch."""
        scratch = payload = 0
        for index in range(len(jobs)):
            of_job = self._calls.measure(jobs[index : index + 1], section.head_dim, DTYPES[section.dtype].itemsize)
            if not of_job[0]:
                return None
            jobs["scratch"][index] = scratch
            scratch, payload = scratch + of_job[0], payload + of_job[1]
        return scratch, payload

    def _put_header(self, jobs: npt.NDArray[np.void], header: npt.NDArray[np.uint8]) -> OnDevice:
        put = self._put(header)
        jobs["header"] = put.data_ptr()
        return put

    def _add_rotation(
        self, section: SectionInPages, jobs: npt.NDArray[np.void], rotation: Rotation
    ) -> Sequence[OnDevice]:
        frequencies = rotation.inverse_frequencies
        if not len(frequencies):
            return ()
        angles = self._find_angles(frequencies.tobytes(), section.first_position, section.tokens)
        put = (*angles, self._put(np.ascontiguousarray(rotation.rotated)))
        for name, one in zip(("cosines", "sines", "rotated"), put, strict=True):
            jobs[name] = one.data_ptr()
        return put

    def _put_angles(self, frequencies: bytes, position: int, tokens: int) -> tuple[OnDevice, ...]:
        """Cosines and sines, float32 [tokens, pairs] each."""
        rotation = Rotation("halves", np.frombuffer(frequencies, np.float32), np.zeros(0, np.uint8))
        return tuple(self._put(table) for table in rotation.tables(position, tokens))

    def _prepare(self, calibration: Calibration | None) -> _Prepared:
        if calibration is None:
            self._uncalibrated = self._uncalibrated or self._put_tables(uncalibrated_tables())
            return self._uncalibrated
        if calibration not in self._calibrated:
            self._calibrated[calibration] = self._put_tables(calibration.tables)
        return self._calibrated[calibration]

    def _put_tables(self, tables: TableSet) -> _Prepared:
        prepared = _Prepared(0, [])
        prepared.tables = self._hold(prepared, self._calls.pack_tables(tables))
        return prepared

    def _hold(self, prepared: _Prepared, values: npt.NDArray[np.generic]) -> int:
        """Put an array on the device for as long as `prepared` is there; its address."""
        put = self._put(values)
        prepared.held.append(put)
        return put.data_ptr()


def _find_map(section: SectionInPages) -> StreamMap | None:
    """That of the section's first stream; None where the section is none of its calibration's."""
    calibration, (begin, end) = section.calibration, section.layers
    if calibration is None:
        known = section.rotation
        local = Rotation(known.style, known.inverse_frequencies, known.select(begin, end))
        return uncalibrated_map(local, end - begin, section.head_dim, 0)
    group = find_group(calibration, begin, end - begin, section.first_head, section.heads)
    return None if group is None else calibrated_map(calibration, group, section.first_head, 0)


def _describe(section: SectionInPages, jobs: npt.NDArray[np.void], one: StreamMap) -> None:
    """All that lies not in the device's memory."""
    layers, count = section.layers[1] - section.layers[0], len(jobs)
    jobs["tokens"], jobs["token_begin"], jobs["layer_begin"] = section.tokens, section.token_begin, section.layer_begin
    jobs["head"] = section.head + np.arange(count)
    jobs["heads"] = section.heads if one.whole else 1
    jobs["streams"], jobs["index"] = count, np.arange(count)
    jobs["components"] = one.components
    jobs["layers"], jobs["levels"] = layers, section.levels
    jobs["style"], jobs["pairs"] = one.rotation.style_id, len(one.rotation.inverse_frequencies)
    jobs["first_is_exact"] = section.first_position == 0
