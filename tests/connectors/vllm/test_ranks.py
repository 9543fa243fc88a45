"""Which rectangle each rank of an engine holds, and who of them saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

from kvstore_s3.connectors.vllm.ranks import shard_of_rank, writes  # noqa: E402
from kvstore_s3.errors import UnsupportedModelError  # noqa: E402
from kvstore_s3.layout import KVLayout, Shard  # noqa: E402


def config(rank: int, *, tensor: int = 1, pipeline: int = 1) -> Any:
    parallel = SimpleNamespace(rank=rank, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    return SimpleNamespace(parallel_config=parallel)


def layout(layers: int = 4, kv_heads: int = 4) -> KVLayout:
    return KVLayout(layers=layers, kv_heads=kv_heads, head_dim=64, dtype="bfloat16")


def test_a_single_rank_holds_all_and_saves_it():
    assert shard_of_rank(config(0), layout()) == layout().full_shard
    assert writes(config(0), layout())


def test_tensor_parallel_ranks_hold_heads():
    shards = [shard_of_rank(config(rank, tensor=2), layout()) for rank in range(2)]
    assert shards == [Shard(0, 4, 0, 2), Shard(0, 4, 2, 4)]


def test_pipeline_parallel_ranks_hold_layers_and_the_last_one_has_fewer():
    shards = [shard_of_rank(config(rank, pipeline=2), layout(layers=5)) for rank in range(2)]
    assert shards == [Shard(0, 3, 0, 4), Shard(3, 5, 0, 4)]


def test_a_layer_partition_that_the_operator_gave_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    shards = [shard_of_rank(config(rank, pipeline=2), layout()) for rank in range(2)]
    assert shards == [Shard(0, 1, 0, 4), Shard(1, 4, 0, 4)]


def test_more_ranks_than_heads_share_a_head_and_one_of_them_saves():
    found = [config(rank, tensor=4) for rank in range(4)]
    assert [shard_of_rank(each, layout(kv_heads=2)).head_begin for each in found] == [0, 0, 1, 1]
    assert [writes(each, layout(kv_heads=2)) for each in found] == [True, False, True, False]


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 3), (2, 2), (8, 2)])
def test_the_ranks_that_save_tile_the_model_once(tensor: int, pipeline: int):
    whole, cells = layout(layers=7), []
    for rank in range(tensor * pipeline):
        each = config(rank, tensor=tensor, pipeline=pipeline)
        shard = shard_of_rank(each, whole)
        if writes(each, whole):
            heads, layers = range(shard.head_begin, shard.head_end), range(shard.layer_begin, shard.layer_end)
            cells += [(layer, head) for layer in layers for head in heads]
    assert sorted(cells) == [(layer, head) for layer in range(7) for head in range(4)]


@pytest.mark.parametrize("tensor", [3, 6])
def test_heads_that_cannot_be_dealt_evenly_are_refused(tensor: int):
    with pytest.raises(UnsupportedModelError, match="cannot be dealt evenly"):
        shard_of_rank(config(0, tensor=tensor), layout())
