"""Follow a prompt that another engine is prefilling right now: its chunks, one after the other, as they are stored.

The chunk keys are the rendezvous. Whoever has the prompt has the keys, so the engine that decodes needs no message from
the one that prefills, nor to know which one it is. An object store tells nobody what was written, so it is asked: one
head for the next chunk alone, and for more of them only when that one is there. No vLLM here.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Protocol

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hits import Hit
from kvstore_s3.planner import PrefillSpeed

FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.05
PAUSE_GROWTH = 1.5
LOOK_CHUNKS = 8
"""Chunks asked for where it is likely that more than one is there: at first, for the beginning of the prompt may have
been stored long ago, and after each hit, for more came while it was loaded. Twice as many each time that all are."""
MOST_LOOK_CHUNKS = 256


class KeyLookup(Protocol):
    """What following needs of a `KVStore`."""

    async def lookup_keys(self, keys: Sequence[bytes], *, first_token: int) -> Hit:
        """The unbroken stored run of `keys` from the first on, whose first token is `first_token` of its prompt."""


class Follower:
    """Follows any number of prompts in one store. For one event loop.

    All of them together ask at most about `asks_per_s` times a second: the more are followed, the longer each pauses.
    The store must not remember misses (`Settings.miss_lifetime_s` 0), or it answers from memory.
    """

    def __init__(
        self,
        kv: KeyLookup,
        *,
        asks_per_s: float = 200.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        spread: Callable[[], float] = random.random,
    ) -> None:
        if not asks_per_s > 0:
            raise InvalidArgumentError(f"asks_per_s must be positive, not {asks_per_s}")
        self._kv = kv
        self._asks_per_s = asks_per_s
        self._clock = clock
        self._sleep = sleep
        self._spread = spread
        self._active = 0

    async def follow(
        self,
        keys: Sequence[bytes],
        *,
        chunk_tokens: int,
        stall_s: float,
        first_token: int = 0,
        speed: PrefillSpeed | None = None,
    ) -> AsyncGenerator[Hit, None]:
        """Hits of consecutive chunks, in order, each as soon as it is stored; together at most all of `keys`.

        `keys` name the chunks from `first_token` (a chunk boundary) on. It ends when all are there, or when nothing new
        has come for as long as `patience_s` says. What the caller does with a hit is not counted as waiting, and while
        it is at work nobody is asked: the next answer then brings all that has come meanwhile. Raises `StoreError` as
        lookups do.
        """
        found, look, pause = 0, LOOK_CHUNKS, FIRST_PAUSE_S
        since = self._clock()
        self._active += 1
        try:
            while found < len(keys):
                begin = first_token + found * chunk_tokens
                hit = await self._kv.lookup_keys(keys[found : found + look], first_token=begin)
                if hit:
                    found += len(hit.chunks)
                    more = 2 * look if len(hit.chunks) == look else LOOK_CHUNKS
                    look, pause = min(max(more, LOOK_CHUNKS), MOST_LOOK_CHUNKS), FIRST_PAUSE_S
                    yield hit
                    since = self._clock()
                    continue
                left = since + patience_s(stall_s, speed, begin, first_token + len(keys) * chunk_tokens) - self._clock()
                if left <= 0:
                    return
                await self._sleep(min(self._spread_out(pause), left))
                look, pause = 1, min(PAUSE_GROWTH * pause, LONGEST_PAUSE_S)
        finally:
            self._active -= 1

    def _spread_out(self, pause: float) -> float:
        """`pause`, or longer where many ask; each a little different, so that those that began together part."""
        return max(pause, self._active / self._asks_per_s) * (0.75 + 0.5 * self._spread())


def patience_s(stall_s: float, speed: PrefillSpeed | None, begin: int, end: int) -> float:
    """Seconds without a new chunk after which the rest, tokens `begin` to `end`, is computed here.

    As long as computing them would take, for a prefill engine gives nothing until its step has ended, and waits for its
    turn before; whoever waits no longer than that loses at most as much again. Never less than `stall_s`.
    """
    return stall_s if speed is None else max(stall_s, speed.seconds(begin, end))
