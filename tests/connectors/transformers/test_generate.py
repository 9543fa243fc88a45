"""generate: the same tokens as model.generate, with and without a stored prefix, and what is loaded and saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore_s3 import KVStore, connect
from kvstore_s3.connectors.transformers import PrefixCache
from kvstore_s3.connectors.transformers.prefix_cache import TAIL_BLOCK
from kvstore_s3.errors import InvalidArgumentError

CHUNK = 64


@pytest.mark.parametrize("tokens", [20, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 37])
def test_cold_and_warm_give_the_tokens_of_the_plain_model(cache, model, draw_tokens, assert_same_answer, tokens):
    ids = draw_tokens(tokens, tokens)
    assert_same_answer(cache.generate, model, ids)
    assert cache.last.loaded_tokens == 0
    assert cache.last.chunks_saved == tokens // CHUNK
    assert_same_answer(cache.generate, model, ids)
    assert cache.last.chunks_saved == 0
    if tokens >= CHUNK:
        assert 0 < cache.last.loaded_tokens <= tokens - TAIL_BLOCK
        assert cache.last.computed_tokens < CHUNK + TAIL_BLOCK


def test_what_is_loaded_is_used_and_not_computed_again(llama_cache, llama, draw_tokens):
    """Zeros saved under a prompt's name change its answer: the answer does hang on the store."""
    ids = draw_tokens(1, 5 * CHUNK)
    layout = llama_cache.store.namespace.layout
    zeros = torch.zeros(layout.layers, 2, 4 * CHUNK, layout.kv_heads, layout.head_dim)
    llama_cache.store.save(ids[0], zeros)
    found = llama_cache.generate(ids, max_new_tokens=8, do_sample=False)
    assert llama_cache.last.loaded_tokens == 4 * CHUNK
    assert not torch.equal(found, llama.generate(ids, max_new_tokens=8, do_sample=False))


def test_a_conversation_that_grows_saves_only_its_new_chunks(cache, model, draw_tokens, assert_same_answer):
    saved = []
    for tokens in (2 * CHUNK + 5, 3 * CHUNK + 40, 3 * CHUNK + 50, 6 * CHUNK):
        assert_same_answer(cache.generate, model, draw_tokens(2, tokens))
        saved.append(cache.last.chunks_saved)
    assert saved == [2, 1, 0, 3]


def test_a_prompt_that_parts_in_the_middle_loads_what_is_shared(llama_cache, llama, draw_tokens, assert_same_answer):
    llama_cache.generate(draw_tokens(3, 6 * CHUNK), max_new_tokens=1)
    other = torch.cat((draw_tokens(3, 3 * CHUNK + 10), draw_tokens(4, 2 * CHUNK)), dim=1)
    assert_same_answer(llama_cache.generate, llama, other)
    assert llama_cache.last.loaded_tokens == other.shape[1] - 160  # 138 tokens are new, in whole blocks of 32
    assert llama_cache.last.chunks_saved == 2


def test_sampling_with_a_seed_draws_the_same_tokens(llama_cache, llama, draw_tokens):
    ids = draw_tokens(5, 4 * CHUNK + 9)
    options = {"max_new_tokens": 16, "do_sample": True, "temperature": 0.9, "top_k": 20}
    torch.manual_seed(11)
    expected = llama.generate(ids, **options)
    for _ in range(2):
        torch.manual_seed(11)
        assert torch.equal(llama_cache.generate(ids, **options), expected)
    assert llama_cache.last.loaded_tokens


def test_salts_do_not_see_each_other(llama_cache, draw_tokens):
    ids = draw_tokens(6, 3 * CHUNK)
    loaded = []
    for salt in ("a", "b", "a", None, None):
        llama_cache.generate(ids, salt=salt, max_new_tokens=1)
        loaded.append(llama_cache.last.loaded_tokens > 0)
    assert loaded == [False, False, True, False, True]


def test_a_salt_of_the_wrong_type_is_an_error_and_not_a_miss(llama_cache, draw_tokens):
    with pytest.raises(InvalidArgumentError):
        llama_cache.generate(draw_tokens(6, 2 * CHUNK), salt=7, max_new_tokens=1)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda ids: torch.tensor([ids]), lambda ids: [ids]])
