"""Between transformers' cache (per layer K and V of [1, heads, tokens, dim]) and the canonical layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PretrainedConfig

from kvstore_s3.device_save import LayersMemory


def build_cache(config: PretrainedConfig, kv: torch.Tensor | None, devices: Sequence[torch.device]) -> DynamicCache:
    """Return a cache that holds `kv` [layers, 2, tokens, kv_heads, head_dim], or an empty one.

    Layer by layer, so that each layer's KV goes to the device of that layer. Where `kv` is on a GPU, the cache views
    it: it has been loaded there for this cache alone.
    """
    cache = DynamicCache(config=config)
    if kv is None or kv.shape[2] == 0:
        return cache
    for layer, (values, device) in enumerate(zip(kv, devices, strict=True)):
        is_there = values.device == device and device.type != "cpu"
        keys, values = values.to(device).transpose(1, 2).unsqueeze(1)
        if is_there:
            _adopt(cache, layer, keys, values)
        else:
            cache.update(keys, values, layer)
    return cache


def common_gpu(devices: Sequence[torch.device]) -> torch.device | None:
    """The GPU that has all layers; None: the host, or several."""
    return devices[0] if devices[0].type == "cuda" and len(set(devices)) == 1 else None


def view_cache(cache: DynamicCache, begin: int, end: int) -> LayersMemory:
    """Tokens `begin` to `end` of `cache` where they are."""
    return LayersMemory(
        tuple((_part(layer.keys, begin, end), _part(layer.values, begin, end)) for layer in cache.layers)
    )


def _part(values: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return values[0, :, begin:end].transpose(0, 1)


def read_cache(cache: DynamicCache, begin: int, end: int) -> torch.Tensor:
    """Copy tokens `begin` to `end` out of `cache` as [layers, 2, tokens, kv_heads, head_dim] on the CPU."""
    first = cache.layers[0].keys
    shape = (len(cache.layers), 2, end - begin, first.shape[1], first.shape[3])
    kv = torch.empty(shape, dtype=first.dtype)
    for out, layer in zip(kv, cache.layers, strict=True):
        out[0] = _part(layer.keys, begin, end)
        out[1] = _part(layer.values, begin, end)
    return kv


def _adopt(cache: DynamicCache, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let an empty layer have these tensors themselves; `update` would copy them."""
    entry = cache.layers[layer]
    entry.lazy_initialization(keys, values)
    entry.keys, entry.values = keys, values
