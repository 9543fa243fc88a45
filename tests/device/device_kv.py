"""KV in a device's memory, in all the ways in which it is saved from there, and what a store's folder holds then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from device.emulated import ON_DEVICE

from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.connectors.vllm.layouts import LAYOUTS, view_layers
from kvstore_s3.device_pages import BlocksCopy, PagedMemory
from kvstore_s3.device_save import DeviceKV, LayersMemory

MEMORY = torch.device("cuda" if ON_DEVICE else "cpu")
BLOCK_IDS = [7, 2, 11, 0, 18, 5, 3, 14, 9]
"""Of eight tokens each."""

Place = Callable[[torch.Tensor, DeviceEncoder], DeviceKV]


def objects_in(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def of_tensor(kv: torch.Tensor, encoder: DeviceEncoder) -> DeviceKV:
    return DeviceKV.of(kv.to(MEMORY), encoder)


def of_layers(kv: torch.Tensor, encoder: DeviceEncoder) -> DeviceKV:
    """As a model's cache has them: [heads, tokens, dim]."""
    layers = [[half.transpose(0, 1).contiguous().to(MEMORY).transpose(0, 1) for half in layer] for layer in kv]
    memory = LayersMemory(tuple((keys, values) for keys, values in layers))
    assert memory.alike
    return DeviceKV.of_layers(memory, encoder)


def of_blocks(order: str, begin: int = 0) -> Place:
    """In an engine's blocks, from token `begin` of the first one on."""

    def make(kv: torch.Tensor, encoder: DeviceEncoder) -> DeviceKV:
        layers, _, tokens, heads, dim = kv.shape
        storage = torch.zeros(layers * 19 * heads * 8 * 2 * dim, dtype=kv.dtype, device=MEMORY)
        shape = {"layers": layers, "blocks": 19, "heads": heads, "block_tokens": 8, "head_dim": dim}
        caches = view_layers(storage, order, **shape)
        padded = torch.zeros(layers, 2, 8 * len(BLOCK_IDS), heads, dim, dtype=kv.dtype)
        padded[:, :, begin : begin + tokens] = kv
        BlocksCopy(padded, PagedMemory.of(caches, BLOCK_IDS), slice(0, 2)).queue()

        def find(first: int, end: int) -> tuple[PagedMemory, int]:
            first, end = begin + first, begin + end
            return PagedMemory.of(caches, BLOCK_IDS[first // 8 : -(-end // 8)]), first % 8

        return DeviceKV(encoder, find, kv.shape, kv.dtype, after=encoder.mark_current())

    return make


PLACES: dict[str, Place] = {
    "tensor": of_tensor,
    "layers": of_layers,
    **{f"blocks {order}": of_blocks(order) for order in LAYOUTS},
    "chunks that begin within a block": of_blocks("LBNHC", 3),
}
