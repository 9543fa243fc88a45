"""The C interface of decoding codec 3 (csrc/cuda/scalable_api.h), by ctypes. Plain calls: nothing is copied here.

`decode` takes what `parse` made of a batch of sections, once both are on the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.library import Library, Pages
from kvstore_s3.codec.tables import TableSet
from kvstore_s3.errors import DeviceError

FOR_HOST = 255
"""A section's verdict: perhaps good, but nothing that the device decodes; the host does."""

Octets = npt.NDArray[np.uint8]


SCALABLE_JOB = np.dtype(
    [
        ("addresses", np.uint64, 17),
        ("numbers", np.uint64),
        ("order", np.uint64),
        ("word_counts", np.uint32, 3),
        ("escape_count", np.uint32),
        ("exact_count", np.uint32),
        ("components", np.uint32),
        ("coded", np.uint32, 3),
        *((name, np.uint32) for name in ("tokens", "token_begin", "layer_begin", "head", "dim")),
        *((name, np.uint32) for name in ("heads", "want_begin", "want_end")),
        ("layers", np.uint16),
        ("pairs", np.uint16),
        *((name, np.uint8) for name in ("levels", "object_levels", "span", "style", "calibrated", "matrix_bytes")),
        ("first", np.uint8, 3),
        ("reserved", np.uint8, 3),
        ("shrink", np.float32),
        ("grow", np.float32),
        ("reserved_too", np.uint32),
    ],
    align=True,
)
"""`KvsScalableJob`. All of its device addresses are in `addresses`; `numbers` and `order` are places in the scratch."""


class ScalableUnit(ctypes.Structure):
    """`KvsScalableUnit`: what one calibrated stream is decoded with. `host_classes` is the host's, all else the
    device's."""

    _fields_ = (
        ("host_classes", ctypes.c_uint64),
        ("classes", ctypes.c_uint64),
        ("mean", ctypes.c_uint64),
        ("scale", ctypes.c_uint64),
        ("matrix", ctypes.c_uint64),
        ("components", ctypes.c_uint32),
        ("matrix_bytes", ctypes.c_uint32),
        ("largest_scale", ctypes.c_float),
        ("reserved", ctypes.c_uint32),
    )


class ScalableSection(ctypes.Structure):
    """`KvsScalableSection`: one section's payloads, on the host and the same bytes on the device, and where it goes."""

    _fields_ = (
        ("payload", ctypes.c_uint64 * 3),
        ("device", ctypes.c_uint64 * 3),
        ("lengths", ctypes.c_uint64 * 3),
        ("units", ctypes.c_uint64),
        ("tables", ctypes.c_uint64),
        ("cosines", ctypes.c_uint64),
        ("sines", ctypes.c_uint64),
        ("rotated", ctypes.c_uint64),
        ("first_position", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("levels", "object_levels", "tokens", "heads", "dim")),
        *((name, ctypes.c_uint32) for name in ("head_begin", "head_end", "token_begin", "layer_begin", "head")),
        ("layers", ctypes.c_uint16),
        ("pairs", ctypes.c_uint16),
        ("span", ctypes.c_uint8),
        ("style", ctypes.c_uint8),
        ("item_bytes", ctypes.c_uint8),
        ("first", ctypes.c_uint8 * 3),
    )


class ScalableHeader(ctypes.Structure):
    """`KvsScalableHeader`: what level 0 of a section says of itself. `frequencies_at` counts bytes of the payload."""

    _fields_ = (
        ("first_position", ctypes.c_uint32),
        ("streams_at", ctypes.c_uint32),
        ("frequencies_at", ctypes.c_uint32),
        ("pairs", ctypes.c_uint16),
        ("calibrated", ctypes.c_uint8),
        ("span", ctypes.c_uint8),
        ("levels", ctypes.c_uint8),
        ("style", ctypes.c_uint8),
    )


class ScalableTotals(ctypes.Structure):
    """`KvsScalableTotals`: what the jobs of one call need: `numbers` int16 and `order` uint32 of scratch, and sizes."""

    _fields_ = (
        ("numbers", ctypes.c_uint64),
        ("order", ctypes.c_uint64),
        *(
            (name, ctypes.c_uint32)
            for name in ("jobs", "tokens", "planes", "components", "dim", "narrow", "wide", "wide_float")
        ),
        *((name, ctypes.c_uint32) for name in ("first_class", "classes_end")),
        ("tables", ctypes.c_uint64),
    )


