"""A GPU that is not in use gets no context, of half a gigabyte: here the second is, but the threads' own is the first.

These tests run in a process of their own (.ci/fake-gpu-test).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "KVSTORE_S3_TEST_FAKE_GPU" not in os.environ:
    pytest.skip("these tests need the fake runtime: `make test-kernels`", allow_module_level=True)

import torch
from device.fake_gpu.operators import RUNTIME
from device.test_device_transformers import CHUNK, CONFIG, PROMPT
from partitions import NAMESPACE, TOKENS, WHOLE, draw_kv, same_bits
from transformers import LlamaForCausalLM

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings, connect
from kvstore_s3.connectors.transformers import PrefixCache

SECOND = torch.device("cuda:1")
SETTINGS = Settings(layer_group=2)


@pytest.fixture(autouse=True)
def second_alone() -> Iterator[None]:
    yield
    assert RUNTIME.fake_has_context(1)
    assert not RUNTIME.fake_has_context(0)


def test_a_tensor_there_makes_no_context_elsewhere() -> None:
    assert draw_kv().to(SECOND).device == SECOND


def test_saves_loads_and_streams(tmp_path: Path) -> None:
    host = draw_kv()
    locked = RUNTIME.fake_calls(b"cudaHostRegister")
    with connect(f"file://{tmp_path}", NAMESPACE, SETTINGS) as store:
        store.save(TOKENS, host.to(SECOND))
        hit = store.lookup(TOKENS)
        assert same_bits(store.load(hit, device=SECOND).cpu(), host[:, :, :WHOLE])
        groups = [group.kv.cpu() for group in store.stream(hit, device=SECOND)]
    assert same_bits(torch.cat(groups), host[:, :, :WHOLE])
    assert RUNTIME.fake_calls(b"cudaHostRegister") > locked


async def test_without_a_thread_of_the_stores_own(tmp_path: Path) -> None:
    host = draw_kv()
    async with KVStore.open(f"file://{tmp_path}", NAMESPACE, SETTINGS) as store:
        await store.save(TOKENS, host.to(SECOND))
        assert same_bits((await store.load(await store.lookup(TOKENS), device=SECOND)).cpu(), host[:, :, :WHOLE])


def test_a_model_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16).to(SECOND).eval()
    layout = KVLayout.from_config(CONFIG, dtype=torch.bfloat16)
    namespace = Namespace(model="tiny", revision="1", layout=layout, chunk_tokens=CHUNK)
    with connect(f"file://{tmp_path}", namespace, Settings(chunk_tokens=CHUNK)) as store:
        cache = PrefixCache(model, store)
        answers = [cache.generate(PROMPT, max_new_tokens=4, do_sample=False)[0].tolist() for _ in range(2)]
    assert cache.last is not None
    assert cache.last.loaded_tokens == 2 * CHUNK + 5
    assert answers[0] == answers[1]
