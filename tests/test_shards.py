"""What one partition of a model has written, every other one reads, bit for bit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from codec.calibrations import make_calibration
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import (
    CHUNK,
    FULL,
    LAYOUT,
    NAMESPACE,
    TOKENS,
    WHOLE,
    draw_kv,
    new_url,
    open_rank,
    part_of,
    partition,
    pp,
    same_bits,
    tp,
    write,
)

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings, connect
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hashing import chunk_keys, root_key
from kvstore_s3.layout import Shard

DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]
PARTITIONS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (4, 4)]


@st.composite
def rectangles(draw: st.DrawFn) -> Shard:
    layers = sorted(draw(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)))
    heads = sorted(draw(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)))
    return Shard(*layers, *heads)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    writers=st.lists(st.sampled_from(PARTITIONS), min_size=4, max_size=4),
    groups=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    reader=rectangles(),
    range_bytes=st.sampled_from([64 * 1024, 8 * 1024 * 1024]),
)
async def test_any_rectangle_reads_what_any_partitions_wrote(
    dtype: str, writers: list[tuple[int, int]], groups: list[int], reader: Shard, range_bytes: int
) -> None:
    layout = KVLayout(4, 4, 8, dtype)
    namespace = Namespace(model="parted", revision="1", layout=layout, chunk_tokens=CHUNK)
    url, kv = new_url(), draw_kv(layout)
    for chunk, (cut, group) in enumerate(zip(writers, groups, strict=True)):
        begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
        for shard in partition(layout, *cut):
            async with open_rank(url, shard, namespace, layer_group=group) as rank:
                await rank.save(TOKENS[:end], part_of(kv, shard)[:, :, begin:end], first_token=begin)
    wanted = part_of(kv, reader)[:, :, :WHOLE]
    async with (
        open_rank(url, reader, namespace, range_bytes=range_bytes) as rank,
        open_rank(url, None, namespace) as all,
    ):
        found = await all.lookup(TOKENS)
        places = pickle.loads(pickle.dumps([chunk.place() for chunk in found.chunks]))
        for hit in (await rank.lookup(TOKENS), found, rank.hit_of(places)):
            assert hit.tokens == WHOLE
            assert same_bits(await rank.load(hit), wanted)
            layers = reader.layer_begin
            async for group in rank.stream(hit, first_token=CHUNK):
                assert group.layer_begin == layers
                layers = group.layer_end
                here = slice(group.layer_begin - reader.layer_begin, group.layer_end - reader.layer_begin)
                assert same_bits(group.kv, wanted[here, :, CHUNK:])
            assert layers == reader.layer_end
        again = await rank.save(TOKENS, part_of(kv, reader))
        assert (again.chunks_new, again.chunks_present) == (0, 4), "there is a cover of each chunk"


@pytest.mark.parametrize("profile", ["near-lossless", "balanced", "small", "cachegen"])
@pytest.mark.parametrize("writers", [tp(1), tp(2), tp(4), pp(2)], ids=["tp1", "tp2", "tp4", "pp2"])
async def test_lossy_values_are_those_of_each_object_whoever_reads_it(profile: str, writers: list[Shard]) -> None:
    if profile == "cachegen":
        pytest.importorskip("torchac")
    url, chunk = new_url(), 256  # shorter ones are coded exactly by CacheGen
    namespace, tokens = Namespace(model="parted", revision="1", layout=LAYOUT, chunk_tokens=chunk), range(2 * chunk)
    kv = draw_kv(tokens=len(tokens))
    expected = torch.empty_like(kv)
    for shard in writers:
        async with open_rank(url, shard, namespace, profile=profile) as rank:
            assert (await rank.save(tokens, part_of(kv, shard))).chunks_new == 2
            part_of(expected, shard)[:] = await rank.load(await rank.lookup(tokens))
    assert float((expected.float() - kv.float()).abs().max()) > 0
    for reader in (*tp(1), *tp(2), *tp(4), *pp(2), Shard(1, 3, 1, 3)):
        async with open_rank(url, reader, namespace, profile=profile) as rank:
            hit = await rank.lookup(tokens)
            assert same_bits(await rank.load(hit), part_of(expected, reader))
            assert hit.quality == profile


@pytest.mark.parametrize("span", ["head", "all", "channel"])
@pytest.mark.parametrize("writers", [tp(1), tp(2), pp(2), pp(4)], ids=["tp1", "tp2", "pp2", "pp4"])
async def test_a_calibration_codes_the_parts_that_it_can_and_the_others_do_without(
    span: str, writers: list[Shard]
) -> None:
    url = new_url()
    learned = make_calibration(
        LAYOUT, span, lambda seed: draw_kv(tokens=256, seed=seed + 10), layer_group=2, namespace=NAMESPACE.digest
    )
    async with open_rank(url, profile="balanced") as store:
        await store.calibrations.publish(learned.to_bytes())
    kv = await write(url, writers, profile="balanced")
    calibrated = writers != pp(4) and not (span == "all" and writers == tp(2))
    async with open_rank(url, profile="balanced") as store:
        hit = await store.lookup(TOKENS, thorough=True)
        assert hit.calibrated == (calibrated,) * 4
        whole = await store.load(hit)
    exact = kv[:, :, :WHOLE].float()
    assert float((whole.float() - exact).norm() / exact.norm()) < 0.25
    for reader in tp(2):
        async with open_rank(url, reader, profile="balanced") as rank:
            assert same_bits(await rank.load(await rank.lookup(TOKENS)), part_of(whole, reader))


async def test_half_of_the_layers_are_read_without_the_other_half(monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_url()
    kv = await write(url, tp(1), layer_group=1)
    for reader in pp(2):
        async with open_rank(url, reader) as rank:
            read, get_range = [], rank.objects.get_range

            async def noted(key: str, start: int, into: memoryview, *, read=read, get_range=get_range) -> None:
                read.append(len(into))
                await get_range(key, start, into)

            monkeypatch.setattr(rank.objects, "get_range", noted)
            hit = await rank.lookup(TOKENS)
            tables = [chunk.table for chunk in hit.chunks]
            monkeypatch.setattr(rank._loader._prefetcher, "_gap_bytes", 0)
            assert same_bits(await rank.load(hit), part_of(kv, reader)[:, :, :WHOLE])
            sections = [section for table in tables for section in table.sections]
            wanted = [one for one in sections if reader.layer_begin <= one.layer_begin < reader.layer_end]
            assert sum(read) == sum(one.stored_length for one in wanted) + sum(one.header_length for one in tables)


@pytest.mark.parametrize("tiers", ["host", "nvme"])
async def test_tiers_give_the_objects_of_other_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: str
) -> None:
    overrides = {"host_tier_bytes": 1 << 22} if tiers == "host" else {"nvme_tier_dir": tmp_path / "tier"}
    reader = pp(2)[1] if tiers == "host" else tp(4)[1]  # files are kept of what is read whole
    url = new_url()
    kv = await write(url, tp(2))
    async with open_rank(url, reader, **overrides) as rank:
        wanted = part_of(kv, reader)[:, :, :WHOLE]
        assert same_bits(await rank.load(await rank.lookup(TOKENS)), wanted)
        await rank._loader.settle()

        async def refuse(key: str, start: int, into: memoryview) -> None:
            raise AssertionError("a tier has it")

        monkeypatch.setattr(rank.objects, "get_range", refuse)
        assert same_bits(await rank.load(await rank.lookup(TOKENS)), wanted)


async def test_a_hit_lacks_the_rectangles_that_its_finder_did_not_look_for() -> None:
    url = new_url()
    await write(url, tp(2))
    left, right = tp(2)
    async with open_rank(url, left) as one, open_rank(url, right) as other:
        hit = await one.lookup(TOKENS)
        with pytest.raises(InvalidArgumentError, match=r"the hit has l0-4\.h0-2, not all of l0-4\.h2-4"):
            other.hit_of([chunk.place() for chunk in hit.chunks])
        with pytest.raises(InvalidArgumentError, match="look it up for that rectangle"):
            await other.load(hit)


async def test_a_place_says_no_more_than_it_must() -> None:
    url = new_url()
    await write(url, tp(2))
    async with open_rank(url) as store:
        places = [chunk.place() for chunk in (await store.lookup(TOKENS)).chunks]
    assert [place.first_token for place in places] == [0, 16, 32, 48]
    assert [[shard for shard, _ in place.tiles] for place in places] == [tp(2)] * 4
    assert len(pickle.dumps(places)) < 4 * 1000


async def test_chunks_are_saved_and_looked_up_by_their_keys() -> None:
    url, kv = new_url(), draw_kv()
    keys = chunk_keys(root_key(NAMESPACE.digest, "a"), TOKENS, CHUNK)
    async with open_rank(url) as store:
        assert (await store.save_keys(keys[:2], kv[:, :, :37])).chunks_new == 2
        assert (await store.save_keys(keys[2:], kv[:, :, 32:64], first_token=32)).chunks_new == 2
        assert (await store.lookup(TOKENS, salt="a")).tokens == WHOLE
        hit = await store.lookup_keys(keys[1:], first_token=16)
        assert (hit.tokens, [chunk.first_token for chunk in hit.chunks]) == (48, [16, 32, 48])
        assert same_bits(await store.load(hit), kv[:, :, 16:64])
        assert not await store.lookup_keys([])
        with pytest.raises(InvalidArgumentError, match="kv holds 2 whole chunks, but 4 keys were given"):
            await store.save_keys(keys, kv[:, :, :40])
        with pytest.raises(InvalidArgumentError, match="not a multiple of chunk_tokens"):
            await store.lookup_keys(keys, first_token=8)


async def test_a_rank_takes_its_own_rectangle_alone() -> None:
    url, kv = new_url(), draw_kv()
    async with open_rank(url, tp(2)[1]) as rank:
        assert rank.shard == tp(2)[1]
        with pytest.raises(InvalidArgumentError, match=r"that of rank l0-4\.h2-4 is \[4, 2, tokens, 2, 8\]"):
            await rank.save(TOKENS, kv)
    with pytest.raises(InvalidArgumentError, match=r"shard l0-4\.h2-5 lies outside the model's l0-4\.h0-4"):
        open_rank(url, Shard(0, 4, 2, 5))


def test_a_blocking_rank_has_the_same_verbs(tmp_path: Path) -> None:
    kv, keys = draw_kv(), chunk_keys(root_key(NAMESPACE.digest, None), TOKENS, CHUNK)
    with connect(tmp_path.as_uri(), NAMESPACE, Settings(), shard=tp(2)[0]) as rank:
        assert rank.save_keys(keys, part_of(kv, tp(2)[0])).chunks_new == 4
        assert same_bits(rank.load(rank.lookup_keys(keys)), part_of(kv, tp(2)[0])[:, :, :WHOLE])
        assert rank.stats() == rank.kv.stats()


async def test_gauges_tell_what_is_there(tmp_path: Path) -> None:
    url, kv = new_url(), draw_kv()
    async with open_rank(url) as store:
        assert store.stats()["slab_bytes"] == 0
        assert "link_bytes_per_s" not in store.stats()
        assert not any(name.startswith("tier") for name in store.stats())
    async with open_rank(url, host_tier_bytes=1 << 22, nvme_tier_dir=tmp_path) as store:
        await store.save(TOKENS, kv)
        await store._loader.settle()
        gauges = store.stats()
        assert gauges["tier_host_bytes"] > 0 < gauges["tier_nvme_bytes"]
        assert (gauges["tier_host_on"], gauges["tier_nvme_on"]) == (1, 1)
        assert (gauges["reads_open"], gauges["writes_open"]) == (0, 0)
        assert gauges["slab_budget_bytes"] == store.settings.buffer_bytes


def test_the_whole_model_is_what_a_store_holds_unless_told() -> None:
    assert KVStore.open(new_url(), NAMESPACE, Settings()).shard == FULL
