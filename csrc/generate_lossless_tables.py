"""Write lossless_tables.h: the fixed tables of the lossless codec, as integers. Run it to rebuild the header:

    python csrc/generate_lossless_tables.py > csrc/lossless_tables.h

The tables come from a family of distributions, not from any model: a value of root mean square 2^phase is 3/4
normal and 1/4 Laplace around a mean of `ratio` standard deviations. The header is what counts: it is part of the
format and never changes again, whatever another libm would round.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erf, exp, floor, sqrt

SLOTS = 4096
STEPS = 30  # half octaves below the top that have symbols of their own; steps 30 and 31 are escapes
TOP = 2  # exponent of the top octave of a value with root mean square 1 to 2
NORMAL = 0.75
PHASES = (0.0, 0.5)
NARROW_PHASES = (0.32, 0.81)  # puts a narrow distribution into the middle of a half octave
RATIOS = (0.0, 0.4, 0.8, 1.2, 1.7, 2.5, 4.0, 12.0)  # mean over deviation
NARROW = 12.0
RAREST = 1 / 8192  # what is rarer than this is left to the escapes


def cumulative(x: float) -> float:
    """Share of values below x, mean 0 and deviation 1."""
    normal = 0.5 * (1 + erf(x / sqrt(2)))
    tail = 0.5 * exp(-abs(x) * sqrt(2))
    laplace = tail if x < 0 else 1 - tail
    return NORMAL * normal + (1 - NORMAL) * laplace


def half_octave(step: int) -> tuple[float, float]:
    """Bounds of the magnitudes of a step: step 0 is the upper half of the top octave."""
    low = 2.0 ** (TOP - step // 2)
    return (1.5 * low, 2 * low) if step % 2 == 0 else (low, 1.5 * low)


def probabilities(ratio: float, phase: float) -> list[float]:
    """Of the symbols sign * 32 + step; 0 for those left to the escapes."""
    deviation = 2.0**phase / sqrt(1 + ratio * ratio)

    def share(low: float, high: float) -> float:
        return cumulative(high / deviation - ratio) - cumulative(low / deviation - ratio)

    signed: list[Callable[[float, float], float]] = [share, lambda low, high: share(-high, -low)]
    shares = [of(*half_octave(step)) if step < STEPS else 0.0 for of in signed for step in range(32)]
    return [p if p >= RAREST else 0.0 for p in shares]


def frequencies(shares: list[float]) -> list[int]:
    """Integers that sum to SLOTS, at least 1 for each symbol that has a share and for each escape."""
    counts = [max(1, floor(p * SLOTS + 0.5)) if p else 0 for p in shares]
    escape = max(1, floor((1 - sum(shares)) * SLOTS / 4 + 0.5))
    for symbol in (30, 31, 62, 63):
        counts[symbol] = escape
    while (surplus := sum(counts) - SLOTS) != 0:
        largest = max(range(64), key=lambda symbol: counts[symbol])
        counts[largest] -= max(-8, min(8, surplus))
    return counts


def tables() -> list[list[int]]:
    """Sixteen tables of 64 frequencies: for each ratio one per phase."""
    return [
        frequencies(probabilities(ratio, phase))
        for ratio in RATIOS
        for phase in (NARROW_PHASES if ratio >= NARROW else PHASES)
    ]


def header() -> str:
    lines = [
        "// The fixed tables of the lossless codec: written by generate_lossless_tables.py, part of the format.",
        "// Row: class table. Column: symbol, sign * 32 + half octaves below the top; 30, 31, 62, 63 are escapes.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace kvs {",
        "",
        "// clang-format off",
        "inline constexpr std::uint16_t kFrequencies[16][64] = {",
    ]
    for table in tables():
        lines.append("    {" + ", ".join(map(str, table[:32])) + ",")
        lines.append("     " + ", ".join(map(str, table[32:])) + "},")
    return "\n".join([*lines, "};", "// clang-format on", "", "}  // namespace kvs"])


if __name__ == "__main__":
    print(header())
