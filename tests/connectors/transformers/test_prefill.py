"""prefill and warm: step by step, saving as they go, and going on where they were interrupted."""

from __future__ import annotations

import pytest
import torch

from kvstore_s3 import Saved, connect
from kvstore_s3.connectors.transformers import PrefixCache, prefix_cache
from kvstore_s3.errors import StoreError

CHUNK = 64


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Steps that are no multiple of a chunk, so that a step's last chunk is saved with the next one."""
    monkeypatch.setattr(prefix_cache, "STEP_TOKENS", 160)


def keys_of(cache) -> torch.Tensor:
    return torch.stack([layer.keys for layer in cache.layers])


def test_prefill_gives_the_cache_of_one_forward(llama_cache, llama, draw_tokens):
    ids = draw_tokens(1, 8 * CHUNK + 11)
    with torch.no_grad():
        expected = keys_of(llama(input_ids=ids).past_key_values)
    for loaded in (0, 8 * CHUNK):
        kept, reuse = llama_cache.prefill(ids)
        torch.testing.assert_close(keys_of(kept), expected, rtol=1e-4, atol=1e-4)
        assert reuse.loaded_tokens == loaded
        assert reuse.chunks_saved == (0 if loaded else 8)


def test_prefill_of_whole_chunks_computes_nothing_the_second_time(llama_cache, draw_tokens):
    ids = draw_tokens(2, 4 * CHUNK)
    first, _ = llama_cache.prefill(ids)
    second, reuse = llama_cache.prefill(ids)
    assert reuse.computed_tokens == 0
    assert torch.equal(keys_of(first), keys_of(second))


def test_generate_goes_on_from_a_prefilled_cache(llama_cache, llama, draw_tokens):
    ids = draw_tokens(3, 5 * CHUNK)
    kept, _ = llama_cache.prefill(ids[:, :300])
    found = llama.generate(ids, past_key_values=kept, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, llama.generate(ids, max_new_tokens=6, do_sample=False))


def test_warm_stores_whole_chunks_and_counts_them(llama_cache, draw_tokens):
    ids = draw_tokens(4, 7 * CHUNK + 30)
    saved = llama_cache.warm(ids[0].tolist())
    assert (saved.chunks_new, saved.chunks_present) == (7, 0)
    assert saved.bytes > 0
    assert llama_cache.warm(ids) == Saved(0, 7, 0)
    longer = llama_cache.warm(draw_tokens(4, 9 * CHUNK))
    assert (longer.chunks_new, longer.chunks_present) == (2, 7)


def test_warm_then_generate_gives_the_tokens_of_the_plain_model(cache, model, draw_tokens, assert_same_answer):
    cache.warm(draw_tokens(5, 6 * CHUNK))
    assert_same_answer(cache.generate, model, draw_tokens(5, 7 * CHUNK + 3))
    assert cache.last.loaded_tokens >= 5 * CHUNK


def test_warm_tells_its_progress_beginning_with_what_is_stored(llama_cache, draw_tokens):
    told: list[int] = []
    llama_cache.warm(draw_tokens(6, 3 * CHUNK), progress=told.append)
    assert told == [0, 160, 192]
    told.clear()
    llama_cache.warm(draw_tokens(6, 6 * CHUNK + 1), progress=told.append)
    assert told == [192, 352, 384]
    told.clear()
    llama_cache.warm(draw_tokens(6, 6 * CHUNK), progress=told.append)
    assert told == [384]


def test_a_prompt_shorter_than_a_chunk_is_nothing_to_store(llama_cache, draw_tokens):
    assert llama_cache.warm(draw_tokens(7, CHUNK - 1)) == Saved(0, 0, 0)


def test_an_interrupted_warm_keeps_what_was_done(llama_cache, draw_tokens):
    def interrupt(tokens: int) -> None:
        if tokens >= 320:
            raise KeyboardInterrupt

    ids = draw_tokens(8, 10 * CHUNK)
    with pytest.raises(KeyboardInterrupt):
        llama_cache.warm(ids, progress=interrupt)
    saved = llama_cache.warm(ids)
    assert (saved.chunks_new, saved.chunks_present) == (5, 5)


def test_warm_computes_again_what_is_damaged(llama, namespace_of, draw_tokens, tmp_path, damage):
    ids = draw_tokens(9, 6 * CHUNK)
    with connect(tmp_path.as_uri(), namespace_of(llama)) as store:
        cache = PrefixCache(llama, store)
        cache.warm(ids[:, : 4 * CHUNK])
        damage(tmp_path, store, ids, chunk=2)
        saved = cache.warm(ids)
        assert (saved.chunks_new, saved.chunks_present) == (3, 3)
        assert store.load(store.lookup(ids)).shape[2] == 6 * CHUNK


def test_warm_says_so_when_the_store_fails(llama, namespace_of, draw_tokens, dead_store):
    with dead_store(namespace_of(llama)) as store, pytest.raises(StoreError):
        PrefixCache(llama, store).warm(draw_tokens(10, 2 * CHUNK))
