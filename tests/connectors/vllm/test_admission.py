"""Which prompts are looked up, loaded and saved, by what it costs."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.connectors.vllm.admission import (
    FIRST_CREDIT_S,
    FIRST_SIGHT,
    LIFETIME_S,
    MISS_SHARE,
    MOST_CREDIT_S,
    NOT_WORTH_IT,
    SHORT,
    UNLIKELY,
    Admission,
)
from kvstore_s3.connectors.vllm.costs import PrefillMeter
from kvstore_s3.planner import PrefillSpeed

KV_BYTES = 32 * 1024
"""Encoded bytes of a token."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admission(
    clock: Clock, *, tokens_per_s: float | None = 10_000, always: bool = False, save_at: int = 1
) -> Admission:
    speed = None if tokens_per_s is None else PrefillSpeed(1 / tokens_per_s)
    return Admission(PrefillMeter(given=speed), chunk_tokens=256, always=always, save_at=save_at, clock=clock)


def teach(store: Admission, *, bytes_per_s: float, latency_s: float = 0.0, wait_s: float = 0.0) -> None:
    """Loads and lookups of a link of `bytes_per_s`, without effect on the credit."""
    for tokens in (256, 512, 1024, 2048) * 4:
        size = tokens * KV_BYTES
        store.note_save(tokens, size)
        store._far.note(size, latency_s + size / bytes_per_s, store._clock())
        store.note_lookup(wait_s)
    store._credit_s = FIRST_CREDIT_S


def test_what_is_not_known_speaks_for_the_store(clock: Clock):
    for store in (admission(clock), admission(clock, tokens_per_s=None)):
        assert store.may_look_up(256) is None
        assert store.may_load(0, 256, 300, 256 * KV_BYTES, near=False) is None
        assert store.may_load(0, 256, 300, 256 * KV_BYTES, near=True) is None
        assert store.may_save(0, 256, prompt_tokens=300) == (256, None)


def test_a_prompt_without_a_whole_chunk_is_short_even_always(clock: Clock):
    for always in (False, True):
        store = admission(clock, always=always)
        assert store.may_look_up(255) == SHORT
        assert store.may_look_up(256) is None


def test_a_fast_link_is_used_and_a_slow_one_is_not(clock: Clock):
    """32 KiB and 100 us a token: break-even is at 328 MB/s."""
    fast, slow = admission(clock), admission(clock)
    teach(fast, bytes_per_s=1e9)
    teach(slow, bytes_per_s=200e6)
    size = 4096 * KV_BYTES
    assert fast.may_look_up(4096) is None
    assert fast.may_load(0, 4096, 4200, size, near=False) is None
    assert fast.may_save(0, 4096, prompt_tokens=4200) == (4096, None)
    assert slow.may_look_up(4096) == NOT_WORTH_IT
    assert slow.may_load(0, 4096, 4200, size, near=False) == NOT_WORTH_IT
    assert slow.may_save(1024, 4096, prompt_tokens=4200) == (1024, NOT_WORTH_IT)


def test_a_slow_engine_uses_a_slow_link(clock: Clock):
    store = admission(clock, tokens_per_s=1000)
    teach(store, bytes_per_s=200e6)
    assert store.may_look_up(4096) is None


def test_short_prompts_do_not_repay_the_latency_and_long_ones_do(clock: Clock):
    store = admission(clock)
    teach(store, bytes_per_s=2e9, latency_s=0.04, wait_s=0.04)
    assert store.may_look_up(512) == SHORT
    assert store.may_save(0, 512, prompt_tokens=600) == (0, SHORT)
    assert store.may_look_up(4096) is None
    assert store.may_save(0, 512, prompt_tokens=4096) == (512, None), "the first chunk of a long prompt is needed"


def test_attention_makes_a_long_prompt_worth_loading_where_a_short_one_is_not(clock: Clock):
    meter = PrefillMeter(given=PrefillSpeed(1e-4, 1e-8))
    store = Admission(meter, chunk_tokens=256, clock=clock)
    teach(store, bytes_per_s=200e6)
    assert store.may_look_up(4096) == SHORT
    assert store.may_look_up(65536) is None


