"""What jobs need of calibrations in the device's memory: put there once, within a limit, for as long as it is used."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.tables import TableSet, uncalibrated_tables

Array: TypeAlias = npt.NDArray[np.generic]


class OnDevice(Protocol):
    """Bytes in the device's memory, there as long as this is: a tensor."""

    def data_ptr(self) -> int: ...


Put = Callable[[Array], OnDevice]
"""Copies an array to the device."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Kept:
    """Addresses of arrays on the device, which hold for as long as somebody has this; 0 where there was none."""

    addresses: tuple[int, ...]
    held: tuple[OnDevice, ...]
    nbytes: int


_Shelf: TypeAlias = dict[Hashable, Kept]


class Constants:
    """Arrays of calibrations, and of coding without one, by key. For several threads.

    Those of calibrations take at most `most_bytes`, in use or not, and at most `most_kept` of these are kept for the
    next use, where that is less. Where a calibration's do not fit beside those of others, these go.
    """

    def __init__(self, put: Put, most_bytes: int, most_kept: int | None = None) -> None:
        self._put = put
        self._most_bytes = most_bytes
        self._most_kept = most_bytes if most_kept is None else most_kept
        self._large: WeakKeyDictionary[Calibration, _Shelf] = WeakKeyDictionary()
        self._small: WeakKeyDictionary[Calibration, _Shelf] = WeakKeyDictionary()
        self._uncalibrated: _Shelf = {}
        self._there = 0
        self._gone: deque[int] = deque()  # sizes: memory ends in any thread, even in one that is in here
        self._lock = threading.Lock()

    def find(
        self, calibration: Calibration, key: Hashable, list_arrays: Callable[[], Sequence[Array | None]]
    ) -> Kept | None:
        """The arrays of `key`, rows one behind the other, put now or before; None: there is no room for them now.

        Whoever uses the addresses holds what this gives until kernels have read them.
        """
        with self._lock:
            shelf = self._large.setdefault(calibration, {})
            if key in shelf:
                return shelf[key]
            arrays = list_arrays()
            size = sum(array.nbytes for array in arrays if array is not None)
            keeps = self._make_room(size, shelf)
            if self._count() + size > self._most_bytes:
                return None
            made = self._make(arrays, size)
            if keeps:
                shelf[key] = made
            return made

    def find_small(self, calibration: Calibration | None, key: Hashable, list_array: Callable[[], Array]) -> Kept:
        """As `find`, of an array that is always there, beside the limit: a quarter of a MB for each calibration."""
        with self._lock:
            shelf = self._uncalibrated if calibration is None else self._small.setdefault(calibration, {})
            if key not in shelf:
                shelf[key] = self._make([list_array()], 0)
            return shelf[key]

    def find_tables(self, calibration: Calibration | None, pack: Callable[[TableSet], npt.NDArray[np.uint8]]) -> Kept:
        """The table set, as `pack` packs it."""
        tables = uncalibrated_tables() if calibration is None else calibration.tables
        return self.find_small(calibration, "tables", lambda: pack(tables))

    def _make(self, arrays: Sequence[Array | None], size: int) -> Kept:
        there = [None if array is None else self._put(np.ascontiguousarray(array)) for array in arrays]
        addresses = tuple(0 if one is None else one.data_ptr() for one in there)
        made = Kept(addresses, tuple(one for one in there if one is not None), size)
        self._there += size
        weakref.finalize(made, self._gone.append, size).atexit = False
        return made

    def _count(self) -> int:
        """Bytes that are on the device."""
        while self._gone:
            self._there -= self._gone.popleft()
        return self._there

    def _make_room(self, size: int, shelf: _Shelf) -> bool:
        """Whether so many bytes more are kept on `shelf`, now that others have gone where they had to."""
        own = size + sum(kept.nbytes for kept in shelf.values())
        if own > self._most_kept:
            return False
        others = [other for other in self._large.values() if other is not shelf]
        if own + sum(kept.nbytes for other in others for kept in other.values()) > self._most_kept:
            for other in others:
                other.clear()
        return True
