"""What the scheduler's half knows of one request, and how it reads vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore_s3.connectors.vllm.lookups import Answer, Prompt
from kvstore_s3.connectors.vllm.plans import TokenRange
from kvstore_s3.connectors.vllm.porter import Errand

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class Role:
    """What this engine does with the store, and what it is made of: `ranks` workers, blocks of `block_tokens`.

    `reads_later`: workers read what is to be saved after its step, and blocks are not given back before; otherwise they
    have read it when the step ends.
    """

    block_tokens: int
    ranks: int
    loads: bool
    saves: bool
    caches_prefixes: bool
    has_tiers: bool
    reads_later: bool = False


@dataclass(slots=True)
class RequestState:
    """One request that may be loaded or saved.

    `follow`: another engine computes the prompt now, and this one takes what it stores. `wanted`: another engine waits
    for what this one stores. `patient`: the request waits for its lookup; `counted`: admission counts it among those
    that do. `stored` tokens are in the store, None until that is known; `seen` tokens were in an earlier request;
    `local` ones are in the engine's own cache.
    """

    prompt: Prompt
    tokens: int
    arrived: float
    follow: bool = False
    wanted: bool = False
    patient: bool = True
    counted: bool = False
    lora_name: str | None = None
    preemptions: int = 0
    # The lookup.
    lookup: Errand[Answer] | None = None
    asked_at: float = 0.0
    limit_s: float = 0.0
    waiting_since: float | None = None
    waited_s: float = 0.0
    answer: Answer | None = None
    seen: int | None = None
    # Load and save.
    may_load: bool = True
    may_save: bool = True
    shares_since: float | None = None
    offered: TokenRange | None = None
    stored: int | None = None
    # What came of it.
    local: int = 0
    loaded: int = 0
    outcome: str = "miss"
    reason: str = "absent"

    @classmethod
    def of(cls, request: Request, now: float, *, epoch: bytes, loads: bool) -> RequestState:
        lora = request.lora_request
        adapter = None if lora is None else (lora.lora_int_id, lora.lora_path, bool(lora.load_inplace))
        return cls(
            Prompt(request.prompt_token_ids or (), request.cache_salt, adapter, epoch),
            request.num_prompt_tokens,
            now,
            follow=loads and _is_told(request, "do_remote_prefill"),
            wanted=_is_told(request, "do_remote_decode"),
            lora_name=None if lora is None else lora.lora_name,
            may_load=loads,
            outcome="miss" if loads else "skipped",
            reason="absent" if loads else "off",
        )


def spans_of(output: SchedulerOutput) -> Iterator[tuple[str, TokenRange]]:
    """Each scheduled request with the tokens that this step computes."""
    for new in output.scheduled_new_reqs:
        begin = new.num_computed_tokens
        yield new.req_id, TokenRange(begin, begin + output.num_scheduled_tokens[new.req_id])
    cached: Any = output.scheduled_cached_reqs
    for request_id, begin in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield request_id, TokenRange(begin, begin + output.num_scheduled_tokens[request_id])


def _is_told(request: Request, what: str) -> bool:
    """Whether a proxy says `what` of this request (docs/disaggregation.md)."""
    params = request.kv_transfer_params
    return isinstance(params, dict) and params.get(what) is True
