"""Saves in the scheduler's half: what to save of which request, and what is under way until every rank has reported."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore_s3.connectors.vllm.admission import Admission
from kvstore_s3.connectors.vllm.events import EventLog
from kvstore_s3.connectors.vllm.health import StoreHealth
from kvstore_s3.connectors.vllm.loading import LoadsUnderWay
from kvstore_s3.connectors.vllm.messages import SaveOrder, SaveReport
from kvstore_s3.connectors.vllm.plans import TokenRange, plan_save, spanned_blocks
from kvstore_s3.connectors.vllm.requests import RequestState, Role
from kvstore_s3.connectors.vllm.stats import Tally

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


_ENDS = ("stored", "shed", "failed")
"""How a save may end, the worst last."""
_COUNTERS = {"stored": "kvstore_saves", "shed": "kvstore_saves_shed", "failed": "kvstore_saves_failed"}


@dataclass(frozen=True, slots=True)
class Told:
    """What an event says of a save beyond its order."""

    parent: bytes | None
    token_ids: Sequence[int]
    salt: str | None
    lora_name: str | None


@dataclass(slots=True)
class SaveUnderWay:
    """One order, and what the ranks that have reported say together."""

    order: SaveOrder
    ranks_left: int
    told: Told | None
    reads: bool
    """Whether its blocks may still be read, and are the request's."""
    end: str = "stored"
    new_tokens: int = 0
    new_bytes: int = 0


class SaveOrders:
    """Orders saves and follows them. For the scheduler's thread."""

    def __init__(
        self,
        role: Role,
        admission: Admission,
        health: StoreHealth,
        tally: Tally,
        events: EventLog | None,
        loads: LoadsUnderWay,
        *,
        chunk_tokens: int,
    ) -> None:
        self._role = role
        self._admission = admission
        self._health = health
        self._tally = tally
        self._events = events
        self._loads = loads
        self._chunk_tokens = chunk_tokens
        self._ids = itertools.count()
        self._saves: dict[int, SaveUnderWay] = {}
        self._keys: set[bytes] = set()

    def order(self, request_id: str, state: RequestState, computed: int, output: SchedulerOutput) -> SaveOrder | None:
        """What to save of a request of which the step makes `computed` tokens complete; None: nothing."""
        if not state.may_save or state.answer is None or state.stored is None:
            return None
        tokens = plan_save(
            state.stored,
            computed,
            state.tokens,
            chunk_tokens=self._chunk_tokens,
            keys=state.answer.keys,
            in_flight=self._keys,
        )
        state.stored = tokens.end
        tokens = self._admit(state, tokens)
        return self._order(request_id, state, state.answer.keys, tokens, output) if tokens.begin < tokens.end else None

    def reads(self, request_id: str) -> bool:
        """Whether the blocks of a request that has ended are to be held for its saves."""
        return any(save.reads and save.order.request_id == request_id for save in self._saves.values())

    def let_go(self, request_ids: Container[str]) -> None:
        """These requests have lost their blocks."""
        for save in self._saves.values():
            save.reads &= save.order.request_id not in request_ids

    def note(self, report: SaveReport) -> tuple[bytes, ...]:
        """One rank's save has ended. The keys of the chunks that are stored now, once all ranks have ended it."""
        save = self._saves[report.save_id]
        save.ranks_left -= 1
        save.end = max(save.end, report.end, key=_ENDS.index)
        save.new_tokens = max(save.new_tokens, report.new_tokens)
        save.new_bytes += report.new_bytes
        if save.ranks_left:
            return ()
        del self._saves[report.save_id]
        self._keys.difference_update(save.order.keys)
        self._tally.add("kvstore_bytes_saved", save.new_bytes)
        self._tally.add(_COUNTERS[save.end])
        if save.end != "stored":
            return ()
        self._tally.add("kvstore_tokens_saved", save.new_tokens)
        self._admission.note_save(save.new_tokens, save.new_bytes)
        if self._events is not None and save.told is not None:
            told, first = save.told, save.order.tokens.begin
            self._events.stored(
                save.order.keys, told.parent, told.token_ids, first, salt=told.salt, lora_name=told.lora_name
            )
        return save.order.keys

    def _admit(self, state: RequestState, tokens: TokenRange) -> TokenRange:
        """As much of what could be saved as is worth it."""
        end, reason = tokens.end, None
        if tokens.begin == tokens.end or (state.wanted and self._health.available):
            return tokens
        if not self._health.available:
            end, reason = tokens.begin, "store-out"
        else:
            end, reason = self._admission.may_save(
                tokens.begin, tokens.end, prompt_tokens=state.tokens, seen_tokens=state.seen or 0
            )
        if reason is not None:
            state.may_save = False  # what would follow is of no use without it
            self._tally.add("kvstore_not_saved", label=reason)
        return TokenRange(tokens.begin, end)

    def _order(
        self, request_id: str, state: RequestState, keys: Sequence[bytes], tokens: TokenRange, output: SchedulerOutput
    ) -> SaveOrder:
        first, end = tokens.begin // self._chunk_tokens, tokens.end // self._chunk_tokens
        block_ids = output.kv_connector_block_state.resolve_block_ids(request_id)[0]
        blocks = spanned_blocks(tokens, block_ids, block_tokens=self._role.block_tokens)
        quality = self._loads.quality_of(keys[:end])
        order = SaveOrder(next(self._ids), request_id, tokens, blocks, tuple(keys[first:end]), quality)
        told = None
        if self._events is not None:
            parent = keys[first - 1] if first else None
            token_ids = state.prompt.token_ids[tokens.begin : tokens.end]
            told = Told(parent, token_ids, state.prompt.salt, state.lora_name)
        self._saves[order.save_id] = SaveUnderWay(order, self._role.ranks, told, self._role.reads_later)
        self._keys.update(order.keys)
        return order
