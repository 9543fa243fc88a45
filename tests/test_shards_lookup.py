"""Which objects are asked for where a model was written in parts, what is missed, and how damage is mended."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from local_server import LocalServer
from partitions import (
    CHUNK,
    FULL,
    NAMESPACE,
    TOKENS,
    WHOLE,
    damage,
    draw_kv,
    flip_last_section,
    new_url,
    open_rank,
    part_of,
    partition,
    pp,
    same_bits,
    tp,
    write,
)
from servers import BUCKET

from kvstore_s3 import KVStore
from kvstore_s3.errors import StoreRefusedError, StoreUnavailableError
from kvstore_s3.layout import Shard
from kvstore_s3.objectstore.base import ObjectInfo
from kvstore_s3.shards import marker_key


class Asked:
    """Counts what a store is asked, by shard."""

    def __init__(self, store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heads: Counter[str] = Counter()
        self.lists = 0
        head, list_all = store.objects.head, store.objects.list

        async def count_head(key: str) -> ObjectInfo | None:
            self.heads[key.rpartition("/")[2]] += 1
            return await head(key)

        def count_list(prefix: str = "") -> AsyncIterator[ObjectInfo]:
            self.lists += 1
            return list_all(prefix)

        monkeypatch.setattr(store.objects, "head", count_head)
        monkeypatch.setattr(store.objects, "list", count_list)


# What is asked


async def test_a_store_that_was_written_whole_has_no_markers_and_costs_one_head_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = new_url()
    await write(url, tp(1))
    async with open_rank(url, verdict_lifetime_s=0.001) as store:
        assert [info.key async for info in store.objects.list(f"{NAMESPACE.hex}/shards/")] == []
        asked = Asked(store, monkeypatch)
        assert (await store.lookup(TOKENS)).tokens == WHOLE
        assert asked.heads == {FULL.name: 4}
        assert not await store.lookup(range(64))
        assert set(asked.heads) == {FULL.name}


async def test_markers_are_listed_once_for_as_long_as_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_url()
    await write(url, tp(1))
    async with open_rank(url) as store:
        asked = Asked(store, monkeypatch)
        for start in range(5):
            assert not await store.lookup(range(start, start + 64))
        assert asked.lists == 1


async def test_a_hit_of_the_reader_s_own_rectangle_waits_for_no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_url()
    await write(url, tp(2))
    async with open_rank(url, tp(2)[0]) as rank:
        listing = asyncio.Event()

        async def hang(prefix: str = "") -> AsyncIterator[ObjectInfo]:
            listing.set()
            await asyncio.Event().wait()
            yield ObjectInfo("", 0)

        monkeypatch.setattr(rank.objects, "list", hang)
        async with asyncio.timeout(60):
            assert (await rank.lookup(TOKENS)).tokens == WHOLE
            await listing.wait()  # and closing ends it


async def test_once_a_partition_was_met_its_objects_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_url()
    await write(url, tp(2))
    async with open_rank(url, verdict_lifetime_s=0.001) as store:
        assert (await store.lookup(TOKENS)).tokens == WHOLE
        await asyncio.sleep(0.002)
        asked, together, all_asked = Asked(store, monkeypatch), 0, asyncio.Event()
        head = store.objects.head

        async def watch(key: str) -> ObjectInfo | None:
            nonlocal together
            together += 1
            if together == 12:
                all_asked.set()
            await all_asked.wait()
            return await head(key)

        monkeypatch.setattr(store.objects, "head", watch)
        async with asyncio.timeout(60):  # for ever, were they not all asked in one round
            assert (await store.lookup(TOKENS)).tokens == WHOLE
        assert asked.heads == {shard.name: 4 for shard in (FULL, *tp(2))}


async def test_a_miss_asks_one_object_of_each_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_url()
    await write(url, partition(NAMESPACE.layout, 2, 4), chunks=range(2))
    await write(url, tp(2), chunks=range(2, 4))
    async with open_rank(url) as store:
        asked = Asked(store, monkeypatch)
        assert not await store.lookup(range(CHUNK))
        assert set(asked.heads) == {FULL.name, "l0-2.h0-1", "l0-4.h0-2"}


# What is found


async def test_partitions_may_change_from_chunk_to_chunk() -> None:
    url = new_url()
    kv = await write(url, tp(1), chunks=range(1))
    await write(url, tp(4), kv, chunks=range(1, 2))
    await write(url, pp(2), kv, chunks=range(2, 3))
    await write(url, partition(NAMESPACE.layout, 2, 2), kv, chunks=range(3, 4))
    for reader in (FULL, *tp(2), *pp(4)):
        async with open_rank(url, reader) as rank:
            hit = await rank.lookup(TOKENS)
            assert same_bits(await rank.load(hit), part_of(kv, reader)[:, :, :WHOLE])


async def test_a_chunk_of_which_a_rank_is_missing_ends_the_hit() -> None:
    url = new_url()
    kv = await write(url, [tp(2)[0]])
    async with open_rank(url) as store:
        assert not await store.lookup(TOKENS)
    await write(url, [tp(2)[1]], kv, chunks=range(2))
    async with open_rank(url) as store:
        assert (await store.lookup(TOKENS)).tokens == 2 * CHUNK


async def test_a_partition_that_appears_is_found_when_the_markers_are_listed_again() -> None:
    url = new_url()
    async with open_rank(url, verdict_lifetime_s=0.05) as store:
        assert not await store.lookup(TOKENS)
        kv = await write(url, tp(2))
        await asyncio.sleep(0.06)
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


async def test_ranks_read_a_store_from_before_there_were_markers() -> None:
    url = new_url()
    kv = await write(url, tp(1))
    for reader in tp(4):
        async with open_rank(url, reader) as rank:
            assert same_bits(await rank.load(await rank.lookup(TOKENS)), part_of(kv, reader)[:, :, :WHOLE])


async def test_objects_of_a_quality_that_is_not_accepted_make_up_no_chunk() -> None:
    url = new_url()
    kv = await write(url, tp(2), profile="small")
    async with open_rank(url) as store:
        assert not await store.lookup(TOKENS)
        assert (await store.save(TOKENS, kv)).chunks_new == 4
        assert (await store.lookup(TOKENS)).quality == "lossless"
    async with open_rank(url, tp(2)[0], profile="small") as rank:
        assert (await rank.lookup(TOKENS)).quality == "small", "what others wrote is left alone"


async def test_where_listing_is_refused_the_own_and_the_whole_rectangle_are_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(prefix: str = "") -> AsyncIterator[ObjectInfo]:
        raise StoreRefusedError("no")
        yield ObjectInfo("", 0)

    url = new_url()
    await write(url, tp(2), chunks=range(2))
    kv = await write(url, tp(1), chunks=range(2, 4))
    async with open_rank(url, tp(2)[0], verdict_lifetime_s=0.001) as rank:
        monkeypatch.setattr(rank.objects, "list", refuse)
        assert same_bits(await rank.load(await rank.lookup(TOKENS)), part_of(kv, tp(2)[0])[:, :, :WHOLE])
        assert not await rank.lookup(range(64))
    assert len([one for one in caplog.records if "listing is refused" in one.message]) == 1


async def test_where_listing_fails_a_miss_is_a_failure_and_not_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(prefix: str = "") -> AsyncIterator[ObjectInfo]:
        raise StoreUnavailableError("down")
        yield ObjectInfo("", 0)

    url = new_url()
    await write(url, tp(1), chunks=range(2))
    async with open_rank(url) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store.objects, "list", fail)
            with pytest.raises(StoreUnavailableError, match="down"):
                await store.lookup(TOKENS)
            saved = await store.save(TOKENS, draw_kv())
            assert (saved.chunks_new, saved.chunks_present) == (2, 2), "a save goes on without"
        assert (await store.lookup(TOKENS)).tokens == WHOLE


@pytest.mark.parametrize("name", ["l0-4.h0-9", "l0-4.h0-2.bak", "l00-4.h0-2"])
async def test_a_marker_that_fits_no_model_is_ignored(name: str) -> None:
    url = new_url()
    kv = await write(url, tp(2))
    async with open_rank(url) as store:
        await store.objects.put(f"{NAMESPACE.hex}/shards/{name}", b"?")
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


@pytest.mark.parametrize(
    "server",
    ["moto", pytest.param("minio", marks=pytest.mark.server), pytest.param("versitygw", marks=pytest.mark.server)],
)
async def test_partitions_are_read_across_on_a_server(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: LocalServer = request.getfixturevalue(server)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/shards-{secrets.token_hex(8)}"
    kv = await write(url, tp(2), chunks=range(2))
    await write(url, pp(2), kv, chunks=range(2, 4))
    for reader in (FULL, tp(2)[1], pp(2)[1]):
        async with open_rank(url, reader) as rank:
            assert same_bits(await rank.load(await rank.lookup(TOKENS)), part_of(kv, reader)[:, :, :WHOLE])
            assert (await rank.save(TOKENS, part_of(kv, reader))).chunks_new == 0


# What is lost, and mended


async def test_a_damaged_part_loses_the_chunk_and_the_next_save_of_the_whole_mends_it() -> None:
    url = new_url()
    kv = await write(url, tp(2))
    async with open_rank(url) as store:
        hit = await store.lookup(TOKENS)
        broken = hit.chunks[2].tiles[1]
        await damage(store, broken.object_key, flip_last_section)
        assert (await store.load(hit)).shape[2] == 2 * CHUNK
        assert (await store.lookup(TOKENS)).tokens == 2 * CHUNK
        saved = await store.save(TOKENS, kv)
        assert (saved.chunks_new, saved.chunks_present) == (1, 3)
        assert await store.objects.head(broken.object_key) is None, "what nobody can use is gone"
    for reader in (FULL, *tp(2), *pp(2)):
        async with open_rank(url, reader) as rank:
            assert same_bits(await rank.load(await rank.lookup(TOKENS)), part_of(kv, reader)[:, :, :WHOLE])


async def test_ranks_mend_a_whole_that_one_of_them_found_damaged() -> None:
    url = new_url()
    kv = await write(url, tp(1))
    async with open_rank(url) as scheduler, open_rank(url, tp(2)[0]) as one, open_rank(url, tp(2)[1]) as other:
        places = [chunk.place() for chunk in (await scheduler.lookup(TOKENS)).chunks]
        last = (await scheduler.lookup(TOKENS)).chunks[3]
        await damage(one, last.object_key, flip_last_section)
        assert (await one.load(one.hit_of(places))).shape[2] == 3 * CHUNK
        for _ in range(2):  # the other may save before the damaged object is gone
            for rank in (other, one):
                await rank.save(TOKENS, part_of(kv, rank.shard))
    async with open_rank(url) as store:
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :WHOLE])


@pytest.mark.parametrize("rank_of", [0, 1])
async def test_a_part_that_vanishes_ends_the_load_before_it(rank_of: int) -> None:
    url = new_url()
    kv = await write(url, tp(2))
    async with open_rank(url, layer_group=1, range_bytes=64 * 1024) as store:
        hit = await store.lookup(TOKENS)
        await store.objects.delete(hit.chunks[1].tiles[rank_of].object_key)
        assert same_bits(await store.load(hit), kv[:, :, :CHUNK])
        assert (await store.lookup(TOKENS)).tokens == CHUNK
        assert (await store.save(TOKENS, kv)).chunks_new == 1
        assert (await store.lookup(TOKENS)).tokens == WHOLE
        assert store._loader.slabs.leased == 0


async def test_a_swapped_part_is_damage(caplog: pytest.LogCaptureFixture) -> None:
    url = new_url()
    await write(url, tp(2))
    async with open_rank(url) as store:
        hit = await store.lookup(TOKENS)
        one, other = hit.chunks[0].tiles
        data = bytearray(one.table.object_length)
        await store.objects.get_range(one.object_key, 0, memoryview(data))
        info = await store.objects.head(one.object_key)
        assert info is not None
        await store.objects.put(other.object_key, data, metadata=info.metadata, replace=True)
        assert (await store.load(hit)).shape[2] == 0
        assert "object of shard" in caplog.text


async def test_a_part_whose_header_is_damaged_is_left_aside(caplog: pytest.LogCaptureFixture) -> None:
    url = new_url()
    kv = await write(url, tp(2), profile="balanced")

    def flip(data: bytearray) -> None:
        data[60] ^= 1

    async with open_rank(url, profile="balanced") as store:
        await damage(store, (await store.lookup(TOKENS)).chunks[0].tiles[1].object_key, flip)
    async with open_rank(url, profile="balanced") as store:
        assert not await store.lookup(TOKENS, thorough=True)
        assert "is left aside" in caplog.text
        assert (await store.save(TOKENS, kv)).chunks_new == 1
        assert (await store.lookup(TOKENS, thorough=True)).tokens == WHOLE


# What is written


async def test_each_rank_marks_its_rectangle_before_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    url, kv = new_url(), draw_kv()
    for shard in tp(2):
        async with open_rank(url, shard) as rank:
            written, put = [], rank.objects.put

            async def noted(key: str, *rest: object, written: list[str] = written, put=put, **named: object) -> bool:
                written.append(key)
                return await put(key, *rest, **named)

            monkeypatch.setattr(rank.objects, "put", noted)
            for _ in range(2):
                await rank.save(TOKENS, part_of(kv, shard))
            marker = marker_key(NAMESPACE.hex, shard)
            assert written[:2] == [f"{NAMESPACE.hex}/namespace.json", marker]
            assert written.count(marker) == 1
            assert len(written) == 2 + 4


async def test_ranks_write_nothing_where_others_have_written_all_of_it() -> None:
    url = new_url()
    kv = await write(url, pp(2))
    for reader in (FULL, *tp(2), *tp(4), Shard(1, 3, 1, 2)):
        async with open_rank(url, reader) as rank:
            saved = await rank.save(TOKENS, part_of(kv, reader))
            assert (saved.chunks_new, saved.chunks_present, saved.bytes) == (0, 4, 0)


# What becomes of markers


async def test_a_marker_that_was_removed_comes_back_with_the_next_save_also_where_all_is_stored() -> None:
    url = new_url()
    shard = tp(2)[0]
    await write(url, tp(2))
    marker = marker_key(NAMESPACE.hex, shard)
    async with open_rank(url, shard) as store:
        await store.objects.delete(marker)
        saved = await store.save(TOKENS, part_of(draw_kv(), shard))
        assert saved.chunks_new == 0
        assert await store.objects.head(marker) is not None
    async with open_rank(url, FULL) as store:
        assert (await store.lookup(TOKENS)).tokens == WHOLE


async def test_an_engines_own_shards_are_found_before_any_marker_is_listed() -> None:
    url = new_url()
    async with open_rank(url, FULL) as reader:
        reader.expect_shards(tp(2))
        assert not await reader.lookup(TOKENS), "the markers are listed now, and there are none"
        await write(url, tp(2))
        assert (await reader.lookup(TOKENS)).tokens == WHOLE


async def test_a_listing_that_is_refused_for_a_while_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_url()
    await write(url, tp(2))
    async with open_rank(url, FULL, verdict_lifetime_s=0.05) as reader:
        listed = reader.objects.list

        def refuse(prefix: str = "") -> AsyncIterator[ObjectInfo]:
            raise StoreRefusedError("no list permission")

        monkeypatch.setattr(reader.objects, "list", refuse)
        assert not await reader.lookup(TOKENS)
        monkeypatch.setattr(reader.objects, "list", listed)
        await asyncio.sleep(0.1)
        assert (await reader.lookup(TOKENS)).tokens == WHOLE
