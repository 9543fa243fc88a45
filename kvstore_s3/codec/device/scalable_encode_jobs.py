"""From sections in an engine's pages to what the kernels that encode codec 3 are told.

What is nothing for a device is not planned: the CPU encodes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.constants import Array, Constants, Put
from kvstore_s3.codec.device.encode_plans import EncodeJobs, Lengths
from kvstore_s3.codec.device.library import Pages
from kvstore_s3.codec.device.pieces import round_up
from kvstore_s3.codec.device.scalable_encode import (
    LEVELS,
    SCALABLE_ENCODE_JOB,
    ScalableEncodeCalls,
    level_sizes,
    sum_up,
)
from kvstore_s3.codec.rotation import Floats, Rotation
from kvstore_s3.codec.scalable import _base_header, find_group
from kvstore_s3.codec.stream_map import StreamMap, calibrated_map, uncalibrated_map
from kvstore_s3.layout import DTYPES
from kvstore_s3.quality import LOSSY_DTYPES


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


@dataclass(frozen=True, slots=True)
class ScalableEncodeWork:
    """Jobs are `SCALABLE_ENCODE_JOB`, of one dtype, table set and dimension of heads."""

    calls: ScalableEncodeCalls
    dtype_id: int
    tables: int
    dim: int
    lengths: int = LEVELS

    def launch(self, jobs: EncodeJobs, pages: Pages, *, at: int, lengths: int, stream: int) -> None:
        totals = sum_up(jobs, self.tables, self.dim)
        self.calls.encode(at, totals, pages, dtype_id=self.dtype_id, lengths=lengths, stream=stream)


@dataclass(frozen=True, slots=True, eq=False)
class ScalableEncodePlan:
    """The jobs of one section, one for each stream."""

    section: SectionInPages
    work: ScalableEncodeWork
    jobs: EncodeJobs
    header: npt.NDArray[np.uint8]
    """What level 0 says before its table of lengths."""
    angles: Sequence[Floats]
    """Cosines and sines, float32 [tokens, pairs] each; none where K is not rotated."""
    payload_bytes: int
    scratch_bytes: int
    held: Sequence[object]

    def place(self, payload: int, scratch: int, header: int, angles: Sequence[int]) -> EncodeJobs:
        jobs = self.jobs.copy()
        jobs["payload"], jobs["header"] = payload, header
        jobs["scratch"] += np.uint64(scratch)
        if angles:
            jobs["cosines"], jobs["sines"] = angles
        return jobs

    def level_sizes(self, lengths: Lengths) -> Sequence[int] | None:
        """None: exact coding may be shorter, and is to be chosen where it is (`encode_scalable`)."""
        sizes = level_sizes(lengths, len(self.header), self.section.levels)
        return sizes if sum(sizes) <= self.section.nbytes // 2 else None


class ScalableEncodePlanner:
    """Plans sections to encode. `put` copies an array to the device. For several threads.

    Of `most_bytes` that calibrations may take on the device, a third is left for what is put there for one section.
    """

    def __init__(self, calls: ScalableEncodeCalls, put: Put, most_bytes: int = sys.maxsize) -> None:
        self._calls = calls
        self._constants = Constants(put, most_bytes, most_bytes - most_bytes // 3)

    def plan(self, section: SectionInPages) -> ScalableEncodePlan | None:
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
        if calibration is not None:
            _describe_units(section, jobs, calibration)
        sizes = self._measure(section, jobs)
        if sizes is None:
            return None
        tables = self._constants.find_tables(calibration, self._calls.pack_tables)
        work = ScalableEncodeWork(self._calls, DTYPES[section.dtype].id, tables.addresses[0], section.head_dim)
        held: list[object] = [tables, *self._add_rotation(section, jobs, one.rotation)]
        if calibration is not None and not self._add_units(section, jobs, calibration, held):
            return None
        angles = one.rotation.tables(section.first_position, section.tokens) if jobs["pairs"][0] else ()
        return ScalableEncodePlan(section, work, jobs, header, angles, sizes[1] + len(header), sizes[0], held)

    def _measure(self, section: SectionInPages, jobs: EncodeJobs) -> tuple[int, int] | None:
        """Bytes of scratch and payload; gives the jobs their places in the scratch."""
        scratch = payload = 0
        for index in range(len(jobs)):
            of_job = self._calls.measure(jobs[index : index + 1], section.head_dim, DTYPES[section.dtype].itemsize)
            if not of_job[0]:
                return None
            jobs["scratch"][index] = scratch
            scratch, payload = scratch + round_up(of_job[0]), payload + of_job[1]
        return scratch, payload

    def _add_rotation(self, section: SectionInPages, jobs: EncodeJobs, rotation: Rotation) -> Sequence[object]:
        if not len(rotation.inverse_frequencies):
            return ()
        flags = np.ascontiguousarray(rotation.rotated)
        key = ("rotated", flags.tobytes())
        rotated = self._constants.find_small(section.calibration, key, lambda: flags)
        jobs["rotated"] = rotated.addresses[0]
        return (rotated,)

    def _add_units(
        self, section: SectionInPages, jobs: EncodeJobs, calibration: Calibration, held: list[object]
    ) -> bool:
        """False where there is no room for what they need."""
        for job, place in zip(jobs, _places_of(section, calibration), strict=True):
            unit = self._constants.find(calibration, ("unit", place), partial(_arrays_of, calibration, place))
            if unit is None:
                return False
            job["mean"], job["classes"], job["matrix"], job["scale"] = unit.addresses
            held.append(unit)
        return True


def _arrays_of(calibration: Calibration, place: tuple[int, int]) -> Sequence[Array | None]:
    unit = calibration.units[place]
    return (calibration.unit_mean(*place), unit.classes, unit.analysis, unit.analysis_scale)


def _find_map(section: SectionInPages) -> StreamMap | None:
    """That of the section's first stream; None where the section is none of its calibration's."""
    calibration, (begin, end) = section.calibration, section.layers
    if calibration is None:
        known = section.rotation
        local = Rotation(known.style, known.inverse_frequencies, known.select(begin, end))
        return uncalibrated_map(local, end - begin, section.head_dim, 0)
    group = find_group(calibration, begin, end - begin, section.first_head, section.heads)
    return None if group is None else calibrated_map(calibration, group, section.first_head, 0)


def _describe(section: SectionInPages, jobs: EncodeJobs, one: StreamMap) -> None:
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


def _places_of(section: SectionInPages, calibration: Calibration) -> Sequence[tuple[int, int]]:
    """The unit of each stream."""
    group = section.layers[0] // calibration.layer_group
    if calibration.span == "all":
        return [(group, 0)]
    return [(group, section.first_head + head) for head in range(section.heads)]


def _describe_units(section: SectionInPages, jobs: EncodeJobs, calibration: Calibration) -> None:
    jobs["calibrated"], jobs["span"] = 1, SPANS.index(calibration.span)
    for job, place in zip(jobs, _places_of(section, calibration), strict=True):
        unit = calibration.units[place]
        job["components"] = len(unit.classes)
        job["matrix_bytes"] = 0 if unit.analysis is None else unit.analysis.itemsize
