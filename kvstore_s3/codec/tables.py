"""The tables of the scalable codec: frequencies, thresholds and shifts of its 48 classes (docs/format-scalable.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from kvstore_s3 import _native
from kvstore_s3.codec import uncalibrated
from kvstore_s3.codec.frequencies import LARGEST, SLOTS, symmetric_frequencies, ternary_thresholds
from kvstore_s3.errors import InvalidArgumentError

CLASSES = 48
LEVELS = 3
STEPS = (9, 3, 1)
"""What a level rounds to, in finest steps."""

_LIMITS = (0.5, 1.5, 4.5)  # beyond these a value is cut where level 2, 1 or 0 does not code its class
_MOST_EXCESS = 0.01  # of what is cut, mean square in finest steps: an eighth of what rounding costs
_PRIOR = 256  # values of the uncalibrated shape that are added to those counted for a class


@dataclass(frozen=True)
class TableSet:
    """Tables of all classes. Class k stands for a deviation of about 2^((k - 13) / 4) finest steps.

    `first` [3]: classes below `first[level]` are not coded at that level. `base` uint16 [48, 256]: frequencies of the
    symbols q0 + 127 and, last, of the escape. `refine` uint16 [2, 48, 4, 2]: c1 and c2 of [level - 1][class][context].
    `shift` float32 [3, 48]: how much nearer to zero a value is put than its number says. Rows of classes that are not
    coded are 0.
    """

    first: tuple[int, int, int]
    base: npt.NDArray[np.uint16]
    refine: npt.NDArray[np.uint16]
    shift: npt.NDArray[np.float32]

    def check(self) -> None:
        """Raise `InvalidArgumentError` for whatever docs/format-scalable.md forbids."""
        _expect(
            len(self.first) == LEVELS and CLASSES >= self.first[0] >= self.first[1] >= self.first[2] >= 1,
            f"the first coded classes must descend from at most {CLASSES} to at least 1, found {self.first}",
        )
        _expect_array("base", self.base, np.dtype(np.uint16), (CLASSES, 2 * LARGEST + 2))
        _expect_array("refine", self.refine, np.dtype(np.uint16), (2, CLASSES, 4, 2))
        _expect_array("shift", self.shift, np.dtype(np.float32), (LEVELS, CLASSES))
        coded = np.arange(CLASSES)[None, :] >= np.array(self.first)[:, None]
        base = self.base[coded[0]]
        _expect(not self.base[~coded[0]].any(), "base rows of classes that are not coded must be 0")
        _expect(bool((base.sum(axis=1, dtype=np.int64) == SLOTS).all()), f"base frequencies must sum to {SLOTS}")
        _expect(bool((base[:, -1] >= 1).all()), "the escape of each coded class needs a frequency")
        _expect(bool((base < SLOTS).all()), f"a base frequency must be below {SLOTS}")
        c1, c2 = (self.refine[coded[1:]][..., number] for number in (0, 1))
        _expect(bool(((c1 > 0) & (c1 < c2) & (c2 < SLOTS)).all()), f"refine must have 0 < c1 < c2 < {SLOTS}")
        _expect(not self.refine[~coded[1:]].any(), "refine rows of classes that are not coded must be 0")
        shift = self.shift[np.isfinite(self.shift)]
        _expect(shift.size == self.shift.size and bool(((shift >= 0) & (shift <= 0.5)).all()), "shift must be 0 to 0.5")

    @cached_property
    def native(self) -> _native.ScalableTables:
        """The tables as the native codec wants them, built at the first use. Raises `InvalidArgumentError`."""
        self.check()
        return _native.ScalableTables(np.array(self.first, np.uint8), self.base, self.refine, self.shift)


@cache
def uncalibrated_tables() -> TableSet:
    """Return the tables that are constants of the format: every class half normal, half Laplace."""
    base = np.zeros((CLASSES, 2 * LARGEST + 2), np.uint16)
    refine = np.zeros((2, CLASSES, 4, 2), np.uint16)
    shift = np.zeros((LEVELS, CLASSES), np.float32)
    first = uncalibrated.FIRST
    for k, line in enumerate(uncalibrated.BASE.splitlines(), start=first[0]):
        escape, *half = map(int, line.split())
        base[k, LARGEST : LARGEST + len(half)] = half
        base[k, LARGEST - len(half) + 1 : LARGEST + 1] = half[::-1]
        base[k, -1] = escape
    thresholds = iter(uncalibrated.REFINE.splitlines())
    for level in (1, 2):
        for k in range(first[level], CLASSES):
            refine[level - 1, k] = np.array(next(thresholds).split(), np.uint16).reshape(4, 2)
    for level, line in enumerate(uncalibrated.SHIFT.splitlines()):
        shift[level, first[level] :] = np.array(line.split(), np.float32) / uncalibrated.SHIFT_UNITS
    for array in (base, refine, shift):
        array.flags.writeable = False
    tables = TableSet(first, base, refine, shift)
    tables.check()
    return tables


def classes_of(y: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the classes uint8 [n'] of components y [tokens, n'], in finest steps, by their root mean square.

    Class 0, which is not coded, where all values round to zero or nearly nothing is lost by it. A component with
    outliers gets a class that is coded at the levels that they need. NaN counts as 0.
    """
    magnitude = np.abs(np.nan_to_num(y, copy=True, nan=0.0, posinf=1e9, neginf=-1e9))
    square = np.mean(np.square(magnitude, dtype=np.float64), axis=0)
    with np.errstate(divide="ignore"):
        found = np.clip(np.rint(13 + 2 * np.log2(square)), 0, CLASSES - 1)
    classes: npt.NDArray[np.uint8] = found.astype(np.uint8)
    classes[magnitude.max(axis=0, initial=0) <= _LIMITS[0]] = 0
    for first, limit in zip(uncalibrated.FIRST[::-1][1:], _LIMITS[1:], strict=True):
        suspects = np.flatnonzero((classes < first) & (magnitude.max(axis=0, initial=0) > limit))
        excess = np.mean(np.square(np.maximum(magnitude[:, suspects] - np.float32(limit), 0)), axis=0)
        classes[suspects[excess > _MOST_EXCESS]] = first
    return classes


