"""A prompt is followed while it is stored: every chunk once and in order, few questions, and an end in any case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.bitstream import Identity
from kvstore_s3.connectors.vllm.following import LOOK_CHUNKS, MOST_LOOK_CHUNKS, Follower, patience_s
from kvstore_s3.errors import InvalidArgumentError, StoreUnavailableError
from kvstore_s3.hashing import chunk_keys, root_key
from kvstore_s3.hits import Hit
from kvstore_s3.layout import Shard
from kvstore_s3.load import StoredChunk
from kvstore_s3.planner import PrefillSpeed
from kvstore_s3.section_index import SectionTable

SIZE = 16
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=SIZE)


def prompt_keys(chunks: int) -> list[bytes]:
    return list(chunk_keys(root_key(NAMESPACE.digest, None), list(range(chunks * SIZE)), SIZE))


class Shelf:
    """Keys with the time from which each is stored, and a clock that only sleeping moves. Counts what it is asked."""

    def __init__(self, keys: Sequence[bytes], times: Sequence[float]) -> None:
        self.stored_at = dict(zip(keys, times, strict=False))
        self.now = 0.0
        self.heads = 0
        self.asked_at: list[float] = []
        self.asked: list[int] = []

    async def lookup_keys(self, keys: Sequence[bytes], *, first_token: int) -> Hit:
        self.heads += len(keys)
        self.asked_at.append(self.now)
        self.asked.append(len(keys))
        there = [self.stored_at.get(key, float("inf")) <= self.now for key in keys]
        count = there.index(False) if False in there else len(there)
        chunks = tuple(found_chunk(key, first_token + i * SIZE) for i, key in enumerate(keys[:count]))
        return Hit(chunks, SIZE, ("lossless",) * count)

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        await asyncio.sleep(0)

    def follower(self, spread: float = 0.5, **settings: float) -> Follower:
        return Follower(self, clock=lambda: self.now, sleep=self.sleep, spread=lambda: spread, **settings)


def found_chunk(key: bytes, first_token: int) -> StoredChunk:
    identity = Identity(NAMESPACE.digest, key, LAYOUT.full_shard, LAYOUT, SIZE)
    return StoredChunk(key.hex(), identity, SectionTable(1, (), 0), None, first_token)


async def collect(follower: Follower, keys: Sequence[bytes], stall_s: float = 2.0, **settings: object) -> list[Hit]:
    return [hit async for hit in follower.follow(keys, chunk_tokens=SIZE, stall_s=stall_s, **settings)]


def positions(hits: Sequence[Hit]) -> list[int]:
    return [chunk.first_token for hit in hits for chunk in hit.chunks]


async def test_chunks_that_are_there_come_in_one_hit():
    keys = prompt_keys(5)
    shelf = Shelf(keys, [0.0] * 5)
    hits = await collect(shelf.follower(), keys)
    assert [len(hit.chunks) for hit in hits] == [5]
    assert [chunk.identity.key for chunk in hits[0].chunks] == keys
    assert (shelf.heads, shelf.now) == (5, 0.0)


async def test_chunks_come_once_and_in_order_as_they_are_stored():
    keys = prompt_keys(6)
    shelf = Shelf(keys, [0.0, 0.2, 0.2, 0.5, 1.4, 1.4])
    hits = await collect(shelf.follower(), keys)
    assert positions(hits) == [i * SIZE for i in range(6)]
    assert [chunk.identity.key for hit in hits for chunk in hit.chunks] == keys


async def test_a_chunk_is_met_within_the_longest_pause_of_its_arrival():
    keys = prompt_keys(1)
    shelf = Shelf(keys, [1.0])
    await collect(shelf.follower(spread=1.0), keys)
    assert 1.0 <= shelf.now <= 1.0 + 0.05 * 1.25


async def test_a_chunk_that_is_late_does_not_let_those_behind_it_pass():
    keys = prompt_keys(3)
    shelf = Shelf(keys, [0.0, 1.0, 0.0])
    hits = await collect(shelf.follower(), keys)
    assert positions(hits) == [0, SIZE, 2 * SIZE]


async def test_only_the_next_chunk_is_asked_for_while_nothing_comes():
    keys = prompt_keys(100)
    shelf = Shelf(keys, [0.0, *[5.0] * 99])
    hits = await collect(shelf.follower(), keys, stall_s=1.0)
    assert positions(hits) == [0]
    assert shelf.asked[:3] == [LOOK_CHUNKS, LOOK_CHUNKS, 1]
    assert set(shelf.asked[2:]) == {1}


async def test_a_second_of_waiting_costs_some_twenty_heads():
    keys = prompt_keys(10)
    shelf = Shelf(keys, [])
    assert await collect(shelf.follower(), keys, stall_s=10.0) == []
    assert 190 <= shelf.heads <= 230


async def test_a_long_prompt_that_is_there_takes_few_rounds():
    keys = prompt_keys(512)
    shelf = Shelf(keys, [0.0] * 512)
    hits = await collect(shelf.follower(), keys)
    assert positions(hits) == [i * SIZE for i in range(512)]
    assert len(shelf.asked) <= 7
    assert max(shelf.asked) <= MOST_LOOK_CHUNKS


async def test_it_ends_when_nothing_new_comes_for_the_stall():
    keys = prompt_keys(4)
    shelf = Shelf(keys, [0.0, 0.3])
    hits = await collect(shelf.follower(), keys, stall_s=0.5)
    assert positions(hits) == [0, SIZE]
    assert 0.8 <= shelf.now <= 0.8 + 2 * 0.05 * 1.25


async def test_nothing_at_all_is_an_end_and_no_error():
    keys = prompt_keys(2)
    shelf = Shelf(keys, [])
    assert await collect(shelf.follower(), keys, stall_s=0.25) == []
    assert shelf.now == pytest.approx(0.25)


async def test_no_keys_ask_nobody():
    shelf = Shelf([], [])
    assert await collect(shelf.follower(), []) == []
    assert shelf.heads == 0


async def test_positions_count_from_the_first_token():
    keys = prompt_keys(6)
    shelf = Shelf(keys, [0.0] * 6)
    hits = await collect(shelf.follower(), keys[4:], first_token=4 * SIZE)
    assert positions(hits) == [4 * SIZE, 5 * SIZE]


async def test_time_that_the_caller_takes_is_no_stall():
    keys = prompt_keys(3)
    shelf = Shelf(keys, [0.0, 10.0, 10.2])
    met = []
    async for hit in shelf.follower().follow(keys, chunk_tokens=SIZE, stall_s=0.5):
        met.append(hit)
        shelf.now += 9.8  # the load of a chunk takes its time
    assert positions(met) == [0, SIZE, 2 * SIZE]


async def test_one_waits_as_long_as_computing_the_rest_would_take():
    keys = prompt_keys(4)
    speed = PrefillSpeed(0.1)  # 6.4 s for all four chunks, 4.8 s for the last three
    shelf = Shelf(keys, [6.0])
    hits = await collect(shelf.follower(), keys, stall_s=0.5, speed=speed)
    assert positions(hits) == [0]
    assert 6.0 + 4.8 <= shelf.now <= 6.0 + 4.8 + 0.2


def test_patience_is_the_time_that_computing_takes_and_never_less_than_the_stall():
    assert patience_s(2.0, None, 0, 10_000) == 2.0
    assert patience_s(2.0, PrefillSpeed(0.001), 0, 10_000) == 10.0
    assert patience_s(2.0, PrefillSpeed(0.001), 9_000, 10_000) == 2.0


async def test_many_followers_together_ask_no_oftener_than_agreed():
    keys = prompt_keys(1)
    shelf = Shelf(keys, [])
    follower = Follower(shelf, asks_per_s=100.0)  # by the real clock: here all wait at once
    tasks = [asyncio.create_task(collect(follower, keys, stall_s=1.0)) for _ in range(200)]
    await asyncio.gather(*tasks)
    assert shelf.heads <= 200 + 1.5 * 100 + 200, "one each at the beginning, 100 a second, one each at the end"


async def test_a_follower_that_has_ended_makes_room_for_the_others():
    keys = prompt_keys(2)
    shelf = Shelf(keys, [0.0])
    follower = shelf.follower(asks_per_s=10.0)
    crowd = [follower.follow(keys, chunk_tokens=SIZE, stall_s=1.0) for _ in range(50)]
    for one in crowd:
        await anext(one)
        await one.aclose()
    await collect(follower, keys, stall_s=1.0)
    gaps = [later - earlier for earlier, later in zip(shelf.asked_at, shelf.asked_at[1:], strict=False)]
    assert max(gaps) <= 0.1 * 1.25


async def test_a_cancelled_follower_asks_no_more():
    keys = prompt_keys(2)
    asked = asyncio.Event()

    class Empty:
        calls = 0

        async def lookup_keys(self, keys: Sequence[bytes], *, first_token: int) -> Hit:
            self.calls += 1
            asked.set()
            return Hit((), SIZE)

    empty = Empty()
    task = asyncio.create_task(collect(Follower(empty), keys, stall_s=60.0))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    calls = empty.calls
    await asyncio.sleep(0.06)
    assert empty.calls == calls


async def test_a_store_that_fails_is_an_error_and_what_came_before_stays():
    keys = prompt_keys(20)

    class Failing(Shelf):
        async def lookup_keys(self, keys: Sequence[bytes], *, first_token: int) -> Hit:
            if self.asked:
                raise StoreUnavailableError("connection refused")
            return await super().lookup_keys(keys, first_token=first_token)

    shelf = Failing(keys, [0.0] * 20)
    hits = shelf.follower().follow(keys, chunk_tokens=SIZE, stall_s=1.0)
    assert positions([await anext(hits)]) == [i * SIZE for i in range(LOOK_CHUNKS)]
    with pytest.raises(StoreUnavailableError):
        await anext(hits)


def test_a_rate_that_allows_nothing_is_refused():
    with pytest.raises(InvalidArgumentError, match="asks_per_s"):
        Follower(Shelf([], []), asks_per_s=0.0)


# The real store.


@asynccontextmanager
async def two_stores(name: str) -> AsyncIterator[tuple[KVStore, KVStore]]:
    """One that writes and one that reads, over the same objects, each with its own memory of them."""
    url = f"memory://{name}"
    async with KVStore.open(url, NAMESPACE, Settings()) as writer, KVStore.open(url, NAMESPACE, Settings()) as reader:
        yield writer, reader


async def test_another_engine_s_chunks_are_loaded_while_later_ones_still_come():
    tokens = list(range(5 * SIZE))
    kv = torch.randn(2, 2, len(tokens), 2, 16).to(torch.bfloat16)
    async with two_stores("following") as (writer, reader):
        await writer.save(tokens[:SIZE], kv[:, :, :SIZE])
        follow = Follower(reader).follow(prompt_keys(5), chunk_tokens=SIZE, stall_s=20.0)
        pieces: list[torch.Tensor] = []
        saves: list[asyncio.Task[object]] = []
        async with aclosing(follow) as hits:
            async for hit in hits:
                pieces.append(await reader.load(hit))
                end = sum(piece.shape[2] for piece in pieces) + SIZE
                if end <= len(tokens):  # the next chunk is stored only after this one was met
                    later = asyncio.sleep(0.02, (end, len(saves)))
                    saves.append(asyncio.create_task(save_after(later, writer, tokens, kv)))
        await asyncio.gather(*saves)
    assert [piece.shape[2] for piece in pieces] == [SIZE] * 5
    assert torch.equal(torch.cat(pieces, dim=2), kv)


async def save_after(later: object, writer: KVStore, tokens: list[int], kv: torch.Tensor) -> None:
    end, _ = await later  # type: ignore[misc]
    await writer.save(tokens[:end], kv[:, :, end - SIZE : end], first_token=end - SIZE)


async def test_chunks_that_two_ranks_write_are_followed_by_an_engine_of_one():
    tokens = list(range(3 * SIZE))
    kv = torch.randn(2, 2, len(tokens), 2, 16).to(torch.bfloat16)
    ranks = [Shard(0, 2, head, head + 1) for head in (0, 1)]
    url = "memory://following-ranks"
    async with AsyncExitStack() as stack:
        stores = [KVStore.open(url, NAMESPACE, Settings(), shard=shard) for shard in ranks]
        writers = [await stack.enter_async_context(store) for store in stores]
        reader = await stack.enter_async_context(KVStore.open(url, NAMESPACE, Settings()))
        for writer, head in zip(writers, (0, 1), strict=True):
            await writer.save(tokens[:SIZE], kv[:, :, :SIZE, head : head + 1])
        pieces: list[torch.Tensor] = []
        follow = Follower(reader).follow(prompt_keys(3), chunk_tokens=SIZE, stall_s=20.0)
        async with aclosing(follow) as hits:
            async for hit in hits:
                pieces.append(await reader.load(hit))
                begin = sum(piece.shape[2] for piece in pieces)
                for writer, head in zip(writers, (0, 1), strict=True):
                    values = kv[:, :, begin : begin + SIZE, head : head + 1]
                    await writer.save(tokens[: begin + SIZE], values, first_token=begin)
    assert torch.equal(torch.cat(pieces, dim=2), kv)
