"""Loads that share one link: equal shares, first come first served, least left first, and by urgency.

The engine either waits for a whole load before it computes ("whole"), or computes layer group by layer group while the
next is read ("layers"). What counts is the time that loading adds to that of the computing.

"Planned" rows let each load stop early and the engine recompute the rest, which counts as added time: planned as if the
link were its own, or with the bytes that go before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kvstore_s3.planner import ChunkCost, PrefillSpeed, plan
from kvstore_s3.transfer.link import bytes_ahead, urgency

GROUPS = 8
LINK = 1e9
READ_BYTES = 8 * 2**20
CHUNK_TOKENS = 256
CHUNK_BYTES = 22_000_000
"""A chunk of an 8B model, lossless."""

COMPUTE_S = 1e-4
"""Seconds that the engine takes for a token."""

UTILISATIONS = (0.5, 0.7, 0.9)


@dataclass(slots=True)
class Load:
    """One hit: `group_bytes` in each of `GROUPS` groups, each followed by `compute_s` of the engine.

    `recompute_s` is what the engine spends on chunks that were not loaded.
    """

    arrived_at: float
    group_bytes: float
    compute_s: float
    recompute_s: float = 0.0
    group: int = 0
    group_left: float = field(init=False)
    engine_free_at: float = field(init=False)
    """When the engine has computed all groups that were read."""

    def __post_init__(self) -> None:
        self.group_left, self.engine_free_at = self.group_bytes, self.arrived_at

    @property
    def left(self) -> float:
        """Bytes to read."""
        return self.group_left + (GROUPS - 1 - self.group) * self.group_bytes if self.group < GROUPS else 0.0

    @property
    def added_s(self) -> float:
        """What loading added, after the last group."""
        return self.engine_free_at - self.arrived_at - GROUPS * self.compute_s + self.recompute_s

    def keep_only(self, share: float, recompute_s: float) -> None:
        """Load the first part of the hit alone; none of it, and the load is over."""
        self.group_bytes *= share
        self.group_left, self.recompute_s = self.group_bytes, recompute_s
        if not share:
            self.group, self.engine_free_at = GROUPS, self.arrived_at + GROUPS * self.compute_s

    def read(self, size: float, now: float) -> None:
        """`size` bytes of the present group have arrived."""
        self.group_left -= size
        if self.group_left < 1.0:
            self.group += 1
            self.group_left = self.group_bytes
            self.engine_free_at = max(self.engine_free_at, now) + self.compute_s


Order = Callable[[Load], float]
Admit = Callable[[Load, list[Load]], None]
"""Plans a load that arrives while others wait."""


def by_urgency(load: Load) -> float:
    needed_at = load.arrived_at + load.group * load.compute_s
    return urgency(needed_at=needed_at, remaining_bytes=int(load.left), bandwidth=LINK)


ORDERS: dict[str, Order] = {
    "first come first served": lambda load: load.arrived_at,
    "least left first": lambda load: load.left,
    "urgency": by_urgency,
}


def take_whole(load: Load, waiting: list[Load]) -> None:
    """Loads everything, whatever it takes."""


def plan_alone(load: Load, waiting: list[Load]) -> None:
    _plan(load, 0.0)


def plan_with_queue(load: Load, waiting: list[Load]) -> None:
    ahead = bytes_ahead(by_urgency(load), ((by_urgency(other), int(other.left)) for other in waiting))
    _plan(load, ahead / LINK)


def _plan(load: Load, wait_s: float) -> None:
    chunks = round(load.left / CHUNK_BYTES)
    speed = PrefillSpeed(COMPUTE_S)
    found = plan(
        [ChunkCost((CHUNK_BYTES,))] * chunks,
        bandwidth=LINK,
        prefill=speed,
        chunk_tokens=CHUNK_TOKENS,
        first_token=0,
        prompt_tokens=chunks * CHUNK_TOKENS,
        deadline_s=None,
        lowest_levels=1,
        highest_levels=1,
        latency_s=wait_s,
    )
    load.keep_only(found.keep / chunks, speed.seconds(found.keep * CHUNK_TOKENS, chunks * CHUNK_TOKENS))


def make_loads(count: int, utilisation: float, *, layers: bool, seed: int) -> list[Load]:
    """Poisson arrivals that use that share of the link: hits of 8 to 64 chunks, 256 to 8,192 tokens of their own."""
    generator = np.random.default_rng([seed, int(utilisation * 100), layers])
    sizes = np.exp(generator.uniform(np.log(8), np.log(64), count)).round() * CHUNK_BYTES
    tokens = np.exp(generator.uniform(np.log(256), np.log(8192), count))
    gaps = generator.exponential(sizes.mean() / LINK / utilisation, count)
    return [
        Load(float(arrival), float(size) / GROUPS, float(own) * COMPUTE_S / GROUPS if layers else 0.0)
        for arrival, size, own in zip(np.cumsum(gaps), sizes, tokens, strict=True)
    ]


def serve_in_order(loads: list[Load], order: Order, admit: Admit = take_whole) -> None:
    """One read after the other, each of the load that comes first in `order`."""
    waiting: list[Load] = []
    arrivals = iter(loads)
    coming = next(arrivals, None)
    now = 0.0
    while waiting or coming:
        if not waiting and coming:
            now = max(now, coming.arrived_at)
        while coming and coming.arrived_at <= now:
            admit(coming, waiting)
            if coming.group < GROUPS:
                waiting.append(coming)
            coming = next(arrivals, None)
        if not waiting:
            continue
        load = min(waiting, key=order)
        size = min(READ_BYTES, load.group_left)
        now += size / LINK
        load.read(size, now)
        if load.group == GROUPS:
            waiting.remove(load)


def share_equally(loads: list[Load]) -> None:
    """All loads that have something to read get the same part of the link."""
    active: list[Load] = []
    arrivals = iter(loads)
    coming = next(arrivals, None)
    now = 0.0
    while active or coming:
        share = LINK / max(len(active), 1)
        ends = now + min(load.group_left for load in active) / share if active else float("inf")
        until = min(ends, coming.arrived_at) if coming else ends
        for load in active:
            load.read((until - now) * share, until)
        now = until
        active = [load for load in active if load.group < GROUPS]
        while coming and coming.arrived_at <= now:
            active.append(coming)
            coming = next(arrivals, None)


def compare_sharing(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Added time of `count` loads for each kind of engine, use of the link, and order."""
    rows = []
    for engine in ("whole", "layers"):
        for utilisation in UTILISATIONS:
            equal = _added(count, utilisation, engine, seed, share_equally)
            rows.append(_row(engine, utilisation, "equal shares", equal, equal))
            for name, serve in _services(engine).items():
                rows.append(_row(engine, utilisation, name, _added(count, utilisation, engine, seed, serve), equal))
    return rows


def _services(engine: str) -> dict[str, Callable[[list[Load]], None]]:
    services = {name: partial(serve_in_order, order=order) for name, order in ORDERS.items()}
    if engine == "whole":  # where layers are computed beside the load, what is recomputed would not come after it
        services["urgency, planned alone"] = partial(serve_in_order, order=by_urgency, admit=plan_alone)
        services["urgency, planned in queue"] = partial(serve_in_order, order=by_urgency, admit=plan_with_queue)
    return services


def _added(
    count: int, utilisation: float, engine: str, seed: int, serve: Callable[[list[Load]], None]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    loads = make_loads(count, utilisation, layers=engine == "layers", seed=seed)
    serve(loads)
    return np.array([load.added_s for load in loads])


def _row(engine: str, utilisation: float, order: str, added: Any, equal: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "utilisation": utilisation,
        "order": order,
        "mean_s": round(float(added.mean()), 4),
        "p95_s": round(float(np.percentile(added, 95)), 4),
        "worst_s": round(float(added.max()), 4),
        "gain_over_equal_shares": round(float(equal.mean() / added.mean()), 3),
    }
