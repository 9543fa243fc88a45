"""Models cut into rectangles as engines cut them, and stores of one rectangle each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.layout import Shard

CHUNK = 16
TOKENS = list(range(100, 170))  # four whole chunks and six tokens
WHOLE = 64
LAYOUT = KVLayout(4, 4, 8, "bfloat16", rope={"rope_type": "default", "rope_theta": 10000.0})
NAMESPACE = Namespace(model="parted", revision="1", layout=LAYOUT, chunk_tokens=CHUNK)

_names = itertools.count()


def new_url() -> str:
    """A store in memory that nobody else uses."""
    return f"memory://shards-{next(_names)}"


def partition(layout: KVLayout, pipeline: int, tensor: int) -> list[Shard]:
    """The rectangles of all ranks; each dimension is cut as evenly as it goes."""
    layers = [layout.layers * rank // pipeline for rank in range(pipeline + 1)]
    heads = [layout.kv_heads * rank // tensor for rank in range(tensor + 1)]
    return [Shard(*rows, *columns) for rows in itertools.pairwise(layers) for columns in itertools.pairwise(heads)]


def tp(ranks: int) -> list[Shard]:
    return partition(LAYOUT, 1, ranks)


def pp(ranks: int) -> list[Shard]:
    return partition(LAYOUT, ranks, 1)


FULL = LAYOUT.full_shard


def draw_kv(layout: KVLayout = LAYOUT, tokens: int = len(TOKENS), seed: int = 0) -> torch.Tensor:
    """KV whose channels have scales of their own, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, layout.head_dim)
    values = torch.randn(layout.layers, 2, tokens, layout.kv_heads, layout.head_dim, generator=generator) * scales
    return values.to(getattr(torch, layout.dtype))


def part_of(kv: torch.Tensor, shard: Shard) -> torch.Tensor:
    return kv[shard.layer_begin : shard.layer_end, :, :, shard.head_begin : shard.head_end]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[one.element_size()]
    return one.shape == other.shape and bool((one.contiguous().view(bits) == other.contiguous().view(bits)).all())


def open_rank(url: str, shard: Shard | None = None, namespace: Namespace = NAMESPACE, **overrides: object) -> KVStore:
    return KVStore.open(url, namespace, Settings(**{"layer_group": 2, **overrides}), shard=shard)


async def write(
    url: str, shards: Sequence[Shard], kv: torch.Tensor | None = None, *, chunks: range = range(4), **overrides: object
) -> torch.Tensor:
    """Save `chunks` of the prompt from ranks that hold `shards`; return all of the KV."""
    kv = draw_kv() if kv is None else kv
    begin, end = chunks.start * CHUNK, chunks.stop * CHUNK
    for shard in shards:
        async with open_rank(url, shard, **overrides) as store:
            values = part_of(kv, shard)[:, :, begin:end]
            saved = await store.save(TOKENS[:end], values, first_token=begin)
            assert (saved.chunks_new, saved.chunks_present) == (len(chunks), 0)
    return kv


async def damage(store: KVStore, key: str, change: Callable[[bytearray], None]) -> None:
    """Replace an object by what `change` makes of it; its metadata stays."""
    info = await store.objects.head(key)
    assert info is not None
    data = bytearray(info.size)
    await store.objects.get_range(key, 0, memoryview(data))
    change(data)
    await store.objects.put(key, data, metadata=info.metadata, replace=True)


def flip_last_section(data: bytearray) -> None:
    data[-20] ^= 1
