"""The C interface of encoding codec 3 (csrc/cuda/scalable_api.h), by ctypes. Plain calls: nothing is copied here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.library import Library, Pages
from kvstore_s3.codec.tables import CLASSES, TableSet
from kvstore_s3.errors import DeviceError

LEVELS = 3
"""Lengths that the device gives for each job."""

Octets = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]

SCALABLE_ENCODE_JOB = np.dtype(
    [
        *((name, np.uint64) for name in ("payload", "scratch", "header", "cosines", "sines", "rotated")),
        *((name, np.uint64) for name in ("mean", "classes", "matrix", "scale")),
        *((name, np.uint32) for name in ("header_bytes", "tokens", "token_begin", "layer_begin")),
        *((name, np.uint32) for name in ("head", "heads", "streams", "index", "components")),
        ("layers", np.uint16),
        ("pairs", np.uint16),
        *((name, np.uint8) for name in ("calibrated", "span", "style", "matrix_bytes", "levels", "first_is_exact")),
        ("reserved", np.uint8, 6),
    ],
    align=True,
)
"""`KvsScalableEncodeJob`: one stream of a section."""


class ScalableEncodeTotals(ctypes.Structure):
    """`KvsScalableEncodeTotals`: what the jobs of one call need together. They share a table set and a dtype."""

    _fields_ = (
        ("tables", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("jobs", "tokens", "components", "products")),
        *((name, ctypes.c_uint32) for name in ("uncalibrated", "halves", "floats", "reserved")),
    )


def sum_up(jobs: npt.NDArray[np.void], tables: int, dim: int) -> ScalableEncodeTotals:
    """The totals of jobs with heads of `dim`, whose table set, packed, is at the device address `tables`."""
    heads, wide = jobs["span"] == 1, jobs["span"] > 1
    components = np.where(heads, dim, np.where(wide, jobs["components"], 0))
    products = np.where(heads, 2 * jobs["layers"].astype(np.int64), 1)
    return ScalableEncodeTotals(
        tables=tables,
        jobs=len(jobs),
        tokens=int(jobs["tokens"].max()),
        components=int(components.max()),
        products=int(products.max()),
        uncalibrated=int(np.count_nonzero(jobs["calibrated"] == 0)),
        halves=int(np.count_nonzero(jobs["matrix_bytes"] == 2)),
        floats=int(np.count_nonzero(jobs["matrix_bytes"] == 4)),
    )


class ScalableEncodeCalls:
    """The calls of a library that encodes codec 3. Raises `DeviceError` where it does not, or has other structs."""

    def __init__(self, library: Library) -> None:
        self._library = library
        if not library.has("kvs_scalable_encode_struct_bytes"):
            raise DeviceError(f"{library.path} does not encode codec 3; build it again")
        self._calls = ctypes.CDLL(str(library.path))
        for name in ("struct_bytes", "tables_bytes"):
            getattr(self._calls, f"kvs_scalable_encode_{name}").restype = ctypes.c_size_t
        for name in ("scratch", "room"):
            getattr(self._calls, f"kvs_scalable_encode_{name}").restype = ctypes.c_uint64
        ours = [SCALABLE_ENCODE_JOB.itemsize, ctypes.sizeof(ScalableEncodeTotals)]
        theirs = [self._calls.kvs_scalable_encode_struct_bytes(which) for which in range(2)]
        if ours != theirs:
            raise DeviceError(f"structs have {theirs} bytes in {library.path}, {ours} here; build the library again")

    def pack_tables(self, tables: TableSet) -> Octets:
        """The bytes of a table set for the device: to be put at a multiple of 16. The set has been checked."""
        packed = np.empty(self._calls.kvs_scalable_encode_tables_bytes(), np.uint8)
        first = np.array(tables.first, np.uint8)
        given = (first, tables.base, tables.refine, find_borders(), find_gains(tables.first[-1]), packed)
        arrays: list[npt.NDArray[Any]] = [np.ascontiguousarray(array) for array in given]
        fault = self._calls.kvs_scalable_pack_encode_tables(*(ctypes.c_void_p(a.ctypes.data) for a in arrays))
        if fault:
            raise DeviceError("these tables of the scalable codec are not sound; calibrate again")
        return packed

    def measure(self, job: npt.NDArray[np.void], dim: int, item_bytes: int) -> tuple[int, int]:
        """Bytes of scratch of a job (a `SCALABLE_ENCODE_JOB` array of one), and of the payload that it may take.

        0 and 0 where the device does not encode it. Addresses of the job need not be set yet.
        """
        arguments = (ctypes.c_void_p(job.ctypes.data), ctypes.c_uint32(dim), ctypes.c_uint32(item_bytes))
        scratch = int(self._calls.kvs_scalable_encode_scratch(*arguments))
        return (scratch, int(self._calls.kvs_scalable_encode_room(*arguments))) if scratch else (0, 0)

    def encode(
        self, jobs: int, totals: ScalableEncodeTotals, pages: Pages, *, dtype_id: int, lengths: int, stream: int
    ) -> None:
        """Queue the encoding of `totals.jobs` jobs on `stream`.

        Device addresses: `jobs`; `lengths` uint32 [jobs, 3], which get the bytes of each job's stream at each level.
        """
        self._library.call(
            "kvs_scalable_encode",
            ctypes.c_void_p(jobs),
            ctypes.byref(totals),
            ctypes.byref(pages),
            ctypes.c_int(dtype_id),
            ctypes.c_void_p(lengths),
            ctypes.c_void_p(stream),
        )


def find_borders() -> Doubles:
    """The least mean square of a component that gets each class, float64 [48]; the first is 0.

    By bisection of what `classes_of` computes: logarithms differ between machines in the last bit, and the device is
    to choose as this one does.
    """
    classes = np.arange(CLASSES)
    low = np.zeros(CLASSES, np.uint64)
    high = np.full(CLASSES, np.float64(1e12).view(np.uint64))
    while (low < high).any():
        middle = (low + high) // np.uint64(2)
        reached = _class_of(middle.view(np.float64)) >= classes
        high, low = np.where(reached, middle, high), np.where(reached, low, middle + np.uint64(1))
    return high.view(np.float64)


def _class_of(square: Doubles) -> Doubles:
    with np.errstate(divide="ignore"):
        found: Doubles = np.clip(np.rint(13 + 2 * np.log2(square)), 0, CLASSES - 1)
    return found


def find_gains(last: int) -> Doubles:
    """Bits that a component saves for each token where its found class is named instead of its static one.

    float64 [found, static]; infinite where the static class is below `last`, the first that is coded at all, and the
    found one is well above it. As `StreamMap.choose_classes` has it.
    """
    found, static = np.arange(CLASSES, dtype=np.float64)[:, None], np.arange(CLASSES)[None, :]
    ratio = 2.0 ** ((found - static) / 4)
    busy = np.minimum(1.0, 2.0 ** ((found - 13) / 4))
    gains = np.where(static >= last, (ratio - 1 - np.log(ratio)) / np.log(2) * busy, 0.0)
    gains[(static < last) & (found >= last + 4)] = np.inf
    return gains


def level_sizes(lengths: npt.NDArray[np.uint32], header_bytes: int, levels: int) -> Sequence[int]:
    """Bytes of a section's payload at each level, from `lengths` [streams, 3] of its jobs."""
    streams = lengths.astype(np.int64).sum(axis=0) + 4 * len(lengths)
    return [int(streams[level]) + (header_bytes if level == 0 else 0) for level in range(levels)]
