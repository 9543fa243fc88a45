"""Which rectangle of a model's KV a worker of the engine holds, and which of the workers save. No communication here.

Tensor parallelism cuts the KV heads, pipeline parallelism the layers. Where there are more tensor parallel ranks than
KV heads, vLLM keeps each head on several of them: all of those load it, and the first saves it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.utils import get_pp_indices

from kvstore_s3.errors import UnsupportedModelError
from kvstore_s3.layout import Shard

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

    from kvstore_s3.layout import KVLayout


def shard_of_rank(config: VllmConfig, layout: KVLayout) -> Shard:
    """The layers x KV heads that this process's rank holds. To be called in a worker: the scheduler has no rank.

    Raises `UnsupportedModelError` where the heads cannot be dealt evenly to the ranks.
    """
    return _shard(config.parallel_config, int(config.parallel_config.rank), layout)


def shards_of_engine(config: VllmConfig, layout: KVLayout) -> list[Shard]:
    """Of all ranks, in their order; for any process of the engine. Raises what `shard_of_rank` raises."""
    parallel = config.parallel_config
    return [_shard(parallel, rank, layout) for rank in range(int(parallel.world_size))]


def writes(config: VllmConfig, layout: KVLayout) -> bool:
    """Whether this rank saves its rectangle: no rank before it holds the same one."""
    parallel = config.parallel_config
    return _tensor_rank(parallel, int(parallel.rank)) % _replicas(parallel, layout) == 0


def _shard(parallel: ParallelConfig, rank: int, layout: KVLayout) -> Shard:
    stage = _pipeline_rank(parallel, rank)
    layer_begin, layer_end = get_pp_indices(layout.layers, stage, parallel.pipeline_parallel_size)
    heads = _heads_of_each(parallel.tensor_parallel_size, layout.kv_heads)
    head_begin = _tensor_rank(parallel, rank) // _replicas(parallel, layout) * heads
    return Shard(layer_begin, layer_end, head_begin, head_begin + heads)


def _replicas(parallel: ParallelConfig, layout: KVLayout) -> int:
    """How many tensor parallel ranks hold each KV head."""
    return max(1, int(parallel.tensor_parallel_size) // layout.kv_heads)


def _heads_of_each(ranks: int, kv_heads: int) -> int:
    if max(ranks, kv_heads) % min(ranks, kv_heads):
        raise UnsupportedModelError(
            f"{kv_heads} KV heads cannot be dealt evenly to tensor_parallel_size={ranks}; use a size that divides the "
            "heads, or a multiple of them"
        )
    return max(1, kv_heads // ranks)


# vLLM numbers the workers of one engine with the tensor parallel rank running fastest, then the pipeline stage.


def _tensor_rank(parallel: ParallelConfig, rank: int) -> int:
    return rank % int(parallel.tensor_parallel_size)


def _pipeline_rank(parallel: ParallelConfig, rank: int) -> int:
    return rank // int(parallel.tensor_parallel_size) % int(parallel.pipeline_parallel_size)
