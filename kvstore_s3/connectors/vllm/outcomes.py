"""What became of requests and loads: counted, and told to clients and once to the log. For the scheduler's thread."""

from __future__ import annotations

from typing import Any

from kvstore_s3.connectors.vllm.costs import PrefillMeter
from kvstore_s3.connectors.vllm.health import log
from kvstore_s3.connectors.vllm.loading import LoadsUnderWay, LoadUnderWay
from kvstore_s3.connectors.vllm.measures import outcome_of
from kvstore_s3.connectors.vllm.plans import floor_to
from kvstore_s3.connectors.vllm.refusals import REQUEST_REASONS
from kvstore_s3.connectors.vllm.requests import RequestState, Role
from kvstore_s3.connectors.vllm.stats import Tally
from kvstore_s3.store import KVStore


class Outcomes:
    """Counts requests by what the store gave them, and by the quality that they were answered with."""

    def __init__(self, kv: KVStore, tally: Tally, role: Role, meter: PrefillMeter, loads: LoadsUnderWay) -> None:
        self._tally = tally
        self._role = role
        self._meter = meter
        self._loads = loads
        self._chunk_tokens = kv.namespace.chunk_tokens
        self._unknown_quality = "lossless" if kv.quality.name == "lossless" else "unknown"
        self._told: set[str] = set()

    def skip(self, reason: str) -> None:
        """A request for which the store is not asked."""
        self._tally.add("kvstore_requests", label="skipped")
        self._tally.add("kvstore_requests_quality", label=self._unknown_quality)
        self._tally.add("kvstore_misses", label=reason)

    def tell_once(self, reason: str) -> None:
        """Say of each kind of request that is left alone why that is so."""
        if reason not in self._told:
            self._told.add(reason)
            log.info("a request is neither saved to nor loaded from the KV store: %s", REQUEST_REASONS[reason])

    def note_load(self, load: LoadUnderWay, state: RequestState | None) -> None:
        """A load has ended on all ranks; `state` is None where its request is gone."""
        order, good = load.order, load.good
        tokens = order.tokens
        self._tally.add("kvstore_tokens_loaded", good - tokens.begin, label=load.quality)
        if good < tokens.end:
            self._tally.add("kvstore_loads_failed", label=load.reason or "given-up")
        if good > tokens.begin:
            self._tally.observe("kvstore_load_seconds", load.seconds)
            waited_s = state.waited_s if state is not None else 0.0
            saved_s = (self._meter.seconds(tokens.begin, good) or 0.0) - load.seconds - waited_s
            self._tally.add("kvstore_time_saved_seconds", max(0.0, saved_s))
        if state is None:
            return
        state.loaded = good - tokens.begin
        complete = floor_to(floor_to(state.tokens - order.by_layer, self._chunk_tokens), self._role.block_tokens)
        state.outcome = outcome_of(state.loaded, complete - tokens.begin)
        if good < tokens.end and state.reason != "reset":
            state.reason = load.reason or "given-up"
        self._tally.observe("kvstore_added_wait_seconds", state.waited_s + load.seconds)

    def finish(self, state: RequestState) -> dict[str, Any] | None:
        """A request has ended. What to tell its client, where something was loaded for it."""
        quality = self._quality(state)
        self._tally.add("kvstore_requests", label=state.outcome)
        self._tally.add("kvstore_requests_quality", label=quality)
        if state.outcome in {"miss", "skipped"}:
            self._tally.add("kvstore_misses", label=state.reason)
        if state.reason in REQUEST_REASONS:
            self.tell_once(state.reason)
        if not state.loaded:
            return None
        return {"kvstore_s3": {"loaded_tokens": state.loaded, "quality": quality}}

    def _quality(self, state: RequestState) -> str:
        """The worst quality of the KV that a request was answered with; "unknown" where nobody looked."""
        if state.answer is None:
            return self._unknown_quality if state.local else "lossless"
        used = max(state.local, state.offered.end if state.offered is not None and state.loaded else 0)
        return self._loads.quality_of(state.answer.keys[: -(-used // self._chunk_tokens)])
