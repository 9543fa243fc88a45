"""A KVTC-like transform coder: principal components over all layers and heads, one step, ideal static code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvstore_s3.codec.rotation import Rotation
from quality.code_length import learn_tables, static_length
from quality.corpus import CHUNK
from quality.measure import Coded, Values

MOST_DIMENSIONS = 4096
"""Widest covariance whose eigenvectors are computed; beyond, components are those of as many sampled tokens."""
DROPPED = 0.125
"""Components whose deviation is below this part of the step are not kept: they would be zeros."""


def rotate(keys: torch.Tensor, rotation: Rotation, first_position: int, direction: int) -> torch.Tensor:
    """K float32 [..., layers, tokens, heads, dim] turned to its positions (direction 1) or back (-1), where rotated."""
    if rotation.style == "none":
        return keys
    cos, sin = (torch.from_numpy(part)[:, None] for part in rotation.tables(first_position, keys.shape[-3]))
    sin = direction * sin
    pairs = cos.shape[-1]
    one, other, rest = keys[..., :pairs], keys[..., pairs : 2 * pairs], keys[..., 2 * pairs :]
    turned = torch.cat([one * cos - other * sin, other * cos + one * sin, rest], -1)
    chosen = torch.from_numpy(rotation.rotated).bool()[:, None, None, None]
    return torch.where(chosen, turned, keys)


def rows_of(kv: Values, rotation: Rotation, first_position: int) -> torch.Tensor:
    """Float32 [2, tokens, layers x heads x dim] of bfloat16 [chunks, layers, 2, tokens, heads, dim], K turned back."""
    keys, values = kv.float().unbind(2)
    both = torch.stack([rotate(keys, rotation, first_position, -1), values])
    return both.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class Basis:
    """Mean [n], orthonormal components [n, r] of descending deviation [r], of the numbers of one token."""

    mean: torch.Tensor
    components: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def fit(cls, rows: torch.Tensor) -> Basis:
        """Principal components of `rows` float32 [samples, n]; from sampled tokens where n is beyond the bound."""
        mean = rows.mean(0)
        centred = rows - mean
        if rows.shape[1] <= MOST_DIMENSIONS:
            variance, vectors = torch.linalg.eigh((centred.T @ centred).double() / len(rows))
            return cls(mean, vectors.flip(1).float(), variance.flip(0).clamp_min(0).sqrt().float())
        chosen = centred[torch.linspace(0, len(rows) - 1, min(len(rows), MOST_DIMENSIONS)).long()]
        variance, vectors = torch.linalg.eigh((chosen @ chosen.T).double() / len(chosen))
        kept = variance > variance[-1] * 1e-10
        components = chosen.T @ (vectors[:, kept] / (variance[kept] * len(chosen)).sqrt()).float()
        return cls(mean, components.flip(1), variance[kept].flip(0).sqrt().float())


@dataclass(frozen=True)
class Learned:
    """What calibration gives: the exact KV's rows [kinds or 1, samples, n] and a basis for each kind, or for both."""

    rotation: Rotation
    rows: torch.Tensor
    bases: tuple[Basis, ...]
    joint: bool

    @classmethod
    def of(cls, chunks: Sequence[Values], rotation: Rotation, *, joint: bool) -> Learned:
        """From bfloat16 [chunks, layers, 2, tokens, heads, dim] at position 0; their first tokens do not count."""
        parts = [rows_of(kv, rotation, 0).unflatten(1, (len(kv), -1))[:, :, 1:].flatten(1, 2) for kv in chunks]
        rows = arrange(torch.cat(parts, 1), joint)
        return cls(rotation, rows, tuple(Basis.fit(part) for part in rows), joint)


def arrange(rows: torch.Tensor, joint: bool) -> torch.Tensor:
    """Both kinds side by side where they are coded together: [1, samples, 2 n]; else as they are, [2, samples, n]."""
    return rows.transpose(0, 1).flatten(1)[None] if joint else rows


@dataclass(frozen=True)
class TransformCoder:
    """After K. Staniszewski and A. Łańcucki, "KV Cache Transform Coding for Compact Storage in LLM Inference",
    arXiv:2511.01815: principal components over all layers and heads, learned once, K with its rotation undone, no
    weighing by what an error does to the model; the first token stays exact.

    In place of its table of widths and DEFLATE stands what they approximate from above: one uniform step for all
    components (reverse water-filling), and the ideal length under a static table of each component learned beside the
    basis. So this is a bound that a real coder stays behind. K and V apart, as published, or `joint`.
    """

    learned: Learned
    step: float
    timed: bool = False

    @property
    def curve(self) -> str:
        return "KVTC-like, K and V jointly" if self.learned.joint else "KVTC-like"

    @property
    def setting(self) -> str:
        return f"step {self.step:.4g}"

    def encode(self, chunk: torch.Tensor, first_position: int) -> Coded:
        rows = arrange(rows_of(chunk[None], self.learned.rotation, first_position), self.learned.joint)
        exact = 1 if first_position == 0 else 0
        whole = [self._quantise(part, index) for index, part in enumerate(rows)]
        bits = sum(self._length(part[exact:], index) for index, part in enumerate(whole))
        kept = chunk[:, :, :exact]
        return Coded({"components": bits, "exact token": 16.0 * kept.numel()}, (whole, kept, chunk.shape))

    def decode(self, coded: Coded, first_position: int) -> torch.Tensor:
        whole, kept, (layers, _, tokens, heads, dim) = coded.data
        rows = torch.stack([self._restore(part, index) for index, part in enumerate(whole)])
        if self.learned.joint:
            rows = rows[0].unflatten(1, (2, -1)).transpose(0, 1)
        keys, values = rows.view(2, tokens, layers, heads, dim).transpose(1, 2)
        out = torch.stack([rotate(keys, self.learned.rotation, first_position, 1), values], 1).bfloat16()
        out[:, :, : kept.shape[2]] = kept
        return out

    def _quantise(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        basis = self.learned.bases[index]
        components = basis.components[:, : self._kept(basis)]
        return ((rows - basis.mean) @ components / self.step).round()

    def _restore(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        basis = self.learned.bases[index]
        return whole @ (basis.components[:, : self._kept(basis)].T * self.step) + basis.mean

    def _kept(self, basis: Basis) -> int:
        return max(1, int((basis.deviation >= DROPPED * self.step).sum()))

    def _length(self, whole: torch.Tensor, index: int) -> float:
        tables = self._tables[index]
        middle = tables.shape[1] // 2
        escaped = int((whole.abs() > middle).sum())
        symbols = whole.clamp(-middle, middle).long() + middle
        return static_length(symbols, tables) + 16.0 * escaped

    @cached_property
    def _tables(self) -> list[torch.Tensor]:
        tables = []
        for index, part in enumerate(self.learned.rows):
            whole = torch.cat([self._quantise(rows, index) for rows in part.split(16 * CHUNK)])
            middle = int(min(whole.abs().max(), 1024))
            tables.append(learn_tables(whole.clamp(-middle, middle).long() + middle, 2 * middle + 1))
        return tables
