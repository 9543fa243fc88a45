"""The affine map between the numbers of a stream and its components: calibrated, or fitted to one chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.calibration import Calibration, Unit
from kvstore_s3.codec.rotation import Floats, Rotation
from kvstore_s3.codec.scalable_stream import MAX_COARSE
from kvstore_s3.codec.tables import TableSet, classes_of, uncalibrated_tables

BASE_STEP = 9
"""The step of level 0 in units of the finest."""

UNCALIBRATED_STEP = {"K": 0.10, "V": 0.14}
"""Finest step over the deviation of a layer's K or V within one head and chunk, in uncalibrated mode."""

_OUTLIER_DEVIATIONS, _OUTLIER_ROUNDS = 24.0, 4
"""Uncalibrated: tokens this many deviations from the mean are kept exact, looked for again without those found."""

_LOUD, _MOST_LOUD = 8.0, 16
"""And tokens with a layer's K or V this many times as far from the mean as the median token's, where they are no more
than one in so many: they raise the deviation themselves, and so hide from it."""

_SMALLEST_STEP = float(np.finfo(np.float32).tiny)

_ADAPT_BITS = 64
"""Classes are given in a stream where that saves more than a byte for each, and these bits."""


@dataclass(frozen=True, slots=True, eq=False)
class StreamMap:
    """`x = mean + S y` and back. One of `unit` (calibrated) and `scale` (a factor for each number) is there.

    `numbers` is n, `components` n'. `mean` and `scale` are float32 [n]; `steps` and `means` are what the bitstream
    carries in uncalibrated mode.
    """

    head: int
    whole: bool
    numbers: int
    components: int
    rotation: Rotation
    tables: TableSet
    classes: npt.NDArray[np.uint8]
    mean: Floats | None = None
    unit: Unit | None = None
    scale: Floats | None = None
    steps: npt.NDArray[np.float32] | None = None
    means: npt.NDArray[np.int8] | None = None
    step_count: int = 0

    @property
    def calibrated(self) -> bool:
        return self.unit is not None

    @property
    def largest(self) -> float:
        """Components of this magnitude and above do not fit the quantiser."""
        return float(BASE_STEP * MAX_COARSE - BASE_STEP)

    def analyse(self, x: Floats) -> Floats:
        """y [T, n'] of x [T, n], from which the mean is taken off already where there is a calibration."""
        if self.unit is None:
            assert self.scale is not None
            assert self.means is not None
            with np.errstate(over="ignore"):  # far outliers become exact tokens
                return np.ascontiguousarray(x / self.scale - BASE_STEP * self.means.astype(np.float32))
        matrix = self.unit.encode_matrix
        if matrix.ndim == 1:
            with np.errstate(over="ignore"):
                return np.ascontiguousarray(x * matrix.numpy())
        values = torch.from_numpy(x)
        if matrix.ndim == 3:
            blocks = values.view(len(x), matrix.shape[0], matrix.shape[2]).transpose(0, 1)
            product = torch.bmm(blocks, matrix.transpose(1, 2)).transpose(0, 1).reshape(len(x), -1)
        else:
            product = values @ matrix.T
        result: Floats = product.contiguous().numpy()
        return result

    def synthesise(self, y: Floats, levels: int | None) -> tuple[Floats, Floats | None]:
        """S y as float32 [T, n], or y itself and the factors that turn it into S y.

        `levels` says how many were read, so that components coded at none of them are left out; None: all count.
        """
        if self.unit is None:
            return y, self.scale
        matrix = self.unit.decode_matrix
        if matrix.ndim == 1:
            return y, matrix.numpy()
        components = torch.from_numpy(y)
        if matrix.ndim == 3:
            blocks = components.view(len(y), *matrix.shape[:2]).transpose(0, 1)
            product = torch.bmm(blocks, matrix).transpose(0, 1).reshape(len(y), -1)
        else:
            count = self.components if levels is None else self._coded_until(levels)
            product = components[:, :count] @ matrix[:count]
        result: Floats = product.contiguous().numpy()
        return result, None

    def _coded_until(self, levels: int) -> int:
        """One more than the last component coded at the last of `levels`; calibrations put the largest first."""
        coded = np.flatnonzero(self.classes >= self.tables.first[levels - 1])
        return int(coded[-1]) + 1 if len(coded) else 1

    def choose_classes(self, y: Floats, exact: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8] | None:
        """The classes that the stream must give, or None where those of the calibration do."""
        found = classes_of(y[~exact])
        if self.unit is None:
            return found
        return found if _worth_giving(self.classes, found, self.tables, len(y)) else None

    def with_steps(self, steps: npt.NDArray[np.float32], means: npt.NDArray[np.int8]) -> StreamMap:
        """This uncalibrated map with the steps [layer x kind] and means [n] of one stream."""
        scale = np.repeat(steps, self.numbers // len(steps))
        with np.errstate(over="ignore"):  # a hostile stream's steps may be as large as they like
            mean = scale * (BASE_STEP * means.astype(np.float32))
        return replace(self, steps=steps, means=means, scale=scale, mean=mean)


_maps: WeakKeyDictionary[Calibration, dict[tuple[int, int, int], StreamMap]] = WeakKeyDictionary()
"""Maps are kept as long as their calibration, which is large, is in use."""


def calibrated_map(calibration: Calibration, group: int, first_head: int, head: int) -> StreamMap:
    """The map of one unit of a calibration: that of the section's head `head`, whose first head is the model's
    `first_head`."""
    maps, place = _maps.setdefault(calibration, {}), (group, first_head, head)
    if place not in maps:
        maps[place] = _build_map(calibration, *place)
    return maps[place]


def _build_map(calibration: Calibration, group: int, first_head: int, head: int) -> StreamMap:
    unit = calibration.units[group, first_head + head]
    begin, end = calibration.group_layers(group)
    whole = calibration.span == "all"
    rotation = calibration.rotation
    mean = calibration.unit_mean(group, first_head + head)
    return StreamMap(
        head=head,
        whole=whole,
        numbers=len(mean),
        components=len(unit.classes),
        rotation=Rotation(rotation.style, rotation.inverse_frequencies, rotation.select(begin, end)),
        tables=calibration.tables,
        classes=unit.classes,
        mean=mean,
        unit=unit,
    )


def uncalibrated_map(rotation: Rotation, layers: int, dim: int, head: int) -> StreamMap:
    """A map without steps yet: `fit_uncalibrated` finds them in values, `with_steps` takes them from a stream."""
    numbers = layers * 2 * dim
    return StreamMap(
        head=head,
        whole=False,
        numbers=numbers,
        components=numbers,
        rotation=rotation,
        tables=uncalibrated_tables(),
        classes=np.zeros(numbers, np.uint8),
        step_count=layers * 2,
    )


def fit_uncalibrated(
    one: StreamMap, x: Floats, exact: npt.NDArray[np.bool_]
) -> tuple[StreamMap, npt.NDArray[np.bool_]]:
    """Steps from the deviation of each layer's K and V, means in base steps; also which tokens are to be exact.

    These are `exact` and outliers, which would coarsen the step for all others.
    """
    kept = ~exact
    center, deviation = np.zeros(one.numbers), np.zeros(one.step_count)
    for _ in range(_OUTLIER_ROUNDS):
        if not kept.any():
            break
        values = x[kept].astype(np.float64)
        center = values.mean(axis=0)
        away = np.abs(values - center).reshape(len(values), one.step_count, -1)
        distance = np.sqrt((away**2).mean(axis=2))
        deviation = np.sqrt((distance**2).mean(axis=0))
        limit = min(_OUTLIER_DEVIATIONS, 0.5 * math.sqrt(len(values) * away.shape[2]))
        far = (away.max(axis=2) > np.maximum(limit, 4) * deviation).any(axis=1)
        far |= _loud_tokens(distance)
        if not far.any():
            break
        kept[np.flatnonzero(kept)[far]] = False
    ratio = np.tile([UNCALIBRATED_STEP["K"], UNCALIBRATED_STEP["V"]], one.step_count // 2)
    steps = np.clip(np.where(deviation > 0, deviation * ratio, 1.0), _SMALLEST_STEP, 1e30).astype(np.float32)
    scale = np.repeat(steps.astype(np.float64), one.numbers // one.step_count)
    means = np.clip(np.rint(center / (BASE_STEP * scale)), -127, 127).astype(np.int8)
    return replace(one.with_steps(steps, means), mean=None), ~kept


def _loud_tokens(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which tokens are far from the mean as a whole; `distance` [tokens, layer x kind], their root mean square."""
    loud = distance > _LOUD * np.median(distance, axis=0)
    few = np.count_nonzero(loud, axis=0) <= max(1, len(distance) // _MOST_LOUD)
    found: npt.NDArray[np.bool_] = (loud & few).any(axis=1)
    return found


def _worth_giving(static: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8], tables: TableSet, tokens: int) -> bool:
    """Whether naming the found classes, a byte each, saves bits, or saves components that the static ones leave out.

    A sample that is r times as large as its Laplace table expects costs (r - 1 - ln r) / ln 2 bits more; of a component
    that is mostly zero, in proportion to how often it is not.
    """
    last = tables.first[-1]
    lost = (static < last) & (found >= last + 4)
    if lost.any():
        return True
    ratio = 2.0 ** ((found.astype(np.float64) - static) / 4)
    busy = np.minimum(1.0, 2.0 ** ((found.astype(np.float64) - 13) / 4))
    extra = np.where(static >= last, (ratio - 1 - np.log(ratio)) / np.log(2) * busy, 0.0)
    return bool(extra.sum() * tokens > 8 * len(static) + _ADAPT_BITS)
