"""Packing of pages against vLLM's own kernel, for each instruction set that the machine can run it for."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from vllm._custom_ops import cpu_attn_reshape_and_cache  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from kvstore_s3.connectors.vllm.paged import PagedCache, find_packing  # noqa: E402
from kvstore_s3.connectors.vllm.pages import PACKINGS, read_blocks, recognise, write_blocks  # noqa: E402
from kvstore_s3.errors import UnsupportedModelError  # noqa: E402
from kvstore_s3.layout import KVLayout  # noqa: E402

VEC, AMX = PACKINGS


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    current_platform.import_kernels()


def written_by_vllm(kv: torch.Tensor, block_tokens: int, slots: torch.Tensor, blocks: int, isa: str) -> torch.Tensor:
    """A cache of `blocks` blocks into which vLLM wrote `kv` [2, tokens, heads, dim] at `slots`."""
    _, _, heads, head_dim = kv.shape
    cache = torch.zeros(blocks, heads, block_tokens, 2 * head_dim, dtype=kv.dtype)
    halves = cache.view(blocks, heads, 2 * block_tokens, head_dim).chunk(2, dim=2)
    cpu_attn_reshape_and_cache(kv[0].contiguous(), kv[1].contiguous(), *halves, slots, isa)
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("isa", "head_dim", "block_tokens", "packing"),
    [
        ("vec", 64, 32, VEC),
        ("vec", 128, 128, VEC),
        ("vec16", 80, 48, VEC),
        ("vec16", 64, 16, VEC),
        ("amx", 64, 128, AMX),
    ],
)
def test_pages_are_those_of_the_kernel(isa: str, head_dim: int, block_tokens: int, packing: object, dtype: torch.dtype):
    if isa == "amx" and dtype != torch.bfloat16:
        pytest.skip("vLLM uses AMX for bfloat16 alone")
    kv = torch.randn(2, 3 * block_tokens, 2, head_dim).to(dtype)
    table = [4, 0, 2]
    slots = torch.cat([torch.arange(block_tokens) + block * block_tokens for block in table])
    try:
        cache = written_by_vllm(kv, block_tokens, slots, 5, isa)
    except RuntimeError as error:
        pytest.skip(f"this machine's vLLM has no {isa}: {str(error)[:80]}")
    out = torch.empty_like(kv)
    read_blocks(cache, table, packing, out=out)
    assert torch.equal(out, kv)
    ours = torch.zeros_like(cache)
    write_blocks(ours, table, packing, kv=kv)
    assert torch.equal(ours, cache)
    page = cache[table[0]]
    assert recognise(page, kv[0, :block_tokens], kv[1, :block_tokens]) == packing


def layout(**changes: object) -> KVLayout:
    return KVLayout(**{"layers": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", **changes})


def test_the_packing_of_this_machine_is_found():
    assert find_packing(layout(), 128, torch.bfloat16) in PACKINGS


def test_caches_are_adopted_in_layer_order_whatever_order_they_come_in():
    caches = {
        f"model.layers.{number}.self_attn.attn": torch.zeros(3, 2, 32, 128).bfloat16() + number for number in (1, 0)
    }
    paged = PagedCache.adopt(caches, layout(), 32)
    assert [float(cache.view(-1)[0]) for cache in paged.layers] == [0, 1]


@pytest.mark.parametrize(
    ("shape", "named"), [((3, 2, 64, 128), "expected"), ((3, 1, 32, 128), "expected"), ((3, 32, 128), "4 dimensions")]
)
def test_caches_of_another_shape_are_refused(shape: tuple[int, ...], named: str):
    caches = {f"model.layers.{number}.self_attn.attn": torch.zeros(shape).bfloat16() for number in (0, 1)}
    with pytest.raises(UnsupportedModelError, match=named):
        PagedCache.adopt(caches, layout(), 32)


def test_a_model_with_layers_that_vllm_does_not_keep_is_refused():
    caches = {"model.layers.0.self_attn.attn": torch.zeros(3, 2, 32, 128).bfloat16()}
    with pytest.raises(UnsupportedModelError, match="should hold layers 0 to 1 of the model's 2"):
        PagedCache.adopt(caches, layout(), 32)
