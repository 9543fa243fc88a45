"""KVStore over real files: what goes in comes out bit for bit, and nothing damaged ever does."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.bitstream import HINT_NAME, encode_hint
from kvstore_s3.errors import InvalidArgumentError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.load import in_thread

LAYOUT = KVLayout(layers=6, kv_heads=2, head_dim=16, dtype="bfloat16")
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=16)
TOKENS = list(range(100, 170))  # four whole chunks and six tokens
SMALL_RANGES = Settings(layer_group=2, range_bytes=64 * 1024)


def random_kv(tokens: int = 70, layout: KVLayout = LAYOUT, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.layers, 2, tokens, layout.kv_heads, layout.head_dim, generator=generator)
    return values.to(getattr(torch, layout.dtype))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[one.element_size()]
    return one.shape == other.shape and bool((one.contiguous().view(bits) == other.contiguous().view(bits)).all())


def open_at(path: Path, **overrides: object) -> KVStore:
    return KVStore.open(path.as_uri(), NAMESPACE, Settings(layer_group=2, **overrides))


def objects_in(path: Path) -> list[Path]:
    """Object files in the order of the prompt's chunks."""
    from kvstore_s3.hashing import chunk_keys, root_key

    keys = chunk_keys(root_key(NAMESPACE.digest, None), TOKENS, NAMESPACE.chunk_tokens)
    return [path / NAMESPACE.hex / key.hex() / LAYOUT.full_shard.name for key in keys]


async def fill(path: Path) -> torch.Tensor:
    kv = random_kv()
    async with open_at(path) as store:
        saved = await store.save(TOKENS, kv)
    assert (saved.chunks_new, saved.chunks_present) == (4, 0)
    assert saved.bytes == sum(file.stat().st_size for file in objects_in(path))
    return kv


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"])
async def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    layout = KVLayout(layers=3, kv_heads=2, head_dim=8, dtype=dtype)
    namespace = Namespace(model="tiny", revision="1", layout=layout, chunk_tokens=16)
    kv = random_kv(40, layout)
    async with KVStore.open(tmp_path.as_uri(), namespace) as store:
        await store.save(TOKENS[:40], kv)
        hit = await store.lookup(TOKENS)
        assert hit.tokens == 32
        assert same_bits(await store.load(hit), kv[:, :, :32])


async def test_a_second_save_writes_nothing(tmp_path: Path) -> None:
    kv = await fill(tmp_path)
    async with open_at(tmp_path) as store:
        saved = await store.save(TOKENS, kv)
    assert (saved.chunks_new, saved.chunks_present, saved.bytes) == (0, 4, 0)


async def test_a_growing_prompt_saves_only_its_new_chunks(tmp_path: Path) -> None:
    kv = await fill(tmp_path)
    longer = [*TOKENS[:64], *range(900, 932)]
    more = random_kv(32, seed=1)
    async with open_at(tmp_path) as store:
        saved = await store.save(longer, more, first_token=64)
        assert (saved.chunks_new, saved.chunks_present) == (2, 0)
        loaded = await store.load(await store.lookup(longer))
    assert same_bits(loaded, torch.cat([kv[:, :, :64], more], dim=2))


async def test_lookup_ends_at_the_first_hole(tmp_path: Path) -> None:
    await fill(tmp_path)
    shutil.rmtree(objects_in(tmp_path)[2].parent)
    async with open_at(tmp_path) as store:
        assert (await store.lookup(TOKENS)).tokens == 32


async def test_a_prompt_shorter_than_a_chunk_is_a_miss_and_saves_nothing(tmp_path: Path) -> None:
    async with open_at(tmp_path) as store:
        saved = await store.save(TOKENS[:15], random_kv(15))
        assert (saved.chunks_new, saved.bytes) == (0, 0)
        hit = await store.lookup(TOKENS[:15])
        assert not hit
        assert (await store.load(hit)).shape == (6, 2, 0, 2, 16)


