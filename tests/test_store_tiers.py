"""A store with tiers: what was loaded or saved is there without the store, and damage in a tier costs one more read."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, Pace, PrefillSpeed, Settings
from kvstore_s3.objectstore.base import ObjectInfo
from kvstore_s3.transfer.bandwidth import Bandwidth

LAYOUT = KVLayout(layers=6, kv_heads=4, head_dim=64, dtype="bfloat16")
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=64)
TOKENS = list(range(64 * 4))
MiB = 1024 * 1024


def draw_kv(seed: int = 0) -> torch.Tensor:
    shape = (6, 2, len(TOKENS), 4, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Requests:
    """What reaches the object store."""

    def __init__(self, store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heads = self.bytes = 0
        head, get_range = store.objects.head, store.objects.get_range

        async def counted_head(key: str) -> ObjectInfo | None:
            self.heads += 1
            return await head(key)

        async def counted_range(key: str, start: int, into: memoryview) -> None:
            self.bytes += len(into)
            await get_range(key, start, into)

        monkeypatch.setattr(store.objects, "head", counted_head)
        monkeypatch.setattr(store.objects, "get_range", counted_range)


@asynccontextmanager
async def opened(path: Path, **given: object) -> AsyncIterator[KVStore]:
    settings = Settings(chunk_tokens=64, layer_group=2, range_bytes=64 * 1024, **given)  # type: ignore[arg-type]
    async with KVStore.open((path / "store").as_uri(), NAMESPACE, settings) as store:
        yield store
    assert store._loader.slabs.leased == 0


async def fill(path: Path) -> torch.Tensor:
    kv = draw_kv()
    async with opened(path) as store:
        await store.save(TOKENS, kv)
    return kv


async def load_all(store: KVStore) -> torch.Tensor:
    kv = await store.load(await store.lookup(TOKENS))
    await store._loader.settle()
    return kv


def host(path: Path) -> dict[str, object]:
    return {"host_tier_bytes": 64 * MiB}


def nvme(path: Path) -> dict[str, object]:
    return {"nvme_tier_dir": path / "tier"}


def both(path: Path) -> dict[str, object]:
    return host(path) | nvme(path)


@pytest.mark.parametrize("tiers", [host, nvme, both])
async def test_a_second_load_reads_nothing_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: type
) -> None:
    kv = await fill(tmp_path)
    async with opened(tmp_path, **tiers(tmp_path)) as store:
        assert torch.equal(await load_all(store), kv)
        requests = Requests(store, monkeypatch)
        assert torch.equal(await load_all(store), kv)
        assert (requests.heads, requests.bytes) == (0, 0)
        hits = store.counters.snapshot()
        assert hits.get("host_hit_bytes", 0) + hits.get("nvme_hit_bytes", 0) > 0


async def test_another_process_hits_nvme_without_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = await fill(tmp_path)
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        await load_all(store)
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        requests = Requests(store, monkeypatch)
        assert torch.equal(await load_all(store), kv)
        assert (requests.heads, requests.bytes) == (0, 0)


@pytest.mark.parametrize("tiers", [host, nvme, both])
async def test_what_is_saved_is_in_the_tiers_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: type) -> None:
    kv = draw_kv()
    async with opened(tmp_path, **tiers(tmp_path)) as store:
        await store.save(TOKENS, kv)
        await store._loader.settle()
        requests = Requests(store, monkeypatch)
        assert torch.equal(await load_all(store), kv)
        assert requests.bytes == 0


async def test_a_hit_outlives_the_store_where_a_tier_has_it(tmp_path: Path) -> None:
    kv = await fill(tmp_path)
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        await load_all(store)
    shutil.rmtree(tmp_path / "store")
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        assert torch.equal(await load_all(store), kv)


@pytest.mark.parametrize("at", [4096 + 40, 4096 + 5000, 60000, 150000])
async def test_damage_on_nvme_is_dropped_and_read_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    kv = await fill(tmp_path)
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        await load_all(store)
    files = [path for path in (tmp_path / "tier").rglob("*") if path.is_file() and path.stat().st_size > 200_000]
    assert len(files) == 4
    data = bytearray(files[0].read_bytes())
    data[at] ^= 4
    files[0].write_bytes(data)
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        requests = Requests(store, monkeypatch)
        assert torch.equal(await load_all(store), kv)
        assert requests.bytes > 0
        assert store.counters.snapshot()["tier_damage"] == 1
        assert not [record for record in caplog.records if "treated as a miss" in record.getMessage()]
        await load_all(store)  # what was kept after the damage may lack the bands before it
        requests.bytes = 0
        assert torch.equal(await load_all(store), kv)
        assert requests.bytes == 0, "it was not kept again"


async def test_an_object_that_was_replaced_in_the_store_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with opened(tmp_path, **both(tmp_path)) as store:
        await load_all(store)
        async with opened(tmp_path) as other:
            for chunk in (await other.lookup(TOKENS)).chunks[:2]:
                await other.objects.delete(chunk.object_key)
            fresh = draw_kv(1)
            await other.save(TOKENS[:128], fresh[:, :, :128])
        found = await load_all(store)
        assert torch.equal(found[:, :, 128:], draw_kv()[:, :, 128:])
        for begin in (0, 64):
            part = found[:, :, begin : begin + 64]
            assert any(torch.equal(part, kv[:, :, begin : begin + 64]) for kv in (draw_kv(), fresh))


async def test_a_tier_directory_that_vanishes_costs_nothing_but_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = await fill(tmp_path)
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        await load_all(store)
        shutil.rmtree(tmp_path / "tier")
        requests = Requests(store, monkeypatch)
        assert torch.equal(await load_all(store), kv)
        assert requests.bytes > 0


@pytest.mark.parametrize("tiers", [host, nvme, both])
async def test_a_cancelled_load_leaves_nothing_on_lease(tmp_path: Path, tiers: type) -> None:
    kv = await fill(tmp_path)
    async with opened(tmp_path, **tiers(tmp_path)) as store:
        hit = await store.lookup(TOKENS)
        for delay in (0.0, 0.001, 0.002, 0.004):
            task = asyncio.create_task(store.load(hit))
            await asyncio.wait([task], timeout=delay)
            task.cancel()
            await asyncio.wait([task])
        await store._loader.settle()
        assert store._loader.slabs.leased == 0
        assert torch.equal(await load_all(store), kv)


async def test_a_lossy_reader_keeps_the_levels_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = draw_kv()
    async with opened(tmp_path, profile="near-lossless") as store:
        await store.save(TOKENS, kv)
    async with opened(tmp_path, profile="small", **nvme(tmp_path)) as store:
        small = await load_all(store)
        requests = Requests(store, monkeypatch)
        assert torch.equal(await load_all(store), small)
        assert requests.bytes == 0
    async with opened(tmp_path, profile="near-lossless", **nvme(tmp_path)) as store:
        requests = Requests(store, monkeypatch)
        best = await load_all(store)
        assert requests.bytes > 0
        assert (best - kv).float().pow(2).mean() < (small - kv).float().pow(2).mean()


@pytest.mark.parametrize("tiers", [host, nvme])
async def test_what_is_near_is_loaded_however_slow_the_link_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: Callable[[Path], dict[str, object]]
) -> None:
    kv = await fill(tmp_path)
    async with opened(tmp_path, **tiers(tmp_path)) as store:
        await load_all(store)  # in groups of layers, as they are kept then
        rate = Bandwidth()
        rate.observe(2 * MiB, 0.0, 200.0, 1)
        store._loader.link.bandwidth = rate
        requests = Requests(store, monkeypatch)
        pace = Pace(PrefillSpeed(seconds_per_token=0.2), prompt_tokens=len(TOKENS))  # for slow machines, slower links
        assert pace.prefill.seconds(0, len(TOKENS)) < kv.nbytes / (rate.bytes_per_s or 0.0) / 2
        assert torch.equal(await store.load(await store.lookup(TOKENS), pace=pace), kv)
        assert requests.bytes == 0


async def test_the_memory_of_the_host_tier_is_let_go_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    monkeypatch.setattr("kvstore_s3.tiers.Arena.close", lambda arena: closed.append(arena.size))
    async with opened(tmp_path, host_tier_bytes=2 * MiB):
        pass
    assert 2 * MiB in closed


async def test_a_save_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    kv = draw_kv()
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        with (tmp_path / "tier" / "v1" / "usage").open("r+b") as usage:
            fcntl.flock(usage, fcntl.LOCK_EX)  # as a process does that was stopped while it wrote
            saved = await asyncio.wait_for(store.save(TOKENS, kv), 10)
            assert saved.chunks_new == 4
            assert torch.equal(await store.load(await store.lookup(TOKENS)), kv)
        assert torch.equal(await load_all(store), kv)


async def test_objects_that_the_tiers_are_too_slow_for_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, **nvme(tmp_path)) as store:
        loader, arrived, real = store._loader, asyncio.Event(), store._loader.tiers._keep

        async def keep_late(*given: Any) -> None:
            await arrived.wait()
            await real(*given)

        monkeypatch.setattr(loader.tiers, "_keep", keep_late)
        try:
            loader._written = store.settings.upload_bytes - 1  # so much is on its way already
            await store.save(TOKENS, draw_kv())
            assert not loader.tiers._keeping
            loader._written = 0
            await store.save(TOKENS, draw_kv(), salt="another")
            assert len(loader.tiers._keeping) == 4
        finally:
            arrived.set()
        await loader.settle()
        assert loader._written == 0
