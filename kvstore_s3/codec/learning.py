"""From samples of KV and of its gradients to a transform: mean, metric, basis. Pure torch; no model is involved.

Samples are [rows, heads, layers, 2, dim] float32, one row for a token, K with its rotation undone. The metric says how
much an error hurts: a Fisher matrix F = E[g g^T] of the gradients g of the log-likelihood of what follows, or a gain
for each layer and kind. The basis is the Karhunen-Loeve transform of (x - mean) M with M = F^(1/2), where equal errors
hurt equally: so one step is right for all components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvstore_s3.codec.spans import Spread

FISHER_WEIGHT = 0.8
"""Of the metric; the rest is the mean sensitivity of a layer's K or V, for directions in which too little was seen."""

ENOUGH_ROWS = 8
"""Rows for each dimension of a transform below which the covariance is shrunk towards its diagonal."""

_FLOOR = 1e-6
"""Smallest sensitivity, relative to the mean one: a layer that nothing depends on still has a metric."""


class Moments:
    """Second moments of samples, by block: around their mean, or around zero (`centred` False, for gradients)."""

    def __init__(self, spread: Spread, *, centred: bool, device: torch.device | str = "cpu") -> None:
        self.spread = spread
        self.rows = 0
        self._centred = centred
        self._centre = torch.zeros(spread.kv_heads, spread.layers, 2, spread.head_dim, device=device)
        self._sum = torch.zeros_like(self._centre)
        self._products = [
            torch.zeros(self._blocks(group), size, size, device=device)
            for group, size in enumerate(map(spread.block_size, range(len(spread.groups))))
        ]

    def add(self, samples: torch.Tensor) -> None:
        """Count samples [rows, heads, layers, 2, dim]; all must be finite."""
        if not len(samples):
            return
        if self._centred and not self.rows:  # far from zero, float32 would lose the small differences between them
            self._centre = samples.mean(0)
        shifted = samples - self._centre
        self._sum += shifted.sum(0)
        for group, products in enumerate(self._products):
            blocks = self.spread.cut(shifted, group)
            products += blocks.mT @ blocks
        self.rows += len(samples)

    @property
    def mean(self) -> torch.Tensor:
        """float32 [heads, layers, 2, dim]."""
        return self._centre + self._sum / max(self.rows, 1)

    def matrix(self, group: int) -> torch.Tensor:
        """Covariance (or second moment about zero) of each block of a group, float64 [blocks, size, size]."""
        moment = self._products[group].double() / max(self.rows, 1)
        if not self._centred:
            return moment
        offset = self.spread.cut((self._sum / max(self.rows, 1))[None].double(), group)
        return moment - offset.mT @ offset

    def _blocks(self, group: int) -> int:
        begin, end = self.spread.groups[group]
        numbers = self.spread.kv_heads * (end - begin) * 2 * self.spread.head_dim
        return numbers // self.spread.block_size(group)


@dataclass(frozen=True, slots=True)
class GroupBasis:
    """The transform of one layer group's blocks, for a step of 1: y = (x - mean) A^T and x = mean + y S.

    `analysis` A and `synthesis` S are float32 [blocks, component, x]; `deviations` [blocks, component], falling.
    """

    analysis: torch.Tensor
    synthesis: torch.Tensor
    deviations: torch.Tensor


@dataclass(frozen=True, slots=True)
class Basis:
    """The transform of a whole token. `mean` is float32 [heads, layers, 2, dim]; `rows` is what it was learned from."""

    spread: Spread
    mean: torch.Tensor
    groups: tuple[GroupBasis, ...]
    rows: int

    def analyse(self, samples: torch.Tensor) -> list[torch.Tensor]:
        """Components [blocks, rows, component] of each group."""
        centred = samples - self.mean
        return [
            self.spread.cut(centred, index) @ group.analysis.mT for index, group in enumerate(self.groups)
        ]  # fmt: skip

    def synthesise(self, components: list[torch.Tensor]) -> torch.Tensor:
        """Back to samples [rows, heads, layers, 2, dim]."""
        blocks = [y @ group.synthesis for y, group in zip(components, self.groups, strict=True)]
        return self.mean + self.spread.join(blocks)