async def test_a_salt_separates_tenants(tmp_path: Path) -> None:
    async with open_at(tmp_path) as store:
        await store.save(TOKENS, random_kv(), salt="alice")
        assert (await store.lookup(TOKENS, salt="alice")).tokens == 64
        assert not await store.lookup(TOKENS, salt="bob")
        assert not await store.lookup(TOKENS)


async def test_streaming_gives_all_layers_in_order_from_any_chunk(tmp_path: Path) -> None:
    layout = KVLayout(layers=6, kv_heads=4, head_dim=64, dtype="bfloat16")
    namespace = Namespace(model="wide", revision="1", layout=layout, chunk_tokens=64)
    tokens = list(range(256))
    kv = random_kv(256, layout)
    async with KVStore.open(tmp_path.as_uri(), namespace, SMALL_RANGES) as store:
        await store.save(tokens, kv)
        groups = [group async for group in store.stream(await store.lookup(tokens), first_token=64)]
    assert [(group.layer_begin, group.layer_end) for group in groups] == [(0, 2), (2, 4), (4, 6)]
    assert same_bits(torch.cat([group.kv for group in groups]), kv[:, :, 64:])


async def test_no_byte_is_read_twice_in_a_stream_of_several_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = KVLayout(layers=6, kv_heads=4, head_dim=64, dtype="bfloat16")
    namespace = Namespace(model="wide", revision="1", layout=layout, chunk_tokens=64)
    async with KVStore.open(tmp_path.as_uri(), namespace, SMALL_RANGES) as store:
        saved = await store.save(list(range(128)), random_kv(128, layout))
        hit = await store.lookup(list(range(128)))
        read, real = [], store.objects.get_range

        async def counted(key: str, start: int, into: memoryview) -> None:
            read.append(len(into))
            await real(key, start, into)

        monkeypatch.setattr(store.objects, "get_range", counted)
        assert [group.tokens async for group in store.stream(hit)] == [128, 128, 128]
    assert (len(read), sum(read)) == (6, saved.bytes)


async def test_objects_of_different_layer_groups_load_together(tmp_path: Path) -> None:
    kv = random_kv()
    for tokens, layer_group in ((32, 2), (64, 3)):
        async with KVStore.open(tmp_path.as_uri(), NAMESPACE, Settings(layer_group=layer_group)) as store:
            await store.save(TOKENS[:tokens], kv[:, :, :tokens])
    async with open_at(tmp_path) as store:
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :64])


async def test_a_store_without_metadata_serves_from_the_header(tmp_path: Path) -> None:
    kv = await fill(tmp_path)
    for file in objects_in(tmp_path):
        file.write_bytes(_take_away(file))
    async with open_at(tmp_path) as store:
        hit = await store.lookup(TOKENS)
        assert all(chunk.header for chunk in hit.chunks)
        assert same_bits(await store.load(hit), kv[:, :, :64])


async def test_a_wrong_hint_is_never_believed(tmp_path: Path) -> None:
    kv = await fill(tmp_path)
    async with open_at(tmp_path) as store:
        first, second = (f"{NAMESPACE.hex}/{file.parent.name}/{file.name}" for file in objects_in(tmp_path)[:2])
        for key, hint in ((first, "nonsense"), (second, "AQAAAAA=")):
            data = (tmp_path / key).read_bytes()
            await store.objects.put(key, data, metadata={HINT_NAME: hint}, replace=True)
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :64])


