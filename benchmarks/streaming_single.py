"""One load on a link of its own: what each policy does, and what one would do that knows the link's future."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from streaming_links import HISTORY_S, Link

from kvstore_s3.planner import ChunkCost, Plan, PrefillSpeed, Replanner, late_after, plan
from kvstore_s3.transfer.bandwidth import Bandwidth

CHUNK_TOKENS = 256
GROUPS = 8
IN_FLIGHT = 8
LATENCY_S = 0.02
SPEED = PrefillSpeed(1e-4, 3.3e-9)
"""An 8B model on one data-centre GPU: 10,000 tokens/s at the start of a prompt, half of it after 30,000 tokens."""

VALUES = CHUNK_TOKENS * 2 * 32 * 8 * 128
LOSSLESS_BITS = (10.4,)
LEVEL_BITS = (1.0, 2.0, 3.5)
"""Bits a value up to each level: assumed for a model of this size, see docs/planner.md."""


@dataclass(frozen=True, slots=True)
class Job:
    """A hit at the start of a prompt: bytes [chunks, levels], and the seconds that are allowed (None: no deadline)."""

    sizes: tuple[tuple[int, ...], ...]
    prompt_tokens: int
    deadline_s: float | None

    @property
    def chunks(self) -> int:
        return len(self.sizes)

    @property
    def levels(self) -> int:
        return len(self.sizes[0])

    def prefill(self, keep: int) -> float:
        return SPEED.seconds(keep * CHUNK_TOKENS, self.prompt_tokens)

    def left(self, groups_read: Sequence[int]) -> list[ChunkCost]:
        """Costs of the chunks of which these numbers of layer groups were read."""
        return [
            ChunkCost(tuple(size * (GROUPS - done) // GROUPS for size in sizes))
            for sizes, done in zip(self.sizes, groups_read, strict=True)
        ]

    def terms(self) -> dict[str, Any]:
        return {
            "prefill": SPEED,
            "chunk_tokens": CHUNK_TOKENS,
            "first_token": 0,
            "prompt_tokens": self.prompt_tokens,
            "deadline_s": self.deadline_s,
            "lowest_levels": 1,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """Time to first token, and levels of the chunks of the hit; a recomputed one counts as of the highest level."""

    ttft_s: float
    levels: tuple[int, ...]

    def meets(self, job: Job) -> bool:
        return job.deadline_s is None or self.ttft_s <= job.deadline_s


def make_job(generator: np.random.Generator, bits: Sequence[float], *, deadline: bool) -> Job:
    """A hit of 8 to 64 chunks before 64 to 1,024 tokens of its own.

    With `deadline`, the hit may add a quarter of the time that it saves, which is what a load is allowed to cost.
    """
    chunks = int(np.exp(generator.uniform(np.log(8), np.log(64))))
    prompt = chunks * CHUNK_TOKENS + int(generator.integers(64, 1024))
    scales = generator.uniform(0.9, 1.1, chunks)
    sizes = tuple(tuple(int(VALUES * bit / 8 * scale) for bit in bits) for scale in scales)
    job = Job(sizes, prompt, None)
    own = job.prefill(chunks)
    return replace(job, deadline_s=own + 0.25 * (job.prefill(0) - own)) if deadline else job


class Stream:
    """Reads a planned load, `IN_FLIGHT` chunks at a time, and asks `follower` at each boundary of layer groups.

    Group by group as an engine computes, or with `by_chunk` all groups of some chunks before the next chunks. With
    `watch`, it asks too when reads are late (`planner.late_after`).
    """

    def __init__(
        self,
        link: Link,
        job: Job,
        first: Plan,
        meter: Bandwidth,
        follower: Replanner | None,
        *,
        watch: bool,
        by_chunk: bool,
    ) -> None:
        self._link, self._job, self._plan, self._meter = link, job, first, meter
        self._follower, self._watch, self._by_chunk = follower, watch, by_chunk
        self._read = [0] * job.chunks
        self._now = LATENCY_S if first.keep else 0.0

    def run(self) -> Outcome:
        begins = range(0, self._plan.keep, IN_FLIGHT)
        if self._by_chunk:
            for begin in begins:
                for group in range(GROUPS):
                    self._read_batch(group, begin)
                    self._revise(self._meter.bytes_per_s)
        else:
            for group in range(GROUPS):
                for begin in begins:
                    self._read_batch(group, begin)
                self._revise(self._meter.bytes_per_s)
        recomputed = (self._job.levels,) * (self._job.chunks - self._plan.keep)
        return Outcome(self._now + self._job.prefill(self._plan.keep), self._plan.levels + recomputed)

    def _read_batch(self, group: int, begin: int) -> None:
        batch = range(begin, min(begin + IN_FLIGHT, self._plan.keep))
        if not batch:
            return
        sizes = [self._job.sizes[n][self._plan.levels[n] - 1] // GROUPS for n in batch]
        start, end = self._now, self._link.finish(self._now, sum(sizes))
        late = late_after(sum(sizes), self._meter.bytes_per_s)
        while self._watch and start + late < end:
            self._now = start + late
            self._revise(sum(sizes) / late)
            if self._plan.keep <= batch.start:
                return  # all of the batch was given up
            late *= 2
        self._now = end
        for number, size in zip(batch, sizes, strict=True):
            self._meter.observe(size, start, end, len(sizes))
            self._read[number] = group + 1

    def _revise(self, rate: float | None) -> None:
        if self._follower is not None:
            self._plan = self._follower.revise(self._job.left(self._read), bandwidth=rate, elapsed_s=self._now)


def measure_before(link: Link) -> Bandwidth:
    """An estimator that saw another load end shortly before this one."""
    meter = Bandwidth()
    moment, size = -HISTORY_S / 2, 4_000_000
    while (end := link.finish(moment, size * IN_FLIGHT)) < -0.2:
        for _ in range(IN_FLIGHT):
            meter.observe(size, moment, end, IN_FLIGHT)
        moment = end
    return meter


def _planned(link: Link, job: Job, *, replan: bool, watch: bool = False, by_chunk: bool = False) -> Outcome:
    meter = measure_before(link)
    first = plan(
        job.left([0] * job.chunks),
        bandwidth=meter.bytes_per_s,
        highest_levels=job.levels,
        latency_s=LATENCY_S,
        **job.terms(),
    )
    follower = Replanner(first, **job.terms()) if replan else None
    return Stream(link, job, first, meter, follower, watch=watch, by_chunk=by_chunk).run()


def _fixed(levels: int) -> Callable[[Link, Job], Outcome]:
    def load_all(link: Link, job: Job) -> Outcome:
        end = link.finish(LATENCY_S, sum(sizes[levels - 1] for sizes in job.sizes))
        return Outcome(end + job.prefill(job.chunks), (levels,) * job.chunks)

    return load_all


def _recompute(link: Link, job: Job) -> Outcome:
    return Outcome(job.prefill(0), (job.levels,) * job.chunks)


def _optimum(link: Link, job: Job) -> Outcome:
    """By search over all stops and levels: the best level that meets the deadline, else the fastest of all.

    Exact for loads of one level for all chunks: whatever was read, some prefix of the hit is what counts in the end,
    and reading nothing else brings it soonest.
    """
    best: list[Outcome] = []
    for levels in range(1, job.levels + 1):
        ends = np.cumsum([0, *(sizes[levels - 1] for sizes in job.sizes)])
        times = [job.prefill(0)]
        times += [link.finish(LATENCY_S, ends[keep]) + job.prefill(keep) for keep in range(1, job.chunks + 1)]
        keep = int(np.argmin(times))
        best.append(Outcome(times[keep], (levels,) * keep + (job.levels,) * (job.chunks - keep)))
    meeting = [outcome for outcome in best if outcome.meets(job)]
    if job.deadline_s is None:
        return best[-1]
    return meeting[-1] if meeting else min(best, key=lambda outcome: outcome.ttft_s)


def policies(levels: int) -> Mapping[str, Callable[[Link, Job], Outcome]]:
    """Every policy by its name; the optimum comes last."""
    fixed = {f"all at level {level}": _fixed(level) for level in range(1, levels + 1)}
    return {
        **(fixed if levels > 1 else {"load all": _fixed(1)}),
        "recompute all": _recompute,
        "planned once": lambda link, job: _planned(link, job, replan=False),
        "replanned at groups": lambda link, job: _planned(link, job, replan=True),
        "replanned, watched": lambda link, job: _planned(link, job, replan=True, watch=True),
        "watched, chunk by chunk": lambda link, job: _planned(link, job, replan=True, watch=True, by_chunk=True),
        "offline optimum": _optimum,
    }
