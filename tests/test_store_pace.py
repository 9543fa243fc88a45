"""A load that knows how fast the engine computes stops where computing is faster, and reads what is in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, Pace, PrefillSpeed, Settings, streaming
from kvstore_s3.errors import InvalidArgumentError, ObjectNotFoundError
from kvstore_s3.planner import Plan, Replanner
from kvstore_s3.streaming import Stream

LAYOUT = KVLayout(layers=4, kv_heads=4, head_dim=64, dtype="bfloat16")
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=64)
TOKENS = list(range(64 * 16))


def draw_kv() -> torch.Tensor:
    return torch.randn((4, 2, len(TOKENS), 4, 64), generator=torch.Generator().manual_seed(0)).bfloat16()


class SlowLink:
    """Lets the reads of a store through one after the other, at `bytes_per_s`, which may change meanwhile."""

    def __init__(self, store: KVStore, monkeypatch: pytest.MonkeyPatch, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.bytes = 0
        turn, get_range = asyncio.Lock(), store.objects.get_range

        async def read(key: str, start: int, into: memoryview) -> None:
            async with turn:
                await asyncio.sleep(len(into) / self.bytes_per_s)
                await get_range(key, start, into)
                self.bytes += len(into)

        monkeypatch.setattr(store.objects, "get_range", read)


@asynccontextmanager
async def opened(path: Path, *, layer_group: int = 2, **given: object) -> AsyncIterator[KVStore]:
    settings = Settings(chunk_tokens=64, layer_group=layer_group, range_bytes=64 * 1024, hedge_ratio=0, **given)  # type: ignore[arg-type]
    async with KVStore.open(path.as_uri(), NAMESPACE, settings) as store:
        yield store
    assert store._loader.slabs.leased == 0


async def measured(store: KVStore) -> None:
    """Let the store measure its link."""
    await store.load(await store.lookup(TOKENS))


async def test_without_a_pace_everything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        SlowLink(store, monkeypatch, 8e6)
        assert torch.equal(await store.load(await store.lookup(TOKENS)), draw_kv())


async def test_an_engine_faster_than_the_link_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        link = SlowLink(store, monkeypatch, 8e6)
        await measured(store)
        link.bytes = 0
        quick = Pace(PrefillSpeed(seconds_per_token=1e-6), prompt_tokens=len(TOKENS))
        hit = await store.lookup(TOKENS)
        assert (await store.load(hit, pace=quick)).shape[2] == 0
        assert [group async for group in store.stream(hit, pace=quick)] == []
        assert link.bytes == 0
        assert store.counters.snapshot()["chunks_left_to_recompute"] == 32


async def test_an_engine_slower_than_the_link_loads_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        SlowLink(store, monkeypatch, 8e6)
        await measured(store)
        slow = Pace(PrefillSpeed(seconds_per_token=1.0), prompt_tokens=len(TOKENS))
        assert torch.equal(await store.load(await store.lookup(TOKENS), pace=slow), draw_kv())


async def test_a_link_that_collapses_is_given_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        link = SlowLink(store, monkeypatch, 20e6)
        await measured(store)
        pace = Pace(PrefillSpeed(seconds_per_token=0.001), prompt_tokens=len(TOKENS))
        loading = asyncio.create_task(store.load(await store.lookup(TOKENS), pace=pace))
        await asyncio.sleep(0.05)
        link.bytes_per_s = 0.2e6
        begun = time.monotonic()
        kv = await loading
        whole = store.namespace.layout.bytes_per_token * len(TOKENS) / 0.2e6
        assert kv.shape[2] < len(TOKENS)
        assert torch.equal(kv, draw_kv()[:, :, : kv.shape[2]])
        assert time.monotonic() - begun < whole / 2


async def test_levels_are_left_out_where_they_would_be_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, profile="near-lossless", lowest_profile="small") as store:
        await store.save(TOKENS, draw_kv())
        link = SlowLink(store, monkeypatch, 4e6)
        await measured(store)
        all_levels, link.bytes = link.bytes, 0
        pace = Pace(PrefillSpeed(seconds_per_token=1.0), prompt_tokens=len(TOKENS), deadline_s=all_levels / 4e6 / 2)
        hit = await store.lookup(TOKENS)
        assert (await store.load(hit, pace=pace)).shape[2] == len(TOKENS)
        assert hit.quality in ("balanced", "small")
        assert link.bytes < all_levels
        assert store.counters.snapshot()["levels_left_out"] > 0


async def test_quality_is_never_lowered_unless_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, profile="near-lossless") as store:
        await store.save(TOKENS, draw_kv())
        SlowLink(store, monkeypatch, 4e6)
        await measured(store)
        pace = Pace(PrefillSpeed(seconds_per_token=1.0), prompt_tokens=len(TOKENS), deadline_s=0.01)
        hit = await store.lookup(TOKENS)
        assert (await store.load(hit, pace=pace)).shape[2] == len(TOKENS)
        assert hit.quality == "near-lossless"


@pytest.mark.parametrize("pace", [None, Pace(PrefillSpeed(seconds_per_token=1.0), prompt_tokens=len(TOKENS))])
async def test_what_lies_behind_a_lost_object_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pace: Pace | None
) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())
        await measured(store)
        hit = await store.lookup(TOKENS)
        keys, hanging, get_range = [chunk.object_key for chunk in hit.chunks], asyncio.Event(), store.objects.get_range

        async def read(key: str, start: int, into: memoryview) -> None:
            if key == keys[2]:
                await hanging.wait()
                raise ObjectNotFoundError(key)
            if key in keys[3:]:
                hanging.set()
                await asyncio.Event().wait()
            await get_range(key, start, into)

        monkeypatch.setattr(store.objects, "get_range", read)
        async with asyncio.timeout(60):
            kv = await store.load(hit, pace=pace)
        assert torch.equal(kv, draw_kv()[:, :, : 2 * 64])
        assert "loads_given_up" not in store.counters.snapshot()


async def test_what_is_cut_between_two_groups_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_REPLAN_S", 0.0)  # or the look between the groups may come too soon after another
    async with opened(tmp_path, layer_group=1, download_concurrency=64) as store:
        await store.save(TOKENS, draw_kv())
        hit = await store.lookup(TOKENS)
        behind, get_range, running = (
            [chunk.object_key for chunk in hit.chunks[3:]],
            store.objects.get_range,
            Stream._revise,
        )

        async def read(key: str, start: int, into: memoryview) -> None:
            await asyncio.sleep(0.03)
            if start > 0 and key in behind:
                await asyncio.Event().wait()
            await get_range(key, start, into)

        def revise(stream: Stream, replanner: Replanner, now: float) -> Plan:
            planned = running(stream, replanner, now)
            return replace(planned, keep=3) if len(stream._groups) == 1 and stream._next_band == 2 else planned

        monkeypatch.setattr(store.objects, "get_range", read)
        monkeypatch.setattr(Stream, "_revise", revise)
        pace = Pace(PrefillSpeed(seconds_per_token=1.0), prompt_tokens=len(TOKENS), seconds_per_layer=0.001)
        async with asyncio.timeout(60):
            tokens = [group.tokens async for group in store.stream(hit, pace=pace)]
        assert tokens == [3 * 64] * 4


@pytest.mark.parametrize("seconds_per_layer", [0.0, 0.001])
async def test_a_link_that_never_brought_a_byte_is_given_up_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_per_layer: float
) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, draw_kv())

        async def read(key: str, start: int, into: memoryview) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(store.objects, "get_range", read)
        prefill = PrefillSpeed(seconds_per_token=0.0005)
        pace = Pace(prefill, prompt_tokens=len(TOKENS), seconds_per_layer=seconds_per_layer)
        hit = await store.lookup(TOKENS)
        async with asyncio.timeout(60):
            assert (await store.load(hit, pace=pace)).shape[2] == 0


@pytest.mark.parametrize(
    "given",
    [{"deadline_s": -1.0}, {"seconds_per_layer": float("nan")}, {"spent_s": float("inf")}, {"prompt_tokens": -1}],
)
def test_a_pace_that_cannot_be_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="finite and not negative"):
        Pace(PrefillSpeed(0.001), **{"prompt_tokens": 100, **given})  # type: ignore[arg-type]
