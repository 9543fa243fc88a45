"""Which tokens to load and to save, as pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3.connectors.vllm.plans import TokenRange, failed_blocks, plan_load, plan_save, spanned_blocks

KEYS = [bytes([index]) for index in range(40)]


def save(stored: int, computed: int, prompt: int, in_flight: tuple[bytes, ...] = ()) -> TokenRange:
    return plan_save(stored, computed, prompt, chunk_tokens=256, keys=KEYS, in_flight=set(in_flight))


def test_a_hit_beyond_what_the_engine_holds_is_loaded_from_there_on():
    assert plan_load(1024, 384, block_tokens=128) == TokenRange(384, 1024)


def test_a_hit_within_what_the_engine_holds_is_not_loaded():
    assert plan_load(512, 512, block_tokens=128) is None
    assert plan_load(0, 0, block_tokens=128) is None


def test_a_block_that_the_hit_covers_in_part_is_computed():
    assert plan_load(768, 0, block_tokens=512) == TokenRange(0, 512)
    assert plan_load(256, 0, block_tokens=512) is None


def test_only_whole_chunks_of_computed_prompt_tokens_are_saved():
    assert save(0, 700, 2000) == TokenRange(0, 512)
    assert save(0, 5000, 700) == TokenRange(0, 512), "generated tokens are not saved"


def test_each_chunk_is_saved_once_over_the_steps_of_a_chunked_prefill():
    ranges, stored = [], 0
    for computed in (100, 400, 800, 1024, 1025):
        tokens = save(stored, computed, 1025)
        ranges.append(tuple(tokens))
        stored = tokens.end
    assert ranges == [(0, 0), (0, 256), (256, 768), (768, 1024), (1024, 1024)]


def test_what_was_loaded_is_not_saved_again():
    assert save(512, 700, 700) == TokenRange(512, 512)
    assert save(512, 300, 700) == TokenRange(512, 512), "nor counted back"


def test_leading_chunks_that_another_request_saves_are_left_to_it():
    assert save(0, 1024, 1024, in_flight=(KEYS[0], KEYS[1])) == TokenRange(512, 1024)
    assert save(0, 512, 1024, in_flight=(KEYS[0], KEYS[1])) == TokenRange(512, 512)


def test_blocks_are_those_that_hold_any_token_of_the_range():
    assert spanned_blocks(TokenRange(256, 512), list(range(10, 20)), block_tokens=128) == (12, 13)
    assert spanned_blocks(TokenRange(256, 512), list(range(10, 20)), block_tokens=384) == (10, 11)


@pytest.mark.parametrize(
    ("good", "failed"), [(256, {7, 8, 9}), (300, {7, 8, 9}), (512, {9}), (640, set()), (0, {7, 8, 9}), (639, {9})]
)
def test_blocks_beyond_the_good_tokens_have_failed(good: int, failed: set[int]):
    assert failed_blocks(TokenRange(256, 640), good, (7, 8, 9), block_tokens=128) == failed


@given(
    steps=st.lists(st.integers(1, 900), min_size=1, max_size=12),
    prompt=st.integers(1, 5000),
    stored=st.integers(0, 10),
)
def test_saves_are_aligned_contiguous_and_within_the_prompt(steps: list[int], prompt: int, stored: int):
    position, computed = stored * 256, 0
    for step in steps:
        computed += step
        tokens = save(position, computed, prompt)
        assert tokens.begin == position
        assert tokens.end % 256 == 0
        assert tokens.end <= max(min(computed, prompt), stored * 256)
        position = tokens.end
