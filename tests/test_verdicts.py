"""What a lookup found is remembered, and withdrawn as soon as it is not so any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.errors import ObjectNotFoundError
from kvstore_s3.objectstore.base import ObjectInfo

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=16)
TOKENS = list(range(64))


def random_kv() -> torch.Tensor:
    return torch.randn((2, 2, 64, 2, 16), generator=torch.Generator().manual_seed(0)).bfloat16()


class CountingHeads:
    """Counts the heads that reach a store."""

    def __init__(self, store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        inner = store.objects.head

        async def head(key: str) -> ObjectInfo | None:
            self.count += 1
            return await inner(key)

        monkeypatch.setattr(store.objects, "head", head)


def opened(path: Path, **settings: object) -> KVStore:
    return KVStore.open(path.as_uri(), NAMESPACE, Settings(chunk_tokens=16, **settings))  # type: ignore[arg-type]


async def test_a_second_lookup_asks_the_store_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, random_kv())
        heads = CountingHeads(store, monkeypatch)
        assert (await store.lookup(TOKENS)).tokens == 64
        assert heads.count == 4
        assert (await store.lookup([*TOKENS, 1, 2])).tokens == 64
        assert heads.count == 4


async def test_a_verdict_ends_with_its_lifetime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, verdict_lifetime_s=0.05) as store:
        await store.save(TOKENS, random_kv())
        assert (await store.lookup(TOKENS)).tokens == 64
        heads = CountingHeads(store, monkeypatch)
        await asyncio.sleep(0.06)
        assert (await store.lookup(TOKENS)).tokens == 64
        assert heads.count == 4


async def test_a_verdict_is_withdrawn_when_the_object_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, random_kv())
        hit = await store.lookup(TOKENS)
        await store.objects.delete(hit.chunks[2].object_key)
        assert (await store.lookup(TOKENS)).tokens == 64  # nobody has looked
        assert (await store.load(await store.lookup(TOKENS))).shape[2] == 32
        assert (await store.lookup(TOKENS)).tokens == 32


async def test_a_save_looks_for_itself(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, random_kv())
        hit = await store.lookup(TOKENS)
        for chunk in hit.chunks:
            await store.objects.delete(chunk.object_key)
        assert (await store.save(TOKENS, random_kv())).chunks_new == 4


async def test_a_miss_is_asked_for_again_unless_it_is_to_be_remembered(tmp_path: Path) -> None:
    async with opened(tmp_path) as writer, opened(tmp_path) as reader, opened(tmp_path, miss_lifetime_s=60) as patient:
        assert not await reader.lookup(TOKENS)
        assert not await patient.lookup(TOKENS)
        await writer.save(TOKENS, random_kv())
        assert (await reader.lookup(TOKENS)).tokens == 64
        assert not await patient.lookup(TOKENS)
        assert (await patient.save(TOKENS, random_kv())).chunks_present == 4
        assert (await patient.lookup(TOKENS)).tokens == 64


async def test_a_remembered_chunk_knows_its_place_in_another_prompt(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, random_kv())
        await store.lookup(TOKENS)
        assert [chunk.first_token for chunk in (await store.lookup(TOKENS)).chunks] == [0, 16, 32, 48]


async def test_a_miss_that_a_save_mends_meanwhile_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, miss_lifetime_s=60) as store:
        answered, go_on = asyncio.Event(), asyncio.Event()
        inner = store.objects.head

        async def head(key: str) -> ObjectInfo | None:
            info = await inner(key)
            answered.set()
            await go_on.wait()  # the answer is on its way
            return info

        with monkeypatch.context() as patch:
            patch.setattr(store.objects, "head", head)
            looking = asyncio.create_task(store.lookup(TOKENS))
            await answered.wait()
        await store.save(TOKENS, random_kv())
        go_on.set()
        assert (await looking).tokens == 0
        assert (await store.lookup(TOKENS)).tokens == 64


async def test_a_chunk_that_was_saved_while_a_load_missed_it_is_offered(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(TOKENS, random_kv())
        hit = await store.lookup(TOKENS)
        groups = store.stream(hit)
        asked, gone, get_range = asyncio.Event(), asyncio.Event(), store.objects.get_range

        async def read_late(key: str, start: int, into: memoryview) -> None:
            if key == hit.chunks[2].object_key:
                asked.set()
                await gone.wait()
                raise ObjectNotFoundError("it was not there when it was asked for")
            await get_range(key, start, into)

        store.objects.get_range = read_late  # type: ignore[method-assign]
        loading = asyncio.create_task(anext(groups))
        await asked.wait()
        await store.objects.delete(hit.chunks[2].object_key)
        assert (await store.save(TOKENS, random_kv())).chunks_new == 1
        gone.set()
        assert (await loading).tokens == 32
        await groups.aclose()
        assert (await store.lookup(TOKENS)).tokens == 64