DAMAGE = {
    "truncated": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "extended": lambda data: data + b"\0",
    "a flipped bit in the header": lambda data: _flip(data, 20),
    "a flipped bit in the index": lambda data: _flip(data, 150),
    "a flipped bit in a section": lambda data: _flip(data, len(data) // 2),
    "a flipped bit at the end": lambda data: _flip(data, len(data) - 1),
}


@pytest.mark.parametrize("keep_hint", [True, False], ids=["with hint", "without hint"])
@pytest.mark.parametrize("kind", DAMAGE)
async def test_damage_ends_the_hit_before_it_and_a_save_mends_it(tmp_path: Path, kind: str, keep_hint: bool) -> None:
    kv = await fill(tmp_path)
    file = objects_in(tmp_path)[2]
    damaged = DAMAGE[kind](file.read_bytes())
    if keep_hint:
        with file.open("r+b") as target:  # in place: the extended attribute stays
            target.truncate(len(damaged))
            target.write(damaged)
    else:
        file.unlink()
        file.write_bytes(damaged)
    async with open_at(tmp_path) as store:
        loaded = await store.load(await store.lookup(TOKENS))
        assert same_bits(loaded, kv[:, :, :32])
        assert (await store.lookup(TOKENS)).tokens == 32, "a chunk that failed is offered again at once"
        saved = await store.save(TOKENS, kv)
        assert (saved.chunks_new, saved.chunks_present) == (1, 3)
        assert (await store.lookup(TOKENS)).tokens == 64, "a mended chunk is offered again at once"
    async with open_at(tmp_path) as store:
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :64])


async def test_swapped_objects_are_refused(tmp_path: Path) -> None:
    kv = await fill(tmp_path)
    one, other = objects_in(tmp_path)[1:3]
    aside = tmp_path / "aside"
    one.rename(aside), other.rename(one), aside.rename(other)
    async with open_at(tmp_path) as store:
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :16])


async def test_an_object_of_another_namespace_under_our_name_is_refused(tmp_path: Path) -> None:
    await fill(tmp_path)
    other = Namespace(model="tiny", revision="2", layout=LAYOUT, chunk_tokens=16)
    from kvstore_s3.hashing import chunk_keys, root_key

    theirs = chunk_keys(root_key(other.digest, None), TOKENS, 16)[0]
    target = tmp_path / other.hex / theirs.hex() / LAYOUT.full_shard.name
    target.parent.mkdir(parents=True)
    shutil.copy2(objects_in(tmp_path)[0], target)
    async with KVStore.open(tmp_path.as_uri(), other) as store:
        assert (await store.load(await store.lookup(TOKENS))).shape[2] == 0


async def test_an_object_that_vanishes_after_the_lookup_ends_the_hit(tmp_path: Path) -> None:
    kv = await fill(tmp_path)
    async with open_at(tmp_path) as store:
        hit = await store.lookup(TOKENS)
        objects_in(tmp_path)[3].unlink()
        assert same_bits(await store.load(hit), kv[:, :, :48])


async def test_damage_in_a_late_layer_shrinks_the_stream(tmp_path: Path) -> None:
    layout = KVLayout(layers=4, kv_heads=4, head_dim=64, dtype="bfloat16")
    namespace = Namespace(model="wide", revision="1", layout=layout, chunk_tokens=64)
    kv = random_kv(128, layout)
    async with KVStore.open(tmp_path.as_uri(), namespace, SMALL_RANGES) as store:
        await store.save(list(range(128)), kv)
        hit = await store.lookup(list(range(128)))
        second = tmp_path / hit.chunks[1].object_key
        second.write_bytes(_flip(second.read_bytes(), second.stat().st_size - 40))
        groups = [group async for group in store.stream(hit)]
    assert groups[0].tokens in (128, 64)  # the damage may be met while the first group is still on its way
    assert groups[1].tokens == 64
    assert same_bits(groups[1].kv, kv[2:4, :, :64])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 3))
def test_any_flipped_bit_ends_the_hit_before_it(tmp_path: Path, position: float, bit: int, which: int) -> None:
    root = tmp_path / "store"
    if not root.exists():
        asyncio.run(fill(root))
    file = objects_in(root)[which]
    data = file.read_bytes()
    at = int(position * len(data))
    _overwrite(file, at, data[at] ^ (1 << bit))
    try:
        assert asyncio.run(_loaded_tokens(root)) == which * 16
    finally:
        _overwrite(file, at, data[at])