def test_what_the_engine_holds_already_is_not_counted_as_a_gain(clock: Clock):
    store = admission(clock)
    teach(store, bytes_per_s=2e9, latency_s=0.04)
    size = 4096 * KV_BYTES
    assert store.may_load(0, 4096, 4200, size, near=False) is None
    assert store.may_load(3840, 4096, 4200, size // 16, near=False) == NOT_WORTH_IT


def test_tiers_are_judged_by_their_own_times(clock: Clock):
    store = admission(clock)
    teach(store, bytes_per_s=200e6)
    for _ in range(8):
        store._near.note(4096 * KV_BYTES, 0.05, clock())
    assert store.may_load(0, 4096, 4200, 4096 * KV_BYTES, near=True) is None
    assert store.may_load(0, 4096, 4200, 4096 * KV_BYTES, near=False) == NOT_WORTH_IT
    assert store.may_look_up(4096) is None, "a tier may have it"


def test_what_the_workers_say_of_the_link_counts_until_a_load_was_measured(clock: Clock):
    store = admission(clock)
    store.note_save(256, 256 * KV_BYTES)
    for _ in range(3):
        store.note_lookup(0.0)
    store.note_link(100e6, 0.01)
    assert store.may_look_up(4096) == NOT_WORTH_IT
    teach(store, bytes_per_s=1e9)
    assert store.may_look_up(4096) is None


def test_a_verdict_against_the_store_is_tried_again_after_a_while(clock: Clock):
    store = admission(clock)
    teach(store, bytes_per_s=100e6)
    store.note_link(100e6, 0.01)
    assert store.may_look_up(4096) == NOT_WORTH_IT
    clock.now += LIFETIME_S + 1
    store.note_link(100e6, 0.01)  # the same old news
    assert store.may_look_up(4096) is None
    assert store.may_load(0, 4096, 4200, 4096 * KV_BYTES, near=False) is None
    for _ in range(3):
        store.note_lookup(0.0)
        store.note_load(0, 4096, 4096 * KV_BYTES, 0.1, near=False)
    clock.now += 1
    assert store.may_look_up(4096) is None, "the link has become fast"
    assert "loading 100" in store.explain(), "and that is known"


def test_one_slow_load_or_lookup_condemns_nothing(clock: Clock):
    """The first of an engine opens connections and touches fresh memory."""
    store = admission(clock)
    store.note_save(256, 256 * KV_BYTES)
    store.note_lookup(0.05)
    store.note_load(0, 4096, 4096 * KV_BYTES, 5.0, near=False)
    assert store.may_load(0, 4096, 4200, 4096 * KV_BYTES, near=False) is None
    assert store.may_save(0, 4096, prompt_tokens=4200) == (4096, None)


def run_without_reuse(
    store: Admission, clock: Clock, *, requests: int, prompt: int, wait_s: float
) -> tuple[float, int]:
    """Seconds that requests waited, and how many did, where the store never has anything."""
    waited, count = 0.0, 0
    for _ in range(requests):
        clock.now += 1.0
        if store.may_look_up(prompt) is None:
            waited, count = waited + wait_s, count + 1
            store.end_wait()
            store.note_lookup(wait_s)
        else:
            store.note_lookup(None)
    return waited, count


@pytest.mark.parametrize("wait_s", [0.0001, 0.005, 0.02, 0.5])
def test_without_reuse_waiting_costs_one_percent_at_most(clock: Clock, wait_s: float):
    store = admission(clock)
    waited, _ = run_without_reuse(store, clock, requests=1000, prompt=2048, wait_s=wait_s)
    prefill = 1000 * 2048 / 10_000
    assert waited <= MISS_SHARE * prefill + FIRST_CREDIT_S + wait_s


def test_lookups_that_cost_less_than_one_percent_are_never_skipped(clock: Clock):
    _, count = run_without_reuse(admission(clock), clock, requests=1000, prompt=2048, wait_s=0.002)
    assert count == 1000


def test_hits_keep_lookups_going(clock: Clock):
    """Every fourth prompt is stored, and saves 150 ms; lookups of 20 ms are a tenth of the prefill."""
    store, waits = admission(clock), 0
    for number in range(400):
        clock.now += 1.0
        if store.may_look_up(2048) is None:
            waits += 1
            store.end_wait()
            hit = 2048 if number % 4 == 0 else 0
            store.note_lookup(0.02, hit_tokens=hit, hit_bytes=hit * KV_BYTES)
            if hit:
                store.note_load(0, hit, hit * KV_BYTES, 0.05, near=False)
    assert waits == 400


def test_reuse_that_begins_after_a_time_without_any_is_found_at_once(clock: Clock):
    store = admission(clock)
    while store.may_look_up(2048) is None:
        store.end_wait()
        store.note_lookup(0.05)
    assert store.may_look_up(2048) == UNLIKELY
    store.note_lookup(None, hit_tokens=2048, hit_bytes=2048 * KV_BYTES)
    assert store.may_look_up(2048) is None


def test_prompts_that_come_at_once_wait_for_no_more_than_those_that_come_one_by_one(clock: Clock):
    store, prompts = admission(clock), 128
    for _ in range(15):
        store.note_lookup(0.2)
    store._credit_s = 0.0
    patient = sum(store.may_look_up(2048) is None for _ in range(prompts))
    assert patient * 0.2 <= MISS_SHARE * prompts * (store.meter.seconds(0, 2048) or 0.0) + 0.2
    for _ in range(patient):
        store.end_wait()
        store.note_lookup(0.2)
    assert store._credit_s > -0.3


def test_a_store_that_was_out_for_many_requests_at_once_is_forgiven(clock: Clock):
    """Debts have a bound: 1,000 requests that all waited for the same outage would take hours to repay."""
    store = admission(clock)
    for _ in range(1000):
        store.note_lookup(1.0)
        store.note_load(0, 0, 2048 * KV_BYTES, 1.0, near=False)
    for _ in range(30):
        store.note_load(0, 2048, 2048 * KV_BYTES, 0.05, near=False)
    for _ in range(15):
        store.note_lookup(0.005)
    assert store.may_look_up(2048) is None
    assert store._credit_s <= MOST_CREDIT_S


def test_at_the_second_sight_only_what_was_seen_is_saved(clock: Clock):
    store = admission(clock, save_at=2)
    assert store.may_save(0, 1024, prompt_tokens=1100, seen_tokens=0) == (0, FIRST_SIGHT)
    assert store.may_save(0, 1024, prompt_tokens=1100, seen_tokens=512) == (512, FIRST_SIGHT)
    assert store.may_save(0, 1024, prompt_tokens=1100, seen_tokens=1024) == (1024, None)
    assert store.may_save(512, 1024, prompt_tokens=1100, seen_tokens=256) == (512, FIRST_SIGHT)
    assert admission(clock, save_at=2, always=True).may_save(0, 512, prompt_tokens=600) == (0, FIRST_SIGHT)


def test_always_uses_the_store_whatever_it_costs(clock: Clock):
    store = admission(clock, always=True)
    teach(store, bytes_per_s=1e6, latency_s=3.0, wait_s=3.0)
    assert store.may_look_up(256) is None
    assert store.may_load(0, 256, 300, 256 * KV_BYTES, near=False) is None
    assert store.may_save(0, 256, prompt_tokens=300) == (256, None)
    assert store.patience_s(0, 300, 1.5) == 1.5


def test_patience_is_a_quarter_of_the_prefill_or_the_deadline(clock: Clock):
    store = admission(clock)
    assert store.patience_s(0, 2000, 1.0) == pytest.approx(0.05)
    assert store.patience_s(1000, 2000, 1.0) == pytest.approx(0.025)
    assert store.patience_s(0, 200_000, 1.0) == 1.0
    assert admission(clock, tokens_per_s=None).patience_s(0, 2000, 1.0) == 1.0


def test_a_decision_is_explained_with_its_numbers(clock: Clock):
    store = admission(clock)
    assert "nothing was decided" in store.explain()
    store.may_look_up(2048)
    assert store.explain() == ("lookup of tokens 0 to 2048: yes (computing takes 204.8 ms, left for waiting 102.0 ms)")
    teach(store, bytes_per_s=100e6, wait_s=0.02)
    store.may_look_up(2048)
    assert "no, not-worth-it (computing takes 204.8 ms, loading 671" in store.explain()
    admission_without_speed = admission(clock, tokens_per_s=None)
    admission_without_speed.may_load(0, 256, 300, 1, near=False)
    assert "nothing is known yet" in admission_without_speed.explain()


def test_no_question_takes_long_for_a_prompt_of_128k_tokens(clock: Clock):
    """At rest 5 to 15 microseconds each; the bound leaves room for a busy machine."""
    store = admission(clock)
    teach(store, bytes_per_s=1e9)
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        store.may_look_up(131_072)
        store.may_load(0, 131_072, 131_072, 131_072 * KV_BYTES, near=False)
        store.may_save(0, 131_072, prompt_tokens=131_072, seen_tokens=0)
        times.append(time.perf_counter() - begun)
    assert sorted(times)[100] < 1e-3


@given(
    st.integers(1, 200_000),
    st.floats(1e-7, 1.0),
    st.floats(1e3, 1e12),
    st.floats(0.0, 10.0),
)
def test_what_is_loaded_is_expected_to_be_faster_than_computing(
    tokens: int, seconds_per_token: float, bytes_per_s: float, latency_s: float
):
    store = Admission(PrefillMeter(given=PrefillSpeed(seconds_per_token)), chunk_tokens=256, clock=Clock())
    store.note_link(bytes_per_s, latency_s)
    size = tokens * KV_BYTES
    if store.may_load(0, tokens, tokens + 1, size, near=False) is None:
        assert latency_s + size / bytes_per_s < tokens * seconds_per_token
