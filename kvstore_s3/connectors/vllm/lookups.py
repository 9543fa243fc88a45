"""What the store has of a prompt: hashed and asked on the event loop, so that the scheduler's thread does neither."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore_s3.connectors.vllm.adapters import AdapterDigests
from kvstore_s3.connectors.vllm.health import StoreHealth, log
from kvstore_s3.errors import InvalidArgumentError, KVStoreError
from kvstore_s3.hashing import as_token_array, chunk_keys, root_key

if TYPE_CHECKING:
    from kvstore_s3.hashing import TokenArray
    from kvstore_s3.store import Hit, KVStore

_SLICE = 16384
"""Token ids that are converted in one go; the conversion holds the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """All that names the KV of a prompt within a namespace, as the engine has it.

    `adapter` is a LoRA adapter: its number, its path, and whether it was loaded in another's place. `epoch` is empty
    until the engine's caches are reset, for new weights for one: nothing that was stored before is this prompt's then.
    """

    token_ids: Sequence[int]
    salt: str | None
    adapter: tuple[int, str, bool] | None
    epoch: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """Keys of all whole chunks of a prompt, and what the store has of them.

    `hit` is None where the store failed, and `keys` are empty where the prompt cannot be named: `reason` says why.
    """

    keys: Sequence[bytes]
    hit: Hit | None
    seconds: float = 0.0
    reason: str | None = None


class Lookups:
    """Asks one store. `ask` runs on its event loop."""

    def __init__(self, kv: KVStore, health: StoreHealth, adapters: AdapterDigests) -> None:
        self._kv = kv
        self._health = health
        self._adapters = adapters

    async def ask(self, prompt: Prompt, *, names_only: bool = False) -> Answer:
        """Never raises what a store may raise: the answer says it. `names_only`: the store is not asked."""
        begun = time.monotonic()
        extra = prompt.epoch
        if prompt.adapter is not None:
            try:
                number, path, in_place = prompt.adapter
                extra += await self._adapters.find(number, path, in_place=in_place)
            except InvalidArgumentError as error:
                log.debug("a request is left alone: %s", error)
                return Answer((), None, time.monotonic() - begun, "lora-unknown")
        size = self._kv.namespace.chunk_tokens
        try:
            root = root_key(self._kv.namespace.digest, prompt.salt)
            keys = chunk_keys(root, _to_array(prompt.token_ids), size, extra_keys={0: extra} if extra else None)
        except InvalidArgumentError as error:
            log.debug("a request is left alone: %s", error)
            return Answer((), None, time.monotonic() - begun, "other-input")
        if names_only:
            return Answer(keys, None, time.monotonic() - begun)
        try:
            hit = await self._kv.lookup_keys(keys)
        except KVStoreError as error:
            self._health.report(error)
            return Answer(keys, None, time.monotonic() - begun, "store-out")
        return Answer(keys, hit, time.monotonic() - begun)


def _to_array(token_ids: Sequence[int]) -> TokenArray:
    """As `as_token_array`, giving way to other threads in between."""
    slices = [as_token_array(token_ids[i : i + _SLICE]) for i in range(0, len(token_ids), _SLICE)]
    return np.concatenate(slices) if slices else as_token_array([])
