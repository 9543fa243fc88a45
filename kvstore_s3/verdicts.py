"""What lookups and loads found out about chunks, each for a while. For one event loop."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple

from kvstore_s3.bitstream import Identity
from kvstore_s3.load import StoredChunk

_MOST_VERDICTS = 1 << 17
"""Chunks remembered at once; beyond them the oldest verdicts are forgotten."""


class Verdict(NamedTuple):
    """`chunk` is None where the object was not there."""

    until: float
    chunk: StoredChunk | None


class Loss(NamedTuple):
    """A chunk that is not offered; `broken` is the object that was found damaged, None where it may be sound."""

    until: float
    broken: Identity | None


class Verdicts:
    """A chunk was found, or was not there, or was lost: damaged, gone while it was read, or of no use to this quality.

    What was found is remembered for `lifetime_s`, and so is what was lost; what was not there for `miss_lifetime_s`.
    """

    def __init__(self, *, lifetime_s: float, miss_lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        self._miss_lifetime_s = miss_lifetime_s
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._lost: dict[bytes, Loss] = {}
        self._written: OrderedDict[bytes, float] = OrderedDict()

    def find(self, key: bytes) -> Verdict | None:
        """What a lookup said of the chunk, while it holds."""
        verdict = self._known.get(key)
        return verdict if verdict is not None and verdict.until > time.monotonic() else None

    def note(self, key: bytes, chunk: StoredChunk | None) -> None:
        """A lookup found `chunk`, or nothing."""
        lifetime_s = self._miss_lifetime_s if chunk is None else self._lifetime_s
        self._known.pop(key, None)
        if lifetime_s:
            self._known[key] = Verdict(time.monotonic() + lifetime_s, chunk)
        if len(self._known) > _MOST_VERDICTS:
            self._known.popitem(last=False)

    def lose(self, key: bytes, broken: Identity | None = None) -> None:
        """The chunk cannot be used; `broken` is the object that is damaged, if one is."""
        now = time.monotonic()
        self._known.pop(key, None)
        self._lost = {key: loss for key, loss in self._lost.items() if loss.until > now}
        self._lost[key] = Loss(now + self._lifetime_s, broken)

    def is_lost(self, key: bytes) -> bool:
        loss = self._lost.get(key)
        return loss is not None and loss.until > time.monotonic()

    def find_broken(self, key: bytes) -> Identity | None:
        """The object whose damage lost the chunk."""
        loss = self._lost.get(key)
        return loss.broken if loss is not None else None

    def forget(self, key: bytes) -> None:
        """The object was written anew."""
        self._known.pop(key, None)
        self._lost.pop(key, None)
        self._written.pop(key, None)
        self._written[key] = time.monotonic()
        if len(self._written) > _MOST_VERDICTS:
            self._written.popitem(last=False)

    def is_written_since(self, key: bytes, begun: float) -> bool:
        """Whether the object was written anew after `begun`, in seconds of the monotonic clock."""
        return self._written.get(key, float("-inf")) >= begun
