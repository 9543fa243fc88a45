"""Bars of CPU cost as SVG, written by hand: one panel for each row of the table, one bar for each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

PANELS_ACROSS = 2
WIDTH, BAR, GAP = 500, 18, 6
LEFT, RIGHT, TOP, BOTTOM = 140, 120, 52, 26
OURS, PEER, LIMIT, GOAL = "#1b6ca8", "#b9c2cb", "#e0b04c", "#c8553d"


class Panel:
    """`bars`: cost by client; `notes`: what stands behind each bar; `goal`: a line, where there is one."""

    def __init__(self, title: str, unit: str, bars: Mapping[str, float], notes: Mapping[str, str], goal: float | None):
        self.title = title
        self.unit = unit
        self.bars = bars
        self.notes = notes
        self.goal = goal

    @property
    def height(self) -> int:
        return TOP + len(self.bars) * (BAR + GAP) + BOTTOM


def draw_bars(panels: Sequence[Panel], title: str, ours: str, limit: str) -> str:
    """Shorter is better. `ours` and `limit` are the clients that get colours of their own."""
    rows = [panels[begin : begin + PANELS_ACROSS] for begin in range(0, len(panels), PANELS_ACROSS)]
    heights = [max(panel.height for panel in row) for row in rows]
    width, height = WIDTH * PANELS_ACROSS, 46 + sum(heights)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 28, title, size=15),
    ]
    top = 46
    for row, tall in zip(rows, heights, strict=True):
        for number, panel in enumerate(row):
            parts += _panel(panel, number * WIDTH, top, ours, limit)
        top += tall
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: float, top: float, ours: str, limit: str) -> list[str]:
    longest = max([*panel.bars.values(), panel.goal or 0.0]) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [_text(left + 16, top + 18, panel.title, size=13), _text(left + 16, top + 36, panel.unit, colour="#777")]
    bottom = top + TOP + len(panel.bars) * (BAR + GAP)
    if panel.goal is not None:
        x = left + LEFT + panel.goal * scale
        parts.append(f'<path d="M{x:.1f} {top + TOP - 4}V{bottom}" stroke="{GOAL}" stroke-width="1.6"/>')
        parts.append(_text(x, bottom + 13, f"goal {panel.goal:g}", anchor="middle", colour=GOAL))
    for number, (name, value) in enumerate(panel.bars.items()):
        colour = OURS if name == ours else LIMIT if name == limit else PEER
        x, y, length = left + LEFT, top + TOP + number * (BAR + GAP), max(value * scale, 1.0)
        parts.append(_text(x - 8, y + 13, name, anchor="end"))
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(_text(x + length + 6, y + 13, f"{value:.3g} {panel.notes.get(name, '')}".strip()))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
