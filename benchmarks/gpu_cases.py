"""What the GPU benchmark decodes and where to: sections of codec 1, and an engine's paged blocks.

Addresses are those of torch tensors on the device that is measured; on the host they serve the kernels' emulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_s3 import _native
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.device.library import LOSSLESS_JOB, Library, Pages

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


@dataclass(frozen=True, slots=True)
class Sections:
    """Different sections, that repeated decoding takes in turn: together larger than a GPU's cache."""

    model: Model
    values: Sequence[Bits]
    payloads: Sequence[bytes]

    @classmethod
    def draw(cls, model: Model, count: int) -> Sections:
        values = [draw_section(model, seed) for seed in range(count)]
        return cls(model, values, [bytes(_native.lossless_encode(value)) for value in values])

    @property
    def bits_per_value(self) -> float:
        return 8 * sum(map(len, self.payloads)) / sum(value.size for value in self.values)

    def pick(self, chunk: int, group: int) -> int:
        """Which of them stands for this chunk's layer group."""
        return (chunk * self.model.groups + group) % len(self.payloads)


class PagedCache:
    """An engine's KV: [layer][K or V][block][token][head][dim] in blocks of 16 tokens, handed out in no order."""

    def __init__(self, model: Model, chunks: int, device: torch.device) -> None:
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

    def read(self, model: Model, chunk: int, group: int) -> Bits:
        """The values of one chunk's layer group, [group, 2, tokens, heads, dim]."""
        per_chunk = model.tokens // BLOCK_TOKENS
        blocks = self.table[chunk * per_chunk : (chunk + 1) * per_chunk].long()
        layers = self.values[group * model.group : (group + 1) * model.group]
        found = layers[:, :, blocks].reshape(model.section_shape)
        return found.cpu().view(torch.uint16).numpy()

    def write(self, model: Model, chunk: int, group: int, values: torch.Tensor) -> None:
        """The same, the other way: `values` bf16, on the device."""
        per_chunk = model.tokens // BLOCK_TOKENS
        blocks = self.table[chunk * per_chunk : (chunk + 1) * per_chunk].long()
        layers = self.values[group * model.group : (group + 1) * model.group]
        shape = (model.group, 2, per_chunk, BLOCK_TOKENS, model.heads, model.dim)
        layers[:, :, blocks] = values.reshape(shape)


class LosslessDecoding:
    """All heads of `chunks` chunks, decoded into a paged cache. `wanted` are the layer groups, in decoding order."""

    def __init__(self, sections: Sections, chunks: int, cache: PagedCache, device: torch.device) -> None:
        self._sections, self._cache, self.chunks = sections, cache, chunks
        model = sections.model
        self._staged, begins = stage(sections.payloads, device)
        jobs = np.zeros((model.groups, chunks, model.heads), LOSSLESS_JOB)
        jobs["tokens"], jobs["layers"], jobs["kinds"] = model.tokens, model.group, 2
        jobs["token_begin"] = (np.arange(chunks) * model.tokens)[None, :, None]
        jobs["layer_begin"] = (np.arange(model.groups) * model.group)[:, None, None]
        jobs["head"] = np.arange(model.heads)
        for group in range(model.groups):
            for chunk in range(chunks):
                place_streams(jobs[group, chunk], sections.payloads[sections.pick(chunk, group)])
                jobs["stream"][group, chunk] += np.uint64(begins[sections.pick(chunk, group)])
        self._jobs = torch.from_numpy(jobs.reshape(-1).view(np.uint8)).to(device)
        self._count = jobs.size
        self.faults = torch.full((jobs.size,), -1, dtype=torch.int32, device=device)

    @property
    def bytes_out(self) -> int:
        return self.chunks * self._sections.model.chunk_bytes

    def run(self, library: Library, stream: int) -> None:
        jobs, faults = self._jobs.data_ptr(), self.faults.data_ptr()
        library.lossless_decode(jobs, self._count, self._cache.pages, faults, stream)

    def check(self) -> None:
        """Every head decoded, and the first and the last section came out as they went in. Raises `AssertionError`."""
        assert not self.faults.any(), f"{int((self.faults != 0).sum())} heads did not decode"
        model = self._sections.model
        for chunk, group in ((0, 0), (self.chunks - 1, model.groups - 1)):
            expected = self._sections.values[self._sections.pick(chunk, group)]
            found = self._cache.read(model, chunk, group)
            assert np.array_equal(found, expected), f"chunk {chunk}, layer group {group} came out wrong"


def place_streams(jobs: np.ndarray, payload: bytes) -> None:
    """Fill in where the streams of a payload lie in it, and how long they are: one job for each head."""
    heads = jobs.shape[0]
    lengths = np.frombuffer(payload[: 4 * heads], "<u4").astype(np.int64)
    jobs["length"] = lengths
    jobs["stream"] = 4 * heads + np.cumsum(lengths) - lengths


def stage(payloads: Sequence[bytes], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """All payloads on the device, and the address of each, a multiple of 16."""
    offsets = np.cumsum([0, *((len(payload) + 15) // 16 * 16 for payload in payloads)])
    host = np.zeros(int(offsets[-1]), np.uint8)
    for payload, offset in zip(payloads, offsets, strict=False):
        host[offset : offset + len(payload)] = np.frombuffer(payload, np.uint8)
    staged = torch.from_numpy(host).to(device)
    return staged, [staged.data_ptr() + int(offset) for offset in offsets[:-1]]
