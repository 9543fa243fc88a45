"""`vllm serve` with one flag and KVSTORE_S3_STORE, over HTTP, on a real MinIO: a server, and its successor."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
from local_server import LocalServer
from servers import BUCKET
from vllm_serving import VllmServer, serving

pytestmark = [pytest.mark.engine, pytest.mark.server, pytest.mark.timeout(600)]

FLAG = json.dumps(
    {
        "kv_connector": "KVStoreS3Connector",
        "kv_role": "kv_both",
        # On a busy machine answers come late, and this model is small still; what is worth it is not the question here.
        "kv_connector_extra_config": {"admission": "always", "lookup_deadline_s": 30},
    }
)
PATIENCE = ("--shutdown-timeout", "30")
"""Without it, vLLM kills its engine when it is told to stop, and saves under way are lost."""
CHUNK = 256

WORDS = 1024
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
ANSWER = {"model": "model", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def words(count: int, *, seed: int) -> str:
    """A text of `count` words, each of which is one token."""
    return " ".join(f"w{(i * 131 + seed * 977 + i**2 % 89) % 1000 + 8}" for i in range(count))


@pytest.fixture(scope="module")
def speaking_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of words and a chat template, so that it can be served.

    Its wide MLPs make computing much dearer than loading, as it is for large models: else no load would be worth it.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(12)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=16384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.05,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("models") / "speaking-llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    named = ["[unk]", "[end]", "system", "user", "assistant"]
    vocabulary = {(named[i] if i < len(named) else f"w{i}"): i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", eos_token="[end]")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Answer:
    """What a client saw: the text, in how many events it came, its tokens, and the prompt's that were not computed."""

    text: str
    events: int
    tokens: int
    cached: int
    told: Mapping[str, Any] | None = None
    """What the connector says of the request."""


def asked(server: VllmServer, kind: str, body: Mapping[str, Any], *, stream: bool) -> Answer:
    path = f"/v1/{kind}"
    if stream:
        *events, last = server.stream(path, body)
        texts = [text_of(choice) for event in events for choice in event["choices"]]
        return Answer("".join(texts), sum(map(bool, texts)), *usage_of(last))
    answer = server.post(path, body)
    told = (answer.get("kv_transfer_params") or {}).get("kvstore_s3")
    return Answer(text_of(answer["choices"][0]), 1, *usage_of(answer), told)


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a choice of any of the four kinds of answer."""
    return choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def usage_of(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of the answer, and tokens of the prompt that were not computed."""
    usage = answer["usage"]
    return usage["completion_tokens"], (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0


@dataclass(frozen=True)
class Visit:
    """One life of a server: the answers by name, the metrics at their end, its exit code and its log."""

    answers: dict[str, Answer]
    metrics: dict[str, float]
    code: int
    log: str

    def count(self, name: str) -> float:
        return self.metrics[f"vllm:{name}_total"]

    @property
    def misses(self) -> dict[str, float]:
        """Requests that the store gave nothing for, by reason."""
        reasons = {name: value for name, value in self.metrics.items() if "kvstore_misses_total{reason" in name}
        return {name.split("=")[1].rstrip("}"): value for name, value in reasons.items() if value}


def completion(seed: int, **more: Any) -> dict[str, Any]:
    return {**ANSWER, "prompt": words(700, seed=seed), **more}


def chat(seed: int) -> dict[str, Any]:
    messages = [{"role": role, "content": words(320, seed=seed)} for role in ("system", "user")]
    return {**ANSWER, "messages": messages}


def visit(server: VllmServer) -> Visit:
    """Ask in several ways, each with a prompt of two whole chunks and a rest; then stop the server."""
    answers = {
        "completion": asked(server, "completions", completion(1), stream=False),
        "streamed completion": asked(server, "completions", completion(2), stream=True),
        "chat": asked(server, "chat/completions", chat(3), stream=False),
        "streamed chat": asked(server, "chat/completions", chat(4), stream=True),
        "with parameters": asked(server, "completions", completion(5, kv_transfer_params={"note": 1}), stream=False),
        "other salt": asked(server, "completions", completion(1, cache_salt="tenant"), stream=False),
    }
    return Visit(answers, server.metrics(), server.stop(), server.log)


@pytest.fixture(scope="module")
def visits(speaking_llama: Path, minio: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Visit, Visit]:
    """The same requests to a server with an empty store, and to its successor."""
    environment = {**minio.environment(), "KVSTORE_S3_STORE": f"s3://{BUCKET}/serve"}
    arguments = ("--enable-prompt-tokens-details", "--enforce-eager", "--max-model-len", "2048", *PATIENCE)
    lives = []
    for life in ("first", "second"):
        folder = tmp_path_factory.mktemp(life)
        with serving(
            speaking_llama, "--kv-transfer-config", FLAG, *arguments, environment=environment, folder=folder
        ) as server:
            lives.append(visit(server))
    return lives[0], lives[1]


WAYS = ("completion", "streamed completion", "chat", "streamed chat", "with parameters")


def test_the_first_server_computes_and_saves(visits: tuple[Visit, Visit]):
    first, _ = visits
    assert {name: answer.cached for name, answer in first.answers.items()} == dict.fromkeys([*WAYS, "other salt"], 0)
    assert set(first.misses) == {"absent"}
    assert first.count("kvstore_tokens_loaded") == 0
    assert first.count("kvstore_loads_failed") == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_new_server_gives_the_same_answer_from_the_store(visits: tuple[Visit, Visit], way: str):
    first, second = (visit.answers[way] for visit in visits)
    assert (first.tokens, second.tokens) == (ANSWER["max_tokens"], ANSWER["max_tokens"])
    assert second.text == first.text != ""
    assert second.cached == 2 * CHUNK


def test_an_answer_says_what_it_rests_on(visits: tuple[Visit, Visit]):
    first, second = (visit.answers["completion"] for visit in visits)
    assert first.told is None
    assert second.told == {"loaded_tokens": 2 * CHUNK, "quality": "lossless"}


@pytest.mark.parametrize("way", ["streamed completion", "streamed chat"])
def test_a_streamed_answer_arrives_in_pieces(visits: tuple[Visit, Visit], way: str):
    assert [visit.answers[way].events > 1 for visit in visits] == [True, True]


def test_the_metrics_of_the_new_server_show_the_hits(visits: tuple[Visit, Visit]):
    _, second = visits
    hits = (len(WAYS) + 1) * 2 * CHUNK
    assert second.misses == {}
    assert second.count("kvstore_tokens_loaded") == hits
    assert second.count("external_prefix_cache_hits") == hits
    assert second.count("kvstore_tokens_saved") == 0
    assert second.count("kvstore_loads_failed") == 0


def test_a_salt_reads_only_what_it_saved(visits: tuple[Visit, Visit]):
    first, second = (visit.answers["other salt"] for visit in visits)
    assert (first.cached, second.cached) == (0, 2 * CHUNK)
    assert first.text == second.text == visits[0].answers["completion"].text


def test_servers_end_by_themselves_when_they_are_told_to(visits: tuple[Visit, Visit]):
    for life in visits:
        assert life.code in (0, -signal.SIGTERM), life.log[-3000:]
        assert "force killing" not in life.log, life.log[-6000:]


def test_nothing_of_the_connector_fails_or_shows_a_secret(visits: tuple[Visit, Visit], minio: LocalServer):
    for life in visits:
        failing = [line for line in life.log.splitlines() if 'File "' in line and "kvstore_s3/" in line]
        assert failing == []
        assert minio.secret_key not in life.log
