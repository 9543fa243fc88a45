"""Fixtures for tests that start a real engine: a small model, prompts, and `run_engine`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROCESS = Path(__file__).with_name("engine_process.py")
MARK = "RESULT "


@dataclass(frozen=True)
class EngineRun:
    """What an engine process gave: its result, everything it logged, and how it ended."""

    result: dict[str, Any]
    log: str
    code: int

    @property
    def tokens(self) -> list[list[list[int]]]:
        """Generated tokens, by round and prompt."""
        return [[answer["tokens"] for answer in answers] for answers in self.result["rounds"]]

    @property
    def cached(self) -> list[list[int]]:
        """Prompt tokens that were not computed, as the engine counts them, by round and prompt."""
        return [[answer["cached"] for answer in answers] for answers in self.result["rounds"]]

    def count(self, name: str) -> int:
        """One of the engine's own counters."""
        return int(self.result["counters"][f"vllm:{name}"])

    def log_lines(self, part: str) -> list[str]:
        return [line for line in self.log.splitlines() if part in line]


RunEngine = Callable[..., EngineRun]
PATIENT = {"lookup_deadline_s": 60.0, "load_deadline_s": 120.0, "flush_s": 30.0}
"""Deadlines of the connector for engines on a machine that is overloaded."""


@pytest.fixture(scope="session")
def run_engine(llama: Path) -> RunEngine:
    """Start an engine, run a scenario of engine_process.py in it, and wait for its end.

    `processes`: vLLM's default of three; else one, which starts faster. `store` None: no connector. `job`: what the
    scenario takes beside rounds.
    """

    def run(
        rounds: list[list[Any]],
        *,
        store: str | None = None,
        extra: dict[str, Any] | None = None,
        scenario: str = "generate",
        max_tokens: int = 8,
        model: Path | None = None,
        processes: bool = False,
        environment: dict[str, str] | None = None,
        fails: bool = False,
        job: dict[str, Any] | None = None,
        **engine: Any,
    ) -> EngineRun:
        if store is not None:
            engine["kv_transfer_config"] = transfer_config(
                {"store": store, "admission": "always", **PATIENT, **(extra or {})}
            )
        engine = {"model": str(model or llama), "max_model_len": 2048, **engine}
        work = {"engine": engine, "scenario": scenario, "rounds": rounds, "max_tokens": max_tokens, **(job or {})}
        ran = subprocess.run(
            [sys.executable, str(PROCESS)],
            input=json.dumps(work),
            capture_output=True,
            text=True,
            env=engine_environment(processes=processes) | (environment or {}),
            timeout=480 if processes else 240,
            check=False,
        )
        log = ran.stderr + ran.stdout
        result = next((line for line in ran.stdout.splitlines() if line.startswith(MARK)), None)
        assert (result is None) == fails, log[-6000:]
        return EngineRun(json.loads(result.removeprefix(MARK)) if result else {}, log, ran.returncode)

    return run


def transfer_config(extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "KVStoreS3Connector",
        "kv_connector_module_path": "kvstore_s3.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def engine_environment(*, processes: bool) -> dict[str, str]:
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if processes else "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with fixed random weights: 4 layers, 4 KV heads of 64 dims, as a model directory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.2,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("models") / "llama"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path
