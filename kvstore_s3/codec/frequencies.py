"""From shares to the integers of the scalable codec's tables: they sum to 4096, and whatever can occur has a slot."""

from __future__ import annotations

from collections.abc import Sequence

SLOTS = 4096
LARGEST = 127  # q0 from -127 to 127 has symbols of its own; the rest is escaped
ALWAYS = 2  # magnitudes up to this have a slot in every table
RAREST = 1 / 16384  # above them, what is rarer than this is left to the escapes


def symmetric_frequencies(shares: Sequence[float], escape: float) -> list[int]:
    """Return frequencies [256] of symbols q0 + 127 and the escape, from the shares of |q0| = 0 to 127.

    `shares[m]` is the share of +m and of -m each, `escape` what is left; equal signs get equal frequencies.
    """
    exact = [share * SLOTS for share in shares]
    counts = [max(round(x), 1) if m <= ALWAYS or x > RAREST * SLOTS else 0 for m, x in enumerate(exact)]
    last = max(1, min(round(escape * SLOTS), SLOTS + counts.count(0) * 2 - 2 * len(counts)))
    while surplus := counts[0] + 2 * sum(counts[1:]) + last - SLOTS:
        step = 1 if surplus > 0 else -1
        single = abs(surplus) == 1  # only 0 has one symbol alone
        able = [m for m, count in enumerate(counts) if count > step and count]
        fit = [m for m in able if m == 0 or not single] or able  # too much for one: then 0 makes up for it
        if not fit:
            last -= step
            continue
        # The one that is furthest off, in slots for its share: that costs the fewest bits.
        counts[max(fit, key=lambda m: step * (counts[m] - exact[m]) / (exact[m] + 1))] -= step
    return [*reversed(counts[1:]), *counts, last]


def ternary_thresholds(inner: float, middle: float, outer: float) -> tuple[int, int]:
    """Return c1 and c2 for the weights of u = -1, 0 and 1, each with a slot at least; equal weights if all are 0."""
    total = inner + middle + outer
    if total <= 0:
        return ternary_thresholds(1, 1, 1)
    below = min(max(round(SLOTS * inner / total), 1), SLOTS - 2)
    above = min(max(round(SLOTS * outer / total), 1), SLOTS - 1 - below)
    return below, SLOTS - above