def join_totals(all_totals: Sequence[ScalableTotals]) -> ScalableTotals:
    """Of the jobs of several `parse` calls, for one call of `decode`. They share a table set.

    The caller adds to `numbers` and `order` of each part's jobs what the parts before it need of the scratch.
    """
    joined = ScalableTotals()
    for totals in all_totals:
        for name in ("numbers", "order", "jobs", "narrow", "wide", "wide_float"):
            setattr(joined, name, getattr(joined, name) + getattr(totals, name))
        for name in ("tokens", "planes", "components", "dim", "classes_end", "first_class", "tables"):
            setattr(joined, name, max(getattr(joined, name), getattr(totals, name)))
    return joined


@dataclass(frozen=True, slots=True)
class ScalableJobs:
    """What `parse` made of a batch: `jobs` are `SCALABLE_JOB`, for the device; section i has the jobs
    `first_jobs[i]` to `first_jobs[i + 1]`, and the verdict `faults[i]`: 0, a `BitstreamFault`, or `FOR_HOST`."""

    jobs: npt.NDArray[np.void]
    totals: ScalableTotals
    first_jobs: npt.NDArray[np.uint32]
    faults: npt.NDArray[np.uint32]


class ScalableCalls:
    """The calls of a library that decodes codec 3. Raises `DeviceError` where it was built from other structs."""

    def __init__(self, library: Library) -> None:
        self._library = library
        if not library.has("kvs_scalable_struct_bytes"):
            raise DeviceError(f"{library.path} does not decode codec 3; build it again")
        self._calls = ctypes.CDLL(str(library.path))
        self._calls.kvs_scalable_struct_bytes.restype = ctypes.c_size_t
        self._calls.kvs_scalable_tables_bytes.restype = ctypes.c_size_t
        structs = (ScalableSection, ScalableUnit, ScalableHeader, ScalableTotals)
        ours = [SCALABLE_JOB.itemsize, *map(ctypes.sizeof, structs)]
        theirs = [self._calls.kvs_scalable_struct_bytes(which) for which in range(len(ours))]
        if ours != theirs:
            raise DeviceError(f"structs have {theirs} bytes in {library.path}, {ours} here; build the library again")

    def pack_tables(self, tables: TableSet) -> Octets:
        """The bytes of a table set for the device: to be put at a multiple of 16. The set has been checked."""
        packed = np.empty(self._calls.kvs_scalable_tables_bytes(), np.uint8)
        first = np.array(tables.first, np.uint8)
        arrays = [np.ascontiguousarray(a) for a in (first, tables.base, tables.refine, tables.shift, packed)]
        fault = self._calls.kvs_scalable_pack_tables(*(ctypes.c_void_p(a.ctypes.data) for a in arrays))
        if fault:
            raise DeviceError("these tables of the scalable codec are not sound; calibrate again")
        return arrays[-1]

    def read_header(self, section: ScalableSection) -> tuple[int, ScalableHeader]:
        """A `BitstreamFault` or 0, and the header. Needs the payload of level 0, and no angles yet."""
        header = ScalableHeader()
        fault = self._calls.kvs_scalable_read_header(ctypes.byref(section), ctypes.byref(header))
        return int(fault), header

    def parse(self, sections: Sequence[ScalableSection]) -> ScalableJobs:
        """Take the streams of a batch apart. The sections share one table set.

        Raises `DeviceError` where they do not.
        """
        count = len(sections)
        batch = (ScalableSection * count)(*sections)
        room = sum(section.head_end - section.head_begin for section in sections)
        jobs = np.zeros(room, SCALABLE_JOB)
        first_jobs, faults = np.zeros(count + 1, np.uint32), np.zeros(count, np.uint32)
        totals = ScalableTotals()
        refused = self._calls.kvs_scalable_parse(
            batch,
            ctypes.c_uint32(count),
            ctypes.c_void_p(jobs.ctypes.data),
            ctypes.c_uint32(room),
            ctypes.byref(totals),
            ctypes.c_void_p(first_jobs.ctypes.data),
            ctypes.c_void_p(faults.ctypes.data),
        )
        if refused:
            raise DeviceError("sections of several table sets were given at once; decode each set by itself")
        return ScalableJobs(jobs[: totals.jobs], totals, first_jobs, faults)

    def decode(
        self,
        jobs: int,
        totals: ScalableTotals,
        pages: Pages,
        *,
        dtype_id: int,
        numbers: int,
        order: int,
        faults: int,
        stream: int,
    ) -> None:
        """Queue the decoding of a parsed batch on `stream`.

        Device addresses: `jobs`; scratch `numbers` and `order`, as large as `totals` says, at multiples of 16;
        `faults` uint32 [jobs].
        """
        self._library.call(
            "kvs_scalable_decode",
            ctypes.c_void_p(jobs),
            ctypes.byref(totals),
            ctypes.byref(pages),
            ctypes.c_int(dtype_id),
            ctypes.c_void_p(numbers),
            ctypes.c_void_p(order),
            ctypes.c_void_p(faults),
            ctypes.c_void_p(stream),
        )
