"""Tiny models with fixed random weights, stores for them, and what it means that two answers are the same."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from kvstore_s3 import KVLayout, Namespace, Settings, connect
from kvstore_s3.connectors.transformers import PrefixCache
from kvstore_s3.runtime import SyncKVStore

CHUNK = 64
VOCABULARY = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig}


@lru_cache
def make_model(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(7)
    config = CONFIGS[kind](**SHAPE, tie_word_embeddings=False, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, which only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["llama", "qwen3", "gemma"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def model(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    return make_model(kind, dtype)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama", torch.float32)


@pytest.fixture(scope="session")
def namespace_of() -> Callable[..., Namespace]:
    def make(model: PreTrainedModel, **fields: Any) -> Namespace:
        layout = KVLayout.from_config(model.config, dtype=model.dtype)
        return Namespace(**({"model": "tiny", "revision": "1", "layout": layout, "chunk_tokens": CHUNK} | fields))

    return make


@pytest.fixture
def store(model: PreTrainedModel, namespace_of: Callable[..., Namespace]) -> Iterator[SyncKVStore]:
    with connect("memory://", namespace_of(model)) as store:
        yield store


@pytest.fixture
def cache(model: PreTrainedModel, store: SyncKVStore) -> PrefixCache:
    return PrefixCache(model, store)


@pytest.fixture
def llama_cache(llama: PreTrainedModel, namespace_of: Callable[..., Namespace]) -> Iterator[PrefixCache]:
    with connect("memory://", namespace_of(llama)) as store:
        yield PrefixCache(llama, store)


@pytest.fixture(scope="session")
def draw_tokens() -> Callable[[int, int], torch.Tensor]:
    """`draw_tokens(seed, n)`: n token ids; another length with the same seed is a prefix or a continuation."""

    def draw(seed: int, tokens: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCABULARY, (1, 4096), generator=random)[:, :tokens]

    return draw


@pytest.fixture(scope="session")
def assert_same_answer() -> Callable[..., None]:
    """Greedy tokens of a cache against model.generate: equal, to the last token.

    In bf16 the two best logits can be equal, or one rounding apart, and other kernels may then choose the other one.
    So a difference is let pass where the model itself is undecided by no more than that; it ends the comparison.
    """

    def check(generate: Callable[..., Any], model: PreTrainedModel, ids: torch.Tensor, new_tokens: int = 8) -> None:
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        expected = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
        found = generate(ids, **options)
        assert found.shape == expected.sequences.shape
        for position in range(new_tokens):
            if torch.equal(
                found[:, : ids.shape[1] + position + 1], expected.sequences[:, : ids.shape[1] + position + 1]
            ):
                continue
            first, second = expected.logits[position][0].float().topk(2).values
            undecided = 2 * torch.finfo(model.dtype).eps * first.abs()
            assert first - second <= undecided, f"token {position} differs, and is no tie: {first} and {second}"
            return

    return check


@pytest.fixture(scope="session")
def damage() -> Callable[..., None]:
    """Flip one byte in the middle of a stored chunk of a prompt, in a file store."""

    def flip(root: Path, store: SyncKVStore, ids: torch.Tensor, *, chunk: int) -> None:
        path = root / store.lookup(ids).chunks[chunk].object_key
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.chmod(0o600)
        path.write_bytes(data)

    return flip


@pytest.fixture(scope="session")
def dead_store() -> Callable[[Namespace], AbstractContextManager[SyncKVStore]]:
    """An S3 store at a port where nobody listens."""

    @contextmanager
    def open_dead(namespace: Namespace) -> Iterator[SyncKVStore]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
            settings = Settings(endpoint_url=endpoint, max_attempts=1, connect_timeout_s=1)
            with connect("s3://bucket/prefix", namespace, settings, probe=False) as store:
                yield store

    return open_dead
