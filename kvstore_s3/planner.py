"""How much of a hit to load, and at how many levels: what brings the first token soonest. Pure.

A hit is loaded from its start; what is not loaded, the engine recomputes after the load. So time to first token is

    latency + bytes of the kept chunks / rate + prefill of all tokens behind them

and the planner keeps as many chunks as make it smallest: all on a fast link, none on one slower than the engine. Where
objects have levels and a deadline is set, it reads the highest that meet the deadline, as the streaming adaptation of
CacheGen does (Liu et al., SIGCOMM 2024). `Replanner` repeats the question while the stream runs.
docs/planner.md gives the reasoning and what it costs against an optimum that knows the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvstore_s3.errors import InvalidArgumentError

HEADROOM = 0.9
"""Share of the deadline that is planned with: an estimate that is right on average is late half of the time."""

TOLERANCE = 0.05
"""Where no level meets the deadline, quality is not given up for less than this share of the time."""

SURE_GAIN = 0.25
"""A change of a running plan that saves this share of the time left is made at once ..."""

LIKELY_GAIN = 0.08
"""... and one that saves this share ..."""

LASTING_S = 0.1
"""... when it was found again and again for so many seconds. Less may be noise."""

LATE_TIMES = 2.0
"""Reads that take this many times as long as the bandwidth promises are late ..."""

LATE_S = 0.1
"""... but not before this many seconds: shorter stalls pass by themselves more often than not."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """What the engine takes to compute a token: `seconds_per_token`, and more for each position before it.

    The token at position p takes `seconds_per_token + p * seconds_per_token_position` (attention grows with p).
    """

    seconds_per_token: float
    seconds_per_token_position: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.seconds_per_token < np.inf and 0 <= self.seconds_per_token_position < np.inf):
            raise InvalidArgumentError(f"prefill takes a time that is finite and not negative, not {self}")

    def seconds(self, begin: int, end: int) -> float:
        """Seconds to compute the tokens at positions `begin` to `end`."""
        tokens = max(end - begin, 0)
        return tokens * (self.seconds_per_token + self.seconds_per_token_position * (begin + end) / 2)


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """Bytes of one chunk that are still to be read, up to and with each of its levels: never falling, base first.

    An object without levels has one entry.
    """

    bytes_by_level: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = self.bytes_by_level
        if not sizes or sizes[0] < 0 or any(upper < lower for lower, upper in pairwise(sizes)):
            raise InvalidArgumentError(f"bytes of a chunk are cumulative over one or more levels, not {sizes}")

    def bytes(self, levels: int) -> int:
        """Bytes to read for `levels` levels; a chunk that has fewer gives what it has."""
        return self.bytes_by_level[min(levels, len(self.bytes_by_level)) - 1]


@dataclass(frozen=True, slots=True)
class Plan:
    """Load the first `keep` chunks, chunk i at `levels[i]` levels; the engine recomputes what follows.

    `ttft_s` is the expected time from the planning to the first token; None where the bandwidth is not known.
    """

    levels: tuple[int, ...]
    keep: int
    ttft_s: float | None


def plan(
    chunks: Sequence[ChunkCost],
    *,
    bandwidth: float | None,
    prefill: PrefillSpeed | None,
    chunk_tokens: int,
    first_token: int,
    prompt_tokens: int,
    deadline_s: float | None,
    lowest_levels: int,
    highest_levels: int,
    latency_s: float = 0.0,
    decode_bytes_per_s: float | None = None,
) -> Plan:
    """The plan that brings the first token soonest at the best quality that `deadline_s` allows.

    `chunks` are those of the hit in order, the first beginning at position `first_token` of the `prompt_tokens` of the
    prompt. `bandwidth` is in bytes/s (None: not known, everything is loaded), `latency_s` passes before the first byte,
    and decoding, which runs beside the reading, handles `decode_bytes_per_s` of encoded bytes.

    Without a deadline (seconds to the first token) everything is read at `highest_levels`, and the question is only
    where to stop. With one, the worst chunk's level is as high as meets it, down to `lowest_levels`; time that is left
    raises chunks by one level from the first on, as the last are the ones that a later plan may cut. Where nothing
    meets it, the fastest is taken. `prefill` None: recomputing has no known price, and all is loaded. By its own
    estimate a plan is never slower than recomputing everything.

    Raises `InvalidArgumentError` for levels that make no range.
    """
    if not 1 <= lowest_levels <= highest_levels:
        raise InvalidArgumentError(f"levels go from 1 up, not from {lowest_levels} to {highest_levels}")
    if bandwidth is None:
        levels = tuple(min(highest_levels, len(chunk.bytes_by_level)) for chunk in chunks)
        return Plan(levels, len(chunks), None)
    rate = max(min(bandwidth, decode_bytes_per_s or bandwidth), 1.0)
    sizes = _sizes(chunks, lowest_levels, highest_levels)
    if prefill is None:
        recompute = np.where(np.arange(len(chunks) + 1) == len(chunks), 0.0, np.inf)
    else:
        recompute = _recompute_seconds(prefill, len(chunks), chunk_tokens, first_token, prompt_tokens)
    times = _times(sizes, recompute, rate, latency_s)
    limit = None if deadline_s is None else deadline_s * HEADROOM
    row, keep = _choose(times, limit)
    seconds = float(times[row, keep])
    raised = 0
    if limit is not None and seconds <= limit and row + 1 < len(sizes):
        steps = np.cumsum(sizes[row + 1, :keep] - sizes[row, :keep])
        raised = int(np.searchsorted(steps, (limit - seconds) * rate, side="right"))
        seconds += float(steps[raised - 1]) / rate if raised else 0.0
    level = lowest_levels + row
    levels = tuple(
        min(level + (number < raised), len(chunk.bytes_by_level)) for number, chunk in enumerate(chunks[:keep])
    )
    return Plan(levels, keep, seconds)


def late_after(size: int, bandwidth: float | None) -> float:
    """Seconds after which reads of `size` bytes in all that are under way together are late.

    A link that hangs finishes nothing that an estimate could be made of. So when reads are late, and again whenever
    that time has doubled, ask `Replanner.revise` with the most that the bandwidth can be: `size` over the time passed.
    """
    return max(LATE_TIMES * size / bandwidth if bandwidth else 0.0, LATE_S)


class Replanner:
    """Follows one load: what was planned is given up where the link turned out slower than was thought.

    It only ever cuts: chunks from the end where that brings the first token sooner, and levels of what is unread where
    the deadline would be missed. A chunk is as good as the worst of its layer groups, so a level that an earlier group
    went without is of no use to a later one. Small gains must last, so that noise in the estimate cuts nothing.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        prefill: PrefillSpeed | None,
        chunk_tokens: int,
        first_token: int,
        prompt_tokens: int,
        deadline_s: float | None,
        lowest_levels: int,
        decode_bytes_per_s: float | None = None,
    ) -> None:
        self.plan = plan
        self._prefill = prefill
        self._chunk_tokens = chunk_tokens
        self._first_token = first_token
        self._prompt_tokens = prompt_tokens
        self._deadline_s = deadline_s
        self._lowest_levels = lowest_levels
        self._decode_bytes_per_s = decode_bytes_per_s
        self._gain_since: float | None = None

    def revise(
        self, left: Sequence[ChunkCost], *, bandwidth: float | None, elapsed_s: float, latency_s: float = 0.0
    ) -> Plan:
        """The plan for what is unread, to be asked at each boundary of layer groups, or when a group is late.

        `left[i]` has the unread bytes of chunk i; where it has fewer than are kept, the load ended there, as by damage.
        `elapsed_s` passed since the load began. `ttft_s` of the answer counts from now.
        """
        kept = left[: self.plan.keep]
        self.plan = replace(self.plan, levels=self.plan.levels[: len(kept)], keep=len(kept))
        if bandwidth is None or not kept:
            return self.plan
        going_on = self._seconds_as_planned(kept, bandwidth, latency_s)
        left_s = None if self._deadline_s is None else self._deadline_s - elapsed_s
        deadline_s = left_s if left_s is not None and going_on > left_s else None  # levels are kept while in time
        better = self._plan_anew(kept, bandwidth, deadline_s, latency_s)
        gain = 0.0 if better.ttft_s is None else (going_on - better.ttft_s) / max(going_on, 1e-9)
        if self._is_worth_it(gain, elapsed_s):
            self._gain_since = None
            self.plan = better
        else:
            self.plan = replace(self.plan, ttft_s=going_on)
        return self.plan

    def _is_worth_it(self, gain: float, now: float) -> bool:
        if gain < LIKELY_GAIN:
            self._gain_since = None
        elif self._gain_since is None:
            self._gain_since = now
        return gain >= SURE_GAIN or (self._gain_since is not None and now - self._gain_since >= LASTING_S)

    def _seconds_as_planned(self, kept: Sequence[ChunkCost], bandwidth: float, latency_s: float) -> float:
        total = sum(chunk.bytes(levels) for chunk, levels in zip(kept, self.plan.levels, strict=True))
        rate = max(min(bandwidth, self._decode_bytes_per_s or bandwidth), 1.0)
        begin = self._first_token + len(kept) * self._chunk_tokens
        rest = 0.0 if self._prefill is None else self._prefill.seconds(begin, self._prompt_tokens)
        return (latency_s if total else 0.0) + total / rate + rest

    def _plan_anew(
        self, kept: Sequence[ChunkCost], bandwidth: float, deadline_s: float | None, latency_s: float
    ) -> Plan:
        within = [
            ChunkCost(chunk.bytes_by_level[:levels]) for chunk, levels in zip(kept, self.plan.levels, strict=True)
        ]
        highest = max(self.plan.levels)
        return plan(
            within,
            bandwidth=bandwidth,
            prefill=self._prefill,
            chunk_tokens=self._chunk_tokens,
            first_token=self._first_token,
            prompt_tokens=self._prompt_tokens,
            deadline_s=deadline_s,
            lowest_levels=min(self._lowest_levels, highest),
            highest_levels=highest,
            latency_s=latency_s,
            decode_bytes_per_s=self._decode_bytes_per_s,
        )


