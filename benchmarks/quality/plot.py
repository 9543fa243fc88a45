"""Rate against KL as SVG, written by hand: no plotting library is needed for two logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from quality.measure import Point

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 70, 300, 50, 60
COLOURS = ("#1b6ca8", "#c8553d", "#2e8b57", "#8e5ea2", "#b8860b", "#20808d", "#a23b72", "#5c6670", "#7a9e1f", "#3d3d8f")

Scale = Callable[[float], float]


def draw_curves(curves: Mapping[str, Sequence[Point]], title: str) -> str:
    """KL (log) over bits a value (log) for all methods with a KL above 0; up and to the right is worse."""
    drawn = {name: [point for point in curve if point.kl > 0] for name, curve in curves.items()}
    drawn = {name: curve for name, curve in drawn.items() if curve}
    points = [point for curve in drawn.values() for point in curve]
    across = _scale([point.bits for point in points], LEFT, WIDTH - RIGHT)
    up = _scale([point.kl for point in points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 28, title, size=15),
        *_axes([point.bits for point in points], [point.kl for point in points], across, up),
    ]
    for number, (name, curve) in enumerate(drawn.items()):
        parts += _curve(name, curve, COLOURS[number % len(COLOURS)], 24 + 20 * number + TOP, across, up)
    return "\n".join([*parts, "</svg>", ""])


def _scale(values: Sequence[float], begin: float, end: float) -> Scale:
    low, high = math.log(min(values) / 1.15), math.log(max(values) * 1.15)
    return lambda value: begin + (math.log(value) - low) / (high - low) * (end - begin)


def _ticks(values: Sequence[float], steps: Iterable[int]) -> list[float]:
    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]


def _axes(bits: Sequence[float], kls: Sequence[float], across: Scale, up: Scale) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" fill="none" stroke="#888"/>']
    for tick in _ticks(bits, (1, 2, 3, 4, 6, 8)):
        x = across(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(_text(x, bottom + 18, f"{tick:g}", anchor="middle"))
    for tick in _ticks(kls, (1,)):
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 18, "bits per value, everything included", anchor="middle"))
    parts.append(_text(LEFT, TOP - 8, "KL x 1000, nats per token"))
    return parts


def _curve(name: str, curve: Sequence[Point], colour: str, legend: float, across: Scale, up: Scale) -> list[str]:
    dash = "" if name.startswith("ours") else ' stroke-dasharray="5 3"'
    spots = [(across(point.bits), up(point.kl), point) for point in curve]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in spots)
    x = WIDTH - RIGHT + 20
    return [
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>',
        *(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(name)}, {escape(point.setting)}: {point.bits:.3f} bits, KL {point.kl:.4g}</title></circle>"
            for x, y, point in spots
        ),
        f'<path d="M{x} {legend - 4:.1f}h22" stroke="{colour}" stroke-width="2.5"{dash}/>',
        _text(x + 28, legend, name),
    ]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222">{escape(text)}</text>'
