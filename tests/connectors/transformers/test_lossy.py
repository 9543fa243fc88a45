"""A model over a store with a lossy profile: positions of chunks that are saved step by step, and what it is told."""

from __future__ import annotations

import pytest
import torch

from kvstore_s3 import KVStore, Settings, connect
from kvstore_s3.connectors.transformers import PrefixCache, prefix_cache

CHUNK = 64


@pytest.fixture
def lossy_cache(request, llama, namespace_of):
    with connect("memory://", namespace_of(llama), Settings(profile=request.param)) as store:
        yield PrefixCache(llama, store)


def values_of(cache) -> torch.Tensor:
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


@pytest.mark.parametrize("lossy_cache", ["near-lossless"], indirect=True)
def test_what_was_saved_in_steps_comes_back_in_its_place(lossy_cache, llama, draw_tokens, monkeypatch):
    monkeypatch.setattr(prefix_cache, "STEP_TOKENS", 160)
    ids = draw_tokens(1, 8 * CHUNK)
    with torch.no_grad():
        expected = values_of(llama(input_ids=ids).past_key_values)
    _, first = lossy_cache.prefill(ids)
    assert (first.chunks_saved, first.quality) == (8, "lossless"), "nothing was loaded"
    kept, second = lossy_cache.prefill(ids)
    assert (second.loaded_tokens, second.quality) == (8 * CHUNK, "near-lossless (uncalibrated)")
    error = (values_of(kept) - expected).pow(2).mean(dim=(0, 2, 3, 5)).sqrt()
    scale = expected.pow(2).mean(dim=(0, 2, 3, 5)).sqrt()
    assert bool((error > 0).any())
    assert float((error / scale).max()) < 0.1, "no token's K is turned by the angle of another"


@pytest.mark.parametrize("lossy_cache", ["small", "balanced"], indirect=True)
def test_a_generation_says_the_quality_that_it_used(lossy_cache, draw_tokens):
    ids = draw_tokens(2, 3 * CHUNK)
    name = lossy_cache.store.kv.quality.name
    for quality in ("lossless", f"{name} (uncalibrated)"):
        lossy_cache.generate(ids, max_new_tokens=2, do_sample=False)
        assert lossy_cache.last is not None
        assert lossy_cache.last.quality == quality


@pytest.mark.parametrize("lossy_cache", ["balanced"], indirect=True)
def test_a_warm_says_what_it_wrote(lossy_cache, draw_tokens):
    ids = draw_tokens(3, 4 * CHUNK)
    saved = lossy_cache.warm(ids)
    assert (saved.chunks_new, saved.quality, saved.calibrated) == (4, "balanced", False)
    again = lossy_cache.warm(ids)
    assert (again.chunks_present, again.quality, again.calibrated) == (4, "balanced", None)


@pytest.mark.parametrize("lossy_cache", ["small"], indirect=True)
def test_what_was_computed_after_a_worse_prefix_is_not_offered_as_better(lossy_cache, draw_tokens):
    ids = draw_tokens(4, 6 * CHUNK)
    objects, small = lossy_cache.store.kv.objects, lossy_cache
    small.prefill(ids[:, : 2 * CHUNK])
    _, reuse = small.prefill(ids)
    assert (reuse.loaded_tokens, reuse.chunks_saved) == (2 * CHUNK, 4)
    assert small.store.lookup(ids[0]).tokens == 6 * CHUNK
    better = KVStore(objects, small.store.namespace, Settings(profile="near-lossless"), probe=False)
    hit = small.store.runtime.run(better.lookup(ids[0]))
    assert (hit.tokens, hit.quality) == (2 * CHUNK, "near-lossless")
