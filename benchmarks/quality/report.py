"""The tables, on the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from quality.curves import bits_at
from quality.measure import Point
from quality.reading import ReaderCost
from quality.targets import Row

Curves = Mapping[str, Sequence[Point]]


def print_points(title: str, points: Iterable[Point], ours: Sequence[Point]) -> None:
    """One line for each point; the last column is what our default span needs at the same KL, relative to it."""
    print(f"\n{title}")
    print(
        f"{'method':30}{'setting':24}{'bits/value':>11}{'KL x1000':>11}{'top-1 %':>9}{'ppl %':>8}"
        f"{'enc GB/s':>10}{'dec GB/s':>10}{'ours/it':>9}"
    )
    for point in points:
        same = bits_at(ours, point.kl)
        print(
            f"{point.curve:30}{point.setting:24}{point.bits:11.3f}{point.kl:11.4g}{point.judged.top1:9.2f}"
            f"{point.judged.perplexity:8.3f}{_speed(point.encode_gb_s)}{_speed(point.decode_gb_s)}"
            f"{'-' if same is None else f'{same / point.bits:.3f}':>9}"
        )


def print_spans(
    curves: Curves, costs: Mapping[str, ReaderCost], levels: Mapping[str, float], sizes: Mapping[str, int]
) -> None:
    """Span against rate at equal KL, decode cost, and what readers of parts pay."""
    print("\nSpan against rate at equal KL, and what readers pay (shares of near-lossless objects)")
    heads = "".join(f"{f'bits @{name}':>20}" for name in levels)
    print(f"{'span':30}{heads}{'dec GB/s':>10}{'width':>7}{'one head':>10}{'layer group':>16}{'calibration':>13}")
    for name, cost in costs.items():
        rates = [bits_at(curves[name], kl) for kl in levels.values()]
        cells = "".join(f"{'-' if bits is None else f'{bits:.3f}':>20}" for bits in rates)
        decode = next((point.decode_gb_s for point in curves[name] if point.setting == "near-lossless"), None)
        group = f"{cost.first_group:.3f} ({cost.layer_group})"
        size = f"{sizes[name] / 1e6:.1f} MB" if sizes.get(name) else "-"
        print(f"{name:30}{cells}{_speed(decode)}{cost.multiplications:7}{cost.one_head:10.3f}{group:>16}{size:>13}")


def print_targets(rows: Iterable[Row]) -> None:
    print(f"\n{'target':58}{'found':>10}{'limit':>10}  met")
    for row in rows:
        found = "-" if row.found is None else f"{row.found:.4g}"
        met = {True: "met", False: "NOT MET", None: "not measured"}[row.met]
        print(f"{row.name:58}{found:>10}{row.limit:>10.4g}  {met}{'; ' + row.detail if row.detail else ''}")


def points_as_json(points: Iterable[Point]) -> list[dict[str, Any]]:
    return [round_numbers(asdict(point)) for point in points]


def round_numbers(value: Any) -> Any:
    """Floats to 6 significant digits, in nested documents too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: round_numbers(item) for key, item in value.items()}
    return [round_numbers(item) for item in value] if isinstance(value, (list, tuple)) else value


def _speed(found: float | None) -> str:
    return f"{'-' if found is None else f'{found:.3g}':>10}"
