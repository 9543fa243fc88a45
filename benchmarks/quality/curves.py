"""Rates at equal KL: along each method's curve, log KL against bits. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from quality.measure import Point

REACH = 1.2


def curves_of(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each method, by rising rate."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.curve, []).append(point)
    return {name: sorted(curve, key=lambda point: point.bits) for name, curve in found.items()}


def bits_at(curve: Sequence[Point], kl: float) -> float | None:
    """Bits at which `curve` (by rising rate) has this KL; None beyond its ends, where nothing was measured.

    A KL at most `REACH` times beyond an end counts as measured: it is read off the line of the last two points.
    """
    if len(curve) > 1:
        curve = [_extend(curve[1], curve[0], REACH), *curve, _extend(curve[-2], curve[-1], 1 / REACH)]
    for low, high in pairwise(curve):
        if low.kl >= kl >= high.kl > 0:
            if low.kl == high.kl:
                return low.bits
            share = math.log(low.kl / kl) / math.log(low.kl / high.kl)
            return low.bits + share * (high.bits - low.bits)
    return next((point.bits for point in curve if point.kl == kl), None)


def _extend(inner: Point, end: Point, factor: float) -> Point:
    """A point on the line from `inner` through `end`, where the KL is `factor` times that of `end`."""
    if not (inner.kl > 0 and end.kl > 0 and inner.kl != end.kl):
        return end
    bits = end.bits + math.log(factor) * (end.bits - inner.bits) / math.log(end.kl / inner.kl)
    return replace(end, bits=max(bits, 0.0), judged=replace(end.judged, kl=end.kl * factor))


def ratios(curve: Sequence[Point], peer: Sequence[Point]) -> list[tuple[float, float]]:
    """(KL, bits of `curve` / bits of `peer`) at each KL that either measured and both reach, by falling KL."""
    levels = sorted({point.kl for point in (*curve, *peer) if point.kl > 0}, reverse=True)
    pairs = [(kl, bits_at(curve, kl), bits_at(peer, kl)) for kl in levels]
    return [(kl, ours / theirs) for kl, ours, theirs in pairs if ours is not None and theirs]
