"""The simulator's results as SVG: bars of mean time to first token, with the 95th percentile as a line above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, PANEL, TOP, LEFT = 1080, 250, 56, 60
LEGEND = 210
COLOURS = ("#b8b8b8", "#8d9aa5", "#5c6670", "#c8553d", "#b8860b", "#20808d", "#1b6ca8", "#8e5ea2", "#2e8b57")

Bar = tuple[str, float, float]
"""Name, mean and 95th percentile."""


def draw(result: Mapping[str, Any]) -> str:
    """Three panels: lossless loads and loads with levels for each trace, and loads that share a link."""
    panels = [
        ("Lossless: time to first token, s", _by_trace(result["lossless"])),
        ("Three levels and a deadline: time to first token, s", _by_trace(result["levels"])),
        ("Loads that share a link: time added by loading, s", _by_use(result["sharing"])),
    ]
    height = TOP + PANEL * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(LEFT, 24, "Bars: mean. Lines: 95th percentile. Arrows: beyond the scale.", size=13),
    ]
    for number, (title, groups) in enumerate(panels):
        parts += _panel(title, groups, TOP + number * PANEL)
    return "\n".join([*parts, "</svg>", ""])


def _by_trace(traces: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, list[Bar]]:
    return {
        trace: [(name, row["mean_s"], row["p95_s"]) for name, row in rows.items()] for trace, rows in traces.items()
    }


def _by_use(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Bar]]:
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        bars = groups.setdefault(f"{row['engine']}, {row['utilisation']:.0%} used", [])
        if "planned" not in row["order"]:
            bars.append((row["order"], row["mean_s"], row["p95_s"]))
    return groups


def _panel(title: str, groups: Mapping[str, Sequence[Bar]], top: float) -> list[str]:
    bottom, right = top + PANEL - 60, WIDTH - LEGEND
    most = _scale_end(groups)
    names = [name for name, *_ in next(iter(groups.values()))]
    slot = (right - LEFT) / len(groups)
    width = slot * 0.86 / len(names)
    parts = [
        _text(LEFT, top - 8, title, size=13),
        f'<path d="M{LEFT} {top}V{bottom}H{right}" stroke="#888" fill="none"/>',
    ]
    for tick in range(5):
        y = bottom - (bottom - top) * tick / 4
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{most * tick / 4:.2g}", anchor="end"))
    for place, (label, bars) in enumerate(groups.items()):
        left = LEFT + slot * (place + 0.07)
        for number, bar in enumerate(bars):
            parts += _bar(bar, left + number * width, width, bottom, (bottom - top) / most, _colour(number, bars))
        parts.append(_text(LEFT + slot * (place + 0.5), bottom + 18, label, anchor="middle"))
    bars = next(iter(groups.values()))
    for number, name in enumerate(names):
        y = top + 12 + 19 * number
        parts.append(f'<rect x="{right + 14}" y="{y - 9:.1f}" width="12" height="11" fill="{_colour(number, bars)}"/>')
        parts.append(_text(right + 32, y, name))
    return parts


def _scale_end(groups: Mapping[str, Sequence[Bar]]) -> float:
    """Half as much again as the best bar's percentile, so that a policy that goes astray does not flatten the rest."""
    return max(1.5 * min(p95 for _, _, p95 in bars) for bars in groups.values()) * 1.3


def _colour(number: int, bars: Sequence[Bar]) -> str:
    return COLOURS[number + (len(COLOURS) - len(bars))]


def _bar(bar: Bar, x: float, width: float, bottom: float, unit: float, colour: str) -> list[str]:
    name, mean, p95 = bar
    tallest = PANEL - 60
    height, whisker = min(mean * unit, tallest), min(p95 * unit, tallest)
    centre = x + width / 2
    mark = (
        f'<path d="M{centre - 4:.1f} {bottom - tallest + 6:.1f}l4 -7l4 7z" fill="#222"/>'
        if p95 * unit > tallest
        else ""
    )
    return [
        f'<rect x="{x:.1f}" y="{bottom - height:.1f}" width="{width * 0.9:.1f}" height="{height:.1f}" fill="{colour}">'
        f"<title>{escape(name)}: mean {mean:.3f} s, 95 % within {p95:.3f} s</title></rect>",
        f'<path d="M{centre:.1f} {bottom - height:.1f}V{bottom - whisker:.1f}" stroke="#222"/>{mark}',
    ]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222">{escape(text)}</text>'
