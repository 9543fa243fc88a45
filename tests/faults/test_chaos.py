"""All faults at once, by dice: engines load and save through a bad network, and the promises hold at every moment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_proxy import Action, Exchange, Pass, Rule
from faults.actions import (
    INTERNAL_ERROR,
    NO_SUCH_KEY,
    SLOW_DOWN,
    Break,
    Delay,
    Flip,
    Hang,
    IgnoredRange,
    LoseAnswer,
    ShortRange,
    Stall,
    WrongRange,
)
from faults.scene import CHUNKS, ON_REAL_SERVERS, TOKENS, Scene, serve

from kvstore_s3 import KVStore
from kvstore_s3.errors import KVStoreError

pytestmark = [pytest.mark.usefixtures("no_leaks"), ON_REAL_SERVERS]

ANY: Sequence[Action] = (SLOW_DOWN, INTERNAL_ERROR, Hang(), Delay(0.1), Break(after=-1), LoseAnswer())
OF_READS: Sequence[Action] = (
    *ANY,
    Break(after=5_000),
    Break(after=5_000, reset=False),
    Stall(after=5_000),
    ShortRange(3_000),
    WrongRange(4),
    IgnoredRange(),
    Flip(700),
    NO_SUCH_KEY,
)


@dataclass(frozen=True, slots=True)
class Dice:
    """One of `faults`, or none, as the dice say."""

    chance: random.Random
    share: float
    faults: Sequence[Action]

    async def act(self, exchange: Exchange) -> None:
        action = self.chance.choice(self.faults) if self.chance.random() < self.share else Pass()
        await action.act(exchange)


async def work(scene: Scene, store: KVStore, rounds: int) -> int:
    """Load, and save now and then, whatever comes of it; returns the tokens that were loaded."""
    tokens = 0
    for number in range(rounds):
        tokens += (await serve(store, scene.kv)).tokens
        if number % 3 == 2:
            try:
                saved = await store.save(TOKENS, scene.kv)
                assert saved.chunks_new + saved.chunks_present == CHUNKS
            except KVStoreError:
                pass  # what the fault was; the next save completes it
    return tokens


@pytest.mark.parametrize("tiers", ["no tiers", "tiers"])
@pytest.mark.parametrize("seed", range(2))
async def test_no_mixture_of_faults_breaks_a_promise(filled: Scene, tmp_path: Path, seed: int, tiers: str) -> None:
    chance = random.Random(seed)
    local = {"nvme_tier_dir": tmp_path / "tier", "host_tier_bytes": 1024 * 1024} if tiers == "tiers" else {}
    patience = {
        "read_timeout_s": 0.3 * filled.patience,
        "breaker_pause_s": 0.05,
        "verdict_lifetime_s": 0.2,
        "breaker_failures": 20,
    }
    async with filled.open(**patience, **local) as one, filled.open(**patience) as other:
        filled.proxy.add(Rule("GetObject", Dice(chance, 0.15, OF_READS)), Rule("", Dice(chance, 0.1, ANY)))
        resets = asyncio.create_task(reset_now_and_then(filled, chance))
        engines = (work(filled, store, 6) for store in (one, one, other, other))
        tokens = await asyncio.wait_for(asyncio.gather(*engines), 180)
        resets.cancel()
        filled.proxy.clear()
        assert sum(tokens) > 0, "nothing at all came through: that is no test"
        for store in (one, other):
            await mended(filled, store)
    assert await asyncio.to_thread(filled.uploads) == []
    assert len(await asyncio.to_thread(filled.list)) == CHUNKS + 1


async def reset_now_and_then(scene: Scene, chance: random.Random) -> None:
    while True:
        await asyncio.sleep(chance.uniform(0.1, 0.5))
        await asyncio.to_thread(scene.proxy.reset_connections)


async def mended(scene: Scene, store: KVStore) -> None:
    """When the faults are over, a save completes what is missing and a load gives all of it, soon."""
    for _ in range(300):
        try:
            await store.save(TOKENS, scene.kv)
            if (await serve(store, scene.kv)).tokens == len(TOKENS):
                return
        except KVStoreError:
            pass
        await asyncio.sleep(0.1)
    raise AssertionError("the network is well again, and the store does not serve")
