"""A transformers model whose KV is decoded on its device: the same tokens, and recomputing where the device fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")  # a machine for `make gpu-check` may lack it

import torch
from device.emulated import ON_DEVICE, Device
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvstore_s3 import KVLayout, Namespace, Settings, connect
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.library import Library, Pages
from kvstore_s3.connectors.transformers import PrefixCache
from kvstore_s3.connectors.transformers.canonical import build_cache, common_gpu
from kvstore_s3.errors import DeviceError
from kvstore_s3.runtime import SyncKVStore

CHUNK = 32
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    initializer_range=0.3,
)
PROMPT = torch.randint(0, 300, (1, 3 * CHUNK + 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(7)
    return LlamaForCausalLM(CONFIG).to(torch.bfloat16).to(GPU if ON_DEVICE else CPU).eval()


@pytest.fixture
def store(model: PreTrainedModel, tmp_path: Path) -> Iterator[SyncKVStore]:
    layout = KVLayout.from_config(model.config, dtype=model.dtype)
    namespace = Namespace(model="tiny", revision="1", layout=layout, chunk_tokens=CHUNK)
    with connect(f"file://{tmp_path}", namespace, Settings(chunk_tokens=CHUNK)) as store:
        yield store


def answer_of(model: PreTrainedModel) -> list[int]:
    ids = PROMPT.to(model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0].tolist()


def test_a_hit_that_the_device_coded_gives_the_tokens_of_the_plain_model(
    store: SyncKVStore, model: PreTrainedModel, device: Device
) -> None:
    class CountingLibrary(Library):
        encoded = 0

        def lossless_encode(self, jobs: int, count: int, pages: Pages, lengths: int, stream: int) -> None:
            CountingLibrary.encoded += count
            super().lossless_encode(jobs, count, pages, lengths, stream)

    expected = answer_of(model)
    library = CountingLibrary(device.library.path, emulated=device.library.emulated)
    with DeviceDecoder(library, GPU if ON_DEVICE else CPU, SMALLEST_BUDGET) as decoder:
        cache = PrefixCache(model, store, device=None if ON_DEVICE else decoder)  # a GPU it finds by itself
        for loaded in (0, 2 * CHUNK + 5):
            assert cache.generate(PROMPT, max_new_tokens=8, do_sample=False)[0].tolist() == expected
            assert cache.last is not None
            assert cache.last.loaded_tokens == loaded
    assert ON_DEVICE or CountingLibrary.encoded == 3 * 2  # chunks, heads of one section each


def test_a_device_that_fails_ends_in_computing(
    store: SyncKVStore, model: PreTrainedModel, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenLibrary(Library):
        def lossless_decode(self, jobs: int, count: int, pages: Pages, faults: int, stream: int) -> None:
            raise DeviceError("kvs_lossless_decode failed with CUDA error 700")

    expected = answer_of(model)
    library = BrokenLibrary(device.library.path, emulated=device.library.emulated)
    with (
        DeviceDecoder(library, GPU if ON_DEVICE else CPU, SMALLEST_BUDGET) as decoder,
        caplog.at_level(logging.WARNING, "kvstore_s3"),
    ):
        cache = PrefixCache(model, store, device=decoder)
        cache.generate(PROMPT, max_new_tokens=1)
        assert cache.generate(PROMPT, max_new_tokens=8, do_sample=False)[0].tolist() == expected
    assert cache.last is not None
    assert cache.last.loaded_tokens == 0
    assert [record.getMessage() for record in caplog.records] == [
        "could not load from the KV store; prompts are computed instead: kvs_lossless_decode failed with CUDA error 700"
    ]


def test_a_cache_views_what_was_loaded_onto_its_device() -> None:
    kv = torch.empty(2, 2, 40, 2, 8, device="meta")
    cache = build_cache(CONFIG, kv, [kv.device] * 2)
    assert cache.get_seq_length() == 40
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            assert held.shape == (1, 2, 40, 8)
            assert held.untyped_storage()._cdata == kv.untyped_storage()._cdata
    more = torch.empty(1, 2, 1, 8, device="meta")
    cache.update(more, more, 0)
    assert cache.get_seq_length() == 41


def test_a_cache_on_the_host_holds_a_copy() -> None:
    kv = torch.zeros(2, 2, 40, 2, 8)
    cache = build_cache(CONFIG, kv, [kv.device] * 2)
    kv.fill_(1)
    assert not cache.layers[1].keys.any()


@pytest.mark.parametrize(
    ("devices", "found"),
    [
        ([CPU, CPU], None),
        ([GPU, GPU], GPU),
        ([GPU, torch.device("cuda:1")], None),
        ([GPU, CPU], None),
        ([torch.device("meta")], None),
    ],
    ids=["host", "one GPU", "two GPUs", "some on the host", "another kind"],
)
def test_only_one_gpu_that_has_all_layers_is_loaded_to(devices: list[torch.device], found: torch.device | None) -> None:
    assert common_gpu(devices) == found