def fit_tables(q2: Sequence[npt.NDArray[np.int16]], classes: Sequence[npt.NDArray[np.uint8]]) -> TableSet:
    """Return tables fitted to samples: for each stream q2 [samples, n'] (finest level) and its classes [n'].

    Values of one class are pooled over streams and components, both signs together; a class that was seen little
    keeps the uncalibrated shape.
    """
    pooled = _pool(q2, classes)
    shape = uncalibrated_tables()
    base, refine, shift = shape.base.copy(), shape.refine.copy(), shape.shift.copy()
    for k, values in pooled.items():
        q1 = _third(values)
        numbers = (_third(q1), q1, values)
        if k >= shape.first[0]:
            base[k] = _fit_base(np.abs(numbers[0]), shape.base[k])
        for level in (1, 2):
            if k >= shape.first[level]:
                refine[level - 1, k] = _fit_refine(numbers[level - 1], numbers[level], shape.refine[level - 1, k])
        for level in (0, 1):
            if k >= shape.first[level]:
                shift[level, k] = _fit_shift(numbers[level], values, STEPS[level], shape.shift[:, k], level)
    tables = TableSet(shape.first, base, refine, shift)
    tables.check()
    return tables


def _pool(
    q2: Sequence[npt.NDArray[np.int16]], classes: Sequence[npt.NDArray[np.uint8]]
) -> dict[int, npt.NDArray[np.int32]]:
    pools: dict[int, list[npt.NDArray[np.int32]]] = {}
    for values, of in zip(q2, classes, strict=True):
        for k in np.unique(of):
            pools.setdefault(int(k), []).append(values[:, of == k].astype(np.int32).ravel())
    return {k: np.concatenate(pool) for k, pool in pools.items()}


def _third(numbers: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return (numbers + 1) // 3


def _fit_base(magnitude: npt.NDArray[np.int32], shape: npt.NDArray[np.uint16]) -> list[int]:
    counts = np.bincount(np.minimum(magnitude, LARGEST + 1), minlength=LARGEST + 2).astype(np.float64)
    counts[1:-1] /= 2  # of each sign
    counts += _PRIOR * shape[LARGEST:].astype(np.float64) / SLOTS
    shares = counts / (counts[0] + 2 * counts[1:-1].sum() + counts[-1])
    return symmetric_frequencies(shares[:-1].tolist(), float(shares[-1]))


def _fit_refine(
    coarse: npt.NDArray[np.int32], fine: npt.NDArray[np.int32], shape: npt.NDArray[np.uint16]
) -> list[tuple[int, int]]:
    ternary = np.where(coarse < 0, -1, 1) * (fine - 3 * coarse) + 1
    counts = np.bincount(3 * np.minimum(np.abs(coarse), 3) + ternary, minlength=12).reshape(4, 3).astype(np.float64)
    counts[0, ::2] = counts[0, ::2].mean()
    starts = np.pad(shape.astype(np.float64), ((0, 0), (1, 1)), constant_values=((0, 0), (0, SLOTS)))
    counts += _PRIOR / 4 * np.diff(starts, axis=1) / SLOTS
    return [ternary_thresholds(*row) for row in counts.tolist()]


def _fit_shift(
    numbers: npt.NDArray[np.int32], finest: npt.NDArray[np.int32], step: int, shape: npt.NDArray[np.float32], level: int
) -> float:
    """The mean by which values lie nearer to zero; the finest level's own shift stands for what was rounded away."""
    seen = numbers != 0
    nearer = np.abs(numbers[seen]) - (np.abs(finest[seen]) - float(shape[2])) / step
    total = float(nearer.sum()) + _PRIOR / 16 * float(shape[level])
    return float(min(max(total / (nearer.size + _PRIOR / 16), 0.0), 0.5))


def _expect_array(
    name: str, array: npt.NDArray[np.generic], dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> None:
    _expect(
        array.dtype == dtype and array.shape == shape,
        f"{name} must be {dtype} {shape}, found {array.dtype} {array.shape}",
    )


def _expect(sound: bool, message: str) -> None:
    if not sound:
        raise InvalidArgumentError(f"tables of the scalable codec: {message}; calibrate again")
