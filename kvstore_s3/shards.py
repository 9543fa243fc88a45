"""Which rectangles the writers of a namespace have used: each but the whole model has a marker beside the data."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

from kvstore_s3.errors import InvalidArgumentError, StoreRefusedError, StoreUnavailableError
from kvstore_s3.layout import Shard
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectStore

log = logging.getLogger("kvstore_s3")

SHARD_FOLDER = "shards"
_MOST_SHARDS = 1024
"""Markers that are believed: far more than partitions have ranks, and few enough to be asked for."""


def marker_key(namespace_hex: str, shard: Shard) -> str:
    return f"{namespace_hex}/{SHARD_FOLDER}/{shard.name}"


class KnownShards:
    """The rectangles that objects of one namespace may have. For one event loop.

    They are listed when `refresh_soon` is called for the first time, and again once `lifetime_s` has passed. The whole
    model needs no marker, so that a store that nobody wrote parts to has none.
    """

    def __init__(self, objects: ObjectStore, namespace: Namespace, *, lifetime_s: float) -> None:
        self._objects = objects
        self._namespace = namespace
        self._lifetime_s = lifetime_s
        self._expected: frozenset[Shard] = frozenset()
        self._shards: tuple[Shard, ...] = (namespace.layout.full_shard,)
        self._until = float("-inf")
        self._listing: asyncio.Task[None] | None = None
        self._marked_until = float("-inf")
        self._told = False

    def expect(self, shards: Iterable[Shard]) -> None:
        """Objects of these may come any moment, whatever markers there are."""
        self._expected = frozenset(shards) - {self._namespace.layout.full_shard}
        self._know(self._shards)

    def refresh_soon(self) -> None:
        """Begin to list the markers, unless they are known or being listed."""
        if time.monotonic() >= self._until and (self._listing is None or self._listing.done()):
            self._listing = asyncio.create_task(self._list())
            self._listing.add_done_callback(_take_result)

    async def find(self, *, must_know: bool = True) -> Sequence[Shard]:
        """The rectangles that are known, the whole model first, the larger before the smaller.

        Waits for a listing that is under way. Raises `StoreError` where the store fails, if the caller `must_know`;
        where it refuses to list, the whole model alone is known, and that is said once.
        """
        try:
            if self._listing is not None:
                await asyncio.shield(self._listing)
        except StoreUnavailableError:
            if must_know:
                raise
        return self._shards

    async def mark(self, shard: Shard) -> None:
        """Tell readers that objects of `shard` are written here: before the first of them, and again now and then.

        A lifecycle rule removes the oldest objects first, and those are the markers.
        """
        if time.monotonic() < self._marked_until or shard == self._namespace.layout.full_shard:
            return
        await self._objects.put(marker_key(self._namespace.hex, shard), f"{shard.name}\n".encode("ascii"))
        self._marked_until = time.monotonic() + self._lifetime_s

    def _know(self, found: Iterable[Shard]) -> None:
        full = self._namespace.layout.full_shard
        parts = (self._expected | set(found)) - {full}
        self._shards = (full, *sorted(parts, key=lambda shard: (-shard.layers * shard.heads, shard.name)))

    async def close(self) -> None:
        """End a listing that nobody waits for. Safe to call twice."""
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.wait({self._listing})

    async def _list(self) -> None:
        full = self._namespace.layout.full_shard
        found: set[Shard] = set()
        folder = f"{self._namespace.hex}/{SHARD_FOLDER}/"
        try:
            async for info in self._objects.list(folder):
                shard = _parse(info.key.removeprefix(folder), full)
                if shard is not None and shard != full and len(found) < _MOST_SHARDS:
                    found.add(shard)
        except StoreRefusedError as error:
            if not self._told:
                log.warning("parts of chunks that other ranks wrote are not found, as listing is refused: %s", error)
            self._told = True
            self._until = time.monotonic() + self._lifetime_s
            return
        self._know(found)
        self._until = time.monotonic() + self._lifetime_s


def _parse(name: str, full: Shard) -> Shard | None:
    try:
        shard = Shard.parse(name)
    except InvalidArgumentError:
        return None
    return shard if shard.layer_end <= full.layer_end and shard.head_end <= full.head_end else None


def _take_result(listing: asyncio.Task[None]) -> None:
    """A failure is raised to those who wait for it; nobody may."""
    if not listing.cancelled():
        listing.exception()
