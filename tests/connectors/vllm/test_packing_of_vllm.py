"""Packing of pages against vLLM's own kernel, for each instruction set that the machine can run it for."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from vllm._custom_ops import cpu_attn_reshape_and_cache  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from kvstore_s3.connectors.vllm.paged import PagedCache, find_packing  # noqa: E402
from kvstore_s3.connectors.vllm.pages import PACKINGS, Pages, recognise  # noqa: E402
from kvstore_s3.connectors.vllm.plans import TokenRange  # noqa: E402
from kvstore_s3.errors import UnsupportedModelError  # noqa: E402
from kvstore_s3.layout import KVLayout, Shard  # noqa: E402

VEC, AMX, _ = PACKINGS


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


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8 = [(torch.float8_e4m3fn, "fp8_e4m3"), (torch.float8_e5m2, "fp8_e5m2")]


KERNELS = [
    *[
        ("vec", head_dim, block, VEC, dtype)
        for head_dim in (32, 64, 96, 128, 256)
        for block in (32, 128)
        for dtype in DTYPES
    ],
    *[("vec16", head_dim, block, VEC, dtype) for head_dim in (80, 112) for block in (32, 48) for dtype in DTYPES],
    *[("vec16", 64, 16, VEC, dtype) for dtype in DTYPES],
    *[("amx", head_dim, block, AMX, torch.bfloat16) for head_dim in (32, 64, 96, 128, 256) for block in (32, 128)],
]
"""What vLLM may choose on x86: AMX for bfloat16 alone."""


@pytest.mark.parametrize(("isa", "head_dim", "block_tokens", "packing", "dtype"), KERNELS)
def test_pages_are_those_of_the_kernel(isa: str, head_dim: int, block_tokens: int, packing: object, dtype: torch.dtype):
    kv = torch.randn(2, 3 * block_tokens, 2, head_dim).to(dtype)
    table = [4, 0, 2]
    slots = torch.cat([torch.arange(block_tokens) + block * block_tokens for block in table])
    try:
        cache = written_by_vllm(kv, block_tokens, slots, 5, isa)
    except RuntimeError as error:
        pytest.skip(f"this machine's vLLM has no {isa}: {str(error)[:80]}")
    out = torch.empty_like(kv)
    Pages([cache], packing).read(table, out=out[None])
    assert torch.equal(out, kv)
    ours = torch.zeros_like(cache)
    Pages([ours], packing).write(table, kv=kv[None])
    assert torch.equal(ours, cache)
    page = cache[table[0]]
    assert recognise(page, kv[0, :block_tokens], kv[1, :block_tokens]) == packing


@pytest.mark.parametrize(("dtype", "name"), FP8, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize(("isa", "packing"), [("vec", VEC), ("amx", AMX)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_fp8_pages_are_those_of_the_kernel(isa: str, packing: object, head_dim: int, dtype: torch.dtype, name: str):
    """The kernel's own rounding is left out: the values are such that fp8 holds them exactly."""
    kv = torch.ldexp(torch.randint(4, 8, (2, 64, 2, head_dim)).float(), torch.randint(-4, 3, (2, 64, 2, head_dim)))
    cache = torch.zeros(3, 2, 32, 2 * head_dim, dtype=torch.uint8)
    halves = cache.view(3, 2, 64, head_dim).chunk(2, dim=2)
    slots = torch.cat([torch.arange(32) + block * 32 for block in (2, 0)])
    keys, values = kv.bfloat16()
    try:
        cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa, kv_cache_dtype=name)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this machine's vLLM has no fp8 KV: {str(error)[:80]}")
    ours = torch.zeros_like(cache)
    Pages([ours.view(dtype)], packing).write([2, 0], kv=kv.to(dtype)[None])
    assert torch.equal(ours, cache)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        *itertools.product(["bfloat16", "float16", "float32"], [32, 64, 80, 96, 128, 256]),
        *itertools.product(["float8_e4m3fn", "float8_e5m2"], [32, 64, 96, 128, 256]),
    ],
)
def test_the_packing_that_the_engine_chooses_here_is_found(dtype: str, head_dim: int):
    model_dtype = torch.bfloat16 if dtype.startswith("float8") else getattr(torch, dtype)
    for block_tokens in (32, 64, 128):
        assert find_packing(layout(dtype=dtype, head_dim=head_dim), block_tokens, model_dtype) in PACKINGS


def layout(**changes: object) -> KVLayout:
    return KVLayout(**{"layers": 2, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", **changes})


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


def named(*layers: int, heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    shape = (3, heads, 32, 128)
    return {f"model.layers.{number}.self_attn.attn": torch.zeros(shape).to(dtype) for number in layers}


def test_a_rank_adopts_its_own_layers_and_heads():
    paged = PagedCache.adopt(named(2, 3), layout(layers=4, kv_heads=4), 32, shard=Shard(2, 4, 2, 4))
    assert (paged.layer_begin, paged.layer_end) == (2, 4)
    kv = torch.randn(1, 2, 32, 2, 64).bfloat16()
    paged.write(3, kv, [1])
    assert torch.equal(paged.read(TokenRange(0, 32), [1])[1:], kv)
    assert not paged.layers[0].any()


@pytest.mark.parametrize("layer_begin", [1, 3, 4])
def test_layers_that_a_rank_does_not_hold_are_not_written(layer_begin: int):
    paged = PagedCache.adopt(named(2, 3), layout(layers=4, kv_heads=4), 32, shard=Shard(2, 4, 2, 4))
    with pytest.raises(ValueError, match="which this process holds"):
        paged.write(layer_begin, torch.zeros(2, 2, 32, 2, 64).bfloat16(), [0])


def test_a_rank_with_other_layers_than_its_place_says_is_refused():
    with pytest.raises(UnsupportedModelError, match="should hold layers 2 to 3"):
        PagedCache.adopt(named(0, 1), layout(layers=4, kv_heads=4), 32, shard=Shard(2, 4, 2, 4))


def test_bytes_that_the_engine_keeps_are_adopted_as_fp8():
    fp8 = layout(dtype="float8_e4m3fn")
    paged = PagedCache.adopt(named(0, 1, dtype=torch.uint8), fp8, 32, model_dtype=torch.bfloat16)
    kv = torch.randint(0, 256, (2, 2, 32, 2, 64), dtype=torch.uint8).view(torch.float8_e4m3fn)
    paged.write(0, kv, [2])
    read = paged.read(TokenRange(0, 32), [2])
    assert read.dtype == torch.float8_e4m3fn
    assert torch.equal(read.view(torch.uint8), kv.view(torch.uint8))