def test_token_ids_come_as_list_array_or_tensor(llama_cache, llama, draw_tokens, form):
    ids = draw_tokens(7, 2 * CHUNK + 3)
    found = llama_cache.generate(form(ids[0].tolist()), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, llama.generate(ids, max_new_tokens=4, do_sample=False))


def test_the_answer_has_the_form_that_was_asked_for(llama_cache, draw_tokens):
    ids = draw_tokens(8, 2 * CHUNK)
    options = {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_logits": True}
    answer = llama_cache.generate(input_ids=ids, max_new_tokens=3, **options)
    assert answer.sequences.shape == (1, 2 * CHUNK + 3)
    assert len(answer.logits) == 3


def test_a_token_that_looks_like_padding_is_a_token_like_any_other(llama_cache, llama, draw_tokens):
    ids = draw_tokens(10, 3 * CHUNK + 40)
    expected = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    for _ in range(2):
        found = llama_cache.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=int(ids[0, 5]))
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_mask": torch.tensor([[0] + [1] * 9])}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask"),
        ({"inputs_embeds": torch.zeros(1, 10, 64)}, "inputs_embeds"),
        ({"position_ids": torch.arange(10)[None]}, "position_ids"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "pixel_values"),
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
)
def test_arguments_that_change_the_prompts_kv_are_refused_by_name(llama_cache, draw_tokens, arguments, named):
    with pytest.raises(InvalidArgumentError, match=named):
        llama_cache.generate(draw_tokens(1, 10), max_new_tokens=1, **arguments)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(2, 5, dtype=torch.long), "batch of 2"),
        ([], "at least one token"),
        ([[]], "at least one token"),
        ([1.5, 2.0], "integers"),
        ([[1, 2], [3]], "not token ids"),
        ("text", "not token ids"),
        ({"input_ids": [1, 2]}, "unpack"),
    ],
)
def test_what_is_not_one_prompt_is_refused(llama_cache, ids, said):
    with pytest.raises(InvalidArgumentError, match=said):
        llama_cache.generate(ids, max_new_tokens=1)


async def test_an_asynchronous_store_is_refused_with_the_way_out(llama, namespace_of):
    async with KVStore.open("memory://", namespace_of(llama)) as store:
        with pytest.raises(InvalidArgumentError, match="connect"):
            PrefixCache(llama, store)


SECOND_PROCESS = """
import json, sys
from kvstore_s3.connectors.transformers import PrefixCache
with PrefixCache.open(sys.argv[1], sys.argv[2]) as cache:
    tokens = cache.generate(json.loads(sys.argv[3]), max_new_tokens=8, do_sample=False)[0].tolist()
    print(json.dumps([cache.last.loaded_tokens, cache.last.chunks_saved, tokens]))
"""


def test_a_second_process_hits_what_the_first_one_saved(llama, draw_tokens, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llama.save_pretrained(tmp_path / "model")
    ids = draw_tokens(12, 600)
    arguments = [str(tmp_path / "model"), (tmp_path / "store").as_uri(), str(ids[0].tolist())]
    with PrefixCache.open(arguments[0], arguments[1]) as cache:
        expected = cache.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
        assert cache.last.chunks_saved == 2  # of 256 tokens, the default
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, *arguments], capture_output=True, text=True, check=True
    )
    loaded = 600 - 96  # of the 512 stored tokens, so that whole blocks of 32 are computed
    assert done.stdout.strip() == str([loaded, 0, expected])


def test_another_namespace_misses(llama, namespace_of, draw_tokens, tmp_path: Path):
    ids = draw_tokens(13, 3 * CHUNK)
    for revision, loaded in (("1", False), ("2", False), ("1", True)):
        with connect(tmp_path.as_uri(), namespace_of(llama, revision=revision)) as store:
            cache = PrefixCache(llama, store)
            cache.generate(ids, max_new_tokens=1)
            assert bool(cache.last.loaded_tokens) is loaded
