"""What the GPU benchmark decodes and where to: models, sections of codec 1, and an engine's paged blocks.

Addresses are those of torch tensors on the device that is measured; on the host they serve the kernels' emulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_s3 import _native
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.device.library import Pages

TOKENS = 256
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Model:
    """The KV of a model in bf16; a section has `group` layers, as the store's have."""

    name: str
    layers: int
    heads: int
    dim: int
    group: int = 4
    tokens: int = TOKENS

    @property
    def chunk_bytes(self) -> int:
        return 4 * self.layers * self.tokens * self.heads * self.dim

    @property
    def groups(self) -> int:
        return self.layers // self.group

    @property
    def section_shape(self) -> tuple[int, int, int, int, int]:
        return self.group, 2, self.tokens, self.heads, self.dim


MODELS = (Model("8B", 32, 8, 128), Model("70B", 80, 8, 128))
TINY = Model("tiny", 2, 2, 32, group=1, tokens=16)
"""For the emulation: a section in the blink of an eye."""


def draw_section(model: Model, seed: int) -> Bits:
    """Values of one section: normal, of many scales and means, as KV's components are."""
    rng = np.random.Generator(np.random.PCG64(seed))
    layers, kinds, _, heads, dim = model.section_shape
    scale = 2.0 ** rng.uniform(-3, 3, (layers, kinds, 1, heads, dim)).astype(np.float32)
    values = rng.standard_normal(model.section_shape, np.float32)
    values += rng.exponential(0.7, scale.shape).astype(np.float32)
    return ((values * scale).view(np.uint32) >> 16).astype(np.uint16)


def pick(model: Model, count: int, chunk: int, group: int) -> int:
    """Which of `count` sections stands for this chunk's layer group. Neighbours have different ones, so that what comes
    out in the wrong place is seen, where `count` and the number of groups have no common factor.
    """
    return (chunk * model.groups + group) % count


@dataclass(frozen=True, slots=True)
class Sections:
    """Different sections, that repeated decoding takes in turn: together larger than a GPU's cache.

    Models whose sections have one shape can share them.
    """

    model: Model
    values: Sequence[Bits]
    payloads: Sequence[bytes]

    @classmethod
    def draw(cls, model: Model, count: int) -> Sections:
        with ThreadPoolExecutor() as threads:
            values = list(threads.map(lambda seed: draw_section(model, seed), range(count)))
            payloads = list(threads.map(lambda value: bytes(_native.lossless_encode(value)), values))
        return cls(model, values, payloads)

    @property
    def bits_per_value(self) -> float:
        return 8 * sum(map(len, self.payloads)) / sum(value.size for value in self.values)

    def pick(self, chunk: int, group: int) -> int:
        """Which of them stands for this chunk's layer group."""
        return pick(self.model, len(self.payloads), chunk, group)


class PagedCache:
    """An engine's KV: [layer][K or V][block][token][head][dim] in blocks of 16 tokens, handed out in no order."""

    def __init__(self, model: Model, chunks: int, device: torch.device) -> None:
        self._model = model
        blocks = chunks * model.tokens // BLOCK_TOKENS
        shape = (model.layers, 2, blocks, BLOCK_TOKENS, model.heads, model.dim)
        self.values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks), dtype=torch.int32)
        self.table = order.to(device)
        plane = 2 * blocks * BLOCK_TOKENS * model.heads * model.dim
        addresses = self.values.data_ptr() + torch.arange(2 * model.layers, dtype=torch.int64) * plane
        self.planes = addresses.to(device)
        row = model.heads * model.dim
        self.pages = Pages(
            planes=self.planes.data_ptr(),
            block_table=self.table.data_ptr(),
            block_tokens=BLOCK_TOKENS,
            dim=model.dim,
            block_stride=BLOCK_TOKENS * row,
            token_stride=row,
            head_stride=model.dim,
        )

    def spoil(self) -> None:
        """No values: what is not written from now on is seen."""
        self.values.view(torch.int16).fill_(-1)

    def take(self, group: int, chunks: range) -> torch.Tensor:
        """The values of a layer group of chunks that follow each other, [chunks, *section_shape], on the device."""
        found = self._layers(group)[:, :, self._blocks(chunks)]
        _, kinds, tokens, heads, dim = self._model.section_shape
        return found.view(self._model.group, kinds, len(chunks), tokens, heads, dim).permute(2, 0, 1, 3, 4, 5)

    def put(self, group: int, chunks: range, values: torch.Tensor) -> None:
        """The same, the other way."""
        layers = self._layers(group)
        shape = (*layers.shape[:2], len(chunks) * self._model.tokens // BLOCK_TOKENS, *layers.shape[3:])
        layers[:, :, self._blocks(chunks)] = values.permute(1, 2, 0, 3, 4, 5).reshape(shape)

    def _layers(self, group: int) -> torch.Tensor:
        return self.values[group * self._model.group : (group + 1) * self._model.group]

    def _blocks(self, chunks: range) -> torch.Tensor:
        per_chunk = self._model.tokens // BLOCK_TOKENS
        return self.table[chunks.start * per_chunk : chunks.stop * per_chunk].long()
