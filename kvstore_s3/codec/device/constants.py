"""What jobs need of calibrations in the device's memory: put there once, for as long as somebody has these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.tables import TableSet, uncalibrated_tables

T = TypeVar("T")


class OnDevice(Protocol):
    """Bytes in the device's memory, there as long as this is: a tensor."""

    def data_ptr(self) -> int: ...


Put = Callable[[npt.NDArray[np.generic]], OnDevice]
"""Copies an array to the device."""


class Hold:
    """Puts the arrays of one thing on the device."""

    def __init__(self, put: Put) -> None:
        self._put = put
        self.held: list[OnDevice] = []
        self.nbytes = 0

    def __call__(self, values: npt.NDArray[np.generic]) -> int:
        """The address of a copy of `values`, rows one behind the other, there as long as `held` is."""
        one = self._put(np.ascontiguousarray(values))
        self.held.append(one)
        self.nbytes += values.nbytes
        return one.data_ptr()


@dataclass(frozen=True, slots=True, eq=False)
class Kept(Generic[T]):
    """A thing with addresses on the device, which hold for as long as `held` is there."""

    value: T
    held: tuple[OnDevice, ...]
    nbytes: int


_Shelf: TypeAlias = "dict[Hashable, Kept[Any]]"


class Constants:
    """Things of calibrations, and of coding without one, by key. For several threads.

    Up to `most_bytes` of those of calibrations are kept (None: all). Where a calibration's do not fit beside those of
    others, these go; what does not fit then is put anew each time.
    """

    def __init__(self, put: Put, most_bytes: int | None = None) -> None:
        self._put = put
        self._most_bytes = most_bytes
        self._calibrated: WeakKeyDictionary[Calibration, _Shelf] = WeakKeyDictionary()
        self._uncalibrated: _Shelf = {}
        self._lock = threading.Lock()

    def find(self, calibration: Calibration | None, key: Hashable, make: Callable[[Hold], T]) -> Kept[T]:
        """What `make` made of `key`, now or before. Whoever uses it holds what it says, or the calibration if all is
        kept.
        """
        with self._lock:
            shelf = self._uncalibrated if calibration is None else self._calibrated.setdefault(calibration, {})
            if key not in shelf:
                hold = Hold(self._put)
                made = Kept(make(hold), tuple(hold.held), hold.nbytes)
                if calibration is not None and not self._make_room(made.nbytes, shelf):
                    return made
                shelf[key] = made
            return shelf[key]

    def find_tables(
        self, calibration: Calibration | None, pack: Callable[[TableSet], npt.NDArray[np.uint8]]
    ) -> Kept[int]:
        """The address of the table set, as `pack` packs it."""
        tables = uncalibrated_tables() if calibration is None else calibration.tables
        return self.find(calibration, "tables", lambda hold: hold(pack(tables)))

    def _make_room(self, nbytes: int, shelf: _Shelf) -> bool:
        if self._most_bytes is None:
            return True
        own = sum(kept.nbytes for kept in shelf.values())
        others = [other for other in self._calibrated.values() if other is not shelf]
        if own + nbytes + sum(kept.nbytes for other in others for kept in other.values()) > self._most_bytes:
            for other in others:
                other.clear()
        return own + nbytes <= self._most_bytes
