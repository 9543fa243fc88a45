"""A vLLM engine in a process of its own, told what to do line by line (see vllm_process.py).

Reads one JSON document per line from stdin: first the arguments of vllm.LLM, then commands; writes one answer per line
to the file descriptor that its argument names. The end of stdin ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w", encoding="ascii", buffering=1) as answers:
        job = json.loads(sys.stdin.readline())
        from vllm import LLM

        llm = LLM(skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=False, **job)
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            command = json.loads(line)
            print(json.dumps(COMMANDS[command.pop("do")](llm, **command)), file=answers)


def ask(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Prompts one after the other; `ms` is the caller's wait until the answer, with one token: to the first token."""
    found = []
    for prompt in prompts:
        started = time.perf_counter()
        output = llm.generate([{"prompt_token_ids": prompt}], sampling(max_tokens), use_tqdm=False)[0]
        took = time.perf_counter() - started
        tokens = list(output.outputs[0].token_ids)
        found.append({"ms": round(took * 1e3, 2), "tokens": tokens, "cached": output.num_cached_tokens or 0})
    return found


def serve(
    llm: Any, documents: dict[str, list[int]], conversations: list[dict[str, Any]], clients: int, answer_tokens: int
) -> dict[str, Any]:
    """`clients` hold conversations in a closed loop: each asks its next question when the last one is answered."""
    waiting = iter(conversations)
    turns: dict[str, _Turn] = {}
    done: list[dict[str, Any]] = []
    numbers = iter(range(10**9))

    def begin(turn: _Turn | None) -> None:
        if turn is not None:
            name = str(next(numbers))
            turns[name] = turn
            turn.asked = time.perf_counter()
            llm.llm_engine.add_request(name, {"prompt_token_ids": turn.prompt}, sampling(answer_tokens))

    def next_conversation() -> _Turn | None:
        conversation = next(waiting, None)
        if conversation is None:
            return None
        document = documents[str(conversation["document"])]
        return _Turn.first(document, iter(conversation["questions"]))

    started = time.perf_counter()
    for _ in range(clients):
        begin(next_conversation())
    while turns:
        for output in llm.llm_engine.step():
            turn = turns[output.request_id]
            turn.note(output)
            if output.finished:
                del turns[output.request_id]
                done.append({"ttft_ms": turn.ttft_ms, "prompt": len(turn.prompt), "cached": turn.cached})
                begin(turn.following(list(output.outputs[0].token_ids)) or next_conversation())
    return {"seconds": round(time.perf_counter() - started, 3), "requests": done}


class _Turn:
    """One question of a conversation: all that was said so far, and the question."""

    def __init__(self, prompt: list[int], questions: Iterator[list[int]]) -> None:
        self.prompt = prompt
        self.questions = questions
        self.asked = 0.0
        self.ttft_ms: float | None = None
        self.cached = 0

    @classmethod
    def first(cls, document: list[int], questions: Iterator[list[int]]) -> _Turn:
        return cls([*document, *next(questions)], questions)

    def note(self, output: Any) -> None:
        if self.ttft_ms is None and output.outputs and output.outputs[0].token_ids:
            self.ttft_ms = round((time.perf_counter() - self.asked) * 1e3, 2)
            self.cached = output.num_cached_tokens or 0

    def following(self, answer: list[int]) -> _Turn | None:
        question = next(self.questions, None)
        return None if question is None else _Turn([*self.prompt, *answer, *question], self.questions)


def counters(llm: Any) -> dict[str, float]:
    """The engine's own counters; those with labels beyond the engine's are named with them."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if isinstance(value, (int, float)):
            labels = {key: text for key, text in metric.labels.items() if key not in ("engine", "model_name")}
            name = metric.name + (json.dumps(labels, sort_keys=True) if labels else "")
            totals[name] = totals.get(name, 0) + value
    return totals


def sampling(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


COMMANDS: dict[str, Callable[..., Any]] = {"ask": ask, "serve": serve, "counters": counters}

if __name__ == "__main__":
    main()