async def test_two_writers_of_one_prompt_agree(tmp_path: Path) -> None:
    kv = random_kv()
    async with open_at(tmp_path) as one, open_at(tmp_path) as other:
        both = await asyncio.gather(one.save(TOKENS, kv), other.save(TOKENS, kv))
        assert sum(saved.chunks_new for saved in both) == 4
        assert sum(saved.chunks_present for saved in both) == 4
        assert sum(saved.bytes for saved in both) == sum(file.stat().st_size for file in objects_in(tmp_path))
        assert same_bits(await one.load(await one.lookup(TOKENS)), kv[:, :, :64])


async def test_a_cancelled_load_gives_its_buffers_back(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with open_at(tmp_path, buffer_bytes=1024 * 1024) as store:
        hit = await store.lookup(TOKENS)
        for delay in (0.0, 0.0005, 0.001, 0.002):
            task = asyncio.create_task(store.load(hit))
            await asyncio.wait([task], timeout=delay)
            task.cancel()
            await asyncio.wait([task])
            assert store._loader.slabs.leased == 0
        assert (await store.load(hit)).shape[2] == 64


async def test_an_abandoned_stream_gives_its_buffers_back(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with open_at(tmp_path, range_bytes=64 * 1024) as store:
        groups = store.stream(await store.lookup(TOKENS))
        await anext(groups)
        await groups.aclose()
        assert store._loader.slabs.leased == 0


async def test_a_refused_connection_is_an_error_at_open_and_not_a_miss() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = taken.getsockname()[1]
        closed = Settings(endpoint_url=f"http://127.0.0.1:{port}", max_attempts=1, connect_timeout_s=1)
        with pytest.raises((StoreUnavailableError, StoreRefusedError)):
            async with KVStore.open("s3://bucket/prefix", NAMESPACE, closed):
                pass
        async with KVStore.open("s3://bucket/prefix", NAMESPACE, closed, probe=False) as store:
            with pytest.raises((StoreUnavailableError, StoreRefusedError)):
                await store.lookup(TOKENS)


async def test_a_verdict_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s)
    monkeypatch.setattr("kvstore_s3.verdicts.time", clock)
    await fill(tmp_path)
    file = objects_in(tmp_path)[2]
    data = file.read_bytes()
    file.write_bytes(_flip(data, len(data) - 1))
    async with open_at(tmp_path, verdict_lifetime_s=1000) as store:
        assert (await store.load(await store.lookup(TOKENS))).shape[2] == 32
        file.write_bytes(data)  # mended by somebody else
        assert (await store.lookup(TOKENS)).tokens == 32
        ahead_s = 1000.0
        assert (await store.load(await store.lookup(TOKENS))).shape[2] == 64


async def test_a_lookup_asks_for_nothing_behind_the_first_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_at(tmp_path, lookup_concurrency=1) as store:
        asked, real = [], store.objects.head

        async def counted(key: str) -> object:
            asked.append(key)
            return await real(key)

        monkeypatch.setattr(store.objects, "head", counted)
        assert not await store.lookup(range(16 * 100))
    assert len(asked) == 1


async def test_a_store_that_cannot_be_opened_is_closed_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = KVStore.open((tmp_path / "file").as_uri(), NAMESPACE)
    with pytest.raises(StoreRefusedError):
        await store.__aenter__()
    with pytest.raises(StoreUnavailableError, match="closed"):
        await store.lookup(TOKENS)


async def test_an_abandoned_stream_leaves_no_task_behind(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with open_at(tmp_path, range_bytes=64 * 1024) as store:
        groups = store.stream(await store.lookup(TOKENS))
        before = asyncio.all_tasks()
        await anext(groups)
        await groups.aclose()
        assert asyncio.all_tasks() == before


async def test_a_plausible_wrong_hint_is_corrected_by_the_header(tmp_path: Path) -> None:
    layout = KVLayout(layers=4, kv_heads=4, head_dim=64, dtype="bfloat16")
    namespace = Namespace(model="wide", revision="1", layout=layout, chunk_tokens=64)
    kv, tokens = random_kv(128, layout), list(range(128))
    async with KVStore.open(tmp_path.as_uri(), namespace, SMALL_RANGES) as store:
        await store.save(tokens, kv)
        chunk = (await store.lookup(tokens)).chunks[1]
        first, second = chunk.table.sections
        moved = [replace(first, length=first.length - 64), replace(second, length=second.length + 64)]
        hint = encode_hint(replace(chunk.table, sections=tuple(moved)))
        data = (tmp_path / chunk.object_key).read_bytes()
        await store.objects.put(chunk.object_key, data, metadata={HINT_NAME: hint or ""}, replace=True)
    async with KVStore.open(tmp_path.as_uri(), namespace, SMALL_RANGES) as store:
        hit = await store.lookup(tokens)
        assert hit.chunks[1].table != chunk.table, "the hint was not plausible enough to be tried"
        assert same_bits(await store.load(hit), kv)


async def test_a_hit_of_another_namespace_is_refused(tmp_path: Path) -> None:
    await fill(tmp_path)
    others = [
        Namespace(model="tiny", revision="2", layout=LAYOUT, chunk_tokens=16),
        Namespace(model="tiny", revision="1", layout=replace(LAYOUT, layers=8), chunk_tokens=16),
        Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=32),
    ]
    async with open_at(tmp_path) as store:
        hit = await store.lookup(TOKENS)
    for namespace in others:
        async with KVStore.open(tmp_path.as_uri(), namespace) as store:
            with pytest.raises(InvalidArgumentError, match="another namespace"):
                await store.load(hit)
            with pytest.raises(InvalidArgumentError, match="another namespace"):
                await anext(store.stream(hit))


async def test_slabs_that_hold_less_than_an_object_are_enough(tmp_path: Path) -> None:
    layout = KVLayout(layers=8, kv_heads=8, head_dim=64, dtype="bfloat16")
    namespace = Namespace(model="tiny", revision="1", layout=layout, chunk_tokens=256)
    kv = random_kv(256, layout)
    settings = Settings(layer_group=2, buffer_bytes=1024 * 1024)
    async with KVStore.open(tmp_path.as_uri(), namespace, settings) as store:
        saved = await store.save(range(256), kv)
        assert saved.bytes > 2 * settings.buffer_bytes
        assert same_bits(await store.load(await store.lookup(range(256))), kv)


async def test_a_cancelled_call_waits_for_its_thread() -> None:
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        time.sleep(0.1)
        ended.set()
        raise OSError("nobody hears of it")

    with ThreadPoolExecutor(1) as threads:
        task = asyncio.create_task(in_thread(threads, work))
        await asyncio.to_thread(started.wait)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()


async def test_a_call_that_the_threads_never_come_to_is_an_error_of_ours() -> None:
    """As a CancelledError it would look like the caller's own, and a TaskGroup would take its work for done."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()

    threads = ThreadPoolExecutor(1)
    running = asyncio.create_task(in_thread(threads, work))
    queued = asyncio.create_task(in_thread(threads, work))
    await asyncio.to_thread(begun.wait)
    threads.shutdown(wait=False, cancel_futures=True)
    go_on.set()
    await running
    with pytest.raises(StoreUnavailableError, match="closed"):
        await queued


async def test_a_load_whose_store_is_closed_before_it_is_decoded_is_no_hit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path)
    store = open_at(tmp_path, codec_threads=1)
    hit = await store.lookup(TOKENS)
    go_on, all_wait = threading.Event(), asyncio.Event()
    threads = store._loader._threads
    threads.submit(go_on.wait)  # what is read waits for its turn
    submit = threads.submit

    def watch(*work: Any) -> Future[None]:
        future = submit(*work)
        if threads._work_queue.qsize() == len(hit.chunks):
            all_wait.set()
        return future

    monkeypatch.setattr(threads, "submit", watch)
    load = asyncio.create_task(store.load(hit))
    await asyncio.wait_for(all_wait.wait(), 10)
    await store.close()
    go_on.set()
    with pytest.raises(StoreUnavailableError, match="closed"):
        await load


async def test_a_save_into_a_store_that_is_being_closed_is_an_error_of_ours(tmp_path: Path) -> None:
    store = open_at(tmp_path)
    await store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        await store.save(TOKENS, random_kv())


@pytest.mark.parametrize(
    ("kv", "first_token", "says"),
    [
        (torch.zeros(6, 2, 70, 2, 8, dtype=torch.bfloat16), 0, "shape"),
        (torch.zeros(5, 2, 70, 2, 16, dtype=torch.bfloat16), 0, "shape"),
        (torch.zeros(6, 2, 70, 2, 16, dtype=torch.float16), 0, "float16"),
        (torch.zeros(6, 2, 71, 2, 16, dtype=torch.bfloat16), 0, "71 tokens"),
        (torch.zeros(6, 2, 16, 2, 16, dtype=torch.bfloat16), 8, "chunk_tokens"),
        (torch.zeros(6, 2, 16, 2, 16, dtype=torch.bfloat16), 64, "6 token ids"),
        (torch.zeros(6, 2, 16, 2, 16, dtype=torch.bfloat16, device="meta"), 0, "with values"),
        (torch.zeros(6, 2, 16, 2, 16, dtype=torch.bfloat16).to_sparse(), 0, "dense"),
        (None, 0, "tensor"),
    ],
)
async def test_values_that_do_not_fit_are_refused(
    tmp_path: Path, kv: torch.Tensor, first_token: int, says: str
) -> None:
    async with open_at(tmp_path) as store:
        with pytest.raises(InvalidArgumentError, match=says):
            await store.save(TOKENS, kv, first_token=first_token)


async def test_strided_values_are_saved_as_they_are(tmp_path: Path) -> None:
    kv = random_kv().permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)  # heads before tokens in memory
    async with open_at(tmp_path) as store:
        await store.save(TOKENS, kv)
        assert same_bits(await store.load(await store.lookup(TOKENS)), kv[:, :, :64])


async def test_the_namespace_is_readable_beside_the_data(tmp_path: Path) -> None:
    await fill(tmp_path)
    text = (tmp_path / NAMESPACE.hex / "namespace.json").read_text()
    assert Namespace.from_json(text) == NAMESPACE


def test_another_process_loads_what_this_one_saved(tmp_path: Path) -> None:
    kv = asyncio.run(fill(tmp_path))
    program = textwrap.dedent(f"""
        import torch
        from kvstore_s3 import KVLayout, Namespace, connect
        layout = KVLayout(layers=6, kv_heads=2, head_dim=16, dtype="bfloat16")
        namespace = Namespace(model="tiny", revision="1", layout=layout, chunk_tokens=16)
        with connect({tmp_path.as_uri()!r}, namespace) as store:
            kv = store.load(store.lookup(range(100, 170)))
        print(kv.shape[2], int(kv.view(torch.uint16).to(torch.int64).sum()))
    """)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.split() == [
        "64",
        str(int(kv[:, :, :64].contiguous().view(torch.uint16).to(torch.int64).sum())),
    ]


async def _loaded_tokens(root: Path) -> int:
    async with open_at(root) as store:
        return int((await store.load(await store.lookup(TOKENS))).shape[2])


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _overwrite(file: Path, at: int, value: int) -> None:
    with file.open("r+b") as target:
        target.seek(at)
        target.write(bytes([value]))


def _take_away(file: Path) -> bytes:
    data = file.read_bytes()
    file.unlink()
    return data
