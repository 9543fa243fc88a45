"""How far a transform reaches, as blocks of a token's numbers: the same code then learns every span.

A token's numbers of one layer group, in the order [head][layer][kind][dim], are cut into equal blocks, and a matrix
maps each block on its own: a block is one number (channel), one head's K or V of a layer (head), all of a head (group),
or all there is (all).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstore_s3.codec.calibration import SPANS
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout

GROUP_DIMENSION = 1024
"""Largest dimension of one head's transform that the default layer group makes: inverting it costs twice as many
operations a value."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One span over one layout, `layer_group` layers at a time (the last group may have fewer)."""

    layers: int
    kv_heads: int
    head_dim: int
    span: str
    layer_group: int

    @classmethod
    def plan(cls, layout: KVLayout, span: str, layer_group: int | None) -> Spread:
        """Raises `InvalidArgumentError` for an unknown span or an impossible layer group; None: the default group."""
        if span not in SPANS:
            raise InvalidArgumentError(f"unknown span {span!r}; use one of {', '.join(SPANS)}")
        if layer_group is None:
            layer_group = min(max(GROUP_DIMENSION // (2 * layout.head_dim), 1), layout.layers)
        if not 1 <= layer_group <= layout.layers:
            raise InvalidArgumentError(f"a layer group of {layer_group} layers: give 1 to {layout.layers}")
        return cls(layout.layers, layout.kv_heads, layout.head_dim, span, layer_group)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First layer of each group, and the one behind its last."""
        starts = range(0, self.layers, self.layer_group)
        return [(begin, min(begin + self.layer_group, self.layers)) for begin in starts]

    @property
    def streams(self) -> int:
        """Streams of a layer group: one for each head, or one for all."""
        return 1 if self.span == "all" else self.kv_heads

    def block_size(self, group: int) -> int:
        """Numbers of a block, the dimension of its transform."""
        begin, end = self.groups[group]
        head = 2 * (end - begin) * self.head_dim
        return {"channel": 1, "head": self.head_dim, "group": head, "all": head * self.kv_heads}[self.span]

    @property
    def largest_block(self) -> int:
        return self.block_size(0)

    def cut(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """[rows, heads, layers, 2, dim] -> [blocks, rows, size] of one layer group."""
        begin, end = self.groups[group]
        part = x[:, :, begin:end].reshape(len(x), -1, self.block_size(group))
        return part.transpose(0, 1)

    def join(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `cut`, over all layer groups."""
        parts = []
        for (begin, end), part in zip(self.groups, blocks, strict=True):
            rows = part.shape[1]
            parts.append(part.transpose(0, 1).reshape(rows, self.kv_heads, end - begin, 2, self.head_dim))
        return torch.cat(parts, dim=2)
