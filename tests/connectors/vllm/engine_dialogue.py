"""Engines that live through a test, each in a process of its own, and are told one thing after the other.

As a program: the engine's process. It reads commands (JSON, one a line) from stdin and answers each with a line behind
`MARK` on stdout; the first command is the arguments of vllm.LLM. As a module: `Engine`, its other end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self, TextIO

MARK = "RESULT "


class Engine:
    """A running engine. Commands are answered one at a time; `tell` does not wait for the answer, `answer` does."""

    def __init__(self, log: Path, environment: dict[str, str], **engine: Any) -> None:
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.tell(**engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def tell(self, **command: Any) -> None:
        print(json.dumps(command), file=self._pipe(self._process.stdin), flush=True)

    def answer(self) -> dict[str, Any]:
        with self.log.open("a") as log:
            for line in self._pipe(self._process.stdout):
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
                log.write(line)
        raise AssertionError(f"the engine ended with {self._process.wait()}: {self.log.read_text()[-6000:]}")

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return self.answer()

    def kill(self) -> None:
        """As `kill -9` does: nothing is finished, nobody is told."""
        self._process.kill()
        self._process.communicate()

    @staticmethod
    def _pipe(pipe: Any) -> TextIO:
        return pipe


def main() -> None:
    arguments = json.loads(sys.stdin.readline())
    from vllm import LLM

    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=False, **arguments)
    answer({"threads": threading.active_count()})
    for line in sys.stdin:
        command = json.loads(line)
        answer(COMMANDS[command.pop("do")](llm, **command))


def answer(result: dict[str, Any]) -> None:
    print(MARK + json.dumps(result), flush=True)


def generate(llm: Any, *, prompt: list[int], salt: str | None = None, **request: Any) -> dict[str, Any]:
    """One request, to its end. `seconds` to the first token, and between the tokens."""
    asked = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
    output = llm.generate([asked], sampling(**request), use_tqdm=False)[0]
    return {
        "tokens": list(output.outputs[0].token_ids),
        "cached": output.num_cached_tokens,
        "seconds": output.metrics.first_token_ts - output.metrics.queued_ts,
    }


def compute(llm: Any, *, prompt: list[int], tokens: int, **request: Any) -> dict[str, Any]:
    """A request of which at least so many tokens are computed, and what is saved of them stored; then it stands still
    until the next command."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    llm.llm_engine.add_request("paused", {"prompt_token_ids": prompt}, sampling(**request))
    (held,) = llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
    while held.num_computed_tokens < tokens:
        llm.llm_engine.step()
    get_kv_transfer_group()._as_worker().flush()
    return {"computed": held.num_computed_tokens}


def counters(llm: Any) -> dict[str, float]:
    """The engine's own counters, by name; a name with several labels is summed."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if isinstance(value, (int, float)):
            totals[metric.name] = totals.get(metric.name, 0) + value
    return totals


def sampling(*, max_tokens: int, transfer: dict[str, Any] | None = None) -> Any:
    from vllm import SamplingParams

    extra = {"kv_transfer_params": transfer} if transfer else None
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra)


COMMANDS = {"generate": generate, "compute": compute, "counters": counters}

if __name__ == "__main__":
    main()
