"""How documents are cut into windows, and which of them are held out."""

from __future__ import annotations

import pytest

from kvstore_s3.connectors.transformers.windows import CONTINUATION, FEWEST, LONG_CHUNKS, batch_windows, plan_windows
from kvstore_s3.errors import InvalidArgumentError

CHUNK = 64
SHORT = CHUNK + CONTINUATION


def plan(*documents: range, **arguments):
    arguments = {"chunk_tokens": CHUNK, "max_tokens": 100_000} | arguments
    return plan_windows([list(document) for document in documents], **arguments)


def windows_of(sample):
    return [*sample.training, *sample.held_out]


def test_no_token_of_a_document_is_used_twice_and_little_is_left():
    windows = windows_of(plan(range(10_000), range(10_000, 11_000)))
    used = [token for window in windows for token in window.tokens]
    assert len(used) == len(set(used)) > 11_000 - LONG_CHUNKS * CHUNK - SHORT


def test_some_contexts_are_longer_than_a_chunk_and_none_of_those_is_held_out():
    sample = plan(range(20_000))
    assert {window.context for window in sample.training} == {CHUNK, LONG_CHUNKS * CHUNK}
    assert {window.context for window in sample.held_out} == {CHUNK}
    assert all(len(window.tokens) == window.context + CONTINUATION for window in windows_of(sample))


def test_windows_fit_into_the_models_context():
    assert {window.context for window in windows_of(plan(range(20_000), context_tokens=SHORT))} == {CHUNK}
    assert {window.context for window in windows_of(plan(range(20_000), context_tokens=150))} == {150 - CONTINUATION}
    with pytest.raises(InvalidArgumentError, match="context of 128 tokens is too short"):
        plan(range(20_000), context_tokens=128)


def test_special_tokens_stand_in_front_of_every_window():
    for window in windows_of(plan(range(10, 20_000), prefix=[1, 2])):
        assert window.tokens[:2] == (1, 2)
        assert min(window.tokens[2:]) >= 10
        assert len(window.tokens) == window.context + CONTINUATION


def test_short_documents_are_joined():
    documents = [range(start, start + 50) for start in range(0, 5000, 50)]
    assert sum(len(window.tokens) for window in windows_of(plan(*documents))) > 5000 - SHORT


@pytest.mark.parametrize("most", [FEWEST * SHORT, 3000, 4444, 10_000])
def test_at_most_so_many_tokens_are_used_from_all_over_the_text(most):
    sample = plan(range(50_000), max_tokens=most)
    assert most - 3 * SHORT < sample.tokens <= most
    starts = sorted(window.tokens[0] for window in windows_of(sample))
    assert starts[0] < 10_000
    assert starts[-1] > 40_000


def test_what_is_held_out_is_not_learned_from():
    sample = plan(range(20_000))
    assert len(sample.held_out) >= 2
    assert not {window.tokens for window in sample.held_out} & {window.tokens for window in sample.training}


def test_too_little_text_says_how_much_is_needed():
    with pytest.raises(InvalidArgumentError, match=f"too little text .* at least {FEWEST * SHORT:,} are needed"):
        plan(range(700))
    with pytest.raises(InvalidArgumentError, match=f"needs at least {FEWEST * SHORT:,} tokens; 1,000 are allowed"):
        plan(range(20_000), max_tokens=1000)
    assert len(windows_of(plan(range(FEWEST * SHORT)))) == FEWEST


def test_a_batch_holds_windows_of_one_shape():
    sample = plan(range(20_000))
    batches = batch_windows(windows_of(sample), 1000)
    assert sum(ids.numel() for ids, _ in batches) == sample.tokens
    assert all(ids.shape[1] == context + CONTINUATION for ids, context in batches)
    assert all(ids.numel() <= 1000 for ids, _ in batches)
