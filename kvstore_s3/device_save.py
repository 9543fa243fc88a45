"""Saves out of a device's memory: its kernels code sections; what these cannot do is fetched, and coded on the host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.codec.device.pieces import Form, Target
from kvstore_s3.codec.device.sources import EncodeSection, Lossy, Readable, RevokedError, Source
from kvstore_s3.codec.device.streams import Mark
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.codec.scalable import SCALABLE
from kvstore_s3.device_load import TensorMemory
from kvstore_s3.encode import CodedChunk, CodedGroup, Encoding, ValueGroup, layer_ranges
from kvstore_s3.errors import DeviceError, StoreUnavailableError
from kvstore_s3.layout import Shard
from kvstore_s3.load import run_all
from kvstore_s3.objectstore.awaiting import finish

log = logging.getLogger("kvstore_s3")

T = TypeVar("T")

_LAYERS_AT_ONCE = 4
"""Layers of a chunk that are fetched together, by way of as much of the device's memory."""

Taken: TypeAlias = "CodedChunk | torch.Tensor"
"""What a save has of a chunk: layer groups, or values [layers, 2, tokens, heads, dim] on the host."""

FindMemory = Callable[[int, int], tuple[Readable, int]]
"""Memory that holds the tokens from one to another, and where in it the first of them is."""


