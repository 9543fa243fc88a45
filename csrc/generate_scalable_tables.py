"""Write kvstore_s3/codec/uncalibrated.py: the fixed tables of the scalable codec, as integers. Run it to rebuild:

    python csrc/generate_scalable_tables.py > kvstore_s3/codec/uncalibrated.py

The tables come from a family of distributions, not from any model: class k is half normal, half Laplace with mean 0 and
a deviation of 2^((k - 13) / 4) of the finest step. The module is what counts: it is part of the format and never
changes again, whatever another libm would round.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erf, exp, pi, sqrt

from kvstore_s3.codec.frequencies import LARGEST, symmetric_frequencies, ternary_thresholds

CLASSES = 48
FIRST = (10, 4, 1)  # a component of the class below reaches the level's first threshold at 8 to 9 deviations
STEPS = (9, 3, 1)
SHIFT_UNITS = 4096


def deviation(k: int) -> float:
    return float(2.0 ** ((k - 13) / 4))


def share_above(x: float) -> float:
    """Share of values above x >= 0, deviation 1."""
    return 0.25 * (1 - erf(x / sqrt(2))) + 0.25 * exp(-sqrt(2) * x)


def mean_above(x: float) -> float:
    """Integral of the value over all values above x >= 0, deviation 1."""
    return 0.5 * exp(-x * x / 2) / sqrt(2 * pi) + 0.25 * (x + 1 / sqrt(2)) * exp(-sqrt(2) * x)


def between(of: Callable[[float], float], low: float, high: float) -> float:
    return of(low) - of(high)


def bin_share(k: int, step: int, number: int) -> float:
    """Share of values that are rounded to `number` steps."""
    low, high = (step * (abs(number) + half) / deviation(k) for half in (-0.5, 0.5))
    return 2 * (share_above(0) - share_above(high)) if number == 0 else between(share_above, low, high)


def base_row(k: int) -> list[int]:
    shares = [bin_share(k, STEPS[0], number) for number in range(LARGEST + 1)]
    return symmetric_frequencies(shares, 2 * share_above(STEPS[0] * (LARGEST + 0.5) / deviation(k)))


def refine_row(k: int, level: int) -> list[tuple[int, int]]:
    """c1 and c2 for each context: |p| = 0, 1, 2, and 3 or more."""
    step = STEPS[level]
    rows = []
    for numbers in ([0], [1], [2], range(3, 400)):
        weights = [sum(bin_share(k, step, 3 * number + u) for number in numbers) for u in (-1, 0, 1)]
        rows.append(ternary_thresholds(*weights))
    return rows


def shift(k: int, level: int) -> int:
    """How much nearer to zero than their number values are, in steps: the mean over all that are not 0."""
    step, edge = STEPS[level], STEPS[level] / 2 / deviation(k)
    share = share_above(edge)
    if share < 1e-12:
        return SHIFT_UNITS // 2
    numbers = sum(share_above((number + 0.5) * step / deviation(k)) for number in range(4000))
    nearer = (numbers - mean_above(edge) * deviation(k) / step) / share
    return min(max(round(SHIFT_UNITS * nearer), 0), SHIFT_UNITS // 2)


def rows(name: str, meaning: str, lines: list[str]) -> list[str]:
    wrapped = []
    for line in lines:
        while len(line) > 116:
            cut = line.rindex(" ", 0, 116)
            wrapped.append(line[:cut] + " \\")
            line = "  " + line[cut + 1 :]
        wrapped.append(line)
    return [f'{name} = """\\', *wrapped, '"""', f'"""{meaning}"""', ""]


def module() -> str:
    base, refine, shifts = [], [], []
    for k in range(FIRST[0], CLASSES):
        counts = base_row(k)
        half = counts[LARGEST:255]
        while half[-1] == 0:
            half.pop()
        base.append(f"{counts[255]} {' '.join(map(str, half))}")
    for level in (1, 2):
        for k in range(FIRST[level], CLASSES):
            refine.append("  ".join(f"{c1} {c2}" for c1, c2 in refine_row(k, level)))
    for level in range(3):
        shifts.append(" ".join(str(shift(k, level)) for k in range(FIRST[level], CLASSES)))
    return "\n".join(
        [
            '"""The uncalibrated tables of the scalable codec: written by csrc/generate_scalable_tables.py, part of '
            'the format."""',
            "",
            "from __future__ import annotations",
            "",
            f"FIRST = {FIRST}",
            '"""The first class that is coded at each level."""',
            "",
            *rows("BASE", "For each class coded at level 0: frequencies of the escape and of |q0| = 0, 1 ...", base),
            *rows("REFINE", "For levels 1 and 2, each class coded there: c1 and c2 of the contexts 0 to 3.", refine),
            f"SHIFT_UNITS = {SHIFT_UNITS}",
            *rows("SHIFT", "For each level: the shift of each class coded there, in 1 / SHIFT_UNITS.", shifts),
        ]
    ).rstrip()


if __name__ == "__main__":
    print(module())
