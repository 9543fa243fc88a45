"""A store that fails or lies costs time, and nothing else: the tokens stay those of the model."""

from __future__ import annotations

import logging
import shutil

import pytest

from kvstore_s3 import connect
from kvstore_s3.connectors.transformers import PrefixCache
from kvstore_s3.errors import StoreRefusedError

CHUNK = 64


@pytest.fixture
def file_cache(llama, namespace_of, tmp_path):
    with connect(tmp_path.as_uri(), namespace_of(llama)) as store:
        yield PrefixCache(llama, store)


@pytest.mark.parametrize("chunk", [0, 2, 4])
def test_a_damaged_chunk_ends_the_prefix_and_changes_no_token(
    file_cache, llama, draw_tokens, tmp_path, damage, chunk, assert_same_answer
):
    ids = draw_tokens(1, 5 * CHUNK + 20)
    file_cache.warm(ids)
    damage(tmp_path, file_cache.store, ids, chunk=chunk)
    assert_same_answer(file_cache.generate, llama, ids)
    assert file_cache.last.loaded_tokens <= chunk * CHUNK
    assert file_cache.last.chunks_saved == 1  # the damaged one is mended, the sound ones behind it are kept
    assert_same_answer(file_cache.generate, llama, ids)
    assert file_cache.last.loaded_tokens > 4 * CHUNK


def test_a_store_that_vanishes_is_a_miss(file_cache, llama, draw_tokens, tmp_path, assert_same_answer):
    ids = draw_tokens(2, 4 * CHUNK)
    file_cache.warm(ids)
    shutil.rmtree(tmp_path / file_cache.store.namespace.hex)
    assert_same_answer(file_cache.generate, llama, ids)
    assert file_cache.last.loaded_tokens == 0


def test_a_store_that_refuses_connections_is_logged_once(
    llama, namespace_of, draw_tokens, dead_store, caplog, assert_same_answer
):
    caplog.set_level(logging.WARNING, "kvstore_s3")
    with dead_store(namespace_of(llama)) as store:
        cache = PrefixCache(llama, store)
        for seed in (3, 4):
            assert_same_answer(cache.generate, llama, draw_tokens(seed, 3 * CHUNK))
        kept, reuse = cache.prefill(draw_tokens(3, 3 * CHUNK))
        assert kept.get_seq_length() == 3 * CHUNK
    assert (reuse.loaded_tokens, reuse.chunks_saved) == (0, 0)
    said = [record.getMessage() for record in caplog.records if "prompts are computed instead" in record.getMessage()]
    assert len(said) == 1


def test_a_store_that_cannot_be_written_is_read_all_the_same(
    file_cache, llama, draw_tokens, monkeypatch, caplog, assert_same_answer
):
    async def refuse(*_: object, **__: object) -> bool:
        raise StoreRefusedError("read only")

    caplog.set_level(logging.WARNING, "kvstore_s3")
    file_cache.warm(draw_tokens(5, 3 * CHUNK))
    monkeypatch.setattr(type(file_cache.store.kv.objects), "put", refuse)
    for tokens in (4 * CHUNK + 40, 5 * CHUNK):
        assert_same_answer(file_cache.generate, llama, draw_tokens(5, tokens))
        assert file_cache.last.loaded_tokens > 2 * CHUNK
        assert file_cache.last.chunks_saved == 0
    assert [record.getMessage() for record in caplog.records] == [
        "could not save to the KV store; prompts are computed instead: read only"
    ]
