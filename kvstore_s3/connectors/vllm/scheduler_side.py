"""The half in the scheduler's process: which requests hit, what to load, what to save. Never waits for the store."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvstore_s3.connectors.vllm.admission import UNLIKELY, Admission
from kvstore_s3.connectors.vllm.asking import Asking
from kvstore_s3.connectors.vllm.costs import PrefillMeter
from kvstore_s3.connectors.vllm.events import EventLog
from kvstore_s3.connectors.vllm.health import StoreHealth, log
from kvstore_s3.connectors.vllm.loading import LoadsUnderWay, LoadUnderWay
from kvstore_s3.connectors.vllm.lookups import Lookups
from kvstore_s3.connectors.vllm.messages import LoadOrder, StepOrders, StepReport
from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.connectors.vllm.outcomes import Outcomes
from kvstore_s3.connectors.vllm.plans import TokenRange, floor_to, plan_load, spanned_blocks
from kvstore_s3.connectors.vllm.porter import Porter
from kvstore_s3.connectors.vllm.refusals import ineligible_reason
from kvstore_s3.connectors.vllm.requests import RequestState, Role, spans_of
from kvstore_s3.connectors.vllm.saving import SaveOrders
from kvstore_s3.connectors.vllm.stats import Tally
from kvstore_s3.streaming import Pace

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvstore_s3.store import KVStore

_LOADING_WAIT_S = 0.01
"""How long a step that computes nothing waits for a load to end. vLLM would spin, and take the cores from decoding."""
_LOOKUP_WAIT_S = 0.0005
"""The same where only answers are waited for, which come to another process than the one that waits."""


class SchedulerSide:
    """All methods run on the scheduler's thread; it only starts lookups and reads their answers."""

    def __init__(
        self,
        kv: KVStore,
        porter: Porter,
        lookups: Lookups,
        health: StoreHealth,
        options: Options,
        tally: Tally,
        role: Role,
        meter: PrefillMeter,
        admission: Admission,
        events: EventLog | None,
    ) -> None:
        self._options = options
        self._tally = tally
        self._role = role
        self._meter = meter
        self._admission = admission
        self._events = events
        self._layers = kv.namespace.layout.layers
        self._chunk_tokens = kv.namespace.chunk_tokens
        self._requests: dict[str, RequestState] = {}
        self._loads = LoadsUnderWay(role.ranks, lifetime_s=kv.settings.verdict_lifetime_s)
        self._saves = SaveOrders(role, admission, health, tally, events, self._loads, chunk_tokens=self._chunk_tokens)
        self._porter = porter
        self._asking = Asking(porter, lookups, health, options, tally, admission, self._loads)
        self._outcomes = Outcomes(kv, tally, role, meter, self._loads)
        self._manager: KVCacheManager | None = None
        self._holds_old = False
        self._held_new: list[str] = []
        self._held: set[str] = set()
        self._epoch = 0
        self._epoch_key = b""

    def bind(self, manager: KVCacheManager) -> None:
        """The engine's blocks, of which failed loads by layer take some out of its prefix cache."""
        self._manager = manager

    def add_request(self, request: Request) -> None:
        """Start the lookup of a new request, unless its KV is not named by its tokens or it is not worth the while."""
        loads = self._role.loads
        reason = ineligible_reason(request, adapters=True)
        if reason is not None:
            self._outcomes.tell_once(reason)
        elif not (loads or self._role.saves):
            reason = "off"
        if reason is not None:
            self._outcomes.skip(reason)
            return
        state = RequestState.of(request, time.monotonic(), epoch=self._epoch_key, loads=loads)
        if state.tokens < self._chunk_tokens:
            self._outcomes.skip("short")
            return
        if not (state.follow or state.wanted):
            reason = self._admission.may_look_up(state.tokens)
            state.patient = reason != UNLIKELY
            state.counted = reason is None
            if reason not in (None, UNLIKELY):
                log.debug("%s", self._admission.explain())
                self._outcomes.skip(reason)
                return
        self._requests[request.request_id] = state
        self._asking.start(state)

    def count_matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` the store can give, and whether they come between steps.

        (None, False) while the store has not answered, or the same tokens are being loaded for another request, whose
        blocks this one will then share; the scheduler asks again.
        """
        if computed and self._loads.any_by_layer_new:
            return None, False  # its blocks may be ones that a load of this very step has yet to fill
        state = self._requests.get(request.request_id)
        if state is None:
            return 0, False
        count, between_steps = self._match(state, request, computed)
        if count is not None and state.shares_since is not None:
            self._end_share(state, loads=bool(count))
        return count, between_steps

    def _match(self, state: RequestState, request: Request, computed: int) -> tuple[int | None, bool]:
        if not self._role.loads or not state.may_load:
            return (None if state.wanted and self._asking.is_naming(state) else 0), False
        whole = floor_to(floor_to(state.tokens, self._chunk_tokens), self._role.block_tokens)
        state.local = computed
        if computed and self._holds_old:
            state.may_save, state.reason = False, "reset"
            return 0, False
        if computed >= whole and not state.wanted:
            state.reason = "local"
            return 0, False  # the engine has all that the store could give
        if request.num_preemptions != state.preemptions:  # its blocks are gone; what was saved since may help
            state.preemptions = request.num_preemptions
            self._asking.start(state)
        if self._asking.is_waiting(state, computed):
            return None, False
        state.offered = self._plan_load(state, request, computed)
        if state.offered is None or state.answer is None:
            return 0, False
        first = state.offered.begin // self._chunk_tokens
        coming = self._role.caches_prefixes and self._loads.is_coming(state.answer.keys[first])
        if coming and self._may_share(state, computed):
            return None, False
        return state.offered.end - state.offered.begin, not self._by_layer(state)

    def _may_share(self, state: RequestState, computed: int) -> bool:
        """Whether to wait on for another request's load, which may be longer than what this one needs of it."""
        now = time.monotonic()
        if state.shares_since is None:
            state.shares_since = now
            self._tally.add("kvstore_loads_shared")
        patience_s = self._admission.patience_s(computed, state.tokens, self._options.load_deadline_s)
        return now - state.shares_since + state.waited_s <= patience_s

    def _end_share(self, state: RequestState, *, loads: bool) -> None:
        """Another request's load is waited for no more; what it took counts against a load of this one's own."""
        if state.shares_since is not None:
            state.waited_s += time.monotonic() - state.shares_since
            state.shares_since = None
        if not loads:  # else it is told when that has ended
            self._tally.observe("kvstore_added_wait_seconds", state.waited_s)

    def order_load(self, request: Request, block_ids: Sequence[int], external: int) -> None:
        """The engine has allocated `block_ids`, the request's from the first on, and wants `external` tokens."""
        if not external:
            return
        state = self._requests[request.request_id]
        if state.answer is None or state.offered is None or external != state.offered.end - state.offered.begin:
            raise RuntimeError(f"vLLM asks for {external} tokens; {state.offered} was offered")
        tokens, hit = state.offered, state.answer.hit
        first, end = self._chunks_of(tokens)
        order = LoadOrder(
            request_id=request.request_id,
            tokens=tokens,
            block_ids=spanned_blocks(tokens, block_ids, block_tokens=self._role.block_tokens),
            first_token=first * self._chunk_tokens,
            keys=tuple(state.answer.keys[first:end]),
            places=() if hit is None else tuple(chunk.place() for chunk in hit.chunks[first:end]),
            pace=self._pace(state, tokens, time.monotonic()),
            by_layer=self._by_layer(state),
            follow=state.follow,
        )
        self._loads.add(order, block_ids[tokens.begin // self._role.block_tokens :])
        self._tally.add("kvstore_loads")

    def build_orders(self, output: SchedulerOutput) -> StepOrders:
        """What the worker is to do in this step."""
        spans = list(spans_of(output))
        loads = self._loads.take_orders()
        prefills = [span for _, span in spans if span.end - span.begin > 1]
        unsure = {order.request_id for order in loads if order.by_layer}
        self._meter.begin_step(time.monotonic(), prefills, len(spans) - len(prefills), measured=not unsure)
        preempted = tuple(output.preempted_req_ids or ()) if self._role.reads_later else ()
        self._saves.let_go(preempted)  # first: one that is resumed in the same step may be saved anew
        saves = []
        for request_id, span in spans if self._role.saves else ():
            state = self._requests.get(request_id)
            if request_id in unsure:  # what the step computes rests on a load that may fail: the next one saves it
                continue
            if state is not None:
                self._asking.take(state)
                save = self._saves.order(request_id, state, span.end, output)
                if save is not None:
                    saves.append(save)
        held, self._held_new = tuple(self._held_new), []
        idle_s = 0.0
        if not output.total_num_scheduled_tokens:
            asked = any(state.lookup is not None for state in self._requests.values())
            idle_s = _LOADING_WAIT_S if self._loads.any or self._held else _LOOKUP_WAIT_S if asked else 0.0
        read_now = bool(saves) and not self._role.reads_later
        orders = StepOrders(loads, tuple(saves), idle_s, self._epoch, preempted, held, read_now)
        self._porter.send()  # last, as other threads go on from here
        return orders

    def end_step(self) -> list[KVCacheEvent]:
        """The engine has the results of a step; what there is to tell whoever follows its cache."""
        self._meter.end_step(time.monotonic())
        return self._events.take() if self._events is not None else []

    def take_report(self, report: StepReport) -> None:
        """Learn what the worker, or the ranks, finished."""
        if report.links:  # a hit is there when the slowest rank has it
            link = min(report.links, key=lambda link: link.bytes_per_s or float("inf"))
            self._admission.note_link(link.bytes_per_s, link.latency_s)
        for load in report.loads:
            ended = self._loads.note(load)
            if ended is not None:
                self._note_load(ended)
        for save in report.saves:
            self._loads.mend(self._saves.note(save))

    def drop_request(self, request_id: str) -> dict[str, Any] | None:
        """The request has ended; what to tell its client. What it saves goes on; a load is the worker's to end."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return None
        if state.lookup is not None and state.reason == "absent":
            state.reason = "aborted"
        self._asking.stop(state)
        return self._outcomes.finish(state)

    def hold_blocks(self, request_id: str) -> bool:
        """Whether the blocks of a request that ends now are to be held, for saves still read them, until `let_go`."""
        if not self._saves.reads(request_id) or self._loads.is_loading(request_id):
            return False  # where it is being loaded again, it was preempted, and they are others' already
        self._held_new.append(request_id)
        self._held.add(request_id)
        return True

    def let_go(self, request_ids: Iterable[str]) -> None:
        """All ranks have said that no save reads the blocks of these requests any more."""
        self._held.difference_update(request_ids)

    @property
    def holds_blocks(self) -> bool:
        """Whether blocks of ended requests are held, and will be free soon."""
        return bool(self._held)

    def start_epoch(self) -> None:
        """What the engine computes from now on is another model's: nothing older is loaded, nothing mixed is saved."""
        self._epoch += 1
        self._holds_old = self._manager is not None and not _is_empty(self._manager)
        if self._holds_old:
            log.warning(
                "the engine kept blocks when its caches were reset: until a reset succeeds, requests that use its "
                "prefix cache are neither loaded nor saved; reset again when no request is running"
            )
        self._epoch_key = secrets.token_bytes(16)  # another engine's reset may be to other weights
        for state in self._requests.values():
            state.may_load = state.may_save = False
            state.reason = "reset"
            self._asking.stop(state)

    def measure(self) -> None:
        """Bring this half's gauges up to date."""
        if self._meter.tokens_per_s is not None:
            self._tally.set("kvstore_prefill_tokens_per_s", round(self._meter.tokens_per_s, 1))

    def _plan_load(self, state: RequestState, request: Request, computed: int) -> TokenRange | None:
        if state.answer is None:
            return None
        usable = floor_to(state.tokens, self._chunk_tokens) if state.follow else self._asking.usable_tokens(state)
        if self._by_layer(state):
            usable = min(usable, request.num_tokens - 1)  # the step needs a token to compute
        tokens = plan_load(usable, computed, block_tokens=self._role.block_tokens)
        if tokens is None:
            state.reason = "local" if usable else state.reason
            return None
        if state.answer.hit is None:
            return tokens
        first, end = self._chunks_of(tokens)
        size = sum(chunk.size for chunk in state.answer.hit.chunks[first:end])
        reason = self._admission.may_load(computed, tokens.end, state.tokens, size, self._role.has_tiers)
        if reason is None:
            return tokens
        state.reason = reason
        log.debug("%s", self._admission.explain())
        return None

    def _chunks_of(self, tokens: TokenRange) -> tuple[int, int]:
        """Numbers of the chunks that hold `tokens`, half open."""
        return tokens.begin // self._chunk_tokens, -(-tokens.end // self._chunk_tokens)

    def _by_layer(self, state: RequestState) -> bool:
        return self._options.load_mode == "by-layer" and not state.follow

    def _pace(self, state: RequestState, tokens: TokenRange, now: float) -> Pace | None:
        speed, deadline_s = self._meter.speed, self._options.first_token_deadline_s
        unasked = self._options.admission == "always" and deadline_s is None
        if speed is None or (unasked and not state.follow):
            return None
        if deadline_s is not None:
            deadline_s = max(0.0, deadline_s - (now - state.arrived))
        per_layer = speed.seconds(tokens.end, state.tokens) / self._layers if self._by_layer(state) else 0.0
        return Pace(speed, state.tokens, deadline_s, per_layer, spent_s=state.waited_s)

    def _note_load(self, load: LoadUnderWay) -> None:
        """A load has ended on all ranks. Never offer the same failing hit again at once."""
        order, good = load.order, load.good
        whole, state = good == order.tokens.end, self._requests.get(order.request_id)
        self._outcomes.note_load(load, state)
        if not order.follow and (whole or load.reason == "late"):
            size = sum(place.size for place in order.places)
            self._admission.note_load(order.tokens.begin, good, size, load.seconds, near=load.near)
        if not whole and order.by_layer:
            self._forget_blocks(load)
        if not whole and load.lost:
            key = order.keys[(good - order.first_token) // self._chunk_tokens]
            self._loads.avoid(key, time.monotonic())
            if self._events is not None and load.reason == "damaged":
                self._events.removed([key])
        if state is not None:
            state.may_load = whole and not order.follow
            if not whole and (load.lost or order.follow):
                state.stored = floor_to(good, self._chunk_tokens)  # what is computed again mends the store

    def _forget_blocks(self, load: LoadUnderWay) -> None:
        """Take what a load by layer did not fill, and what was computed from it, out of the engine's prefix cache.

        vLLM caches blocks when it allocates them, and would give them to others until they are computed again, or for
        good where the request was aborted.
        """
        if self._manager is not None:
            filled = (load.good - load.order.tokens.begin) // self._role.block_tokens
            self._manager.evict_blocks(set(load.block_ids[filled:]))


def _is_empty(manager: KVCacheManager) -> bool:
    """Whether no request and no cached prefix has a block; block 0 is vLLM's own."""
    pool = manager.block_pool
    return bool(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)
