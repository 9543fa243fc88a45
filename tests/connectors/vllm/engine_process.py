"""A vLLM engine in a process of its own: reads a job (JSON) from stdin, prints its result behind `MARK` on stdout.

A job has `engine` (arguments of vllm.LLM), `scenario` (a function below) and what that scenario takes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "RESULT "


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    engine = {"dtype": "bfloat16", **job["engine"]}
    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=False, **engine)
    result = SCENARIOS[job["scenario"]](llm, job)
    print(MARK + json.dumps({**result, "counters": counters(llm)}), flush=True)


def generate(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Rounds of prompts, one batch after the other.

    A prompt is a list of ids, or a mapping with `prompt_token_ids` and a `cache_salt` or a `lora` [name, id, path].
    """
    rounds = [run_round(llm, prompts, job["max_tokens"]) for prompts in job["rounds"]]
    return {"rounds": rounds}


def abort_while_loading(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Abort the first request as soon as its load is under way; then see that no block is lost and the engine works."""
    from vllm.v1.request import RequestStatus

    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free_before = pool.get_num_free_blocks()
    prompt = {"prompt_token_ids": job["rounds"][0][0]}
    engine.add_request("to-abort", prompt, sampling(job["max_tokens"]))
    while not any(held.status == RequestStatus.WAITING_FOR_REMOTE_KVS for held in scheduler.requests.values()):
        engine.step()
    free_while_loading = pool.get_num_free_blocks()
    engine.abort_request(["to-abort"])
    assert not engine.has_unfinished_requests(), "vLLM did not take the abort"
    steps = 0
    while scheduler.has_requests():  # the load ends in the background, and only then the blocks come back
        engine.engine_core.engine_core.step()
        steps += 1
    lost = free_before - pool.get_num_free_blocks()
    return {"held": free_before - free_while_loading, "lost": lost, "steps": steps, **generate(llm, job)}


def change_weights(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The first round; then, after a sleep, the second; then, with the weights of `others`, the rest."""
    first, second, *rest = job["rounds"]
    rounds = [run_round(llm, first, job["max_tokens"])]
    llm.sleep(1)
    llm.wake_up()
    rounds.append(run_round(llm, second, job["max_tokens"]))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": job["others"]})
    assert llm.reset_prefix_cache(reset_connector=True), "vLLM did not reset its caches"
    for prompts in rest:
        rounds.append(run_round(llm, prompts, job["max_tokens"]))
        assert llm.reset_prefix_cache(), "vLLM did not reset its prefix cache"
    return {"rounds": rounds}


def run_round(llm: Any, prompts: list[Any], max_tokens: int) -> list[dict[str, Any]]:
    asked = [dict(prompt) if isinstance(prompt, dict) else {"prompt_token_ids": prompt} for prompt in prompts]
    adapters = [adapter(prompt.pop("lora", None)) for prompt in asked]
    lora_request = adapters if any(adapters) else None
    outputs = llm.generate(asked, sampling(max_tokens), use_tqdm=False, lora_request=lora_request)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "seconds": output.metrics.first_token_ts - output.metrics.queued_ts if output.metrics else None,
        }
        for output in outputs
    ]


def adapter(given: list[Any] | None) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(*given) if given else None


def sampling(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def counters(llm: Any) -> dict[str, float]:
    """The engine's own counters, by name; a name with several labels is summed."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if isinstance(value, (int, float)):
            totals[metric.name] = totals.get(metric.name, 0) + value
    return totals


SCENARIOS = {
    "generate": generate,
    "abort_while_loading": abort_while_loading,
    "change_weights": change_weights,
}

if __name__ == "__main__":
    main()
