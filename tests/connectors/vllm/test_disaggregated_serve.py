"""Prefill and decode on two `vllm serve` behind the proxy of the examples, over HTTP and a real MinIO."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
import disaggregated_proxy
from local_server import LocalServer, reserved_port, spawn
from servers import BUCKET
from vllm_serving import VllmServer, serving, wait_healthy

pytestmark = [pytest.mark.engine, pytest.mark.server, pytest.mark.timeout(600)]

STALL_S = 100.0
"""So long that a test would fail of it: the proxy must spare the decode engine that wait."""
ANSWER = {"model": "model", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Site:
    prefill: VllmServer
    decode: VllmServer
    proxy: VllmServer

    def expected(self, prompt: list[int]) -> str:
        """What the decode engine answers when it computes all of it: nothing has been stored with this salt."""
        answer = self.decode.post("/v1/completions", {**ANSWER, "prompt": prompt, "cache_salt": "reference"})
        return answer["choices"][0]["text"]


def prompt_of(length: int, *, seed: int) -> list[int]:
    return [(i * 131 + seed * 977 + i**2 % 89) % 1000 + 8 for i in range(length)]


@pytest.fixture(scope="module")
def site(llama: Path, minio: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    model = add_tokenizer(llama, tmp_path_factory.mktemp("speaking") / "llama")
    folders = [tmp_path_factory.mktemp(name) for name in ("prefill", "decode", "proxy")]
    environment = {**minio.environment(), "KVSTORE_S3_STORE": f"s3://{BUCKET}/disaggregated"}

    def start(role: str, folder: Path) -> VllmServer:
        flag = {
            "kv_connector": "KVStoreS3Connector",
            "kv_role": role,
            "kv_connector_extra_config": {"follow_stall_s": STALL_S},
        }
        # In float32: in bfloat16 tokens depend on how a prompt was cut into steps.
        arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
        arguments += ("--max-num-batched-tokens", "512", "--kv-transfer-config", json.dumps(flag))
        return stack.enter_context(serving(model, *arguments, environment=environment, folder=folder))

    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))  # a server ends with the thread that started it
        prefill, decode = threads.map(start, ("kv_both", "kv_consumer"), folders[:2])
        yield Site(prefill, decode, start_proxy(stack, prefill.url, decode.url, folders[2]))


def start_proxy(stack: ExitStack, prefill: str, decode: str, folder: Path) -> VllmServer:
    port = stack.enter_context(reserved_port())
    command = [sys.executable, disaggregated_proxy.__file__, "--prefill", prefill, "--decode", decode]
    process = spawn([*command, "--port", str(port)], {}, folder / "log", bound=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    proxy = VllmServer(f"http://127.0.0.1:{port}", process, folder / "log")
    wait_healthy(proxy)
    return proxy


def add_tokenizer(model: Path, path: Path) -> Path:
    """The small Llama with a tokenizer of words, so that it can be served."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1024)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(path)
    return path


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_a_streamed_answer_is_that_of_one_engine(site: Site):
    prompt = prompt_of(2300, seed=1)
    expected = site.expected(prompt)
    events = site.proxy.stream("/v1/completions", {**ANSWER, "prompt": prompt})
    assert text_of(events) == expected != ""
    assert site.decode.metrics()["vllm:kvstore_tokens_loaded_total"] == 2048


def test_without_its_prefill_engine_nobody_waits(site: Site):
    """The last test: the prefill engine does not survive it."""
    prompt = prompt_of(1500, seed=2)
    expected = site.expected(prompt)
    os.killpg(site.prefill.process.pid, signal.SIGKILL)
    answer = site.proxy.post("/v1/completions", {**ANSWER, "prompt": prompt})
    assert answer["choices"][0]["text"] == expected
