"""Loads onto a device, from files to values: what the store gives there is what it gives on the host."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from codec.calibrations import make_calibration
from device.counting import CountingLibrary
from device.emulated import ON_DEVICE, Device
from partitions import (
    CHUNK,
    LAYOUT,
    NAMESPACE,
    TOKENS,
    WHOLE,
    damage,
    draw_kv,
    flip_last_section,
    part_of,
    same_bits,
    tp,
)

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.library import Pages
from kvstore_s3.codec.device.scalable_calls import ScalableCalls, ScalableTotals
from kvstore_s3.devices import allowed_multiprocessors
from kvstore_s3.errors import DeviceError, InvalidArgumentError
from kvstore_s3.layout import Shard

pytestmark = pytest.mark.usefixtures("no_leaks")

MEMORY = torch.device("cuda" if ON_DEVICE else "cpu")


@pytest.fixture
def library(device: Device) -> CountingLibrary:
    return CountingLibrary(device.library.path, emulated=device.library.emulated)


@pytest.fixture
def decoder(library: CountingLibrary) -> Iterator[DeviceDecoder]:
    with DeviceDecoder(library, MEMORY, SMALLEST_BUDGET) as decoder:
        yield decoder


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many streams of codec 3 each call was given."""
    seen: list[int] = []
    decode = ScalableCalls.decode

    def count(calls: ScalableCalls, jobs: int, totals: ScalableTotals, pages: Pages, **options: int) -> None:
        seen.append(totals.jobs)
        decode(calls, jobs, totals, pages, **options)

    monkeypatch.setattr(ScalableCalls, "decode", count)
    return seen


@asynccontextmanager
async def opened(
    path: Path, namespace: Namespace = NAMESPACE, shard: Shard | None = None, **overrides: object
) -> AsyncIterator[KVStore]:
    settings = Settings(**({"layer_group": 2} | overrides))
    async with KVStore.open(f"file://{path}", namespace, settings, shard=shard) as store:
        yield store


async def test_a_load_onto_a_device_is_bit_for_bit_what_was_saved(
    tmp_path: Path, decoder: DeviceDecoder, library: CountingLibrary
) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        found = await store.load(await store.lookup(TOKENS), device=decoder)
    assert found.device.type == MEMORY.type
    assert same_bits(found.cpu(), kv[:, :, :WHOLE])
    assert library.jobs == 4 * 2 * LAYOUT.kv_heads  # of each chunk two sections, and of these each head


async def test_streams_and_sinks_get_values_on_the_device(tmp_path: Path, decoder: DeviceDecoder) -> None:
    kv, given = draw_kv(), torch.zeros_like(draw_kv())

    async def take(layer_begin: int, number: int, values: torch.Tensor) -> None:
        given[layer_begin : layer_begin + len(values), :, number * CHUNK : (number + 1) * CHUNK] = values.cpu()

    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        async for _ in store.stream(hit, by_layer=True, sink=take, device=decoder):
            pass
        groups = [group async for group in store.stream(hit, first_token=CHUNK, by_layer=True, device=decoder)]
    assert [group.layer_begin for group in groups] == [0, 2]
    assert all(group.kv.device.type == MEMORY.type for group in groups)
    assert same_bits(torch.cat([group.kv.cpu() for group in groups]), kv[:, :, CHUNK:WHOLE])
    assert same_bits(given[:, :, :WHOLE], kv[:, :, :WHOLE])


@pytest.mark.parametrize("layers", [(0, 4), (1, 3)], ids=["whole sections", "cut sections"])
async def test_a_rectangle_of_what_others_wrote_is_loaded(
    tmp_path: Path, decoder: DeviceDecoder, layers: tuple[int, int]
) -> None:
    kv, shard = draw_kv(), Shard(*layers, 1, 4)
    for rank in tp(2):
        async with opened(tmp_path, shard=rank) as store:
            await store.save(TOKENS, part_of(kv, rank))
    async with opened(tmp_path, shard=shard) as store:
        hit = await store.lookup(TOKENS)
        assert hit.tokens == WHOLE
        found = await store.load(hit, device=decoder)
    assert same_bits(found.cpu(), part_of(kv, shard)[:, :, :WHOLE])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float8_e4m3fn"])
async def test_what_kernels_do_not_decode_the_cpu_does(tmp_path: Path, decoder: DeviceDecoder, dtype: str) -> None:
    layout = KVLayout(4, 4, 8, dtype)
    kv, namespace = draw_kv(layout), Namespace(model="parted", revision="1", layout=layout, chunk_tokens=CHUNK)
    async with opened(tmp_path, namespace) as store:
        await store.save(TOKENS, kv)
        found = await store.load(await store.lookup(TOKENS), device=decoder)
    assert same_bits(found.cpu(), kv[:, :, :WHOLE])


