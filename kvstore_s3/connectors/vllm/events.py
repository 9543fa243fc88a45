"""KV events: which chunks this engine put into the store, in vLLM's own event stream for routers and indexers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MEDIUM = "KVSTORE_S3"
"""The medium in every event; the engine's own blocks are on "GPU"."""


class EventLog:
    """Events since they were last taken. For the scheduler's thread.

    A chunk is told of as a block of `chunk_tokens` tokens whose hash is its chunk key (32 bytes), with its token ids,
    so that an index with hashes of its own can learn it. Other engines on one store tell of what they saved themselves.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._events: list[KVCacheEvent] = []

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig, chunk_tokens: int) -> EventLog | None:
        """A log where the engine publishes events, else None."""
        events = vllm_config.kv_events_config
        return cls(chunk_tokens) if events is not None and events.enable_kv_cache_events else None

    def stored(
        self,
        keys: Sequence[bytes],
        parent: bytes | None,
        token_ids: Sequence[int],
        first_token: int = 0,
        *,
        salt: str | None = None,
        lora_name: str | None = None,
    ) -> None:
        """The chunks `keys` are in the store now; `token_ids` are theirs, from the prompt's `first_token` on.

        `parent` is the key of the chunk in front of them, None at the prompt's start.
        """
        if len(token_ids) != len(keys) * self._chunk_tokens or (parent is None) != (first_token == 0):
            raise ValueError(f"{len(token_ids)} token ids from {first_token} on are not those of {len(keys)} chunks")
        if not keys:
            return
        extra = [(lora_name,) if lora_name else None for _ in keys]
        if salt and first_token == 0:  # as vLLM: it stands in the first block's keys alone
            extra[0] = (*(extra[0] or ()), salt)
        self._events.append(
            BlockStored(
                block_hashes=list(keys),
                parent_block_hash=parent,
                token_ids=[int(token) for token in token_ids],
                block_size=self._chunk_tokens,
                lora_id=None,
                medium=MEDIUM,
                lora_name=lora_name,
                extra_keys=extra if any(extra) else None,
                locality="REMOTE",
            )
        )

    def removed(self, keys: Sequence[bytes]) -> None:
        """The chunks `keys` turned out not to be in the store, or damaged."""
        if keys:
            self._events.append(BlockRemoved(block_hashes=list(keys), medium=MEDIUM, locality="REMOTE"))

    def take(self) -> list[KVCacheEvent]:
        events, self._events = self._events, []
        return events
