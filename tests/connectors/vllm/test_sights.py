"""A bounded memory of chunks that were asked for."""

from __future__ import annotations

import time
from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.connectors.vllm.sights import Sights


def keys(*numbers: int) -> list[bytes]:
    return [blake2b(number.to_bytes(8, "little"), digest_size=32).digest() for number in numbers]


def test_nothing_was_seen_the_first_time_and_all_the_second():
    sights, prompt = Sights(), keys(*range(500))
    assert sights.note(prompt) == 0
    assert sights.note(prompt) == 500
    assert sights.note([]) == 0


def test_a_longer_prompt_was_seen_as_far_as_the_shorter_one_went():
    sights = Sights()
    sights.note(keys(1, 2, 3))
    assert sights.note(keys(1, 2, 3, 4, 5)) == 3
    assert sights.note(keys(1, 2, 3, 4, 5, 6)) == 5
    assert sights.note(keys(9, 2, 3)) == 0, "only leading chunks count"


def test_memory_does_not_grow_and_the_latest_are_kept():
    sights = Sights(capacity=1024)
    for number in range(100):
        sights.note(keys(*range(number * 64, number * 64 + 64)))
    recent = [sights.note(keys(number)) for number in range(99 * 64, 100 * 64)]
    old = [sights.note(keys(number)) for number in range(64)]
    assert sum(recent) == 64
    assert sum(old) == 0


def test_what_is_seen_again_and_again_is_not_pushed_out():
    sights, shared = Sights(capacity=1024), keys(*range(10))
    sights.note(shared)
    for number in range(200):
        assert sights.note([*shared, *keys(*range(1000 + number * 32, 1032 + number * 32))]) == 10


def test_a_prompt_larger_than_the_memory_is_no_fault():
    sights = Sights(capacity=64)
    sights.note(keys(*range(1000)))
    assert 0 <= sights.note(keys(*range(1000))) <= 64


def test_a_prompt_of_128k_tokens_is_noted_in_less_than_a_millisecond():
    """At rest some 50 microseconds; the bound leaves room for a busy machine."""
    sights, times = Sights(), []
    for number in range(20):
        prompt = keys(*range(number * 512, number * 512 + 512))
        begun = time.perf_counter()
        sights.note(prompt)
        times.append(time.perf_counter() - begun)
    assert sorted(times)[10] < 2e-3


@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=30))
def test_within_its_capacity_it_agrees_with_a_set(prompts: list[list[int]]):
    sights, model = Sights(capacity=4096), set[int]()
    for prompt in prompts:
        expected = next((i for i, number in enumerate(prompt) if number not in model), len(prompt))
        assert sights.note(keys(*prompt)) == expected
        model.update(prompt)
