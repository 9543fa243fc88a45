"""Caches on a device as vLLM registers them: every order of axes, kernels' smaller blocks, latent caches; refusals."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402

from kvstore_s3.codec.device.encoder import SMALLEST_BUDGET, DeviceEncoder  # noqa: E402
from kvstore_s3.connectors.vllm.device_cache import DeviceCache, engine_device  # noqa: E402
from kvstore_s3.connectors.vllm.layouts import LAYOUTS, view_layers  # noqa: E402
from kvstore_s3.connectors.vllm.plans import TokenRange  # noqa: E402
from kvstore_s3.device_pages import PagedMemory  # noqa: E402
from kvstore_s3.errors import UnsupportedModelError  # noqa: E402
from kvstore_s3.layout import KVLayout, Shard  # noqa: E402

LAYOUT = KVLayout(3, 2, 8, "bfloat16")


def named(caches: tuple[torch.Tensor, ...], first: int = 0) -> dict[str, torch.Tensor]:
    return {f"model.layers.{first + number}.self_attn.attn": cache for number, cache in enumerate(caches)}


def make(order: str, *, block_tokens: int = 16, layers: int = 3, heads: int = 2) -> tuple[torch.Tensor, ...]:
    shape = {"layers": layers, "blocks": 6, "heads": heads, "block_tokens": block_tokens, "head_dim": 8}
    values = torch.arange(layers * 6 * heads * block_tokens * 16, dtype=torch.int32).to(torch.int16)
    return view_layers(values.view(torch.bfloat16), order, **shape)


def read(memory: PagedMemory) -> torch.Tensor:
    out = torch.empty(memory.shape, dtype=memory.dtype)
    memory.gather(out)
    return out.view(torch.int16)


@pytest.mark.parametrize("order", LAYOUTS)
def test_a_token_is_found_where_vllm_keeps_it(order: str):
    caches = make(order)
    cache = DeviceCache.adopt(named(caches), LAYOUT, 16)
    found = read(cache.memory([4, 1], 0, 3))
    for layer in range(3):
        for token in (0, 15, 16, 31):
            page = caches[layer][[4, 1][token // 16], :, token % 16].view(torch.int16)
            assert torch.equal(found[layer, 0, token], page[:, :8])
            assert torch.equal(found[layer, 1, token], page[:, 8:])


@pytest.mark.parametrize("order", LAYOUTS)
def test_smaller_blocks_of_a_kernel_are_parts_of_the_schedulers(order: str):
    cache = DeviceCache.adopt(named(make(order, block_tokens=8)), LAYOUT, 16)
    assert cache.block_tokens == 16
    memory = cache.memory([2, 0], 1, 2)
    assert memory.blocks.tolist() == [4, 5, 0, 1]
    assert memory.shape == (1, 2, 32, 2, 8)


def test_a_latent_cache_without_an_axis_for_heads_is_one_head():
    caches = tuple(torch.randn(6, 16, 48).bfloat16() for _ in range(3))
    cache = DeviceCache.adopt(named(caches), KVLayout(3, 1, 24, "bfloat16"), 16)
    found = read(cache.memory([5], 0, 3))
    assert torch.equal(found[1, 0, :, 0], caches[1][5, :, :24].view(torch.int16))
    assert torch.equal(found[1, 1, :, 0], caches[1][5, :, 24:].view(torch.int16))


def test_bytes_are_adopted_as_fp8():
    caches = tuple(torch.randint(0, 256, (6, 2, 16, 16), dtype=torch.uint8) for _ in range(3))
    cache = DeviceCache.adopt(named(caches), KVLayout(3, 2, 8, "float8_e4m3fn"), 16)
    assert cache.layers[0].dtype == torch.float8_e4m3fn
    assert cache.layers[0].data_ptr() == caches[0].data_ptr()


def test_a_rank_holds_its_own_layers():
    cache = DeviceCache.adopt(named(make("LBNHC", layers=2, heads=1), 1), LAYOUT, 16, shard=Shard(1, 3, 1, 2))
    assert (cache.layer_begin, cache.layer_end) == (1, 3)
    assert cache.memory([0], 2, 3).caches[0].data_ptr() == cache.layers[1].data_ptr()
    with pytest.raises(ValueError, match="which this process holds"):
        cache.memory([0], 0, 2)


def test_what_is_read_later_begins_within_a_block():
    caches = make("BLNHC")
    cache = DeviceCache.adopt(named(caches), LAYOUT, 16)
    with DeviceEncoder(None, torch.device("cpu"), SMALLEST_BUDGET) as encoder:
        kv = cache.read_later(TokenRange(24, 72), (3, 5, 1, 0), encoder)
        assert kv.shape == (3, 2, 48, 2, 8)
        memory, skip = kv._find(24, 48)  # tokens 48 to 72
    assert (memory.blocks.tolist(), skip) == ([1, 0], 0)


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        (make("LBNHC", heads=3), "expected"),
        (make("LBNHC", block_tokens=12), "expected"),
        (tuple(cache.float() for cache in make("LBNHC")), "expected"),
        (tuple(cache.transpose(2, 3) for cache in make("LBNHC", block_tokens=16)), "expected"),
        ((*make("LBNHC")[:2], make("LBHNC")[2]), "in 2 ways"),
        (make("LBNHC", layers=2), "should hold layers 0 to 2"),
    ],
    ids=["heads", "blocks", "dtype", "order within a token", "several forms", "layers"],
)
def test_what_is_not_understood_is_refused(caches: tuple[torch.Tensor, ...], message: str):
    with pytest.raises(UnsupportedModelError, match=message):
        DeviceCache.adopt(named(caches), LAYOUT, 16)


def test_caches_on_the_host_are_of_no_device():
    assert engine_device(named(make("LBNHC"))) is None
    assert engine_device({}) is None
