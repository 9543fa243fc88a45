"""A stream that gives each chunk away as soon as it is decoded, in layers as small as they can be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace
from kvstore_s3.config import load_settings

LAYERS, CHUNK = 8, 32
LAYOUT = KVLayout(layers=LAYERS, kv_heads=2, head_dim=64, dtype="bfloat16")
NAMESPACE = Namespace(model="test/sink", revision="1", layout=LAYOUT, chunk_tokens=CHUNK)
TOKENS = list(range(5 * CHUNK + 7))


def draw_kv() -> torch.Tensor:
    shape = (LAYERS, 2, 5 * CHUNK, 2, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()


@asynccontextmanager
async def opened(directory: Path, **settings: object) -> AsyncIterator[KVStore]:
    async with KVStore.open(f"file://{directory}", NAMESPACE, load_settings(**settings)) as store:
        yield store


class Pages:
    """What a sink was given, put together."""

    def __init__(self) -> None:
        self.kv = torch.zeros((LAYERS, 2, 5 * CHUNK, 2, 64), dtype=torch.bfloat16)
        self.calls: list[tuple[int, int]] = []

    async def take(self, layer_begin: int, number: int, values: torch.Tensor) -> None:
        self.calls.append((layer_begin, number))
        tokens = slice(number * CHUNK, (number + 1) * CHUNK)
        self.kv[layer_begin : layer_begin + len(values), :, tokens] = values


@pytest.mark.parametrize("by_layer", [False, True])
async def test_every_chunk_is_given_once_and_right(tmp_path: Path, by_layer: bool) -> None:
    kv, pages = draw_kv(), Pages()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        begins = []
        async for group in store.stream(await store.lookup(TOKENS), by_layer=by_layer, sink=pages.take):
            begins.append(group.layer_begin)
            layers = slice(group.layer_begin, group.layer_end)
            assert torch.equal(pages.kv[layers], kv[layers]), "before the group is handed over"
            assert group.kv.shape == kv[layers].shape
            assert group.kv.untyped_storage().nbytes() <= kv[layers].nbytes / 5, "a long load takes no more memory"
    assert torch.equal(pages.kv, kv)
    assert begins == (list(range(0, LAYERS, store.settings.layer_group)) if by_layer else [0])
    assert sorted(pages.calls) == [(begin, number) for begin in begins for number in range(5)]


async def test_a_lost_chunk_is_not_given_and_those_before_it_are(tmp_path: Path) -> None:
    kv, pages = draw_kv(), Pages()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        path = tmp_path / hit.chunks[2].object_key
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
        async for group in store.stream(hit, sink=pages.take):
            assert group.tokens == 2 * CHUNK
    assert (0, 2) not in pages.calls
    assert torch.equal(pages.kv[:, :, : 2 * CHUNK], kv[:, :, : 2 * CHUNK])


async def test_loads_at_once_share_the_memory_that_one_may_take(tmp_path: Path) -> None:
    held, most, may_go = 0, 0, asyncio.Event()

    async def hold(layer_begin: int, number: int, values: torch.Tensor) -> None:
        nonlocal held, most
        held += 1
        most = max(most, held)
        if held == 2 + 3:  # of all loads, and one for each but the one that has those
            may_go.set()
        await may_go.wait()
        held -= 1

    async with opened(tmp_path, download_concurrency=1, codec_threads=1) as store:
        await store.save(TOKENS, draw_kv())
        hit = await store.lookup(TOKENS)

        async def load() -> None:
            async for _ in store.stream(hit, sink=hold):
                pass

        await asyncio.gather(*[load() for _ in range(4)])
    assert most == 2 + 3


async def test_a_sink_that_fails_ends_the_load_with_its_error(tmp_path: Path) -> None:
    async def fail(layer_begin: int, number: int, values: torch.Tensor) -> None:
        raise ValueError("no page")

    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        with pytest.raises(ValueError, match="no page"):
            async for _ in store.stream(await store.lookup(TOKENS), sink=fail):
                pass
        assert store.stats()["slab_bytes"] == 0


async def test_memory_that_was_warmed_up_is_given_to_a_load_and_back(tmp_path: Path) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.warm_up(5 * CHUNK)
        assert store.stats()["slab_bytes"] == 0
        await store.save(TOKENS, kv)
        assert torch.equal(await store.load(await store.lookup(TOKENS)), kv)
