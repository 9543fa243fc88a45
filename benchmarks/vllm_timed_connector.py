"""The vLLM connector with a clock around every call that the engine makes: what it takes of the engine's own threads.

Each process that holds one tells what it found to the directory of vllm_calls.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from vllm_calls import NOTHING, tell

from kvstore_s3.connectors.vllm import KVStoreS3Connector as Connector

WORKER = [
    "handle_preemptions",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
]
SCHEDULER = [
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "take_events",
    "request_finished_all_groups",
    "has_pending_push_work",
]
BOTH = ["get_kv_connector_stats"]

_seconds = dict(NOTHING)
_waiting: dict[str, float] = {}


def timed(name: str, side: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(self, *arguments, **named)
        finally:
            _seconds[side or ("worker" if self._worker else "scheduler")] += time.perf_counter() - begun

    return run


class KVStoreS3Connector(Connector):
    """The connector. A step that computes nothing waits inside on purpose; that is not counted."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        threading.Thread(target=tell, args=(_seconds,), daemon=True).start()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        now = time.perf_counter()
        begun = _waiting.setdefault(request.request_id, now)
        if found[0] is not None:  # from the first question to the first answer, the request is not scheduled
            _seconds["waiting"] += now - begun
            _waiting[request.request_id] = now
        return found

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        begun = time.perf_counter()
        results = super().get_transfer_results(finished_req_ids)
        if self._orders().idle_s:
            _seconds["worker"] -= time.perf_counter() - begun
        return results


for _name in (*WORKER, *SCHEDULER, *BOTH):
    _side = "worker" if _name in WORKER else "scheduler" if _name in SCHEDULER else ""
    setattr(KVStoreS3Connector, _name, timed(_name, _side, getattr(KVStoreS3Connector, _name)))
