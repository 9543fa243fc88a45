"""What it costs to embed three qualities in one object, beside coding each quality alone at the same step.

Both are ideal code lengths of the same integers under the same classes, with tables counted on the same calibration
chunks; the single-rate code has for every class a table of all its integers, and codes what the embedded one codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.tables import CLASSES, TableSet, fit_tables
from quality.kvtc import rotate
from quality.measure import Values

QUALITIES = ("small", "balanced", "near-lossless")
SLOTS = 4096
LARGEST = 127
SMALLEST = 2.0**-20
"""Probability of what was never seen, in the table of the single-rate code."""

Integers = npt.NDArray[np.int16]
Classes = npt.NDArray[np.uint8]
Part = tuple[Integers, Classes]
Nested = tuple[list[Integers], Classes]
"""The integers of each level of one stream, and its classes."""


def embedding_cost(calibration: Calibration, learned: Values, judged: Values) -> dict[str, float]:
    """By quality: bits of the embedded code / bits of the single-rate code.

    `learned` and `judged` are chunks at position 0, bfloat16 [chunks, layers, 2, tokens, heads, dim]: for counting
    tables, and for measuring.
    """
    parts = integers_of(calibration, learned)
    tables = fit_tables([integers for integers, _ in parts], [classes for _, classes in parts])
    seen = [nest(part, tables.first) for part in parts]
    new = [nest(part, tables.first) for part in integers_of(calibration, judged)]
    costs, embedded = {}, 0.0
    for level, quality in enumerate(QUALITIES):
        embedded += sum(_embedded_bits(part, tables, level) for part in new)
        single = sum(
            _single_bits(pool(seen, level, number), pool(new, level, number))
            for number in range(tables.first[level], CLASSES)
        )
        costs[quality] = embedded / single if single else 1.0
    return costs


def integers_of(calibration: Calibration, chunks: Values) -> list[Part]:
    """The finest integers [tokens, n'] of every stream, without each chunk's first token, and its classes."""
    keys, values = chunks.float().unbind(2)
    turned = torch.stack([rotate(keys, calibration.rotation, 0, -1), values], 2)[:, :, :, 1:]
    parts = []
    for group, head in calibration.units:
        begin, end = calibration.group_layers(group)
        heads = slice(None) if calibration.span == "all" else slice(head, head + 1)
        mean = torch.from_numpy(calibration.unit_mean(group, head))
        x = turned[:, begin:end, :, :, heads].permute(0, 3, 4, 1, 2, 5).reshape(-1, len(mean))
        unit = calibration.units[group, head]
        y = _analyse(unit.encode_matrix, x - mean).numpy()
        parts.append((np.rint(y).clip(-32000, 32000).astype(np.int16), unit.classes))
    return parts


def _analyse(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Components [rows, n'] of x [rows, n]; a matrix for all, one for each block, or a factor for each number."""
    if matrix.ndim == 1:
        return x * matrix
    if matrix.ndim == 2:
        return x @ matrix.T
    return torch.einsum("rbn,bcn->rbc", x.unflatten(1, (len(matrix), -1)), matrix).flatten(1)


def nest(part: Part, first: tuple[int, int, int]) -> Nested:
    """The three levels of rounding, with what is not coded at a level 0 there and bounded at the next."""
    finest, classes = part
    middle = _third(finest)
    levels: list[Integers] = []
    for level, wanted in enumerate((_third(middle), middle, finest)):
        bounded = wanted if level == 0 else np.clip(wanted, 3 * levels[-1] - 1, 3 * levels[-1] + 1)
        levels.append(np.where(classes >= first[level], bounded, 0).astype(np.int16))
    return levels, classes


def pool(parts: Sequence[Nested], level: int, number: int) -> Integers:
    """All integers of one level and class."""
    return np.concatenate([levels[level][:, classes == number].ravel() for levels, classes in parts])


def _third(integers: Integers) -> Integers:
    return np.rint(integers / 3).astype(np.int16)


def _embedded_bits(part: Nested, tables: TableSet, level: int) -> float:
    """What one level adds."""
    levels, classes = part
    coded = classes >= tables.first[level]
    names, q = classes[coded], levels[level][:, coded].astype(np.int64)
    if level == 0:
        own = tables.base[names, np.clip(q, -LARGEST, LARGEST) + LARGEST]
        escaped = (np.abs(q) > LARGEST) | (own == 0)
        frequencies = np.where(escaped, tables.base[names, 2 * LARGEST + 1], own)
        return float(np.log2(SLOTS / frequencies).sum()) + 16.0 * int(escaped.sum())
    p = levels[level - 1][:, coded].astype(np.int64)
    u = np.where(p < 0, 3 * p - q, q - 3 * p)
    thresholds = tables.refine[level - 1][names, np.minimum(np.abs(p), 3)].astype(np.int64)
    bounds = np.concatenate(
        [np.zeros_like(thresholds[..., :1]), thresholds, np.full_like(thresholds[..., :1], SLOTS)], -1
    )
    frequencies = np.take_along_axis(np.diff(bounds, axis=-1), (u + 1)[..., None], -1)
    return float(np.log2(SLOTS / frequencies).sum())


def _single_bits(seen: Integers, new: Integers) -> float:
    """Ideal bits of `new` under a table counted on `seen`, without the limits of a real table."""
    if not new.size:
        return 0.0
    largest = int(np.abs(seen).max(initial=0)) + 1
    escape = 2 * largest + 1
    counts = np.bincount(seen.astype(np.int64) + largest, minlength=escape + 1).astype(np.float64)
    probabilities = np.maximum(counts / max(seen.size, 1), SMALLEST)
    probabilities /= probabilities.sum()
    escaped = np.abs(new.astype(np.int64)) > largest
    symbols = np.where(escaped, escape, new.astype(np.int64) + largest)
    return float(-np.log2(probabilities[symbols]).sum()) + 16.0 * int(escaped.sum())
