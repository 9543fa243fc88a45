"""Lookups, integrity and many streams through KVStore and the byte server, in a process of its own on one core.

python benchmarks/io_store.py lookup|integrity|streams URL [ROUNDS]      JSON on stdout
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from io_servers import BUCKET, Endpoint, choose_cores

from kvstore_s3 import Hit, KVLayout, KVStore, Namespace
from kvstore_s3.arena import Arena
from kvstore_s3.bitstream import Header
from kvstore_s3.config import Settings

MiB = 1024 * 1024
CHUNK = 256
SMALL = KVLayout(layers=2, kv_heads=1, head_dim=16, dtype="bfloat16")
LARGE = KVLayout(layers=16, kv_heads=4, head_dim=64, dtype="bfloat16")
STREAMS = 64
STREAM_BUDGET = 64 * MiB


def run_alone(task: str, endpoint: Endpoint, rounds: int) -> dict[str, Any]:
    """Run a task in a process of its own and return what it found."""
    command = [sys.executable, str(Path(__file__)), task, endpoint.url, str(rounds)]
    environment = {**os.environ, **endpoint.environment()}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def open_kv(url: str, layout: KVLayout, **settings: Any) -> KVStore:
    """A store that remembers no verdicts: each lookup asks anew."""
    chosen = Settings.model_validate({"endpoint_url": url, "verdict_lifetime_s": 1e-6, **settings})
    return KVStore.open(f"s3://{BUCKET}/bench", Namespace(model="bench", revision="1", layout=layout), chosen)


async def measure_lookups(url: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of lookups of 64 and 512 stored chunks: ours, by aiobotocore, and one chunk after the other."""
    tokens = list(range(512 * CHUNK))
    shape = (SMALL.layers, 2, len(tokens), SMALL.kv_heads, SMALL.head_dim)
    async with open_kv(url, SMALL, upload_concurrency=128) as store:
        await store.save(tokens, torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    found: dict[str, Any] = {}
    for count in (64, 512):
        wanted = tokens[: count * CHUNK]
        ours = await _time_lookups(open_kv(url, SMALL), wanted, rounds)
        peer = await _time_lookups(open_kv(url, SMALL, data_plane="aiobotocore"), wanted, min(rounds, 3))
        single = await _time_lookups(open_kv(url, SMALL, lookup_concurrency=1), wanted, 0)
        found[f"lookup of {count} chunks"] = {
            "first_ms": ours[0],
            "ms": statistics.median(ours[1:]),
            "ms_least": min(ours[1:]),
            "ms_most": max(ours[1:]),
            "aiobotocore_ms": statistics.median(peer[1:]),
            "one_by_one_ms": single[-1],
        }
    return found


async def _time_lookups(opened: KVStore, tokens: list[int], rounds: int) -> list[float]:
    """The first one connects; it is left out where connections are to be warm."""
    taken = []
    async with opened as store:
        for _ in range(rounds + 1):
            began = time.perf_counter()
            hit = await store.lookup(tokens)
            taken.append(round((time.perf_counter() - began) * 1e3, 2))
            assert hit.tokens == len(tokens)
    return taken


def realistic_kv(tokens: int, seed: int) -> torch.Tensor:
    """Normal values, each channel with a scale and a mean of its own, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    channels = (LARGE.layers, 2, 1, LARGE.kv_heads, LARGE.head_dim)
    scale = torch.exp2(torch.rand(channels, generator=generator) * 6 - 3)
    mean = torch.randn(channels, generator=generator)
    values = torch.randn((LARGE.layers, 2, tokens, *channels[3:]), generator=generator)
    return ((values + mean) * scale).bfloat16()


async def measure_integrity(url: str, rounds: int) -> dict[str, Any]:
    """A load with checks and without, in turn: CPU and wall time, and the time in `Header.verify` itself."""
    tokens = list(range(8 * CHUNK))
    async with open_kv(url, LARGE) as store:
        await store.save(tokens, realistic_kv(len(tokens), 0))
        hit = await store.lookup(tokens)
        pairs = []
        for number in range(rounds + 1):
            checked = await _cost(lambda: store.load(hit))
            with unchecked():
                trusted = await _cost(lambda: store.load(hit))
            if number:
                pairs.append((checked, trusted))
        with timed_checks() as spent:
            timed = [await _cost(lambda: store.load(hit)) for _ in pairs]
    extra_cpu = statistics.median(checked[0] / trusted[0] - 1 for checked, trusted in pairs)
    extra = statistics.median(checked[1] / trusted[1] - 1 for checked, trusted in pairs)
    return {
        "integrity": {
            "loaded_bytes": hit.tokens * LARGE.bytes_per_token,
            "cpu_ms": _median_ms([checked[0] for checked, _ in pairs]),
            "cpu_ms_unchecked": _median_ms([trusted[0] for _, trusted in pairs]),
            "ms": _median_ms([checked[1] for checked, _ in pairs]),
            "ms_unchecked": _median_ms([trusted[1] for _, trusted in pairs]),
            "paired_share": round(extra, 4),
            "paired_cpu_share": round(extra_cpu, 4),
            "checks_cpu_ms": round(spent[0] * 1e3 / len(timed), 3),
            "share": round(spent[0] / sum(cpu for cpu, _ in timed), 4),
            "share_of_wall": round(spent[0] / sum(wall for _, wall in timed), 4),
        }
    }


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 2)


@contextmanager
def replaced_check(check: Callable[[Header, int, memoryview], memoryview]) -> Iterator[None]:
    kept = Header.verify
    Header.verify = check  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Header.verify = kept  # type: ignore[method-assign]


@contextmanager
def unchecked() -> Iterator[None]:
    """Loads believe what they read."""

    def believe(header: Header, number: int, stored: memoryview) -> memoryview:
        return memoryview(stored)[: header.table.sections[number].length]

    with replaced_check(believe):
        yield


@contextmanager
def timed_checks() -> Iterator[list[float]]:
    """CPU seconds that the checks took, of all threads together."""
    spent, verify = [0.0], Header.verify

    def check(header: Header, number: int, stored: memoryview) -> memoryview:
        began = time.thread_time()
        try:
            return verify(header, number, stored)
        finally:
            spent[0] += time.thread_time() - began

    with replaced_check(check):
        yield spent


async def measure_streams(url: str, rounds: int) -> dict[str, Any]:
    """CPU per GB of 64 loads one after the other and at once, and the most slab bytes that were leased."""
    documents = [list(range(index, index + 2 * CHUNK)) for index in range(STREAMS)]
    kv = [realistic_kv(2 * CHUNK, seed) for seed in range(4)]
    async with open_kv(url, LARGE, buffer_bytes=STREAM_BUDGET) as store:
        for index, tokens in enumerate(documents):
            await store.save(tokens, kv[index % 4])
        hits = [await store.lookup(tokens) for tokens in documents]
        gigabytes = sum(hit.tokens for hit in hits) * LARGE.bytes_per_token / 1e9
        with watched_arenas() as most:
            pairs = [
                (await _cost(lambda: _load_in_turn(store, hits)), await _cost(lambda: _load_at_once(store, hits)))
                for _ in range(rounds + 1)
            ]
    alone, together = zip(*pairs[1:], strict=True)
    alone_cost, cost = (statistics.median(cpu for cpu, _ in taken) / gigabytes for taken in (alone, together))
    return {
        "64 streams at once": {
            "gigabytes": round(gigabytes, 3),
            "cpu_s_per_gb": round(cost, 4),
            "cpu_s_per_gb_of_one": round(alone_cost, 4),
            "ratio": round(cost / alone_cost, 3),
            "mb_s": round(gigabytes * 1e3 / statistics.median(wall for _, wall in together)),
            "mb_s_of_one": round(gigabytes * 1e3 / statistics.median(wall for _, wall in alone)),
            "most_slab_bytes": most[0],
            "slab_budget": STREAM_BUDGET,
        }
    }


async def _load_in_turn(store: KVStore, hits: list[Hit]) -> None:
    for hit in hits:
        await _load(store, hit)


async def _load_at_once(store: KVStore, hits: list[Hit]) -> None:
    await asyncio.gather(*(_load(store, hit) for hit in hits))


async def _load(store: KVStore, hit: Hit) -> None:
    """As an engine does: each layer group is taken over and let go. Results kept would be measured as page faults."""
    async for group in store.stream(hit):
        assert group.tokens == hit.tokens


@contextmanager
def watched_arenas() -> Iterator[list[int]]:
    """The most bytes that were ever leased from one arena."""
    most, allocate = [0], Arena.allocate

    def watch(arena: Arena, size: int) -> memoryview | None:
        block = allocate(arena, size)
        most[0] = max(most[0], arena.used)
        return block

    Arena.allocate = watch  # type: ignore[method-assign]
    try:
        yield most
    finally:
        Arena.allocate = allocate  # type: ignore[method-assign]


async def _cost(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """CPU and wall seconds of this process."""
    before, began = _cpu_s(), time.perf_counter()
    await work()
    return _cpu_s() - before, time.perf_counter() - began


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


TASKS = {"lookup": measure_lookups, "integrity": measure_integrity, "streams": measure_streams}


if __name__ == "__main__":
    os.sched_setaffinity(0, {choose_cores()[0]})
    torch.set_num_threads(1)
    print(json.dumps(asyncio.run(TASKS[sys.argv[1]](sys.argv[2], int(sys.argv[3])))))