def _sizes(chunks: Sequence[ChunkCost], lowest: int, highest: int) -> Floats:
    """Bytes [levels from `lowest` to `highest`, chunks]."""
    rows = [[chunk.bytes(levels) for chunk in chunks] for levels in range(lowest, highest + 1)]
    return np.array(rows, dtype=np.float64).reshape(highest - lowest + 1, len(chunks))


def _recompute_seconds(prefill: PrefillSpeed, chunks: int, chunk_tokens: int, first: int, prompt: int) -> Floats:
    """Seconds of prefill after 0, 1, ... `chunks` loaded chunks."""
    begin = np.minimum(first + np.arange(chunks + 1, dtype=np.float64) * chunk_tokens, prompt)
    each = prefill.seconds_per_token + prefill.seconds_per_token_position * (begin + prompt) / 2
    seconds: Floats = (prompt - begin) * each
    return seconds


def _times(sizes: Floats, recompute: Floats, rate: float, latency_s: float) -> Floats:
    """Seconds to the first token [levels, chunks kept: 0 to all]."""
    read = np.zeros((len(sizes), len(recompute)))
    np.cumsum(sizes, axis=1, out=read[:, 1:])
    times: Floats = read / rate + np.where(read > 0, latency_s, 0.0) + recompute
    return times


def _choose(times: Floats, limit: float | None) -> tuple[int, int]:
    """Row of the highest level that is good enough, and how many chunks of it are best: of equals, the most."""
    keeps = times.shape[1] - 1 - np.argmin(times[:, ::-1], axis=1)
    best = times[np.arange(len(times)), keeps]
    highest = len(times) - 1
    if limit is None:
        return highest, int(keeps[highest])
    enough = limit if best.min() <= limit else best.min() * (1 + TOLERANCE)
    row = int(np.flatnonzero(best <= enough)[-1])
    return row, int(keeps[row])
