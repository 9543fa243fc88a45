"""Small calibrations for tests: a plain KLT of given values, all of whose directions count alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.calibration import Calibration, Unit
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.tables import classes_of, fit_tables
from kvstore_s3.layout import KVLayout

Floats = npt.NDArray[Any]


def undo_rotation(kv: torch.Tensor, rotation: Rotation, first_position: int) -> Floats:
    """KV [L, 2, T, H, d] as float64 with K turned back ("halves" or "none")."""
    values = kv.to(torch.float64).numpy().copy()
    if rotation.style == "none":
        return values
    cos, sin = (table.astype(np.float64)[:, None] for table in rotation.tables(first_position, kv.shape[2]))
    pairs = cos.shape[2]
    a, b = values[:, 0, :, :, :pairs].copy(), values[:, 0, :, :, pairs : 2 * pairs].copy()
    values[:, 0, :, :, :pairs] = a * cos + b * sin
    values[:, 0, :, :, pairs : 2 * pairs] = b * cos - a * sin
    return values


def make_calibration(
    layout: KVLayout,
    span: str,
    sample: Callable[[int], torch.Tensor],
    *,
    layer_group: int | None = None,
    relative_step: float = 0.02,
    namespace: bytes = bytes(32),
) -> Calibration:
    """A calibration of `span` from three samples of KV [L, 2, T, H, d] that start at position 256."""
    rotation = Rotation.from_layout(layout)
    values = np.concatenate([undo_rotation(sample(seed), rotation, 256) for seed in range(3)], axis=2)
    mean = values.mean(axis=2).astype(np.float32)
    centered = values - mean[:, :, None]
    group = layer_group or layout.layers
    step = relative_step * float(np.sqrt((centered**2).mean()))
    found: dict[tuple[int, int], tuple[Floats, Floats, Floats]] = {}
    for index, begin in enumerate(range(0, layout.layers, group)):
        part = centered[begin : begin + group]
        for head in range(1 if span == "all" else layout.kv_heads):
            heads = slice(None) if span == "all" else slice(head, head + 1)
            x = part[:, :, :, heads].transpose(2, 3, 0, 1, 4).reshape(part.shape[2], -1)
            found[index, head] = _fit(x, span, layout.head_dim, step)
    classes = {place: _classes(y) for place, (y, _, _) in found.items()}
    tables = fit_tables([np.rint(y).astype(np.int16) for y, _, _ in found.values()], list(classes.values()))
    units = {
        place: _unit(classes[place], synthesis.astype(np.float32), analysis.astype(np.float32), span)
        for place, (_, synthesis, analysis) in found.items()
    }
    return Calibration(
        namespace, layout.layers, layout.kv_heads, layout.head_dim, span, group, rotation, mean, tables, units
    )


def _classes(y: Floats) -> npt.NDArray[np.uint8]:
    return classes_of(np.ascontiguousarray(y, dtype=np.float32))


def _fit(x: Floats, span: str, dim: int, step: float) -> tuple[Floats, Floats, Floats]:
    """y, synthesis, analysis."""
    if span == "channel":
        ones = np.ones(x.shape[1])
        return x / step, ones * step, ones / step
    blocks = x.reshape(len(x), -1, dim if span == "head" else x.shape[1]).transpose(1, 0, 2)
    bases = np.stack([np.linalg.eigh(block.T @ block)[1][:, ::-1].T for block in blocks])
    y = np.einsum("btd,bcd->tbc", blocks, bases).reshape(len(x), -1) / step
    shaped = bases if span == "head" else bases[0]
    return y, shaped * step, shaped / step


def _unit(classes: npt.NDArray[np.uint8], synthesis: Floats, analysis: Floats, span: str) -> Unit:
    if span == "channel":
        return Unit(classes, None, synthesis, None, analysis)
    return Unit.pack(classes, synthesis, analysis)