@dataclass(frozen=True, slots=True, eq=False)
class LayersMemory:
    """K and V of each layer as tensors of their own, [tokens, heads, dim] with the last axis dense, on one device."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), 2, *self.layers[0][0].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0][0].dtype

    @property
    def alike(self) -> bool:
        """Whether all tensors have the same strides, as kernels want it."""
        strides = {half.stride() for layer in self.layers for half in layer}
        return len(strides) == 1 and next(iter(strides))[2] == 1

    def __getitem__(self, index: Any) -> LayersMemory:
        """Some of the layers: `memory[begin:end,]`."""
        (layers,) = index
        return LayersMemory(self.layers[layers])

    def target(self) -> Target:
        planes = [[half.data_ptr() for half in layer] for layer in self.layers]
        token, head, _ = self.layers[0][0].stride()
        return Target(np.array(planes, np.uint64), Form(self.shape[4], token, head))

    def gather(self, out: torch.Tensor) -> None:
        for values, layer in zip(out, self.layers, strict=True):
            for to, half in zip(values, layer, strict=True):
                to.copy_(half, non_blocking=True)

    def part(self, begin: int, end: int) -> LayersMemory:
        """The tokens `begin` to `end`."""
        return LayersMemory(tuple((keys[begin:end], values[begin:end]) for keys, values in self.layers))


@dataclass(frozen=True, slots=True, eq=False)
class DeviceCoding:
    """How KV of the rectangle `shard`, its first token at position `first_token`, is coded on its device."""

    encoding: Encoding
    shard: Shard
    first_token: int

    def sections(self, begin: int, skip: int, tokens: int) -> list[EncodeSection]:
        """Those of `tokens` tokens from `begin` on, which are `skip` tokens behind the beginning of their memory."""
        ranges = layer_ranges(0, self.shard.layers, self.encoding.section_layers)
        return [
            EncodeSection(first, end - first, skip, tokens, self._lossy(first, self.first_token + begin))
            for first, end in ranges
        ]

    def _lossy(self, layer: int, position: int) -> Lossy | None:
        encoding, shard = self.encoding, self.shard
        if encoding.quality.object_profile != "scalable":
            return None
        calibration = encoding.calibration[1] if encoding.calibration else None
        first = shard.layer_begin + layer
        return Lossy(first, shard.head_begin, position, encoding.levels, calibration, encoding.rotation)


class DeviceKV:
    """KV [layers, 2, tokens, heads, dim] on a device, in place of the tensor that a save is given. For one event loop.

    It must not change before the save has ended, or, where it is taken first (`KVStore.take`), before that has.
    """

    def __init__(
        self,
        encoder: DeviceEncoder,
        find: FindMemory,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        after: Mark | None,
    ) -> None:
        """`find` says where tokens lie; they are there from the mark `after` in the device's queue on."""
        self.shape = tuple(shape)
        self.dtype = dtype
        self.source = Source(after)
        self._encoder = encoder
        self._find = find
        self._taken: dict[int, Taken] = {}

    @classmethod
    def of(cls, values: torch.Tensor, encoder: DeviceEncoder) -> DeviceKV:
        """All of a tensor that the calling thread's queue has computed, its last axis dense. Raises `DeviceError`."""

        def find(begin: int, end: int) -> tuple[Readable, int]:
            return TensorMemory(values[:, :, begin:end]), 0

        return cls(encoder, find, values.shape, values.dtype, after=encoder.mark_current())

    @classmethod
    def of_layers(cls, memory: LayersMemory, encoder: DeviceEncoder) -> DeviceKV:
        """The same of layers' own tensors, which are `alike`."""

        def find(begin: int, end: int) -> tuple[Readable, int]:
            return memory.part(begin, end), 0

        return cls(encoder, find, memory.shape, memory.dtype, after=encoder.mark_current())

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize

    async def take_all(self, tokens: int, coding: DeviceCoding | None) -> None:
        """Take all whole chunks of `tokens` tokens, for `take` to give once each. Raises `DeviceError`.

        When it returns or raises, nothing reads the memory any more.
        """

        async def keep(begin: int) -> None:
            self._taken[begin] = await self._read(begin, tokens, coding)

        await run_all([keep(begin) for begin in range(0, self.shape[2] - tokens + 1, tokens)])

    async def take(self, begin: int, tokens: int, coding: DeviceCoding | None) -> Taken:
        """The tokens from `begin` on: coded, if not taken before in another way; or (None) as values.

        Raises `DeviceError`.
        """
        taken = self._taken.pop(begin, None)
        return await self._read(begin, tokens, coding) if taken is None else taken

    async def _read(self, begin: int, tokens: int, coding: DeviceCoding | None) -> Taken:
        memory, skip = self._find(begin, begin + tokens)
        if coding is not None and self._encoder.can_encode:
            try:
                groups = await self._encode(memory, coding.sections(begin, skip, tokens))
                return CodedChunk(coding.encoding, coding.first_token + begin, groups)
            except RevokedError:
                raise
            except DeviceError as error:
                log.warning("KV is coded by the CPU: %s", error)
        return await self._fetch(memory, skip, tokens)

    async def _encode(self, memory: Readable, sections: Sequence[EncodeSection]) -> list[CodedGroup | ValueGroup]:
        (coded,) = await _all_of([self._encoder.encode(self.source, memory, sections)])
        groups: list[CodedGroup | ValueGroup] = []
        for section, levels in zip(sections, coded, strict=True):
            first, end = section.layer_begin, section.layer_begin + section.layers
            if levels is None:
                values = await self._fetch(memory[first:end,], section.token_begin, section.tokens)
                groups.append(ValueGroup(first, end, values.contiguous()))
            else:
                codec = LosslessCodec.id if section.lossy is None else SCALABLE
                groups.append(CodedGroup(first, end, [(codec, payload) for payload in levels]))
        return groups

    async def _fetch(self, memory: Readable, skip: int, tokens: int) -> torch.Tensor:
        """The tokens from `skip` of `memory` on, all of its layers, on the host."""
        values = self._encoder.staging(memory.shape, memory.dtype)
        ranges = layer_ranges(0, len(values), _LAYERS_AT_ONCE)
        await _all_of([self._encoder.fetch(self.source, memory[a:b,], values[a:b]) for a, b in ranges])
        return values[:, :, skip : skip + tokens]


async def _all_of(work: Sequence[Future[T]]) -> list[T]:
    """The results, once all have ended, well or not; a cancellation waits for that."""

    def cancel() -> None:
        for future in work:
            future.cancel()

    results = asyncio.gather(*map(asyncio.wrap_future, work), return_exceptions=True)
    found = []
    for result in await finish(results, on_cancel=cancel):
        if isinstance(result, asyncio.CancelledError):
            raise StoreUnavailableError("the store was closed; open it again")
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found
