"""Random work on two tiers that share a directory: whatever is read is right, and nothing is left over."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tier.disk import check_nothing_leaked, content, filled, open_below, read

from kvstore_s3.metrics import Counters
from kvstore_s3.tier import nvme
from kvstore_s3.tier.base import PAGE
from kvstore_s3.tier.nvme import NvmeTier

BUDGET = 40 * PAGE


@pytest.mark.parametrize("seed", range(4))
async def test_random_work_reads_only_what_was_offered_and_leaks_nothing(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme, "_NEWS_S", 0.0)
    chance = random.Random(seed)
    counters = Counters()
    tiers = [NvmeTier(tmp_path, BUDGET, 2, counters.add) for _ in range(2)]
    for tier in tiers:
        await tier.start()
    workers = [asyncio.create_task(work(random.Random(chance.random()), tiers)) for _ in range(6)]
    await asyncio.gather(*workers)
    for tier in tiers:
        await tier.close()
    check_nothing_leaked(tmp_path, BUDGET)
    assert open_below(tmp_path) == []
    counts = counters.snapshot()
    assert counts["nvme_hit_bytes"] > 0
    assert counts["tier_evictions"] > 0
    assert counts.get("nvme_errors", 0) == 0


async def work(chance: random.Random, tiers: list[NvmeTier]) -> None:
    for _ in range(60):
        tier, key = chance.choice(tiers), f"k{chance.randrange(12)}"
        end = 3 * PAGE + 100 * chance.randrange(2)
        act = chance.random()
        if act < 0.5:
            await offer(chance, tier, key, end)
        elif act < 0.9:
            start = chance.randrange(end)
            task = asyncio.create_task(read(tier, key, start, end, shift=chance.randrange(2)))
            if await cut_short(chance, task) and (found := task.result()) is not None:
                assert found == content(key, start, end)
        else:
            tier.drop(key)


async def offer(chance: random.Random, tier: NvmeTier, key: str, end: int) -> None:
    """All of a piece, a part of it, or all until it is cancelled."""
    cut = chance.randrange(1, end)
    parts = [(0, cut), (cut, end)]
    chance.shuffle(parts)
    for start, stop in parts[: chance.choice([1, 2, 2, 2])]:
        data = filled(key, start, stop, shift=chance.randrange(2))
        task = asyncio.create_task(tier.offer(key, 0, end, start, data))
        await cut_short(chance, task)
        data[:] = b"\xee" * len(data)
    if chance.random() < 0.5:
        tier.abandon(key, 0)


async def cut_short(chance: random.Random, task: asyncio.Task[bytes | None] | asyncio.Task[None]) -> bool:
    """Cancel the task now and then; whether it came to its end."""
    if chance.random() < 0.2:
        await asyncio.sleep(chance.random() * 0.002)
        task.cancel()
    await asyncio.wait([task])
    return not task.cancelled()