def fisher_metrics(gradients: Moments) -> list[torch.Tensor]:
    """The metric of each group from gradients about zero: F, regularised, float64 [blocks, size, size]."""
    spread = gradients.spread
    matrices = [gradients.matrix(group) for group in range(len(spread.groups))]
    flat = torch.cat([_mean_by_kind(spread, matrix, group) for group, matrix in enumerate(matrices)])
    floor = float(flat.mean()) * _FLOOR
    metrics = []
    for (begin, end), matrix in zip(spread.groups, matrices, strict=True):
        prior = _spread_gains(spread, flat[begin:end].clamp_min(floor), matrix)
        metrics.append(FISHER_WEIGHT * matrix + (1 - FISHER_WEIGHT) * prior)
    return metrics


def gain_metrics(spread: Spread, gains: torch.Tensor) -> list[torch.Tensor]:
    """The metric of each group from one gain for each layer and kind, [layers, 2]: diagonal."""
    gains = gains.double().clamp_min(max(float(gains.mean()) * _FLOOR, torch.finfo(torch.float64).tiny))
    metrics = []
    for group, (begin, end) in enumerate(spread.groups):
        size = spread.block_size(group)
        blocks = spread.kv_heads * (end - begin) * 2 * spread.head_dim // size
        metrics.append(_spread_gains(spread, gains[begin:end], gains.new_empty(blocks, size, size)))
    return metrics


def learn_basis(values: Moments, metrics: list[torch.Tensor]) -> Basis:
    """The Karhunen-Loeve transform of each block in the space of its metric."""
    groups = [_learn_group(values, group, metric) for group, metric in enumerate(metrics)]
    return Basis(values.spread, values.mean, tuple(groups), values.rows)


def expected_error(basis: Basis, step: float) -> float:
    """Squared error of a token in the metric, for a step: step^2 / 12 a component, or all of what is below it."""
    total = 0.0
    for group in basis.groups:
        total += float(group.deviations.double().square().clamp_max(step * step / 12).sum())
    return total


def find_step(basis: Basis, error: float) -> float:
    """The step whose expected error is `error`, by bisection on its logarithm."""
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_error(basis, math.exp2(middle)) < error else (low, middle)
    return math.exp2(low)


def _learn_group(values: Moments, group: int, metric: torch.Tensor) -> GroupBasis:
    root, inverse = _roots(metric)
    covariance = _shrink(values.matrix(group), values.rows)
    variances, vectors = torch.linalg.eigh(root @ covariance @ root)
    variances, vectors = variances.flip(-1).clamp_min(0), vectors.flip(-1)
    return GroupBasis(
        analysis=(vectors.mT @ root).float(),
        synthesis=(vectors.mT @ inverse).float(),
        deviations=variances.sqrt().float(),
    )


def _roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root and inverse square root of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT, (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def _shrink(covariance: torch.Tensor, rows: int) -> torch.Tensor:
    """Where rows are few, what looks like correlation is partly chance."""
    size = covariance.shape[-1]
    if rows >= ENOUGH_ROWS * size:
        return covariance
    weight = 0.5 * size / (size + rows)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return (1 - weight) * covariance + weight * diagonal


def _mean_by_kind(spread: Spread, matrix: torch.Tensor, group: int) -> torch.Tensor:
    """Mean diagonal [layers of the group, 2] of matrices [blocks, size, size]."""
    begin, end = spread.groups[group]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return diagonal.reshape(spread.kv_heads, end - begin, 2, spread.head_dim).mean((0, 3))


def _spread_gains(spread: Spread, gains: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Diagonal matrices of the shape of `like` with a gain [layers of the group, 2] for each number."""
    full = gains[None, :, :, None].expand(spread.kv_heads, *gains.shape, spread.head_dim)
    return torch.diag_embed(full.reshape(like.shape[0], like.shape[1]))
