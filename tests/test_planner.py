"""The plan of a load: where to stop, and at how many levels to read."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.planner import HEADROOM, TOLERANCE, ChunkCost, Plan, PrefillSpeed, plan

CHUNK = 256
LEVELS = 3


def make_plan(chunks: list[ChunkCost], **given: object) -> Plan:
    terms: dict[str, object] = {
        "bandwidth": 100e6,
        "prefill": PrefillSpeed(1e-4),
        "chunk_tokens": CHUNK,
        "first_token": 0,
        "prompt_tokens": len(chunks) * CHUNK + 100,
        "deadline_s": None,
        "lowest_levels": 1,
        "highest_levels": LEVELS,
        **given,
    }
    return plan(chunks, **terms)  # type: ignore[arg-type]


def same_chunks(count: int, *bytes_by_level: int) -> list[ChunkCost]:
    return [ChunkCost(bytes_by_level)] * count


increments = st.lists(st.integers(0, 4_000_000), min_size=1, max_size=LEVELS)
chunk_costs = st.lists(
    increments.map(lambda steps: ChunkCost(tuple(sum(steps[: n + 1]) for n in range(len(steps))))), max_size=7
)
speeds = st.builds(PrefillSpeed, st.floats(1e-6, 1e-2), st.floats(0, 1e-7))
bandwidths = st.floats(1e4, 1e10)


def test_prefill_of_later_tokens_takes_longer() -> None:
    speed = PrefillSpeed(1e-3, 1e-6)
    assert speed.seconds(0, 100) == pytest.approx(sum(1e-3 + 1e-6 * p for p in range(100)), rel=1e-3)
    assert speed.seconds(100, 200) - speed.seconds(0, 100) == pytest.approx(100 * 100 * 1e-6)
    assert speed.seconds(200, 100) == 0


def test_a_fast_link_loads_everything_at_the_highest_quality() -> None:
    found = make_plan(same_chunks(4, 100, 200, 300), bandwidth=1e9)
    assert found == Plan((3, 3, 3, 3), 4, pytest.approx(1200 / 1e9 + 100e-4))  # type: ignore[arg-type]


def test_a_link_slower_than_the_engine_recomputes_everything() -> None:
    found = make_plan(same_chunks(4, 10_000_000), bandwidth=1e6)
    assert (found.keep, found.levels) == (0, ())
    assert found.ttft_s == pytest.approx((4 * CHUNK + 100) * 1e-4)


def test_a_load_stops_where_large_chunks_begin() -> None:
    found = make_plan([*same_chunks(3, 1000), *same_chunks(3, 50_000_000)], bandwidth=1e8)
    assert found.keep == 3


def test_late_chunks_are_loaded_for_the_sake_of_later_ones() -> None:
    """A chunk that is dearer to load than to compute is loaded where cheap ones follow: they need it."""
    dear = ChunkCost((4_000_000,))  # 40 ms, against 25.6 ms of prefill
    assert make_plan([dear], bandwidth=1e8).keep == 0
    assert make_plan([dear, *same_chunks(3, 1000)], bandwidth=1e8).keep == 4


def test_attention_over_a_long_prefix_makes_the_end_worth_loading() -> None:
    chunks = same_chunks(64, 4_000_000)
    flat = make_plan(chunks, bandwidth=1e8, prefill=PrefillSpeed(1e-4))
    steep = make_plan(chunks, bandwidth=1e8, prefill=PrefillSpeed(1e-4, 1e-7))
    assert (flat.keep, steep.keep) == (0, 64)


def test_an_unknown_bandwidth_loads_everything() -> None:
    found = make_plan([ChunkCost((5, 6, 7)), ChunkCost((9,))], bandwidth=None, deadline_s=1e-9)
    assert found == Plan((3, 1), 2, None)


def test_an_unknown_prefill_speed_cuts_nothing_but_lowers_levels_for_the_deadline() -> None:
    chunks = same_chunks(4, 1_000_000, 2_000_000)
    assert make_plan(chunks, prefill=None, bandwidth=1.0).keep == 4
    found = make_plan(chunks, prefill=None, bandwidth=100e6, deadline_s=0.05)
    assert found.levels == (1, 1, 1, 1)


def test_the_latency_counts_only_where_something_is_read() -> None:
    chunks = same_chunks(1, 1000)
    assert make_plan(chunks, latency_s=0.1).keep == 0
    assert make_plan(same_chunks(1, 0), latency_s=0.1).keep == 1


def test_decoding_that_is_slower_than_the_link_is_the_rate() -> None:
    chunks = same_chunks(2, 1_000_000)
    slow = make_plan(chunks, bandwidth=1e9, decode_bytes_per_s=1e8)
    assert slow == make_plan(chunks, bandwidth=1e8)


def test_the_deadline_chooses_the_level_and_the_rest_of_the_time_raises_the_first_chunks() -> None:
    chunks = same_chunks(4, 10_000_000, 20_000_000, 30_000_000)  # 0.4, 0.8 or 1.2 s

    def levels_for(deadline_s: float) -> tuple[int, ...]:
        return make_plan(chunks, deadline_s=deadline_s, prompt_tokens=4 * CHUNK, prefill=PrefillSpeed(0.1)).levels

    assert levels_for(1.4) == (3, 3, 3, 3)
    assert levels_for(1.2) == (3, 3, 2, 2)  # within 90 % of the deadline
    assert levels_for(0.6) == (2, 1, 1, 1)
    assert levels_for(0.1) == (1, 1, 1, 1)


def test_no_quality_is_given_up_below_the_lowest_level() -> None:
    chunks = same_chunks(4, 1_000_000, 2_000_000, 3_000_000)
    assert make_plan(chunks, deadline_s=1e-6, lowest_levels=2).levels == (2, 2, 2, 2)


def test_quality_is_not_given_up_for_a_deadline_that_the_prompt_alone_misses() -> None:
    chunks = same_chunks(4, 1_000_000, 2_000_000, 3_000_000)  # 0.04 to 0.12 s before 10 s of prefill
    found = make_plan(chunks, deadline_s=1.0, prompt_tokens=4 * CHUNK + 10_000, prefill=PrefillSpeed(1e-3))
    assert found.levels == (3, 3, 3, 3)


def test_an_empty_hit_has_an_empty_plan() -> None:
    assert make_plan([]) == Plan((), 0, pytest.approx(100e-4))  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(), (-1,), (5, 4)])
def test_costs_that_are_not_cumulative_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="cumulative"):
        ChunkCost(sizes)


@pytest.mark.parametrize(("lowest", "highest"), [(0, 1), (3, 2)])
def test_levels_that_make_no_range_are_refused(lowest: int, highest: int) -> None:
    with pytest.raises(InvalidArgumentError, match="levels"):
        make_plan([], lowest_levels=lowest, highest_levels=highest)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_a_prefill_speed_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidArgumentError, match="finite"):
        PrefillSpeed(seconds)


def slow_seconds(
    chunks: list[ChunkCost], keep: int, levels: int, bandwidth: float, speed: PrefillSpeed, latency: float, prompt: int
) -> float:
    size = sum(chunk.bytes(levels) for chunk in chunks[:keep])
    return (latency if size else 0) + size / bandwidth + speed.seconds(min(keep * CHUNK, prompt), prompt)


@given(chunk_costs, bandwidths, speeds, st.floats(0, 0.1), st.integers(0, 500))
def test_without_a_deadline_no_other_stop_is_faster(
    chunks: list[ChunkCost], bandwidth: float, speed: PrefillSpeed, latency: float, rest: int
) -> None:
    prompt = len(chunks) * CHUNK + rest
    found = make_plan(chunks, bandwidth=bandwidth, prefill=speed, latency_s=latency, prompt_tokens=prompt)
    every = [slow_seconds(chunks, keep, LEVELS, bandwidth, speed, latency, prompt) for keep in range(len(chunks) + 1)]
    assert found.ttft_s == pytest.approx(min(every))
    assert found.ttft_s == pytest.approx(every[found.keep])
    assert found.levels == tuple(min(LEVELS, len(chunk.bytes_by_level)) for chunk in chunks[: found.keep])


@given(chunk_costs, bandwidths, speeds, st.floats(0, 0.1), st.floats(1e-4, 2))
def test_with_a_deadline_the_worst_level_is_the_best_that_meets_it_and_recomputing_is_never_faster(
    chunks: list[ChunkCost], bandwidth: float, speed: PrefillSpeed, latency: float, deadline: float
) -> None:
    prompt = len(chunks) * CHUNK + 10
    terms = {"bandwidth": bandwidth, "prefill": speed, "latency_s": latency, "prompt_tokens": prompt}
    found = make_plan(chunks, **terms, deadline_s=deadline)
    best = {
        levels: min(slow_seconds(chunks, k, levels, bandwidth, speed, latency, prompt) for k in range(len(chunks) + 1))
        for levels in range(1, LEVELS + 1)
    }
    limit = deadline * HEADROOM
    assert found.ttft_s is not None
    assert found.ttft_s <= speed.seconds(0, prompt) * (1 + 1e-9)
    meeting = [levels for levels, seconds in best.items() if seconds <= limit]
    if not meeting:
        assert found.ttft_s <= min(best.values()) * (1 + TOLERANCE) * (1 + 1e-9)
        return
    assert found.ttft_s <= limit * (1 + 1e-9)
    assert all(
        level >= min(max(meeting), len(chunk.bytes_by_level))
        for level, chunk in zip(found.levels, chunks, strict=False)
    )


@given(chunk_costs, bandwidths, st.floats(1, 100), speeds)
def test_a_faster_link_loads_no_fewer_chunks_and_is_no_later(
    chunks: list[ChunkCost], bandwidth: float, factor: float, speed: PrefillSpeed
) -> None:
    slower = make_plan(chunks, bandwidth=bandwidth, prefill=speed, latency_s=0.01)
    faster = make_plan(chunks, bandwidth=bandwidth * factor, prefill=speed, latency_s=0.01)
    assert slower.ttft_s is not None
    assert faster.ttft_s is not None
    assert faster.keep >= slower.keep
    assert faster.ttft_s <= slower.ttft_s * (1 + 1e-9)


@given(st.floats(1e6, 1e10), st.floats(1, 100), st.floats(0.01, 2))
def test_a_faster_link_does_not_lower_a_level_where_all_is_loaded(
    bandwidth: float, factor: float, deadline: float
) -> None:
    chunks = same_chunks(5, 1_000_000, 1_500_000, 4_000_000)
    slower = make_plan(chunks, bandwidth=bandwidth, prefill=None, deadline_s=deadline)
    faster = make_plan(chunks, bandwidth=bandwidth * factor, prefill=None, deadline_s=deadline)
    meets = slower.ttft_s is not None and slower.ttft_s <= deadline * HEADROOM
    assert not meets or all(now >= before for now, before in zip(faster.levels, slower.levels, strict=True))


@settings(max_examples=5, deadline=None)
@given(st.floats(0.1, 3.0))
def test_a_long_prompt_is_planned_in_a_millisecond(deadline: float) -> None:
    chunks = [ChunkCost((10**6 + n, 2 * 10**6 + n, 3 * 10**6 + n)) for n in range(512)]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        make_plan(chunks, bandwidth=1e9, deadline_s=deadline)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.005  # 0.3 ms on a quiet machine; the bound leaves room for a busy one
