"""One engine prefills and another decodes: the KV goes through the store while it is made. Two engines that live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

CHUNK = 256
STALL_S = 5.0
PREFILL = {"do_remote_decode": True}
DECODE = {"do_remote_prefill": True}


def prompt_of(length: int, *, seed: int) -> list[int]:
    return [(i * 131 + seed * 977 + i**2 % 89) % 1000 for i in range(length)]


@dataclass(frozen=True)
class Pair:
    """An engine that prefills, in steps of 512 tokens, and one that decodes, over one store."""

    prefill: Any
    decode: Any
    store: Path

    def stored(self, prompt: list[int]) -> list[bool]:
        """For each chunk of `prompt`, whether it is in the store."""
        from kvstore_s3.hashing import chunk_keys, root_key

        namespace = next(self.store.rglob("namespace.json")).parent
        keys = chunk_keys(root_key(bytes.fromhex(namespace.name), None), prompt, CHUNK)
        return [any(namespace.glob(f"{key.hex()}/l*")) for key in keys]

    def expected(self, prompt: list[int]) -> list[int]:
        """What the decode engine gives when it computes all of it: nothing has ever been stored with this salt."""
        answer = self.decode.ask(do="generate", prompt=prompt, salt="reference", max_tokens=16)
        assert answer["cached"] == 0
        return answer["tokens"]

    def loaded(self) -> int:
        """Tokens whose KV the decode engine has read from the store so far."""
        return int(self.decode.ask(do="counters")["vllm:kvstore_tokens_loaded"])


@pytest.fixture(scope="module")
def pair(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    from connectors.vllm.engine_dialogue import Engine

    folder = tmp_path_factory.mktemp("disaggregated")
    store = folder / "store"
    with (
        Engine(folder / "prefill.log", environment(), **arguments(llama, store, "kv_producer")) as prefill,
        Engine(folder / "decode.log", environment(), **arguments(llama, store, "kv_consumer")) as decode,
    ):
        prefill.answer(), decode.answer()
        yield Pair(prefill, decode, store)


def environment() -> dict[str, str]:
    import os

    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def arguments(model: Path, store: Path, role: str) -> dict[str, Any]:
    """In float32: in bfloat16 tokens depend on how a prompt was cut into steps."""
    return {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "kv_transfer_config": {
            "kv_connector": "KVStoreS3Connector",
            "kv_connector_module_path": "kvstore_s3.connectors.vllm",
            "kv_role": role,
            "kv_connector_extra_config": {"store": store.as_uri(), "follow_stall_s": STALL_S},
        },
    }


def test_what_one_engine_prefills_another_decodes_while_it_is_still_coming(pair: Pair):
    prompt = prompt_of(2300, seed=1)
    expected, before = pair.expected(prompt), pair.loaded()
    pair.decode.tell(do="generate", prompt=prompt, transfer=DECODE, max_tokens=16)
    first = pair.prefill.ask(do="generate", prompt=prompt, transfer=PREFILL, max_tokens=1)
    answer = pair.decode.answer()
    assert answer["tokens"] == expected
    assert first["tokens"] == expected[:1]
    assert pair.loaded() - before == 2048
    assert all(pair.stored(prompt))


def test_a_prompt_of_whole_chunks_needs_its_last_token_only(pair: Pair):
    prompt = prompt_of(1024, seed=2)
    expected, before = pair.expected(prompt), pair.loaded()
    pair.decode.tell(do="generate", prompt=prompt, transfer=DECODE, max_tokens=16)
    pair.prefill.ask(do="generate", prompt=prompt, transfer=PREFILL, max_tokens=1)
    assert pair.decode.answer()["tokens"] == expected
    assert pair.loaded() - before == 1024


def test_the_second_turn_of_a_conversation_finds_the_first_in_the_store(pair: Pair):
    prompt = prompt_of(1500, seed=3)
    pair.prefill.ask(do="generate", prompt=prompt[:1024], transfer=PREFILL, max_tokens=1)
    expected, before = pair.expected(prompt), pair.loaded()
    pair.decode.tell(do="generate", prompt=prompt, transfer=DECODE, max_tokens=16)
    pair.prefill.ask(do="generate", prompt=prompt, transfer=PREFILL, max_tokens=1)
    assert pair.decode.answer()["tokens"] == expected
    assert pair.loaded() - before == 1280


def test_a_prompt_that_nobody_prefills_is_computed_after_the_stall(pair: Pair):
    prompt = prompt_of(1100, seed=4)
    expected = pair.expected(prompt)
    answer = pair.decode.ask(do="generate", prompt=prompt, transfer=DECODE, max_tokens=16)
    assert answer["tokens"] == expected
    assert answer["seconds"] >= STALL_S
    again = pair.decode.ask(do="generate", prompt=prompt, max_tokens=16)
    assert again["tokens"] == expected, "and its blocks hold what was computed"


def test_a_prompt_shorter_than_a_chunk_waits_for_nobody(pair: Pair):
    prompt = prompt_of(200, seed=5)
    expected = pair.expected(prompt)
    answer = pair.decode.ask(do="generate", prompt=prompt, transfer=DECODE, max_tokens=16)
    assert answer["tokens"] == expected
    assert answer["seconds"] < STALL_S


def test_a_prefill_engine_that_is_killed_leaves_the_rest_to_be_computed(pair: Pair):
    prompt = prompt_of(3500, seed=6)
    expected, before = pair.expected(prompt), pair.loaded()
    pair.decode.tell(do="generate", prompt=prompt, transfer=DECODE, max_tokens=16)
    done = pair.prefill.ask(do="compute", prompt=prompt, tokens=2048, transfer=PREFILL, max_tokens=1)
    pair.prefill.kill()
    assert pair.decode.answer()["tokens"] == expected
    assert done["computed"] < len(prompt), "it was killed in the middle"
    assert pair.stored(prompt).count(True) * CHUNK == pair.loaded() - before == 2048
