"""Loads straight into an engine's blocks on a device: every layout, what kernels decode and what the host does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from device.counting import CountingLibrary, opened
from device.emulated import ON_DEVICE, Device
from partitions import CHUNK, LAYOUT, TOKENS, WHOLE, damage, draw_kv, flip_last_section, part_of, same_bits, tp

from kvstore_s3 import KVLayout, KVStore
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.streams import Mark
from kvstore_s3.connectors.vllm.layouts import LAYOUTS, view_layers
from kvstore_s3.device_load import DevicePlace
from kvstore_s3.device_pages import PagedMemory
from kvstore_s3.errors import DeviceError
from kvstore_s3.layout import Shard
from kvstore_s3.store import Hit
from kvstore_s3.transfer.ranges import Band

pytestmark = pytest.mark.usefixtures("no_leaks")

MEMORY = torch.device("cuda" if ON_DEVICE else "cpu")
BLOCKS = 19
BLOCK_IDS = [7, 2, 11, 0, 18, 5, 3, 14]
"""Of eight tokens each: the four whole chunks."""


@pytest.fixture
def library(device: Device) -> CountingLibrary:
    return CountingLibrary(device.library.path, emulated=device.library.emulated)


@pytest.fixture
def decoder(library: CountingLibrary) -> Iterator[DeviceDecoder]:
    with DeviceDecoder(library, MEMORY, SMALLEST_BUDGET) as decoder:
        yield decoder


def make_caches(layout: KVLayout, order: str, *, heads: int | None = None) -> tuple[torch.Tensor, ...]:
    """The caches of an engine whose blocks hold a pattern that no KV has."""
    heads = heads or layout.kv_heads
    size = layout.layers * BLOCKS * heads * 8 * 2 * layout.head_dim
    storage = torch.full((size * layout.itemsize,), 0xA5, dtype=torch.uint8, device=MEMORY)
    shape = {"layers": layout.layers, "blocks": BLOCKS, "heads": heads, "block_tokens": 8}
    return view_layers(storage.view(getattr(torch, layout.dtype)), order, head_dim=layout.head_dim, **shape)


class Engine:
    """Takes hits into its blocks; `aside` are chunks that came to the sink."""

    def __init__(self, caches: Sequence[torch.Tensor], decoder: DeviceDecoder, *, layer_begin: int = 0) -> None:
        self.caches, self.decoder, self.layer_begin = tuple(caches), decoder, layer_begin
        self.aside: list[int] = []
        self.asked_ready = 0

    async def load(self, store: KVStore, hit: Hit, **options: object) -> int:
        tokens = 0
        stream = store.stream(
            hit,
            sink=self.take,
            find_place=self.find_place,
            device=self.decoder,
            **options,  # type: ignore[arg-type]
        )
        async for group in stream:
            tokens = group.tokens
        return tokens

    def find_place(self, band: Band, number: int) -> DevicePlace:
        layers = self.caches[band.layer_begin - self.layer_begin : band.layer_end - self.layer_begin]
        memory = PagedMemory.of(layers, BLOCK_IDS[2 * number : 2 * number + 2])
        return DevicePlace(memory, self.decoder, ready=self.get_ready)

    async def get_ready(self) -> Mark | None:
        self.asked_ready += 1
        return self.decoder.mark_current()

    async def take(self, layer_begin: int, number: int, values: torch.Tensor) -> None:
        self.aside.append(number)

    def read(self, tokens: int = WHOLE) -> torch.Tensor:
        memory = PagedMemory.of(self.caches, BLOCK_IDS[: tokens // 8])
        out = torch.empty(memory.shape, dtype=memory.dtype, device=MEMORY)
        memory.gather(out)
        return out.cpu()

    def check_others_untouched(self) -> None:
        others = sorted(set(range(BLOCKS)) - set(BLOCK_IDS))
        for cache in self.caches:
            assert bool((cache[others].contiguous().view(torch.uint8) == 0xA5).all())


@pytest.mark.parametrize("order", LAYOUTS)
async def test_chunks_are_decoded_into_the_blocks_that_the_table_names(
    tmp_path: Path, decoder: DeviceDecoder, library: CountingLibrary, order: str
) -> None:
    kv, engine = draw_kv(), Engine(make_caches(LAYOUT, order), decoder)
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        assert await engine.load(store, await store.lookup(TOKENS), by_layer=order == "LBNHC") == WHOLE
    assert same_bits(engine.read(), kv[:, :, :WHOLE])
    engine.check_others_untouched()
    assert engine.aside == []
    assert engine.asked_ready == 4 * (2 if order == "LBNHC" else 1)
    assert library.jobs == 4 * 2 * LAYOUT.kv_heads


async def test_a_latent_cache_is_one_head_whose_halves_are_k_and_v(tmp_path: Path, decoder: DeviceDecoder) -> None:
    layout = KVLayout(3, 1, 24, "bfloat16")
    latent = torch.zeros(3, BLOCKS, 8, 48, dtype=torch.bfloat16, device=MEMORY)
    kv, engine = draw_kv(layout), Engine([layer.unsqueeze(1) for layer in latent], decoder)
    async with opened(tmp_path, layout) as store:
        await store.save(TOKENS, kv)
        await engine.load(store, await store.lookup(TOKENS))
    for layer in range(3):
        found = latent[layer, BLOCK_IDS].reshape(WHOLE, 48).cpu()
        assert same_bits(found, torch.cat([kv[layer, 0, :WHOLE, 0], kv[layer, 1, :WHOLE, 0]], dim=-1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float8_e4m3fn"])
async def test_what_kernels_do_not_decode_is_written_into_the_blocks_too(
    tmp_path: Path, decoder: DeviceDecoder, library: CountingLibrary, dtype: str
) -> None:
    layout = KVLayout(4, 4, 8, dtype)
    kv, engine = draw_kv(layout), Engine(make_caches(layout, "BLHNC"), decoder)
    async with opened(tmp_path, layout) as store:
        await store.save(TOKENS, kv)
        assert await engine.load(store, await store.lookup(TOKENS)) == WHOLE
    assert same_bits(engine.read(), kv[:, :, :WHOLE])
    engine.check_others_untouched()
    assert library.jobs == 0


@pytest.mark.parametrize("profile", ["near-lossless", "small"])
async def test_lossy_profiles_come_into_blocks_as_they_come_on_the_host(
    tmp_path: Path, decoder: DeviceDecoder, profile: str
) -> None:
    engine = Engine(make_caches(LAYOUT, "LBNHC"), decoder)
    async with opened(tmp_path, profile=profile) as store:
        await store.save(TOKENS, draw_kv())
        hit = await store.lookup(TOKENS)
        on_host = await store.load(hit)
        assert await engine.load(store, hit) == WHOLE
    assert same_bits(engine.read(), on_host)


async def test_a_rank_takes_its_heads_and_layers_of_what_others_wrote(tmp_path: Path, decoder: DeviceDecoder) -> None:
    kv, shard = draw_kv(), Shard(1, 3, 1, 4)
    for rank in tp(2):
        async with opened(tmp_path, shard=rank) as store:
            await store.save(TOKENS, part_of(kv, rank))
    engine = Engine(make_caches(LAYOUT, "LBHNC", heads=3)[:2], decoder, layer_begin=1)
    async with opened(tmp_path, shard=shard) as store:
        assert await engine.load(store, await store.lookup(TOKENS)) == WHOLE
    assert same_bits(engine.read(), part_of(kv, shard)[:, :, :WHOLE])
    engine.check_others_untouched()


async def test_without_a_library_the_host_decodes_and_blocks_are_filled(tmp_path: Path) -> None:
    kv = draw_kv()
    with DeviceDecoder(None, MEMORY, SMALLEST_BUDGET) as decoder:
        engine = Engine(make_caches(LAYOUT, "LBNHC"), decoder)
        async with opened(tmp_path) as store:
            await store.save(TOKENS, kv)
            assert await engine.load(store, await store.lookup(TOKENS)) == WHOLE
    assert same_bits(engine.read(), kv[:, :, :WHOLE])


async def test_damage_leaves_the_blocks_before_it_right_and_those_of_others_untouched(
    tmp_path: Path, decoder: DeviceDecoder
) -> None:
    kv, engine = draw_kv(), Engine(make_caches(LAYOUT, "BLNHC"), decoder)
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        await damage(store, (await store.lookup(TOKENS)).chunks[2].object_key, flip_last_section)
    async with opened(tmp_path) as store:
        assert await engine.load(store, await store.lookup(TOKENS)) == 2 * CHUNK
    assert same_bits(engine.read(2 * CHUNK), kv[:, :, : 2 * CHUNK])
    engine.check_others_untouched()


async def test_a_device_that_fails_is_an_error_of_the_load(
    tmp_path: Path, decoder: DeviceDecoder, library: CountingLibrary
) -> None:
    engine = Engine(make_caches(LAYOUT, "LBNHC"), decoder)
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        hit = await store.lookup(TOKENS)
        library.broken = True
        with pytest.raises(DeviceError, match="CUDA error 700"):
            await engine.load(store, hit)
    engine.check_others_untouched()
