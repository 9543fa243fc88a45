"""A running load whose link turns out slower than was planned with."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.planner import ChunkCost, PrefillSpeed, Replanner, late_after, plan

CHUNK = 256
GROUPS = 8
LEVEL_BYTES = (10_000_000, 20_000_000, 30_000_000)
SPEED = PrefillSpeed(2e-3)  # 0.5 s a chunk


def left_after(groups: int, count: int = 4) -> list[ChunkCost]:
    return [ChunkCost(tuple(size * (GROUPS - groups) // GROUPS for size in LEVEL_BYTES))] * count


def start(bandwidth: float, deadline_s: float | None = None, prefill: PrefillSpeed | None = SPEED) -> Replanner:
    terms = {
        "prefill": prefill,
        "chunk_tokens": CHUNK,
        "first_token": 0,
        "prompt_tokens": 4 * CHUNK,
        "deadline_s": deadline_s,
        "lowest_levels": 1,
    }
    first = plan(left_after(0), bandwidth=bandwidth, highest_levels=3, **terms)
    return Replanner(first, **terms)


def test_a_link_as_fast_as_planned_changes_nothing() -> None:
    follower = start(1e8)
    before = follower.plan
    for groups in range(1, GROUPS + 1):
        now = follower.revise(left_after(groups), bandwidth=1e8, elapsed_s=1.2 * groups / GROUPS)
        assert (now.keep, now.levels) == (before.keep, before.levels)


def test_a_collapse_gives_the_tail_to_the_engine_at_once() -> None:
    follower = start(1e8)
    now = follower.revise(left_after(2), bandwidth=1e7, elapsed_s=0.3)
    assert now.keep == 0  # 9 s of reading are left, and the engine takes 2


def test_what_is_nearly_there_is_not_given_up() -> None:
    follower = start(1e8)
    assert follower.revise(left_after(7), bandwidth=1e7, elapsed_s=1.1).keep == 4  # 1.5 s are left


def test_levels_are_kept_without_a_deadline() -> None:
    follower = start(1e8)
    assert follower.revise(left_after(2), bandwidth=5e7, elapsed_s=0.3).levels == (3, 3, 3, 3)


def test_levels_fall_where_the_deadline_would_be_missed() -> None:
    follower = start(1e8, deadline_s=1.8)
    assert follower.plan.levels == (3, 3, 3, 3)
    now = follower.revise(left_after(2), bandwidth=5e7, elapsed_s=0.3)
    assert now.levels == (3, 2, 2, 2)  # 1.35 s for 60 MB and one chunk's 7.5 MB more


def test_levels_do_not_rise_again() -> None:
    follower = start(1e8, deadline_s=1.0)
    before = follower.plan.levels
    now = follower.revise(left_after(2), bandwidth=1e10, elapsed_s=0.3)
    assert now.levels == before


def test_a_small_gain_must_last() -> None:
    follower = start(1e8, deadline_s=1.4)

    def levels_at(elapsed_s: float, bandwidth: float) -> tuple[int, ...]:
        return follower.revise(left_after(2), bandwidth=bandwidth, elapsed_s=elapsed_s).levels

    assert levels_at(0.30, 0.78e8) == (3, 3, 3, 3)
    assert levels_at(0.35, 0.78e8) == (3, 3, 3, 3)
    assert levels_at(0.38, 1e8) == (3, 3, 3, 3)  # it was noise
    assert levels_at(0.42, 0.78e8) == (3, 3, 3, 3)
    assert levels_at(0.53, 0.78e8) != (3, 3, 3, 3)


def test_a_load_that_ended_early_is_planned_for_what_it_has() -> None:
    follower = start(1e8)
    now = follower.revise(left_after(2, count=3), bandwidth=1e8, elapsed_s=0.3)
    assert (now.keep, now.levels) == (3, (3, 3, 3))
    assert follower.revise([], bandwidth=1e8, elapsed_s=0.3).keep == 0


def test_an_unknown_bandwidth_changes_nothing() -> None:
    follower = start(1e8)
    before = follower.plan
    assert follower.revise(left_after(2), bandwidth=None, elapsed_s=100.0) == before
    assert before.keep == 4


def test_an_unknown_prefill_speed_cuts_no_chunk() -> None:
    follower = start(1e8, prefill=None)
    assert follower.revise(left_after(1), bandwidth=1.0, elapsed_s=0.1).keep == 4


def test_noise_in_the_estimate_cuts_nothing() -> None:
    """A link that breaks even at 60 % of its rate: a wild estimate alone must not give the load up."""
    generator = random.Random(3)
    for _ in range(200):
        follower = start(1e8)
        for groups in range(1, GROUPS):
            rate = 1e8 * generator.uniform(0.75, 1.3)
            follower.revise(left_after(groups), bandwidth=rate, elapsed_s=1.2 * groups / GROUPS)
        assert follower.plan.keep == 4


def test_reads_are_late_at_twice_their_time_but_not_before_a_tenth_of_a_second() -> None:
    assert late_after(10**8, 1e8) == 2.0
    assert late_after(10**6, 1e8) == 0.1
    assert late_after(10**8, None) == 0.1


def test_reads_that_hang_give_the_load_up() -> None:
    follower = start(1e8)
    waited = late_after(60_000_000, 1e8)
    while follower.plan.keep and waited < 60:
        follower.revise(left_after(2), bandwidth=60_000_000 / waited, elapsed_s=0.3 + waited)
        waited *= 2
    assert waited < 10


@given(st.lists(st.tuples(st.floats(1e5, 1e9), st.floats(0, 5)), max_size=GROUPS), st.floats(0.1, 5) | st.none())
def test_plans_only_shrink(seen: list[tuple[float, float]], deadline: float | None) -> None:
    follower = start(1e8, deadline_s=deadline)
    for groups, (bandwidth, elapsed) in enumerate(seen, 1):
        before = follower.plan
        now = follower.revise(left_after(groups), bandwidth=bandwidth, elapsed_s=elapsed)
        assert now.keep <= before.keep
        assert len(now.levels) == now.keep
        assert all(level <= earlier for level, earlier in zip(now.levels, before.levels, strict=False))
