"""Lookups as the scheduler's thread sees them: started, waited for as long as it pays, answered."""

from __future__ import annotations

import time

from kvstore_s3.connectors.vllm.admission import UNLIKELY, Admission
from kvstore_s3.connectors.vllm.health import StoreHealth, late, result_or_none
from kvstore_s3.connectors.vllm.loading import LoadsUnderWay
from kvstore_s3.connectors.vllm.lookups import Answer, Lookups
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.connectors.vllm.plans import floor_to
from kvstore_s3.connectors.vllm.porter import Porter
from kvstore_s3.connectors.vllm.refusals import REQUEST_REASONS
from kvstore_s3.connectors.vllm.requests import RequestState
from kvstore_s3.connectors.vllm.sights import Sights
from kvstore_s3.connectors.vllm.stats import Tally


class Asking:
    """Keeps the lookup of each request. For the scheduler's thread, which it never makes wait."""

    def __init__(
        self,
        porter: Porter,
        lookups: Lookups,
        health: StoreHealth,
        options: Options,
        tally: Tally,
        admission: Admission,
        loads: LoadsUnderWay,
    ) -> None:
        self._porter = porter
        self._lookups = lookups
        self._health = health
        self._options = options
        self._tally = tally
        self._admission = admission
        self._loads = loads
        self._chunk_tokens = options.chunk_tokens
        self._sights = Sights()

    def start(self, state: RequestState) -> None:
        """Ask the store about a request's prompt, unless it is out."""
        state.answer = state.stored = state.waiting_since = None
        if not self._health.available:
            state.lookup, state.outcome, state.reason = None, "skipped", "store-out"
            self._end_wait(state)
            return
        state.asked_at = time.monotonic()
        state.limit_s = self._admission.patience_s(0, state.tokens, self._options.lookup_deadline_s)
        self._tally.add("kvstore_lookups", 0 if state.follow else 1)
        prompt, names_only = state.prompt, state.follow
        state.lookup = self._porter.submit(lambda: self._lookups.ask(prompt, names_only=names_only))

    def stop(self, state: RequestState) -> None:
        """The answer is not needed any more."""
        self._end_wait(state)
        if state.lookup is not None:
            self._porter.cancel(state.lookup)
            state.lookup = None

    def take(self, state: RequestState) -> None:
        """Take the answer if it is there."""
        if state.lookup is None:
            return
        now = time.monotonic()
        if state.lookup.future is not None and state.lookup.done():
            self._take_answer(state, result_or_none(state.lookup.future), now)
        elif now - state.asked_at > self._options.lookup_deadline_s and self._health.available:
            error = late("lookup", self._options.lookup_deadline_s)
            self._porter.submit(lambda: self._health.report_soon(error))

    def is_waiting(self, state: RequestState, computed: int) -> bool:
        """Take the answer if it is there. True while there is none and it is worth waiting.

        `computed` tokens the engine has itself: what it has left to compute is what there is to gain.
        """
        self.take(state)
        if state.lookup is None or not state.may_load:
            return False
        now = time.monotonic()
        state.waiting_since = now if state.waiting_since is None else state.waiting_since
        patience_s = self._admission.patience_s(computed, state.tokens, self._options.lookup_deadline_s)
        state.limit_s = min(state.limit_s, patience_s)
        if state.patient and now - state.waiting_since <= state.limit_s:
            return True
        self._end_wait(state)
        state.may_load = False  # the answer may still come, and then tells what is to be saved
        state.reason = "late" if state.patient else UNLIKELY
        if state.patient:
            state.waited_s = now - state.waiting_since
            self._tally.add("kvstore_lookups_failed")
            self._tally.observe("kvstore_added_wait_seconds", state.waited_s)
            self._admission.note_lookup(state.waited_s)
        return False

    def is_naming(self, state: RequestState) -> bool:
        """Whether the keys of a prompt are still to come. Computed in one step, it would be over before it could be
        saved: worth waiting for where another engine waits for what this one saves."""
        self.take(state)
        overdue = time.monotonic() - state.asked_at > self._options.lookup_deadline_s
        return state.lookup is not None and not overdue

    def _take_answer(self, state: RequestState, answer: Answer | None, now: float) -> None:
        state.lookup = None
        self._end_wait(state)
        if answer is None:
            return
        if answer.reason in REQUEST_REASONS or answer.reason == "other-input":
            state.outcome, state.reason = "skipped", answer.reason
            return
        if answer.reason is not None:
            if state.reason != "late":  # else it was counted when it was late
                self._tally.add("kvstore_lookups_failed")
            state.reason = answer.reason
            return
        state.answer = answer
        if state.seen is None:
            state.seen = self._sights.note(answer.keys) * self._chunk_tokens
        if answer.hit is None:  # another engine is on it
            state.stored = floor_to(state.tokens, self._chunk_tokens)
            return
        state.stored = self.usable_tokens(state)
        self._tally.observe("kvstore_lookup_seconds", answer.seconds)
        waited = state.waited_s = 0.0 if state.waiting_since is None else now - state.waiting_since
        if state.may_load or not state.patient:  # else it was noted when it was late
            size = sum(chunk.size for chunk in answer.hit.chunks)
            self._admission.note_lookup(
                waited if state.may_load else None, hit_tokens=answer.hit.tokens, hit_bytes=size
            )
        if state.may_load and not answer.hit:
            self._tally.observe("kvstore_added_wait_seconds", waited)

    def _end_wait(self, state: RequestState) -> None:
        if state.counted:
            state.counted = False
            self._admission.end_wait()

    def usable_tokens(self, state: RequestState) -> int:
        """Tokens of the hit, up to the first chunk that lately failed to load."""
        if state.answer is None or state.answer.hit is None:
            return 0
        keys = state.answer.keys[: len(state.answer.hit.chunks)]
        return self._loads.count_good(keys, time.monotonic()) * self._chunk_tokens
