"""Engines as processes: started, asked, and ended for certain."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("vllm_engine.py")
START_S = 300.0
ANSWER_S = 900.0
STOP_S = 60.0
_BIND = "VLLM_CPU_OMP_THREADS_BIND"


class EngineFailedError(Exception):
    """An engine did not start, or ended; the message is the last error in its log."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: the caller's wait for it, the tokens generated, and the prompt tokens that were not computed."""

    ms: float
    tokens: tuple[int, ...]
    cached: int


class Engine:
    """A running engine. For one thread."""

    def __init__(self, process: subprocess.Popen[bytes], answers: int, log: Path) -> None:
        self._process = process
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self._log = log

    def ask(self, *prompts: Sequence[int], max_tokens: int = 1) -> list[Answer]:
        """Prompts one after the other."""
        found = self.tell({"do": "ask", "prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens})
        return [Answer(answer["ms"], tuple(answer["tokens"]), answer["cached"]) for answer in found]

    def tell(self, command: Mapping[str, Any], *, wait_s: float = ANSWER_S) -> Any:
        """Send one line, return the answer. Raises `EngineFailedError`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineFailedError(last_error(self._log)) from error
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], wait_s)
            part = self._answers.read(1 << 20) if ready else b""
            if not part:
                raise EngineFailedError(last_error(self._log) if ready else f"no answer within {wait_s:.0f} s")
            line += part
        return json.loads(line)

    def close(self) -> None:
        """End the engine: it finishes its saves first."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        with suppress(ProcessLookupError):  # workers of an engine that was not asked to end
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def running_engine(
    model: Path,
    *,
    connector: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    python: Path | None = None,
    log: Path,
    **arguments: Any,
) -> Iterator[Engine]:
    """An engine with `model`; `connector` is its kv_transfer_config. Raises `EngineFailedError` where it fails."""
    job = {"model": str(model), "dtype": "bfloat16", "max_model_len": 2048, **arguments}
    if connector is not None:
        job["kv_transfer_config"] = dict(connector)
    reading, writing = os.pipe()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python or sys.executable), str(PROGRAM), str(writing)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[writing],
            start_new_session=True,
            env=engine_environment() | dict(environment or {}),
        )
    os.close(writing)
    engine = Engine(process, reading, log)
    try:
        engine.tell(job, wait_s=START_S)
        yield engine
    finally:
        engine.close()


@contextmanager
def model_on(cores: Sequence[int]) -> Iterator[None]:
    """Engines started inside compute on these cores."""
    before = os.environ.get(_BIND)
    os.environ[_BIND] = ",".join(map(str, cores))
    try:
        yield
    finally:
        del os.environ[_BIND]
        if before is not None:
            os.environ[_BIND] = before


def all_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def all_but_one() -> list[int]:
    """One core for what is not the model, which is the least that vLLM's CPU backend keeps for its scheduler."""
    cores = all_cores()
    return cores[:-1] or cores


def engine_environment() -> dict[str, str]:
    """Three processes, as vLLM's default is; 1 GiB of KV; nothing from the network. Hashes as LMCache wants them.

    All engines compute on the same cores, `all_but_one` where none are named. Left to itself, vLLM keeps one free for
    its scheduler, and one more where there is a connector, unless that leaves none: on two cores the engine with a
    connector would compute on both and the one without on one. Engines are ended when all is stored, so their workers
    get no time for it.
    """
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONSAFEPATH": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        _BIND: os.environ.get(_BIND) or ",".join(map(str, all_but_one())),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    }


def last_error(log: Path) -> str:
    """The first line of the log that names an error: what comes after it are its consequences."""
    lines = log.read_text(errors="replace").splitlines()
    named = [line for line in lines if "Error: " in line or "Exception: " in line]
    found = (named or lines or ["nothing in its log"])[0]
    return found.partition("] ")[2].strip() or found.strip()