@pytest.mark.parametrize(
    ("profile", "dtype", "shard"),
    [
        ("near-lossless", "bfloat16", LAYOUT.full_shard),
        ("near-lossless", "float32", Shard(0, 4, 1, 3)),
        ("small", "bfloat16", Shard(0, 4, 1, 3)),
    ],
)
async def test_lossy_profiles_give_what_they_give_on_the_host(
    tmp_path: Path, decoder: DeviceDecoder, launched: list[int], profile: str, dtype: str, shard: Shard
) -> None:
    layout = KVLayout(4, 4, 8, dtype, rope=LAYOUT.rope)
    namespace = Namespace(model="parted", revision="1", layout=layout, chunk_tokens=CHUNK)
    async with opened(tmp_path, namespace, profile=profile) as store:
        await store.save(TOKENS, draw_kv(layout))
    async with opened(tmp_path, namespace, profile=profile, shard=shard) as store:
        hit = await store.lookup(TOKENS)
        on_host, found = await store.load(hit), await store.load(hit, device=decoder)
    assert same_bits(found.cpu(), on_host)
    assert sum(launched) == 4 * 2 * shard.heads


@pytest.mark.parametrize("span", ["head", "all"])
async def test_calibrated_values_are_those_of_the_host_but_for_their_rounding(
    tmp_path: Path, decoder: DeviceDecoder, launched: list[int], span: str
) -> None:
    calibration = make_calibration(
        LAYOUT, span, lambda seed: draw_kv(seed=seed), layer_group=2, namespace=NAMESPACE.digest
    )
    async with opened(tmp_path, profile="near-lossless") as store:
        await store.calibrations.publish(calibration.to_bytes())
        await store.save(TOKENS, draw_kv(seed=9))
        hit = await store.lookup(TOKENS)
        on_host, found = await store.load(hit), (await store.load(hit, device=decoder)).cpu()
    assert sum(launched) == 4 * 2 * (1 if span == "all" else LAYOUT.kv_heads)
    # Span all is multiplied on tensor cores, for which y is rounded to float16.
    off, often = (2**-10 * float(on_host.abs().max()), 0.3) if span == "all" else (1e-5, 0.01)
    torch.testing.assert_close(found, on_host, rtol=2**-7, atol=off)
    assert float((found != on_host).float().mean()) < often


async def test_without_a_library_values_are_decoded_by_the_cpu_and_copied(tmp_path: Path) -> None:
    kv = draw_kv()
    with DeviceDecoder(None, MEMORY, SMALLEST_BUDGET) as decoder:
        async with opened(tmp_path) as store:
            await store.save(TOKENS, kv)
            found = await store.load(await store.lookup(TOKENS), device=decoder)
    assert same_bits(found.cpu(), kv[:, :, :WHOLE])


async def test_damage_ends_a_load_onto_a_device_before_it(tmp_path: Path, decoder: DeviceDecoder) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        await damage(store, (await store.lookup(TOKENS)).chunks[2].object_key, flip_last_section)
    async with opened(tmp_path) as store:
        hit = await store.lookup(TOKENS)
        assert hit.tokens == WHOLE
        found = await store.load(hit, device=decoder)
        assert store.is_lost(hit.chunks[2].identity.key)
    assert same_bits(found.cpu(), kv[:, :, : 2 * CHUNK])


async def test_a_device_that_fails_is_an_error_and_no_hit(
    tmp_path: Path, decoder: DeviceDecoder, library: CountingLibrary
) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        library.broken = True
        with pytest.raises(DeviceError, match="CUDA error 700"):
            await store.load(hit, device=decoder)
        library.broken = False
        assert not any(store.is_lost(chunk.identity.key) for chunk in hit.chunks)  # the data are not to blame
        assert same_bits((await store.load(hit, device=decoder)).cpu(), kv[:, :, :WHOLE])


async def test_a_cancelled_load_onto_a_device_leaves_nothing_under_way(tmp_path: Path, decoder: DeviceDecoder) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        hit = await store.lookup(TOKENS)
        for pause in (0.0, 0.002, 0.01):
            load = asyncio.create_task(store.load(hit, device=decoder))
            await asyncio.sleep(pause)
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        gc.collect()
        assert same_bits((await store.load(hit, device=decoder)).cpu(), kv[:, :, :WHOLE])


async def test_the_host_is_a_device_like_none(tmp_path: Path) -> None:
    kv = draw_kv()
    async with opened(tmp_path) as store:
        await store.save(TOKENS, kv)
        found = await store.load(await store.lookup(TOKENS), device="cpu")
    assert same_bits(found, kv[:, :, :WHOLE])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        hit = await store.lookup(TOKENS)
        with pytest.raises(DeviceError, match="load to the CPU"):
            await store.load(hit, device="cuda:0")
        with pytest.raises(InvalidArgumentError, match="meta"):
            await store.load(hit, device="meta")


def test_a_share_of_a_gpu_is_a_setting() -> None:
    assert Settings().device_share == 1
    with pytest.raises(ValueError, match="device_share"):
        Settings(device_share=0)
    allowed = [allowed_multiprocessors(132, share) for share in (1, 0.5, 0.1, 0.001)]
    assert allowed == [0, 66, 13, 1]  # 0: all that there are
