"""A step put to a basis: quantised components, their classes and tables, and the calibration that holds it all.

The quantiser here is that of the format (docs/format-scalable.md) on torch tensors, without the entropy coding, so that
a step can be tried by what it does to a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvstore_s3.codec.calibration import Calibration, Unit
from kvstore_s3.codec.learning import Basis
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.tables import CLASSES, TableSet, fit_tables

LEVELS = 3
LARGEST_Q2 = 32400
"""Nine times the largest escape: a token with more is kept exact."""


@dataclass(frozen=True, slots=True)
class Quantiser:
    """A basis with a step: classes uint8 [blocks, component] of each group, and the tables of all classes."""

    basis: Basis
    step: float
    classes: tuple[torch.Tensor, ...]
    tables: TableSet

    def quantise(self, components: Sequence[torch.Tensor], level: int) -> list[torch.Tensor]:
        """What a reader of levels 0 to `level` gets for components [blocks, rows, component] of step 1."""
        first = self.tables.first
        shift = torch.from_numpy(self.tables.shift[level]).to(components[0].device)
        found = []
        for y, classes in zip(components, self.classes, strict=True):
            indices = classes.to(y.device).long()[:, None, :]
            q = _nest((y / self.step).round(), indices, first)[level]
            scale = 9 / 3**level * self.step
            found.append((q - q.sign() * shift[indices]) * scale)
        return found

    def build(self, namespace: bytes, rotation: Rotation, report: Mapping[str, Any]) -> Calibration:
        """The calibration; components that no level codes are left out where the span allows it."""
        spread = self.basis.spread
        mean = self.basis.mean.permute(1, 2, 0, 3).contiguous()
        units = {
            (group, stream): self._unit(group, stream)
            for group in range(len(spread.groups))
            for stream in range(spread.streams)
        }
        return Calibration(
            namespace=namespace,
            layers=spread.layers,
            kv_heads=spread.kv_heads,
            head_dim=spread.head_dim,
            span=spread.span,
            layer_group=spread.layer_group,
            rotation=rotation,
            mean=mean.cpu().numpy().astype(np.float32),
            tables=self.tables,
            units=units,
            report=report,
        )

    def _unit(self, group: int, stream: int) -> Unit:
        spread, basis = self.basis.spread, self.basis.groups[group]
        count = len(basis.analysis) // spread.streams
        own = slice(stream * count, (stream + 1) * count)
        classes = self.classes[group][own].reshape(-1).cpu().numpy()
        analysis = (basis.analysis[own] / self.step).cpu().numpy()
        synthesis = (basis.synthesis[own] * self.step).cpu().numpy()
        if spread.span == "channel":
            return Unit(classes, None, synthesis.reshape(-1), None, analysis.reshape(-1))
        if spread.span == "head":
            return Unit.pack(classes, synthesis, analysis)
        kept = classes >= self.tables.first[LEVELS - 1]
        kept[0] |= not kept.any()  # a stream has one component at least
        return Unit.pack(classes[kept], synthesis[0][kept], analysis[0][kept])


def fit_quantiser(basis: Basis, samples: Sequence[Sequence[torch.Tensor]], step: float) -> Quantiser:
    """Choose classes and tables for a step. `samples` are components of step 1 (`Basis.analyse`), in parts.

    Classes count what the basis was learned from and the samples; tables come from the samples alone, which should be
    others: a component is smaller on what it was learned from.
    """
    classes = []
    for index, group in enumerate(basis.groups):
        variance = group.deviations.double().square() * basis.rows
        rows = basis.rows
        for part in samples:
            variance = variance + part[index].double().square().sum(1)
            rows += part[index].shape[1]
        deviations = (variance / rows).sqrt().float() / step
        classes.append(_classes_of(deviations).cpu())
    integers, names = [], []
    for part in samples:
        for y, found in zip(part, classes, strict=True):
            q = (y / step).round().clamp(-LARGEST_Q2, LARGEST_Q2).to(torch.int16)
            integers.append(q.transpose(0, 1).reshape(q.shape[1], -1).cpu().numpy())
            names.append(found.reshape(-1).numpy())
    return Quantiser(basis, step, tuple(classes), fit_tables(integers, names))


def _classes_of(deviations: torch.Tensor) -> torch.Tensor:
    """Class k stands for a deviation of 2^((k - 13) / 4) steps."""
    return (13 + 4 * deviations.log2()).round().nan_to_num(0.0).clamp(0, CLASSES - 1).to(torch.uint8)


def _nest(q2: torch.Tensor, classes: torch.Tensor, first: tuple[int, int, int]) -> list[torch.Tensor]:
    """The three nested roundings, with what is not coded at a level 0 there and bounded at the next."""
    wanted = [_third(_third(q2)), _third(q2), q2]
    found: list[torch.Tensor] = []
    for level, q in enumerate(wanted):
        bounded = q if level == 0 else torch.clamp(q, 3 * found[-1] - 1, 3 * found[-1] + 1)
        found.append(torch.where(classes >= first[level], bounded, torch.zeros_like(q)))
    return found


def _third(q: torch.Tensor) -> torch.Tensor:
    return (q / 3).round()
