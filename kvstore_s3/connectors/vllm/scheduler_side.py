"""The half in the scheduler's process: which requests hit, what to load, what to save. Never waits for the store."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore_s3.connectors.vllm.health import StoreHealth, log, result_or_none
from kvstore_s3.connectors.vllm.messages import ChunkPlace, LoadOrder, LoadReport, SaveOrder, StepOrders, StepReport
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.connectors.vllm.plans import TokenRange, floor_to, plan_load, plan_save, spanned_blocks
from kvstore_s3.connectors.vllm.refusals import ineligible_reason
from kvstore_s3.connectors.vllm.stats import Tally
from kvstore_s3.errors import KVStoreError, StoreUnavailableError
from kvstore_s3.hashing import TokenArray, as_token_array, chunk_keys, root_key
from kvstore_s3.runtime import SyncKVStore
from kvstore_s3.store import Hit

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class Answer:
    """What the store said about a prompt: the hit, and the keys of all its whole chunks."""

    hit: Hit
    keys: Sequence[bytes]


@dataclass(slots=True)
class RequestState:
    """One request that may be loaded or saved. `stored` tokens are in the store; None until that is known."""

    prompt: TokenArray
    salt: str | None
    preemptions: int = 0
    lookup: concurrent.futures.Future[Answer | None] | None = None
    asked_at: float = 0.0
    answer: Answer | None = None
    may_load: bool = True
    offered: TokenRange | None = None
    stored: int | None = None


class SchedulerSide:
    """All methods but the coroutines run on the scheduler's thread; it only starts lookups and reads their answers."""

    def __init__(
        self,
        store: SyncKVStore,
        health: StoreHealth,
        options: Options,
        tally: Tally,
        *,
        block_tokens: int,
        loads: bool,
        saves: bool,
    ) -> None:
        self._kv = store.kv
        self._runtime = store.runtime
        self._health = health
        self._options = options
        self._tally = tally
        self._block_tokens = block_tokens
        self._loads = loads
        self._saves = saves
        self._requests: dict[str, RequestState] = {}
        self._loading: set[str] = set()
        self._new_loads: list[LoadOrder] = []
        self._save_ids = itertools.count()
        self._saving: dict[int, tuple[bytes, ...]] = {}
        self._keys_in_flight: set[bytes] = set()
        self._bad_until: dict[bytes, float] = {}
        self._reasons_told: set[str] = set()

    def add_request(self, request: Request) -> None:
        """Start the lookup of a new request, unless its KV is not named by its tokens."""
        reason = ineligible_reason(request)
        if reason is not None:
            self._tell_once(reason)
        elif request.num_prompt_tokens >= self._options.chunk_tokens:
            state = RequestState(as_token_array(request.prompt_token_ids), request.cache_salt)
            self._requests[request.request_id] = state
            self._start_lookup(state)

    def count_matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` the store can give, and whether they come between steps.

        (None, False) while the store has not answered; the scheduler then asks again.
        """
        state = self._requests.get(request.request_id)
        if state is None or not self._loads or not state.may_load or request.skip_reading_prefix_cache:
            return 0, False
        if request.num_preemptions != state.preemptions:  # its blocks are gone; what was saved since may help
            state.preemptions = request.num_preemptions
            self._start_lookup(state)
        if self._is_waiting(state):
            return None, False
        state.offered = plan_load(self._usable_tokens(state), computed, block_tokens=self._block_tokens)
        return (state.offered.end - state.offered.begin, True) if state.offered else (0, False)

    def order_load(self, request: Request, block_ids: Sequence[int], external: int) -> None:
        """The engine has allocated `block_ids`, the request's from the first on, and wants `external` tokens."""
        if not external:
            return
        state = self._requests[request.request_id]
        if state.answer is None or state.offered is None or external != state.offered.end - state.offered.begin:
            raise RuntimeError(f"vLLM asks for {external} tokens; {state.offered} was offered")
        tokens, chunk_tokens = state.offered, self._options.chunk_tokens
        first_chunk = tokens.begin // chunk_tokens
        chunks = state.answer.hit.cut(floor_to(tokens.end + chunk_tokens - 1, chunk_tokens)).chunks[first_chunk:]
        self._new_loads.append(
            LoadOrder(
                request_id=request.request_id,
                tokens=tokens,
                block_ids=spanned_blocks(tokens, block_ids, block_tokens=self._block_tokens),
                first_token=first_chunk * chunk_tokens,
                places=tuple(ChunkPlace.of(chunk) for chunk in chunks),
            )
        )
        self._loading.add(request.request_id)
        self._tally.add("kvstore_loads")

    def build_orders(self, output: SchedulerOutput) -> StepOrders:
        """What the worker is to do in this step."""
        loads, self._new_loads = tuple(self._new_loads), []
        saves = tuple(self._order_saves(output)) if self._saves else ()
        waiting = bool(self._loading) or any(state.lookup is not None for state in self._requests.values())
        return StepOrders(loads, saves, idle=waiting and not output.total_num_scheduled_tokens)

    def take_report(self, report: StepReport) -> None:
        """Learn what the worker finished."""
        for load in report.loads:
            self._loading.discard(load.request_id)
            if load.good < load.ordered:
                self._note_failed_load(load)
        for save in report.saves:
            keys = self._saving.pop(save.save_id)
            self._keys_in_flight.difference_update(keys)
            if save.stored:
                for key in keys:
                    self._bad_until.pop(key, None)

    def drop_request(self, request_id: str) -> None:
        """The request has ended. What it saves goes on; a load under way is the worker's to end."""
        state = self._requests.pop(request_id, None)
        if state is not None and state.lookup is not None:
            state.lookup.cancel()

    def turn_off(self) -> None:
        """Neither look up nor save from now on."""
        self._loads = self._saves = False

    def _start_lookup(self, state: RequestState) -> None:
        state.answer = state.stored = None
        if not (self._loads or self._saves) or not self._health.available:
            state.lookup = None
            return
        self._tally.add("kvstore_lookups")
        state.asked_at = time.monotonic()
        state.lookup = self._runtime.submit(self._look_up(state.prompt, state.salt))

    async def _look_up(self, prompt: TokenArray, salt: str | None) -> Answer | None:
        try:
            hit = await self._kv.lookup(prompt, salt=salt)
        except KVStoreError as error:
            self._tally.add("kvstore_lookups_failed")
            self._health.report(error)
            return None
        root = root_key(self._kv.namespace.digest, salt)
        return Answer(hit, chunk_keys(root, prompt, self._options.chunk_tokens))

    def _is_waiting(self, state: RequestState) -> bool:
        """Take the answer if it is there. True while there is none and it is worth waiting."""
        if state.lookup is None:
            return False
        if state.lookup.done():
            state.answer = result_or_none(state.lookup)
            state.lookup = None
            state.stored = self._usable_tokens(state) if state.answer else None
            return False
        if state.may_load and time.monotonic() - state.asked_at > self._options.lookup_deadline_s:
            state.may_load = False  # the answer may still come, and then tells what is to be saved
            self._tally.add("kvstore_lookups_failed")
            late = StoreUnavailableError(f"a lookup took longer than {self._options.lookup_deadline_s} s")
            self._runtime.submit(self._health.report_soon(late))
        return state.may_load

    def _usable_tokens(self, state: RequestState) -> int:
        """Tokens of the hit, up to the first chunk that lately failed to load."""
        if state.answer is None:
            return 0
        chunks, now = len(state.answer.hit.chunks), time.monotonic()
        bad = (i for i in range(chunks) if self._bad_until.get(state.answer.keys[i], 0.0) > now)
        return next(bad, chunks) * self._options.chunk_tokens

    def _order_saves(self, output: SchedulerOutput) -> Iterator[SaveOrder]:
        for request_id, before in _computed_before(output):
            state = self._requests.get(request_id)
            if state is None or self._is_waiting(state) or state.answer is None or state.stored is None:
                continue
            tokens = plan_save(
                state.stored,
                before + output.num_scheduled_tokens[request_id],
                len(state.prompt),
                chunk_tokens=self._options.chunk_tokens,
                keys=state.answer.keys,
                in_flight=self._keys_in_flight,
            )
            state.stored = tokens.end
            if tokens.begin < tokens.end and self._health.available:
                yield self._order_save(request_id, state, state.answer, tokens, output)

    def _order_save(
        self, request_id: str, state: RequestState, answer: Answer, tokens: TokenRange, output: SchedulerOutput
    ) -> SaveOrder:
        chunk_tokens = self._options.chunk_tokens
        keys = tuple(answer.keys[tokens.begin // chunk_tokens : tokens.end // chunk_tokens])
        save_id = next(self._save_ids)
        self._saving[save_id] = keys
        self._keys_in_flight.update(keys)
        block_ids = output.kv_connector_block_state.resolve_block_ids(request_id)[0]
        return SaveOrder(
            save_id=save_id,
            request_id=request_id,
            tokens=tokens,
            block_ids=spanned_blocks(tokens, block_ids, block_tokens=self._block_tokens),
            prompt=state.prompt[: tokens.end].tobytes(),
            salt=state.salt,
        )

    def _note_failed_load(self, load: LoadReport) -> None:
        """Never offer the same failing hit again at once: not to this request, and to others only after a while."""
        state = self._requests.get(load.request_id)
        if state is None or state.answer is None:
            return
        chunk, now = load.good // self._options.chunk_tokens, time.monotonic()
        self._bad_until = {key: until for key, until in self._bad_until.items() if until > now}
        self._bad_until[state.answer.keys[chunk]] = now + self._kv.settings.verdict_lifetime_s
        state.may_load = False
        state.stored = chunk * self._options.chunk_tokens  # what is computed again mends the store

    def _tell_once(self, reason: str) -> None:
        if reason not in self._reasons_told:
            self._reasons_told.add(reason)
            log.info("requests with %s are neither saved to nor loaded from the KV store", reason)


def _computed_before(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """Each scheduled request with the tokens that were in its blocks before this step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached: Any = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
