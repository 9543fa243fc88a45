"""Which chunks of a prompt are stored: by the verdicts of earlier lookups, the tiers on this machine, and the store.

The store is asked by parallel heads; the hint in the metadata or the header tells where an object's sections lie.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvstore_s3.bitstream import HINT_NAME, Header, Identity, decode_hint, parse_header, read_header_length
from kvstore_s3.errors import DamagedObjectError
from kvstore_s3.load import LOST, MissingCalibrationError, StoredChunk, run_all
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.base import ObjectInfo, ObjectStore
from kvstore_s3.quality import Quality
from kvstore_s3.section_index import PROFILES
from kvstore_s3.transfer.ranges import count_levels
from kvstore_s3.verdicts import Verdict, Verdicts

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration

log = logging.getLogger("kvstore_s3")

_HEADER_GUESS = 4096
"""Bytes read for a header whose length is not known: enough for 100 sections."""

ReadLocal = Callable[[str, int], Awaitable[bytes | None]]
"""The first bytes of an object, so many or all it has, from the tiers on this machine; None: they do not have them."""


async def read_nothing(object_key: str, length: int) -> bytes | None:
    """The `ReadLocal` of a machine without tiers."""
    return None


def object_key(identity: Identity) -> str:
    """`<namespace>/<chunk key>/<shard>`, as docs/FORMAT.md says."""
    return f"{identity.namespace.hex()}/{identity.key.hex()}/{identity.shard.name}"


class ChunkFinder:
    """Finds chunks in one object store and the tiers in front of it.

    A chunk that was found is not asked for again for `verdict_lifetime_s`; its verdict is withdrawn as soon as it turns
    out damaged or gone. A chunk that was lost is not offered again for so long, unless `mend` is told of it sooner. An
    object of a profile that `quality` does not accept counts as lost too: a save replaces it.
    """

    def __init__(
        self,
        objects: ObjectStore,
        quality: Quality,
        *,
        find_calibration: Callable[[bytes], Awaitable[Calibration | None]],
        concurrency: int,
        verdict_lifetime_s: float,
        miss_lifetime_s: float = 0.0,
        read_local: ReadLocal = read_nothing,
        on_delay: Callable[[float, float], None] = lambda seconds, now: None,
        count: Count = ignore,
    ) -> None:
        self._objects = objects
        self._quality = quality
        self._find_calibration = find_calibration
        self._concurrency = concurrency
        self._read_local = read_local
        self._on_delay = on_delay
        self._count = count
        self._verdicts = Verdicts(lifetime_s=verdict_lifetime_s, miss_lifetime_s=miss_lifetime_s)
        self._told: set[int] = set()
        self._mended = 0

    async def find_all(
        self,
        identities: Sequence[Identity],
        *,
        stop_at_miss: bool,
        thorough: bool,
        first_token: int = 0,
        fresh: bool = False,
    ) -> list[StoredChunk | None]:
        """One answer for each chunk, in order, the first at position `first_token` of its prompt.

        With `stop_at_miss`, those behind the first miss may be None. `thorough` reads the header of each scalable
        object, which alone names its calibration: one whose calibration is not at hand is a miss here, and not only
        when it is loaded. `fresh` asks the store alone, whatever is remembered: for writers.
        """
        found: list[StoredChunk | None] = [None] * len(identities)
        limit = len(identities)
        unknown: list[int] = []
        for index, identity in enumerate(identities):
            verdict = None if fresh else self._recall(identity, thorough)
            if verdict is None:
                unknown.append(index)
            elif verdict.chunk is not None:
                found[index] = replace(verdict.chunk, first_token=first_token + index * identity.tokens)
            elif stop_at_miss:
                limit = index
                break
        pending = iter(unknown)

        async def work() -> None:
            nonlocal limit
            for index in pending:
                if index >= limit:
                    return
                position = first_token + index * identities[index].tokens
                found[index] = await self._find(identities[index], position, thorough, fresh)
                if found[index] is None and stop_at_miss:
                    limit = min(limit, index)

        await run_all([work() for _ in range(min(self._concurrency, len(unknown)))])
        return found

    def _recall(self, identity: Identity, thorough: bool) -> Verdict | None:
        """What is known of the chunk, if that is enough for this lookup."""
        verdict = self._verdicts.find(identity.key)
        if verdict is None or verdict.chunk is None or not thorough or verdict.chunk.header is not None:
            return verdict
        return None if _needs_header(verdict.chunk.table.profile) else verdict

    async def _find(self, identity: Identity, first_token: int, thorough: bool, fresh: bool) -> StoredChunk | None:
        if self.is_lost(identity):
            return None
        mended = self._mended
        try:
            chunk = None if fresh else await self._find_local(identity, first_token, thorough)
            if chunk is None:
                begun = time.monotonic()
                info = await self._objects.head(object_key(identity))
                now = time.monotonic()
                self._on_delay(now - begun, now)
                chunk = None if info is None else await self._inspect(info, identity, first_token, thorough)
        except LOST as error:
            self.lose(identity, error)
            return None
        if not self.is_lost(identity) and (chunk is not None or mended == self._mended):
            self._verdicts.note(identity.key, chunk)  # not a miss that a save may have mended meanwhile
        return chunk

    async def _find_local(self, identity: Identity, first_token: int, thorough: bool) -> StoredChunk | None:
        """The chunk as the tiers have it; None where they have not, or not so that it can be used."""
        key = object_key(identity)
        data = await self._read_local(key, _HEADER_GUESS)
        if data is None:
            return None
        try:
            length = read_header_length(data)
            if length > len(data):
                data = await self._read_local(key, length) or b""
            header = parse_header(data, identity, profiles=PROFILES, calibrations=None)
        except DamagedObjectError:
            return None  # the store has it whole
        if not self._quality.is_met_by(header.table.profile, count_levels(header.table)):
            return None
        if thorough and not await self._is_decodable(header):
            return None
        return StoredChunk(key, identity, header.table, header, first_token)

    async def _inspect(
        self, info: ObjectInfo, identity: Identity, first_token: int, thorough: bool
    ) -> StoredChunk | None:
        hint = info.metadata.get(HINT_NAME)
        if hint is not None:
            try:
                table = decode_hint(hint, identity, profiles=self._quality.accepts)
            except DamagedObjectError:
                pass  # a hint is only a hint: the header decides
            else:
                enough = not thorough or not _needs_header(table.profile)
                fits = table.object_length == info.size
                if enough and fits and self._quality.is_met_by(table.profile, count_levels(table)):
                    return StoredChunk(info.key, identity, table, None, first_token)
        data = bytearray(min(_HEADER_GUESS, info.size))
        await self._objects.get_range(info.key, 0, memoryview(data))
        length = read_header_length(data)
        if length > len(data):
            data = bytearray(min(length, info.size))
            await self._objects.get_range(info.key, 0, memoryview(data))
        header = parse_header(data, identity, profiles=PROFILES, calibrations=None)
        header.table.check_object_length(info.size)
        if not self._is_accepted(header) or (thorough and not await self._is_decodable(header)):
            self._verdicts.lose(identity.key)
            return None
        return StoredChunk(info.key, identity, header.table, header, first_token)

    async def _is_decodable(self, header: Header) -> bool:
        return header.calibration is None or await self._find_calibration(header.calibration) is not None

    def _is_accepted(self, header: Header) -> bool:
        """Whether the object is as good as the quality wanted; that one is not is said once for each profile."""
        profile = header.table.profile
        if self._quality.is_met_by(profile, count_levels(header.table)):
            return True
        if profile not in self._told:
            self._told.add(profile)
            name = next(name for name, number in PROFILES.items() if number == profile)
            log.info(
                "there are %s objects in the store that profile %r cannot use: they are misses, and saves replace them",
                name,
                self._quality.name,
            )
        return False

    def lose(self, identity: Identity, error: Exception, begun: float = float("inf")) -> None:
        """Withdraw the verdict on an object, so that it is not offered again at once, and the next save mends it.

        Unless a save has done so already, since the work that failed has `begun`.
        """
        if self._verdicts.is_written_since(identity.key, begun):
            return
        if not self.is_lost(identity) and not isinstance(error, MissingCalibrationError):
            log.warning("%s is treated as a miss: %s", object_key(identity), error)
        self._count("chunks_lost", 1)
        self._verdicts.lose(identity.key)

    def is_lost(self, identity: Identity) -> bool:
        return self._verdicts.is_lost(identity.key)

    def mend(self, identity: Identity) -> None:
        """The object was written anew."""
        self._mended += 1
        self._verdicts.forget(identity.key)


def _needs_header(profile: int) -> bool:
    """Whether objects of this profile say something in their header alone: which calibration they were coded with."""
    return profile == PROFILES["scalable"]
